# Raw TCP: a connection of a `tcp` listener, from its first byte to its record (included by engine.pyx).
#
# Strategy: what has to be known is found out first, within one deadline: a PROXY header where one is due, PostgreSQL's request for TLS
# in clear text, then the TLS handshake, or the name in a ClientHello that is passed on unread. Then an endpoint is connected, another
# one if that fails; nothing of the client's was sent to it yet, so that is always safe. From then on bytes pass both ways as they come
# (relay.pxi). Each connection ends in end(), once: counted, and told in one line of the log. Python is called from here: per connection.

from gateway._speedups.histogram import TCP_ENDS as _tcp_ends

cdef enum:
    TCP_HANDSHAKES = 1000           # that may be under way in a worker on a listener without TLS of its own
    SAID_SERVED = 200               # log lines a second and worker about connections that reached an upstream
    SAID_OTHERS = 20                # ... about others, which strangers cause at will
    ALERT_DECODE = 50               # RFC 8446 6.2
    ALERT_NAME = 112
    PG_REQUEST = 8                  # bytes of a request before TLS: its length and a code (PostgreSQL, protocol 3)

cdef const char* PG_SSL = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"
cdef const char* PG_GSS = b"\x00\x00\x00\x08\x04\xd2\x16\x30"
cdef const char* PG_CANCEL = b"\x00\x00\x00\x10\x04\xd2\x16\x2e"
cdef bytes PG_REFUSAL = b"SFATAL\0VFATAL\0C28000\0Mthis address takes TLS only: connect with sslmode=require or stricter\0\0"
PG_REFUSAL = b"E" + (len(PG_REFUSAL) + 4).to_bytes(4, "big") + PG_REFUSAL


cdef void accept_tcp(Engine engine, ListenerEntry listener, int fd, sockaddr_storage* address):
    """Takes up a client's connection."""
    cdef TcpDownstream d = TcpDownstream.__new__(TcpDownstream)
    cdef TcpListener tcp = <TcpListener>listener.tcp
    cdef uint16_t port = 0
    cdef int most = TCP_HANDSHAKES if listener.tls is None else listener.tls.handshakes_max
    d.engine = engine
    d.listener = listener
    d.tcp = tcp
    d.proxied = listener.proxy_protocol != 0
    d.greeting = tcp.postgres
    d.client = address[0]
    d.text_len = cw_address_text(address, d.text, sizeof(d.text), &port)
    cw_address_bytes(address, d.address)
    d.accepted = engine.now
    d.state = D_HANDSHAKE
    d.writable = True
    cw_nodelay(fd)
    try:
        engine.register(d, fd, WATCH)
    except OSError as error:
        engine.log.error("cannot watch a connection", exc_info=error)
        return
    engine.connections += 1
    engine.slot.counters[C_CONNECTIONS_ACCEPTED] += 1
    engine.set_timer(d, T_HANDSHAKE, engine.now + (tcp.hello_us if listener.tls is None else listener.tls.handshake_us))
    if len(engine.handshaking) >= most:
        engine.slot.counters[C_TLS_EVICTED] += 1
        (<Connection>next(iter(engine.handshaking))).close()
    engine.handshaking[d] = None
    try:
        d.step()                                    # where nothing is waited for: servers that speak first are many
    except BaseException as error:
        engine.report(d, error)


cdef void take_turn_again(Connection c):
    """Goes on after the others of this batch had their turn."""
    if not c.queued:
        c.queued = True
        c.engine.again.append(c)


cdef class TcpDownstream(Connection):
    """A client's connection to a raw TCP listener."""

    cdef int on_events(self, uint32_t events) except -1:
        if self.state == D_TUNNEL:
            if relay_events(self, events):
                self.stir()
            return self.pump()
        if self.state == D_LINGER:
            return self.linger()
        if events & (EPOLLERR | EPOLLHUP):
            return self.end(END_CLIENT, True)
        if events & EPOLLRDHUP:
            self.ended = True
        if events & (EPOLLIN | EPOLLRDHUP):
            self.wake()
        return self.step() if self.state == D_HANDSHAKE else 0

    cdef int on_timeout(self) except -1:
        if self.state == D_LINGER:
            self.close()
        elif self.state == D_TUNNEL:
            self.end(END_IDLE, self.out.end > self.out.start or self.upstream.out.end > self.upstream.out.start)
        elif self.state == D_ACTIVE:
            self.upstream.failed()
        else:
            if self.listener.tls is not None:
                self.engine.slot.counters[C_TLS_TIMEOUTS] += 1
            self.end(END_HANDSHAKE, True)
        return 0

    # -- before an upstream is chosen ---------------------------------------------------------------------------------

    cdef int step(self) except -1:
        """As far as it goes now."""
        if self.proxied and self.take_header() <= 0:
            return 0
        if not self.admitted:
            self.admitted = True
            # Who may connect to a Unix socket is its file's mode to say.
            if self.tcp.allow is not None and self.client.ss_family != AF_UNIX and not self.tcp.allow.contains(self.address):
                return self.end(END_FORBIDDEN, True)
        if self.greeting and self.take_request() <= 0:
            return 0
        if self.listener.tls is not None:
            if self.secure() <= 0:
                return 0
        elif self.tcp.reads_name:
            if self.read_hello() <= 0:
                return 0
        else:
            self.target = self.tcp.only
        self.engine.handshaking.pop(self, None)
        return self.attach()

    cdef int take_header(self) except -2:
        """A PROXY header; what is behind it stays in the kernel. 1 taken (or absent where optional), 0 bytes are missing, -1 ended."""
        cdef sockaddr_storage address
        cdef uint16_t port = 0
        cdef int kind = 0, result = -1
        cdef ssize_t n = cw_peek(self.fd, self.engine.scratch, SCRATCH)
        if n == -EAGAIN:
            self.readable = False
            return 0
        if n > 0:
            result = parse_proxy_header(self.engine.scratch, <uint32_t>n, &address, &kind)
        if result == 0 and not self.ended:
            self.readable = False
            return 0
        self.proxied = False
        if result > 0:
            cw_recv(self.fd, self.engine.scratch, result)
            if kind == 1:
                self.client = address
                self.text_len = cw_address_text(&address, self.text, sizeof(self.text), &port)
                cw_address_bytes(&address, self.address)
            return 1
        if n > 0 and self.listener.proxy_protocol == 1 and kind == 0:
            return 1
        self.engine.slot.counters[C_BAD_REQUESTS] += 1
        self.end(END_HANDSHAKE, True)
        return -1

    cdef int take_request(self) except -2:
        """What PostgreSQL's clients say in clear text before TLS. 1 TLS is next, 0 bytes are missing, -1 ended.

        A request is taken from the kernel by itself, never with what is behind it: nothing that came in clear text can be read as if it had
        come within TLS (CVE-2021-23214). A client that begins with TLS at once is let on.
        """
        cdef char asked[PG_REQUEST]
        cdef ssize_t n
        while True:
            n = cw_peek(self.fd, asked, PG_REQUEST) if self.readable else -EAGAIN
            if n > 0 and asked[0] == 22:
                break
            if n == -EAGAIN or (0 < n < PG_REQUEST and not self.ended):
                self.readable = False
                return 0
            if n == PG_REQUEST and memcmp(asked, PG_SSL, PG_REQUEST) == 0:
                cw_recv(self.fd, asked, PG_REQUEST)
                if cw_send(self.fd, b"S", 1) == 1:
                    break
            elif n == PG_REQUEST and memcmp(asked, PG_GSS, PG_REQUEST) == 0 and not self.refused_gss:
                self.refused_gss = True
                cw_recv(self.fd, asked, PG_REQUEST)
                if cw_send(self.fd, b"N", 1) == 1:
                    continue
            elif n == PG_REQUEST and memcmp(asked, PG_CANCEL, PG_REQUEST):
                self.engine.slot.counters[C_BAD_REQUESTS] += 1
                cw_send(self.fd, <const char*>PG_REFUSAL, len(PG_REFUSAL))
                self.alert(END_HANDSHAKE, 0)
                return -1
            self.end(END_HANDSHAKE, True)
            return -1
        self.greeting = False
        return 1

    cdef int secure(self) except -1:
        """The TLS handshake. 1 complete, 0 it goes on later, or the connection ended."""
        cdef Engine engine = self.engine
        cdef Tls failed
        cdef int result
        if not self.readable and self.tls is None:
            return 0                                # connected, and nothing said yet
        if engine.handshake_turns == 0:
            take_turn_again(self)
            return 0
        engine.handshake_turns -= 1
        if self.tls is None:
            self.tls = self.listener.tls.accept(self.fd)
            self.tls.wake(self.ended)
        result = self.tls.handshake()
        if result == 0:
            return 0
        if result > 0:
            engine.slot.counters[C_TLS_HANDSHAKES] += 1
            if self.tls.resumed:
                engine.slot.counters[C_TLS_RESUMED] += 1
            self.tls.push()                         # of TLS 1.2 a client waits for these last words before it says its first
            self.target = self.tcp.only
            self.readable = True
            return 1 if self.tcp.policy is None else self.authorize()
        failed = self.tls
        self.tls = None
        if failed.failure == FAILED_VISITOR:
            self.alert(-1, 0)
            return 0
        engine.slot.counters[C_TLS_FAILED] += 1
        engine.complain("a client's TLS handshake failed", {
            "listener": self.listener.name, "client": self.text[:self.text_len].decode("ascii"), "reason": failed.reason})
        if failed.failure == FAILED_GONE:
            self.end(END_HANDSHAKE, True)
        else:
            self.alert(END_HANDSHAKE, 0)            # OpenSSL has sent one: it must arrive
        return 0

    cdef int authorize(self) except -1:
        """Whether the one who proved who it is may connect, by the policy of now. 1 yes, 0 the connection ended."""
        cdef ListenerEntry listener = self.engine.snapshot.listeners.get(self.listener.name)
        cdef ClientCertificate certificate = self.tls.certificate
        cdef TcpListener tcp = self.tcp
        cdef Caller caller = None
        if listener is not None and listener.tcp is not None and (<TcpListener>listener.tcp).policy is not None:
            tcp = <TcpListener>listener.tcp
        if certificate is not None:
            caller = tcp.policy.who(certificate)
            # The handshake began under another deny list; who was put on it meanwhile must not stay for hours.
            if listener is not None and listener is not self.listener and listener.tls is not None and listener.tls.admit is not None \
                    and listener.tls.admit(certificate.leaf) is not None:
                self.end(END_DENIED, True)
                return 0
        if caller is not None and caller.target is not None:
            self.target = <TcpTarget>caller.target
        if tcp.policy.connects(caller, True):
            return 1
        self.end(END_DENIED, True)
        return 0

    cdef int read_hello(self) except -1:
        """The name in the ClientHello, which stays in `inb`. 1 a target is chosen, 0 bytes are missing, or the connection ended."""
        cdef char name[HELLO_NAME]
        cdef uint32_t length = 0
        cdef int result = 0
        cdef ssize_t n
        while result == 0:
            if not self.readable:
                return 0
            if buffer_reserve(&self.inb, HELLO_MAX) < 0:
                raise MemoryError
            n = self.recv(self.inb.base + self.inb.end, HELLO_MAX - (self.inb.end - self.inb.start))
            if n == -EAGAIN:
                self.readable = False
                return 0
            if n <= 0:
                self.end(END_HANDSHAKE, True)
                return 0
            self.inb.end += <uint32_t>n
            result = parse_client_hello(self.inb.base + self.inb.start, self.inb.end - self.inb.start, self.engine.scratch, name, &length)
        if result < 0:
            self.engine.slot.counters[C_BAD_REQUESTS] += 1
            self.alert(END_BAD_HELLO, ALERT_DECODE)
            return 0
        if length:
            self.name = name[:length]
        self.target = self.tcp.choose(name, length)
        if self.target is None:
            self.alert(END_NO_NAME, ALERT_NAME)
            return 0
        return 1

    cdef int alert(self, int ending, int description) except -1:
        """Ends it so that the client learns why: a fatal TLS alert (RFC 8446 6.2), then our end. An `ending` of -1 is worth no line."""
        cdef char record[7]
        if description:
            record[0] = 21
            record[1] = record[2] = 3
            record[3] = 0
            record[4] = record[5] = 2
            record[6] = <char>description
            cw_send(self.fd, record, 7)
        self.state = D_LINGER
        self.engine.handshaking.pop(self, None)
        self.over = True
        if ending >= 0:
            self.say(ending)
        buffer_release(&self.inb)
        cw_shutdown(self.fd, SHUT_WR)
        self.engine.set_timer(self, T_LINGER, self.engine.now + LINGER_US)
        return self.linger()

    cdef int linger(self) except -1:
        """Reads and drops what still comes: closing with bytes unread would reset what the client has not got yet."""
        cdef ssize_t n
        while self.fd >= 0:
            n = cw_recv(self.fd, self.engine.scratch, SCRATCH)
            if n == -EAGAIN:
                return 0
            if n > 0:
                self.lingered += <uint32_t>n
            if n <= 0 or self.lingered > LINGER_BYTES:
                self.close()
        return 0

    # -- the upstream -------------------------------------------------------------------------------------------------

    cdef int attach(self) except -1:
        """A place on the listener and one at the upstream, then an endpoint."""
        cdef Upstream upstream = self.target.upstream
        self.series = self.engine.slot.tcp(self.target.metric)
        if not self.engine.slot.enter_tunnel(self.tcp.metric, self.tcp.most):
            return self.end(END_FULL, True)
        self.engine.slot.enter_tunnel(self.target.metric, 0xFFFFFFFF)
        self.placed = True
        if not upstream.enter(self.engine.now):
            return self.end(END_FULL, True)
        self.entered = True
        self.state = D_ACTIVE
        return self.connect(None)

    cdef int connect(self, Endpoint avoid) except -1:
        """Begins to connect to an endpoint, another one than `avoid` if there is one."""
        cdef Engine engine = self.engine
        cdef Upstream upstream = self.target.upstream
        cdef uint64_t key = 0
        cdef Endpoint endpoint
        if upstream.key_kind != KEY_NONE:
            key = hash_key(<const char*>self.address, 16) or 1
        while True:
            endpoint = upstream.pick(engine.now, key, True, avoid)
            if endpoint is None:
                return self.end(END_UNREACHABLE, True)
            if not upstream.open_one():
                upstream.decline(endpoint, engine.now)
                return self.end(END_FULL, True)
            upstream.start(endpoint, engine.now, self.tries > 0)
            self.upstream = connect_tcp(self, endpoint)
            if self.upstream is not None:
                engine.set_timer(self, T_CONNECT, engine.now + upstream.connect_us)
                return 0
            upstream.finish(endpoint, endpoint.ticket, engine.now, OUTCOME_CONNECT, 0, 0, 0)
            upstream.stop(endpoint)
            self.series.connect_failures += 1
            if not self.may_try():
                return self.end(END_UNREACHABLE, True)
            avoid = endpoint

    cdef bint may_try(self) noexcept:
        """Takes another attempt from what the upstream allows. Nothing was sent yet: it is always safe."""
        cdef Upstream upstream = self.target.upstream
        if not upstream.retry_on & RETRY_CONNECT or self.tries >= upstream.attempts:
            return False
        if not upstream.pay(self.engine.now):
            self.engine.slot.counters[C_RETRIES_DENIED] += 1
            return False
        self.tries += 1
        self.engine.slot.counters[C_RETRIES] += 1
        return True

    cdef int stands(self) except -1:
        """The upstream is there: what was read of the client goes first, then all that comes."""
        cdef uint32_t early = self.inb.end - self.inb.start
        self.state = D_TUNNEL
        self.opened = self.engine.now
        self.series.opened += 1
        self.readable = self.upstream.readable = True
        if early:
            self.bytes_in += early
            self.series.bytes_in += early
            self.engine.slot.counters[C_BYTES_IN] += early
            self.engine.slot.counters[C_UPSTREAM_BYTES_OUT] += early
            if self.upstream.put(self.inb.base + self.inb.start, early) < 0:
                sink_lost(self.upstream)
                self.finished = True
            buffer_release(&self.inb)
        self.stir()
        return self.pump()

    # -- bytes --------------------------------------------------------------------------------------------------------

    cdef void stir(self) noexcept:
        """Bytes moved: the time of silence begins anew."""
        self.engine.set_timer(self, T_TUNNEL, self.engine.now + self.tcp.idle_us)

    cdef int pump(self) except -1:
        """Moves what is there, in turns, as far as both sides allow and this connection's share of the batch goes."""
        cdef TcpUpstream u = self.upstream
        cdef uint64_t* counters = self.engine.slot.counters
        cdef ssize_t up, down
        cdef uint64_t moved = 0
        cdef int piece
        for piece in range(PIECES):
            up = relay(self, u)
            if up < 0:
                return self.broke(self, u)
            self.bytes_in += <uint64_t>up
            self.series.bytes_in += <uint64_t>up
            counters[C_BYTES_IN] += up
            counters[C_UPSTREAM_BYTES_OUT] += up
            down = relay(u, self)
            if down < 0:
                return self.broke(u, self)
            self.bytes_out += <uint64_t>down
            self.series.bytes_out += <uint64_t>down
            counters[C_UPSTREAM_BYTES_IN] += down
            counters[C_BYTES_OUT] += down
            moved += <uint64_t>up + <uint64_t>down
            if up == 0 and down == 0:
                break
        else:
            take_turn_again(self)
        pass_end(self, u)
        pass_end(u, self)
        if self.finished and u.finished and self.shut_out and u.shut_out and self.out.end == self.out.start and u.out.end == u.out.start:
            return self.end(END_CLIENT if self.broken_off else END_UPSTREAM if u.broken_off else END_CLOSED, False)
        if moved:
            self.stir()
        return 0

    cdef int broke(self, Connection source, Connection sink) except -1:
        """A side was reset, and so is the other; unless both had said their ends already but for the last word of this one."""
        if sink.finished and source.shut_out and not source.broken_off:
            return self.end(END_CLOSED, False)
        return self.end(END_CLIENT if source is self else END_UPSTREAM, True)

    # -- the end ------------------------------------------------------------------------------------------------------

    cdef int end(self, int ending, bint cut) except -1:
        """Closes both sides, with `cut` by resets, and tells what became of the connection. Once."""
        cdef TcpUpstream u = self.upstream
        cdef Engine engine = self.engine
        if self.over:
            return 0
        self.over = True
        if cut:
            self.cut_short()
        elif ending == END_IDLE:
            self.shut()                             # TLS says its end; without it the socket's would be a truncation
        self.say(ending)
        if u is not None:
            self.upstream = None
            if cut:
                u.cut_short()
            elif ending == END_IDLE:
                u.shut()
            u.part(OUTCOME_NONE)
            u.close()
        if self.entered:
            self.target.upstream.leave(self.opened != 0)
        if self.placed:
            engine.slot.leave_tunnel(self.target.metric)
            engine.slot.leave_tunnel(self.tcp.metric)
        self.close()
        return 0

    cdef void say(self, int ending):
        """Counts the connection and writes its line: who, where to, how much, how long, and why it ended."""
        cdef Engine engine = self.engine
        cdef TcpSeries* series = engine.slot.tcp(self.tcp.metric if self.target is None else self.target.metric)
        cdef int kind = 0 if self.opened else 1
        cdef int64_t now = cw_monotonic_us()
        series.ended[ending] += 1
        series.duration_us += <uint64_t>(now - self.accepted)
        if self.opened:
            series.closed += 1
        if ending == END_CLIENT and self.opened:
            engine.slot.counters[C_CLIENT_ABORTS] += 1
        elif ending == END_UPSTREAM:
            engine.slot.counters[C_UPSTREAM_RESETS] += 1
        if now // 1000000 != engine.said_in:
            engine.said_in = now // 1000000
            engine.said[0] = engine.said[1] = 0
        if engine.said[kind] >= (SAID_OTHERS if kind else SAID_SERVED):
            engine.unsaid[kind] = engine.unsaid[kind] + 1
            return
        engine.said[kind] = engine.said[kind] + 1
        said = self.describe()
        said["reason"] = _tcp_ends[ending]
        said["duration_us"] = now - self.accepted
        if engine.unsaid[kind]:
            said["unsaid"] = engine.unsaid[kind]
            engine.unsaid[kind] = 0
        if kind and ending != END_UNREACHABLE:
            engine.log_tcp.info("a TCP connection was refused", extra=said)
        elif kind:
            engine.log_tcp.warning("a TCP connection found no upstream", extra=said)
        else:
            engine.log_tcp.info("a TCP connection ended", extra=said)

    def describe(self) -> dict:
        """The connection in words for the log: never a byte of what passed."""
        cdef char text[48]
        cdef uint16_t port = 0
        cw_address_text(&self.client, text, sizeof(text), &port)
        said = {"listener": self.listener.name, "client": self.text[:self.text_len].decode("ascii"), "client_port": port}
        if self.name is not None:
            said["server_name"] = self.name.decode("ascii")
        if self.tls is not None and self.tls.certificate is not None:
            said["certificate"] = self.tls.certificate.subject
            said["uris"] = list(self.tls.certificate.uris)
        if self.target is not None:
            said["upstream"] = self.target.upstream.name
        if self.upstream is not None:
            said["endpoint"] = self.upstream.endpoint.address
        if self.opened:
            said["bytes_in"] = self.bytes_in
            said["bytes_out"] = self.bytes_out
        return said

    cdef void leave(self):
        """A drain begins: who has said nothing yet is not waited for."""
        if self.state == D_HANDSHAKE and self.tls is None and self.inb.base == NULL and cw_silent(self.fd):
            self.close()

    cdef void close_now(self):
        """Our doing: the end of a drain, or an error of ours."""
        self.close()

    cdef void close(self):
        if self.fd < 0:
            return
        if not self.over:                           # end() comes back here
            self.end(END_HANDSHAKE if self.state == D_HANDSHAKE else END_CUT, True)
            return
        self.engine.handshaking.pop(self, None)
        self.state = D_CLOSED
        self.engine.connections -= 1
        self.engine.slot.counters[C_CONNECTIONS_CLOSED] += 1
        Connection.close(self)


cdef TcpUpstream connect_tcp(TcpDownstream d, Endpoint endpoint):
    """A connection to the endpoint that is on its way; the upstream has a place for it. None when it failed at once."""
    cdef Engine engine = d.engine
    cdef Upstream upstream = d.target.upstream
    cdef TcpUpstream u
    u = TcpUpstream.__new__(TcpUpstream)
    u.engine = engine
    u.downstream = d
    u.endpoint = endpoint
    u.upstream = upstream
    u.ticket = endpoint.ticket
    u.born = engine.now
    u.state = U_CONNECTING
    return u if engine.dial(u, upstream, endpoint) else None


cdef class TcpUpstream(Connection):
    """The connection to an endpoint that belongs to one client's."""

    cdef int on_events(self, uint32_t events) except -1:
        cdef TcpDownstream d = self.downstream
        if self.state == U_TUNNEL:
            if relay_events(self, events):
                d.stir()
            return d.pump()
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self.ended = True
        if self.asking:
            return self.asked()
        if self.tls is not None:
            self.tls.wake(self.ended)
            return self.secure()
        return self.connected() if events & (EPOLLOUT | EPOLLERR | EPOLLHUP) else 0

    cdef int connected(self) except -1:
        """Connected, or not. Who the client is goes first where the upstream wants to know, in clear text as a balancer sends it."""
        cdef char header[PROXY_MAX]
        cdef sockaddr_storage here
        cdef socklen_t size = sizeof(here)
        cdef int length
        if cw_socket_error(self.fd):
            return self.failed()
        self.writable = True
        if self.downstream.tcp.announce:
            memset(&here, 0, sizeof(here))
            cw_getsockname(self.downstream.fd, <sockaddr*>&here, &size)
            length = compose_proxy_header(header, &self.downstream.client, &here)
            if cw_send(self.fd, header, length) != length:      # nothing was sent before it: there is room, unless it is broken
                return self.failed()
        if self.downstream.tcp.postgres and (self.upstream.tls is not None or self.downstream.tcp.reads_name):
            if cw_send(self.fd, PG_SSL, PG_REQUEST) != PG_REQUEST:
                return self.failed()
            self.asking = True
            return 0
        return self.begin()

    cdef int asked(self) except -1:
        """What a server of PostgreSQL's answers, one byte: nothing behind it may be taken for what comes within TLS (CVE-2021-23222)."""
        cdef char answer = 0
        cdef ssize_t n = cw_recv(self.fd, &answer, 1)
        if n == -EAGAIN and not self.ended:
            return 0
        self.asking = False
        if n != 1 or answer != 83:
            self.engine.complain("a server of PostgreSQL's does not take TLS", {
                "upstream": self.upstream.name, "endpoint": self.endpoint.address, "reason": "it answered N" if answer == 78 else "no answer"})
            return self.failed()
        return self.begin()

    cdef int begin(self) except -1:
        """TLS of our own where the upstream has it, else the client's bytes."""
        if self.upstream.tls is None:
            return self.stands()
        self.tls = self.upstream.tls.connect(self.fd, self.endpoint.address, self.endpoint.host)
        return self.secure()

    cdef int secure(self) except -1:
        """The TLS handshake, as far as it goes now. Nothing of the client's leaves before it is complete."""
        cdef uint64_t* counters = self.engine.slot.counters
        cdef int result = self.tls.handshake()
        if result == 0:
            return 0
        if result < 0:
            counters[C_UPSTREAM_TLS_FAILURES] += 1
            self.engine.complain("the TLS handshake with an upstream failed", {
                "upstream": self.upstream.name, "endpoint": self.endpoint.address, "reason": self.tls.reason})
            return self.failed()
        counters[C_UPSTREAM_TLS_HANDSHAKES] += 1
        if self.tls.resumed:
            counters[C_UPSTREAM_TLS_RESUMED] += 1
        return self.failed() if server_fallen(self.engine, self.upstream, self.tls) else self.stands()

    cdef int stands(self) except -1:
        cdef int event
        self.state = U_TUNNEL
        self.took = self.engine.now - self.born if self.engine.now > self.born else 1
        event = self.endpoint.state.report(self.upstream.state, OUT_OK, self.ticket, self.engine.now)
        if event:
            self.upstream.look_at = 0
            self.engine.tell(self.endpoint, event)
        return self.downstream.stands()

    cdef int failed(self) except -1:
        """No connection in time, or none at all: another endpoint may have the client."""
        cdef TcpDownstream d = self.downstream
        cdef Endpoint endpoint = self.endpoint
        self.engine.slot.counters[C_UPSTREAM_CONNECT_FAILURES] += 1
        d.series.connect_failures += 1
        self.part(OUTCOME_CONNECT)
        self.cut_short()
        self.close()
        if not d.may_try():
            return d.end(END_UNREACHABLE, True)
        d.upstream = None
        return d.connect(endpoint)

    cdef void part(self, int outcome):
        """Gives back the place at the endpoint, and says how the attempt ended if that is not said yet."""
        cdef int event
        if self.downstream is None:
            return
        self.downstream = None
        if self.took:                               # an open connection is load until now; how fast the endpoint is was seen at its begin
            self.upstream.balancer.finished(&self.endpoint.candidate, self.engine.now, self.took, SAMPLE_GOOD, 0)
        else:
            event = self.upstream.finish(self.endpoint, self.ticket, self.engine.now, outcome, 0, self.engine.now - self.born, 0)
            if event:
                self.engine.tell(self.endpoint, event)
        self.upstream.stop(self.endpoint)

    cdef void close_now(self):
        if self.downstream is not None:
            self.downstream.close()
        else:
            self.close()

    cdef void close(self):
        if self.fd >= 0:
            self.engine.upstreams -= 1
            self.upstream.close_one()
        self.state = U_CLOSED
        Connection.close(self)
