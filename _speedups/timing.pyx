"""C loops around one part of the engine each, for benchmarks only: the seconds that `loops` repetitions take.

Strategy: the parts are C functions that Python never calls, so the clock is read around a C loop and no Python call is in
what is measured. Results are added up and returned to nobody through a volatile, so that no compiler leaves a loop out.
Nothing of the gateway imports this module; the product's classes know nothing of it.
Python is called from here: per measurement, never inside a loop.

Safety: pointers lead into objects that the caller of each function holds for the length of the call.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from gateway._speedups.balance cimport Balancer, Candidate
from gateway._speedups.compose cimport compose_answer, compose_request
from gateway._speedups.exchange cimport BODY_LENGTH, Exchange, RouteEntry, Snapshot
from gateway._speedups.fleet cimport Fleet
from gateway._speedups.headers cimport Head, head_reset
from gateway._speedups.histogram cimport WorkerSlot
from gateway._speedups.http1 cimport Limits, parse_request as parse_request_head, parse_response as parse_response_head
from gateway._speedups.journal cimport Journal
from gateway._speedups.lease_table cimport LEASE_MAX, LEASE_TAKEN, LeaseTable, Spent, leased_key
from gateway._speedups.pool cimport OUTCOME_ANSWERED, Endpoint, Upstream
from gateway._speedups.route_trie cimport Match, RouteTrie
from gateway._speedups.token_bucket cimport BucketTable, Decision, RateLimit
from gateway._speedups.token_cache cimport TokenCache
from gateway._speedups.upstream_state cimport OUT_OK, EndpointState, UpstreamState

cdef enum:
    KEYS_MAX = 65536
    ROOM = 65536

cdef volatile int64_t unused = 0
cdef Limits LIMITS
LIMITS.head = 65536
LIMITS.target = 8192
LIMITS.fields = 256


cdef double seconds() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + now.tv_nsec / 1e9


def measured_from_here() -> None:
    """Nothing; callgrind forgets what it counted so far when this is called (--zero-before)."""


cdef double time_head(uint64_t loops, bytes data, bint request) except -1:
    cdef Head* head = <Head*>malloc(sizeof(Head))
    cdef const char* base = data
    cdef uint32_t length = <uint32_t>len(data)
    cdef int result = 0
    cdef double began
    cdef uint64_t i
    if head == NULL:
        raise MemoryError
    try:
        began = seconds()
        for i in range(loops):
            head_reset(head)
            if request:
                result = parse_request_head(base, length, head, &LIMITS)
            else:
                result = parse_response_head(base, length, head, &LIMITS)
            if result <= 0:
                raise ValueError("not a complete head")
        return seconds() - began
    finally:
        free(head)


def time_request_head(uint64_t loops, bytes data not None) -> float:
    """Seconds for `loops` request heads; raises ValueError when `data` is none."""
    return time_head(loops, data, True)


def time_response_head(uint64_t loops, bytes data not None) -> float:
    """The same for the head of a response."""
    return time_head(loops, data, False)


def time_compose(uint64_t loops, RouteEntry route not None, Snapshot snapshot not None, bytes request not None,
                 bytes response=None) -> float:
    """Seconds for `loops` heads written: the request to the upstream, or with `response` the answer to the client.

    The heads are parsed once, outside the loop; marking what is dropped is in it. Raises ValueError for bad heads.
    """
    cdef Exchange x = Exchange.__new__(Exchange)
    cdef Head* answer = <Head*>malloc(sizeof(Head))
    cdef char* out = <char*>malloc(ROOM)
    cdef const char* base = request
    cdef const char* second = NULL
    cdef const char* address = b"127.0.0.1"
    cdef int64_t written = 0
    cdef double began
    cdef uint64_t i
    try:
        if answer == NULL or out == NULL:
            raise MemoryError
        x.reset()
        if parse_request_head(base, <uint32_t>len(request), x.head, &LIMITS) <= 0:
            raise ValueError("not a complete request head")
        x.snapshot = snapshot
        x.route = route
        x.upstream = route.upstream
        x.endpoint = route.upstream.endpoints[0]
        x.path_len = x.head.path_len
        x.peer_text = address
        x.peer_len = 9
        x.keep_alive = True
        memset(x.request_id, c'0', 36)
        memset(x.trace, c'0', 55)
        if x.head.content_length >= 0:
            x.body.out = BODY_LENGTH
            x.body.remaining = x.head.content_length
        if response is not None:
            second = response
            head_reset(answer)
            if parse_response_head(second, <uint32_t>len(response), answer, &LIMITS) <= 0:
                raise ValueError("not a complete response head")
            x.answer.out = BODY_LENGTH
        began = seconds()
        if response is None:
            for i in range(loops):
                written += compose_request(x, out, ROOM, 0)
        else:
            for i in range(loops):
                written += compose_answer(x, answer, out, ROOM)
        began = seconds() - began
        if written < <int64_t>loops:
            raise ValueError("the heads do not fit")
        return began
    finally:
        free(answer)
        free(out)


def time_match(uint64_t loops, RouteTrie trie not None, bytes request not None, list paths not None) -> float:
    """Seconds for `loops` matches, over `paths` (normalised, all routed) in turn, with the method and Host of `request`."""
    cdef Exchange x = Exchange.__new__(Exchange)
    cdef Match match
    cdef const char* base = request
    cdef bytes joined = b"".join(paths)
    cdef const char* text = joined
    cdef uint32_t* ends = NULL
    cdef uint32_t count = <uint32_t>len(paths), k = 0, at = 0, n
    cdef uint64_t i, found = 0
    cdef const char* host
    cdef double began
    if not 0 < count <= KEYS_MAX:
        raise ValueError("from 1 to 65536 paths")
    x.reset()
    if parse_request_head(base, <uint32_t>len(request), x.head, &LIMITS) <= 0:
        raise ValueError("not a complete request head")
    host = base + x.head.host_at
    ends = <uint32_t*>malloc(sizeof(uint32_t) * count)
    if ends == NULL:
        raise MemoryError
    try:
        for k in range(count):
            at += <uint32_t>len(paths[k])
            ends[k] = at
        k = at = 0
        began = seconds()
        for i in range(loops):
            n = ends[k] - at
            found += trie.match(x.head, host, x.head.host_len, text + at, n, &match) == 1
            at += n
            k += 1
            if k == count:
                k = at = 0
        began = seconds() - began
        if found != loops:
            raise ValueError(f"{loops - found} of {loops} matches found no route")
        return began
    finally:
        free(ends)


def time_take(uint64_t loops, BucketTable table not None, RateLimit rate not None, list names not None, uint64_t now_us) -> float:
    """Seconds for `loops` tokens taken from the buckets of `names` in turn, a microsecond apart; the key is hashed beforehand."""
    cdef uint64_t* keys
    cdef uint64_t i, admitted = 0
    cdef uint32_t k, count = <uint32_t>len(names)
    cdef Decision decision
    cdef bytes name
    cdef double began
    if not 0 < count <= KEYS_MAX:
        raise ValueError("from 1 to 65536 names")
    keys = <uint64_t*>malloc(sizeof(uint64_t) * count)
    if keys == NULL:
        raise MemoryError
    try:
        for k in range(count):
            name = names[k]
            keys[k] = table.hash_key(name, len(name))
        k = 0
        began = seconds()
        for i in range(loops):
            admitted += table.take(&rate.limit, keys[k], now_us + i, &decision) == 1
            k = 0 if k + 1 == count else k + 1
        began = seconds() - began
        if admitted == 0:
            raise ValueError("no token was there")
        return began
    finally:
        free(keys)


def time_leased(uint64_t loops, LeaseTable table not None, list names not None, uint64_t now_us) -> float:
    """Seconds for `loops` tokens spent of the leases of `names` in turn; what is used up is leased anew inside, every 262,143."""
    cdef uint64_t keys[KEYS_MAX]
    cdef uint64_t i, spent = 0
    cdef uint32_t k = 0, count = <uint32_t>len(names)
    cdef Spent out
    cdef double began
    if not 0 < count <= <uint32_t>KEYS_MAX:
        raise ValueError("from 1 to 65536 names")
    for k in range(count):
        keys[k] = leased_key(1, <uint64_t>hash(names[k]))
    k = 0
    began = seconds()
    for i in range(loops):
        if table.take(keys[k], now_us, &out) != LEASE_TAKEN:
            number, *_ = table.begin(keys[k], now_us, 1)
            table.enter(number, keys[k], now_us, LEASE_MAX, now_us + 1_000_000, False, 0, 0)
            table.end(number, now_us + 1)
        spent += <uint64_t>out.remaining
        k = 0 if k + 1 == count else k + 1
    began = seconds() - began
    global unused
    unused = <int64_t>spent
    return began


def time_cached(uint64_t loops, TokenCache cache not None, list tokens not None, int64_t now) -> float:
    """Seconds for `loops` tokens found in the cache, in turn. Raises ValueError when one of them is not there."""
    cdef const char** text
    cdef uint32_t* lengths
    cdef uint32_t k, count = <uint32_t>len(tokens)
    cdef uint64_t i, found = 0
    cdef double began
    if not 0 < count <= KEYS_MAX:
        raise ValueError("from 1 to 65536 tokens")
    text = <const char**>malloc(sizeof(char*) * count)
    lengths = <uint32_t*>malloc(sizeof(uint32_t) * count)
    try:
        if text == NULL or lengths == NULL:
            raise MemoryError
        for k in range(count):
            text[k] = <bytes>tokens[k]
            lengths[k] = <uint32_t>len(<bytes>tokens[k])
        k = 0
        began = seconds()
        for i in range(loops):
            found += cache.get(text[k], lengths[k], now) is not None
            k = 0 if k + 1 == count else k + 1
        began = seconds() - began
        if found != loops:
            raise ValueError(f"{loops - found} of {loops} tokens are not in the cache")
        return began
    finally:
        free(text)
        free(lengths)


def time_observe(uint64_t loops, WorkerSlot slot not None, uint32_t routes) -> float:
    """Seconds for `loops` finished exchanges counted, on `routes` routes in turn, with latencies from 1 to 8192 us."""
    cdef uint64_t i
    cdef uint32_t route = 0
    cdef double began = seconds()
    for i in range(loops):
        slot.observe(route, 1, 200, 1 + ((i * 2654435761) & 8191), 1, 112, 119)
        route = 0 if route + 1 == routes else route + 1
    return seconds() - began


def time_attempts(uint64_t loops, UpstreamState upstream not None, EndpointState endpoint not None, uint32_t limit,
                  int64_t now_us) -> float:
    """Seconds for `loops` successful requests, a microsecond apart: admitted within the limits of both, and reported."""
    cdef uint64_t i, sent = 0
    cdef uint32_t ticket
    cdef int64_t now
    cdef double began = seconds()
    for i in range(loops):
        now = now_us + <int64_t>i
        if not upstream.enter(limit):
            continue
        ticket = endpoint.admit(now, 1000000)
        if ticket and endpoint.enter(0):
            upstream.deposit(now)
            endpoint.report(upstream, OUT_OK, ticket, now)
            endpoint.leave()
            sent += 1
        upstream.leave()
    began = seconds() - began
    if sent != loops:
        raise ValueError(f"{loops - sent} of {loops} requests were not sent")
    return began


def time_places(uint64_t loops, UpstreamState upstream not None, EndpointState endpoint not None, int64_t now_us) -> float:
    """Seconds for `loops` times a place of the upstream's limit taken, a success noted, and the place given back."""
    cdef uint64_t i, taken = 0
    cdef uint32_t ticket = endpoint.ticket()
    cdef double began = seconds()
    for i in range(loops):
        taken += upstream.enter(1024)
        endpoint.report(upstream, OUT_OK, ticket, now_us + <int64_t>i)
        upstream.leave()
    began = seconds() - began
    if taken != loops or ticket == 0:
        raise ValueError(f"{loops - taken} of {loops} places were not there")
    return began


def time_append(uint64_t loops, Journal journal not None, bytes line not None) -> float:
    """Seconds for `loops` records appended; raises ValueError when one was lost (flush in between, outside the clock)."""
    cdef const char* text = line
    cdef Py_ssize_t length = len(line)
    cdef uint64_t i, kept = 0
    cdef double began = seconds()
    for i in range(loops):
        kept += journal.append(text, length) != 0
    began = seconds() - began
    if kept != loops:
        raise ValueError(f"{loops - kept} of {loops} records were lost")
    return began


def time_choose(uint64_t loops, Fleet fleet not None, uint64_t in_flight, bint record) -> float:
    """Choose an endpoint, and with `record` also count the request in and out again, `in_flight` being on their way at a time.

    The clock moves by 10 us for each. Every endpoint of the fleet must be a member, in its order.
    """
    cdef Balancer balancer = fleet.balancer
    cdef int[1024] waiting
    cdef int64_t now = 1_000_000
    cdef uint64_t i
    cdef int64_t total = 0
    cdef int index
    cdef double began
    if not 1 <= in_flight <= 1024 or not fleet.size:
        raise ValueError("from 1 to 1,024 in flight, and an endpoint")
    # What choose() returns is below the number of members, which is fleet.size; something is usable, so it is not -1.
    for i in range(in_flight):
        waiting[i] = balancer.choose(now, i, -1, True)
        if waiting[i] < 0:
            raise ValueError("nothing is usable")
        balancer.started(&fleet.candidates[waiting[i]], now)
    began = seconds()
    for i in range(loops):
        now += 10
        index = balancer.choose(now, i * <uint64_t>0x9E3779B97F4A7C15, -1, True)
        total += index
        if record:
            balancer.finished(&fleet.candidates[waiting[i % in_flight]], now, 900 + (now & 255), 0, 0)
            waiting[i % in_flight] = index
            balancer.started(&fleet.candidates[index], now)
    began = seconds() - began
    global unused
    unused = total
    for i in range(in_flight):
        balancer.finished(&fleet.candidates[waiting[i]], now, 1000, 0, 0)
    return began


def time_upstream(uint64_t loops, Upstream upstream not None, int64_t now_us) -> float:
    """Seconds for all that `loops` successful requests, 20 us apart, ask of an upstream and tell it.

    A place, a deposit, an endpoint, its ticket and place; then the latency, the verdict, and both places given back.
    """
    cdef uint64_t i, sent = 0
    cdef int64_t now = now_us
    cdef Endpoint endpoint
    cdef double began = seconds()
    for i in range(loops):
        now += 20
        if not upstream.enter(now):
            continue
        endpoint = upstream.pick(now, 0, False, None)
        if endpoint is not None:
            upstream.start(endpoint, now, False)
            upstream.finish(endpoint, endpoint.ticket, now, OUTCOME_ANSWERED, 200, 900 + (now & 255), 0)
            upstream.stop(endpoint)
            sent += 1
        upstream.leave(True)
    began = seconds() - began
    if sent != loops:
        raise ValueError(f"{loops - sent} of {loops} requests found no place or no endpoint")
    return began


def time_nothing(uint64_t loops) -> float:
    """Seconds for `loops` turns of an empty loop: what the loop itself adds to the figures of this module."""
    global unused
    cdef uint64_t i
    cdef double began = seconds()
    for i in range(loops):
        unused += 1
    return seconds() - began
