# What comes before the first request of a connection: the PROXY header and the TLS handshake (included by engine.pyx).
#
# Strategy: one step per event, and a few per batch of events, since a signature takes up to a millisecond. Behind it the connection is like any
# other; what failed is told to the client as far as the client can understand it, and to the log as far as it is no flood.

cdef bytes plain_on_tls():
    body = b'{"type":"about:blank","title":"Bad Request","status":400,"detail":"this port speaks TLS: use https"}'
    head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    return head % len(body) + body

cdef bytes PLAIN_ON_TLS = plain_on_tls()


cdef int secure_client(Downstream client, uint32_t events) except -1:
    """The handshake, as far as it goes now; behind it the connection is like any other."""
    cdef Engine engine = client.engine
    cdef int result
    if events & (EPOLLERR | EPOLLHUP):
        client.close()
        return 0
    if events & EPOLLRDHUP:
        client.ended = True
    if events & (EPOLLIN | EPOLLRDHUP):
        client.wake()
    if not client.readable and client.tls is None:
        return 0                                # connected, and nothing said yet
    if client.proxied and peek_proxy_header(client) <= 0:
        return 0
    if engine.handshake_turns == 0:
        return client.queue_up()
    engine.handshake_turns -= 1
    if client.tls is None:
        client.tls = client.listener.tls.accept(client.fd)
        client.tls.wake(client.ended)
    result = client.tls.handshake()
    if result == 0:
        return 0
    engine.handshaking.pop(client, None)
    if result < 0:
        return handshake_failed(client)
    engine.slot.counters[C_TLS_HANDSHAKES] += 1
    if client.tls.resumed:
        engine.slot.counters[C_TLS_RESUMED] += 1
    if client_fallen(client):
        client.state = D_IDLE
        client.cut_short()
        client.close()
        return 0
    client.state = D_IDLE
    client.outer = client.tls
    if client.tls.alpn == ALPN_HTTP2:
        return become_link(client)
    client.readable = True                        # the first request may have come along
    engine.set_timer(client, T_KEEPALIVE, engine.now + client.listener.head_us)
    client.advance()
    if client.tls is not None and client.x is None:
        client.tls.push()                         # no answer is on its way that would take the tickets along
    return 0


cdef bint client_fallen(Downstream client) except -1:
    """Whether who has proved who he is was shut out while he did: the handshake began under another deny list."""
    cdef ListenerEntry now = client.engine.snapshot.listeners.get(client.listener_name)
    return client.tls.certificate is not None and now is not None and now is not client.listener and now.tls is not None and \
        now.tls.admit is not None and now.tls.admit(client.tls.certificate.leaf) is not None


cdef int handshake_failed(Downstream client) except -1:
    """A log line, and an end that lets the alert arrive; who spoke HTTP in clear text is told so."""
    cdef Tls failed = client.tls
    client.tls = None
    if failed.failure == FAILED_VISITOR:
        client.leave()
        return client.linger()
    client.engine.slot.counters[C_TLS_FAILED] += 1
    client.engine.complain("a client's TLS handshake failed", {
        "listener": client.listener_name, "client": client.text[:client.text_len].decode("ascii"),
        "reason": "an HTTP request in clear text" if failed.failure == FAILED_PLAIN else failed.reason})
    if failed.failure == FAILED_GONE:
        client.state = D_IDLE
        client.close()
        return 0
    if failed.failure == FAILED_PLAIN:
        cw_send(client.fd, <const char*>PLAIN_ON_TLS, len(PLAIN_ON_TLS))
    client.leave()
    return client.linger()                        # the client's end may be here already: no event would tell it again


cdef int peek_proxy_header(Downstream client) except -2:
    """take_proxy_header() for a connection whose next byte is TLS: what is behind the header stays in the kernel."""
    cdef sockaddr_storage address
    cdef int kind = 0, result
    cdef ssize_t n = cw_peek(client.fd, client.engine.scratch, SCRATCH)
    if n == -EAGAIN:
        client.readable = False
        return 0
    result = parse_proxy_header(client.engine.scratch, <uint32_t>n, &address, &kind) if n > 0 else -1
    if result == 0 and not client.ended:
        client.readable = False
        return 0
    client.proxied = False
    if result > 0:
        cw_recv(client.fd, client.engine.scratch, result)
        if kind == 1:
            take_address(client, &address)
        return 1
    if n > 0 and result < 0 and client.listener.proxy_protocol == 1 and kind == 0:
        return 1
    client.engine.slot.counters[C_BAD_REQUESTS] += 1
    client.close()
    return -1


cdef void take_address(Downstream client, sockaddr_storage* address):
    """The client's address, as a PROXY header says it."""
    cdef uint16_t port = 0
    client.text_len = cw_address_text(address, client.text, sizeof(client.text), &port)
    cw_address_bytes(address, client.address)
    client.peer_trusted = client.listener.trusted.contains(client.address)


cdef int take_proxy_header(Downstream client) except -2:
    """PROXY protocol v1/v2. 1 taken (or absent where optional), 0 more bytes needed, -1 refused and closed."""
    cdef sockaddr_storage address
    cdef int kind = 0
    cdef int result = parse_proxy_header(client.inb.base + client.inb.start, client.inb.end - client.inb.start, &address, &kind)
    if result == 0:
        return 0
    client.proxied = False
    if result < 0:
        if client.listener.proxy_protocol == 1 and kind == 0:
            return 1
        client.engine.slot.counters[C_BAD_REQUESTS] += 1
        client.engine.notices.no_proxy_header(client.listener_name, client.engine.now, client.text, client.text_len)
        client.close()
        return -1
    buffer_consume(&client.inb, <uint32_t>result)
    if kind == 1:                               # an address; LOCAL and UNKNOWN keep the connection's own
        take_address(client, &address)
    return 1 if client.inb.end > client.inb.start else 0
