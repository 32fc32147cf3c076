# The upstream's side of the engine (included by engine.pyx).
#
# Strategy: a connection serves one exchange, then waits in its endpoint's pool until the next. It is pooled only when the
# request was sent completely, the answer ended where its framing says, and nothing came behind it (the money rules in
# docs/architecture.md). An answer's head is parsed into Engine.answer_head and written on in the same event.


cdef enum:
    DEADLINE_SLACK_US = 5000        # the next hop is told whole milliseconds, and its clock is another


cdef inline bint hurried(Exchange x) noexcept:
    """Whether the deadline is one that the client set. An endpoint that does not keep it is no worse for that: else a client in a hurry could
    take it away from the others."""
    return x.total_at != 0 and (x.route.total_us == 0 or x.total_at < x.started + x.route.total_us)


cdef bint empty_line(const char* data, uint32_t seen, uint32_t length) noexcept nogil:
    """Whether an empty line (a LF, then CR LF or LF) ends in data[seen:length)."""
    cdef uint32_t at = seen - 2 if seen > 2 else 0
    cdef const char* found
    while at < length:
        found = <const char*>memchr(data + at, 10, length - at)
        if found == NULL:
            return False
        at = <uint32_t>(found - data) + 1
        if at < length and (data[at] == 10 or (data[at] == 13 and at + 1 < length and data[at + 1] == 10)):
            return True
    return False


cdef class UpstreamConnection(Connection):
    """A connection to an endpoint."""

    cdef int on_events(self, uint32_t events) except -1:
        cdef int result
        cdef Downstream downstream
        if self.state == U_IDLE:
            if not events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
                return 0                            # its turn of Engine.again, or room to write
            if self.tls is not None and not events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR) and self.silent():
                return 0                            # TLS 1.3 sends tickets when it likes
            # Closed by the other side, or bytes that nobody asked for: either way it carries no further exchange.
            self.engine.slot.counters[C_UPSTREAM_DISCARDED] += 1
            self.leave_pool()
            return 0
        if self.state == U_CONNECTING:
            if self.tls is not None:
                self.tls.wake(events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR) != 0)
                return self.secure()
            if events & (EPOLLOUT | EPOLLERR | EPOLLHUP):
                return self.connected(events)
            return 0
        downstream = <Downstream>self.x.connection
        if self.state == U_TUNNEL:
            return tunnel_events(downstream, self, events)
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self.ended = True
        if events & EPOLLOUT:
            self.writable = True
            if self.out.end > self.out.start and not self.broken:
                result = self.flush()
                if result < 0:
                    self.broken = True
                    self.ended = True
                elif not self.x.body.done:
                    downstream.arm_body()
                    downstream.advance()
                elif result == 1 and not self.x.answer_started and self.x.hedge is not self:
                    downstream.arm_head()
            if self.tls is not None and self.tls.starved:
                self.readable = True
        if events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self.wake()
        if self.fd >= 0 and self.x is not None:
            self.pump_answer()
        return 0

    cdef int on_timeout(self) except -1:
        if self.state == U_IDLE:
            self.leave_pool()
        return 0

    def moved(self, Endpoint endpoint, Upstream upstream) -> None:
        """The pool of this idle connection belongs to a new snapshot's endpoint now."""
        self.endpoint = endpoint
        self.upstream = upstream

    def discard(self) -> None:
        """The pool of this idle connection is given up."""
        self.close()

    cdef void leave_pool(self):
        if self in self.endpoint.idle:
            self.endpoint.idle.remove(self)
        self.close()

    cdef void take_up(self, Exchange x) noexcept:
        """Joins connection and exchange."""
        self.x = x
        self.recorded = False
        self.undecided = False
        self.took = 0
        self.ticket = self.endpoint.ticket
        self.sent_at = self.engine.now
        self.upstream.start(self.endpoint, self.engine.now, x.tries > 0)

    cdef void record(self, int outcome, int status, int64_t retry_after_us):
        """How this attempt ended, once: its endpoint is judged by that."""
        cdef int event
        if not self.recorded:
            self.recorded = True
            event = self.upstream.finish(self.endpoint, self.ticket, self.engine.now, outcome, status,
                                         self.took or self.engine.now - self.sent_at, retry_after_us)
            if event:
                self.engine.tell(self.endpoint, event)

    cdef void detach(self):
        """Parts connection and exchange."""
        if self.x is not None:
            self.record(OUTCOME_NONE, 0, 0)
            if self.x.hedge is self:
                self.x.hedge = None
            else:
                self.x.upstream_connection = None
            self.x = None
            self.upstream.stop(self.endpoint)

    cdef void close_now(self):
        """Whatever is under way on it: the client gets an answer or a reset."""
        cdef Downstream downstream
        if self.x is not None and self.x.hedge is self:
            drop_hedge(self.x, OUTCOME_NONE)
        elif self.state == U_TUNNEL:
            cut_tunnel(<Downstream>self.x.connection)
        elif self.x is not None:
            downstream = <Downstream>self.x.connection
            self.detach()
            self.close()
            downstream.close_now()                  # whichever of the two is met first, the record says the same
        elif self.state == U_IDLE:
            self.leave_pool()
        else:
            self.close()

    cdef void close(self):
        if self.stream is not None:
            part_stream(self)
            return
        if self.fd >= 0:
            self.engine.upstreams -= 1
            self.upstream.close_one()
            if self.state == U_IDLE:
                self.engine.upstreams_idle -= 1
            elif self.tls is not None:
                self.tls.broken = True              # in the middle of something: no orderly end (see release())
        self.state = U_CLOSED
        Connection.close(self)

    # -- connecting and sending ---------------------------------------------------------------------------------------

    cdef int connected(self, uint32_t events) except -1:
        if cw_socket_error(self.fd):
            self.engine.slot.counters[C_UPSTREAM_CONNECT_FAILURES] += 1
            return self.connect_failed(503, b"upstream-unreachable",
                                       b"no endpoint of the upstream accepts connections; the request was not sent")
        if events & (EPOLLIN | EPOLLRDHUP) and not self.silent():
            # What speaks before it is asked, or leaves at once, says nothing about this request.
            self.engine.slot.counters[C_UPSTREAM_BAD] += 1
            return self.connect_failed(502, b"upstream-bad-answer", b"the upstream spoke or left before it was asked; the request was not sent")
        if self.upstream.tls is None:
            return self.serve()
        self.tls = self.upstream.tls.connect(self.fd, self.endpoint.address, self.endpoint.host)
        return self.secure()

    cdef int secure(self) except -1:
        """The TLS handshake, as far as it goes now. Nothing of the request leaves before it is complete."""
        cdef int result = self.tls.handshake()
        if result == 0:
            return 0
        if result < 0:
            self.engine.slot.counters[C_UPSTREAM_TLS_FAILURES] += 1
            self.engine.slot.counters[C_UPSTREAM_CONNECT_FAILURES] += 1
            self.engine.complain("the TLS handshake with an upstream failed", {
                "upstream": self.upstream.name, "endpoint": self.endpoint.address, "reason": self.tls.reason})
            return self.connect_failed(503, b"upstream-tls-failed",
                                       b"no trusted TLS connection to the upstream can be made; the request was not sent")
        self.engine.slot.counters[C_UPSTREAM_TLS_HANDSHAKES] += 1
        if self.tls.resumed:
            self.engine.slot.counters[C_UPSTREAM_TLS_RESUMED] += 1
        if server_fallen(self.engine, self.upstream, self.tls):
            return self.connect_failed(503, b"upstream-tls-failed", b"the upstream was shut out of the mesh meanwhile; the request was not sent")
        if not self.tls.at_rest() and not self.silent():
            self.engine.slot.counters[C_UPSTREAM_BAD] += 1
            return self.connect_failed(502, b"upstream-bad-answer", b"the upstream spoke or left before it was asked; the request was not sent")
        return self.serve()

    cdef int serve(self) except -1:
        """The connection stands: the request that waits for it goes out."""
        cdef Downstream downstream = <Downstream>self.x.connection
        self.state = U_HEAD
        self.writable = True
        if self.x.hedge is self:
            return send_hedge(self)
        self.send_request()
        return downstream.advance()

    cdef int connect_failed(self, int status, bytes slug, bytes detail) except -1:
        """Nothing was sent: another endpoint may have it, once."""
        cdef Exchange x = self.x
        cdef Downstream downstream = <Downstream>x.connection
        self.record(OUTCOME_CONNECT, 0, 0)
        if x.hedge is self:
            drop_hedge(x, OUTCOME_CONNECT)
            return 0
        if x.hedge is not None:
            promote_hedge(x, OUTCOME_CONNECT)
            return 0
        if not try_again(downstream, RETRY_CONNECT, 0):
            downstream.drop_upstream()
            unreachable(x, status, slug, detail)
            downstream.reply()
        return downstream.advance()

    cdef int send_request(self) except -1:
        """Head and what is there of the body, in one piece."""
        cdef Exchange x = self.x
        cdef Downstream downstream = <Downstream>x.connection
        cdef char* out = self.engine.composed
        cdef int n = compose_request(x, out, HEAD_ROOM, self.engine.now)
        cdef uint32_t body_at = x.body_at
        cdef int64_t remaining = x.body.remaining
        cdef uint64_t counted = x.body.bytes
        cdef int result
        if x.total_at and self.engine.now >= x.total_at:
            return expired(downstream)
        if n < 0:
            self.detach()
            self.close()
            return downstream.refuse(500, b"head-too-large", b"the request head is too large after the policies' changes")
        if self.stream is not None:
            if x.upgrade:
                return ask_tunnel(self, n)
            dress_stream(self, downstream)
        if x.collected is not None:
            result = self.put_message(out, n, len(x.collected) == 0)
            if result == 0:
                x.sent = True                       # the head is out: this request is not sent again
                if self.stream is not None:
                    self.stream.last = True
                result = self.put(x.collected, len(x.collected))
        elif x.kept.end > x.kept.start:
            result = self.put_again(n)
        else:
            n = self.append_body(n)
            if self.stream is None and x.body.out == BODY_CHUNKED and x.body.done:
                memcpy(out + n, b"0\r\n\r\n", 5)   # an attempt before this one has read an empty body to its end
                n += 5
            result = self.put_message(out, n, x.body.done)
        x.upstream_from = cw_monotonic_us()
        self.sent_at = self.engine.now
        self.engine.slot.counters[C_UPSTREAM_BYTES_OUT] += n
        if result < 0:
            if x.replayable and self.reused and not x.raced and not x.sent:
                # The kernel took no byte: the request provably never left. Once more, on a new connection.
                x.body_at = body_at
                x.body.remaining = remaining
                x.body.bytes = counted
                if x.body.mode == BODY_LENGTH:
                    x.body.done = remaining == 0 or x.collected is not None
                buffer_release(&x.kept)
                if race_again(self):
                    return 0
            self.broken = True
            self.readable = True
        x.sent = True
        if x.upstream.hedge_us:
            plan_hedge(self)
        if x.body.done:
            downstream.arm_head()
        else:
            downstream.arm_body()
            if not self.broken:
                downstream.pump_request()
                return 0
        if self.broken:
            return self.pump_answer()
        return 0

    cdef int append_body(self, int n) except -1:
        """Puts body bytes that came with the head behind composed[0:n), as far as they fit. Returns the new length."""
        cdef Exchange x = self.x
        cdef Downstream downstream = <Downstream>x.connection
        cdef uint32_t there = downstream.inb.end - downstream.inb.start - x.body_at
        cdef char* out = self.engine.composed
        cdef int64_t take
        if x.body.done or there == 0 or x.body.mode != BODY_LENGTH or there > COMPOSED - HEAD_ROOM:
            return n
        take = there if there < x.body.remaining else x.body.remaining
        memcpy(out + n, downstream.inb.base + downstream.inb.start + x.body_at, take)
        if x.keeping:
            x.keep(out + n, <uint32_t>take)
        x.body_at += <uint32_t>take
        x.body.remaining -= take
        x.body.bytes += take
        x.body.done = x.body.remaining == 0
        if x.tap is not None:
            x.tap.take(x, out + n, <uint32_t>take)
        return n + <int>take

    cdef int put_again(self, int n) except -999:
        """composed[0:n) and what is kept of the body behind it, framed as it was. What is missing of it streams on."""
        cdef Exchange x = self.x
        cdef uint32_t there = x.kept.end - x.kept.start
        cdef int result = self.put_message(self.engine.composed, n, False)
        if self.stream is not None:
            self.stream.last = x.body.done
            return self.put(x.kept.base + x.kept.start, there) if result == 0 else result
        if result == 0:
            result = self.put_chunk(x.kept.base + x.kept.start, there) if x.body.out == BODY_CHUNKED else \
                self.put(x.kept.base + x.kept.start, there)
        if result == 0 and x.body.out == BODY_CHUNKED and x.body.done:
            result = self.put(b"0\r\n\r\n", 5)
        return result

    # -- the answer ---------------------------------------------------------------------------------------------------

    cdef int pump_answer(self) except -1:
        """Reads the answer and hands it on until it ends, the client is slower, or nothing is there."""
        cdef Downstream downstream
        cdef uint32_t want, there
        cdef ssize_t n
        cdef int piece
        for piece in range(PIECES):
            if self.fd < 0 or self.x is None or self.held:
                return 0
            if self.state == U_HEAD:
                if self.read_answer_head() == 0:
                    return 0
                continue
            downstream = <Downstream>self.x.connection
            if downstream.out.end > downstream.out.start:
                if downstream.why != T_WRITE:       # more from the upstream is no progress of the client's
                    downstream.arm(T_WRITE, downstream.listener.write_us)
                return 0
            there = self.inb.end - self.inb.start
            if there:
                if self.take_answer(self.inb.base + self.inb.start, there):
                    return 0
                buffer_release(&self.inb)
                continue
            if not self.readable:
                return 0
            want = SCRATCH
            if self.x.answer.mode == BODY_LENGTH and self.x.answer.remaining < SCRATCH:
                want = <uint32_t>self.x.answer.remaining
            n = self.recv(self.engine.scratch, want)
            if n == -EAGAIN:
                self.readable = False
                return 0
            if n <= 0:
                return self.lost(<int>-n)
            if self.drained(n, want):
                self.readable = False
            downstream.arm(T_UP_IDLE, self.x.route.idle_us)
            if self.take_answer(self.engine.scratch, <uint32_t>n):
                return 0
        if not self.queued:
            self.queued = True
            self.engine.again.append(self)
        return 0

    cdef int read_answer_head(self) except -1:
        """1 when something was done, 0 when bytes are missing or the exchange is over."""
        cdef int result
        cdef uint32_t room
        cdef ssize_t n
        cdef Head* head = self.engine.answer_head
        if not self.pending:                        # what is here is looked at before more is read
            if not self.readable:
                return 0
            if buffer_reserve(&self.inb, 4096) < 0:
                return self.fail(502, b"upstream-bad-answer", b"out of memory")
            room = self.inb.cap - self.inb.end
            n = self.recv(self.inb.base + self.inb.end, room)
            if n == -EAGAIN:
                self.readable = False
                return 0
            if n <= 0:
                return self.lost(<int>-n)
            self.inb.end += <uint32_t>n
            if self.drained(n, room):
                self.readable = False
        self.pending = False
        # A head that comes in pieces is parsed at its first and at its last, so that dripping bytes costs linear work.
        if self.seen and self.inb.end - self.inb.start < HEAD_MAX and \
                not empty_line(self.inb.base + self.inb.start, self.seen, self.inb.end - self.inb.start):
            self.seen = self.inb.end - self.inb.start
            return 1
        head_reset(head)
        result = parse_response(self.inb.base + self.inb.start, self.inb.end - self.inb.start, head, &ANSWER_LIMITS)
        if result == 0:
            self.seen = self.inb.end - self.inb.start
            return 1
        self.seen = 0
        if result < 0:
            self.engine.slot.counters[C_UPSTREAM_BAD] += 1
            return self.fail(502, b"upstream-bad-answer", b"the upstream's answer is malformed; the request may have been executed")
        return self.take_head(result)

    cdef int take_head(self, int length) except -1:
        cdef Exchange x = self.x
        cdef Downstream downstream = <Downstream>x.connection
        cdef Head* head = self.engine.answer_head
        cdef int n
        if head.status >= 200:
            self.head_length = length
            if self.judge(head):
                return 0
            if x.upgrade and opens_tunnel(self, head):
                return 0
            self.start_answer(head)
            return 1
        if x.hedge is self:                         # it is not the one that the client hears yet
            buffer_consume(&self.inb, length)
            self.pending = self.inb.end > self.inb.start
            return 1
        if head.status == 101 and x.upgrade:
            return take_switch(self, length)
        x.informational += 1
        if head.status == 101 or x.informational > INFORMATIONAL_MAX:
            self.engine.slot.counters[C_UPSTREAM_BAD] += 1
            return self.fail(502, b"upstream-bad-answer", b"the upstream switched protocols unasked, or sent too many 1xx answers")
        # A 100 that we gave ourselves, or that an old client cannot understand, ends here (RFC 9110 15.2).
        if x.head.minor == 1 and not (head.status == 100 and not (x.head.expect and x.collected is None)):
            n = compose_informational(head, self.engine.composed, HEAD_ROOM)
            if n > 0 and downstream.put_message(self.engine.composed, n, False) < 0 and not goes_on(self, downstream):
                return 0
        buffer_consume(&self.inb, length)
        self.pending = self.inb.end > self.inb.start
        return 1

    cdef bint judge(self, Head* head) except -1:
        """A final head came: what it says of its endpoint, who wins of two that were asked, and whether to ask once more.

        True when this answer is not the one that the client gets.
        """
        cdef Exchange x = self.x
        cdef Downstream downstream = <Downstream>x.connection
        cdef int status = head.status
        cdef int code = -1
        cdef int64_t after = 0, left
        if status == 429 or status == 503:
            after = number_of(head, F_RETRY_AFTER)
            after = min(after, <int64_t>86400) * 1000000 if after > 0 else 0
        if status == 200 and x.upstream.protocol == PROTOCOL_GRPC:
            code = grpc_status_of(head)
            if code >= 0:                           # refused in its head, which is all of the answer
                self.record(OUTCOME_GRPC, code, after)
                status = grpc_as_http(code)
            else:
                self.undecided = True
                self.took = self.engine.now - self.sent_at
        else:
            self.record(OUTCOME_ANSWERED, status, after)
        if x.hedge is not None:
            if retry_bit(status) and status != 429:             # the other one may know better
                if x.hedge is self:
                    drop_hedge(x, OUTCOME_NONE)
                else:
                    promote_hedge(x, OUTCOME_NONE)
                return True
            if x.hedge is self:
                promote_hedge(x, OUTCOME_NONE)
            else:
                drop_hedge(x, OUTCOME_NONE)
        if retry_bit(status) & x.upstream.retry_on:
            left = -1 if x.upstream.foreign else number_of(head, F_CROSSWAY_ATTEMPTS)
            if left >= 0 and x.tries + left < x.attempts:       # a hop behind us has tried already
                x.attempts = x.tries + <int>left
            if after <= x.upstream.backoff_max_us and try_again(downstream, retry_bit(status), after):
                return True
        return False

    cdef int start_answer(self, Head* head) except -1:
        """The final answer's head: framing on both sides, hooks, then head and first bytes of the body in one piece."""
        cdef Exchange x = self.x
        cdef Downstream downstream = <Downstream>x.connection
        x.status = head.status
        memset(&x.answer, 0, sizeof(Body))
        if x.head.method == M_HEAD or head.status == 204 or head.status == 304:
            x.answer.done = True
        elif head.chunked:
            x.answer.mode = BODY_CHUNKED
            x.answer.out = BODY_CHUNKED
        elif head.content_length >= 0:
            x.answer.mode = x.answer.out = BODY_LENGTH
            x.answer.remaining = head.content_length
            x.answer.done = head.content_length == 0
        elif self.stream is not None and self.stream.complete() and self.inb.end - self.inb.start == <uint32_t>self.head_length:
            x.answer.done = True                    # a head, and that was all
            if downstream.stream is None:
                x.answer.mode = x.answer.out = BODY_LENGTH
                head.content_length = 0
        else:
            x.answer.mode = BODY_CLOSE
            x.answer.out = BODY_CHUNKED
        if x.web is not None:
            begin_web_answer(self, head)
        if x.answer.out == BODY_CHUNKED and downstream.stream is not None:
            x.answer.out = BODY_CLOSE               # the stream's end says it
        if x.answer.out == BODY_CHUNKED and x.head.minor == 0:
            x.answer.out = BODY_CLOSE
            x.keep_alive = False
        # An answer that begins before its request has left completely makes the connection's next answer doubtful.
        self.keep = (not head.close if head.minor else head.keep_alive and not head.close) and x.answer.mode != BODY_CLOSE \
            and x.body.done and self.out.end == self.out.start
        if not x.body.done or self.engine.draining:
            x.keep_alive = False
        if x.answer_hook < len(x.route.response_hooks):
            return self.hold(head)
        return self.send_answer(head)

    cdef int send_answer(self, Head* head) except -1:
        cdef Exchange x = self.x
        cdef Downstream downstream = <Downstream>x.connection
        cdef char* out = self.engine.composed
        cdef int n = compose_answer(x, head, out, HEAD_ROOM)
        cdef int64_t take = 0
        if n < 0:
            return self.fail(502, b"upstream-bad-answer", b"the upstream's answer head is too large")
        buffer_consume(&self.inb, self.head_length)
        x.answer_started = True
        self.state = U_BODY
        if x.answer.mode == BODY_LENGTH and self.inb.end > self.inb.start:
            take = self.inb.end - self.inb.start
            if take > x.answer.remaining:
                take = x.answer.remaining
            if take > COMPOSED - n:
                take = COMPOSED - n
            memcpy(out + n, self.inb.base + self.inb.start, take)
            n += <int>take
            x.answer.remaining -= take
            x.answer.bytes += take
            x.answer.done = x.answer.remaining == 0
            buffer_consume(&self.inb, <uint32_t>take)
        elif x.answer.mode == BODY_CHUNKED and self.inb.end > self.inb.start:
            take = self.decode_behind(out, &n)
            if take < 0:
                return 0
        if x.answer.done and not x.keep_alive and downstream.tls is not None:
            downstream.tls.conclude()
        if downstream.put_message(out, n, x.answer.done and not self.owes_trailers()) < 0 and not goes_on(self, downstream):
            return 0
        self.engine.slot.counters[C_BYTES_OUT] += n
        if x.answer.done:
            return self.end_of_answer()
        if self.inb.end == self.inb.start:
            buffer_release(&self.inb)
        downstream.arm(T_UP_IDLE, x.route.idle_us)
        return 1

    cdef int64_t decode_behind(self, char* out, int* n) except -2:
        """Appends the chunked body bytes that came with the head to out[0:*n), framed for the client. -1 when it failed."""
        cdef Exchange x = self.x
        cdef char* data = self.inb.base + self.inb.start
        cdef uint32_t there = self.inb.end - self.inb.start
        cdef uint32_t used = 0
        cdef int64_t payload
        if there > COMPOSED - HEAD_ROOM - 64:
            return 0
        payload = chunked_decode(&x.answer.chunked, data, there, &used)
        if payload < 0:
            self.engine.slot.counters[C_UPSTREAM_BAD] += 1
            x.answer_started = False                # the head is not sent yet: a clear 502 instead of a cut answer
            self.fail(502, b"upstream-bad-answer", b"the upstream's answer is malformed; the request may have been executed")
            return -1
        x.answer.bytes += payload
        x.answer.done = x.answer.chunked.state == CHUNK_DONE
        if x.answer.out == BODY_CHUNKED:
            if payload:
                n[0] += <int>cw_put_hex(out + n[0], payload)
                memcpy(out + n[0], b"\r\n", 2)
                memcpy(out + n[0] + 2, data, payload)
                memcpy(out + n[0] + 2 + payload, b"\r\n", 2)
                n[0] += <int>payload + 4
            if x.answer.done:
                memcpy(out + n[0], b"0\r\n\r\n", 5)
                n[0] += 5
                self.terminated = True
        else:
            memcpy(out + n[0], data, payload)
            n[0] += <int>payload
        buffer_consume(&self.inb, used)
        return payload

    cdef int take_answer(self, char* data, uint32_t n) except -1:
        """Unframes answer bytes and hands the payload to the client. 1 when the exchange is over."""
        cdef Exchange x = self.x
        cdef Downstream downstream = <Downstream>x.connection
        cdef uint32_t used = n
        cdef int64_t payload = n
        cdef int result
        self.engine.slot.counters[C_UPSTREAM_BYTES_IN] += n
        if x.answer.mode == BODY_LENGTH:
            if payload > x.answer.remaining:
                payload = x.answer.remaining
            x.answer.remaining -= payload
            used = <uint32_t>payload
            x.answer.done = x.answer.remaining == 0
        elif x.answer.mode == BODY_CHUNKED:
            payload = chunked_decode(&x.answer.chunked, data, n, &used)
            if payload < 0:
                self.engine.slot.counters[C_UPSTREAM_BAD] += 1
                self.fail(502, b"upstream-bad-answer", b"the upstream's answer is malformed")
                return 1
            x.answer.done = x.answer.chunked.state == CHUNK_DONE
        elif self.stream is not None:
            x.answer.done = self.stream.complete()
        if used < n:
            self.keep = False                       # bytes behind the answer: nobody asked for them
        x.answer.bytes += payload
        self.engine.slot.counters[C_BYTES_OUT] += payload
        if x.answer.done and downstream.stream is not None:
            downstream.stream.last = x.web is None and not self.owes_trailers()
        result = put_answer(self, downstream, data, <uint32_t>payload)
        if result == TROUBLE:
            self.engine.slot.counters[C_UPSTREAM_BAD] += 1
            self.fail(502, b"upstream-bad-answer", b"the upstream's answer is no gRPC")
            return 1
        if result < 0 and not goes_on(self, downstream):
            return 1
        if x.answer.done:
            self.end_of_answer()
            return 1
        return 0

    cdef int end_of_answer(self) except -1:
        """The answer is complete: finish it towards the client, keep or close the connection, go on with the client."""
        cdef Exchange x = self.x
        cdef Downstream downstream = <Downstream>x.connection
        cdef int result, code
        if x.web is not None and x.web.framed:
            result = end_web_answer(self, downstream)
            if result == TROUBLE:
                self.engine.slot.counters[C_UPSTREAM_BAD] += 1
                return self.fail(502, b"upstream-bad-answer", b"the upstream's answer ended in the middle of a message")
            if result < 0 and not goes_on(self, downstream):
                return 0
        if x.answer.out == BODY_CHUNKED and not self.terminated and downstream.put(b"0\r\n\r\n", 5) < 0 and not goes_on(self, downstream):
            return 0
        if self.undecided:
            code = grpc_status_in(self.stream.trailers.base + self.stream.trailers.start,
                                  self.stream.trailers.end - self.stream.trailers.start)
            if code < 0:                            # a call that ends so has failed; another request knows no such status
                code = GRPC_UNKNOWN if x.grpc or x.web is not None else GRPC_OK
            self.record(OUTCOME_GRPC, code, 0)
        if downstream.stream is not None:
            if self.stream is not None and x.web is None:
                pass_trailers(self.stream, downstream.stream, x.route.response_edits, ())
            downstream.finish()
        self.terminated = False
        x.ended = cw_monotonic_us()
        x.upstream_us = x.ended - x.upstream_from
        self.release()
        downstream.answered()
        downstream.advance()
        return 0

    cdef void release(self):
        """To the pool, if nothing is owed in either direction, else to its end."""
        cdef Exchange x = self.x
        cdef bint keep = self.stream is None and self.keep and x.body.done and not self.broken and not self.ended and \
            self.out.end == self.out.start and self.inb.end == self.inb.start and not self.endpoint.retired
        cdef UpstreamConnection oldest
        self.detach()
        # After a short read nothing more is there; after a full one, look.
        if keep and not self.at_rest() and not self.silent():
            keep = False
        if not keep:
            if self.tls is not None and x.body.done and self.out.end == self.out.start:
                self.tls.shut()
            self.close()
            return
        buffer_release(&self.inb)
        self.readable = False
        self.state = U_IDLE
        self.idle_since = self.engine.now
        cw_list_put(self.endpoint.idle, self)
        self.engine.upstreams_idle += 1
        self.engine.set_timer(self, T_POOL, self.engine.now + self.upstream.keep_idle_us)
        if PyList_GET_SIZE(self.endpoint.idle) > self.upstream.keep_max:
            oldest = <UpstreamConnection>self.endpoint.idle[0]
            oldest.leave_pool()

    # -- hooks on the answer ------------------------------------------------------------------------------------------

    cdef int hold(self, Head* head) except -1:
        """Response hooks want to see it: its fields become Python objects, reading stops, the slow lane goes on."""
        cdef Exchange x = self.x
        cdef int i
        if x.answer_fields is None:
            x.answer_fields = [(head.base[head.fields[i].name:head.fields[i].name + head.fields[i].name_len],
                                head.base[head.fields[i].value:head.fields[i].value + head.fields[i].value_len])
                               for i in range(head.count)]
        self.held = True
        (<Downstream>x.connection).arm(T_TOTAL, x.route.total_us)       # it is the policy that is waited for
        x.parked = <Step>x.route.response_hooks[x.answer_hook]
        self.engine.parked.append((x, x.generation))
        return 1

    cdef int answer_hooked(self, int verdict) except -1:
        """A response hook said its word."""
        cdef Exchange x = self.x
        cdef Downstream downstream = <Downstream>x.connection
        cdef Head* head = self.engine.answer_head
        self.held = False
        x.answer_hook += 1
        if verdict == STEP_ANSWERED:
            x.answer_fields = None
            downstream.drop_upstream()
            downstream.reply()
            return downstream.advance()
        head_reset(head)
        if parse_response(self.inb.base + self.inb.start, self.inb.end - self.inb.start, head, &ANSWER_LIMITS) <= 0:
            return self.fail(502, b"upstream-bad-answer", b"the upstream's answer is malformed")
        if x.answer.out == BODY_LENGTH and head.content_length < 0:
            head.content_length = 0                 # start_answer() found a stream that ended with its head
        if x.answer_hook < len(x.route.response_hooks):
            return self.hold(head)
        if x.status == 101:
            return switch_protocols(self, head)
        if self.send_answer(head) == 1:
            self.pump_answer()
        return 0

    cdef bint owes_trailers(self) noexcept:
        return self.stream is not None and self.stream.trailers.end > self.stream.trailers.start

    # -- failures -----------------------------------------------------------------------------------------------------

    cdef int lost(self, int error) except -1:
        """The connection ended (error 0) or broke before the answer was complete. Returns 0: the exchange is over here."""
        cdef Exchange x = self.x
        cdef Downstream downstream = <Downstream>x.connection
        self.ended = True
        if self.stream is not None and self.stream.refused and refused_stream(self):
            return downstream.advance()
        if (x.grpc or x.web is not None) and hurried(x) and self.engine.now + DEADLINE_SLACK_US >= x.total_at:
            return self.out_of_time()
        if self.state == U_BODY:
            # A reset that a write met first is taken with it: recv() says 0 then, as it does at an honest end.
            if x.answer.mode == BODY_CLOSE and error == 0 and not self.broken:
                x.answer.done = True
                return self.end_of_answer()
            self.engine.slot.counters[C_UPSTREAM_RESETS] += 1
            return self.fail(502, b"upstream-closed", b"the upstream closed the connection in the middle of its answer")
        self.engine.slot.counters[C_UPSTREAM_RESETS] += 1
        if x.hedge is None and self.reused and x.replayable and x.informational == 0 and self.inb.end == self.inb.start and \
                x.body.mode == BODY_NONE and x.head.method in (M_GET, M_HEAD, M_OPTIONS) and race_again(self):
            return downstream.advance()             # safe methods without a body may be sent again (RFC 9110 9.2.2)
        self.record(OUTCOME_RESET, 0, 0)
        if x.hedge is None and try_again(downstream, RETRY_RESET, 0):
            return downstream.advance()
        return self.fail(502, b"upstream-closed",
                         b"the upstream closed the connection before it answered; the request may have been executed")

    cdef int out_of_time(self) except -1:
        """The service knows the deadline, and keeps it more exactly than we do: it has given up in time, and is not to blame."""
        cdef Exchange x = self.x
        cdef Downstream downstream = <Downstream>x.connection
        self.record(OUTCOME_GRPC, GRPC_DEADLINE_EXCEEDED, 0)
        self.engine.slot.counters[C_UPSTREAM_TIMEOUTS] += 1
        x.side = SIDE_UPSTREAM
        self.detach()
        self.close()
        if x.answer_started:
            return downstream.abort(True, 504)
        downstream.refuse(504, b"total-timeout", b"the time for this request is over; it may have been executed")
        return downstream.advance()

    cdef int fail(self, int status, bytes slug, bytes detail) except -1:
        """The upstream's failure: an answer that says so, or a cut one when its head is out already. Always 0."""
        cdef Exchange x = self.x
        cdef Downstream downstream = <Downstream>x.connection
        self.record(OUTCOME_RESET if self.state == U_BODY else OUTCOME_BAD, 0, 0)
        if x.hedge is self:
            drop_hedge(x, OUTCOME_NONE)
            return 0
        if x.hedge is not None:
            promote_hedge(x, OUTCOME_NONE)
            return 0
        x.side = SIDE_UPSTREAM
        self.detach()
        self.close()
        if x.answer_started:
            downstream.abort(True)
        else:
            downstream.refuse(status, slug, detail)
            downstream.advance()
        return 0
