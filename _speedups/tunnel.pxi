# Tunnels: WebSockets from the handshake to the last byte (included by engine.pyx).
#
# Strategy: a handshake (RFC 6455 section 4) is checked before the policies see it, travels on a connection of its own, and is the
# last request of its client's connection whatever becomes of it: bytes behind it are never a request. Nothing that follows it is
# read before the upstream has answered 101 and proved by Sec-WebSocket-Accept that it read this handshake; from then on bytes
# pass in both directions as they come, and frames are not looked at. A side is read only while the other one has taken
# everything (relay.pxi). An end of one side is passed on as such. To an upstream that speaks HTTP/2 the handshake is an extended
# CONNECT (RFC 8441) on a stream among others, sent once the server's SETTINGS have said that it takes one; 200 is its 101, and the
# stream itself the proof. Python is called
# from here: per handshake, for the proof.

from base64 import b64encode
from hashlib import sha1

cdef enum:
    EXPIRY_MAX = 1000000000         # seconds: what ends later than in 30 years ends never
    HALF_CLOSED_US = 30000000       # one side has said its end: silence of the other is not waited for longer than this

cdef bytes WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"         # RFC 6455 1.3


# -- the handshake ----------------------------------------------------------------------------------------------------

cdef int only_field(const Head* head, const char* lower, size_t length) noexcept nogil:
    """The index of the one field of that name; -1 when there is none, or more than one."""
    cdef int i = head_find(head, lower, length, 0)
    return i if i >= 0 and head_find(head, lower, length, i + 1) < 0 else -1


cdef bint offers_websocket(const Head* head) noexcept nogil:
    """Whether the client would switch to it. HTTP/1.0 cannot (RFC 9110 7.8), nor do other protocols concern us."""
    cdef int i
    if not head.upgrade or head.minor != 1:
        return False
    for i in range(head.count):
        if head.fields[i].id == F_UPGRADE and list_has(head.base + head.fields[i].value, head.fields[i].value_len, b"websocket", 9) == 1:
            return True
    return False


cdef bint key_is_sound(const char* p, uint32_t n) noexcept nogil:
    """16 bytes in base64, spelled in the one canonical way: 22 characters, of the last the lower four bits zero, then ==."""
    cdef uint32_t i
    cdef uint8_t c
    if n != 24 or p[22] != 61 or p[23] != 61:
        return False
    for i in range(22):
        c = <uint8_t>p[i]
        if not (65 <= c <= 90 or 97 <= c <= 122 or 48 <= c <= 57 or c == 43 or c == 47):
            return False
    return p[21] == 65 or p[21] == 81 or p[21] == 103 or p[21] == 119       # A Q g w


cdef bint take_handshake(Exchange x) except -1:
    """On a route that lets WebSockets pass: takes the handshake, or refuses (False) what is none but says so. Anything else goes on
    as an ordinary request, its Upgrade stripped."""
    cdef Head* head = x.head
    cdef int version, key
    if not offers_websocket(head):
        return True
    x.keep_alive = False                            # whatever is behind it is no request (RFC 6455 4.1: the client waits)
    version = only_field(head, b"sec-websocket-version", 21)
    key = only_field(head, b"sec-websocket-key", 17)
    if head.method != M_GET or head.chunked or head.content_length > 0 or version < 0 or key < 0 or \
            not key_is_sound(head.base + head.fields[key].value, head.fields[key].value_len):
        x.slot.counters[C_BAD_REQUESTS] += 1
        x.side = SIDE_DOWNSTREAM
        x.refuse(400, b"bad-handshake", b"a WebSocket handshake is a GET without a body, with one Sec-WebSocket-Version and one Sec-WebSocket-Key"
                 b" of 16 bytes in base64")
        return False
    if head.fields[version].value_len != 2 or memcmp(head.base + head.fields[version].value, b"13", 2) != 0:
        x.side = SIDE_DOWNSTREAM
        x.refuse(426, b"websocket-version", b"only version 13 of WebSocket is known here")
        x.reply_headers = b"upgrade: websocket\r\nsec-websocket-version: 13\r\n"
        return False
    memcpy(x.websocket_key, head.base + head.fields[key].value, 24)
    x.upgrade = True
    x.body.mode = x.body.out = BODY_NONE            # whatever length it gave: none is told to the upstream, which would hold a tunnel to it
    return True


cdef void pass_plain(Downstream d):
    """A route that lets no WebSockets pass: a handshake goes on without its Upgrade. Where members expect more of each other, both are told."""
    cdef Exchange x = d.x
    if x.route.unswitched is None or not offers_websocket(x.head):
        return
    x.add_answer_header(x.route.unswitched)
    d.engine.complain("a WebSocket handshake is passed on as a plain request", {
        "route": x.route.name, "reason": x.route.unswitched.decode("ascii").partition("; ")[2].rstrip(),
        "request_id": x.request_id[:36].decode("ascii")})


cdef bint take_place(Downstream d) except -1:
    """One of the route's places for tunnels, for as long as the exchange lasts. False: refused."""
    cdef Exchange x = d.x
    cdef Tunnels tunnels = x.route.tunnels
    if not d.engine.slot.enter_tunnel(tunnels.metric, tunnels.most):
        d.engine.slot.counters[C_TUNNELS_REFUSED] += 1
        x.refuse(503, b"too-many-tunnels", b"as many WebSockets as this route may have are open; this one was not asked for upstream")
        x.reply_headers = b"retry-after: 5\r\n"
        return False
    x.place = tunnels
    return True


cdef void give_place(Engine engine, Exchange x):
    """The exchange is over, and with it its tunnel if there was one."""
    if x.place is not None:
        engine.slot.leave_tunnel(x.place.metric)
        x.place = None
    if x.tunnel_from:
        engine.tunnels -= 1


cdef bytes accept_of(Exchange x):
    """What a server that read this handshake answers in Sec-WebSocket-Accept (RFC 6455 4.2.2)."""
    return b64encode(sha1(x.websocket_key[:24] + WEBSOCKET_GUID, usedforsecurity=False).digest())


cdef bint proves_switch(UpstreamConnection u, const Head* head) except -1:
    """Whether a 101 is the answer to our handshake: that protocol, that key, no body (RFC 6455 4.1, RFC 9110 15.2.2 and 8.6)."""
    cdef int protocol = only_field(head, b"upgrade", 7)
    cdef int proof = only_field(head, b"sec-websocket-accept", 20)
    cdef bytes wanted
    if protocol < 0 or proof < 0 or head.minor != 1 or not head.upgrade or head.chunked or head.content_length >= 0 or \
            u.out.end > u.out.start or head.fields[protocol].value_len != 9 or \
            not cw_equals_folded(head.base + head.fields[protocol].value, b"websocket", 9):
        return False
    wanted = accept_of(u.x)
    return head.fields[proof].value_len == 28 and memcmp(head.base + head.fields[proof].value, <const char*>wanted, 28) == 0


cdef int take_switch(UpstreamConnection u, int length) except -1:
    """101 came to a handshake. Always 0: nothing behind it is an answer."""
    cdef Exchange x = u.x
    cdef Head* head = u.engine.answer_head
    if not proves_switch(u, head):
        u.engine.slot.counters[C_UPSTREAM_BAD] += 1
        return u.fail(502, b"upstream-bad-answer", b"the upstream switched protocols without proving that it read this handshake")
    u.head_length = length
    u.judge(head)
    x.status = 101
    memset(&x.answer, 0, sizeof(Body))
    if x.answer_hook < len(x.route.response_hooks):
        u.hold(head)
        return 0
    return switch_protocols(u, head)


cdef int ask_tunnel(UpstreamConnection u, int n) except -1:
    """composed[0:n) is a handshake for a stream: it goes out when the server is known to take it, and does not end the stream. Always 0."""
    cdef Exchange x = u.x
    cdef Downstream d = <Downstream>x.connection
    if not u.link.h2.peer_settings:
        return u.link.settle(u)
    if not u.link.h2.peer_connects:
        u.record(OUTCOME_NONE, 0, 0)                # it serves what it offers: handshakes shall not take it away from other requests
        return u.fail(502, b"upstream-no-websocket", b"the upstream's HTTP/2 offers no WebSockets (SETTINGS_ENABLE_CONNECT_PROTOCOL); this one was not"
                      b" asked for")
    dress_stream(u, d)
    u.stream.connects = True
    u.reused = False                                # once it is out, no race with the server's end excuses a second one
    if u.put_message(u.engine.composed, n, False) < 0:
        if u.stream.id == 0:
            u.stream.reset = u.stream.refused = True            # no place on this connection any more: nothing of it went out
        return u.lost(ECONNRESET)
    x.upstream_from = cw_monotonic_us()
    u.sent_at = u.engine.now
    u.engine.slot.counters[C_UPSTREAM_BYTES_OUT] += n
    x.sent = True
    d.arm_head()
    return 0


cdef bint opens_tunnel(UpstreamConnection u, Head* head) except -1:
    """A final head came to a handshake. True when it opened the tunnel; any other answer goes on as one, and is the last of its connection."""
    cdef Exchange x = u.x
    if u.stream is None or head.status != 200:
        head.close = True
        if u.stream is not None:
            u.stream.connects = False
            u.stream.end()                          # nothing follows the CONNECT
        return False
    u.stream.expected = -1                          # a length means nothing here (RFC 9110 9.3.6)
    x.status = 101
    memset(&x.answer, 0, sizeof(Body))
    if x.answer_hook < len(x.route.response_hooks):
        u.hold(head)
    else:
        switch_protocols(u, head)
    return True


cdef int switch_protocols(UpstreamConnection u, Head* head) except -1:
    """The client gets its 101; what came along behind the two heads are the tunnel's first bytes. Always 0."""
    cdef Exchange x = u.x
    cdef Downstream d = <Downstream>x.connection
    cdef Engine engine = u.engine
    cdef int n = compose_switch(x, head, accept_of(x), engine.composed, HEAD_ROOM)
    cdef uint32_t early = d.inb.end - d.inb.start - x.body_at
    cdef uint32_t behind = u.inb.end - u.inb.start - <uint32_t>u.head_length
    cdef int result
    if n < 0:
        return u.fail(502, b"upstream-bad-answer", b"the upstream's answer head is too large")
    x.answer_started = True
    x.upstream_us = cw_monotonic_us() - x.upstream_from
    x.tunnel_from = cw_monotonic_us()
    x.total_at = 0                                  # that was for the handshake
    if x.place.expire and x.principal is not None and x.principal.expires - cw_wall_us() // 1000000 < EXPIRY_MAX:
        x.tunnel_until = engine.now + x.principal.expires * 1000000 - cw_wall_us()
    u.state = U_TUNNEL
    d.state = D_TUNNEL
    engine.tunnels += 1
    engine.slot.counters[C_TUNNELS] += 1
    leave_upstream(engine, x)                       # answered: no longer in flight
    result = d.put_message(engine.composed, n, False)
    engine.slot.counters[C_BYTES_OUT] += n
    if result == 0 and behind:
        result = d.put(u.inb.base + u.inb.start + u.head_length, behind)
        count_out(x, behind)
    if result < 0:
        return end_tunnel(d, SIDE_DOWNSTREAM, None, True)
    buffer_release(&u.inb)
    if early:                                       # the head before them stays where it is: the record reads it
        result = u.put(d.inb.base + d.inb.start + x.body_at, early)
        count_in(x, early)
        d.inb.end -= early
        if result < 0:
            return end_tunnel(d, SIDE_UPSTREAM, None, True)
    stir(d)
    return d.queue_up()


# -- bytes ------------------------------------------------------------------------------------------------------------

cdef inline void count_in(Exchange x, uint64_t n) noexcept:
    x.body.bytes += n
    x.slot.counters[C_TUNNEL_BYTES_IN] += n
    x.slot.counters[C_UPSTREAM_BYTES_OUT] += n


cdef inline void count_out(Exchange x, uint64_t n) noexcept:
    x.answer.bytes += n
    x.slot.counters[C_TUNNEL_BYTES_OUT] += n
    x.slot.counters[C_BYTES_OUT] += n


cdef void stir(Downstream d) noexcept:
    """Bytes moved: the time of silence begins anew."""
    cdef int64_t idle = d.x.place.idle_us
    if (d.finished or (<UpstreamConnection>d.x.upstream_connection).finished) and idle > HALF_CLOSED_US:
        idle = HALF_CLOSED_US
    idle += d.engine.now
    if d.x.tunnel_until and d.x.tunnel_until < idle:
        idle = d.x.tunnel_until
    d.engine.set_timer(d, T_TUNNEL, idle)


cdef int tunnel_events(Downstream d, Connection c, uint32_t events) except -1:
    """An event of one of the two sides."""
    if relay_events(c, events):
        stir(d)
    return pump_tunnel(d)


cdef int pump_tunnel(Downstream d) except -1:
    """Moves what is there, in turns, as far as both sides allow and this connection's share of the batch goes."""
    cdef Exchange x = d.x
    cdef UpstreamConnection u = <UpstreamConnection>x.upstream_connection
    cdef bint half = d.finished or u.finished
    cdef bint moved = False
    cdef ssize_t up, down
    cdef int piece
    for piece in range(PIECES):
        up = relay(d, u)
        if up < 0:
            return source_lost(d, d, u)
        down = relay(u, d)
        if down < 0:
            return source_lost(d, u, d)
        if up:
            if d.stream is None:                    # its link has counted them
                d.engine.slot.counters[C_BYTES_IN] += up
            count_in(x, up)
        if down:
            d.engine.slot.counters[C_UPSTREAM_BYTES_IN] += down
            count_out(x, down)
        if up == 0 and down == 0:
            # Of a stream there is no second event: who has ended already, or whose words are not taken, would be waited for.
            if d.stream is not None and d.stream.reset:
                return source_lost(d, d, u)
            if u.stream is not None and u.stream.reset:
                if not u.stream.ended:
                    return source_lost(d, u, d)
                u.shut_out = True                   # all that it has said is whole; it takes nothing more (RFC 9113 8.1)
                buffer_release(&u.out)
            break
        moved = True
    else:
        d.queue_up()
    pass_end(d, u)
    pass_end(u, d)
    if d.finished and u.finished and d.shut_out and u.shut_out and d.out.end == d.out.start and u.out.end == u.out.start:
        return end_tunnel(d, SIDE_DOWNSTREAM if d.broken_off else SIDE_UPSTREAM if u.broken_off else SIDE_NONE, None, False)
    if moved or half != (d.finished or u.finished):
        stir(d)
    return 0


cdef int source_lost(Downstream d, Connection source, Connection sink) except -1:
    """A side broke. That is a cut, unless the tunnel had ended already but for this side's last word."""
    if sink.finished and source.shut_out and not source.broken_off:
        return end_tunnel(d, SIDE_NONE, None, False)
    return end_tunnel(d, SIDE_DOWNSTREAM if source is d else SIDE_UPSTREAM, None, True)


# -- the end ----------------------------------------------------------------------------------------------------------

cdef int tunnel_silent(Downstream d) except -1:
    """No byte passed for too long, or the token is over. What a side has not taken by now it will not take: then it is no orderly end."""
    cdef UpstreamConnection u = <UpstreamConnection>d.x.upstream_connection
    cdef bint expired = d.x.tunnel_until and d.engine.now >= d.x.tunnel_until
    d.engine.slot.counters[C_TUNNELS_EXPIRED if expired else C_TUNNELS_IDLE] += 1
    return end_tunnel(d, SIDE_NONE, b"tunnel-expired" if expired else b"tunnel-idle", d.out.end > d.out.start or u.out.end > u.out.start)


cdef void cut_tunnel(Downstream d):
    """Our doing: the end of a drain, or an error of ours."""
    d.engine.slot.counters[C_TUNNELS_CUT] += 1
    end_tunnel(d, SIDE_GATEWAY, b"tunnel-cut", True)


cdef int end_tunnel(Downstream d, uint8_t side, bytes slug, bint cut) except -1:
    """Closes both sides, with `cut` by resets, and records the exchange."""
    cdef Exchange x = d.x
    cdef UpstreamConnection u = <UpstreamConnection>x.upstream_connection
    x.side = side
    x.slug = slug
    if side == SIDE_DOWNSTREAM:
        d.engine.slot.counters[C_CLIENT_ABORTS] += 1
    elif side == SIDE_UPSTREAM:
        d.engine.slot.counters[C_UPSTREAM_RESETS] += 1
    if cut:
        u.cut_short()
        d.cut_short()
    elif slug is not None:
        u.shut()                                    # TLS says its end; without it the socket's would be a truncation
    u.detach()
    u.close()
    d.finish_exchange()
    d.close()
    return 0
