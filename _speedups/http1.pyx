"""Strict HTTP/1.1 heads and chunked framing (RFC 9112, RFC 9110 section 5).

Strategy: see http1.pxd. A head is parsed in place, one line at a time; `Head.line` remembers the first unparsed line, so
each byte of a slowly arriving head is parsed once. Python is called from here: never.

Safety: every function takes (pointer, length) and reads base[0:length) only. The end of a line is known to be inside that
range before anything of the line is decided, and each inner scan is bounded by that end; scans that look at a block of bytes
(wire.pxd) are given the whole of base[at:length), may look past the line, and stop at its CR at the latest. Offsets fit 32 bits
because the callers' buffers do, and a head is at most Limits.head bytes.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy, memmove
from gateway._speedups.wire cimport (
    CW_HOST, CW_PLAIN, CW_TARGET, CW_TOKEN, CW_UNRESERVED, CW_VALUE, CW_ALNUM, cw_class, cw_decimal, cw_equals_folded, cw_equals_word, cw_hex,
    cw_lower, cw_span, cw_span_name, cw_span_path, cw_span_value,
)
from gateway._speedups.field_names cimport cw_field_id
from gateway._speedups.headers cimport *

cdef extern from "<arpa/inet.h>" nogil:
    int inet_pton(int family, const char* text, void* out)
    enum: AF_INET6

cdef extern from *:
    """
    typedef struct { int status; const char *slug; const char *detail; } cw_parse_error;
    static const cw_parse_error cw_errors[] = {
        {500, "internal", "internal error"},
        {400, "bad-method", "the method is not a token"},
        {400, "bad-target", "the request target is not a valid origin-form or absolute-form URI"},
        {505, "version-not-supported", "only HTTP/1.0 and HTTP/1.1 are spoken here"},
        {400, "bad-line-end", "a line does not end with CR LF, or holds a bare CR or LF"},
        {400, "bad-field-name", "a header field has no valid name directly followed by a colon"},
        {400, "bad-field-value", "a header field value holds a control character"},
        {400, "folded-field", "a header line starts with white space (obsolete line folding)"},
        {400, "bad-host", "exactly one valid Host is required, equal to the target's authority"},
        {400, "bad-content-length", "Content-Length must be one decimal number, given once"},
        {501, "unknown-transfer-coding", "the only transfer coding supported is chunked"},
        {400, "ambiguous-framing", "the message's framing can be read in two ways"},
        {431, "head-too-large", "the message head is larger than the limit"},
        {414, "target-too-long", "the request target is longer than the limit"},
        {431, "too-many-fields", "there are more header fields than the limit"},
        {400, "ambiguous-framing", "a header field looks like a framing field"},
        {417, "expectation-failed", "the only expectation supported is 100-continue"},
        {501, "method-not-offered", "CONNECT and TRACE are not offered"},
        {502, "bad-status-line", "the upstream's status line is malformed"},
        {400, "bad-chunk-size", "a chunk size is not a valid hexadecimal number"},
        {400, "bad-chunk", "chunk data is not followed by CR LF"},
        {400, "chunk-overhead", "chunk extensions or trailers exceed the limit"},
        {400, "bad-trailer", "a trailer field is malformed"},
        {400, "ambiguous-path", "the path can be read in two ways"},
    };
    """
    ctypedef struct cw_parse_error:
        int status
        const char* slug
        const char* detail
    const cw_parse_error cw_errors[0]

cdef enum:
    NAME_MAX_BYTES = 1024       # a longer field name has no honest use; keeps name_len inside 16 bits
    METHOD_MAX = 32
    TRAILERS_MAX = 64


cdef int error_status(int error) noexcept nogil:
    return cw_errors[error].status if 0 <= error < E_COUNT else 500


cdef const char* error_slug(int error) noexcept nogil:
    return cw_errors[error if 0 <= error < E_COUNT else 0].slug


cdef const char* error_detail(int error) noexcept nogil:
    return cw_errors[error if 0 <= error < E_COUNT else 0].detail


# -- lines ------------------------------------------------------------------------------------------------------------

cdef inline int64_t line_end(const char* base, uint32_t length, Head* head) noexcept nogil:
    """Offset of the LF that ends the line at head.line, 0 when it is not here yet, -E_LINE_END when no CR precedes it."""
    cdef uint32_t start = head.scanned if head.scanned > head.line else head.line
    cdef const char* found
    if start >= length:
        return 0
    found = <const char*>memchr(base + start, 10, length - start)
    if found == NULL:
        head.scanned = length
        return 0
    if found == base + head.line or (found - 1)[0] != 13:
        return -E_LINE_END
    return found - base


cdef int list_has(const char* p, uint32_t length, const char* lower, uint32_t size) noexcept nogil:
    """1 when the comma-separated list of tokens holds `lower`, 0 when not, -1 when an element is not a token."""
    cdef uint32_t i = 0
    cdef uint32_t start
    cdef int found = 0
    while i < length:
        while i < length and (p[i] == 32 or p[i] == 9 or p[i] == 44):
            i += 1
        start = i
        i += <uint32_t>cw_span(p + i, length - i, CW_TOKEN)
        if i == start:
            return -1 if i < length else found
        if i - start == size and cw_equals_folded(p + start, lower, size):
            found = 1
        while i < length and (p[i] == 32 or p[i] == 9):
            i += 1
        if i < length and p[i] != 44:
            return -1
    return found


cdef int transfer_coding(const char* p, uint32_t length) noexcept nogil:
    """0 for exactly `chunked`, else the error: 501 for codings we do not have, 400 for what is ambiguous."""
    cdef uint32_t i = 0, start, n
    cdef int chunked = 0
    if length == 7 and cw_equals_folded(p, b"chunked", 7):
        return E_NONE
    if length == 0:
        return E_CODING_FRAMING
    while True:
        start = i
        n = <uint32_t>cw_span(p + i, length - i, CW_TOKEN)
        if n == 0 or chunked:
            return E_CODING_FRAMING     # an empty or odd element, or something behind chunked
        i += n
        if n == 7 and cw_equals_folded(p + start, b"chunked", 7):
            chunked = 1
        while i < length and (p[i] == 32 or p[i] == 9):
            i += 1
        if i == length:
            return E_CODING
        if p[i] != 44:
            return E_CODING_FRAMING
        i += 1
        while i < length and (p[i] == 32 or p[i] == 9):
            i += 1


cdef bint valid_authority(const char* p, uint32_t length) noexcept nogil:
    """RFC 3986 3.2.2 host with an optional port; no userinfo, no percent-encoding, never empty."""
    cdef uint32_t i = 0
    cdef uint32_t port = 0, digits = 0
    cdef char text[48]
    cdef char address[16]
    if length == 0 or length > 512:
        return False
    if p[0] == 91:                                  # an IPv6 literal
        i = 1
        while i < length and p[i] != 93:
            i += 1
        if i == length or i < 3 or i - 1 > 45:
            return False
        memcpy(text, p + 1, i - 1)
        text[i - 1] = 0
        if memchr(text, 0, i - 1) != NULL or inet_pton(AF_INET6, text, address) != 1:
            return False
        i += 1
    else:
        i = <uint32_t>cw_span(p, length, CW_HOST)
        if i == 0 or p[0] == 46:
            return False
    if i == length:
        return True
    if p[i] != 58:
        return False
    i += 1
    while i < length and digits < 6:
        if not 48 <= p[i] <= 57:
            return False
        port = port * 10 + <uint32_t>(p[i] - 48)
        digits += 1
        i += 1
    return i == length and 0 < digits <= 5 and port <= 65535


# -- request line -----------------------------------------------------------------------------------------------------

cdef uint8_t method_id(const char* p, uint32_t n) noexcept nogil:
    if n == 3:
        if memcmp(p, b"GET", 3) == 0:
            return M_GET
        if memcmp(p, b"PUT", 3) == 0:
            return M_PUT
    elif n == 4:
        if memcmp(p, b"POST", 4) == 0:
            return M_POST
        if memcmp(p, b"HEAD", 4) == 0:
            return M_HEAD
    elif n == 5:
        if memcmp(p, b"PATCH", 5) == 0:
            return M_PATCH
        if memcmp(p, b"TRACE", 5) == 0:
            return M_TRACE
    elif n == 6:
        if memcmp(p, b"DELETE", 6) == 0:
            return M_DELETE
    elif n == 7:
        if memcmp(p, b"OPTIONS", 7) == 0:
            return M_OPTIONS
        if memcmp(p, b"CONNECT", 7) == 0:
            return M_CONNECT
    return M_OTHER


cdef int version(const char* p, uint32_t n, Head* head) noexcept nogil:
    """HTTP/1.0 or HTTP/1.1 and nothing else behind it (RFC 9112 2.3; the name is case-sensitive)."""
    if n < 8 or memcmp(p, b"HTTP/", 5) != 0 or not 48 <= p[5] <= 57 or p[6] != 46 or not 48 <= p[7] <= 57:
        return E_TARGET
    if n != 8:
        return E_TARGET
    if p[5] != 49 or p[7] > 49:
        return E_VERSION
    head.minor = <uint8_t>(p[7] - 48)
    return E_NONE


cdef int split_target(const char* base, uint32_t at, uint32_t end, Head* head) noexcept nogil:
    """Finds path, query and, for absolute-form, the authority in base[at:end), which holds CW_TARGET bytes only."""
    cdef uint32_t i = at
    cdef uint32_t start
    cdef uint8_t c, before = 0
    cdef bint plain = True
    if base[at] != 47:
        if end - at > 7 and cw_equals_folded(base + at, b"http://", 7):
            i = at + 7
        elif end - at > 8 and cw_equals_folded(base + at, b"https://", 8):
            i = at + 8
        else:
            return E_TARGET
        start = i
        while i < end and base[i] != 47 and base[i] != 63:
            i += 1
        if not valid_authority(base + start, i - start):
            return E_HOST
        head.host_at = start
        head.host_len = i - start
    head.path_at = i
    while i < end and base[i] != 63:
        c = <uint8_t>base[i]
        if not (cw_class[c] & CW_PLAIN) or (before == 47 and (c == 46 or c == 47)):
            plain = False
        before = c
        i += 1
    head.path_len = i - head.path_at
    head.path_plain = plain
    if i < end:
        head.has_query = True
        head.query_at = i + 1
        head.query_len = end - i - 1
    return E_NONE


cdef inline bint ordinary_target(const char* base, uint32_t at, uint32_t end, uint32_t length, Head* head, const Limits* limits) noexcept nogil:
    """Whether the rest of the request line is a path of letters, digits and "-./_" with nothing to resolve, and HTTP/1.1: then it is taken.

    base[end] is a CR, where the scan stops at the latest.
    """
    cdef uint32_t n = <uint32_t>cw_span_path(base + at, length - at)
    cdef const char* p = base + at
    cdef uint32_t i
    if n == 0 or p[0] != 47 or n > limits.target or end - at - n != 9 or memcmp(p + n, b" HTTP/1.1", 9) != 0:
        return False
    for i in range(n - 1):
        if p[i] == 47 and (p[i + 1] == 47 or p[i + 1] == 46):
            return False
    head.minor = 1
    head.path_at = at
    head.path_len = n
    head.path_plain = True
    return True


cdef int request_line(const char* base, uint32_t end, uint32_t length, Head* head, const Limits* limits) noexcept nogil:
    """Parses base[0:end), which ends before the CR; base[0:length) may be looked at."""
    cdef uint32_t n = <uint32_t>cw_span(base, end, CW_TOKEN)
    cdef uint32_t at
    cdef int error
    if n == 0 or n > METHOD_MAX or n == end or base[n] != 32:
        return E_METHOD
    head.method_at = 0
    head.method_len = n
    head.method = method_id(base, n)
    at = n + 1
    if head.method != M_CONNECT and head.method != M_TRACE and ordinary_target(base, at, end, length, head, limits):
        return E_NONE
    n = <uint32_t>cw_span(base + at, end - at, CW_TARGET)
    if n > limits.target:
        return E_TARGET_LONG
    if n == 0 or at + n == end or base[at + n] != 32:
        return E_TARGET
    error = version(base + at + n + 1, end - at - n - 1, head)
    if error == E_NONE:
        if head.method == M_CONNECT or head.method == M_TRACE:
            return E_CONNECT
        error = split_target(base, at, at + n, head)
    return error


# -- fields -----------------------------------------------------------------------------------------------------------

cdef int framing_field(const char* base, Head* head, Field* field, bint request) noexcept nogil:
    """What a field whose name we know says about the message. Returns a ParseError."""
    cdef const char* value = base + field.value
    cdef uint32_t n = field.value_len
    cdef int error
    if field.id == F_HOST:
        if not request:
            return E_NONE
        if head.first[F_HOST] >= 0 or not valid_authority(value, n):
            return E_HOST
        if head.host_len == 0:
            head.host_at = field.value
            head.host_len = n
        elif not same_authority(base + head.host_at, head.host_len, value, n):
            return E_HOST           # absolute-form and Host disagree: routing on either would be a guess
    elif field.id == F_CONTENT_LENGTH:
        if head.first[F_CONTENT_LENGTH] >= 0:
            return E_LENGTH
        head.content_length = cw_decimal(value, n)
        if head.content_length < 0:
            return E_LENGTH
    elif field.id == F_TRANSFER_ENCODING:
        if head.first[F_TRANSFER_ENCODING] >= 0:
            return E_CODING_FRAMING
        error = transfer_coding(value, n)
        if error:
            return error
        head.chunked = True
    elif field.id == F_CONNECTION and n == 10 and cw_equals_word(value, b"keep-alive", 10):
        head.keep_alive = True
    elif field.id == F_CONNECTION:
        error = list_has(value, n, b"close", 5)
        if error < 0:
            return E_FIELD_VALUE
        head.close = head.close or error == 1
        head.keep_alive = head.keep_alive or list_has(value, n, b"keep-alive", 10) == 1
        head.upgrade = head.upgrade or list_has(value, n, b"upgrade", 7) == 1
    elif field.id == F_EXPECT and request and head.minor == 1:
        if n != 12 or not cw_equals_folded(value, b"100-continue", 12):
            return E_EXPECT
        head.expect = True
    return E_NONE


cdef bint same_authority(const char* a, uint32_t n, const char* b, uint32_t m) noexcept nogil:
    cdef uint32_t i
    if n != m:
        return False
    for i in range(n):
        if cw_lower(<uint8_t>a[i]) != cw_lower(<uint8_t>b[i]):
            return False
    return True


cdef inline int field_line(const char* base, uint32_t at, uint32_t end, uint32_t length, bint clean, Head* head, const Limits* limits,
                           bint request) noexcept nogil:
    """Parses the field in base[at:end), which ends before its CR and is not empty. Returns a ParseError.

    base[0:length) may be looked at. `clean`: base[at:end) is known to hold field-value bytes only.
    """
    cdef uint32_t n, value
    cdef Field* field
    cdef int error
    if base[at] == 32 or base[at] == 9:
        return E_FOLD
    n = <uint32_t>cw_span_name(base + at, length - at)         # at most up to the CR
    if base[at + n] != 58:
        n += <uint32_t>cw_span(base + at + n, end - at - n, CW_TOKEN)
    if n == 0 or at + n == end or base[at + n] != 58:
        return E_FIELD_NAME
    if n > NAME_MAX_BYTES:
        return E_TOO_LONG
    if head.count >= limits.fields or head.count >= MAX_FIELDS:
        return E_TOO_MANY
    value = at + n + 1
    while value < end and (base[value] == 32 or base[value] == 9):
        value += 1
    if not clean and value + cw_span_value(base + value, end - value) != end:
        return E_LINE_END if memchr(base + value, 13, end - value) != NULL else E_FIELD_VALUE
    while end > value and (base[end - 1] == 32 or base[end - 1] == 9):
        end -= 1
    field = &head.fields[head.count]
    field.name = at
    field.name_len = <uint16_t>n
    field.value = value
    field.value_len = end - value
    field.flags = 0
    field.id = cw_field_id(base + at, n)
    if field.id == F_OTHER:
        if field_is_framing_lookalike(base + at, n):
            return E_FRAMING_NAME
        if request and field_is_identity(base + at, n):
            field.flags = FIELD_IDENTITY
    else:
        if F_FORWARDED <= field.id <= F_X_FORWARDED_HOST:
            field.flags = FIELD_IDENTITY
        error = framing_field(base, head, field, request)
        if error:
            return error
        if head.first[field.id] < 0:
            head.first[field.id] = head.count
    head.count += 1
    return E_NONE


cdef int fields(const char* base, uint32_t length, Head* head, const Limits* limits, bint request) noexcept nogil:
    """Parses field lines from head.line on. Returns the head's length, 0 for more, or a negated ParseError."""
    cdef int64_t found
    cdef uint32_t end
    cdef int error
    cdef bint clean
    while True:
        # A line that is all here and holds nothing odd, as nearly every one, is looked at once. Any other is judged by its LF; so is one of
        # which a part was looked at before, else dripping bytes would cost more than linear work.
        end = head.line
        if head.scanned <= head.line:
            end += <uint32_t>cw_span_value(base + head.line, length - head.line)
        clean = length - end >= 2 and base[end] == 13 and base[end + 1] == 10 and head.scanned <= head.line
        if not clean:
            found = line_end(base, length, head)
            if found <= 0:
                if found == 0 and length >= limits.head:
                    return -E_TOO_LONG
                return <int>found
            end = <uint32_t>found - 1
        if end + 2 > limits.head:
            return -E_TOO_LONG
        if end == head.line:
            head.length = end + 2
            return <int>head.length
        error = field_line(base, head.line, end, length, clean, head, limits, request)
        if error:
            return -error
        head.fields[head.count - 1].line_len = end + 2 - head.line
        head.line = end + 2


cdef int parse_request(const char* base, uint32_t length, Head* head, const Limits* limits) noexcept nogil:
    cdef int64_t found
    cdef int result
    cdef uint32_t n
    head.base = base
    if head.line == 0:
        found = line_end(base, length, head)
        if found < 0:
            return <int>found
        if found == 0:
            n = <uint32_t>cw_span(base, length, CW_TOKEN)
            if n > METHOD_MAX or (n < length and (n == 0 or base[n] != 32)):
                return -E_METHOD            # TLS, SSH or noise: refused at its first byte
            return -E_TARGET_LONG if length > limits.target + METHOD_MAX + 16 else 0
        result = request_line(base, <uint32_t>found - 1, length, head, limits)
        if result:
            return -result
        head.line = <uint32_t>found + 1
    result = fields(base, length, head, limits, True)
    if result <= 0:
        return result
    if head.first[F_HOST] < 0 and head.minor == 1:
        return -E_HOST
    if head.chunked and (head.minor == 0 or head.content_length >= 0):
        return -E_CODING_FRAMING
    return result


cdef int parse_response(const char* base, uint32_t length, Head* head, const Limits* limits) noexcept nogil:
    cdef int64_t found
    cdef int result
    cdef uint32_t end
    head.base = base
    if head.line == 0:
        found = line_end(base, length, head)
        if found < 0:
            return <int>found
        if found == 0:
            if length and base[0] != 72:
                return -E_STATUS
            return -E_TOO_LONG if length >= limits.head else 0
        end = <uint32_t>found - 1
        if end < 12 or memcmp(base, b"HTTP/1.", 7) != 0 or not 48 <= base[7] <= 49 or base[8] != 32:
            return -E_STATUS
        if not (49 <= base[9] <= 53 and 48 <= base[10] <= 57 and 48 <= base[11] <= 57) or (end > 12 and base[12] != 32):
            return -E_STATUS
        head.minor = <uint8_t>(base[7] - 48)
        head.status = <uint16_t>((base[9] - 48) * 100 + (base[10] - 48) * 10 + (base[11] - 48))
        head.reason_at = 13 if end > 12 else 12
        head.reason_len = end - head.reason_at
        if cw_span_value(base + head.reason_at, head.reason_len) != head.reason_len:
            return -E_STATUS
        head.line = <uint32_t>found + 1
    result = fields(base, length, head, limits, False)
    if result > 0 and head.chunked and (head.minor == 0 or head.content_length >= 0):
        return -E_CODING_FRAMING
    return result


# -- paths ------------------------------------------------------------------------------------------------------------

cdef inline int hex_pair(const char* p, uint32_t at, uint32_t length) noexcept nogil:
    """The value of the escape whose first digit is p[at], -1 when there are not two hex digits."""
    if at + 1 >= length or cw_hex[<uint8_t>p[at]] == 0 or cw_hex[<uint8_t>p[at + 1]] == 0:
        return -1
    return (cw_hex[<uint8_t>p[at]] - 1) * 16 + cw_hex[<uint8_t>p[at + 1]] - 1


cdef int utf8_follows(int lead, int second, int* want) noexcept nogil:
    """Checks a lead byte and its second byte (RFC 3629 section 4); sets how many continuation bytes follow the lead."""
    if 0xc2 <= lead <= 0xdf:
        want[0] = 1
        return 0x80 <= second <= 0xbf
    if 0xe0 <= lead <= 0xef:
        want[0] = 2
        if lead == 0xe0:
            return 0xa0 <= second <= 0xbf
        if lead == 0xed:
            return 0x80 <= second <= 0x9f
        return 0x80 <= second <= 0xbf
    if 0xf0 <= lead <= 0xf4:
        want[0] = 3
        if lead == 0xf0:
            return 0x90 <= second <= 0xbf
        if lead == 0xf4:
            return 0x80 <= second <= 0x8f
        return 0x80 <= second <= 0xbf
    return 0


cdef int put_escape(char* out, int at, int value) noexcept nogil:
    cdef const char* digits = b"0123456789ABCDEF"
    out[at] = 37
    out[at + 1] = digits[value >> 4]
    out[at + 2] = digits[value & 15]
    return at + 3


cdef int copy_utf8(const char* path, uint32_t* at, uint32_t length, int lead, char* out, int n) noexcept nogil:
    """Copies one escaped multi-byte character whose lead escape ended before path[*at]. Returns the new n or an error."""
    cdef int want = 0
    cdef int value
    cdef int k = 0
    if at[0] + 2 >= length or path[at[0]] != 37:
        return -E_PATH
    value = hex_pair(path, at[0] + 1, length)
    if value < 0 or not utf8_follows(lead, value, &want):
        return -E_PATH
    n = put_escape(out, n, lead)
    while k < want:
        if at[0] + 2 >= length or path[at[0]] != 37:
            return -E_PATH
        value = hex_pair(path, at[0] + 1, length)
        if not 0x80 <= value <= 0xbf:
            return -E_PATH
        n = put_escape(out, n, value)
        at[0] += 3
        k += 1
    return n


cdef int unescape(const char* path, uint32_t length, char* out) noexcept nogil:
    """Unescapes unreserved bytes once; refuses what two readers would understand differently. Never grows the path."""
    cdef uint32_t i = 0
    cdef int n = 0
    cdef int value, inner
    cdef char c
    while i < length:
        c = path[i]
        if c == 92 or (c == 47 and n > 0 and out[n - 1] == 47):
            return -E_PATH                          # a backslash, or an empty segment
        if c != 37:
            out[n] = c
            n += 1
            i += 1
            continue
        value = hex_pair(path, i + 1, length)
        if value < 0x20 or value == 0x7f or value == 47 or value == 92:
            return -E_PATH                          # no escape at all, a control byte, %2F, %5C
        i += 3
        if value >= 0x80:
            n = copy_utf8(path, &i, length, value, out, n)
            if n < 0:
                return n
        elif cw_class[value] & CW_UNRESERVED:
            out[n] = <char>value
            n += 1
        else:
            if value == 37:
                inner = hex_pair(path, i, length)
                if inner == 0 or inner == 37 or inner == 46 or inner == 47 or inner == 92:
                    return -E_PATH                  # encoded twice
            n = put_escape(out, n, value)
    return n


cdef inline bint semicolon(const char* p, int n) noexcept nogil:
    """Whether p[0:n) begins with ';' or its escape (upper case after unescape())."""
    return n > 0 and (p[0] == 59 or (n > 2 and p[0] == 37 and p[1] == 51 and p[2] == 66))


cdef int normalise_path(const char* path, uint32_t length, char* out) noexcept nogil:
    cdef int n = unescape(path, length, out)
    cdef int i = 1
    cdef int start, size, kept = 1
    if n <= 0 or out[0] != 47:
        return n if n < 0 else -E_PATH
    # out[0:kept) is the result so far and always ends with '/': a segment is moved behind it, or takes one away.
    while i <= n:
        start = i
        while i < n and out[i] != 47:
            i += 1
        size = i - start
        if size >= 2 and out[start] == 46 and (semicolon(out + start + 1, size - 1) or
                                               (out[start + 1] == 46 and semicolon(out + start + 2, size - 2))):
            return -E_PATH                          # `.;x` and `..%3Bx`: a dot segment to some, a name to others
        if size == 2 and out[start] == 46 and out[start + 1] == 46:
            if kept == 1:
                return -E_PATH                      # above the root
            kept -= 1
            while out[kept - 1] != 47:
                kept -= 1
        elif not (size == 1 and out[start] == 46):
            memmove(out + kept, out + start, size)
            kept += size
            if i < n:
                out[kept] = 47
                kept += 1
        i += 1
    return kept


# -- chunked ----------------------------------------------------------------------------------------------------------

cdef void chunked_reset(Chunked* state) noexcept nogil:
    state.state = CHUNK_SIZE
    state.digits = 0
    state.colon = False
    state.overhead = 0
    state.trailers = 0
    state.remaining = 0


cdef inline int overhead(Chunked* state) noexcept nogil:
    state.overhead += 1
    return E_CHUNK_EXT if state.overhead > CHUNK_OVERHEAD_MAX else E_NONE


cdef int size_byte(Chunked* state, uint8_t c) noexcept nogil:
    """One byte of a chunk-size line. Returns a ParseError."""
    cdef uint8_t digit = cw_hex[c]
    if state.state == CHUNK_SIZE:
        if digit == 0:
            return E_CHUNK_SIZE
        state.remaining = digit - 1
        state.digits = 1 if digit > 1 else 0
        state.state = CHUNK_SIZE_MORE
    elif state.state == CHUNK_SIZE_MORE:
        if digit:
            if state.remaining == 0 and digit == 1:
                return overhead(state)              # a leading zero
            state.digits += 1
            if state.digits > 15:
                return E_CHUNK_SIZE                 # 2^60 bytes: nobody means it
            state.remaining = state.remaining * 16 + digit - 1
        elif c == 59:
            state.state = CHUNK_EXT
        elif c == 13:
            state.state = CHUNK_SIZE_LF
        else:
            return E_CHUNK_SIZE
    elif state.state == CHUNK_SIZE_LF:
        if c != 10:
            return E_CHUNK_SIZE
        state.state = CHUNK_DATA if state.remaining else CHUNK_TRAILER
    elif state.state == CHUNK_EXT_ESCAPE:
        if not (cw_class[c] & CW_VALUE):
            return E_CHUNK_SIZE
        state.state = CHUNK_EXT_QUOTED
        return overhead(state)
    elif state.state == CHUNK_EXT_QUOTED:
        if not (cw_class[c] & CW_VALUE):
            return E_CHUNK_SIZE
        if c == 34:
            state.state = CHUNK_EXT
        elif c == 92:
            state.state = CHUNK_EXT_ESCAPE
        return overhead(state)
    else:                                           # CHUNK_EXT
        if c == 13:
            state.state = CHUNK_SIZE_LF
        elif not (cw_class[c] & CW_VALUE):
            return E_CHUNK_SIZE
        elif c == 34:
            state.state = CHUNK_EXT_QUOTED
        return overhead(state)
    return E_NONE


cdef int trailer_byte(Chunked* state, uint8_t c) noexcept nogil:
    """One byte of the trailer section; its fields are checked and dropped. Returns a ParseError."""
    if state.state == CHUNK_TRAILER:
        if c == 13:
            state.state = CHUNK_END_LF
            return E_NONE
        if not (cw_class[c] & CW_TOKEN) or state.trailers >= TRAILERS_MAX:
            return E_TRAILER
        state.trailers += 1
        state.colon = False
        state.state = CHUNK_TRAILER_LINE
    elif state.state == CHUNK_TRAILER_LINE:
        if c == 13 and state.colon:
            state.state = CHUNK_TRAILER_LF
        elif c == 58:
            state.colon = True
        elif not (cw_class[c] & (CW_VALUE if state.colon else CW_TOKEN)):
            return E_TRAILER
    elif state.state == CHUNK_TRAILER_LF:
        if c != 10:
            return E_TRAILER
        state.state = CHUNK_TRAILER
    else:                                           # CHUNK_END_LF
        if c != 10:
            return E_TRAILER
        state.state = CHUNK_DONE
        return E_NONE
    return overhead(state)


cdef int64_t chunked_decode(Chunked* state, char* data, uint32_t length, uint32_t* consumed) noexcept nogil:
    cdef uint32_t i = 0
    cdef uint32_t kept = 0
    cdef uint32_t n
    cdef int error = E_NONE
    while i < length and state.state != CHUNK_DONE:
        if state.state == CHUNK_DATA:
            n = length - i
            if n > state.remaining:
                n = <uint32_t>state.remaining
            if kept != i:
                memmove(data + kept, data + i, n)
            kept += n
            i += n
            state.remaining -= n
            if state.remaining == 0:
                state.state = CHUNK_DATA_CR
            continue
        if state.state == CHUNK_DATA_CR or state.state == CHUNK_DATA_LF:
            if data[i] != (13 if state.state == CHUNK_DATA_CR else 10):
                return -E_CHUNK_END
            state.state = CHUNK_DATA_LF if state.state == CHUNK_DATA_CR else CHUNK_SIZE
        elif state.state < CHUNK_DATA:
            error = size_byte(state, <uint8_t>data[i])
        else:
            error = trailer_byte(state, <uint8_t>data[i])
        if error:
            return -error
        i += 1
    consumed[0] = i
    return kept
