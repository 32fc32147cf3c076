"""Rate limits as GCRA words in shared memory, exact over all workers.

Strategy: a bucket is its theoretical arrival time (TAT): a request at `now` is admitted iff
max(TAT, now) + T <= now + burst * T, and the left side becomes the new TAT. The table is an array of sets of eight 16-byte
slots {key, word}; a key lives in the one set its hash selects. A slot whose TAT is past equals a full bucket, so it may be
given to another key without losing anything.

Arithmetic: T = period/unit microseconds in lowest terms. A word is microseconds (50 bits, 35 years since boot) and a fraction
(14 bits) counted in 1/unit microseconds, so adding T is an addition with carry and never rounds: a million admissions take
exactly a million times T. Every rate whose reduced numerator is at most 16,384 is exact (all up to 16,384 per second, minute,
hour or day, and every multiple of 100/s up to 1,000,000/s); any other is rounded down, by less than 0.007 %, once, when the
limit is made.

Why it never over-admits, with processes that race, stall and are killed between any two instructions:
 1. Every change of a slot makes its word strictly greater, and the key changes only together with the word (16-byte CAS).
    So a word that is equal at two moments was there all the time, with its key: no ABA. A 64-bit CAS on the word after the
    key was read is therefore a CAS on the bucket of that key, and a refusal is valid if the word is unchanged after the key
    was read.
 2. Two slots must never hold the same key. A new key is first *reserved*: CAS (old key, w) -> (key|1, w+1), where w is
    past: a reservation owns no tokens, may be overwritten by anybody and costs nothing if its owner is killed. It is
    *confirmed* by CAS (key|1, w+1) -> (key, TAT) by any process that, after having seen it, has read all other slots of the
    set and found neither the key nor another reservation of it (higher slots' reservations are struck out, a lower one
    is confirmed instead). Suppose X confirms slot a and Y slot b. X read b after seeing a's reservation and found nothing, so
    b was reserved later than that; Y read a after seeing b's and found nothing, so a was reserved later than that: each
    before the other, a contradiction (the operations are sequentially consistent).
 3. Tokens are charged by the one CAS that admits, so a killed worker has either charged and been admitted, or neither.
 4. Workers cache their clock per batch. A slot is given away only when its TAT is SKEW_US past, so that a worker whose
    `now` is that much older still finds it. An older `now` only ever admits what it would have admitted at that moment.

Sizing: a slot is busy from a key's first request until its bucket is full again (plus 0.1 s): slots >= 4 x the keys active in
that time keeps the odds of a full set below one in a million. 65,536 slots are 1 MiB.

Python is called from here: never (RateLimit and the take() of the tests excepted).
"""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint64_t, uintptr_t

import math
import os

cdef extern from *:
    """
    #include <string.h>
    /* The slot as a pair. On x86-64 every processor since 2006 has cmpxchg16b; on aarch64 the compiler emits ldaxp/stlxp. */
    static inline int cw_swap_pair(cw_bucket_slot *slot, uint64_t key, uint64_t word, uint64_t new_key, uint64_t new_word) {
    #if defined(__x86_64__)
        unsigned char done;
        __asm__ __volatile__("lock cmpxchg16b %1\\n\\tsete %0"
                             : "=q"(done), "+m"(*slot), "+a"(key), "+d"(word)
                             : "b"(new_key), "c"(new_word) : "cc", "memory");
        return done;
    #elif defined(__aarch64__) && defined(__AARCH64EL__)
        unsigned __int128 expected = ((unsigned __int128)word << 64) | key;
        unsigned __int128 wanted = ((unsigned __int128)new_word << 64) | new_key;
        return __sync_bool_compare_and_swap((unsigned __int128 *)slot, expected, wanted);
    #else
    #error "token_bucket needs a 16-byte compare-and-swap (x86-64 or aarch64)"
    #endif
    }
    static inline int cw_swap_word(cw_bucket_slot *slot, uint64_t word, uint64_t new_word) {
        return __atomic_compare_exchange_n(&slot->word, &word, new_word, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    static inline uint64_t cw_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline void cw_store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static inline void cw_relax(void) {
    #if defined(__x86_64__)
        __builtin_ia32_pause();
    #endif
    }
    static inline uint64_t cw_mix(uint64_t h) {
        h ^= h >> 33; h *= 0xff51afd7ed558ccdULL; h ^= h >> 33; h *= 0xc4ceb9fe1a85ec53ULL; h ^= h >> 33;
        return h;
    }
    #define CW_ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
    #define CW_SIPROUND do { \\
        v0 += v1; v1 = CW_ROTL(v1, 13); v1 ^= v0; v0 = CW_ROTL(v0, 32); v2 += v3; v3 = CW_ROTL(v3, 16); v3 ^= v2; \\
        v0 += v3; v3 = CW_ROTL(v3, 21); v3 ^= v0; v2 += v1; v1 = CW_ROTL(v1, 17); v1 ^= v2; v2 = CW_ROTL(v2, 32); } while (0)
    /* SipHash-1-3 (Aumasson, Bernstein): keyed, so that no client can aim at another client's bucket. */
    static inline uint64_t cw_siphash13(uint64_t k0, uint64_t k1, const char *p, size_t n) {
        uint64_t v0 = k0 ^ 0x736f6d6570736575ULL, v1 = k1 ^ 0x646f72616e646f6dULL;
        uint64_t v2 = k0 ^ 0x6c7967656e657261ULL, v3 = k1 ^ 0x7465646279746573ULL, m = 0;
        size_t i = 0;
        for (; i + 8 <= n; i += 8) { memcpy(&m, p + i, 8); v3 ^= m; CW_SIPROUND; v0 ^= m; }
        m = 0;
        memcpy(&m, p + i, n - i);
        m |= (uint64_t)n << 56;
        v3 ^= m; CW_SIPROUND; v0 ^= m;
        v2 ^= 0xff; CW_SIPROUND; CW_SIPROUND; CW_SIPROUND;
        return v0 ^ v1 ^ v2 ^ v3;
    }
    """
    bint cw_swap_pair(BucketSlot* slot, uint64_t key, uint64_t word, uint64_t new_key, uint64_t new_word) noexcept nogil
    bint cw_swap_word(BucketSlot* slot, uint64_t word, uint64_t new_word) noexcept nogil
    uint64_t cw_load(const uint64_t* p) noexcept nogil
    void cw_store(uint64_t* p, uint64_t v) noexcept nogil
    void cw_relax() noexcept nogil
    uint64_t cw_mix(uint64_t h) noexcept nogil
    uint64_t cw_siphash13(uint64_t k0, uint64_t k1, const char* p, size_t n) noexcept nogil

cdef enum:
    FRACTION_MASK = FRACTION_MAX - 1
    SKEW_US = 100_000           # how far the clocks that workers cache per batch may lie apart
    HEADER_BYTES = 64
    ATTEMPTS = 4096             # each failed attempt is another process's progress; reached only if the set is being stormed

cdef uint64_t MAGIC = 0x3154424357435243        # "CRCWCBT1", little-endian
cdef uint64_t CLOCK_LIMIT = <uint64_t>1 << 49


cdef inline uint64_t plus(uint64_t word, uint64_t step, uint64_t unit) noexcept nogil:
    """word + step; the fraction carries at `unit`."""
    cdef uint64_t fraction = (word & FRACTION_MASK) + (step & FRACTION_MASK)
    cdef uint64_t us = (word >> FRACTION_BITS) + (step >> FRACTION_BITS)
    if fraction >= unit:
        fraction -= unit
        us += 1
    return us << FRACTION_BITS | fraction


cdef inline uint64_t normal(uint64_t word, uint64_t unit) noexcept nogil:
    """A word whose fraction means nothing in this unit (left by a reservation), rounded up."""
    if (word & FRACTION_MASK) >= unit:
        return ((word >> FRACTION_BITS) + 1) << FRACTION_BITS
    return word


cdef inline int64_t wait_us(uint64_t word, uint64_t now_us) noexcept nogil:
    """Microseconds from now until `word`, rounded up; 0 when it is past."""
    cdef int64_t us = <int64_t>(word >> FRACTION_BITS) - <int64_t>now_us + (1 if word & FRACTION_MASK else 0)
    return us if us > 0 else 0


cdef int decide(const Limit* limit, uint64_t word, uint64_t now_us, uint64_t* advanced, Decision* out) noexcept nogil:
    """GCRA for one token: 1 and the new TAT in `advanced`, or 0."""
    cdef uint64_t now = now_us << FRACTION_BITS
    cdef uint64_t start = normal(word, limit.unit)
    if start < now:
        start = now
    cdef uint64_t tat = plus(start, limit.step, limit.unit)
    cdef uint64_t ceiling = now + limit.span        # now has no fraction: no carry
    cdef uint64_t short_us, fraction
    advanced[0] = tat
    if tat <= ceiling:
        # At most span: burst * period < 2^62, checked when the limit was made.
        out.remaining = <int64_t>((((ceiling >> FRACTION_BITS) - (tat >> FRACTION_BITS)) * limit.unit
                                   + (ceiling & FRACTION_MASK) - (tat & FRACTION_MASK)) / limit.period)
        out.retry_after_us = 0
        out.reset_us = wait_us(tat, now_us)
        return 1
    short_us = (tat >> FRACTION_BITS) - (ceiling >> FRACTION_BITS)
    fraction = 1 if (tat & FRACTION_MASK) > (ceiling & FRACTION_MASK) else 0
    out.remaining = 0
    out.retry_after_us = <int64_t>(short_us + fraction)
    out.reset_us = wait_us(start, now_us)
    return 0


def _interval(count: int, period_us: int) -> tuple[int, int]:
    """The time of one token as (period, unit) in lowest terms, unit <= FRACTION_MAX, rounded up if it does not fit."""
    divisor = math.gcd(count, period_us)
    unit, period = count // divisor, period_us // divisor
    if unit <= FRACTION_MAX:
        return period, unit
    best_period, best_unit = -(-period // unit), 1
    for candidate in range(2, FRACTION_MAX + 1):
        rounded = -(-period * candidate // unit)
        if rounded * best_unit < best_period * candidate:
            best_period, best_unit = rounded, candidate
    divisor = math.gcd(best_period, best_unit)
    return best_period // divisor, best_unit // divisor


@cython.final
cdef class RateLimit:
    """A rate of `count` per `period_us` microseconds with a bucket of `burst` tokens.

    Raises ValueError when a figure is out of range: count >= 1, burst >= 1, at most one per microsecond, and an empty bucket
    must fill within 17 years.
    """

    def __init__(self, str name, count: int, period_us: int, burst: int):
        if count < 1 or period_us < 1 or burst < 1:
            raise ValueError(f"limit {name!r}: rate, period and burst must be at least 1")
        if count > period_us:
            raise ValueError(f"limit {name!r}: more than 1,000,000 per second is not supported")
        period, unit = _interval(count, period_us)
        full_us, full_fraction = divmod(burst * period, unit)
        if full_us >= CLOCK_LIMIT or burst * period >= 1 << 62:
            raise ValueError(f"limit {name!r}: the bucket would take more than 17 years to fill; lower burst or raise the rate")
        identity = f"{period}/{unit}/{burst}/{name}".encode("utf-8", "surrogatepass")
        self.name = name
        self.limit.id_hash = cw_siphash13(0, 0, identity, len(identity))
        self.limit.unit = unit
        self.limit.period = period
        self.limit.step = (period // unit) << FRACTION_BITS | (period % unit)
        self.limit.span = full_us << FRACTION_BITS | full_fraction
        self.limit.burst = burst

    @property
    def interval(self) -> tuple[int, int]:
        """One token's time as (numerator, denominator) in microseconds, exactly as it is counted."""
        return self.limit.period, self.limit.unit

    @property
    def burst(self) -> int:
        return self.limit.burst


@cython.final
cdef class BucketTable:
    """The table over `slots` slots at `offset` of a writable buffer; formatted by the first one that opens it.

    The buffer stays exported while this object lives. The first opening must happen before the workers are forked.
    """

    def __cinit__(self, buffer, Py_ssize_t offset, Py_ssize_t slots):
        cdef uint64_t* header
        self.slots = NULL
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        # size_for() refuses a bad count; below, [offset, offset + size) lies inside the buffer.
        size = self.size_for(slots)
        if offset < 0 or offset + size > self.view.len:
            raise ValueError("the bucket table does not fit into the buffer")
        if (<uintptr_t>self.view.buf + <uintptr_t>offset) % 64:
            raise ValueError("the bucket table must start at a multiple of 64 bytes")
        header = <uint64_t*>(<char*>self.view.buf + offset)
        self.slots = <BucketSlot*>(<char*>header + HEADER_BYTES)
        self.set_mask = <uint64_t>slots // SLOTS_PER_SET - 1
        self.secret = header + 2
        if cw_load(header) != MAGIC:
            header[1] = slots
            header[2], header[3] = int.from_bytes(os.urandom(8), "little"), int.from_bytes(os.urandom(8), "little")
            cw_store(header, MAGIC)
        elif header[1] != <uint64_t>slots:
            raise ValueError(f"the bucket table has {header[1]} slots, not {slots}")

    def __dealloc__(self):
        PyBuffer_Release(&self.view)        # does nothing if the buffer was never taken

    @staticmethod
    def size_for(Py_ssize_t slots) -> int:
        """Bytes that a table of `slots` slots takes. Raises ValueError unless it is a power of two from 8 to 2^28."""
        if slots < SLOTS_PER_SET or slots > (1 << 28) or slots & (slots - 1):
            raise ValueError("the number of bucket slots must be a power of two from 8 to 268435456")
        return HEADER_BYTES + slots * sizeof(BucketSlot)

    cdef uint64_t hash_key(self, const char* data, size_t length) noexcept nogil:
        return cw_siphash13(self.secret[0], self.secret[1], data, length)

    cdef int take(self, const Limit* limit, uint64_t key, uint64_t now_us, Decision* out) noexcept nogil:
        # The set and its slots: set <= set_mask and index < 8, so every access lies inside the table.
        cdef uint64_t mixed = cw_mix(key ^ limit.id_hash)
        cdef uint64_t own = (mixed | 2) & ~(<uint64_t>1)
        cdef BucketSlot* slots = self.slots + ((mixed >> 24) & self.set_mask) * SLOTS_PER_SET
        cdef int start = <int>(mixed >> 61)
        cdef int attempt, found, result
        for attempt in range(ATTEMPTS):
            if attempt:
                cw_relax()
            found = locate(slots, own, start, now_us)
            if found == SLOTS_PER_SET:
                break
            if found < 0:
                continue
            if cw_load(&slots[found].key) == own:
                result = charge(&slots[found], own, limit, now_us, out)
            else:
                result = confirm(slots, found, own, limit, now_us, out)
            if result >= 0:
                return result
        self.full_count = self.full_count + 1     # the checked build refuses += here
        out.remaining = 0
        out.retry_after_us = 1_000_000
        out.reset_us = 1_000_000
        return -1

    def take_key(self, RateLimit limit not None, bytes key not None, uint64_t now_us) -> tuple[int, int, int, int]:
        """Take one token: (1 admitted | 0 refused | -1 table full, remaining, retry_after_us, reset_us)."""
        cdef Decision out
        cdef int result
        if not 0 < now_us < CLOCK_LIMIT:
            raise ValueError("now_us must be from 1 to 2^49 - 1")
        result = self.take(&limit.limit, self.hash_key(key, <size_t>len(key)), now_us, &out)
        return result, out.remaining, out.retry_after_us, out.reset_us

    def live(self, uint64_t now_us) -> int:
        """Slots that hold a bucket which is not full; a figure for sizing."""
        cdef Py_ssize_t i, count = 0
        for i in range(<Py_ssize_t>((self.set_mask + 1) * SLOTS_PER_SET)):
            if cw_load(&self.slots[i].word) >> FRACTION_BITS >= now_us and cw_load(&self.slots[i].key) & ~(<uint64_t>1):
                count += 1
        return count


cdef inline bint reusable(uint64_t key, uint64_t word, uint64_t now_us) noexcept nogil:
    """A slot never used, or one whose bucket is full by every worker's clock."""
    return (key | word) == 0 or (word >> FRACTION_BITS) + SKEW_US < now_us


cdef int locate(BucketSlot* slots, uint64_t own, int start, uint64_t now_us) noexcept nogil:
    """The index of the key's slot or of its lowest reservation, made here if need be; -1 try again, SLOTS_PER_SET full."""
    cdef int i, index, free = -1, reserved = -1
    cdef uint64_t word, key, free_word = 0, free_key = 0
    for i in range(SLOTS_PER_SET):
        index = (start + i) & (SLOTS_PER_SET - 1)
        word = cw_load(&slots[index].word)
        key = cw_load(&slots[index].key)
        if key == own:
            return index
        if key == (own | 1):
            if reserved < 0 or index < reserved:
                reserved = index
        elif free < 0 and reusable(key, word, now_us):
            free, free_word, free_key = index, word, key
    if reserved >= 0:
        return reserved
    if free < 0:
        return SLOTS_PER_SET
    if cw_swap_pair(&slots[free], free_key, free_word, own | 1, free_word + 1):
        return free
    return -1


cdef int charge(BucketSlot* slot, uint64_t own, const Limit* limit, uint64_t now_us, Decision* out) noexcept nogil:
    """Take one token from the bucket in `slot`: 1 or 0; -1 when the slot went to another key meanwhile."""
    cdef uint64_t word, advanced = 0
    while True:
        word = cw_load(&slot.word)
        if cw_load(&slot.key) != own:
            return -1
        if decide(limit, word, now_us, &advanced, out):
            if cw_swap_word(slot, word, advanced):
                return 1
        elif cw_load(&slot.word) == word:
            return 0
        cw_relax()


cdef int confirm(BucketSlot* slots, int index, uint64_t own, const Limit* limit, uint64_t now_us, Decision* out) noexcept nogil:
    """Turn the reservation in slots[index] into the key's bucket and take the first token: 1, 0, or -1 to start again."""
    cdef uint64_t advanced = 0, other_word, word = cw_load(&slots[index].word)
    cdef uint64_t other_key
    cdef int i
    if cw_load(&slots[index].key) != (own | 1):
        return -1
    for i in range(SLOTS_PER_SET):
        if i == index:
            continue
        other_word = cw_load(&slots[i].word)
        other_key = cw_load(&slots[i].key)
        if other_key == own:
            cw_swap_pair(&slots[index], own | 1, word, 0, word + 1)
            return -1
        if other_key == (own | 1):
            if i < index or not cw_swap_pair(&slots[i], own | 1, other_word, 0, other_word + 1):
                return -1
    if not decide(limit, word, now_us, &advanced, out):
        return 0 if cw_load(&slots[index].word) == word else -1
    return 1 if cw_swap_pair(&slots[index], own | 1, word, own, advanced) else -1
