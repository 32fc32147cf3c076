"""The step of limits that several machines share: it spends leased tokens in C and asks Redis only when there is none.

Strategy: a leased token costs one look into shared memory. Who finds none waits in the slow lane for one round trip, at most
for what is left of the command's time; the next lease is fetched before this one is used up, so that in a steady flow nobody
waits. While Redis is away nothing is asked at all: `on_failure` decides in C.

Python is called from here: once per lease, and per parked request.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize, PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp
from gateway._speedups.exchange cimport PHASE_LIMIT, STEP_ANSWERED, STEP_GO, STEP_PARK, Exchange
from gateway._speedups.headers cimport head_find
from gateway._speedups.histogram cimport (
    C_LIMIT_ALLOWED, C_LIMIT_DENIED, C_LIMIT_LOCAL, C_LIMIT_WAITS, C_LIMIT_WAIT_US, G_LIMIT_WAIT_MAX_US,
)
from gateway._speedups.lease_table cimport LEASE_REFUSED, LEASE_TAKEN, LeaseTable, Spent, leased_key
from gateway._speedups.sockets cimport cw_monotonic_us
from gateway._speedups.steps cimport KEY_CLIENT, KEY_HEADER, KEY_IP, KEY_ROUTE, RateLimitStep, ascii_name
from gateway._speedups.token_bucket cimport RateLimit

cdef enum:
    ON_LOCAL = 0
    ON_DENY
    ON_ALLOW


cdef class Switch:
    """Whether Redis is asked at all. One for all steps of a worker that use the same Redis."""

    cdef public bint up

    def __init__(self):
        self.up = False


cdef class LeasedLimitStep(RateLimitStep):
    """A limit over several machines. `limiter` has ask(key, identity, waited) and prefetch(key, identity).

    `rate` is this machine's share, for while Redis is away (`on_failure="local"`); `identity` begins with a letter for the kind.
    """

    cdef LeaseTable table
    cdef Switch switch
    cdef object limiter
    cdef uint64_t limit_hash
    cdef int64_t budget_us          # the longest that a request waits for all such limits together
    cdef int on_failure
    cdef bint exact

    def __init__(self, str name, RateLimit rate not None, str key, *, int64_t quota, int64_t window, str label, uint64_t limit_hash,
                 LeaseTable table not None, Switch switch not None, limiter, int64_t budget_us, bint exact, str on_failure):
        self.phase = PHASE_LIMIT
        self.name = name
        self.rate = rate
        self.kind = {"client": KEY_CLIENT, "ip": KEY_IP, "route": KEY_ROUTE}.get(key, KEY_HEADER)
        self.header = key[7:].lower().encode("ascii") if self.kind == KEY_HEADER else b""
        self.quoted = b'"' + ascii_name(label) + b'"'
        self.policy = b"ratelimit-policy: " + self.quoted + b";q=%d;w=%d\r\n" % (quota, window)
        self.limit_hash = limit_hash
        self.table = table
        self.switch = switch
        self.limiter = limiter
        self.budget_us = budget_us
        self.exact = exact
        self.on_failure = {"local": ON_LOCAL, "deny": ON_DENY, "allow": ON_ALLOW}[on_failure]

    def share(self, RateLimit rate not None) -> None:
        """Change what this machine alone may let pass while Redis is away."""
        self.rate = rate

    cdef int run(self, Exchange x) except -1:
        cdef Spent spent
        cdef uint64_t key
        cdef int taken
        if not self.exact:
            key = leased_key(self.limit_hash, self.key(x))
            taken = self.table.take(key, <uint64_t>cw_monotonic_us(), &spent)
            if taken == LEASE_TAKEN:
                if spent.low and self.switch.up:
                    self.limiter.prefetch(key, self.identity(x))
                x.add_answer_header(self.line(spent.remaining, (spent.wait_us + 999999) // 1000000))
                return STEP_GO
            if taken == LEASE_REFUSED:
                return self.refuse(x, spent.wait_us)
        if not self.switch.up or x.store_us >= self.budget_us:
            return self.without(x)
        return STEP_PARK

    cdef object park(self, Exchange x):
        """A future of (admitted, remaining, microseconds to wait), or of None when Redis has no answer; it never raises."""
        return self.wait(x, self.limiter.ask(leased_key(self.limit_hash, self.key(x)), self.identity(x), x.store_us / 1e6))

    async def wait(self, Exchange x, answer):
        began = cw_monotonic_us()
        return await answer, cw_monotonic_us() - began

    cdef int resumed(self, Exchange x, object result) except -1:
        answer, waited = result
        self.note(x, waited)
        if answer is None:
            return self.without(x)
        admitted, remaining, wait_us = answer
        if not admitted:
            return self.refuse(x, wait_us)
        x.add_answer_header(self.line(remaining, (<int64_t>wait_us + 999999) // 1000000))
        return STEP_GO

    cdef int failed(self, Exchange x, object error) except -1:
        return self.without(x)

    cdef int note(self, Exchange x, int64_t waited) except -1:
        x.store_us += waited
        x.slot.counters[C_LIMIT_WAITS] += 1
        x.slot.counters[C_LIMIT_WAIT_US] += <uint64_t>waited
        if <uint64_t>waited > x.slot.gauges[G_LIMIT_WAIT_MAX_US]:
            x.slot.gauges[G_LIMIT_WAIT_MAX_US] = <uint64_t>waited
        return 0

    cdef int without(self, Exchange x) except -1:
        """Redis is away, and was not waited for, or in vain."""
        if self.on_failure == ON_DENY:
            x.slot.counters[C_LIMIT_DENIED] += 1
            return self.unavailable(x)
        if self.on_failure == ON_ALLOW:
            x.slot.counters[C_LIMIT_ALLOWED] += 1
            return STEP_GO
        x.slot.counters[C_LIMIT_LOCAL] += 1
        return self.take(x)

    cdef bytes identity(self, Exchange x):
        """Who is counted, the same on every machine: what key() hashes with this gateway's own secret."""
        cdef int i
        cdef Py_ssize_t length = 16
        if self.kind == KEY_ROUTE:
            return b"r"
        if self.kind == KEY_CLIENT and x.principal is not None:
            issuer = x.principal.issuer.encode("utf-8", "surrogatepass")
            return b"c%d:%b%b" % (len(issuer), issuer, x.principal.client.encode("utf-8", "surrogatepass"))
        if self.kind == KEY_HEADER:
            i = head_find(x.head, PyBytes_AS_STRING(self.header), PyBytes_GET_SIZE(self.header), 0)
            if i >= 0:
                return b"h" + PyBytes_FromStringAndSize(x.head.base + x.head.fields[i].value, x.head.fields[i].value_len)
        if not (x.client[10] == 0xff and x.client[11] == 0xff and memcmp(x.client, b"\0\0\0\0\0\0\0\0\0\0", 10) == 0):
            length = 8
        return b"i" + PyBytes_FromStringAndSize(<const char*>x.client, length)
