"""Load, health, retry budget and concurrency limit of upstreams, over all processes of a machine.

Strategy: three ways of sharing, each for what it is good at.

 1. *Cells*: a 32-bit counter for each process, written by it alone, added up by whoever asks. Taking a place is: own cell + 1,
    then the sum; above the limit it is taken back. All stores and loads of this are sequentially consistent, so of those who
    take the last places at the same time the last one in that order sees all others: the limit is never exceeded. Two may
    both see one too many and both give back although one place is free; they look again before they refuse. A killed process
    leaves its own cells only, and they are zeroed when it is reaped: nothing leaks. A cell is counted as soon as its process
    has raised `processes`, which it does before its first entry, by the same order.
 2. *Blocks*: counters, the failure window and the retry ring of one process: added to without any locked instruction, read by
    others when there is something to decide (a failure, a retry, a scrape). The retry budget takes as 1. does: mark, add up,
    take back. Bucket i of a ring is for seconds that are i modulo 10, and says which: an old one is never taken for a new one.
 3. *Words* changed by compare-and-swap: an endpoint's health, and the turn to update an adaptive limit.

Health is one word: until (40 bits, milliseconds), state (2), back-off exponent (5), generation (17). Every change of what the
endpoint is considered to be takes another generation. A request carries the generation it was admitted under as its ticket,
and a result is judged only under that same generation: what was sent before an ejection says nothing afterwards, and the one
result that counts while an endpoint is out is that of the probe whose claim made the generation.

    OPEN -> DECIDING -> OUT -> PROBING -> OPEN (success) or OUT (failure, exponent + 1)

DECIDING holds the bound on how many may be out, without a lock: mark, count the others that are not OPEN, then confirm or take
back, as with cells. A DECIDING whose process was killed or stopped is struck out by the next who counts, 0.1 s later; if the
stopped one wakes up, its confirmation finds another word and fails. So never more than the share are out, and nobody waits.
PROBING expires likewise: the next request then gets the probe. (Sooner if its process was killed: `run`, which counts failures in
a row otherwise, names the prober meanwhile, and whoever buries that process takes the claim back.)

The retry budget is Finagle's (RetryBudget.scala: 1000 in for each request, 1000/ratio out for each retry, 10 s, a reserve)
divided by 1000/ratio, so that no ratio is rounded: ratio x requests + 10 x reserve - retries >= 0, over the last ten seconds.

Adaptive concurrency is Envoy's gradient controller (adaptive_concurrency.rst), shared by all processes rather than one for each:
a measurement of minRTT has to lower the load of the whole machine, or the other processes' queueing is measured. Samples lie in
the blocks, each with the epoch it belongs to; whoever moves `turn_at` forward adds them up.

Python is called from here: never, but for building, the active checker and explain().

Safety: pointers are set by upstream_at() and endpoint_at() from the table's layout and lead into the mapping that `owner` keeps;
`index` and `processes` are less than the number of cells and blocks there are.
"""

cimport cython
from libc.stdint cimport UINT32_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.math cimport sqrt
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from posix.unistd cimport getpid
from gateway._speedups.sockets cimport cw_monotonic_us
from gateway._speedups.shared_words cimport (
    sw_add, sw_exchange32, sw_load, sw_load32, sw_look, sw_look32, sw_pause, sw_put, sw_put32, sw_store, sw_swap,
)

cdef extern from *:
    """
    #include <stdint.h>
    /* Log-linear bin of v microseconds: 0..7 exactly, then eight for each power of two, the last for 2^25 us and more. */
    static inline unsigned us_bin(uint64_t v) {
        unsigned e;
        if (v < 8) return (unsigned)v;
        if (v >> 25) return 191;
        e = 63u - (unsigned)__builtin_clzll(v);
        return (e - 2) * 8 + (unsigned)((v >> (e - 3)) & 7);
    }
    static inline uint64_t us_bin_low(unsigned bin) {
        if (bin < 8) return bin;
        return (uint64_t)(8 + (bin & 7)) << ((bin >> 3) - 1);
    }
    """
    unsigned us_bin(uint64_t v) noexcept nogil
    uint64_t us_bin_low(unsigned bin) noexcept nogil

cdef enum:
    DECIDING_MS = 100           # a decision takes less than a microsecond; longer than this its process is stopped or dead
    TRIES = 4
    DECAY_US = 10_000_000       # in use for so long (or `base`, if that is longer): one exponent less. Envoy: a sweep, 10 s
    MEASURE_LONGEST_US = 5_000_000
    PINNED_TURNS = 5            # Envoy: the limit at its minimum for five updates means that minRTT is stale

OUTCOME_NAMES = ("ok", "neutral", "connect", "reset", "timeout", "status", "cancelled")
EVENT_NAMES = ("", "ejected", "probe failed", "returned", "check passed", "check failed")
UPSTREAM_COUNTERS = (
    "requests", "successes", "attempts", "attempt_successes", "retries", "budget_empty", "queued", "queue_timeouts",
    "requests_full", "pending_full", "connections_full", "hedges", "no_endpoint", "capped",
)
ENDPOINT_COUNTERS = (
    "ok", "neutral", "connect", "reset", "timeout", "status", "cancelled", "", "retries", "ejections", "probes", "returns",
    "requests_full",
)
assert len(OUTCOME_NAMES) == OUTCOMES


# -- what is a failure

cdef uint8_t[600] STATUS_OUTCOMES
cdef int _status
for _status in range(600):
    STATUS_OUTCOMES[_status] = OUT_OK
for _status in (500, 502, 503, 504):
    STATUS_OUTCOMES[_status] = OUT_STATUS
STATUS_OUTCOMES[429] = OUT_NEUTRAL

# By code: OK CANCELLED UNKNOWN INVALID_ARGUMENT | DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED |
# RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE | UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS | UNAUTHENTICATED
# A deadline is the client's: one that sends impossible deadlines must not take an endpoint away from the others.
cdef uint8_t[17] GRPC_OUTCOMES = [
    OUT_OK, OUT_NEUTRAL, OUT_STATUS, OUT_OK, OUT_NEUTRAL, OUT_OK, OUT_OK, OUT_OK,
    OUT_NEUTRAL, OUT_OK, OUT_OK, OUT_OK, OUT_OK, OUT_STATUS, OUT_STATUS, OUT_STATUS, OUT_OK,
]


cpdef int classify_status(int status) noexcept nogil:
    """What an answer's status says of its endpoint: a refusal (4xx) or an unusual 5xx is an answer."""
    return STATUS_OUTCOMES[status] if 0 <= status < 600 else OUT_STATUS


cpdef int classify_grpc(int code) noexcept nogil:
    """The same for grpc-status; a number that does not exist is UNKNOWN."""
    return GRPC_OUTCOMES[code] if 0 <= code < 17 else OUT_STATUS


# -- cells

cdef inline uint32_t total(const uint32_t* cells, const uint64_t* processes) noexcept nogil:
    cdef uint32_t found = 0
    cdef uint64_t i, count = sw_load(processes)
    for i in range(count):
        found += sw_load32(&cells[i])
    return found


cdef inline bint take(uint32_t* cells, uint32_t index, const uint64_t* processes, uint32_t limit) noexcept nogil:
    """One more in our cell unless the sum would be above `limit` (0: no limit)."""
    cdef uint32_t own = cells[index]
    cdef int attempt
    if limit == 0:
        sw_put32(&cells[index], own + 1)
        return True
    for attempt in range(TRIES):
        sw_exchange32(&cells[index], own + 1)
        if total(cells, processes) <= limit:
            return True
        sw_exchange32(&cells[index], own)
        if total(cells, processes) >= limit:
            return False
        sw_pause()
    return False


cdef inline void give(uint32_t* cells, uint32_t index) noexcept nogil:
    cdef uint32_t own = cells[index]
    if own:
        sw_put32(&cells[index], own - 1)


# -- rings of ten seconds

cdef inline Tally* bucket(Tally* ring, uint64_t second, uint64_t generation) noexcept nogil:
    """Our bucket of this second, emptied if it held another; index < SECONDS."""
    cdef Tally* one = &ring[second % SECONDS]
    cdef uint64_t stamp = generation << 32 | <uint32_t>second
    if one.stamp != stamp and not (one.stamp >> 32 == generation and one.stamp > stamp):
        sw_store(&one.stamp, 0)             # nobody counts it while it is emptied
        sw_put32(&one.good, 0)
        sw_put32(&one.bad, 0)
        sw_store(&one.stamp, stamp)
    return one


# -- health words

cdef inline uint64_t reopened(uint64_t word) noexcept nogil:
    """The word before a decision was begun."""
    return health_word(0, OPEN, exponent_of(word), word & GENERATION_MASK)


cdef inline uint64_t draw(uint64_t* state, uint64_t below) noexcept nogil:
    """A random number from 0 to below - 1 (xorshift64*, Vigna); 0 when `below` is 0."""
    cdef uint64_t x = state[0]
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    state[0] = x
    return ((x * <uint64_t>0x2545F4914F6CDD1D) >> 11) % below if below else 0


cdef inline int64_t out_for(const EjectSettings* settings, uint64_t exponent, uint64_t* random) noexcept nogil:
    """min(base x 2^exponent, max) and up to half of that again, so that endpoints do not come back in step."""
    cdef int64_t time = settings.base_us
    while exponent and time < settings.max_us:
        time *= 2
        exponent -= 1
    if time > settings.max_us:
        time = settings.max_us
    return time + <int64_t>draw(random, <uint64_t>time // 2 + 1)


@cython.final
@cython.no_gc_clear          # its cell is given back at the end of its life: the mapping must be there until then
cdef class EndpointState:
    def __init__(self):
        raise TypeError("made by UpstreamTable.endpoint()")

    def __dealloc__(self):
        # A child forked meanwhile has not this process's cell.
        if self.uses != NULL and getpid() == self.pid:
            sw_store(&self.slot.touched, <uint64_t>cw_monotonic_us())
            give(self.uses, self.index)

    cpdef int availability(self, int64_t now) noexcept nogil:
        cdef uint64_t word = sw_look(&self.slot.health)
        cdef uint64_t active = sw_look(&self.slot.active)
        cdef bint out = state_of(word) >= OUT
        if out and <uint64_t>now // 1000 < word >> 24:
            return EJECTED
        if (active & 3) == ACTIVE_UNHEALTHY and (active >> 2) > <uint64_t>now:
            return UNHEALTHY
        return MAY_PROBE if out else USABLE

    cpdef uint32_t admit(self, int64_t now, int64_t probe_us) noexcept nogil:
        cdef uint64_t word = sw_load(&self.slot.health), generation
        cdef int found = self.availability(now)
        if found == USABLE:
            return word & GENERATION_MASK if state_of(word) < OUT else 0
        if found != MAY_PROBE or state_of(word) < OUT or <uint64_t>now // 1000 < word >> 24:
            return 0
        generation = generation_after(word)
        if not sw_swap(&self.slot.health, word,
                       health_word(<uint64_t>(now + probe_us) // 1000 + 1, PROBING, exponent_of(word), generation)):
            return 0
        sw_store(&self.slot.run, prober(generation, self.index))       # if we are killed now, the claim has to expire
        sw_add(&self.block.counters[E_PROBES], 1)
        return <uint32_t>generation

    cpdef uint32_t ticket(self) noexcept nogil:
        cdef uint64_t word = sw_look(&self.slot.health)
        return word & GENERATION_MASK if state_of(word) < OUT else 0

    cpdef bint is_probe(self, uint32_t ticket) noexcept nogil:
        cdef uint64_t word = sw_look(&self.slot.health)
        return state_of(word) == PROBING and ticket != 0 and (word & GENERATION_MASK) == ticket

    cpdef int report(self, UpstreamState upstream, int outcome, uint32_t ticket, int64_t now) noexcept nogil:
        cdef uint64_t word
        if outcome < 0 or outcome >= OUTCOMES:
            return EVENT_NONE
        sw_add(&self.block.counters[E_OUTCOMES + outcome], 1)
        if outcome != OUT_CANCELLED:
            sw_add(&upstream.block.counters[U_ATTEMPTS], 1)
            if outcome <= OUT_NEUTRAL:
                sw_add(&upstream.block.counters[U_ATTEMPT_SUCCESSES], 1)
        word = sw_load(&self.slot.health)
        if ticket == 0 or (word & GENERATION_MASK) != ticket or state_of(word) == OUT:
            return EVENT_NONE
        if state_of(word) == PROBING:
            return self.probed(upstream, outcome, word, now)
        if outcome == OUT_OK:
            self.succeeded(ticket, now)
            return EVENT_NONE
        if outcome == OUT_NEUTRAL or outcome == OUT_CANCELLED:
            return EVENT_NONE
        return self.failed(upstream, word, now)

    cdef void succeeded(self, uint32_t ticket, int64_t now) noexcept nogil:
        cdef Tally* second = bucket(self.block.window, <uint64_t>now // 1000000, ticket)
        cdef uint64_t run = sw_look(&self.slot.run)
        sw_put32(&second.good, second.good + 1)
        if run:
            sw_swap(&self.slot.run, run, 0)         # if it fails, another failure or success came in between

    cdef int failed(self, UpstreamState upstream, uint64_t word, int64_t now) noexcept nogil:
        """Count a failure of a request admitted under `word`'s generation, and eject the endpoint if that is enough."""
        cdef EjectSettings* limits = &upstream.eject
        cdef uint64_t generation = word & GENERATION_MASK, run, length, i, good = 0, bad = 0
        cdef uint64_t now_s = <uint64_t>now // 1000000
        cdef Tally* second = bucket(self.block.window, now_s, generation)
        sw_put32(&second.bad, second.bad + 1)
        while True:
            run = sw_load(&self.slot.run)
            length = <uint64_t><uint32_t>run + 1 if run >> 32 == generation else 1
            if sw_swap(&self.slot.run, run, generation << 32 | length):
                break
        for i in range(sw_load(self.processes)):
            ring_total(self.blocks[i].window, now_s, generation, &good, &bad)
        if not ((limits.failures and length >= limits.failures)
                or (limits.ratio_permille and good + bad >= limits.minimum
                    and bad * 1000 > limits.ratio_permille * (good + bad))):
            return EVENT_NONE
        self.seen_run, self.seen_bad, self.seen_total = <uint32_t>length, <uint32_t>bad, <uint32_t>(good + bad)
        return self.eject(upstream, word, now)

    cdef int eject(self, UpstreamState upstream, uint64_t word, int64_t now) noexcept nogil:
        """Take the endpoint out unless the share is used up or another process is deciding."""
        cdef uint64_t now_ms = <uint64_t>now // 1000, mark, exponent, steps
        cdef int64_t decay = DECAY_US if upstream.eject.base_us < DECAY_US else upstream.eject.base_us
        cdef int64_t healthy = now - <int64_t>sw_look(&self.slot.opened)
        if state_of(word) == DECIDING:
            word = strike(self.slot, word, now_ms)
        if state_of(word) != OPEN:
            return EVENT_NONE
        mark = health_word(now_ms, DECIDING, exponent_of(word), word & GENERATION_MASK)
        if not sw_swap(&self.slot.health, word, mark):
            return EVENT_NONE
        if upstream.others_out(self.slot, now_ms) + 1 > upstream.cap():
            sw_swap(&self.slot.health, mark, word)
            sw_add(&upstream.block.counters[U_CAPPED], 1)
            return EVENT_NONE
        exponent = exponent_of(word)
        steps = <uint64_t>(healthy // decay) if healthy > 0 else 0
        exponent = exponent - steps if exponent > steps else 0
        return self.put_out(upstream, mark, exponent, now, EVENT_EJECTED)

    cdef int put_out(self, UpstreamState upstream, uint64_t word, uint64_t exponent, int64_t now, int event) noexcept nogil:
        cdef int64_t time = out_for(&upstream.eject, exponent, &self.random)
        cdef uint64_t next_exponent = exponent + 1 if exponent < EXPONENT_MAX else EXPONENT_MAX
        if not sw_swap(&self.slot.health, word,
                       health_word(<uint64_t>(now + time) // 1000, OUT, next_exponent, generation_after(word))):
            return EVENT_NONE
        sw_add(&self.block.counters[E_EJECTIONS], 1)
        self.seen_us = time
        return event

    cdef int probed(self, UpstreamState upstream, int outcome, uint64_t word, int64_t now) noexcept nogil:
        """The probe ended: in use again, or out for longer, or (cancelled) the next request is the probe."""
        if outcome == OUT_CANCELLED:
            sw_swap(&self.slot.health, word,
                    health_word(<uint64_t>now // 1000, OUT, exponent_of(word), generation_after(word)))
            return EVENT_NONE
        if outcome > OUT_NEUTRAL:
            return self.put_out(upstream, word, exponent_of(word), now, EVENT_PROBE_FAILED)
        return EVENT_RETURNED if self.put_back(word, now) else EVENT_NONE

    cdef bint put_back(self, uint64_t word, int64_t now) noexcept nogil:
        sw_put(&self.slot.opened, <uint64_t>now)
        if not sw_swap(&self.slot.health, word, health_word(0, OPEN, exponent_of(word), generation_after(word))):
            return False
        sw_add(&self.block.counters[E_RETURNS], 1)
        return True

    cdef void let_probe(self, int64_t now) noexcept nogil:
        """Its time out is over now instead of later: the next request is the probe."""
        cdef uint64_t word = sw_load(&self.slot.health), now_ms = <uint64_t>now // 1000
        if state_of(word) == OUT and now_ms < word >> 24:
            sw_swap(&self.slot.health, word, health_word(now_ms, OUT, exponent_of(word), generation_after(word)))

    cpdef bint enter(self, uint32_t limit) noexcept nogil:
        if take(self.active, self.index, self.processes, limit):
            return True
        sw_add(&self.block.counters[E_REQUESTS_FULL], 1)
        return False

    cpdef void leave(self) noexcept nogil:
        give(self.active, self.index)

    cpdef uint32_t in_flight(self) noexcept nogil:
        return total(self.active, self.processes)

    cpdef uint32_t own_in_flight(self) noexcept nogil:
        return self.active[self.index]

    cpdef int64_t ejected_until(self) noexcept nogil:
        cdef uint64_t word = sw_look(&self.slot.health)
        return <int64_t>(word >> 24) * 1000 if state_of(word) >= OUT else 0

    cpdef int64_t usable_since(self) noexcept nogil:
        return <int64_t>sw_look(&self.slot.opened)

    cpdef void count(self, int counter) noexcept nogil:
        if 0 <= counter < E_COUNTERS:
            sw_add(&self.block.counters[counter], 1)

    cpdef void set_ewma(self, int64_t us) noexcept nogil:
        sw_put(&self.block.ewma_us, <uint64_t>us)

    def seed(self, uint64_t seed) -> None:
        """Let the jitter of ejections be reproducible."""
        self.random = seed * <uint64_t>0x9E3779B97F4A7C15 | 1

    def checked(self, bint good, int64_t now, int64_t valid_us, *, int healthy=2, int unhealthy=3) -> int:
        """Note the result of an active check; returns EVENT_CHECK_PASSED or EVENT_CHECK_FAILED when the verdict changes.

        The verdict holds for `valid_us` microseconds: a checker that hangs keeps no endpoint out for ever. Checks that failed and
        then pass end the time of an ejection; the probe still decides. Those that passed all along saw nothing of what the
        requests suffered, and end nothing. For the checker process alone.
        """
        cdef uint64_t before = sw_look(&self.slot.active) & 3
        cdef uint64_t run = check_run(sw_look(&self.slot.active_run), good)
        cdef uint64_t verdict = check_verdict(before, run, healthy, unhealthy)
        sw_put(&self.slot.active_run, run)
        if verdict == ACTIVE_HEALTHY and before == ACTIVE_UNHEALTHY:
            sw_put(&self.slot.opened, <uint64_t>now)
        sw_put(&self.slot.active, <uint64_t>(now + valid_us) << 2 | verdict)
        if verdict == ACTIVE_HEALTHY and (before == ACTIVE_UNHEALTHY
                                          or run == (<uint64_t>RECOVERY << 32 | <uint32_t>healthy)):
            self.let_probe(now)
        if verdict == before or (before == ACTIVE_UNKNOWN and verdict == ACTIVE_HEALTHY):
            return EVENT_NONE
        return EVENT_CHECK_FAILED if verdict == ACTIVE_UNHEALTHY else EVENT_CHECK_PASSED

    def unchecked(self) -> None:
        """There is no active check any more: nothing is known."""
        sw_put(&self.slot.active_run, 0)
        sw_put(&self.slot.active, 0)

    def explain(self, int event) -> dict[str, object]:
        """The words and figures of an event that report() or checked() just returned, for a line in the log."""
        found = {"upstream": read_text(self.slot.upstream), "endpoint": self.address, "event": EVENT_NAMES[event]}
        if event == EVENT_EJECTED or event == EVENT_PROBE_FAILED:
            found["seconds"] = round(self.seen_us / 1e6, 3)
        if event == EVENT_EJECTED:
            found["consecutive_failures"] = self.seen_run
            found["failures"] = self.seen_bad
            found["requests"] = self.seen_total
        return found


cdef uint64_t strike(EndpointSlot* slot, uint64_t word, uint64_t now_ms) noexcept nogil:
    """A decision that nobody finishes: back to OPEN. Returns the word of now."""
    if (word >> 24) + DECIDING_MS < now_ms:
        sw_swap(&slot.health, word, reopened(word))
        return sw_load(&slot.health)
    return word


cpdef uint64_t check_run(uint64_t run, bint good) noexcept nogil:
    """The run of equal results after one more: its length, above it 0 for failures, GOOD or RECOVERY."""
    cdef uint64_t before = run >> 32, length = <uint32_t>run
    cdef uint64_t kind = 0 if not good else before if before else RECOVERY if length else GOOD
    if kind != before:
        length = 0
    return kind << 32 | (length + 1 if length < UINT32_MAX else length)


cpdef uint64_t check_verdict(uint64_t before, uint64_t run, int healthy, int unhealthy) noexcept nogil:
    """0 unknown, 1 healthy, 2 unhealthy after this run: the first good result is enough while nothing is known."""
    cdef uint64_t length = <uint32_t>run
    if run >> 32:
        return ACTIVE_HEALTHY if before != ACTIVE_UNHEALTHY or length >= <uint64_t>healthy else before
    return ACTIVE_UNHEALTHY if length >= <uint64_t>unhealthy else before


cdef EndpointState endpoint_at(object owner, str address, const Places* places, bint shared):
    cdef EndpointState state = EndpointState.__new__(EndpointState)
    state.owner = owner
    state.address = address
    state.shared = shared
    state.slot = <EndpointSlot*>places.slot
    state.blocks = <EndpointBlock*>places.blocks
    state.block = state.blocks + places.index
    state.active = <uint32_t*>places.cells
    state.uses = <uint32_t*>(places.cells + places.stride)
    state.processes, state.index = places.processes, places.index
    state.pid = getpid()
    state.seed(<uint64_t>state.pid << 32 ^ <uint64_t>state.slot)
    sw_put32(&state.uses[state.index], state.uses[state.index] + 1)
    return state


@cython.final
@cython.no_gc_clear          # its cell is given back at the end of its life: the mapping must be there until then
cdef class UpstreamState:
    def __init__(self):
        raise TypeError("made by UpstreamTable.upstream()")

    def __dealloc__(self):
        free(self.members)
        if self.uses != NULL and getpid() == self.pid:
            give(self.uses, self.index)

    def configure(self, *, uint32_t limit=0, int failures=7, double ratio=0, int minimum=5, double base=1, double maximum=60,
                  double share=0.5, bint panic=False, double budget=0.2, int reserve=10) -> None:
        """Set the limits of this process's snapshot: `limit` requests in flight (to be shown; enter() is told each time).

        Ejection: consecutive `failures` (0: never), or a `ratio` of failures in ten seconds with at least `minimum` requests
        (0: never), for `base` seconds, doubled up to `maximum`, of at most a `share` of the endpoints, but at least one of
        several. The only endpoint of an upstream is ejected with a share of 1 only.
        Retries: `budget` per original request and `reserve` per second. Raises ValueError for what is out of range.
        """
        if not (0 <= ratio <= 1 and 0 <= share <= 1 and 0 <= budget <= 10 and 0 <= reserve <= 1_000_000 and failures >= 0
                and minimum >= 1 and 0.001 <= base <= maximum <= 86_400):
            raise ValueError("a figure of the upstream's health or retries is out of range")
        self.eject = EjectSettings(failures, round(ratio * 1000), minimum, round(share * 1000), round(base * 1e6),
                                   round(maximum * 1e6), panic)
        self.budget = BudgetSettings(round(budget * 1000), reserve)
        sw_put(&self.slot.limit, limit)
        sw_put(&self.slot.budget_ratio, self.budget.ratio_permille)
        sw_put(&self.slot.budget_reserve, self.budget.reserve)

    def adapt(self, *, int lowest=3, int highest=1024, int samples=50, double buffer=0.25, double jitter=0.15,
              double update=0.1, double measure=60) -> None:
        """Turn adaptive concurrency on. The limit moves from `lowest` to `highest`.

        It is updated each `update` seconds, and minRTT is measured by `samples` requests at the lowest limit each `measure`
        seconds and up to `jitter` of that later; `buffer` is the part of minRTT by which answers may be late without being
        taken for queueing. Raises ValueError for what is out of range.
        """
        if not (1 <= lowest <= highest <= 1_000_000 and 1 <= samples <= 10_000 and 0 <= buffer <= 10 and 0 <= jitter <= 1
                and 0.01 <= update <= measure <= 86_400):
            raise ValueError("a figure of adaptive concurrency is out of range")
        self.adaptive = AdaptiveSettings(True, lowest, highest, samples, round(buffer * 1000), round(jitter * 1000),
                                         round(update * 1e6), round(measure * 1e6))

    def fixed(self) -> None:
        """Turn adaptive concurrency off."""
        self.adaptive.on = False
        sw_put(&self.slot.adaptive.limit, 0)

    def set_members(self, list states not None) -> None:
        """Say which EndpointStates are the upstream's endpoints now, in this process: ejections count among them."""
        cdef EndpointState state
        cdef list kept = list(states)
        cdef EndpointSlot** fresh = <EndpointSlot**>malloc((len(kept) + 1) * sizeof(EndpointSlot*))
        cdef uint32_t count = 0, i
        if fresh == NULL:
            raise MemoryError
        for item in kept:
            state = item
            for i in range(count):
                if fresh[i] == state.slot:          # two names with one address are one endpoint
                    break
            else:
                fresh[count] = state.slot           # count < len(kept)
                count += 1
        free(self.members)
        self.members, self.member_count, self.kept = fresh, count, kept

    def seed(self, uint64_t seed) -> None:
        """Let the jitter of the measurements be reproducible."""
        self.random = seed * <uint64_t>0x9E3779B97F4A7C15 | 1

    cpdef bint enter(self, uint32_t limit) noexcept nogil:
        if take(self.active, self.index, self.processes, limit):
            return True
        sw_add(&self.block.counters[U_REQUESTS_FULL], 1)
        return False

    cpdef void leave(self) noexcept nogil:
        give(self.active, self.index)

    cpdef bint enqueue(self, uint32_t limit) noexcept nogil:
        if take(self.waiting, self.index, self.processes, limit):
            sw_add(&self.block.counters[U_QUEUED], 1)
            return True
        sw_add(&self.block.counters[U_PENDING_FULL], 1)
        return False

    cpdef void dequeue(self) noexcept nogil:
        give(self.waiting, self.index)

    cpdef bint connect(self, uint32_t limit) noexcept nogil:
        if take(self.connected, self.index, self.processes, limit):
            return True
        sw_add(&self.block.counters[U_CONNECTIONS_FULL], 1)
        return False

    cpdef void disconnect(self) noexcept nogil:
        give(self.connected, self.index)

    cpdef uint32_t in_flight(self) noexcept nogil:
        return total(self.active, self.processes)

    cpdef uint32_t queued(self) noexcept nogil:
        return total(self.waiting, self.processes)

    cpdef uint32_t connections(self) noexcept nogil:
        return total(self.connected, self.processes)

    cpdef void deposit(self, int64_t now) noexcept nogil:
        cdef Tally* second = bucket(self.block.budget, <uint64_t>now // 1000000, 0)
        sw_put32(&second.good, second.good + 1)
        sw_add(&self.block.counters[U_REQUESTS], 1)

    cdef int64_t left(self, int64_t now) noexcept nogil:
        """Retries left, in thousandths; negative when those who granted them are ahead of what pays for them."""
        cdef uint64_t good = 0, bad = 0, i, second = <uint64_t>now // 1000000
        for i in range(sw_load(self.processes)):
            ring_total(self.blocks[i].budget, second, 0, &good, &bad)
        ring_total((self.blocks - 1).budget, second, 0, &good, &bad)
        return (<int64_t>(good * self.budget.ratio_permille) + <int64_t>self.budget.reserve * SECONDS * 1000
                - <int64_t>bad * 1000)

    cpdef bint withdraw(self, int64_t now) noexcept nogil:
        cdef Tally* second = bucket(self.block.budget, <uint64_t>now // 1000000, 0)
        cdef uint32_t before = second.bad
        cdef int attempt
        for attempt in range(TRIES):
            sw_exchange32(&second.bad, before + 1)
            if self.left(now) >= 0:
                sw_add(&self.block.counters[U_RETRIES], 1)
                return True
            sw_exchange32(&second.bad, before)
            if self.left(now) < 1000:
                break
            sw_pause()
        sw_add(&self.block.counters[U_BUDGET_EMPTY], 1)
        return False

    cpdef int64_t balance(self, int64_t now) noexcept nogil:
        cdef int64_t left = self.left(now)
        return left if left > 0 else 0

    cpdef void count(self, int counter) noexcept nogil:
        if 0 <= counter < U_COUNTERS:
            sw_add(&self.block.counters[counter], 1)

    cpdef uint32_t cap(self) noexcept nogil:
        # Of several, one always may be out. A single one only with a share of 100 %: else seven failures of one resource would
        # take away the whole service.
        cdef uint32_t most = self.member_count * self.eject.share_permille // 1000
        return 1 if most == 0 and self.member_count > 1 and self.eject.share_permille else most

    cdef uint32_t others_out(self, const EndpointSlot* own, uint64_t now_ms) noexcept nogil:
        """How many endpoints other than this one are out or about to be."""
        cdef uint32_t found = 0, i
        cdef uint64_t word
        for i in range(self.member_count):
            if self.members[i] == own:
                continue
            word = sw_load(&self.members[i].health)
            if state_of(word) == DECIDING:
                word = strike(self.members[i], word, now_ms)
            if state_of(word) != OPEN:
                found += 1
        return found

    cpdef uint32_t allowed(self, uint32_t limit) noexcept nogil:
        cdef uint64_t adapted
        if not self.adaptive.on:
            return limit
        adapted = sw_look(&self.slot.adaptive.limit)
        return limit if adapted == 0 or (limit and limit < adapted) else <uint32_t>adapted

    cpdef void sampled(self, int64_t started, int64_t now) noexcept nogil:
        cdef AdaptiveWords* words = &self.slot.adaptive
        cdef UpstreamBlock* block = self.block
        cdef uint64_t turn, since, epoch
        cdef unsigned bin
        if not self.adaptive.on or started > now:
            return
        since, epoch = sw_look(&words.measuring_since), sw_look(&words.epoch)
        if <uint64_t>started >= since:              # what began before a measurement met another load
            if block.sample_epoch != epoch:
                memset(block.samples, 0, sizeof(block.samples))
                block.sample_count = 0
                sw_put(&block.sample_epoch, epoch)
            bin = us_bin(<uint64_t>(now - started))     # < SAMPLE_BINS for every value
            if block.samples[bin] < 65535:
                block.samples[bin] += 1
                sw_put(&block.sample_count, block.sample_count + 1)
        turn = sw_look(&words.turn_at)
        if <uint64_t>now >= turn and sw_swap(&words.turn_at, turn, <uint64_t>(now + self.adaptive.update_us)):
            self.update(words, now)

    cdef uint64_t median(self, const AdaptiveWords* words, uint64_t* count) noexcept nogil:
        """The median of all processes' samples of this epoch, in microseconds; 0 without any."""
        cdef uint64_t[SAMPLE_BINS] bins
        cdef uint64_t i, samples = 0, half, low
        cdef unsigned b
        memset(bins, 0, sizeof(bins))
        for i in range(sw_load(self.processes)):
            if sw_load(&self.blocks[i].sample_epoch) == words.epoch and self.blocks[i].sample_count:
                for b in range(SAMPLE_BINS):
                    bins[b] += self.blocks[i].samples[b]
                    samples += self.blocks[i].samples[b]
        count[0] = samples
        half = (samples + 1) // 2
        for b in range(SAMPLE_BINS):
            if bins[b] and half <= bins[b]:
                low = us_bin_low(b)
                return low + (us_bin_low(b + 1) - low) * half // bins[b]
            half -= bins[b]
        return 0

    cdef void update(self, AdaptiveWords* words, int64_t now) noexcept nogil:
        """One turn: the end of a measurement, the begin of one, or the next limit."""
        cdef AdaptiveSettings* settings = &self.adaptive
        cdef uint64_t samples = 0, median = self.median(words, &samples), limit = words.limit
        cdef double gradient
        if words.measuring_since:
            if samples < settings.samples and now - <int64_t>words.measuring_since < MEASURE_LONGEST_US:
                return
            if median and samples * 10 >= settings.samples:
                words.min_rtt_us = median
            words.measure_at = <uint64_t>(now + settings.measure_us) + draw(
                &self.random, <uint64_t>settings.measure_us * settings.jitter_permille // 1000 + 1)
            words.pinned = 0
            sw_put(&words.limit, words.resume_limit)
            sw_put(&words.measuring_since, 0)
        elif limit == 0:
            sw_put(&words.limit, settings.highest)
            words.measure_at = <uint64_t>now
        elif <uint64_t>now >= words.measure_at or words.pinned >= PINNED_TURNS:
            words.resume_limit = limit
            sw_put(&words.limit, settings.lowest)
            sw_put(&words.measuring_since, <uint64_t>now)
        elif median and words.min_rtt_us:
            gradient = words.min_rtt_us * (1000.0 + settings.buffer_permille) / 1000 / median
            gradient = 2.0 if gradient > 2 else 0.5 if gradient < 0.5 else gradient
            limit = <uint64_t>(limit * gradient + sqrt(limit * gradient))
            limit = settings.highest if limit > settings.highest else settings.lowest if limit < settings.lowest else limit
            words.pinned = words.pinned + 1 if limit == settings.lowest else 0
            sw_put(&words.limit, limit)
        else:
            return
        sw_put(&words.epoch, words.epoch + 1)


cdef UpstreamState upstream_at(object owner, str name, const Places* places, bint shared):
    cdef UpstreamState state = UpstreamState.__new__(UpstreamState)
    state.owner = owner
    state.name = name
    state.shared = shared
    state.slot = <UpstreamSlot*>places.slot
    state.blocks = <UpstreamBlock*>places.blocks
    state.block = state.blocks + places.index
    state.active = <uint32_t*>places.cells
    state.uses = <uint32_t*>(places.cells + places.stride)
    state.waiting = <uint32_t*>(places.cells + 2 * places.stride)
    state.connected = <uint32_t*>(places.cells + 3 * places.stride)
    state.processes, state.index = places.processes, places.index
    state.pid = getpid()
    state.kept = []
    state.seed(<uint64_t>state.pid << 32 ^ <uint64_t>state.slot)
    sw_put32(&state.uses[state.index], state.uses[state.index] + 1)
    state.eject = EjectSettings(7, 0, 5, 500, 1_000_000, 60_000_000, False)      # configure() tells
    state.budget = BudgetSettings(200, 10)
    return state
