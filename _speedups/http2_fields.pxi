# The fields of a head as HTTP/2 has them, and the text that becomes of them (included by http2.pyx).
#
# Strategy: each decoded field is checked by the rules of RFC 9113 section 8 before a byte of it is written; what is written are lines of HTTP/1.1.
# Python is called from here: never.

cdef inline bint is_name(const uint8_t* name, size_t n, const char* text, size_t size) noexcept nogil:
    return n == size and memcmp(name, text, size) == 0


cdef bint sound_name(const uint8_t* name, size_t n) noexcept nogil:
    """A token in lower case (RFC 9113 8.2.1)."""
    cdef size_t i
    for i in range(n):
        if (cw_class[name[i]] & (CW_TOKEN | CW_UPPER)) != CW_TOKEN:
            return False
    return n > 0


cdef bint sound_value(const uint8_t* value, size_t n) noexcept nogil:
    """No control bytes, and no space around it."""
    if n and (value[0] == 32 or value[0] == 9 or value[n - 1] == 32 or value[n - 1] == 9):
        return False
    return cw_span_value(<const char*>value, n) == n


cdef bint printable(const uint8_t* p, size_t n) noexcept nogil:
    """Visible ASCII alone: what may stand in a request line."""
    cdef size_t i
    for i in range(n):
        if p[i] <= 32 or p[i] >= 127:
            return False
    return n > 0


cdef bint of_connection(const uint8_t* name, size_t n) noexcept nogil:
    """Fields that speak of an HTTP/1.1 connection (RFC 9113 8.2.2)."""
    return is_name(name, n, b"connection", 10) or is_name(name, n, b"transfer-encoding", 17) or is_name(name, n, b"keep-alive", 10) or \
        is_name(name, n, b"upgrade", 7) or is_name(name, n, b"proxy-connection", 16)


cdef int put_field(Buffer* text, const char* name, size_t n, const char* value, size_t size) noexcept nogil:
    """A line of a head."""
    cdef char* at
    if buffer_reserve(text, <uint32_t>(n + size) + 4) < 0:
        return -1
    at = text.base + text.end
    memcpy(at, name, n)
    at[n] = 58
    at[n + 1] = 32
    memcpy(at + n + 2, value, size)
    at[n + 2 + size] = 13
    at[n + 3 + size] = 10
    text.end += <uint32_t>(n + size) + 4
    return 0


cdef enum:                      # pseudo-headers
    P_METHOD = 0
    P_SCHEME
    P_PATH
    P_AUTHORITY
    P_PROTOCOL
    P_STATUS
    P_COUNT

cdef struct Block:
    int what
    Buffer* text
    Buffer* pseudo
    Buffer* cookie
    uint32_t limit
    uint32_t at[6]              # of the pseudo-headers' values in `pseudo`
    uint32_t length[6]
    bint seen[6]
    bint malformed
    bint too_long               # the text is cut at its limit
    bint started                # the text's first line is written
    bint trailing
    bint connects
    bint host                   # a Host field came
    bint open                   # the message does not end with this block
    bint grpc
    int status
    int64_t expected


cdef void take_field(Block* b, const uint8_t* name, size_t n, const uint8_t* value, size_t size) noexcept nogil:
    """One decoded field: checked, then written."""
    if n and name[0] == 58:
        take_pseudo(b, name, n, value, size)
        return
    if not sound_name(name, n) or not sound_value(value, size) or of_connection(name, n):
        b.malformed = True
        return
    if b.what == TRAILERS and no_trailer(<const char*>name, n):
        return
    if not b.started and b.what != TRAILERS:
        start_text(b)
        if b.malformed:
            return
    if n == 2 and name[0] == 116 and name[1] == 101:
        if not is_name(value, size, b"trailers", 8) or b.what != REQUEST:
            b.malformed = True
        b.trailing = True
        return
    if is_name(name, n, b"content-length", 14):
        if b.expected >= 0 or b.what == TRAILERS:
            b.malformed = True
            return
        b.expected = cw_decimal(<const char*>value, size)
        if b.expected < 0:
            b.malformed = True
            return
        if b.expected == 0 and b.open and b.status != 204 and b.status != 304:
            return                                  # its end comes by itself: in HTTP/1.1 it would be complete with its head
    elif is_name(name, n, b"host", 4):
        if b.what != REQUEST:
            b.malformed = b.malformed or b.what == TRAILERS
            return
        if b.seen[P_AUTHORITY]:
            # One of the two would be believed here, the other there.
            if size != b.length[P_AUTHORITY] or not same_folded(<const char*>value, b.pseudo.base + b.at[P_AUTHORITY], size):
                b.malformed = True
            return
        b.host = True
    elif b.what == REQUEST and is_name(name, n, b"content-type", 12):
        b.grpc = is_grpc_type(<const char*>value, <uint32_t>size)
    elif b.what == REQUEST and is_name(name, n, b"cookie", 6):
        if b.cookie.end - b.cookie.start + size + 2 > b.limit:
            b.too_long = True
            return
        if b.cookie.end > b.cookie.start:
            buffer_append(b.cookie, b"; ", 2)       # RFC 9113 8.2.3
        if buffer_append(b.cookie, <const char*>value, <uint32_t>size) < 0:
            b.malformed = True
        return
    put_bounded(b, name, n, value, size)


cdef bint no_trailer(const char* name, size_t n) noexcept nogil:
    """What must not come behind a body (RFC 9110 6.5.1): who puts trailers among the fields would believe it. Dropped.

    Fields of framing are malformed; that is seen before, or after.
    """
    cdef uint8_t id = field_id(name, n)
    return id == F_AUTHORIZATION or id == F_COOKIE or id == F_EXPECT or id == F_TRAILER or id == F_ORIGIN or id == F_X_API_KEY or \
        id == F_IDEMPOTENCY_KEY or id == F_X_REQUEST_ID or id == F_TRACEPARENT or id == F_CONTENT_TYPE or id == F_CONTENT_ENCODING or \
        field_is_identity(name, n)


cdef void put_bounded(Block* b, const uint8_t* name, size_t n, const uint8_t* value, size_t size) noexcept nogil:
    if b.too_long or b.text.end - b.text.start + n + size + 4 > b.limit:
        b.too_long = True
        return
    if put_field(b.text, <const char*>name, n, <const char*>value, size) < 0:
        b.malformed = True


cdef bint same_folded(const char* a, const char* b, size_t n) noexcept nogil:
    cdef size_t i
    for i in range(n):
        if (a[i] | 32 if 65 <= a[i] <= 90 else a[i]) != (b[i] | 32 if 65 <= b[i] <= 90 else b[i]):
            return False
    return True


cdef void take_pseudo(Block* b, const uint8_t* name, size_t n, const uint8_t* value, size_t size) noexcept nogil:
    cdef int which = P_COUNT
    if b.what == REQUEST:
        if is_name(name, n, b":method", 7):
            which = P_METHOD
        elif is_name(name, n, b":path", 5):
            which = P_PATH
        elif is_name(name, n, b":scheme", 7):
            which = P_SCHEME
        elif is_name(name, n, b":authority", 10):
            which = P_AUTHORITY
        elif is_name(name, n, b":protocol", 9):
            which = P_PROTOCOL
    elif b.what == ANSWER and is_name(name, n, b":status", 7):
        which = P_STATUS
    # Unknown, twice, behind a field, or with bytes that could end the line.
    if which == P_COUNT or b.seen[which] or b.started or not printable(value, size):
        b.malformed = True
        return
    b.seen[which] = True
    b.at[which] = b.pseudo.end - b.pseudo.start
    b.length[which] = <uint32_t>size
    if b.pseudo.end - b.pseudo.start + size > 2 * b.limit:
        b.too_long = True
        b.length[which] = 0
        return
    if buffer_append(b.pseudo, <const char*>value, <uint32_t>size) < 0:
        b.malformed = True


cdef void start_text(Block* b) noexcept nogil:
    """The first line, from the pseudo-headers."""
    b.started = True
    if b.what == ANSWER:
        start_answer(b)
    else:
        start_request(b)


cdef inline const char* pseudo_at(Block* b, int which) noexcept nogil:
    return b.pseudo.base + b.pseudo.start + b.at[which]


cdef void start_answer(Block* b) noexcept nogil:
    cdef const char* status
    cdef const char* reason
    if not b.seen[P_STATUS] or b.length[P_STATUS] != 3:
        b.malformed = True
        return
    status = pseudo_at(b, P_STATUS)
    b.status = <int>cw_decimal(status, 3)
    reason = cw_reason(b.status)                    # HTTP/2 has none
    if b.status < 100 or b.status == 101 or buffer_append(b.text, b"HTTP/1.1 ", 9) < 0 or buffer_append(b.text, status, 3) < 0 or \
            buffer_append(b.text, b" ", 1) < 0 or buffer_append(b.text, reason, <uint32_t>strlen(reason)) < 0 or \
            buffer_append(b.text, b"\r\n", 2) < 0:
        b.malformed = True


cdef void start_request(Block* b) noexcept nogil:
    cdef const char* path = NULL
    cdef const char* scheme
    cdef const char* authority
    cdef const char* method
    cdef uint32_t i
    if not b.seen[P_METHOD]:
        b.malformed = True
        return
    method = pseudo_at(b, P_METHOD)
    if b.length[P_METHOD] == 7 and memcmp(method, b"CONNECT", 7) == 0 and not b.seen[P_PROTOCOL]:
        if b.seen[P_PATH] or b.seen[P_SCHEME] or not b.seen[P_AUTHORITY]:
            b.malformed = True
            return
        path = pseudo_at(b, P_AUTHORITY)            # RFC 9113 8.5: the parser says that it is not offered
        put_line(b, method, 7, path, b.length[P_AUTHORITY])
        return
    if not b.seen[P_PATH] or not b.seen[P_SCHEME]:
        b.malformed = True
        return
    if b.too_long:
        put_line(b, method, b.length[P_METHOD], b"/", 1)
        return
    path = pseudo_at(b, P_PATH)
    scheme = pseudo_at(b, P_SCHEME)
    if not ((b.length[P_SCHEME] == 5 and cw_equals_folded(scheme, b"https", 5)) or
            (b.length[P_SCHEME] == 4 and cw_equals_folded(scheme, b"http", 4))):
        b.malformed = True
        return
    if path[0] != 47 and not (b.length[P_PATH] == 1 and path[0] == 42 and b.length[P_METHOD] == 7 and memcmp(method, b"OPTIONS", 7) == 0):
        b.malformed = True
        return
    for i in range(b.length[P_PATH]):
        if path[i] == 35:
            b.malformed = True
            return
    for i in range(b.length[P_METHOD]):
        if not cw_class[<uint8_t>method[i]] & CW_TOKEN:
            b.malformed = True
            return
    if b.seen[P_PROTOCOL]:
        if b.length[P_METHOD] != 7 or memcmp(method, b"CONNECT", 7) != 0 or not b.seen[P_AUTHORITY]:
            b.malformed = True
            return
        if b.length[P_PROTOCOL] == 9 and memcmp(pseudo_at(b, P_PROTOCOL), b"websocket", 9) == 0:
            b.connects = True
            put_line(b, b"GET", 3, path, b.length[P_PATH])
        else:
            put_line(b, method, 7, pseudo_at(b, P_AUTHORITY), b.length[P_AUTHORITY])
    else:
        put_line(b, method, b.length[P_METHOD], path, b.length[P_PATH])
    if b.seen[P_AUTHORITY]:
        authority = pseudo_at(b, P_AUTHORITY)
        for i in range(b.length[P_AUTHORITY]):
            if authority[i] == 64:                  # userinfo (RFC 9113 8.3.1)
                b.malformed = True
                return
        if put_field(b.text, b"host", 4, authority, b.length[P_AUTHORITY]) < 0:
            b.malformed = True


cdef void put_line(Block* b, const char* method, uint32_t n, const char* target, uint32_t size) noexcept nogil:
    if buffer_append(b.text, method, n) < 0 or buffer_append(b.text, b" ", 1) < 0 or buffer_append(b.text, target, size) < 0 or \
            buffer_append(b.text, b" HTTP/1.1\r\n", 11) < 0:
        b.malformed = True


cdef void finish_block(Block* b) noexcept nogil:
    """All fields are here."""
    if b.what == TRAILERS:
        return
    if not b.started:
        start_text(b)
    if b.malformed:
        return
    if b.cookie.end > b.cookie.start:
        put_bounded(b, <const uint8_t*>b"cookie", 6, <const uint8_t*>(b.cookie.base + b.cookie.start), b.cookie.end - b.cookie.start)
    if buffer_append(b.text, b"\r\n", 2) < 0:
        b.malformed = True
