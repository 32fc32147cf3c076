# Links: the sockets that carry HTTP/2, on either side (included by engine.pyx).
#
# Strategy: a link turns bytes into frames and back; what a stream carries is a Downstream or an UpstreamConnection like any other,
# whose recv() and send() go to the stream. What the streams of a link say within one batch leaves in one call at the batch's end.
# A client's link begins as the Downstream of its handshake, which becomes the pattern for those of its streams. Links to an
# endpoint are shared by all exchanges of the worker; another one is opened when all have as many streams as they may.
# An upstream's connection that says nothing while it should, or is to be used after a rest, is asked by a PING; who comes meanwhile waits for
# the answer, so that nothing is sent into a connection that may be dead.
# Python is called from here: per stream, for its objects.

cdef enum:
    LINK_ROOM = 32768           # one recv(); a frame of the largest size fits
    DRAIN_US = 1000000          # how long the client's answer to the first GOAWAY is waited for
    REFUSALS = 3                # times that a request is sent again because a server refused it unread
    PUSHES = 4                  # times that woken streams may fill what goes out in one turn
    SILENT_US = 1000000         # an upstream's connection that says nothing for so long while it is asked may be dead
    ASKS = 2                    # PINGs in a row without payload or a head between, as gRPC's clients: its servers take three, and GOAWAY at
    ASKS_APART_US = 300000000   # ... the fourth ("too_many_pings"), unless it comes so long after the one before

cdef int speaks_http2(const Buffer* inb) noexcept nogil:
    """Whether the connection begins with the preface of HTTP/2: 1 yes, -1 so far, 0 no."""
    cdef uint32_t there = inb.end - inb.start
    cdef uint32_t n = there if there < PREFACE else PREFACE
    if n == 0 or memcmp(inb.base + inb.start, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", n) != 0:
        return 0
    return 1 if n == PREFACE else -1


cdef int become_link(Downstream d) except -1:
    """The client speaks HTTP/2: its socket goes over to a link. Always 0."""
    cdef Engine engine = d.engine
    cdef FrontLink link = FrontLink.__new__(FrontLink)
    engine.unlink_timer(d)
    link.engine = engine
    link.face = d
    link.state = D_IDLE
    link.fd = d.fd
    link.generation = d.generation
    link.readable = True
    link.writable = d.writable
    link.ended = d.ended
    link.tls = d.tls
    engine.by_fd[link.fd] = link
    d.fd = -1
    d.state = D_CLOSED
    d.tls = None
    link.h2 = LinkSession.__new__(LinkSession)
    link.h2.link = link
    link.h2.begin(False, d.listener.http2, d.listener.limits.head, engine.slot.counters)
    link.h2.inb, d.inb = d.inb, link.h2.inb
    engine.slot.counters[C_H2_CONNECTIONS] += 1
    if engine.draining or d.listener.leaving:
        link.h2.drain()
    link.why = T_NONE
    return link.on_events(0)


cdef class LinkSession(Http2Session):
    """A session whose bytes come from a link and go there."""

    cdef int opened(self, Http2Stream stream) except -1:
        return (<FrontLink>self.link).take(stream)

    cdef int stirred(self, Http2Stream stream, int what) except -1:
        """Its owner learns of it, as of an event of a socket."""
        cdef Connection owner = stream.owner
        if owner is None:
            stream.close()
            return 0
        try:
            owner.on_events(EPOLLERR if what & STIR_RESET else EPOLLOUT if what & STIR_WRITE else EPOLLIN)
        except BaseException as error:
            owner.engine.report(owner, error)
        return 0

    cdef void wants_out(self) noexcept:
        self.link.engine.corked.append(self.link)

    cdef void hold(self) noexcept:
        if not self.held:
            self.held = True
            self.link.engine.held.append(self)


cdef class Link(Connection):
    """What both sides' links do."""

    cdef int pump(self) except -1:
        """Reads and handles frames, as far as this connection's share of the batch goes."""
        cdef Buffer* inb = &self.h2.inb
        cdef uint32_t room, want
        cdef ssize_t n
        cdef int piece
        for piece in range(PIECES):
            if inb.end > inb.start:
                self.h2.feed()
            if self.fd < 0 or self.h2.dead or not self.readable:
                return 0
            want = LINK_ROOM if inb.end > inb.start or piece else 2048
            if buffer_reserve(inb, want) < 0:
                return self.h2.fail(H2_INTERNAL_ERROR, b"out of memory")
            room = inb.cap - inb.end
            n = self.recv(inb.base + inb.end, room)
            if n == -EAGAIN:
                self.readable = False
                if inb.end == inb.start:
                    buffer_release(inb)
                return 0
            if n <= 0:
                return self.over()
            inb.end += <uint32_t>n
            if self.drained(n, room):
                self.readable = False
            self.count_in(n)
        if not self.queued:
            self.queued = True
            self.engine.again.append(self)
        return 0

    cdef void count_in(self, ssize_t n) noexcept:
        self.engine.slot.counters[C_BYTES_IN] += n

    cdef int push(self) except -1:
        cdef Buffer* out = &self.h2.out
        cdef ssize_t n
        cdef int turn
        cdef bint moved = False
        if self.h2.overrun:
            self.tell_end()
            self.cut_short()
            return self.over()
        for turn in range(PUSHES):
            while out.end > out.start:
                if self.fd < 0:
                    return 0
                n = self.send(out.base + out.start, out.end - out.start)
                if n == -EAGAIN:
                    self.writable = False
                    self.h2.dirty = True            # room to write will tell
                    if moved:
                        self.moved_on()
                    return 0
                if n < 0:
                    return self.over()
                buffer_consume(out, <uint32_t>n)
                moved = True
            buffer_release(out)
            self.h2.sent()
            if out.end == out.start or self.fd < 0:
                return 0
        return 0

    cdef void moved_on(self) noexcept:
        """The other side has read some of what waits."""
        pass

    cdef int over(self) except -1:
        self.close()
        return 0

    cdef void tell_end(self):
        """Why the connection fails, for the log."""
        pass

    cdef list owners(self):
        cdef Http2Stream stream
        cdef list found = []
        cdef void* at
        cdef int i
        for i in range(64):
            at = self.h2.table[i]
            while at != NULL:
                stream = <Http2Stream>at
                if stream.owner is not None:
                    found.append(stream.owner)
                at = stream.following
        return found

    cdef int stirred(self) except -1:
        return 0

    cdef void close(self):
        """The socket closes, and the streams are lost. The session knows its link no more: the two are no cycle."""
        Connection.close(self)
        self.h2.lost()
        self.h2.dirty = True                        # nobody sends it any more
        self.h2.released = True
        self.h2.release()
        self.h2.link = None

    cdef int on_events(self, uint32_t events) except -1:
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self.ended = True
        if events & EPOLLOUT:
            self.writable = True
            if self.h2.out.end > self.h2.out.start:
                self.push()
            if self.tls is not None and self.tls.starved:
                self.readable = True
        if events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self.wake()
        if self.fd >= 0:
            self.pump()
        if self.fd >= 0:
            self.stirred()
        return 0


# -- the client's side ------------------------------------------------------------------------------------------------

cdef class FrontLink(Link):
    """A client's connection that speaks HTTP/2."""

    cdef int on_events(self, uint32_t events) except -1:
        if self.state == D_LINGER:
            if events & EPOLLOUT and self.h2.out.end > self.h2.out.start:
                self.push()
                if self.fd >= 0 and self.h2.out.end == self.h2.out.start:
                    return self.leave()
            return self.linger() if self.fd >= 0 else 0
        return Link.on_events(self, events)

    cdef int take(self, Http2Stream stream) except -1:
        """A request: its stream becomes a Downstream, and the text of its head what that has read."""
        cdef Downstream face = self.face
        cdef Downstream d = Downstream.__new__(Downstream)
        d.engine = self.engine
        d.listener = face.listener
        d.listener_name = face.listener_name
        d.version = face.version
        d.peer_trusted = face.peer_trusted
        memcpy(d.address, face.address, sizeof(d.address))
        memcpy(d.text, face.text, sizeof(d.text))
        d.text_len = face.text_len
        d.outer = face.outer
        d.fd = FD_STREAM
        d.writable = True
        d.readable = True
        d.stream = stream
        stream.owner = d
        d.inb, stream.inb = stream.inb, d.inb
        stream.text_left = 0
        face.requests += 1
        try:
            d.take_stream()
        except BaseException as error:
            self.engine.report(d, error)
        if face.requests == face.listener.requests_max:
            self.h2.drain()
        return 0

    cdef void moved_on(self) noexcept:
        if self.why == T_WRITE:
            self.engine.set_timer(self, T_WRITE, self.engine.now + self.face.listener.write_us)

    cdef int stirred(self) except -1:
        """Which deadline holds now. A connection that has failed, or was drained and is empty, ends."""
        cdef Http2Session h2 = self.h2
        cdef Engine engine = self.engine
        cdef uint8_t why = T_NONE
        if self.state == D_LINGER:
            return 0
        if h2.dead or (h2.draining and not h2.pinged and h2.active == 0):
            return self.leave()
        if h2.out.end > h2.out.start and not self.writable:
            why = T_WRITE
        elif not h2.peer_settings or h2.block_id or (h2.active == 0 and h2.inb.end > h2.inb.start):
            why = T_HEAD
        elif h2.pinged:
            why = T_LINGER
        elif h2.active == 0:
            why = T_KEEPALIVE
        if why == self.why and why != T_KEEPALIVE:
            return 0
        if why == T_NONE:
            self.why = T_NONE
        elif why == T_WRITE:
            engine.set_timer(self, why, engine.now + self.face.listener.write_us)
        elif why == T_HEAD:
            engine.set_timer(self, why, engine.now + self.face.listener.head_us)
        elif why == T_LINGER:
            engine.set_timer(self, why, engine.now + DRAIN_US)
        else:
            engine.set_timer(self, why, engine.now + self.face.listener.keepalive_us)
        return 0

    cdef int on_timeout(self) except -1:
        cdef uint64_t* counters = self.engine.slot.counters
        if self.state == D_LINGER:
            self.close()
        elif self.why == T_LINGER:
            self.h2.drained()
            self.why = T_NONE
            self.push()
            if self.fd >= 0:
                self.stirred()
        elif self.why == T_WRITE:
            counters[C_TIMEOUTS_WRITE] += 1
            self.cut_short()
            self.close()
        elif self.why == T_HEAD:
            counters[C_TIMEOUTS_HEAD] += 1
            self.h2.fail(H2_ENHANCE_YOUR_CALM, b"a head did not arrive in time")
            self.leave()
        else:
            counters[C_TIMEOUTS_IDLE] += 1
            self.h2.fail(H2_NO_ERROR, b"nothing was asked for a while")
            counters[C_H2_ERRORS] -= 1
            self.leave()
        return 0

    cdef void drain(self):
        self.h2.drain()
        self.engine.set_timer(self, T_LINGER, self.engine.now + DRAIN_US)
        self.why = T_LINGER

    cdef void tell_end(self):
        if self.h2.error and self.h2.reason != NULL:
            self.engine.complain("a client's HTTP/2 connection was ended", {
                "listener": self.face.listener_name, "client": self.face.text[:self.face.text_len].decode("ascii"),
                "code": self.h2.error, "reason": self.h2.reason.decode("ascii")})

    cdef int leave(self) except -1:
        """Streams that are left are lost; GOAWAY is on its way, and the socket closes so that it arrives."""
        if self.state != D_LINGER:
            if not self.h2.overrun:                 # push() tells it
                self.tell_end()
            self.state = D_LINGER
            self.h2.lost()
            self.push()
            if self.fd < 0:
                return 0
            self.engine.set_timer(self, T_LINGER, self.engine.now + LINGER_US)
            self.face.lingered = 0
        if self.h2.out.end == self.h2.out.start:
            self.shut()
            return self.linger()
        return 0

    cdef int linger(self) except -1:
        cdef ssize_t n
        while True:
            n = cw_recv(self.fd, self.engine.scratch, SCRATCH)
            if n == -EAGAIN:
                return 0
            if n <= 0:
                break
            self.face.lingered += <uint32_t>n
            if self.face.lingered > LINGER_BYTES:
                break
        self.close()
        return 0

    cdef void close_now(self):
        """Our doing, not the client's: so say the records of what it carries."""
        for owner in self.owners():
            (<Connection>owner).close_now()
        self.cut_short()
        self.close()

    cdef void close(self):
        if self.fd < 0:
            return
        self.engine.connections -= 1
        self.engine.slot.counters[C_CONNECTIONS_CLOSED] += 1
        self.state = D_CLOSED
        Link.close(self)


# -- the upstream's side ----------------------------------------------------------------------------------------------

cdef class BackLink(Link):
    """A connection to an endpoint that speaks HTTP/2."""

    cdef bint usable(self, int64_t now) noexcept:
        """Whether one more stream may be opened on it."""
        if self.fd < 0 or self.retiring or self.h2.dead or now - self.born > self.upstream.keep_age_us:
            return False
        if not self.stands:
            return <uint32_t>len(self.waiting) < self.h2.settings.streams and \
                <uint32_t>len(self.waiting) < max(self.endpoint.streams_said, <uint32_t>1)
        if self.doubtful(now):
            if self.asked_at and now - self.asked_at >= SILENT_US:
                return False
            if not self.asked_at and not self.may_ask(now):
                # Another connection is better than a PING too many; if there can be none, this one has to do.
                return not self.upstream.may_open() and self.h2.room()
            if <uint32_t>(self.h2.active + len(self.waiting)) >= min(self.h2.settings.streams, self.h2.peer_streams):
                return False
        # Clients that do not read hold the connection's window: who comes now shall not wait for them.
        return self.h2.room() and self.h2.window + self.h2.owed >= self.h2.settings.window

    cdef bint left(self) noexcept:
        """Whether the server has closed it, looked up now."""
        cdef char byte
        cdef ssize_t n = cw_peek(self.fd, &byte, 1)
        return n <= 0 and n != -EAGAIN

    cdef int on_events(self, uint32_t events) except -1:
        if self.stands:
            return Link.on_events(self, events)
        if self.tls is not None:
            self.tls.wake(events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR) != 0)
            return self.secure()
        if events & (EPOLLOUT | EPOLLERR | EPOLLHUP):
            return self.connected(events)
        return 0

    cdef void count_in(self, ssize_t n) noexcept:
        self.heard_at = self.engine.now             # the streams count their payload
        self.asked_at = 0                           # whatever it says, it lives

    cdef void suspect(self, int64_t sent_at) noexcept:
        """A request was not answered in time. If nothing at all came since, the connection may have been dropped on its way without a word: it
        gets no further requests. A server that is only slow costs a new connection, once a second at most."""
        if self.heard_at < sent_at and self.engine.now - self.heard_at >= SILENT_US:
            self.retiring = True

    cdef bint doubtful(self, int64_t now) noexcept:
        """Whether it may be dead without anybody knowing: an answer is due, or it has said nothing for long."""
        return self.stands and self.h2.settings.ping_us > 0 and (self.asked_at != 0 or now - self.heard_at >= self.h2.settings.ping_us)

    cdef bint may_ask(self, int64_t now) noexcept:
        return self.h2.asks < ASKS or now - self.last_asked >= ASKS_APART_US

    cdef void ask(self) noexcept:
        cdef int64_t now = self.engine.now
        self.asked_at = self.last_asked = now
        self.answer_by = now + self.h2.settings.ping_timeout_us
        self.h2.ask()
        self.engine.slot.counters[C_UPSTREAM_H2_PINGS] += 1

    cdef void hold(self, UpstreamConnection u):
        """Nothing of its request is sent before the connection has answered: if it does not, any request may go elsewhere."""
        cdef int64_t limit = min(self.h2.settings.ping_timeout_us, self.upstream.connect_us >> 1)      # in time for a new connection
        u.state = U_CONNECTING
        if not self.waiting:
            self.hold_until = self.engine.now + limit
        self.waiting.append(u)
        if not self.asked_at:
            self.ask()
        self.engine.set_timer(self, T_PING, min(self.answer_by, self.hold_until))

    cdef int watch(self) except -1:
        """T_PING: it is asked, or has not answered in time."""
        cdef int64_t now = self.engine.now
        cdef int64_t next_at
        cdef bint overdue
        if self.asked_at:
            overdue = len(self.waiting) > 0 and now >= self.hold_until
            if now >= self.answer_by or (overdue and self.h2.active == 0):
                self.engine.slot.counters[C_UPSTREAM_H2_SILENT] += 1
                self.engine.complain("an HTTP/2 connection to an upstream does not answer", {
                    "upstream": self.upstream.name, "endpoint": self.endpoint.address, "requests": self.h2.active})
                self.cut_short()
                self.close()
                return 0
            if overdue:
                self.send_elsewhere()
            next_at = min(self.answer_by, self.hold_until) if self.waiting else self.answer_by
        elif self.h2.active == 0:
            self.why = T_NONE                       # nobody is asked without a reason
            return self.stirred()
        elif now - self.heard_at < self.h2.settings.ping_us:
            next_at = self.heard_at + self.h2.settings.ping_us
        elif not self.may_ask(now):
            next_at = now + self.h2.settings.ping_us    # payload may have come by then, and silence after it
        else:
            self.ask()
            next_at = self.answer_by
        if self.fd >= 0:
            self.engine.set_timer(self, T_PING, next_at)
        return 0

    cdef int connected(self, uint32_t events) except -1:
        if cw_socket_error(self.fd):
            self.engine.slot.counters[C_UPSTREAM_CONNECT_FAILURES] += 1
            return self.refuse(503, b"upstream-unreachable", b"no endpoint of the upstream accepts connections; the request was not sent")
        if self.upstream.tls is None:
            return self.serve()
        self.tls = self.upstream.tls.connect(self.fd, self.endpoint.address, self.endpoint.host)
        return self.secure()

    cdef int secure(self) except -1:
        """The TLS handshake, as far as it goes now; HTTP/2 has to be agreed on in it (RFC 9113 3.2)."""
        cdef int result = self.tls.handshake()
        cdef str reason = self.tls.reason
        if result == 0:
            return 0
        if result > 0 and self.tls.alpn != ALPN_HTTP2:
            result = -1
            reason = "the server does not offer HTTP/2 (ALPN h2)"
        if result > 0 and server_fallen(self.engine, self.upstream, self.tls):
            result = -1
            reason = "the server was shut out of the mesh meanwhile"
        if result < 0:
            self.engine.slot.counters[C_UPSTREAM_TLS_FAILURES] += 1
            self.engine.slot.counters[C_UPSTREAM_CONNECT_FAILURES] += 1
            self.engine.complain("the TLS handshake with an upstream failed", {
                "upstream": self.upstream.name, "endpoint": self.endpoint.address, "reason": reason})
            return self.refuse(503, b"upstream-tls-failed", b"no trusted TLS connection to the upstream can be made; the request was not sent")
        self.engine.slot.counters[C_UPSTREAM_TLS_HANDSHAKES] += 1
        if self.tls.resumed:
            self.engine.slot.counters[C_UPSTREAM_TLS_RESUMED] += 1
        return self.serve()

    cdef int serve(self) except -1:
        """The connection stands: the requests that wait for it go out, as many as it takes before it has said its limit."""
        self.stands = True
        self.heard_at = self.engine.now
        self.readable = self.writable = True
        self.h2.secure = self.tls is not None
        self.h2.begin(True, self.upstream.http2, HEAD_MAX, self.engine.slot.counters)
        self.h2.peer_streams = self.endpoint.streams_said           # until it says so itself
        self.engine.slot.counters[C_UPSTREAM_H2_CONNECTIONS] += 1
        self.engine.set_timer(self, T_NONE, self.engine.now)
        self.release_waiting()
        if self.fd >= 0:
            self.pump()
        if self.fd >= 0:
            self.stirred()
        return 0

    cdef int release_waiting(self) except -1:
        cdef UpstreamConnection u
        waiting, self.waiting = self.waiting, []
        for u in waiting:
            if u.x is not None and u.fd >= 0:
                try:
                    u.serve()
                except BaseException as error:
                    self.engine.report(u, error)
        return 0

    cdef int send_elsewhere(self) except -1:
        """Those that waited for an answer, in vain: nothing was sent of them, and their endpoint is not to blame."""
        cdef UpstreamConnection u
        waiting, self.waiting = self.waiting, []
        for u in waiting:
            if u.x is not None and u.fd >= 0:
                try:
                    unproven(u)
                except BaseException as error:
                    self.engine.report(u, error)
        return 0

    cdef int settle(self, UpstreamConnection u) except -1:
        """Its handshake waits for the server's SETTINGS, as long as connecting may take; its stream has a place among the others until then."""
        cdef UpstreamConnection each
        u.state = U_CONNECTING
        self.h2.promise(u.stream)
        self.settling = [each for each in self.settling or () if each.fd >= 0]
        self.settling.append(u)
        (<Downstream>u.x.connection).arm(T_CONNECT, u.born + u.upstream.connect_us - self.engine.now)
        self.h2.tell_out()                          # it rests no more: seen to at the end of the batch
        return 0

    cdef int settled(self) except -1:
        """The server has said what it takes."""
        cdef UpstreamConnection u
        settling, self.settling = self.settling, None
        for u in settling:
            if u.x is not None and u.fd >= 0:
                self.h2.redeem(u.stream)
                try:
                    u.serve()
                except BaseException as error:
                    self.engine.report(u, error)
        return 0

    cdef int unsettled(self) except -1:
        """It has ended without a word about that. An endpoint which does so serves nobody: this counts as a failure to connect."""
        cdef UpstreamConnection u
        settling, self.settling = self.settling, None
        for u in settling:
            if u.x is not None and u.fd >= 0:
                try:
                    u.connect_failed(503, b"upstream-unreachable", b"the upstream's connection ended before its SETTINGS came; the request was not sent")
                except BaseException as error:
                    self.engine.report(u, error)
        return 0

    cdef int refuse(self, int status, bytes slug, bytes detail) except -1:
        """It could not be made: nothing was sent of what waits for it."""
        cdef UpstreamConnection u
        self.close()
        waiting, self.waiting = self.waiting, []
        for u in waiting:
            if u.x is not None and u.fd >= 0:
                try:
                    u.connect_failed(status, slug, detail)
                except BaseException as error:
                    self.engine.report(u, error)
        return 0

    cdef void tell_end(self):
        if self.h2.error:
            self.engine.slot.counters[C_UPSTREAM_BAD] += 1
            self.engine.complain("an HTTP/2 connection to an upstream was ended", {
                "upstream": self.upstream.name, "endpoint": self.endpoint.address, "code": self.h2.error,
                "reason": "" if self.h2.reason == NULL else self.h2.reason.decode("ascii")})

    cdef int stirred(self) except -1:
        if self.h2.peer_settings:
            self.endpoint.streams_said = self.h2.peer_streams
            if self.settling is not None and not self.h2.dead:
                self.settled()
                if self.fd < 0:
                    return 0
        if self.h2.dead or self.h2.peer_leaves or (self.h2.peer_settings and self.h2.peer_streams == 0):
            self.retiring = True
        if self.waiting and not self.asked_at and not self.h2.dead:
            if self.h2.peer_leaves:
                self.send_elsewhere()
            else:
                self.release_waiting()
            if self.fd < 0:
                return 0
        if self.h2.dead or (self.retiring and self.h2.active == 0):
            if not self.h2.overrun:                 # push() tells it
                self.tell_end()
            self.push()
            self.close()
            return 0
        if self.h2.active == 0 and not self.waiting and not self.asked_at:
            if not self.resting:
                self.resting = True
                self.engine.upstreams_idle += 1
                self.engine.set_timer(self, T_POOL, self.engine.now + self.upstream.keep_idle_us)
            return 0
        if self.resting:
            self.resting = False
            self.engine.upstreams_idle -= 1
            self.why = T_NONE
        if self.why != T_PING and self.h2.settings.ping_us:
            self.engine.set_timer(self, T_PING, self.engine.now + self.h2.settings.ping_us)
        return 0

    cdef int on_timeout(self) except -1:
        if self.why == T_CONNECT:
            return self.refuse(504, b"upstream-connect-timeout", b"the upstream did not accept a connection in time; the request was not sent")
        if self.why == T_PING:
            return self.watch()
        self.close()
        return 0

    def moved(self, Endpoint endpoint, Upstream upstream) -> None:
        """Its endpoint is a new snapshot's now."""
        self.endpoint = endpoint
        self.upstream = upstream

    def discard(self) -> None:
        """Nobody will ask here any more: what is under way ends in peace."""
        self.retiring = True
        if self.h2.active == 0 and not self.waiting:
            self.close()

    cdef void close_now(self):
        self.waiting = []                           # all is being closed, or has met an error of ours: no new attempts from here
        self.settling = None
        for owner in self.owners():
            if (<UpstreamConnection>owner).state == U_TUNNEL:
                (<UpstreamConnection>owner).close_now()     # not the upstream's doing: so says its record
        self.close()

    cdef void close(self):
        if self.fd < 0:
            return
        self.engine.upstreams -= 1
        if self.resting:
            self.resting = False
            self.engine.upstreams_idle -= 1
        self.upstream.close_one()
        if self in self.endpoint.links:
            self.endpoint.links.remove(self)
        self.state = U_CLOSED
        Link.close(self)
        if self.stands and self.waiting:
            self.send_elsewhere()
        if self.settling is not None:
            self.unsettled()


cdef Tls tls_under(UpstreamConnection u):
    """The TLS of the connection that carries it; None: clear text, or none yet."""
    return None if u is None else u.tls if u.link is None else u.link.tls


cdef bint server_fallen(Engine engine, Upstream upstream, Tls tls) except -1:
    """Whether a server was shut out while the handshake with it went on."""
    cdef Upstream now = engine.snapshot.upstreams.get(upstream.name)
    return now is not None and now.tls is not None and now.tls is not tls.settings and now.tls.admit is not None and \
        tls.certificate is not None and now.tls.admit(tls.certificate.leaf) is not None


cdef int unproven(UpstreamConnection u) except -1:
    """The connection that it would have gone out on is dead, or may be: it goes out on another one, whatever its method."""
    cdef Exchange x = u.x
    cdef Downstream d = <Downstream>x.connection
    u.sent_at = u.engine.now                        # the wait says nothing about the endpoint
    u.record(OUTCOME_NONE, 0, 0)
    if x.hedge is u:
        drop_hedge(x, OUTCOME_NONE)
        return 0
    d.engine.slot.counters[C_UPSTREAM_DISCARDED] += 1
    d.drop_upstream()
    d.attach(True)
    return d.advance()


cdef int dress_stream(UpstreamConnection u, Downstream d) except -1:
    """Before a request's head goes out on a stream: what it is told, where its body stands, and what came behind that if it has been read."""
    cdef Exchange x = u.x
    u.stream.trailing = x.upstream.protocol == PROTOCOL_GRPC or (d.stream is not None and d.stream.trailing)
    u.start_at = x.body_at
    u.start_remaining = x.body.remaining
    u.start_bytes = x.body.bytes
    u.unsent = not x.sent
    if x.body.done and d.stream is not None and x.web is None:
        pass_trailers(d.stream, u.stream, x.route.request_edits, x.snapshot.identity_names)
    return 0


cdef void give_stream(Downstream d):
    """An exchange that outlived its stream is over: its place on the connection is free."""
    cdef LinkSession session = <LinkSession>d.held
    d.held = None
    session.active -= 1
    if session.link is not None:
        session.tell_out()


cdef int pass_trailers(Http2Stream source, Http2Stream sink, Edits edits, tuple names) except -1:
    """What came behind a body goes on behind it, without the fields that a policy removes, or asserts itself. The source keeps it: there may
    be another attempt."""
    cdef uint32_t n = source.trailers.end - source.trailers.start
    if n:
        buffer_release(&sink.closing_lines)
        if buffer_append(&sink.closing_lines, source.trailers.base + source.trailers.start, n) < 0:
            raise MemoryError
        thin_out(&sink.closing_lines, edits, names)
    return 0


cdef int thin_out(Buffer* trailers, Edits edits, tuple names) except -1:
    """Takes out of these lines what a policy removes."""
    cdef bytes lines
    names = names + (tuple(edits.remove) if edits is not None else ())
    if names and trailers.end > trailers.start:
        folded = {fold(name) for name in names}
        lines = trailers.base[trailers.start:trailers.end]
        lines = b"".join(line for line in lines.splitlines(keepends=True) if fold(line.partition(b":")[0]) not in folded)
        buffer_release(trailers)
        buffer_append(trailers, lines, <uint32_t>len(lines))
    return 0


cdef bytes fold(bytes name):
    """As an application server may spell it: X_User and x.user are X-User."""
    return bytes([cw_fold_name(c) for c in name])


cdef int part_stream(UpstreamConnection u) except -1:
    """Its exchange is over: the link may rest."""
    cdef BackLink link = u.link
    u.link = None
    u.state = U_CLOSED
    Connection.close(u)
    if link is not None:
        if u in link.waiting:
            link.waiting.remove(u)
        if link.fd >= 0 and link.stands:
            link.h2.tell_out()                      # it may rest now, or end: seen to at the end of the batch
    return 0


cdef bint refused_stream(UpstreamConnection u) except -1:
    """The server has not acted on the request (RFC 9113 8.7), which is as good as never sent. False: as with any other loss."""
    cdef Exchange x = u.x
    cdef Downstream d = <Downstream>x.connection
    cdef bint whole = x.collected is not None or x.kept.end > x.kept.start or x.body.bytes == u.start_bytes
    if u.state != U_HEAD or x.hedge is not None or x.informational:
        return False
    u.record(OUTCOME_NONE, 0, 0)
    if not whole and x.replayable:
        whole = True
        x.body_at = u.start_at                      # all of it lies in the pinned buffer still
        x.body.remaining = u.start_remaining
        x.body.bytes = u.start_bytes
        if x.body.mode == BODY_LENGTH:
            x.body.done = x.body.remaining == 0
    if u.unsent:
        x.sent = False
    d.drop_upstream()
    if whole and x.refusals < REFUSALS and x.upstream.pay(d.engine.now):
        x.refusals += 1
        d.engine.slot.counters[C_RETRIES] += 1
        d.attach(True)
        return True
    unreachable(x, 503, b"upstream-refused", b"the upstream refused the request unread; it was not executed")
    d.reply()
    return True
