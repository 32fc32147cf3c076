"""What all processes of one machine know of upstreams and their endpoints: load, health, retry budget, counters.

Strategy: a slot in shared memory for each upstream and each (upstream, address). What one process alone writes lies in that
process's own cells and is added up by whoever asks; what all write is one word, changed by compare-and-swap. Nothing a killed
process leaves behind lasts: its cells are cleared when it is reaped, and every claim it held expires. Times are
CLOCK_MONOTONIC microseconds, given by the caller. See upstream_state.pyx for the arguments.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from gateway._speedups.shared_words cimport sw_load, sw_load32

# EndpointState.availability(), best first
cdef enum:
    USABLE = 0
    MAY_PROBE = 1               # the ejection is over: admit() gives one request over all processes the right to try
    EJECTED = 2                 # by its failures, or its probe is under way
    UNHEALTHY = 3               # says the active check

# How an attempt ended, for EndpointState.report()
cdef enum:
    OUT_OK = 0                  # an answer, business refusals included
    OUT_NEUTRAL = 1             # an answer that says nothing about health (429, gRPC RESOURCE_EXHAUSTED)
    OUT_CONNECT = 2             # no connection: refused, unreachable, TLS failed, or not in time
    OUT_RESET = 3               # the connection broke, or the answer was not HTTP
    OUT_TIMEOUT = 4             # connected, but no (further) answer in time
    OUT_STATUS = 5              # 500, 502, 503, 504; gRPC: see classify_grpc()
    OUT_CANCELLED = 6           # we gave up for reasons of our own (client gone, hedge lost): judges nothing
    OUTCOMES = 7

# What EndpointState.report() decided; worth a line in the log
cdef enum:
    EVENT_NONE = 0
    EVENT_EJECTED = 1           # out until ejected_until()
    EVENT_PROBE_FAILED = 2      # out again, longer
    EVENT_RETURNED = 3          # the probe succeeded: in use again
    EVENT_CHECK_PASSED = 4      # by checked(): the active check found it healthy again
    EVENT_CHECK_FAILED = 5

# UpstreamState.count(); each process counts for itself
cdef enum:
    U_REQUESTS = 0              # original requests, by deposit()
    U_SUCCESSES = 1             # of these, the ones whose final answer was no failure: effective success
    U_ATTEMPTS = 2              # requests sent to an endpoint, retries and hedges included, by EndpointState.report()
    U_ATTEMPT_SUCCESSES = 3     # actual success
    U_RETRIES = 4               # granted by withdraw()
    U_BUDGET_EMPTY = 5          # refused by withdraw()
    U_QUEUED = 6
    U_QUEUE_TIMEOUTS = 7
    U_REQUESTS_FULL = 8         # enter() refused
    U_PENDING_FULL = 9
    U_CONNECTIONS_FULL = 10
    U_HEDGES = 11
    U_NO_ENDPOINT = 12          # every endpoint ejected or unhealthy
    U_CAPPED = 13               # an ejection that `share` forbade, by report()
    U_COUNTERS = 16

# EndpointState.count()
cdef enum:
    E_OUTCOMES = 0              # one for each OUT_*, by report()
    E_RETRIES = 8               # attempts here that were not the request's first
    E_EJECTIONS = 9
    E_PROBES = 10
    E_RETURNS = 11
    E_REQUESTS_FULL = 12        # enter() refused
    E_COUNTERS = 14

cdef enum:
    SECONDS = 10                # length of the failure window and of the retry budget, in buckets of one second
    SAMPLE_BINS = 192           # of adaptive concurrency: eight for each power of two microseconds
    CELL_LINE = 16              # cells of 16 processes share a cache line: whoever adds them up reads few lines
    TEXT_BYTES = 256            # of each label, with its length before it

cdef struct Tally:              # one second of one process; the stamp says which second (and of which health generation)
    uint64_t stamp
    uint32_t good               # successes; original requests
    uint32_t bad                # failures; retries

cdef struct EndpointBlock:      # written by one process
    uint64_t counters[E_COUNTERS]
    uint64_t ewma_us            # gauge: what the balancer of this process thinks of it; 0 nothing
    uint64_t reserved
    Tally window[SECONDS]
    uint64_t padding[4]         # 320 bytes: no cache line has two writers

cdef struct EndpointSlot:
    uint64_t health             # state, until when, back-off exponent, generation: see upstream_state.pyx
    uint64_t run                # consecutive failures of a generation; while a probe is under way, who probes
    uint64_t active             # what the active check says, and until when that holds
    uint64_t opened             # us: since when it is in use
    uint64_t version            # odd while the labels change
    uint64_t touched            # us: last opened, or given up, by a process
    uint64_t active_run         # written by the checker alone
    uint64_t weight
    char upstream[TEXT_BYTES]
    char address[TEXT_BYTES]
    char target[TEXT_BYTES]
    char zone[TEXT_BYTES]

cdef struct UpstreamBlock:      # written by one process
    uint64_t counters[U_COUNTERS]
    Tally budget[SECONDS]
    uint64_t sample_epoch
    uint64_t sample_count
    uint16_t samples[SAMPLE_BINS]
    uint64_t padding[2]         # 704 bytes

cdef struct AdaptiveWords:      # of one upstream, changed by whoever wins the turn
    uint64_t limit              # 0 until the first sample
    uint64_t min_rtt_us
    uint64_t turn_at            # when the next update is due; moving it is the claim to make it
    uint64_t measure_at         # when minRTT is measured next
    uint64_t measuring_since    # 0 not measuring
    uint64_t resume_limit
    uint64_t epoch              # of the samples
    uint64_t pinned             # updates in a row that found the limit at its minimum

cdef struct UpstreamSlot:
    uint64_t version
    uint64_t touched
    uint64_t budget_ratio       # as configured, for those who only look: permille, retries per second, requests
    uint64_t budget_reserve
    uint64_t limit
    uint64_t reserved[3]
    AdaptiveWords adaptive
    char name[TEXT_BYTES]

cdef struct EjectSettings:
    uint32_t failures           # consecutive; 0 never
    uint32_t ratio_permille     # failures of all in the window; 0 never
    uint32_t minimum            # requests in the window before the ratio counts
    uint32_t share_permille     # of the endpoints that may be out at once
    int64_t base_us
    int64_t max_us
    bint panic                  # with all out the upstream is used as if none were

cdef struct BudgetSettings:
    uint32_t ratio_permille     # retries per original request
    uint32_t reserve            # retries per second that are always there

cdef struct AdaptiveSettings:
    bint on
    uint32_t lowest
    uint32_t highest
    uint32_t samples            # of one measurement of minRTT
    uint32_t buffer_permille    # of minRTT that is no sign of queueing
    uint32_t jitter_permille
    int64_t update_us
    int64_t measure_us

cdef class UpstreamState:
    """One upstream, as one process sees it. Every method but those of Python's own side is for that process alone."""
    cdef object owner                   # the table (or the private memory): keeps the mapping in place
    cdef UpstreamSlot* slot
    cdef UpstreamBlock* block           # of this process
    cdef UpstreamBlock* blocks          # one for each process; blocks[-1]: those that have ended
    cdef uint32_t* active               # cells: requests in flight
    cdef uint32_t* waiting              # cells: queue places
    cdef uint32_t* connected            # cells: connections
    cdef uint32_t* uses
    cdef const uint64_t* processes      # how many cells are in use
    cdef uint32_t index                 # of this process among the cells
    cdef int pid
    cdef list kept                      # the EndpointStates of `members`
    cdef EndpointSlot** members         # this process's endpoints of the upstream
    cdef uint32_t member_count
    cdef uint64_t random
    cdef EjectSettings eject
    cdef BudgetSettings budget
    cdef AdaptiveSettings adaptive
    cdef readonly str name
    cdef readonly bint shared           # False: the table was full, this process counts alone

    # Take one place of `limit` over all processes (0: no limit); the caller owes one leave() for a True.
    cpdef bint enter(self, uint32_t limit) noexcept nogil
    cpdef void leave(self) noexcept nogil
    cpdef bint enqueue(self, uint32_t limit) noexcept nogil          # a place in the queue
    cpdef void dequeue(self) noexcept nogil
    cpdef bint connect(self, uint32_t limit) noexcept nogil          # a connection
    cpdef void disconnect(self) noexcept nogil
    cpdef uint32_t in_flight(self) noexcept nogil
    cpdef uint32_t queued(self) noexcept nogil
    cpdef uint32_t connections(self) noexcept nogil

    # The retry budget: deposit() once for each original request, withdraw() before each retry or hedge (False: do not).
    cpdef void deposit(self, int64_t now) noexcept nogil
    cpdef bint withdraw(self, int64_t now) noexcept nogil
    cpdef int64_t balance(self, int64_t now) noexcept nogil          # in thousandths of a retry, never negative

    # Adaptive concurrency. allowed() is what enter() should be given: `limit` or the adaptive one, whichever is lower.
    cpdef uint32_t allowed(self, uint32_t limit) noexcept nogil
    cpdef void sampled(self, int64_t started, int64_t now) noexcept nogil

    cpdef void count(self, int counter) noexcept nogil
    # How many endpoints may be out at once.
    cpdef uint32_t cap(self) noexcept nogil

    cdef int64_t left(self, int64_t now) noexcept nogil
    cdef uint32_t others_out(self, const EndpointSlot* own, uint64_t now_ms) noexcept nogil
    cdef uint64_t median(self, const AdaptiveWords* words, uint64_t* count) noexcept nogil
    cdef void update(self, AdaptiveWords* words, int64_t now) noexcept nogil

cdef class EndpointState:
    """One endpoint, as one process sees it."""
    cdef object owner
    cdef EndpointSlot* slot
    cdef EndpointBlock* block
    cdef EndpointBlock* blocks
    cdef uint32_t* active
    cdef uint32_t* uses
    cdef const uint64_t* processes
    cdef uint32_t index
    cdef int pid
    cdef uint64_t random
    # What the last event of report() in this process was about, for explain().
    cdef uint32_t seen_run, seen_bad, seen_total
    cdef int64_t seen_us
    cdef readonly str address
    cdef readonly bint shared

    cpdef int availability(self, int64_t now) noexcept nogil
    # The ticket of a request that is to be sent now, kept until report(); 0 when the endpoint must not be used. For the one
    # request that may try an endpoint whose ejection is over this claims the probe, for at most probe_us.
    cpdef uint32_t admit(self, int64_t now, int64_t probe_us) noexcept nogil
    # The ticket of a request that is sent whatever the endpoint's state (panic); never a probe.
    cpdef uint32_t ticket(self) noexcept nogil
    cpdef bint is_probe(self, uint32_t ticket) noexcept nogil
    # How the attempt with this ticket ended: once for each, OUT_CANCELLED included. Returns EVENT_*.
    cpdef int report(self, UpstreamState upstream, int outcome, uint32_t ticket, int64_t now) noexcept nogil

    cpdef bint enter(self, uint32_t limit) noexcept nogil
    cpdef void leave(self) noexcept nogil
    cpdef uint32_t in_flight(self) noexcept nogil
    cpdef uint32_t own_in_flight(self) noexcept nogil                # of this process
    cpdef int64_t ejected_until(self) noexcept nogil                 # us; 0 when it is in use
    cpdef int64_t usable_since(self) noexcept nogil                  # us: made, returned, or found healthy; for slow start
    cpdef void count(self, int counter) noexcept nogil
    cpdef void set_ewma(self, int64_t us) noexcept nogil

    cdef void succeeded(self, uint32_t ticket, int64_t now) noexcept nogil
    cdef int failed(self, UpstreamState upstream, uint64_t word, int64_t now) noexcept nogil
    cdef int eject(self, UpstreamState upstream, uint64_t word, int64_t now) noexcept nogil
    cdef int put_out(self, UpstreamState upstream, uint64_t word, uint64_t exponent, int64_t now, int event) noexcept nogil
    cdef int probed(self, UpstreamState upstream, int outcome, uint64_t word, int64_t now) noexcept nogil
    cdef bint put_back(self, uint64_t word, int64_t now) noexcept nogil
    cdef void let_probe(self, int64_t now) noexcept nogil

# Where a state's words lie, as the table has laid them out; valid as long as `owner` lives.
cdef struct Places:
    char* slot
    char* cells                 # kinds of cells one after the other, `stride` bytes each
    char* blocks                # one for each process; before them that of those that have ended
    size_t stride
    const uint64_t* processes   # how many cells are in use
    uint32_t index              # of this process

cdef UpstreamState upstream_at(object owner, str name, const Places* places, bint shared)
cdef EndpointState endpoint_at(object owner, str address, const Places* places, bint shared)

# OUT_* of an answer's status, and of a gRPC status.
cpdef int classify_status(int status) noexcept nogil
cpdef int classify_grpc(int code) noexcept nogil

# The active check's arithmetic: thresholds of consecutive results.
cpdef uint64_t check_run(uint64_t run, bint good) noexcept nogil
cpdef uint64_t check_verdict(uint64_t before, uint64_t run, int healthy, int unhealthy) noexcept nogil

# Words that the table reads too.
cdef enum:
    OPEN = 0
    DECIDING = 1                # until: when it was marked
    OUT = 2                     # until: when a probe may go
    PROBING = 3                 # until: when the claim expires
    GENERATION_MASK = 0x1FFFF
    EXPONENT_MAX = 31
    ACTIVE_UNKNOWN = 0
    ACTIVE_HEALTHY = 1
    ACTIVE_UNHEALTHY = 2
    GOOD = 1                    # a run of checks that passed
    RECOVERY = 3                # the same, after one that failed

cdef inline uint64_t health_word(uint64_t until_ms, uint64_t state, uint64_t exponent, uint64_t generation) noexcept nogil:
    return until_ms << 24 | state << 22 | exponent << 17 | generation


cdef inline uint64_t state_of(uint64_t word) noexcept nogil:
    return word >> 22 & 3

cdef inline void ring_total(const Tally* ring, uint64_t second, uint64_t generation, uint64_t* good, uint64_t* bad) noexcept nogil:
    """Add what the last ten seconds hold; a second that this process's clock has not reached belongs to them."""
    cdef uint64_t stamp
    cdef int i
    for i in range(SECONDS):
        stamp = sw_load(&ring[i].stamp)
        if stamp >> 32 == generation and <uint64_t><uint32_t>stamp + SECONDS > second:
            good[0] += sw_load32(&ring[i].good)
            bad[0] += sw_load32(&ring[i].bad)

cdef inline uint64_t exponent_of(uint64_t word) noexcept nogil:
    return word >> 17 & EXPONENT_MAX

cdef inline uint64_t generation_after(uint64_t word) noexcept nogil:
    """Never 0, which is no ticket."""
    cdef uint64_t generation = (word + 1) & GENERATION_MASK
    return generation if generation else 1

cdef inline uint64_t prober(uint64_t generation, uint32_t index) noexcept nogil:
    """`run` while process `index` probes under this generation."""
    return generation << 32 | <uint64_t>1 << 31 | index

cdef inline str read_text(const char* text):
    cdef int length = 0
    while length < TEXT_BYTES and text[length]:
        length += 1
    return text[:length].decode("utf-8", "replace")
