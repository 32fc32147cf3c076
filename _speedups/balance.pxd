"""Choosing one endpoint of an upstream: arithmetic with the caller's clock, no I/O and no Python.

Strategy: what an endpoint's requests showed lies in a C struct that the pool's endpoint embeds, so that recording costs no
look-up. A balancer holds pointers to the candidates of one upstream and a compact table of the usable ones, which is made anew
when something changed and every tenth of a second; a choice works on that table. balance.pyx says why each rule is as it is.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef enum:                      # algorithms
    BALANCE_P2C_EWMA = 0        # two at random, the one with less latency x (requests in flight + 1)
    BALANCE_LEAST_REQUEST = 1   # two at random, the one with fewer requests in flight per weight
    BALANCE_ROUND_ROBIN = 2     # smooth weighted
    BALANCE_RANDOM = 3          # weighted
    BALANCE_MAGLEV = 4          # by the key, bounded load

cdef enum:                      # what became of a request, for finished()
    SAMPLE_GOOD = 0             # an answer that says how fast the endpoint is, refusals of the business (4xx) included
    SAMPLE_BAD = 1              # 429, 5xx, gRPC 2, 4, 8, 13, 14, 15, no connection, reset, timeout: a penalty, however long it took
    SAMPLE_ABANDONED = 2        # given up by our side: it took at least that long, nothing else is known

cdef struct Candidate:
    # Set by the pool; call changed() afterwards, or it is seen a tenth of a second later.
    uint64_t id                 # hash of the address, the same in every process: maglev's table is made of it
    int64_t born                # us; when it joined or came back: its slow start begins, and what was known of it is forgotten
    int32_t weight              # below 1: takes nothing
    uint8_t local               # in this machine's zone, or zones are not in use
    uint8_t usable              # resolved, not ejected, not draining
    # Set by the pool at any time; read by every choice.
    int32_t elsewhere           # requests in flight from the other workers
    # Written by started() and finished() alone.
    int32_t in_flight           # requests in flight from this worker; never below 0
    double ewma_us              # peak EWMA of the latency as of ewma_at; finite and at least 1 once ewma_at is set
    int64_t ewma_at             # us; 0: nothing is known
    int64_t penalty_until       # us; the endpoint failed, and until then it costs at least the time that is left
    int64_t hold_until          # us; the part of it that the endpoint asked for (Retry-After): no success shortens it
    int64_t trial_until         # us; it failed, and has neither succeeded since nor been left alone for long: one request is let try it
    int64_t tried_until         # us; one does, and until then the others cost as after a failure
    # Of the balancer.
    int64_t current             # smooth weighted round robin
    int64_t born_seen           # `born` when it was looked at last; BORN_UNSEEN: never

cdef struct Slot:               # a usable candidate
    int32_t index
    int64_t weight              # thousandths of the configured weight, slow start applied; at least 1
    int64_t before              # sum of the weights before it in its group
    double share                # mean weight of its group / weight; 1 when all are equal

cdef struct Group:              # slots[first : first + size]
    int first
    int size
    int64_t total               # of the weights
    bint equal                  # all weights are the same

cdef class Balancer:
    # Fixed by the constructor.
    cdef readonly int algorithm
    cdef int64_t slow_start_us
    cdef int load_percent       # bounded load of maglev
    # What there is to choose from. Invariant: candidates[0..count) stay valid as long as `owner` lives.
    cdef readonly int count
    cdef Candidate** candidates
    cdef object owner
    # The usable ones: groups[0] of this zone, groups[1] of the others. Invariant: slots has room for `count`.
    cdef Slot* slots
    cdef int32_t* slot_of       # of each candidate; -1: not usable. Room for `count`
    cdef Group groups[2]
    cdef uint64_t local_share   # of 2^32: how much goes to groups[0]
    cdef int64_t refresh_at     # us; 0: at the next choice
    # Maglev: candidate of each place; NULL for other algorithms and without candidates.
    cdef uint32_t* table
    cdef uint32_t table_size    # a prime
    cdef double typical_us      # the endpoints' latencies are around it; penalties left out
    cdef int typical_samples
    cdef uint64_t state         # of the random numbers
    cdef int64_t trouble_until  # us; by then no penalty and no trial of a candidate is left: nobody has to look for any
    cdef int64_t patience       # us; of the present choice: for so long a request that is not safe leaves a trial to others

    # Choose from these from now on; they keep what is known of them. `owner` keeps the pointers valid (the list of endpoints).
    # Raises MemoryError, and then keeps the old ones. Cost: maglev fills its table, up to some milliseconds.
    cdef int rebuild(self, Candidate** candidates, int count, object owner) except -1
    # Something that the pool sets has changed. O(1); the next choice looks at all candidates.
    cdef void changed(self) noexcept nogil
    # The index of the endpoint to take, -1 when none is usable. `key` matters to maglev only, and should come from hash_key().
    # `avoid` is not taken while there is another; -1 avoids none. `safe`: it may try an endpoint that has failed as soon as any
    # request may. Counts nothing: call started() when the request goes out.
    cdef int choose(self, int64_t now, uint64_t key, int avoid, bint safe) noexcept nogil
    cdef void started(self, Candidate* candidate, int64_t now) noexcept nogil
    # Once for each started(). rtt_us: from the request to the head of the answer, or to the failure. retry_after_us: what the
    # answer asks for, 0 nothing.
    cdef void finished(self, Candidate* candidate, int64_t now, int64_t rtt_us, int sample, int64_t retry_after_us) noexcept nogil
    # What a request is expected to take now, in us, before its place in the queue; penalties included. For choices and tables.
    cdef double expected_us(self, const Candidate* candidate, int64_t now) noexcept nogil

    cdef double cost(self, const Candidate* candidate, double share, int64_t now) noexcept nogil
    cdef bint failing(self, const Candidate* candidate, int64_t now) noexcept nogil
    cdef double latency(self, const Candidate* candidate, int64_t now) noexcept nogil
    cdef void refresh(self, int64_t now) noexcept nogil
    cdef void learn(self, double ewma_us) noexcept nogil
    cdef void fill_group(self, int which, int64_t now) noexcept nogil
    cdef int take(self, const Group* group, int64_t now, uint64_t key, int avoid) noexcept nogil
    cdef int take_p2c(self, const Group* group, int64_t now, int avoid) noexcept nogil
    cdef int take_fewest(self, const Group* group, int64_t now, int avoid) noexcept nogil
    cdef int take_smooth(self, const Group* group, int avoid) noexcept nogil
    cdef int take_maglev(self, const Group* group, int64_t now, uint64_t key, int avoid) noexcept nogil
    cdef int draw(self, const Group* group, int but) noexcept nogil
    cdef uint64_t below(self, uint64_t bound) noexcept nogil

# A candidate of which nothing is known.
cdef void candidate_reset(Candidate* candidate, uint64_t id, int weight, int64_t born) noexcept nogil
# 64-bit hash of an address or a key; the same in every process and on every machine, hence without a secret: whoever chooses
# keys can choose endpoints, which is what a key is for; the bounded load keeps that from overloading one.
cdef uint64_t hash_key(const char* data, size_t length) noexcept nogil
