"""Choosing one endpoint of an upstream: peak-EWMA of two, least request, round robin, random, Maglev.

Strategy: one choice is some arithmetic on a compact table of the usable candidates. Only two of them are looked at by p2c_ewma,
least_request and random, whatever their number; round robin looks at all, Maglev adds up the requests in flight and walks its
table. The table is made anew when the pool says that something changed, and every tenth of a second, so that a slow
start advances and a forgotten call of changed() heals; a choice that turns out unusable is made again on a fresh table.

Peak EWMA: a latency above the average replaces it, one below is blended in with exp(-dt/10 s) [Finagle, Linkerd, tower]. Reading
projects and stores nothing, so a look never changes what is seen. Six things the plain algorithm gets wrong:
 1. An idle endpoint decays to nothing, and nothing times any number in flight is nothing: all requests go there until the first
    answers. Here what is known of an endpoint decays towards *half of what is typical for this upstream* (a running median of the
    endpoints' averages, so that one slow endpoint does not move it; 30 ms before there is any). So an endpoint that was slow is
    tried again, but never carries more than twice what the others do before it has shown its speed; after a rest all are alike.
    An endpoint that never answered, or not since it came back from an ejection, is taken for a good typical one (90 %): it gets
    as much as the others, with a slow start less. What its predecessor or its first request was like would keep it empty for a minute.
    While nobody asks it, it costs nothing: where the others are faster than typical, no request would show that it is as fast.
 2. Failures are fast and look cheap. A failure makes its endpoint cost the time until the penalty ends, 5 s or what Retry-After
    asks for (at most 300 s), if that is more than its average. The penalty runs off with the clock, where a recorded latency of
    5 s would need ln(5 s / 2 ms) = 8 time constants: one failure in 10,000 would keep most endpoints of a busy upstream empty
    all the time. A success halves what is left, for it is the better witness, but never what the endpoint asked for itself.
    The average is left alone: how long an endpoint takes to fail says nothing about how fast it answers. A connect timeout of
    2 s taken for a latency would keep it empty for ln(2 s / 2 ms) = 7 time constants after the network has healed.
 3. Weights. The pair is drawn by weight, and requests in flight are counted per weight, so that a busy upstream fills endpoints
    in proportion. Idle, averages differ by noise alone, and taking the smaller would deal the requests out evenly: with
    unequal weights the second of a pair must be cheaper by a quarter, or the draw stands.
 4. A pair drawn with replacement is one endpoint twice in 1 of N draws, which then wins unseen: pairs are distinct.
 5. Where half of all fail, a pair in four is two of them, and one of the two would get the request: then another pair is drawn.
 6. The average that is left alone would draw a share of the load as soon as a penalty is over, into whatever swallows it. So who
    failed is tried: the request that is first to go there makes it cost 5 s again for the others, until a success ends that, or
    30 s have gone by without a failure. A safe request tries it a second before one that is not. What was given up by our side
    and took 8 times as long as expected counts as a failure here: it is missing rather than late.

Least request draws its pair by weight too and takes the one with fewer requests in flight per weight; a tie goes to the first.
Envoy's rule for unequal weights, round robin by weight / (in flight + 1), settles where in flight x (in flight + 1) is in
proportion to the weight: an endpoint of four times the weight would carry twice the load. Least request has failure mode 2 as
well (who fails at once has no requests in flight), hence an endpoint under penalty loses to one without. Round robin and random deal by weight and nothing else; what fails there is the business of ejection.

Maglev [Eisenbud et al., NSDI 2016]: the table is made of all candidates, usable or not, in the order of their ids, so that every
process and machine has the same one. A place whose candidate is not usable, or has more than its share of the requests in flight
(125 %), passes the key on to the next place: nobody else's keys move, and a key returns when its endpoint does. A candidate may
take one more request iff in_flight < load x (total + 1) x its share of the weight; the shares add up to 1 and load is over 1, so
somebody always may, but for `avoid`. A key is not passed on to an endpoint under penalty, which would otherwise collect what the
others have too much of; its own keys stay with it until it is ejected. Slow start shrinks the share, not the places: keys keep their endpoint.

Slow start: weight x max(10 %, age / window). Zones: everything stays local while 70 % of the local weight is usable; below that
the local part is usable / 70 %, and the rest goes to the other zones, as far as they are themselves usable (Envoy's priority
arithmetic, whose factor 1.4 puts the limit at 71 %).

Python is called from here: when endpoints are added or removed, never for a choice.

Safety: candidates[0..count), slot_of[0..count) and slots[0..count) are allocated together by rebuild() and replaced only when all
three (and the table) could be. Slots and groups are written by refresh() alone, which hands out each index below `count` at most
once, so first + size <= count. The pointers in `candidates` are valid while `owner` lives, and this object owns a reference to it.
Places of the table hold indices below `count`.
"""

cimport cython
from libc.math cimport exp
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

import os
from typing import Final

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    /* The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of v moves half of the result's. */
    static inline uint64_t cw_mix64(uint64_t v) {
        v = (v ^ (v >> 30)) * 0xBF58476D1CE4E5B9u;
        v = (v ^ (v >> 27)) * 0x94D049BB133111EBu;
        return v ^ (v >> 31);
    }
    static inline uint64_t cw_below(uint64_t *state, uint64_t bound) {
        *state += 0x9E3779B97F4A7C15u;
        return (uint64_t)(((unsigned __int128)cw_mix64(*state) * bound) >> 64);
    }
    static inline uint64_t cw_hash_bytes(const char *data, size_t length) {
        uint64_t v, h = cw_mix64(length + 0x9E3779B97F4A7C15u);
        for (; length >= 8; data += 8, length -= 8) {
            memcpy(&v, data, 8);
            h = cw_mix64(h ^ v) + 0x9E3779B97F4A7C15u;
        }
        v = 0;
        memcpy(&v, data, length);
        return cw_mix64(h ^ v);
    }
    """
    uint64_t cw_mix64(uint64_t v) noexcept nogil
    uint64_t cw_below(uint64_t* state, uint64_t bound) noexcept nogil
    uint64_t cw_hash_bytes(const char* data, size_t length) noexcept nogil

cdef enum:
    REFRESH_US = 100_000
    TYPICAL_QUICK = 64                  # samples with the greater step, to come away from an odd first one
    WEIGHT_UNIT = 1000                  # a slot's weight is in thousandths, so that slow start has steps
    WEIGHT_MAX = 1_000_000
    SLOW_START_FLOOR = 100              # thousandths
    MAGLEV_SPARE = 2                    # requests in flight that move no key: the last one may have ended this moment
    DRAWS = 8                           # pairs that are drawn while both of each are failing: of half of all, 1 in 4 is such a pair
    WALK_MAX = 512                      # places that a key is passed on before all candidates are compared

ALGORITHMS: Final = ("p2c_ewma", "least_request", "round_robin", "random", "maglev")     # in the order of BALANCE_*
assert len(ALGORITHMS) == BALANCE_MAGLEV + 1

cdef int64_t BORN_UNSEEN = -(<int64_t>1 << 62)
cdef int64_t PENALTY_US = 5_000_000     # Linkerd's load biaser
cdef int64_t PENALTY_MAX_US = 300_000_000       # a longer Retry-After is no statement about load
cdef int64_t TRIAL_US = 30_000_000      # twice the time that an answer's head has by default: a request that tries it fails before
cdef int64_t PATIENCE_US = 1_000_000    # as long as the pool keeps a probe for a safe request
cdef int64_t RTT_MAX_US = 3_600_000_000
cdef double TAU_US = 10e6               # Linkerd, Envoy
cdef double TYPICAL_QUICK_STEP = 1.0 / 8
cdef double TYPICAL_STEP = 1.0 / 64
cdef double FRESH = 0.9                 # of what is typical: a new endpoint is tried, even where nobody is busy
cdef double SEED_US = 30e3              # Linkerd
cdef double CLEARLY_CHEAPER = 0.75
cdef double MISSING = 8             # times what was expected: no answer is as good as a failure
cdef double ZONE_HEALTHY = 0.7
cdef uint64_t ALL_LOCAL = <uint64_t>1 << 32

# Primes near powers of two. 100 places for each candidate make shares even within about a per cent.
cdef uint32_t[9] TABLE_SIZES = [251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65537]


cdef void candidate_reset(Candidate* candidate, uint64_t id, int weight, int64_t born) noexcept nogil:
    candidate.id = id
    candidate.born = born
    candidate.weight = weight
    candidate.local = 1
    candidate.usable = 1
    candidate.elsewhere = 0
    candidate.in_flight = 0
    candidate.ewma_us = 0
    candidate.ewma_at = 0
    candidate.penalty_until = 0
    candidate.hold_until = 0
    candidate.trial_until = 0
    candidate.tried_until = 0
    candidate.current = 0
    candidate.born_seen = BORN_UNSEEN


cdef uint64_t hash_key(const char* data, size_t length) noexcept nogil:
    return cw_hash_bytes(data, length)


cdef inline int64_t within(int64_t value, int64_t lowest, int64_t highest) noexcept nogil:
    return lowest if value < lowest else highest if value > highest else value


cdef inline int64_t load_of(const Candidate* candidate) noexcept nogil:
    """Requests in flight, from all workers; a figure of the others that is briefly negative counts as none."""
    return candidate.in_flight + (candidate.elsewhere if candidate.elsewhere > 0 else 0)


cdef int64_t weight_now(const Candidate* candidate, int64_t slow_start_us, int64_t now) noexcept nogil:
    """The weight in thousandths, slow start applied; at least 1 for a weight of at least 1."""
    cdef int64_t weight = candidate.weight if candidate.weight < WEIGHT_MAX else WEIGHT_MAX
    cdef int64_t age = now - candidate.born
    cdef int64_t part
    if age >= slow_start_us:
        return weight * WEIGHT_UNIT
    # 0 <= age < slow_start_us < 2^50 below
    part = age * WEIGHT_UNIT // slow_start_us if age > 0 else 0
    return weight * (part if part > SLOW_START_FLOOR else SLOW_START_FLOOR)


cdef uint32_t* fill_table(Candidate** candidates, int count, uint32_t size) except NULL:
    """A Maglev table of `size` (a prime) places; candidates that take nothing have none, unless all are so."""
    cdef list order = sorted(range(count), key=lambda n: (candidates[<int>n].id, n))
    cdef uint32_t* table = <uint32_t*>malloc(size * sizeof(uint32_t))
    cdef uint32_t* at = <uint32_t*>malloc(<size_t>count * sizeof(uint32_t))
    cdef uint32_t* skip = <uint32_t*>malloc(<size_t>count * sizeof(uint32_t))
    cdef double* credit = <double*>malloc(<size_t>count * sizeof(double))
    cdef double heaviest = 0
    cdef uint32_t filled = 0, place
    cdef int i
    if table == NULL or at == NULL or skip == NULL or credit == NULL:
        free(table)
        free(at)
        free(skip)
        free(credit)
        raise MemoryError
    for i in range(count):
        heaviest = max(heaviest, <double>candidates[i].weight)
        at[i] = <uint32_t>(cw_mix64(candidates[i].id) % size)
        skip[i] = <uint32_t>(cw_mix64(candidates[i].id ^ 0xA5A5A5A5A5A5A5A5) % (size - 1)) + 1
        credit[i] = 1               # the first turn is everybody's: nobody is left without a place
    for place in range(size):
        table[place] = <uint32_t>count
    while filled < size:
        # Each turn fills at least one place: the heaviest candidate's credit is 1 in each.
        for i in order:
            if heaviest >= 1 and candidates[i].weight < 1:
                continue
            if credit[i] >= 1:
                credit[i] -= 1
                # The steps of one candidate visit every place, so a free one is found.
                while table[at[i]] != <uint32_t>count:
                    at[i] = <uint32_t>((<uint64_t>at[i] + skip[i]) % size)
                table[at[i]] = <uint32_t>i
                filled += 1
                if filled == size:
                    break
            credit[i] += candidates[i].weight / heaviest if heaviest >= 1 else 1
    free(at)
    free(skip)
    free(credit)
    return table


@cython.final
cdef class Balancer:
    """The balancer of one upstream in one worker.

    algorithm: BALANCE_*. slow_start_us: how long an endpoint's weight grows from a tenth, 0 not at all. load_percent: Maglev's
    bound, over 100. seed: of the random numbers, 0 for one from the system; forked copies must not share it (see reseed).
    """

    def __init__(self, int algorithm, *, int64_t slow_start_us=0, int load_percent=125, uint64_t seed=0):
        if not BALANCE_P2C_EWMA <= algorithm <= BALANCE_MAGLEV:
            raise ValueError(f"there is no balancing algorithm {algorithm}")
        if not 0 <= slow_start_us <= 86_400_000_000:
            raise ValueError("slow start must be from 0 s to a day")
        if not 100 < load_percent <= 100_000:
            raise ValueError("the bound on the load must be over 100 %")
        self.algorithm = algorithm
        self.slow_start_us = slow_start_us
        self.load_percent = load_percent
        self.typical_us = SEED_US
        self.reseed(seed)

    def __dealloc__(self):
        free(self.candidates)
        free(self.slots)
        free(self.slot_of)
        free(self.table)

    def reseed(self, uint64_t seed=0) -> None:
        """Start other random numbers; with 0 from the system. A process that was forked calls it once."""
        self.state = seed if seed else int.from_bytes(os.urandom(8), "little")

    cdef int rebuild(self, Candidate** candidates, int count, object owner) except -1:
        cdef size_t room = <size_t>count if count > 0 else 1
        cdef Candidate** kept = <Candidate**>malloc(room * sizeof(Candidate*))
        cdef Slot* slots = <Slot*>malloc(room * sizeof(Slot))
        cdef int32_t* slot_of = <int32_t*>malloc(room * sizeof(int32_t))
        cdef uint32_t* table = NULL
        cdef uint32_t size = 0
        try:
            if kept == NULL or slots == NULL or slot_of == NULL:
                raise MemoryError
            if self.algorithm == BALANCE_MAGLEV and count > 0:
                for size in TABLE_SIZES:
                    if <uint64_t>size >= <uint64_t>count * 100:
                        break
                table = fill_table(candidates, count, size)
        except BaseException:
            free(kept)
            free(slots)
            free(slot_of)
            raise
        if count > 0:
            memcpy(kept, candidates, <size_t>count * sizeof(Candidate*))
        free(self.candidates)
        free(self.slots)
        free(self.slot_of)
        free(self.table)
        self.candidates = kept
        self.slots = slots
        self.slot_of = slot_of
        self.table = table
        self.table_size = size
        self.count = count if count > 0 else 0
        self.groups[0].first = self.groups[0].size = 0
        self.groups[1].first = self.groups[1].size = 0
        self.owner = owner
        self.refresh_at = 0
        return 0

    cdef void changed(self) noexcept nogil:
        self.refresh_at = 0

    cdef int choose(self, int64_t now, uint64_t key, int avoid, bint safe) noexcept nogil:
        cdef const Group* group
        cdef uint64_t part
        cdef int attempt, index
        self.patience = 0 if safe else PATIENCE_US
        for attempt in range(2):
            if attempt or now >= self.refresh_at:
                self.refresh(now)
            group = &self.groups[0]
            if self.groups[1].size:
                if self.local_share < ALL_LOCAL:
                    # The key decides, so that equal keys stay together.
                    part = cw_mix64(key) >> 32 if self.algorithm == BALANCE_MAGLEV else self.below(ALL_LOCAL)
                    if part >= self.local_share:
                        group = &self.groups[1]
                if group.size == 0 or (group.size == 1 and self.slots[group.first].index == avoid):
                    group = &self.groups[1] if group == &self.groups[0] else &self.groups[0]
                    if group.size == 0:
                        group = &self.groups[1]
            if group.size == 0:
                # Nobody was usable a moment ago; somebody may have come back without a word.
                continue
            index = self.slots[group.first].index if group.size == 1 else self.take(group, now, key, avoid)
            if self.candidates[index].usable:
                return index
        return -1

    cdef void started(self, Candidate* candidate, int64_t now) noexcept nogil:
        candidate.in_flight += 1
        if now < candidate.trial_until:
            candidate.tried_until = now + PENALTY_US

    cdef void finished(self, Candidate* candidate, int64_t now, int64_t rtt_us, int sample, int64_t retry_after_us) noexcept nogil:
        cdef double rtt = <double>within(rtt_us, 1, RTT_MAX_US)
        cdef int64_t asked = within(retry_after_us, 0, PENALTY_MAX_US)
        cdef double kept
        if candidate.in_flight > 0:
            candidate.in_flight -= 1
        if sample == SAMPLE_BAD or (sample == SAMPLE_ABANDONED and rtt > MISSING * self.latency(candidate, now)):
            candidate.penalty_until = max(candidate.penalty_until, now + max(asked, PENALTY_US))
            candidate.hold_until = max(candidate.hold_until, now + asked)
            candidate.trial_until = max(candidate.trial_until, candidate.penalty_until + TRIAL_US)
            self.trouble_until = max(self.trouble_until, candidate.trial_until + PENALTY_US)
            return
        if sample != SAMPLE_GOOD:
            # At least that slow; that it is faster was not shown.
            if rtt > self.latency(candidate, now):
                candidate.ewma_us = rtt
                candidate.ewma_at = now
            return
        candidate.trial_until = candidate.tried_until = 0
        if candidate.ewma_at == 0 or rtt > candidate.ewma_us:
            candidate.ewma_us = rtt
        elif now > candidate.ewma_at:
            kept = exp((candidate.ewma_at - now) / TAU_US)
            candidate.ewma_us = candidate.ewma_us * kept + rtt * (1 - kept)
        candidate.ewma_at = now if now > candidate.ewma_at else candidate.ewma_at
        if candidate.penalty_until > now:
            candidate.penalty_until = max(candidate.hold_until, now + (candidate.penalty_until - now) // 2)
        self.learn(candidate.ewma_us)

    cdef void learn(self, double ewma_us) noexcept nogil:
        """Move `typical_us` towards the median of what it is shown: as often up as down, each time by the same factor."""
        cdef double step = TYPICAL_STEP
        if self.typical_samples < TYPICAL_QUICK:
            step = TYPICAL_QUICK_STEP
            self.typical_samples = self.typical_samples + 1
            if self.typical_samples == 1:
                self.typical_us = ewma_us
        if ewma_us > self.typical_us:
            self.typical_us = self.typical_us * (1 + step)
        elif ewma_us < self.typical_us:
            self.typical_us = self.typical_us * (1 - step)

    cdef double latency(self, const Candidate* candidate, int64_t now) noexcept nogil:
        cdef double rest = self.typical_us * 0.5
        if candidate.ewma_at == 0:
            return self.typical_us * FRESH
        if now <= candidate.ewma_at:
            return candidate.ewma_us
        # now > ewma_at: the exponent is negative, the factor in [0, 1); both ends are finite and positive, so is what lies between.
        return rest + (candidate.ewma_us - rest) * exp((candidate.ewma_at - now) / TAU_US)

    cdef double expected_us(self, const Candidate* candidate, int64_t now) noexcept nogil:
        cdef double found = self.latency(candidate, now)
        cdef double left = <double>(max(candidate.penalty_until, candidate.tried_until) - now)
        return left if left > found else found

    cdef bint failing(self, const Candidate* candidate, int64_t now) noexcept nogil:
        """Whether it is under penalty, or being tried, as far as the present request goes."""
        cdef int64_t patience
        if now >= self.trouble_until:
            return False
        patience = self.patience if now < candidate.trial_until else 0
        return candidate.penalty_until + patience > now or candidate.tried_until > now

    cdef double cost(self, const Candidate* candidate, double share, int64_t now) noexcept nogil:
        cdef int64_t load = load_of(candidate)
        cdef double found
        if now < self.trouble_until and self.failing(candidate, now):
            found = self.expected_us(candidate, now)
            if self.patience and found < PATIENCE_US:
                found = PATIENCE_US
        elif load == 0 and candidate.ewma_at == 0:
            return 0
        else:
            found = self.latency(candidate, now)
        return found * (<double>load * share + 1)

    # -- what is usable

    cdef void refresh(self, int64_t now) noexcept nogil:
        cdef double all_of[2]
        cdef double usable[2]
        cdef double local, others
        cdef Candidate* candidate
        cdef int i, which
        all_of[0] = all_of[1] = usable[0] = usable[1] = 0
        for i in range(self.count):
            candidate = self.candidates[i]
            if candidate.born != candidate.born_seen:
                if candidate.born_seen != BORN_UNSEEN:
                    # Another process, likely; how the last one fared, and how long the first request to this one took, is past.
                    candidate.ewma_at = 0
                    candidate.penalty_until = candidate.hold_until
                    candidate.trial_until = candidate.tried_until = 0
                candidate.born_seen = candidate.born
            self.slot_of[i] = -1
            # A reload hands over what is known of an endpoint, not of its upstream.
            self.trouble_until = max(self.trouble_until, candidate.penalty_until, candidate.trial_until + PENALTY_US)
            if candidate.weight > 0:
                which = 0 if candidate.local else 1
                all_of[which] += candidate.weight
                if candidate.usable:
                    usable[which] += candidate.weight
        self.groups[0].first = 0
        self.fill_group(0, now)
        self.groups[1].first = self.groups[0].size
        self.fill_group(1, now)
        local = min(1.0, usable[0] / (all_of[0] * ZONE_HEALTHY)) if usable[0] > 0 else 0.0
        others = min(1.0 - local, usable[1] / (all_of[1] * ZONE_HEALTHY)) if usable[1] > 0 else 0.0
        self.local_share = ALL_LOCAL
        if others > 0:
            self.local_share = <uint64_t>(local / (local + others) * <double>ALL_LOCAL)
        self.refresh_at = now + REFRESH_US

    cdef void fill_group(self, int which, int64_t now) noexcept nogil:
        cdef Group* group = &self.groups[which]
        cdef Candidate* candidate
        cdef Slot* slot
        cdef int i
        group.size = 0
        group.total = 0
        group.equal = True
        for i in range(self.count):
            candidate = self.candidates[i]
            if candidate.usable and candidate.weight > 0 and (candidate.local != 0) == (which == 0):
                self.slot_of[i] = group.first + group.size
                slot = &self.slots[group.first + group.size]
                slot.index = i
                slot.weight = weight_now(candidate, self.slow_start_us, now)
                slot.before = group.total
                group.total += slot.weight
                group.size += 1
                if slot.weight != self.slots[group.first].weight:
                    group.equal = False
        for i in range(group.first, group.first + group.size):
            slot = &self.slots[i]
            slot.share = 1.0 if group.equal else <double>group.total / group.size / <double>slot.weight
            candidate = self.candidates[slot.index]
            # Nobody is ahead or behind by more than a whole round; what is left of another set of endpoints is.
            if not -group.total <= candidate.current <= group.total:
                candidate.current = 0

    # -- the algorithms: each for a group of at least two

    cdef int take(self, const Group* group, int64_t now, uint64_t key, int avoid) noexcept nogil:
        cdef int but, draws, found = -1
        if self.algorithm == BALANCE_P2C_EWMA or self.algorithm == BALANCE_LEAST_REQUEST:
            for draws in range(DRAWS):
                found = self.take_p2c(group, now, avoid) if self.algorithm == BALANCE_P2C_EWMA else self.take_fewest(group, now, avoid)
                if now >= self.trouble_until or not self.failing(self.candidates[found], now):
                    break
            return found
        if self.algorithm == BALANCE_MAGLEV and self.table != NULL:
            return self.take_maglev(group, now, key, avoid)
        if self.algorithm == BALANCE_RANDOM:
            but = self.slot_of[avoid] if 0 <= avoid < self.count else -1
            return self.slots[self.draw(group, but if group.first <= but < group.first + group.size else -1)].index
        return self.take_smooth(group, avoid)

    cdef int take_p2c(self, const Group* group, int64_t now, int avoid) noexcept nogil:
        cdef int one = self.draw(group, -1)
        cdef int other = self.draw(group, one)
        cdef const Slot* a = &self.slots[one]
        cdef const Slot* b = &self.slots[other]
        cdef const Candidate* first = self.candidates[a.index]
        cdef const Candidate* second = self.candidates[b.index]
        cdef double first_cost, second_cost
        if a.index == avoid:
            return b.index
        if b.index == avoid:
            return a.index
        first_cost = self.cost(first, a.share, now)
        second_cost = self.cost(second, b.share, now)
        if second_cost < (first_cost if group.equal else first_cost * CLEARLY_CHEAPER):
            return b.index
        return a.index

    cdef int take_fewest(self, const Group* group, int64_t now, int avoid) noexcept nogil:
        cdef int one = self.draw(group, -1)
        cdef int other = self.draw(group, one)
        cdef const Slot* a = &self.slots[one]
        cdef const Slot* b = &self.slots[other]
        cdef const Candidate* first = self.candidates[a.index]
        cdef const Candidate* second = self.candidates[b.index]
        cdef bint first_bad = self.failing(first, now)
        cdef bint second_bad = self.failing(second, now)
        if a.index == avoid:
            return b.index
        if b.index == avoid:
            return a.index
        if first_bad != second_bad:
            return b.index if first_bad else a.index
        # The same for equal weights as without: the product of a whole number and 1 is that number.
        return b.index if <double>load_of(second) * b.share < <double>load_of(first) * a.share else a.index

    cdef int take_smooth(self, const Group* group, int avoid) noexcept nogil:
        """nginx's smooth weighted round robin."""
        cdef Candidate* candidate
        cdef Candidate* best = NULL
        cdef int64_t total = 0
        cdef int i, found = -1
        for i in range(group.first, group.first + group.size):
            if self.slots[i].index == avoid:
                continue
            candidate = self.candidates[self.slots[i].index]
            candidate.current += self.slots[i].weight
            total += self.slots[i].weight
            if best == NULL or candidate.current > best.current:
                best = candidate
                found = self.slots[i].index
        best.current -= total       # the group has two, and at most one is `avoid`
        return found

    cdef int take_maglev(self, const Group* group, int64_t now, uint64_t key, int avoid) noexcept nogil:
        cdef uint32_t place = <uint32_t>(key % self.table_size)
        cdef const Candidate* candidate
        cdef const Slot* slot
        cdef const Slot* best = NULL
        cdef double unit, bound, ratio, lowest = 0
        cdef int64_t total = 1      # this request too
        cdef int i, at, end = group.first + group.size
        for i in range(group.first, end):
            total += load_of(self.candidates[self.slots[i].index])
        # One more is within the bound iff in_flight < unit x weight.
        unit = <double>self.load_percent / 100 * <double>total / <double>group.total
        for i in range(WALK_MAX):
            at = self.slot_of[self.table[place]]
            if group.first <= at < end:
                slot = &self.slots[at]
                candidate = self.candidates[slot.index]
                bound = unit * <double>slot.weight
                if (slot.index != avoid and <double>load_of(candidate) < (bound if bound > MAGLEV_SPARE else MAGLEV_SPARE)
                        and (i == 0 or not self.failing(candidate, now))):
                    return slot.index
            place += 1
            if place == self.table_size:
                place = 0
        # Few of many are left: the one with the least load for its weight.
        for i in range(group.first, end):
            slot = &self.slots[i]
            ratio = <double>(load_of(self.candidates[slot.index]) + 1) / <double>slot.weight
            if slot.index != avoid and (best == NULL or ratio < lowest):
                best = slot
                lowest = ratio
        return best.index           # the group has two, and at most one is `avoid`

    cdef int draw(self, const Group* group, int but) noexcept nogil:
        """A slot of the group by weight, not `but` (a slot of the group; -1: any)."""
        cdef int64_t point
        cdef int low, high, middle
        if group.equal:
            if but < 0:
                return group.first + <int>self.below(<uint64_t>group.size)
            low = group.first + <int>self.below(<uint64_t>group.size - 1)
            return low + 1 if low >= but else low
        if but < 0:
            point = <int64_t>self.below(<uint64_t>group.total)
        else:
            point = <int64_t>self.below(<uint64_t>(group.total - self.slots[but].weight))
            if point >= self.slots[but].before:
                point += self.slots[but].weight
        low = group.first
        high = group.first + group.size
        while high - low > 1:       # slots[low].before <= point
            middle = (low + high) // 2
            if self.slots[middle].before <= point:
                low = middle
            else:
                high = middle
        return low

    cdef uint64_t below(self, uint64_t bound) noexcept nogil:
        """A random number from 0 to bound - 1, even up to bound / 2^64."""
        return cw_below(&self.state, bound)
