"""gRPC-Web and gRPC, translated as they pass; see grpc_web.pxd.

Strategy: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-WEB.md. Text may be a sequence of base64 bodies, each padded, so a
group with padding may be followed by others. What is encoded here is padded whenever a message is complete: a client that reads
an answer while it arrives has every message at once, and no byte of it waits for the next one.
Python is called from here: never.

Safety: `hold` and `head` are filled up to their sizes only (held < 4, head_have < 5 whenever a function returns). Output is
reserved before it is written, by the bounds in the .pxd, which hold because each group of 4 digits makes at most 3 bytes and each
3 bytes, or the rest at a padding, make 4 digits. 32-bit sums cannot overflow: n is at most half of the range, or it is refused.
"""

from libc.stdint cimport int8_t, uint8_t, uint32_t
from libc.string cimport memcpy, memset
from gateway._speedups.buffers cimport Buffer, buffer_append, buffer_release, buffer_reserve
from gateway._speedups.wire cimport CW_ALNUM, cw_class, cw_equals_folded

cdef extern from *:
    """
    /* Values of base64 digits plus one (RFC 4648 4); 0 marks a byte that is none. */
    static const uint8_t cw_base64[256] = {
        ['A'] = 1, ['B'] = 2, ['C'] = 3, ['D'] = 4, ['E'] = 5, ['F'] = 6, ['G'] = 7, ['H'] = 8, ['I'] = 9, ['J'] = 10, ['K'] = 11,
        ['L'] = 12, ['M'] = 13, ['N'] = 14, ['O'] = 15, ['P'] = 16, ['Q'] = 17, ['R'] = 18, ['S'] = 19, ['T'] = 20, ['U'] = 21,
        ['V'] = 22, ['W'] = 23, ['X'] = 24, ['Y'] = 25, ['Z'] = 26, ['a'] = 27, ['b'] = 28, ['c'] = 29, ['d'] = 30, ['e'] = 31,
        ['f'] = 32, ['g'] = 33, ['h'] = 34, ['i'] = 35, ['j'] = 36, ['k'] = 37, ['l'] = 38, ['m'] = 39, ['n'] = 40, ['o'] = 41,
        ['p'] = 42, ['q'] = 43, ['r'] = 44, ['s'] = 45, ['t'] = 46, ['u'] = 47, ['v'] = 48, ['w'] = 49, ['x'] = 50, ['y'] = 51,
        ['z'] = 52, ['0'] = 53, ['1'] = 54, ['2'] = 55, ['3'] = 56, ['4'] = 57, ['5'] = 58, ['6'] = 59, ['7'] = 60, ['8'] = 61,
        ['9'] = 62, ['+'] = 63, ['/'] = 64,
    };
    static const char cw_digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    """
    const uint8_t cw_base64[256]
    const char cw_digits[65]

cdef enum:
    COMPRESSED = 1          # the only flag of a message's prefix
    TRAILERS = 0x80
    SUFFIX_MAX = 24
    INPUT_MAX = 0x3fffffff

cdef const char* WEB = b"application/grpc-web"          # 20 bytes
cdef const char* WEB_TEXT_NAME = b"application/grpc-web-text"       # 25 bytes


cdef class WebCall:
    """See grpc_web.pxd."""

    def __cinit__(self):
        memset(&self.out, 0, sizeof(Buffer))
        web_reset(&self.answer, False)

    def __dealloc__(self):
        buffer_release(&self.out)


# -- content types ----------------------------------------------------------------------------------------------------

cdef int web_kind(const char* value, uint32_t n, uint32_t* suffix, uint32_t* suffix_len) noexcept nogil:
    cdef int kind = WEB_NOT
    cdef uint32_t at = 0, begin
    suffix[0] = 0
    suffix_len[0] = 0
    if n >= 25 and cw_equals_folded(value, WEB_TEXT_NAME, 25):
        kind, at = WEB_TEXT, 25
    elif n >= 20 and cw_equals_folded(value, WEB, 20):
        kind, at = WEB_BINARY, 20
    if kind == WEB_NOT:
        return WEB_NOT
    if at < n and value[at] == 43:              # +
        begin = at + 1
        at = begin
        while at < n and ((cw_class[<uint8_t>value[at]] & CW_ALNUM) or value[at] == 45 or value[at] == 46):
            at += 1
        if at == begin or at - begin > SUFFIX_MAX:
            return WEB_NOT
        suffix[0] = begin
        suffix_len[0] = at - begin
    while at < n and (value[at] == 32 or value[at] == 9):
        at += 1
    return kind if at == n or value[at] == 59 else WEB_NOT          # parameters mean nothing here


cdef bint web_wants_text(const char* value, uint32_t n) noexcept nogil:
    cdef uint32_t at = 0, end, suffix, suffix_len
    while at < n:
        while at < n and (value[at] == 32 or value[at] == 9 or value[at] == 44):
            at += 1
        end = at
        while end < n and value[end] != 44:
            end += 1
        if web_kind(value + at, end - at, &suffix, &suffix_len) == WEB_TEXT:
            return True
        at = end
    return False


cdef uint32_t put_type(char* out, const char* name, uint32_t n, const char* suffix, uint32_t suffix_len) noexcept nogil:
    """n + 1 + SUFFIX_MAX is less than WEB_TYPE_MAX."""
    memcpy(out, name, n)
    if suffix_len == 0 or suffix_len > SUFFIX_MAX:
        return n
    out[n] = 43
    memcpy(out + n + 1, suffix, suffix_len)
    return n + 1 + suffix_len


cdef uint32_t web_request_type(const char* value, uint32_t n, char* out) noexcept nogil:
    cdef uint32_t suffix, suffix_len
    web_kind(value, n, &suffix, &suffix_len)
    return put_type(out, b"application/grpc", 16, value + suffix, suffix_len)


cdef uint32_t web_answer_type(bint text, const char* value, uint32_t n, char* out) noexcept nogil:
    """The service's own suffix; proto when it names none, which is what that means."""
    cdef uint32_t at = 17, end = 17
    if n > 17 and value[16] == 43 and cw_equals_folded(value, b"application/grpc", 16):
        while end < n and ((cw_class[<uint8_t>value[end]] & CW_ALNUM) or value[end] == 45 or value[end] == 46):
            end += 1
    if end == at or end - at > SUFFIX_MAX:
        return put_type(out, WEB_TEXT_NAME if text else WEB, 25 if text else 20, b"proto", 5)
    return put_type(out, WEB_TEXT_NAME if text else WEB, 25 if text else 20, value + at, end - at)


# -- bodies -----------------------------------------------------------------------------------------------------------

cdef void web_reset(WebBody* body, bint text) noexcept nogil:
    memset(body, 0, sizeof(WebBody))
    body.text = text


cdef int walk(WebBody* body, const char* data, uint32_t n) noexcept nogil:
    """Follows the prefixes over n more bytes."""
    cdef uint32_t at = 0, take
    while at < n:
        if body.left:
            take = body.left if body.left < n - at else n - at
            body.left -= take
            at += take
            continue
        body.head[body.head_have] = <uint8_t>data[at]
        body.head_have += 1
        at += 1
        if body.head_have == 1 and body.head[0] > COMPRESSED:
            return WEB_BAD_FRAME
        if body.head_have == 5:
            body.left = (<uint32_t>body.head[1] << 24) | (<uint32_t>body.head[2] << 16) | (<uint32_t>body.head[3] << 8) | body.head[4]
            body.head_have = 0
    return 0


cdef inline int ungroup(const uint8_t* digits, char* out) noexcept nogil:
    """Writes what four digits stand for; returns how many bytes that is, 0 when they stand for nothing."""
    cdef uint32_t a = cw_base64[digits[0]], b = cw_base64[digits[1]], c = cw_base64[digits[2]], d = cw_base64[digits[3]], bits
    if a == 0 or b == 0:
        return 0
    bits = (a - 1) << 18 | (b - 1) << 12
    if d:
        if c == 0:
            return 0
        bits |= (c - 1) << 6 | (d - 1)
        out[0] = <char>(bits >> 16)
        out[1] = <char>(bits >> 8)
        out[2] = <char>bits
        return 3
    if digits[3] != 61:                         # =
        return 0
    if c:
        bits |= (c - 1) << 6
        if bits & 0xff:
            return 0
        out[0] = <char>(bits >> 16)
        out[1] = <char>(bits >> 8)
        return 2
    if digits[2] != 61 or bits & 0xffff:
        return 0
    out[0] = <char>(bits >> 16)
    return 1


cdef int web_decode(WebBody* body, const char* data, uint32_t n, Buffer* out) noexcept nogil:
    cdef uint32_t at = 0, before
    cdef int made
    if n == 0:
        return 0
    if n > INPUT_MAX:
        return WEB_MEMORY
    if not body.text:
        made = walk(body, data, n)
        if made < 0:
            return made
        return WEB_MEMORY if buffer_append(out, data, n) < 0 else 0
    if buffer_reserve(out, (body.held + n) // 4 * 3) < 0:
        return WEB_MEMORY
    before = out.end
    while at < n:
        if body.held == 0 and n - at >= 4:
            made = ungroup(<const uint8_t*>data + at, out.base + out.end)
            at += 4
        else:
            body.hold[body.held] = <uint8_t>data[at]
            body.held += 1
            at += 1
            if body.held < 4:
                continue
            body.held = 0
            made = ungroup(body.hold, out.base + out.end)
        if made == 0:
            return WEB_BAD_BASE64
        out.end += <uint32_t>made
    return walk(body, out.base + before, out.end - before)


cdef inline void group(const uint8_t* p, uint32_t n, char* out) noexcept nogil:
    """Writes the four digits of n bytes, 1 to 3."""
    cdef uint32_t bits = (<uint32_t>p[0] << 16) | (<uint32_t>p[1] << 8 if n > 1 else 0) | (<uint32_t>p[2] if n > 2 else 0)
    out[0] = cw_digits[bits >> 18]
    out[1] = cw_digits[(bits >> 12) & 63]
    out[2] = cw_digits[(bits >> 6) & 63] if n > 1 else 61
    out[3] = cw_digits[bits & 63] if n > 2 else 61


cdef int put_text(WebBody* body, const char* data, uint32_t n, bint pad, Buffer* out) noexcept nogil:
    cdef uint32_t at = 0
    if buffer_reserve(out, (body.held + n + 2) // 3 * 4) < 0:
        return WEB_MEMORY
    while at < n:
        if body.held == 0 and n - at >= 3:
            group(<const uint8_t*>data + at, 3, out.base + out.end)
            out.end += 4
            at += 3
            continue
        body.hold[body.held] = <uint8_t>data[at]
        body.held += 1
        at += 1
        if body.held == 3:
            group(body.hold, 3, out.base + out.end)
            out.end += 4
            body.held = 0
    if pad and body.held:
        group(body.hold, body.held, out.base + out.end)
        out.end += 4
        body.held = 0
    return 0


cdef int web_encode(WebBody* body, const char* data, uint32_t n, Buffer* out) noexcept nogil:
    cdef int result
    if n == 0:
        return 0
    if n > INPUT_MAX:
        return WEB_MEMORY
    result = walk(body, data, n)
    if result < 0:
        return result
    if body.text:
        return put_text(body, data, n, body.left == 0 and body.head_have == 0, out)
    return WEB_MEMORY if buffer_append(out, data, n) < 0 else 0


cdef int web_finish(WebBody* body) noexcept nogil:
    return WEB_CUT if body.held or body.head_have or body.left else 0


cdef int web_trailers(WebBody* body, const char* lines, uint32_t n, Buffer* out) noexcept nogil:
    cdef char head[5]
    cdef int result = web_finish(body)
    if result < 0:
        return result
    if n > INPUT_MAX:
        return WEB_MEMORY
    head[0] = <char>TRAILERS
    head[1] = <char>(n >> 24)
    head[2] = <char>(n >> 16)
    head[3] = <char>(n >> 8)
    head[4] = <char>n
    if body.text:
        result = put_text(body, head, 5, False, out)
        return result if result < 0 else put_text(body, lines, n, True, out)
    return WEB_MEMORY if buffer_append(out, head, 5) < 0 or (n and buffer_append(out, lines, n) < 0) else 0
