# A request's head: from its first byte to its route (included by engine.pyx).
#
# Strategy: bytes are read into the connection's buffer and stay there; the parser leaves offsets. Who the client is, and what this request is called,
# is settled before the route is, so that a refusal of any kind has its record.

cdef int read_head(Downstream client) except -1:
    """1 when a request was taken up or the connection ended, 0 when bytes are missing."""
    cdef int result
    cdef uint32_t room
    cdef ssize_t n
    while True:
        if client.inb.end > client.inb.start:
            result = parse_head(client)
            if result:
                return result
        if not client.readable:
            break
        if buffer_reserve(&client.inb, 2048) < 0:
            client.close()
            return 1
        room = client.inb.cap - client.inb.end
        n = client.recv(client.inb.base + client.inb.end, room)
        if n > 0:
            client.inb.end += <uint32_t>n
            client.engine.slot.counters[C_BYTES_IN] += n
            if client.drained(n, room):
                client.readable = False
        elif n == -EAGAIN:
            client.readable = False
        else:
            if client.state == D_HEAD:
                client.engine.slot.counters[C_CLIENT_ABORTS] += 1
            client.close()
            return 1
    if client.inb.end == client.inb.start:
        buffer_release(&client.inb)
    return 0


cdef int parse_head(Downstream client) except -1:
    """1 when the head is complete or refused, 0 when bytes are missing."""
    cdef Exchange x
    cdef int result
    if client.proxied:
        result = take_proxy_header(client)
        if result <= 0:
            return -result
    if client.x is None and client.requests == 0 and client.listener.http2 is not None and client.listener.http2.clear and client.tls is None:
        result = speaks_http2(&client.inb)
        if result:
            return become_link(client) if result > 0 else 0
    if client.x is None:
        # RFC 9112 2.2: an empty line or two before a request line is passed over.
        while client.inb.end - client.inb.start >= 2 and client.blanks < 2 and \
                client.inb.base[client.inb.start] == 13 and client.inb.base[client.inb.start + 1] == 10:
            client.inb.start += 2
            client.blanks += 1
        if client.inb.start == client.inb.end or (client.inb.end - client.inb.start == 1 and client.inb.base[client.inb.start] == 13
                                              and client.blanks < 2):
            return 0
        begin_unparsed(client)
        client.arm(T_HEAD, client.listener.head_us)
    x = client.x
    result = parse_request(client.inb.base + client.inb.start, client.inb.end - client.inb.start, x.head, &client.listener.limits)
    if result > 0:
        begin_request(client, result)
        return 1
    if result < 0:
        parse_failed(client, -result)
        return 1
    return 0


cdef void begin_unparsed(Downstream client):
    """Takes an exchange for a request of which bytes are here."""
    cdef Exchange x
    if client.version != client.engine.snapshot.version:
        client.listener = client.engine.snapshot.listeners.get(client.listener_name, client.listener)
        client.version = client.engine.snapshot.version
    if client.x is None:
        x = client.engine.take_exchange()
        x.connection = client
        client.x = x
    client.blanks = 0
    client.state = D_HEAD


cdef int parse_failed(Downstream client, int error) except -1:
    cdef Exchange x = client.x
    client.engine.slot.counters[C_BAD_REQUESTS] += 1
    x.head.count = 0                            # what was parsed of it is not to be trusted
    x.grpc = client.stream is not None and client.stream.grpc
    x.head.minor = 1
    x.side = SIDE_DOWNSTREAM
    return client.refuse(error_status(error), <bytes>error_slug(error), <bytes>error_detail(error))


cdef int begin_request(Downstream client, int length) except -1:
    """A complete head: framing, identity, route; then its steps."""
    cdef Exchange x = client.x
    cdef Head* head = x.head
    cdef Engine engine = client.engine
    cdef int result
    head.base = client.inb.base + client.inb.start
    x.body_at = length
    x.started = engine.now = cw_monotonic_us()
    x.wall = x.started + engine.wall_ahead
    client.state = D_ACTIVE
    client.requests += 1
    x.snapshot = engine.snapshot
    x.listener = client.listener
    engine.slot.counters[C_REQUESTS] += 1
    x.keep_alive = (not head.close if head.minor else head.keep_alive and not head.close) and \
        client.requests < client.listener.requests_max and not engine.draining and not client.listener.leaving
    if head.chunked:
        x.body.mode = x.body.out = BODY_CHUNKED
    elif head.content_length >= 0:
        x.body.mode = x.body.out = BODY_LENGTH
        x.body.remaining = head.content_length
        x.body.done = head.content_length == 0
    else:
        x.body.done = True
    if client.stream is not None:
        x.keep_alive = True
        x.http2 = True
        x.grpc = is_grpc(head)
        if head.content_length < 0 and not client.stream.connects and not client.stream.ended:
            x.body.mode = BODY_CLOSE            # until the stream ends
            x.body.out = BODY_CHUNKED
            x.body.done = False
    identify(client)
    if head.path_plain or head.path_len == 0:
        x.path_len = head.path_len if head.path_len else 1
    else:
        x.path_copy = <char*>malloc(head.path_len)
        if x.path_copy == NULL:
            raise MemoryError
        result = normalise_path(head.base + head.path_at, head.path_len, x.path_copy)
        if result < 0:
            engine.slot.counters[C_BAD_REQUESTS] += 1
            x.keep_alive = False
            x.side = SIDE_DOWNSTREAM
            return client.refuse(400, <bytes>error_slug(-result), <bytes>error_detail(-result))
        x.path_len = result
    return find_route(client)


cdef int find_route(Downstream client) except -1:
    cdef Exchange x = client.x
    cdef Head* head = x.head
    cdef const char* host = head.base + head.host_at
    cdef uint32_t n = head.host_len
    cdef int result
    # Host was validated: at most one colon outside brackets.
    if n and host[0] == 91:
        n = <uint32_t>(<const char*>memchr(host, 93, n) - host) + 1
    elif n and memchr(host, 58, n) != NULL:
        n = <uint32_t>(<const char*>memchr(host, 58, n) - host)
    x.host_len = n
    result = client.listener.trie.match(head, host, n, x.path(), x.path_len, &x.match)
    if head.method == M_OPTIONS and head.first[F_ACR_METHOD] >= 0 and head.first[F_ORIGIN] >= 0 and \
            (result != 1 or (<RouteEntry>x.match.route).cors is None) and answer_preflight(client, host, n):
        return client.reply()
    if result == 1:
        x.route = <RouteEntry>x.match.route
    elif result == 0:
        return client.refuse(404, b"no-route", b"no route matches this host and path")
    else:
        x.refuse(405, b"method-not-allowed", b"the resource does not offer this method")
        x.reply_headers = b"allow: " + client.listener.trie.allow(&x.match) + b"\r\n"
        return client.reply()
    if x.route.grpc_web:
        take_web(x)
    if x.body.mode == BODY_LENGTH and x.body.remaining > x.body_limit():
        return client.refuse(413, b"body-too-large", b"the request body is larger than the limit")
    if x.route.total_us:
        x.total_at = client.engine.now + x.route.total_us
    if (x.grpc or x.web is not None) and head.first[F_GRPC_TIMEOUT] >= 0 and limit_grpc(client):
        return 0
    if head.upgrade:
        if x.route.tunnels is None:
            pass_plain(client)
        elif not take_handshake(x):
            return client.reply()
    if client.stream is not None and client.stream.connects and not x.upgrade:
        x.side = SIDE_DOWNSTREAM
        return client.refuse(501, b"no-tunnel", b"no WebSockets are offered here")
    return client.run_steps()


cdef int limit_grpc(Downstream client) except -1:
    """The client's own deadline, when it is the shorter one. 1 when it is no time at all: answered."""
    cdef int64_t us = grpc_timeout(client.x.head)
    if us == -2:
        client.x.side = SIDE_DOWNSTREAM
        client.refuse(400, b"bad-deadline", b"grpc-timeout is not up to eight digits and one of H M S m u n")
        return 1
    if client.x.total_at == 0 or client.x.started + us < client.x.total_at:
        client.x.total_at = client.x.started + us
    return 0


cdef bint answer_preflight(Downstream client, const char* host, uint32_t n) except -1:
    """A CORS preflight (Fetch 4.8) is answered by the route that the method to come would reach."""
    cdef Exchange x = client.x
    cdef Head* head = x.head
    cdef Field* wanted = &head.fields[head.first[F_ACR_METHOD]]
    cdef uint32_t at = head.method_at, length = head.method_len
    cdef Match match
    cdef int result
    head.method_at = wanted.value
    head.method_len = wanted.value_len
    head.method = method_id(head.base + wanted.value, wanted.value_len)
    result = client.listener.trie.match(head, host, n, x.path(), x.path_len, &match)
    head.method_at = at
    head.method_len = length
    head.method = M_OPTIONS
    if result != 1 or (<RouteEntry>match.route).cors is None:
        return False
    x.match = match
    x.route = <RouteEntry>match.route
    return (<Step>x.route.cors).run(x) == STEP_ANSWERED


cdef int identify(Downstream client) except -1:
    """The client's address, the request id and the trace."""
    cdef Exchange x = client.x
    cdef Head* head = x.head
    cdef int i
    x.trusted = client.peer_trusted
    x.secure = client.outer is not None
    if x.secure:
        x.certificate = client.outer.certificate
    memcpy(x.client, client.address, 16)
    memcpy(x.client_text, client.text, 48)
    x.client_len = client.text_len
    x.peer_text = client.text
    x.peer_len = client.text_len
    if x.trusted and head.first[F_X_FORWARDED_FOR] >= 0:
        forwarded_client(client)
    i = head.first[F_X_REQUEST_ID]
    if i >= 0 and valid_request_id(head.base + head.fields[i].value, head.fields[i].value_len):
        memcpy(x.request_id, head.base + head.fields[i].value, 36)
    else:
        make_request_id(x.request_id, x.wall)
    i = head.first[F_TRACEPARENT]
    if x.trusted and i >= 0 and valid_trace(head.base + head.fields[i].value, head.fields[i].value_len):
        continue_trace(x.trace, head.base + head.fields[i].value)
    else:
        make_trace(x.trace)
    return 0


cdef int forwarded_client(Downstream client) except -1:
    """The rightmost address of X-Forwarded-For that no trusted proxy has: what stands left of it is hearsay."""
    cdef Exchange x = client.x
    cdef Head* head = x.head
    cdef int i = head.count
    cdef uint32_t start, end
    cdef const char* p
    cdef char text[48]
    cdef sockaddr_storage address
    cdef socklen_t length = 0
    cdef uint16_t port = 0
    while i > 0:
        i -= 1
        if head.fields[i].id != F_X_FORWARDED_FOR:
            continue
        p = head.base + head.fields[i].value
        end = head.fields[i].value_len
        while end > 0:
            start = end
            while start > 0 and p[start - 1] != 44:
                start -= 1
            while end > start and (p[end - 1] == 32 or p[end - 1] == 9):
                end -= 1
            length = start
            while length < end and (p[length] == 32 or p[length] == 9):
                length += 1
            if end - length == 0 or end - length >= sizeof(text):
                return 0
            memcpy(text, p + length, end - length)
            text[end - length] = 0
            if not cw_parse_address(text, 0, &address, &length):
                return 0
            cw_address_bytes(&address, x.client)
            x.client_len = cw_address_text(&address, x.client_text, sizeof(x.client_text), &port)
            if not client.listener.trusted.contains(x.client):
                return 0
            end = start - 1 if start else 0
    return 0
