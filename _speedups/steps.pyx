"""The built-in policies as compiled steps.

Strategy: a step is made once per route and snapshot from its settings; run() looks at C fields and returns. What needs Python
(a token that is not in the cache) is parked. Python is called from here: per parked request, and for refusals' texts.

Safety: bytes of a request are read through Head offsets of the exchange that is passed in, within the call only.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset, strlen
from gateway._speedups.exchange cimport *
from gateway._speedups.headers cimport *
from gateway._speedups.histogram cimport (
    C_AUDIT_LOST, C_AUDIT_RECORDS, C_LIMITED, C_LIMIT_TABLE_FULL, C_TOKEN_HITS, C_TOKEN_MISSES, C_TOKEN_REFUSED,
)
from gateway._speedups.journal cimport Journal, json_escape, put_timestamp
from gateway._speedups.sockets cimport cw_monotonic_us
from gateway._speedups.token_bucket cimport Decision, RateLimit
from gateway._speedups.token_cache cimport Principal, TokenCache
from gateway._speedups.wire cimport cw_equals_folded, cw_put_decimal

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* length) except NULL
    bint PyUnicode_IS_COMPACT_ASCII(object text) noexcept
    void* PyUnicode_1BYTE_DATA(object text) noexcept
    Py_ssize_t PyUnicode_GET_LENGTH(object text) noexcept

import hashlib
import hmac
import logging

log = logging.getLogger("crossway.policies")


cdef bint alone(Exchange x, int index) noexcept:
    """Whether no other field has the name of field `index`."""
    cdef Head* head = x.head
    cdef Field* field = &head.fields[index]
    cdef int i
    for i in range(index + 1, head.count):
        if field.id != F_OTHER:
            if head.fields[i].id == field.id:
                return False
        elif head.fields[i].name_len == field.name_len:
            # The other is compared with a lower-case copy on the slow path only: same length and unknown is rare.
            if (head.base[head.fields[i].name:head.fields[i].name + field.name_len]).lower() == \
                    (head.base[field.name:field.name + field.name_len]).lower():
                return False
    return True


cdef class JwtStep(Step):
    """Bearer token -> principal (RFC 6750 2.1). Verified tokens come from the cache; others are verified in the slow lane."""

    cdef TokenCache cache
    cdef object verifier
    cdef bytes challenge

    def __init__(self, str name, verifier, TokenCache cache not None, str realm="crossway"):
        self.phase = PHASE_IDENTIFY
        self.name = name
        self.verifier = verifier
        self.cache = cache
        self.challenge = b'www-authenticate: Bearer realm="' + realm.encode("ascii") + b'"'

    cdef int run(self, Exchange x) except -1:
        cdef Head* head = x.head
        cdef int i = head.first[F_AUTHORIZATION]
        cdef Field* field
        cdef Principal principal
        if i < 0:
            x.refuse(401, b"token-missing", b"a bearer token is required")
            x.reply_headers = self.challenge + b"\r\n"
            return STEP_ANSWERED
        field = &head.fields[i]
        if field.value_len < 8 or not cw_equals_folded(head.base + field.value, b"bearer ", 7) or not alone(x, i):
            return self.refused(x, b"token-malformed", b"exactly one Authorization field with a Bearer token is required")
        principal = self.cache.get(head.base + field.value + 7, field.value_len - 7, x.wall // 1000000)
        if principal is not None:
            x.slot.counters[C_TOKEN_HITS] += 1
            x.principal = principal
            return STEP_GO
        return STEP_PARK

    cdef bytes token(self, Exchange x):
        cdef Field* field = &x.head.fields[x.head.first[F_AUTHORIZATION]]
        return PyBytes_FromStringAndSize(x.head.base + field.value + 7, field.value_len - 7)

    cdef object park(self, Exchange x):
        cdef bytes token = self.token(x)
        found = self.verifier.check(token)
        if not isinstance(found, Principal):
            return self.later(token, found)
        self.cache.put(token, found)
        return found

    async def later(self, bytes token, found):
        """The key has to be fetched first. What is verified then is remembered in the same turn of the loop: had the keys
        changed between the two, the cache would keep a token of a removed key."""
        principal = await found
        self.cache.put(token, principal)
        return principal

    cdef int resumed(self, Exchange x, object result) except -1:
        x.principal = <Principal?>result
        x.slot.counters[C_TOKEN_MISSES] += 1
        return STEP_GO

    cdef int failed(self, Exchange x, object error) except -1:
        reason = getattr(error, "reason", None)
        if reason is None:
            # The type only: an exception's text may quote the token.
            log.error("token verification failed unexpectedly", extra={"policy": self.name, "error": type(error).__name__})
            return self.refused(x, b"token-invalid", b"the token cannot be verified")
        return self.refused(x, reason.encode("ascii", "replace"), error.description.encode("ascii", "replace"))

    cdef int refused(self, Exchange x, bytes slug, bytes detail) except -1:
        x.slot.counters[C_TOKEN_REFUSED] += 1
        x.refuse(401, slug, detail)
        x.reply_headers = self.challenge + b', error="invalid_token", error_description="' + detail + b'"\r\n'
        return STEP_ANSWERED


cdef class ApiKeyStep(Step):
    """A key in a header -> principal. `keys` maps SHA-256 digests (32 bytes) to principals; digests are compared in constant time."""

    cdef TokenCache cache
    cdef bytes header, challenge
    cdef tuple keys

    def __init__(self, str name, str header, keys, TokenCache cache not None):
        self.phase = PHASE_IDENTIFY
        self.name = name
        self.header = header.lower().encode("ascii")
        # No scheme is registered for keys in a header, but RFC 9110 15.5.2 wants a challenge in every 401.
        self.challenge = b'www-authenticate: ApiKey header="' + self.header + b'"\r\n'
        self.keys = tuple(keys)
        self.cache = cache

    cdef int run(self, Exchange x) except -1:
        cdef int i = head_find(x.head, self.header, PyBytes_GET_SIZE(self.header), 0)
        cdef Field* field
        cdef Principal principal
        if i < 0:
            return self.refused(x, b"key-missing", b"an API key is required")
        field = &x.head.fields[i]
        if field.value_len == 0 or field.value_len > 512 or \
                head_find(x.head, self.header, PyBytes_GET_SIZE(self.header), i + 1) >= 0:
            return self.refused(x, b"key-malformed", b"exactly one API key is required")
        principal = self.cache.get(x.head.base + field.value, field.value_len, x.wall // 1000000)
        if principal is None:
            principal = self.lookup(x.head.base[field.value:field.value + field.value_len])
            if principal is None:
                return self.refused(x, b"key-invalid", b"the API key is not known")
        if x.principal is None:
            x.principal = principal
        return STEP_GO

    cdef int refused(self, Exchange x, bytes slug, bytes detail) except -1:
        x.refuse(401, slug, detail)
        x.reply_headers = self.challenge
        return STEP_ANSWERED

    cdef Principal lookup(self, bytes key):
        digest = hashlib.sha256(key).digest()
        found = None
        for known, principal in self.keys:          # all of them, whichever matches
            if hmac.compare_digest(known, digest):
                found = principal
        if found is not None:
            self.cache.put(key, found)
        return found


cdef int unidentified(Exchange x) except -1:
    """Nobody said who calls: a hook was expected to, or the policy that does so let the request pass."""
    x.refuse(401, b"unauthenticated", b"the caller is not identified")
    x.reply_headers = b"www-authenticate: Bearer\r\n"
    return STEP_ANSWERED


cdef class ScopesStep(Step):
    """All of these scopes (RFC 6750 3.1 insufficient_scope)."""

    cdef tuple required
    cdef bytes challenge

    def __init__(self, str name, required):
        self.phase = PHASE_AUTHORISE
        self.name = name
        self.required = tuple(required)
        self.challenge = (b'www-authenticate: Bearer error="insufficient_scope", scope="' +
                          " ".join(required).encode("ascii") + b'"\r\n')

    cdef int run(self, Exchange x) except -1:
        cdef str scope
        if x.principal is None:
            return unidentified(x)
        for scope in self.required:
            if scope not in <frozenset>x.principal.scopes:
                x.refuse(403, b"insufficient-scope", b"the caller lacks the scope " + scope.encode("ascii"))
                x.reply_headers = self.challenge
                return STEP_ANSWERED
        return STEP_GO


cdef class ClaimsStep(Step):
    """Each claim has one of the allowed values, of the same type; a claim that is a list has one of them in it."""

    cdef tuple required

    def __init__(self, str name, required):
        self.phase = PHASE_AUTHORISE
        self.name = name
        self.required = tuple((claim, frozenset((type(value), value) for value in allowed)) for claim, allowed in required.items())

    cdef int run(self, Exchange x) except -1:
        if x.principal is None:
            return unidentified(x)
        for claim, allowed in self.required:
            value = x.principal.claims.get(claim)
            values = value if isinstance(value, (tuple, list)) else (value,)
            if not any(isinstance(each, (str, int, float)) and (type(each), each) in allowed for each in values):
                return x.refuse(403, b"claim-not-allowed", b"the claim " + ascii_name(claim) + b" does not allow this call")
        return STEP_GO


cdef bytes ascii_name(str text):
    """A configured name, made safe for a JSON string and a header."""
    return text.encode("ascii", "replace").replace(b'"', b"'").replace(b"\\", b"/")


cdef class IpStep(Step):
    """Client address against networks: denied ones never, and with `allow` only those."""

    cdef Networks allow, deny

    def __init__(self, str name, allow=(), deny=()):
        self.phase = PHASE_AUTHORISE
        self.name = name
        self.allow = Networks(allow)
        self.deny = Networks(deny)

    cdef int run(self, Exchange x) except -1:
        if self.deny.contains(x.client) or (self.allow.count and not self.allow.contains(x.client)):
            return x.refuse(403, b"address-not-allowed", b"this address may not call")
        return STEP_GO


cdef class HeadLimitsStep(Step):
    """The request's head against bounds of its route; 0 is no bound. The listener's own were kept while it was read."""

    cdef uint32_t head, fields

    def __init__(self, str name, *, uint32_t head=0, uint32_t fields=0):
        self.phase = PHASE_LIMIT
        self.name = name
        self.head = head
        self.fields = fields

    cdef int run(self, Exchange x) except -1:
        if self.head and x.head.length > self.head:
            x.keep_alive = False
            return x.refuse(431, b"head-too-large", b"the message head is larger than the limit")
        if self.fields and x.head.count > self.fields:
            x.keep_alive = False
            return x.refuse(431, b"too-many-fields", b"there are more header fields than the limit")
        return STEP_GO


cdef class RateLimitStep(Step):
    """A token bucket per key, exact over all workers; reserved before anything is forwarded.

    Every answer carries RateLimit-Policy and RateLimit (draft-ietf-httpapi-ratelimit-headers), a 429 Retry-After.
    """

    def __init__(self, str name, RateLimit rate not None, str key, *, int window, str label):
        self.phase = PHASE_LIMIT
        self.name = name
        self.rate = rate
        self.kind = {"client": KEY_CLIENT, "ip": KEY_IP, "route": KEY_ROUTE}.get(key, KEY_HEADER)
        self.header = key[7:].lower().encode("ascii") if self.kind == KEY_HEADER else b""
        self.quoted = b'"' + ascii_name(label) + b'"'
        self.policy = b"ratelimit-policy: " + self.quoted + b";q=%d;w=%d\r\n" % (rate.limit.burst, window)
        self.route_key = 1

    cdef uint64_t key(self, Exchange x) noexcept:
        cdef int i
        cdef size_t length = 16
        if self.kind == KEY_ROUTE:
            return x.buckets.hash_key(b"route", 5)
        if self.kind == KEY_CLIENT and x.principal is not None:
            return x.principal.key
        if self.kind == KEY_HEADER:
            i = head_find(x.head, PyBytes_AS_STRING(self.header), PyBytes_GET_SIZE(self.header), 0)
            if i >= 0:
                return x.buckets.hash_key(x.head.base + x.head.fields[i].value, x.head.fields[i].value_len)
        # One IPv6 customer has a /64: its addresses count as one.
        if not (x.client[10] == 0xff and x.client[11] == 0xff and memcmp(x.client, b"\0\0\0\0\0\0\0\0\0\0", 10) == 0):
            length = 8
        return x.buckets.hash_key(<const char*>x.client, length)

    cdef int run(self, Exchange x) except -1:
        return self.take(x)

    cdef int take(self, Exchange x) except -1:
        """Counts the request in this machine's shared memory."""
        cdef Decision decision
        cdef int admitted = x.buckets.take(&self.rate.limit, self.key(x), <uint64_t>x.started, &decision)
        if admitted == 1:
            x.add_answer_header(self.line(decision.remaining, (decision.reset_us + 999999) // 1000000))
            return STEP_GO
        if admitted < 0:
            # Every place that could count this caller is taken: admitting without counting would break the limit.
            x.slot.counters[C_LIMIT_TABLE_FULL] += 1
            return self.unavailable(x)
        return self.refuse(x, decision.retry_after_us)

    cdef int refuse(self, Exchange x, int64_t wait_us) except -1:
        cdef int64_t wait = (wait_us + 999999) // 1000000
        x.slot.counters[C_LIMITED] += 1
        x.add_answer_header(self.line(0, wait))
        x.refuse(429, b"rate-limited", b"too many requests; the request was not sent")
        x.reply_headers = b"retry-after: %d\r\n" % (wait if wait > 0 else 1)
        return STEP_ANSWERED

    cdef int unavailable(self, Exchange x) except -1:
        x.refuse(503, b"limit-unavailable", b"the rate limit cannot be checked now; the request was not sent")
        x.reply_headers = b"retry-after: 1\r\n"
        return STEP_ANSWERED

    cdef bytes line(self, int64_t remaining, int64_t seconds):
        """The two RateLimit fields; assembled in one buffer because every answer has them."""
        cdef char out[512]
        cdef Py_ssize_t n = PyBytes_GET_SIZE(self.policy)
        cdef Py_ssize_t q = PyBytes_GET_SIZE(self.quoted)
        if n + q + 80 > <Py_ssize_t>sizeof(out):
            return self.policy
        memcpy(out, PyBytes_AS_STRING(self.policy), n)
        memcpy(out + n, b"ratelimit: ", 11)
        n += 11
        memcpy(out + n, PyBytes_AS_STRING(self.quoted), q)
        n += q
        memcpy(out + n, b";r=", 3)
        n += 3
        n += cw_put_decimal(out + n, <uint64_t>(remaining if remaining > 0 else 0))
        memcpy(out + n, b";t=", 3)
        n += 3
        n += cw_put_decimal(out + n, <uint64_t>(seconds if seconds > 0 else 0))
        memcpy(out + n, b"\r\n", 2)
        return PyBytes_FromStringAndSize(out, n + 2)


cdef class CorsStep(Step):
    """Cross-origin resource sharing (Fetch 3.2): marks answers, and answers preflights itself."""

    cdef frozenset origins
    cdef bint any_origin, credentials
    cdef frozenset methods
    cdef frozenset headers
    cdef bytes preflight, exposed

    def __init__(self, str name, origins, methods, headers, expose, bint credentials, int max_age):
        self.phase = PHASE_IDENTIFY
        self.name = name
        self.any_origin = "*" in origins
        self.origins = frozenset(origin.encode("ascii") for origin in origins)
        self.credentials = credentials
        self.methods = frozenset(method.encode("ascii") for method in methods)
        self.preflight = b"access-control-allow-methods: " + ", ".join(methods).encode("ascii") + b"\r\n"
        if headers:
            self.preflight += b"access-control-allow-headers: " + ", ".join(headers).encode("ascii") + b"\r\n"
        self.preflight += b"access-control-max-age: %d\r\n" % max_age
        self.exposed = b"access-control-expose-headers: " + ", ".join(expose).encode("ascii") + b"\r\n" if expose else b""

    cdef int run(self, Exchange x) except -1:
        cdef bytes origin = x.field(F_ORIGIN)
        cdef bytes lines
        if origin is None or (not self.any_origin and origin.lower() not in self.origins):
            if not self.any_origin:             # a cache must not give this answer to an allowed origin
                x.add_answer_header(b"vary: origin\r\n")
            if origin is not None and x.head.method == M_OPTIONS and x.head.first[F_ACR_METHOD] >= 0:
                return x.refuse(403, b"origin-not-allowed", b"this origin may not call")
            if origin is not None and x.upgrade:        # no browser asks before it, and none hides what comes back (RFC 6455 10.2)
                return x.refuse(403, b"origin-not-allowed", b"this origin may not open a WebSocket here")
            return STEP_GO
        lines = b"access-control-allow-origin: *\r\n" if self.any_origin else \
            b"access-control-allow-origin: " + origin + b"\r\nvary: origin\r\n"
        if self.credentials:
            lines += b"access-control-allow-credentials: true\r\n"
        if x.head.method == M_OPTIONS and x.head.first[F_ACR_METHOD] >= 0:
            x.answer_headers = None
            return x.respond(204, lines + self.preflight, b"", None)
        x.add_answer_header(lines + self.exposed)
        return STEP_GO


# -- audit ------------------------------------------------------------------------------------------------------------

cdef enum:
    LINE_MAX = 32768        # a record; the path is cut to PATH_MAX before escaping, which makes it six times as long at worst
    PATH_MAX = 1024

AUDIT_FIELDS = ("time", "worker", "seq", "id", "client", "subject", "issuer", "method", "host", "path", "route", "upstream", "status",
                "outcome", "reason", "origin", "duration", "bytes_in", "bytes_out", "trace", "certificate", "thumbprint")

cdef dict FIELD_BITS = {name: 1 << i for i, name in enumerate(AUDIT_FIELDS)}

cdef enum:                      # the order of AUDIT_FIELDS
    A_TIME = 1
    A_WORKER = 1 << 1
    A_SEQ = 1 << 2
    A_ID = 1 << 3
    A_CLIENT = 1 << 4
    A_SUBJECT = 1 << 5
    A_ISSUER = 1 << 6
    A_METHOD = 1 << 7
    A_HOST = 1 << 8
    A_PATH = 1 << 9
    A_ROUTE = 1 << 10
    A_UPSTREAM = 1 << 11
    A_STATUS = 1 << 12
    A_OUTCOME = 1 << 13
    A_REASON = 1 << 14
    A_ORIGIN = 1 << 15
    A_DURATION = 1 << 16
    A_BYTES_IN = 1 << 17
    A_BYTES_OUT = 1 << 18
    A_TRACE = 1 << 19
    A_CERTIFICATE = 1 << 20     # these two only of clients that showed one
    A_THUMBPRINT = 1 << 21


cdef class AuditStep(Step):
    """One JSON line per exchange of the route. It never holds a query, a token, a key or a body."""

    cdef Journal journal
    cdef uint32_t fields

    def __init__(self, str name, Journal journal not None, fields=None):
        self.phase = PHASE_RECORD
        self.name = name
        self.journal = journal
        self.fields = 0
        for field in (AUDIT_FIELDS if fields is None else fields):
            if field not in FIELD_BITS:
                raise ValueError(f"unknown audit field {field!r}")
            self.fields |= <uint32_t>FIELD_BITS[field]

    cdef int record(self, Exchange x, int64_t total_us) except -1:
        cdef char line[LINE_MAX]
        cdef char* p = line
        cdef uint32_t f = self.fields
        cdef Head* head = x.head
        cdef uint32_t path_len = x.path_len if x.path_len < PATH_MAX else PATH_MAX
        p[0] = 123
        p += 1
        if f & A_TIME:
            p = key(p, b'"time":"')
            p += put_timestamp(p, x.wall)
            p = key(p, b'",')
        if f & A_WORKER and self.journal.worker >= 0:
            p = number(p, b'"worker":', <uint64_t>self.journal.worker)
        if f & A_SEQ:
            p = number(p, b'"seq":', self.journal.next_sequence())
        if f & A_ID:
            p = plain(p, b'"id":"', x.request_id, 36)
        if f & A_CLIENT:
            p = maybe(p, b'"client":', None if x.principal is None else x.principal.client)
        if f & A_SUBJECT:
            if x.principal is None or PyBytes_GET_SIZE(x.principal.audit_name) > 1024:
                p = maybe(p, b'"subject":', None if x.principal is None else x.principal.subject)
            else:
                p = key(p, b'"subject":"')
                memcpy(p, PyBytes_AS_STRING(x.principal.audit_name), PyBytes_GET_SIZE(x.principal.audit_name))
                p = key(p + PyBytes_GET_SIZE(x.principal.audit_name), b'",')
        if f & A_ISSUER:
            p = maybe(p, b'"issuer":', None if x.principal is None else x.principal.issuer)
        if f & A_METHOD:
            p = text(p, b'"method":"', head.base + head.method_at, head.method_len)
        if f & A_HOST:
            p = text(p, b'"host":"', head.base + head.host_at, head.host_len if head.host_len < 256 else 256)
        if f & A_PATH:
            p = text(p, b'"path":"', x.path(), path_len)
        if f & A_ROUTE:
            p = maybe(p, b'"route":', x.route.name)
        if f & A_UPSTREAM:
            p = maybe(p, b'"upstream":', None if x.endpoint is None else x.endpoint.address)
        if f & A_STATUS:
            p = number(p, b'"status":', x.status)
        if f & A_OUTCOME:
            p = maybe(p, b'"outcome":', outcome(x))
        if f & A_REASON:
            p = maybe(p, b'"reason":', None if x.slug is None else x.slug.decode("ascii"))
        if f & A_ORIGIN:
            p = text(p, b'"origin":"', x.client_text, x.client_len)
        if f & A_DURATION:
            p = number(p, b'"duration_us":', <uint64_t>total_us)
        if f & A_BYTES_IN:
            p = number(p, b'"bytes_in":', x.body.bytes)
        if f & A_BYTES_OUT:
            p = number(p, b'"bytes_out":', x.answer.bytes)
        if f & A_TRACE:
            p = plain(p, b'"trace":"', x.trace + 3, 32)
        if x.certificate is not None:
            if f & A_CERTIFICATE:
                p = maybe(p, b'"certificate":', x.certificate.leaf.subject)
            if f & A_THUMBPRINT:
                p = maybe(p, b'"thumbprint":', x.certificate.thumbprint)
        if (p - 1)[0] == 44:
            p -= 1
        p[0] = 125
        p += 1
        if self.journal.append(line, p - line):
            x.slot.counters[C_AUDIT_RECORDS] += 1
        else:
            x.slot.counters[C_AUDIT_LOST] += 1
        return 0


cdef str outcome(Exchange x):
    """answered (by the upstream), refused (by a policy), failed (the upstream's or our side), aborted (the client left)."""
    if x.side == SIDE_DOWNSTREAM and x.slug is None:
        return "aborted"
    # Without the client's doing, 499, or an answer that had begun (a tunnel's is 101): the end of a drain, or an error of ours, cut it off.
    if x.side == SIDE_UPSTREAM or x.status == 499 or (x.status == 500 or x.answer_started) and x.side == SIDE_GATEWAY:
        return "failed"
    return "refused" if x.side != SIDE_NONE else "answered"


# The pieces below write into a line whose room was reckoned for the longest values: see LINE_MAX. Fixed parts and numbers take
# less than 1 KiB; method 32 x 6, host 256 x 6, path 1024 x 6, seven names of at most 256 x 6 each, two texts of ours: 22 KiB together.

cdef inline char* key(char* p, const char* literal) noexcept:
    cdef size_t n = strlen(literal)             # a constant: the compiler knows the literal
    memcpy(p, literal, n)
    return p + n


cdef inline char* number(char* p, const char* name, uint64_t value) noexcept:
    p = key(p, name)
    p += cw_put_decimal(p, value)
    p[0] = 44
    return p + 1


cdef inline char* text(char* p, const char* name, const char* value, Py_ssize_t length) noexcept:
    p = key(p, name)
    p += json_escape(p, value, length)
    return key(p, b'",')


cdef inline char* plain(char* p, const char* name, const char* value, Py_ssize_t length) noexcept:
    """Text of hexadecimal digits and '-' only, whoever sent it."""
    p = key(p, name)
    memcpy(p, value, length)
    return key(p + length, b'",')


cdef char* maybe(char* p, const char* name, str value):
    """A string of at most 256 bytes, or null. The UTF-8 form is kept by the str object, so a repeated one costs nothing."""
    cdef Py_ssize_t length = 0
    cdef const char* encoded = NULL
    if value is not None and PyUnicode_IS_COMPACT_ASCII(value):
        encoded = <const char*>PyUnicode_1BYTE_DATA(value)
        length = PyUnicode_GET_LENGTH(value)
    elif value is not None:
        try:
            encoded = PyUnicode_AsUTF8AndSize(value, &length)
        except UnicodeEncodeError:          # a lone surrogate: nothing that could be written
            encoded = NULL
    if encoded == NULL:
        return key(key(p, name), b"null,")
    return text(key(p, name), b'"', encoded, length if length < 256 else 256)
