"""Writes heads; see compose.pxd.

Strategy: an Out is a pointer with an end; put() refuses what does not fit and remembers that it did, so callers check once.
Python is called from here: never, but for the bytes objects that policies prepared.

Safety: put() is the only writer and compares with `end` before each copy; sources are offsets of a parsed head or bytes
objects held by the exchange or its snapshot.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy
from gateway._speedups.exchange cimport BODY_CHUNKED, BODY_CLOSE, BODY_LENGTH, BODY_NONE, Edits, Exchange
from gateway._speedups.grpc cimport grpc_code, is_grpc
from gateway._speedups.grpc_web cimport WEB_TYPE_MAX, web_answer_type, web_request_type
from gateway._speedups.headers cimport *
from gateway._speedups.pool cimport HOST_LITERAL, HOST_PRESERVE, PROTOCOL_HTTP1
from gateway._speedups.wire cimport cw_fold_name, cw_hex, cw_put_decimal, cw_reason

cdef extern from "<sys/random.h>" nogil:
    ssize_t getrandom(void* out, size_t n, unsigned int flags)

cdef extern from *:
    """
    /* xoshiro256**: identifiers have to be unique, not secret. Seeded by getrandom(), anew after fork. */
    static uint64_t cw_random_state[4];
    static inline uint64_t cw_rotl(uint64_t x, int k) { return (x << k) | (x >> (64 - k)); }
    static inline uint64_t cw_random(void) {
        uint64_t *s = cw_random_state, r = cw_rotl(s[1] * 5, 7) * 9, t = s[1] << 17;
        s[2] ^= s[0]; s[3] ^= s[1]; s[1] ^= s[2]; s[0] ^= s[3]; s[2] ^= t; s[3] = cw_rotl(s[3], 45);
        return r;
    }
    /* Eight hexadecimal digits at once: a nibble into each byte, then 10 and more a step further, to the letters. */
    static inline void cw_hex8(char *out, uint32_t v) {
        uint64_t x = v;
        x = (x | x << 16) & 0x0000ffff0000ffffULL;
        x = (x | x << 8) & 0x00ff00ff00ff00ffULL;
        x = (x | x << 4) & 0x0f0f0f0f0f0f0f0fULL;
        x += 0x3030303030303030ULL + ((x + 0x0606060606060606ULL) >> 4 & 0x0101010101010101ULL) * ('a' - '9' - 1);
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        x = __builtin_bswap64(x);
    #endif
        memcpy(out, &x, 8);
    }
    static inline void cw_hex16(char *out, uint64_t v) {
        cw_hex8(out, (uint32_t)(v >> 32));
        cw_hex8(out + 8, (uint32_t)v);
    }
    typedef struct { char *at; char *end; int short_; } cw_out;
    /* memcpy() without the call for what is short, as most pieces of a head are: two moves of one size, which may overlap. Reads and
       writes these n bytes only. */
    static inline void cw_copy(char *to, const char *from, size_t n) {
        if (n > 32) memcpy(to, from, n);
        else if (n >= 16) { char a[16], b[16]; memcpy(a, from, 16); memcpy(b, from + n - 16, 16); memcpy(to, a, 16); memcpy(to + n - 16, b, 16); }
        else if (n >= 8) { char a[8], b[8]; memcpy(a, from, 8); memcpy(b, from + n - 8, 8); memcpy(to, a, 8); memcpy(to + n - 8, b, 8); }
        else if (n >= 4) { char a[4], b[4]; memcpy(a, from, 4); memcpy(b, from + n - 4, 4); memcpy(to, a, 4); memcpy(to + n - 4, b, 4); }
        else if (n) { to[0] = from[0]; if (n > 1) { to[1] = from[1]; to[n - 1] = from[n - 1]; } }
    }
    static inline void cw_put(cw_out *o, const char *p, size_t n) {
        if ((size_t)(o->end - o->at) < n) { o->short_ = 1; return; }
        cw_copy(o->at, p, n);
        o->at += n;
    }
    #define cw_lit(o, s) cw_put((o), (s), __builtin_strlen(s))
    /* What put_identity() writes for a client that is nobody's proxy, with one comparison for all of it. */
    #define CW_LINES(s) do { memcpy(p, (s), sizeof(s) - 1); p += sizeof(s) - 1; } while (0)
    #define CW_BYTES(s, n) do { cw_copy(p, (s), (n)); p += (n); } while (0)
    enum { CW_IDENTITY_TEXT = 320 };                 /* the words below and both ids come to 253 bytes */
    static void cw_put_client(cw_out *o, const char *client, size_t n, const char *host, size_t m, int secure, int http2,
                              const char *id, const char *trace) {
        char *p = o->at;
        /* An IPv6 address has a colon behind its first group, of four digits at most; no other text has one. */
        int v6 = n >= 2 && memchr(client, ':', n < 5 ? n : 5) != NULL;
        if ((size_t)(o->end - p) < CW_IDENTITY_TEXT + 2 * n + 2 * m) { o->short_ = 1; return; }
        CW_LINES("x-forwarded-for: ");
        CW_BYTES(client, n);
        if (secure) CW_LINES("\\r\\nx-forwarded-proto: https\\r\\n"); else CW_LINES("\\r\\nx-forwarded-proto: http\\r\\n");
        if (m) {
            CW_LINES("x-forwarded-host: ");
            CW_BYTES(host, m);
            CW_LINES("\\r\\n");
        }
        if (v6) CW_LINES("forwarded: for=\\"["); else CW_LINES("forwarded: for=");
        CW_BYTES(client, n);
        if (v6) CW_LINES("]\\"");
        if (m) {
            CW_LINES(";host=\\"");
            CW_BYTES(host, m);
            CW_LINES("\\"");
        }
        if (secure) CW_LINES(";proto=https\\r\\nx-request-id: "); else CW_LINES(";proto=http\\r\\nx-request-id: ");
        memcpy(p, id, 36);
        p += 36;
        CW_LINES("\\r\\ntraceparent: ");
        memcpy(p, trace, 55);
        p += 55;
        if (http2) CW_LINES("\\r\\nvia: 2 crossway\\r\\n"); else CW_LINES("\\r\\nvia: 1.1 crossway\\r\\n");
        o->at = p;
    }
    """
    uint64_t cw_random_state[4]
    uint64_t cw_random() nogil
    void cw_hex16(char* out, uint64_t v) nogil
    size_t strlen(const char* s) nogil
    ctypedef struct cw_out:
        char* at
        char* end
        bint short_
    void cw_put(cw_out* o, const char* p, size_t n) nogil
    void cw_lit(cw_out* o, const char* s) nogil
    void cw_put_client(cw_out* o, const char* client, size_t n, const char* host, size_t m, bint secure, bint http2, const char* id,
                       const char* trace) nogil


def seed_random() -> None:
    """Seed the identifiers' generator; called at import and in every forked worker."""
    if getrandom(cw_random_state, sizeof(cw_random_state), 0) != sizeof(cw_random_state):
        raise OSError("getrandom failed")

seed_random()


# -- identifiers ------------------------------------------------------------------------------------------------------

cdef void make_request_id(char* out, int64_t wall_us) noexcept nogil:
    cdef uint64_t ms = <uint64_t>(wall_us // 1000)
    cdef uint64_t a = cw_random()
    cdef uint64_t b = cw_random()
    cdef char digits[32]
    cw_hex16(digits, ms << 16 | 0x7000 | (a & 0xfff))
    cw_hex16(digits + 16, <uint64_t>0x8000 << 48 | (b >> 50) << 48 | (b << 16) >> 16)
    memcpy(out, digits, 8)
    out[8] = 45
    memcpy(out + 9, digits + 8, 4)
    out[13] = 45
    memcpy(out + 14, digits + 12, 4)
    out[18] = 45
    memcpy(out + 19, digits + 16, 4)
    out[23] = 45
    memcpy(out + 24, digits + 20, 12)


cdef void make_trace(char* out) noexcept nogil:
    memcpy(out, b"00-", 3)
    cw_hex16(out + 3, cw_random())
    cw_hex16(out + 19, cw_random())
    out[35] = 45
    cw_hex16(out + 36, cw_random() | 1)
    memcpy(out + 52, b"-02", 3)             # not sampled, trace id is random (level 2)


cdef bint valid_request_id(const char* p, uint32_t n) noexcept nogil:
    """8-4-4-4-12 hexadecimal digits of a UUID, any version."""
    cdef uint32_t i
    if n != 36:
        return False
    for i in range(36):
        if i == 8 or i == 13 or i == 18 or i == 23:
            if p[i] != 45:
                return False
        elif cw_hex[<uint8_t>p[i]] == 0:
            return False
    return True


cdef bint valid_trace(const char* p, uint32_t n) noexcept nogil:
    """version-traceid-parentid-flags in lower-case hex; ids not all zero; version ff is invalid, later ones may be longer."""
    cdef uint32_t i
    cdef bint trace = False, parent = False
    if n < 55 or (n > 55 and ((p[0] == 48 and p[1] == 48) or p[55] != 45)):
        return False
    for i in range(55):
        if i == 2 or i == 35 or i == 52:
            if p[i] != 45:
                return False
        elif cw_hex[<uint8_t>p[i]] == 0 or 65 <= p[i] <= 70:
            return False
        elif p[i] != 48:
            trace = trace or 3 <= i < 35
            parent = parent or 36 <= i < 52
    return trace and parent and not (p[0] == 102 and p[1] == 102)


cdef void continue_trace(char* out, const char* received) noexcept nogil:
    """The received trace with a span id of our own."""
    memcpy(out, received, 55)
    out[0] = out[1] = 48
    cw_hex16(out + 36, cw_random() | 1)


# -- parts ------------------------------------------------------------------------------------------------------------

cdef inline void put_bytes(cw_out* o, bytes value) noexcept:
    if value is not None:
        cw_put(o, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))


cdef void put_number(cw_out* o, uint64_t value) noexcept nogil:
    cdef char digits[20]
    if o.end - o.at >= 20:
        o.at += cw_put_decimal(o.at, value)
    else:
        cw_put(o, digits, cw_put_decimal(digits, value))


cdef void put_fields(cw_out* o, const Head* head) noexcept nogil:
    """Copies the lines that are not dropped, adjacent ones in one go."""
    cdef int i = 0
    cdef uint32_t start
    cdef const Field* field
    while i < head.count:
        field = &head.fields[i]
        if field.flags & FIELD_DROP:
            i += 1
            continue
        start = field.name
        while i < head.count and not (head.fields[i].flags & FIELD_DROP):
            field = &head.fields[i]
            i += 1
        cw_put(o, head.base + start, field.name + field.line_len - start)


cdef void drop_named(Head* head, object names):
    """Marks every field named in `names` (lower-case bytes) as dropped."""
    cdef bytes name
    cdef int i
    for name in names:
        i = head_find(head, name, len(name), 0)
        while i >= 0:
            head.fields[i].flags |= FIELD_DROP
            i = head_find(head, name, len(name), i + 1)


cdef void drop_folded(Head* head, tuple names):
    """Marks every field whose name folds as one of `names` does (lower case), however it is spelled."""
    cdef bytes name
    cdef int i
    for name in names:
        for i in range(head.count):
            if head.fields[i].name_len == PyBytes_GET_SIZE(name) and \
                    same_folded(head.base + head.fields[i].name, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name)):
                head.fields[i].flags |= FIELD_DROP


cdef bint same_folded(const char* a, const char* b, Py_ssize_t n) noexcept nogil:
    """Whether an application server may take the two names for one: X_User, X-User and x.user."""
    cdef Py_ssize_t i
    for i in range(n):
        if cw_fold_name(<uint8_t>a[i]) != cw_fold_name(<uint8_t>b[i]):
            return False
    return True


# Lines of a request that the gateway writes itself and a policy may replace, by name.
cdef enum:
    OWN_FOR = 1
    OWN_PROTO = 1 << 1
    OWN_HOST = 1 << 2
    OWN_FORWARDED = 1 << 3
    OWN_ID = 1 << 4
    OWN_TRACE = 1 << 5
    OWN_VIA = 1 << 6

# Of a WebSocket handshake (RFC 6455 section 4), in both directions.
cdef tuple HANDSHAKE = (b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-accept")

cdef dict OWN_LINES = {b"x-forwarded-for": OWN_FOR, b"x-forwarded-proto": OWN_PROTO, b"x-forwarded-host": OWN_HOST,
                       b"forwarded": OWN_FORWARDED, b"x-request-id": OWN_ID, b"traceparent": OWN_TRACE, b"via": OWN_VIA}


cdef int own_removed(Edits edits, list removed):
    """Which of our own lines the policies of this request replace or take away."""
    cdef int found = 0
    if edits is not None:
        for name in edits.remove:
            found |= <int>OWN_LINES.get(name, 0)
    if removed is not None:
        for name in removed:
            found |= <int>OWN_LINES.get(name, 0)
    return found


cdef void put_principal(cw_out* o, bytes lines, Edits edits, list removed):
    """The identity's lines, but for those that a policy replaces: two values of one identity would be none."""
    if not mentions(lines, None if edits is None else edits.remove) and not mentions(lines, removed):
        put_bytes(o, lines)
        return
    for line in lines.splitlines(keepends=True):
        name = line.partition(b":")[0]
        if (edits is None or name not in edits.remove) and (removed is None or name not in removed):
            put_bytes(o, line)


cdef bint mentions(bytes lines, names):
    if names is not None:
        for name in names:
            if name in lines:
                return True
    return False


cdef void put_edits(cw_out* o, Edits edits, list lines):
    if edits is not None:
        put_bytes(o, edits.add)
    if lines is not None:
        for line in lines:
            put_bytes(o, <bytes?>line)


cdef void drop_edited(Head* head, Edits edits, list removed):
    if edits is not None and edits.remove:
        drop_named(head, edits.remove)
    if removed is not None:
        drop_named(head, removed)


# -- the request ------------------------------------------------------------------------------------------------------

cdef void put_path(cw_out* o, Exchange x):
    """The path that was matched, or what the route's rewrite makes of it, then the query, untouched."""
    cdef const char* path = x.path()
    cdef int i
    if x.route.rewrite_path is not None:
        for part in x.route.rewrite_path:
            if type(part) is bytes:
                put_bytes(o, <bytes>part)
            else:
                i = part
                cw_put(o, path + x.match.param_at[i], x.match.param_len[i])
    elif x.route.rewrite_prefix is not None:
        # prefix_len leaves the rest empty or with its slash; the new prefix ends without one.
        put_bytes(o, x.route.rewrite_prefix)
        if x.path_len == x.match.prefix_len and PyBytes_GET_SIZE(x.route.rewrite_prefix) == 0:
            cw_lit(o, b"/")
        cw_put(o, path + x.match.prefix_len, x.path_len - x.match.prefix_len)
    else:
        cw_put(o, path, x.path_len)
    if x.head.has_query:
        cw_lit(o, b"?")
        cw_put(o, x.head.base + x.head.query_at, x.head.query_len)


cdef void put_host(cw_out* o, Exchange x) noexcept:
    cw_lit(o, b"host: ")
    if x.route.rewrite_host is not None:
        put_bytes(o, x.route.rewrite_host)
    elif x.upstream.host_mode == HOST_PRESERVE and x.head.host_len:
        cw_put(o, x.head.base + x.head.host_at, x.head.host_len)
    elif x.upstream.host_mode == HOST_LITERAL:
        put_bytes(o, x.upstream.host_literal)
    else:
        put_bytes(o, x.endpoint.host_field)
    cw_lit(o, b"\r\n")


cdef void put_received(cw_out* o, Exchange x, int known, const char* prefix) noexcept:
    """`prefix`, then the values of all received fields of that name, each followed by a comma and a space."""
    cdef int i = x.head.first[known]
    cw_lit_name(o, prefix)
    if not x.trusted:
        return
    while 0 <= i < x.head.count:
        if x.head.fields[i].id == known and x.head.fields[i].value_len:
            cw_put(o, x.head.base + x.head.fields[i].value, x.head.fields[i].value_len)
            cw_lit(o, b", ")
        i += 1


cdef inline void cw_lit_name(cw_out* o, const char* text) noexcept:
    cw_put(o, text, strlen(text))


cdef void put_single(cw_out* o, Exchange x, int known, const char* name, const char* own, int length) noexcept:
    """A field that a trusted proxy's value keeps, else `own`."""
    cdef int i = x.head.first[known]
    cw_lit_name(o, name)
    if x.trusted and i >= 0:
        cw_put(o, x.head.base + x.head.fields[i].value, x.head.fields[i].value_len)
    else:
        cw_put(o, own, length)
    cw_lit(o, b"\r\n")


cdef void put_identity(cw_out* o, Exchange x, int without) noexcept:
    """Who sent it, how, to which host: RFC 7239 and its X- forerunners, then the ids; all but the lines in `without`."""
    cdef const char* host = x.head.base + x.head.host_at
    if without == 0 and not x.trusted:
        cw_put_client(o, x.peer_text, x.peer_len, host, x.head.host_len, x.secure, x.http2, x.request_id, x.trace)
        return
    if not without & OWN_FOR:
        put_received(o, x, F_X_FORWARDED_FOR, b"x-forwarded-for: ")
        cw_put(o, x.peer_text, x.peer_len)
        cw_lit(o, b"\r\n")
    if not without & OWN_PROTO:
        if x.secure:
            put_single(o, x, F_X_FORWARDED_PROTO, b"x-forwarded-proto: ", b"https", 5)
        else:
            put_single(o, x, F_X_FORWARDED_PROTO, b"x-forwarded-proto: ", b"http", 4)
    if x.head.host_len and not without & OWN_HOST:
        put_single(o, x, F_X_FORWARDED_HOST, b"x-forwarded-host: ", host, x.head.host_len)
    if not without & OWN_FORWARDED:
        put_forwarded(o, x, host)
    if not without & OWN_ID:
        cw_lit(o, b"x-request-id: ")
        cw_put(o, x.request_id, 36)
        cw_lit(o, b"\r\n")
    if not without & OWN_TRACE:
        cw_lit(o, b"traceparent: ")
        cw_put(o, x.trace, 55)
        cw_lit(o, b"\r\n")
    if not without & OWN_VIA:
        cw_lit_name(o, b"via: 2 crossway\r\n" if x.http2 else b"via: 1.1 crossway\r\n")


cdef void put_forwarded(cw_out* o, Exchange x, const char* host) noexcept:
    put_received(o, x, F_FORWARDED, b"forwarded: ")
    if is_v6(x):
        cw_lit(o, b"for=\"[")
        cw_put(o, x.peer_text, x.peer_len)
        cw_lit(o, b"]\"")
    else:
        cw_lit(o, b"for=")
        cw_put(o, x.peer_text, x.peer_len)
    if x.head.host_len:
        cw_lit(o, b";host=\"")
        cw_put(o, host, x.head.host_len)
        cw_lit(o, b"\"")
    if x.secure:
        cw_lit(o, b";proto=https\r\n")
    else:
        cw_lit(o, b";proto=http\r\n")


cdef bint trace_continued(Exchange x) noexcept:
    """Whether the trace is the received one: what travels with it means nothing in another (W3C trace context 3.3)."""
    cdef int i = x.head.first[F_TRACEPARENT]
    return x.trusted and i >= 0 and x.head.fields[i].value_len >= 55 and \
        memcmp(x.head.base + x.head.fields[i].value + 3, x.trace + 3, 32) == 0


cdef inline bint is_v6(Exchange x) noexcept:
    cdef int i
    for i in range(x.peer_len):
        if x.peer_text[i] == 58:
            return True
    return False


cdef void put_grpc_timeout(cw_out* o, int64_t ms) noexcept nogil:
    """In the smallest unit in which it has eight digits: a service refuses a call with more."""
    cw_lit(o, b"grpc-timeout: ")
    if ms <= 99999999:
        put_number(o, ms)
        cw_lit(o, b"m\r\n")
    elif ms // 1000 <= 99999999:
        put_number(o, ms // 1000)
        cw_lit(o, b"S\r\n")
    else:
        put_number(o, min(ms // 3600000, <int64_t>99999999))
        cw_lit(o, b"H\r\n")


cdef void put_deadline(cw_out* o, Exchange x, int64_t now) noexcept:
    """How long the next hop may take, and how often it may try again: so that layers do not wait and retry on top of each other."""
    cdef int64_t left = (x.total_at - now) // 1000
    if x.total_at:
        if x.web is not None or is_grpc(x.head):
            put_grpc_timeout(o, left if left > 0 else 0)
        if not x.upstream.foreign:
            cw_lit(o, b"x-crossway-deadline-ms: ")
            put_number(o, left if left > 0 else 0)
            cw_lit(o, b"\r\n")
    if x.upstream.foreign:
        return
    cw_lit(o, b"x-crossway-attempts-left: ")
    put_number(o, x.attempts - x.tries if x.attempts > x.tries else 0)
    cw_lit(o, b"\r\n")


cdef void put_web_type(cw_out* o, Exchange x, const Head* answer) noexcept:
    """The content type of a translated message: of the request when `answer` is NULL."""
    cdef const Head* head = x.head if answer == NULL else answer
    cdef int i = head.first[F_CONTENT_TYPE]
    cdef const char* value = b""
    cdef uint32_t size = 0
    cdef char made[WEB_TYPE_MAX]
    if i >= 0:
        value, size = head.base + head.fields[i].value, head.fields[i].value_len
    size = web_request_type(value, size, made) if answer == NULL else web_answer_type(x.web.wants_text, value, size, made)
    cw_lit(o, b"content-type: ")
    cw_put(o, made, size)
    cw_lit(o, b"\r\n")


cdef void put_handshake_method(cw_out* o, Exchange x) noexcept:
    """Over HTTP/2 it is an extended CONNECT (RFC 8441 4); hpack_request() says for which protocol."""
    if x.upstream.protocol == PROTOCOL_HTTP1:
        cw_lit(o, b"GET")
    else:
        cw_lit(o, b"CONNECT")


cdef void put_handshake(cw_out* o, Exchange x) noexcept:
    """Written anew: neither Connection nor an edit can take a part of it away. In HTTP/2 the stream stands for the key's proof (RFC 8441 5)."""
    if x.upstream.protocol != PROTOCOL_HTTP1:
        cw_lit(o, b"sec-websocket-version: 13\r\n")
        return
    cw_lit(o, b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: ")
    cw_put(o, x.websocket_key, 24)
    cw_lit(o, b"\r\n")


cdef int compose_request(Exchange x, char* out, int room, int64_t now) except -2:
    cdef Head* head = x.head
    cdef cw_out o
    cdef bint traced = trace_continued(x)
    cdef int i
    o.at = out
    o.end = out + room
    o.short_ = False
    head_mark_hop_by_hop(head)
    for i in range(head.count):
        # Ours replace them, or extend what a trusted proxy said, which put_identity() copies.
        if (head.fields[i].flags & FIELD_IDENTITY) or head.fields[i].id in (F_HOST, F_X_REQUEST_ID, F_TRACEPARENT, F_CROSSWAY_DEADLINE,
                                                                               F_CROSSWAY_ATTEMPTS):
            head.fields[i].flags |= FIELD_DROP
        elif (head.fields[i].id == F_TRACESTATE and not traced) or (head.fields[i].id == F_BAGGAGE and not x.trusted):
            head.fields[i].flags |= FIELD_DROP
        elif head.fields[i].id == F_GRPC_TIMEOUT and x.total_at and (x.web is not None or is_grpc(head)):
            head.fields[i].flags |= FIELD_DROP
        elif x.web is not None and head.fields[i].id == F_CONTENT_TYPE:
            head.fields[i].flags |= FIELD_DROP
        elif head.fields[i].id == F_AUTHORIZATION and x.route.strip_authorization:
            head.fields[i].flags |= FIELD_DROP
        elif head.fields[i].id == F_EXPECT and (x.collected is not None or not head.expect or x.upgrade):
            head.fields[i].flags |= FIELD_DROP
    if x.snapshot.identity_names:
        drop_folded(head, x.snapshot.identity_names)
    if x.route.request_edits is not None:
        drop_folded(head, x.route.request_edits.remove)
    if x.request_removed is not None:
        drop_folded(head, tuple(x.request_removed))
    if x.upgrade:
        drop_folded(head, HANDSHAKE)
        put_handshake_method(&o, x)
    else:
        cw_put(&o, head.base + head.method_at, head.method_len)
    cw_lit(&o, b" ")
    put_path(&o, x)
    cw_lit(&o, b" HTTP/1.1\r\n")
    put_host(&o, x)
    put_fields(&o, head)
    put_identity(&o, x, own_removed(x.route.request_edits, x.request_removed))
    if x.certificate is not None and x.listener.tls is not None and x.listener.tls.forward_certificate:
        put_principal(&o, x.certificate.fields(), x.route.request_edits, x.request_removed)
    if x.principal is not None:
        put_principal(&o, x.principal.headers, x.route.request_edits, x.request_removed)
    if x.web is not None:
        put_web_type(&o, x, NULL)
    if x.route.request_edits is not None or x.request_set is not None:
        put_edits(&o, x.route.request_edits, x.request_set)
    if x.collected is not None and x.body.out != BODY_NONE:
        # Whatever its framing was: all of it is here, and goes out in one piece.
        cw_lit(&o, b"content-length: ")
        put_number(&o, len(x.collected))
        cw_lit(&o, b"\r\n")
    elif x.body.out == BODY_LENGTH:
        cw_lit(&o, b"content-length: ")
        put_number(&o, <uint64_t>x.body.remaining + x.body.bytes)       # `bytes` of it went to an attempt before this one
        cw_lit(&o, b"\r\n")
    elif x.body.out == BODY_CHUNKED:
        cw_lit(&o, b"transfer-encoding: chunked\r\n")
    if x.upgrade:
        put_handshake(&o, x)
    put_deadline(&o, x, now)
    cw_lit(&o, b"\r\n")
    return -1 if o.short_ else <int>(o.at - out)


# -- answers ----------------------------------------------------------------------------------------------------------

cdef void put_status(cw_out* o, int status) noexcept nogil:
    cdef const char* reason = cw_reason(status)
    cw_lit(o, b"HTTP/1.1 ")
    put_number(o, status)
    cw_lit(o, b" ")
    cw_put(o, reason, strlen(reason))
    cw_lit(o, b"\r\n")


cdef void put_received_status(cw_out* o, const Head* head) noexcept nogil:
    cdef char line[13]
    memcpy(line, b"HTTP/1.1 ", 9)
    line[9] = <char>(48 + head.status // 100)       # the parser takes three digits, 100 to 599
    line[10] = <char>(48 + head.status // 10 % 10)
    line[11] = <char>(48 + head.status % 10)
    line[12] = 32
    cw_put(o, line, 13)
    cw_put(o, head.base + head.reason_at, head.reason_len)
    cw_lit(o, b"\r\n")


cdef int compose_answer(Exchange x, Head* head, char* out, int room) except -2:
    cdef cw_out o
    o.at = out
    o.end = out + room
    o.short_ = False
    head_mark_hop_by_hop(head)
    if head.first[F_X_REQUEST_ID] >= 0:
        drop_named(head, (b"x-request-id",))
    if head.first[F_CROSSWAY_ATTEMPTS] >= 0 and not x.trusted:
        drop_named(head, (b"x-crossway-attempts-left",))
    if x.web is not None and x.web.translating:
        drop_named(head, (b"content-type",))
    if x.route.response_edits is not None or x.response_removed is not None:
        drop_edited(head, x.route.response_edits, x.response_removed)
    put_received_status(&o, head)
    put_fields(&o, head)
    if x.web is not None and x.web.translating:
        put_web_type(&o, x, head)
    cw_lit(&o, b"x-request-id: ")
    cw_put(&o, x.request_id, 36)
    cw_lit(&o, b"\r\n")
    put_bytes(&o, x.answer_headers)
    if x.route.response_edits is not None or x.response_set is not None:
        put_edits(&o, x.route.response_edits, x.response_set)
    if x.answer.out == BODY_LENGTH or (x.answer.out == BODY_NONE and head.content_length >= 0 and
                                       (x.head.method == M_HEAD or head.status == 304)):
        cw_lit(&o, b"content-length: ")
        put_number(&o, head.content_length)
        cw_lit(&o, b"\r\n")
    elif x.answer.out == BODY_CHUNKED:
        cw_lit(&o, b"transfer-encoding: chunked\r\n")
    if not x.keep_alive:
        cw_lit(&o, b"connection: close\r\n")
    elif x.head.minor == 0:
        cw_lit(&o, b"connection: keep-alive\r\n")
    cw_lit(&o, b"\r\n")
    return -1 if o.short_ else <int>(o.at - out)


cdef int compose_switch(Exchange x, Head* head, bytes accept, char* out, int room) except -2:
    cdef cw_out o
    o.at = out
    o.end = out + room
    o.short_ = False
    head_mark_hop_by_hop(head)
    drop_folded(head, HANDSHAKE)
    if head.first[F_X_REQUEST_ID] >= 0:
        drop_named(head, (b"x-request-id",))
    drop_edited(head, x.route.response_edits, x.response_removed)
    cw_lit(&o, b"HTTP/1.1 101 Switching Protocols\r\n")
    put_fields(&o, head)
    cw_lit(&o, b"x-request-id: ")
    cw_put(&o, x.request_id, 36)
    cw_lit(&o, b"\r\n")
    put_bytes(&o, x.answer_headers)
    put_edits(&o, x.route.response_edits, x.response_set)
    cw_lit(&o, b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: ")
    put_bytes(&o, accept)
    cw_lit(&o, b"\r\n\r\n")
    return -1 if o.short_ else <int>(o.at - out)


cdef int compose_informational(Head* head, char* out, int room) noexcept:
    """A 1xx answer as it came, without hop-by-hop fields."""
    cdef cw_out o
    o.at = out
    o.end = out + room
    o.short_ = False
    head_mark_hop_by_hop(head)
    put_received_status(&o, head)
    put_fields(&o, head)
    cw_lit(&o, b"\r\n")
    return -1 if o.short_ else <int>(o.at - out)


cdef bytes problem(Exchange x):
    """The problem+json body (RFC 9457 section 3). slug and detail are ours or checked: no quotes, no control bytes."""
    reason = cw_reason(x.status)
    return (b'{"type":"urn:crossway:problem:' + x.slug + b'","title":"' + reason + b'","status":' + str(x.status).encode() +
            b',"detail":"' + x.detail + b'","request_id":"' + x.request_id[:36] + b'"}\n')


cdef int grpc_reply(Exchange x, cw_out* o, bint keep_alive) except -2:
    """A refusal as gRPC has it: a head that is all of the answer ("Trailers-Only"). `detail` holds no %, so it is encoded already."""
    cdef char* from_ = o.at
    put_status(o, 200)
    if x.web is None:
        cw_lit(o, b"content-type: application/grpc\r\ngrpc-status: ")
    else:                                       # over HTTP/1.1 as well, where the end is to be said
        cw_lit_name(o, b"content-type: application/grpc-web-text+proto" if x.web.wants_text else
                    b"content-type: application/grpc-web+proto")
        cw_lit(o, b"\r\ncontent-length: 0\r\n")
        if not keep_alive:
            cw_lit(o, b"connection: close\r\n")
        cw_lit(o, b"grpc-status: ")
    put_number(o, grpc_code(x.status))
    cw_lit(o, b"\r\ngrpc-message: ")
    if x.reply_body is None:
        put_bytes(o, x.detail)
    else:
        cw_lit_name(o, cw_reason(x.status))
    cw_lit(o, b"\r\nx-request-id: ")
    cw_put(o, x.request_id, 36)
    cw_lit(o, b"\r\n")
    put_bytes(o, x.reply_headers)
    put_bytes(o, x.answer_headers)
    cw_lit(o, b"\r\n")
    return -1 if o.short_ else <int>(o.at - from_)


cdef int compose_reply(Exchange x, char* out, int room, bint keep_alive) except -2:
    cdef cw_out o
    cdef bytes body = x.reply_body
    cdef bint bodiless = x.status == 204 or x.status == 304
    o.at = out
    o.end = out + room
    o.short_ = False
    if (x.grpc or x.web is not None) and x.status >= 400:
        return grpc_reply(x, &o, keep_alive)
    if body is None:
        body = problem(x)
    put_status(&o, x.status)
    if not bodiless and x.reply_body is None:
        cw_lit(&o, b"content-type: application/problem+json\r\ncache-control: no-store\r\n")
    elif not bodiless and x.reply_type is not None:
        cw_lit(&o, b"content-type: ")
        put_bytes(&o, x.reply_type)
        cw_lit(&o, b"\r\n")
    if not bodiless:
        cw_lit(&o, b"content-length: ")
        put_number(&o, PyBytes_GET_SIZE(body))
        cw_lit(&o, b"\r\n")
    cw_lit(&o, b"x-request-id: ")
    cw_put(&o, x.request_id, 36)
    cw_lit(&o, b"\r\n")
    put_bytes(&o, x.reply_headers)
    put_bytes(&o, x.answer_headers)
    if x.status == 426:
        cw_lit(&o, b"connection: upgrade, close\r\n" if not keep_alive else b"connection: upgrade\r\n")      # RFC 9110 7.8
    elif not keep_alive:
        cw_lit(&o, b"connection: close\r\n")
    elif x.head.minor == 0:
        cw_lit(&o, b"connection: keep-alive\r\n")
    cw_lit(&o, b"\r\n")
    if not bodiless and x.head.method != M_HEAD:
        put_bytes(&o, body)
    return -1 if o.short_ else <int>(o.at - out)
