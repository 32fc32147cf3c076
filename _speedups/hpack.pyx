"""HPACK encoding; see hpack.pxd.

Strategy: one pass over the text, line by line. Names of up to LOOKED_UP bytes are made lower case eight bytes at a time and looked
up in a small hash table made at import.
Python is called from here: at import.

Safety: every write is preceded by a look at the room there is, and a reservation when a line's length and MARGIN bytes do not fit: a
line of n bytes makes at most n bytes of name and value and 13 of representation, index and two lengths; the copy of a name, of
which a constant size is written, ends at most 2 + LOOKED_UP bytes behind the line's begin. Reads end at a line end found inside
text[0:n); a name is read by words only where LOOKED_UP bytes of the text are left.
"""

from libc.stdint cimport int8_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy, memset
from gateway._speedups.buffers cimport Buffer, buffer_reserve
from gateway._speedups.wire cimport cw_decimal, cw_lower

cdef enum:
    LOOKED_UP = 32
    SLOTS = 256
    MARGIN = 64
    LEFT_OUT = 255              # in place of an index: HTTP/1.1 alone knows this field (RFC 9113 8.2.2)
    NO_INDEX = 0x00             # literal without indexing (RFC 7541 6.2.2)
    NEVER_INDEX = 0x10          # (6.2.3) a secret: nobody on the way may keep it in a table

cdef struct Name:
    uint8_t length              # 0: the slot is free
    uint8_t index
    uint8_t secret
    char text[LOOKED_UP]

cdef Name names[SLOTS]

# RFC 7541 appendix A, each name's first index, without the pseudo-headers.
cdef dict STATIC = {
    b"accept-charset": 15, b"accept-encoding": 16, b"accept-language": 17, b"accept-ranges": 18, b"accept": 19,
    b"access-control-allow-origin": 20, b"age": 21, b"allow": 22, b"authorization": 23, b"cache-control": 24,
    b"content-disposition": 25, b"content-encoding": 26, b"content-language": 27, b"content-length": 28, b"content-location": 29,
    b"content-range": 30, b"content-type": 31, b"cookie": 32, b"date": 33, b"etag": 34, b"expect": 35, b"expires": 36, b"from": 37,
    b"if-match": 39, b"if-modified-since": 40, b"if-none-match": 41, b"if-range": 42, b"if-unmodified-since": 43,
    b"last-modified": 44, b"link": 45, b"location": 46, b"max-forwards": 47, b"proxy-authenticate": 48, b"proxy-authorization": 49,
    b"range": 50, b"referer": 51, b"refresh": 52, b"retry-after": 53, b"server": 54, b"set-cookie": 55,
    b"strict-transport-security": 56, b"user-agent": 58, b"vary": 59, b"via": 60, b"www-authenticate": 61,
}
cdef tuple HTTP1_ONLY = (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade", b"http2-settings", b"host", b"te",
              b"sec-websocket-accept")
cdef tuple SECRET = (b"authorization", b"proxy-authorization", b"cookie", b"set-cookie", b"x-api-key", b"client-cert")


cdef inline uint32_t slot_of(const char* lower, uint32_t n) noexcept nogil:
    return (n * 37 + <uint8_t>lower[0] * 5 + <uint8_t>lower[n - 1] * 11 + <uint8_t>lower[n >> 1]) & (SLOTS - 1)


cdef void enter(bytes lower, int index, bint secret):
    cdef uint32_t at = slot_of(lower, <uint32_t>len(lower))
    while names[at].length:
        at = (at + 1) & (SLOTS - 1)
    names[at].length = <uint8_t>len(lower)
    names[at].index = <uint8_t>index
    names[at].secret = secret
    memcpy(names[at].text, <const char*>lower, len(lower))


for _name, _index in STATIC.items():
    enter(_name, _index, _name in SECRET)
for _name in HTTP1_ONLY:
    enter(_name, LEFT_OUT, False)
for _name in SECRET:
    if _name not in STATIC:
        enter(_name, 0, True)


cdef inline const Name* look_up(const char* lower, uint32_t n) noexcept nogil:
    cdef uint32_t at = slot_of(lower, n)
    while names[at].length:
        if names[at].length == n and memcmp(names[at].text, lower, n) == 0:
            return &names[at]
        at = (at + 1) & (SLOTS - 1)
    return NULL


cdef inline char* put_number(char* at, uint8_t first, uint8_t most, uint32_t value) noexcept nogil:
    """An integer behind the bits of `first`, `most` being the largest that fits beside them (RFC 7541 5.1)."""
    if value < most:
        at[0] = <char>(first | value)
        return at + 1
    at[0] = <char>(first | most)
    value -= most
    at += 1
    while value >= 128:
        at[0] = <char>(128 | (value & 127))
        value >>= 7
        at += 1
    at[0] = <char>value
    return at + 1


cdef inline char* put_text(char* at, const char* p, uint32_t n) noexcept nogil:
    at = put_number(at, 0, 127, n)
    memcpy(at, p, n)
    return at + n


cdef extern from *:
    """
    static const uint64_t CW_ONES = 0x0101010101010101ULL, CW_TOPS = 0x8080808080808080ULL;
    /* Eight bytes with A to Z in lower case: of each byte below 0x80, bit 7 of the first sum says `at least A`, of the second `above Z`. */
    static inline uint64_t cw_lower_word(uint64_t v) {
        uint64_t low = v & ~CW_TOPS;
        return v | (((low + 0x3f * CW_ONES) & ~(low + 0x25 * CW_ONES) & ~v & CW_TOPS) >> 2);
    }
    /* Where the first colon among the eight bytes is, in the order of memory; 8 without one. Borrows run upwards alone, so that the lowest is right. */
    static inline uint32_t cw_colon_in(uint64_t v) {
        uint64_t d = v ^ 0x3a * CW_ONES;
        d = (d - CW_ONES) & ~d & CW_TOPS;
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        return d ? (uint32_t)__builtin_ctzll(d) >> 3 : 8;
    #else
        for (uint32_t i = 0; d && i < 8; i++)
            if ((uint8_t)(v >> (56 - 8 * i)) == 0x3a) return i;
        return 8;
    #endif
    }
    """
    uint64_t cw_lower_word(uint64_t v) nogil
    uint32_t cw_colon_in(uint64_t v) nogil


cdef inline uint32_t lower_name(char* lower, const char* line, uint32_t n, uint32_t there) noexcept nogil:
    """The name of line[0:n), of whose text `there` bytes are left, in lower case; returns its length, n without a colon.

    What stands in `lower` behind the name says nothing; of a name longer than LOOKED_UP nothing in it does.
    """
    cdef const char* colon
    cdef uint64_t word
    cdef uint32_t i = 0, at, most
    if there >= LOOKED_UP:
        while i < LOOKED_UP:
            memcpy(&word, line + i, 8)
            at = i + cw_colon_in(word)
            word = cw_lower_word(word)
            memcpy(lower + i, &word, 8)
            i += 8
            if at < i:
                return at if at < n else n
    colon = <const char*>memchr(line, 58, n)
    if colon == NULL:
        return n
    at = <uint32_t>(colon - line)
    most = at if at < LOOKED_UP else LOOKED_UP
    i = 0
    while i < most:
        lower[i] = <char>cw_lower(<uint8_t>line[i])
        i += 1
    return at


cdef inline char* put_line(char* at, const char* line, uint32_t n, uint32_t there) noexcept nogil:
    """One field, line[0:n) without its line end; there is room for n + MARGIN bytes. Returns the end of what was written."""
    cdef char lower[LOOKED_UP]
    cdef const Name* known = NULL
    cdef const char* value
    cdef uint32_t length, i
    memset(lower, 0, LOOKED_UP)
    length = lower_name(lower, line, n, there)
    if length == 0 or length == n:
        return at
    if length <= LOOKED_UP:
        known = look_up(lower, length)
        if known != NULL and known.index == LEFT_OUT:
            return at
    if known != NULL and known.index:
        at = put_number(at, NEVER_INDEX if known.secret else NO_INDEX, 15, known.index)
    else:
        at[0] = NEVER_INDEX if known != NULL else NO_INDEX
        at = put_number(at + 1, 0, 127, length)
        if length <= LOOKED_UP:
            memcpy(at, lower, LOOKED_UP)            # a constant size is two moves; what is too much is overwritten
        else:
            for i in range(length):
                at[i] = <char>cw_lower(<uint8_t>line[i])
        at += length
    value = line + length + 1
    n -= length + 1
    while n and (value[0] == 32 or value[0] == 9):
        value += 1
        n -= 1
    while n and (value[n - 1] == 32 or value[n - 1] == 9):
        n -= 1
    return put_text(at, value, n)


cdef int put_lines(Buffer* out, const char* text, uint32_t n, uint32_t at, uint32_t* length) noexcept nogil:
    """The lines from `at` on, up to the empty one, whose end becomes *length."""
    cdef const char* end
    cdef char* to = out.base + out.end
    cdef char* most = out.base + out.cap
    cdef uint32_t size
    length[0] = n
    while at < n:
        end = <const char*>memchr(text + at, 13, n - at)
        if end == NULL:
            break
        size = <uint32_t>(end - text) - at
        if size == 0:
            length[0] = at + 2
            break
        if <size_t>(most - to) < <size_t>size + MARGIN:
            out.end = <uint32_t>(to - out.base)
            if buffer_reserve(out, size + MARGIN) < 0:
                return -1
            to = out.base + out.end
            most = out.base + out.cap
        to = put_line(to, text + at, size, n - at)
        at += size + 2
    out.end = <uint32_t>(to - out.base)
    return 0


cdef int hpack_lines(Buffer* out, const char* text, uint32_t n) noexcept nogil:
    cdef uint32_t length
    return put_lines(out, text, n, 0, &length)


cdef int status_index(int status) noexcept nogil:
    if status == 200:
        return 8
    if status == 204:
        return 9
    if status == 206:
        return 10
    if status == 304:
        return 11
    if status == 400:
        return 12
    if status == 404:
        return 13
    return 14 if status == 500 else 0


cdef int hpack_answer(Buffer* out, const char* text, uint32_t n, uint32_t* length) noexcept nogil:
    """text begins with `HTTP/1.1 NNN `. A switch of protocols is a success to HTTP/2 (RFC 8441 5)."""
    cdef const char* end = <const char*>memchr(text, 13, n)
    cdef int status = <int>cw_decimal(text + 9, 3) if n >= 14 else -1
    cdef int index
    if end == NULL or status < 0 or buffer_reserve(out, MARGIN) < 0:
        return -1
    index = status_index(200 if status == 101 else status)
    if index:
        out.base[out.end] = <char>(0x80 | index)
        out.end += 1
    else:
        out.base[out.end] = 8                       # literal without indexing, the name of index 8
        out.base[out.end + 1] = 3
        memcpy(out.base + out.end + 2, text + 9, 3)
        out.end += 5
    return put_lines(out, text, n, <uint32_t>(end - text) + 2, length)


cdef int put_pseudo(Buffer* out, uint8_t index, const char* p, uint32_t n) noexcept nogil:
    if buffer_reserve(out, n + MARGIN) < 0:
        return -1
    out.end = <uint32_t>(put_text(put_number(out.base + out.end, NO_INDEX, 15, index), p, n) - out.base)
    return 0


cdef int put_indexed(Buffer* out, uint8_t index) noexcept nogil:
    if buffer_reserve(out, MARGIN) < 0:
        return -1
    out.base[out.end] = <char>(0x80 | index)
    out.end += 1
    return 0


cdef int hpack_request(Buffer* out, const char* text, uint32_t n, bint secure, bint te, uint32_t* length) noexcept nogil:
    """text begins with `METHOD target HTTP/1.1`, and its first field is Host. CONNECT is that of a WebSocket: no other is ever sent on."""
    cdef const char* end = <const char*>memchr(text, 13, n)
    cdef const char* space = <const char*>memchr(text, 32, n)
    cdef const char* host
    cdef uint32_t method, target, line
    if end == NULL or space == NULL or end - space < 11:
        return -1
    method = <uint32_t>(space - text)
    target = <uint32_t>(end - space) - 10           # ` HTTP/1.1` and the space before the target
    if method == 3 and memcmp(text, b"GET", 3) == 0:
        if put_indexed(out, 2) < 0:
            return -1
    elif method == 4 and memcmp(text, b"POST", 4) == 0:
        if put_indexed(out, 3) < 0:
            return -1
    elif put_pseudo(out, 2, text, method) < 0:
        return -1
    elif method == 7 and memcmp(text, b"CONNECT", 7) == 0 and put_protocol(out) < 0:
        return -1
    if put_indexed(out, 7 if secure else 6) < 0:
        return -1
    if target == 1 and space[1] == 47:
        if put_indexed(out, 4) < 0:
            return -1
    elif put_pseudo(out, 4, space + 1, target) < 0:
        return -1
    line = <uint32_t>(end - text) + 2
    if n - line > 6 and memcmp(text + line, b"host: ", 6) == 0:
        host = text + line + 6
        end = <const char*>memchr(host, 13, n - line - 6)
        if end == NULL or put_pseudo(out, 1, host, <uint32_t>(end - host)) < 0:
            return -1
        line = <uint32_t>(end - text) + 2
    if te and put_te(out) < 0:
        return -1
    return put_lines(out, text, n, line, length)


cdef int put_protocol(Buffer* out) noexcept nogil:
    """:protocol: websocket (RFC 8441 4), whose name no table has."""
    if buffer_reserve(out, MARGIN) < 0:
        return -1
    memcpy(out.base + out.end, b"\x00\x09:protocol\x09websocket", 21)
    out.end += 21
    return 0


cdef int put_te(Buffer* out) noexcept nogil:
    """te: trailers, which put_line() leaves out."""
    if buffer_reserve(out, MARGIN) < 0:
        return -1
    memcpy(out.base + out.end, b"\x00\x02te\x08trailers", 13)
    out.end += 13
    return 0
