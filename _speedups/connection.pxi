# A socket, or a stream of HTTP/2, that the engine watches: what clients' and upstreams' connections share (included by engine.pyx).
#
# Strategy: where bytes come from and go to (kernel, TLS, frames) is decided here and nowhere else; both sides see recv, send and a buffer.

cdef class Connection:
    """A socket that the engine watches."""

    def __cinit__(self):
        self.fd = -1
        memset(&self.inb, 0, sizeof(Buffer))
        memset(&self.out, 0, sizeof(Buffer))
        self.timer_next = NULL
        self.timer_prev = NULL

    def __dealloc__(self):
        buffer_release(&self.inb)
        buffer_release(&self.out)
        if self.fd >= 0 and self.fd != FD_STREAM:
            cw_close(self.fd)

    @cython.final
    cdef ssize_t recv(self, void* data, size_t n) noexcept:
        if self.tls is not None:
            return self.tls.recv(data, n)
        return cw_recv(self.fd, data, n) if self.stream is None else self.stream.recv(data, n)

    @cython.final
    cdef ssize_t send(self, const void* data, size_t n) noexcept:
        if self.tls is not None:
            return self.tls.send(data, n)
        return cw_send(self.fd, data, n) if self.stream is None else self.stream.send(data, n)

    @cython.final
    cdef ssize_t sendv(self, iovec* pieces, int count) noexcept:
        if self.tls is None:
            return cw_sendv(self.fd, pieces, count)
        return self.tls.sendv(pieces, count)

    @cython.final
    cdef bint drained(self, ssize_t n, size_t room) noexcept:
        # Edge-triggered: more bytes make a new event. Of TLS, records may be left that the kernel has handed over already.
        if self.tls is not None:
            return self.tls.at_rest()
        if self.stream is not None:
            return self.stream.at_rest()
        return n < <ssize_t>room and not self.ended

    @cython.final
    cdef bint silent(self) noexcept:
        if self.tls is not None:
            return self.tls.silent()
        return cw_silent(self.fd) if self.stream is None else self.stream.at_rest()

    @cython.final
    cdef bint at_rest(self) noexcept:
        return not self.readable or (self.tls is not None and self.tls.at_rest())

    @cython.final
    cdef void wake(self) noexcept:
        self.readable = True
        if self.tls is not None:
            self.tls.wake(self.ended)

    @cython.final
    cdef bint shut(self) noexcept:
        if self.stream is not None:
            self.stream.end()
            return True
        if self.tls is not None and not self.tls.shut():
            return False
        cw_shutdown(self.fd, SHUT_WR)
        return True

    @cython.final
    cdef void cut_short(self) noexcept:
        if self.stream is not None:
            if self.stream.session is not None:
                self.stream.give_up(H2_CANCEL if self.stream.session.client else H2_INTERNAL_ERROR)
            return
        cw_reset_on_close(self.fd)
        if self.tls is not None:
            self.tls.broken = True

    @cython.final
    cdef void hang_up(self) noexcept:
        if self.stream is not None:
            self.stream.close()
            self.stream = None
            self.fd = -1
            return
        self.tls = None                             # with the descriptor: its number will be another's
        cw_close(self.fd)
        self.fd = -1

    cdef int on_events(self, uint32_t events) except -1:
        return 0

    cdef int on_timeout(self) except -1:
        self.close()
        return 0

    cdef void close(self):
        if self.fd < 0:
            return
        self.engine.closed.append(self)
        self.engine.unlink_timer(self)
        if self.stream is not None:
            self.hang_up()
            buffer_release(&self.inb)
            buffer_release(&self.out)
            return
        self.engine.unregister(self)
        if self.tls is not None:
            if self.out.end == self.out.start:
                self.tls.shut()
            self.tls = None
        cw_close(self.fd)
        self.fd = -1
        buffer_release(&self.inb)
        buffer_release(&self.out)

    cdef void close_now(self):
        self.close()

    cdef int put(self, const char* data, uint32_t n) noexcept:
        cdef ssize_t sent = 0
        if n == 0:
            return 0
        if self.fd < 0:
            return 0 if self.orphaned else -EPIPE
        if self.out.end == self.out.start:
            sent = self.send(data, n)
            if sent == n:
                return 0
            if sent < 0:
                if sent != -EAGAIN:
                    return <int>sent
                sent = 0
            self.writable = False
        return -ENOMEM if buffer_append(&self.out, data + sent, n - <uint32_t>sent) < 0 else 0

    @cython.final
    cdef int put_message(self, const char* data, uint32_t n, bint last) noexcept:
        cdef int head
        if self.stream is None:
            return self.put(data, n)
        head = self.stream.head(data, n, last)
        return -EPIPE if head < 0 else self.put(data + head, n - <uint32_t>head)

    @cython.final
    cdef void finish(self) noexcept:
        if self.stream is not None:
            if self.out.end > self.out.start:
                self.stream.last = True             # with the last of what waits
            else:
                self.stream.end()

    cdef int put_chunk(self, const char* data, uint32_t n) noexcept:
        """One chunk: size line, data, CRLF; three pieces in one call when nothing waits already."""
        cdef char size[24]
        cdef const char* ending = b"\r\n"
        cdef iovec pieces[3]
        cdef uint32_t head
        cdef ssize_t sent = 0
        cdef int i
        if n == 0:
            return 0
        if self.fd < 0:
            return 0 if self.orphaned else -EPIPE
        head = <uint32_t>cw_put_hex(size, n)
        size[head] = 13
        size[head + 1] = 10
        head += 2
        if self.out.end == self.out.start:
            pieces[0].iov_base = size
            pieces[0].iov_len = head
            pieces[1].iov_base = <void*>data
            pieces[1].iov_len = n
            pieces[2].iov_base = <void*>ending
            pieces[2].iov_len = 2
            sent = self.sendv(pieces, 3)
            if sent == head + n + 2:
                return 0
            if sent < 0:
                if sent != -EAGAIN:
                    return <int>sent
                sent = 0
            self.writable = False
        if buffer_reserve(&self.out, head + n + 2) < 0:
            return -ENOMEM
        keep_tail(&self.out, size, head, &sent)
        keep_tail(&self.out, data, n, &sent)
        keep_tail(&self.out, ending, 2, &sent)
        return 0

    cdef int flush(self) noexcept:
        """Sends what waits. 1 when nothing waits any more, 0 when the kernel takes no more now, or -errno."""
        cdef ssize_t sent
        while self.out.end > self.out.start:
            sent = self.send(self.out.base + self.out.start, self.out.end - self.out.start)
            if sent == -EAGAIN:
                self.writable = False
                return 0
            if sent < 0:
                return <int>sent
            buffer_consume(&self.out, <uint32_t>sent)
        buffer_release(&self.out)
        return 1


cdef void keep_tail(Buffer* out, const char* data, uint32_t n, ssize_t* sent) noexcept:
    """Appends data[*sent:n) to a buffer with room for it, and takes n off *sent."""
    if sent[0] >= n:
        sent[0] -= n
        return
    memcpy(out.base + out.end, data + sent[0], n - sent[0])
    out.end += n - <uint32_t>sent[0]
    sent[0] = 0
