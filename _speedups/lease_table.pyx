"""Leased tokens in shared memory.

Strategy: Redis debits tokens before a machine may spend them, so whatever happens to a lease here (lost, expired, forgotten
by a killed worker) only ever makes the limit stricter. The table is an array of sets of eight slots; a key lies in the
one set its hash selects. A slot's pair is {key, word}; the word is tokens (18 bits), a flag, and a time in units of 16
microseconds (45 bits): with the flag off the moment at which the tokens die, with the flag on the moment before which Redis
need not be asked. A slot whose time is past belongs to nobody.

Why a token is never spent twice, with processes that race, stall and are killed between any two instructions: every change of
a pair is one 16-byte compare-and-swap of the whole pair, and the pair is all that decides. Two pairs that are equal at two
moments are the same lease with the same tokens, whatever was in between, so there is nothing an ABA could break. A key
that two workers enter at once may get two slots; then it has two leases, each with its own tokens, and Redis accounts for
them apart because a lease is named by its slot.

The lock word keeps two workers from fetching the next lease of a slot at once: Redis is told how many tokens are unspent, and two
answers to the same question would be added up here while Redis knew of one. It is a time, longer than a lease lives: when it
runs out because its worker was killed or stopped, whatever that worker still brings is dead and is not entered.

Sizes: a lease that was used up within half its life doubles the next, one that lasted halves it. The next lease is fetched when
half of the last is left, but only from two tokens on: a caller of whom one request is known gets nothing in advance.

Python is called from here: per lease, never per token.
"""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t

from typing import Final

cdef extern from *:
    """
    #include <string.h>
    static inline int cw_lease_swap(cw_lease_slot *slot, uint64_t key, uint64_t word, uint64_t new_key, uint64_t new_word) {
    #if defined(__x86_64__)
        char done;
        __asm__ __volatile__("lock cmpxchg16b %1\\n\\tsete %0"
                             : "=q"(done), "+m"(*(unsigned __int128 *)slot), "+a"(key), "+d"(word)
                             : "b"(new_key), "c"(new_word)
                             : "memory", "cc");
        return done;
    #elif defined(__aarch64__) && defined(__AARCH64EL__)
        unsigned __int128 expected = ((unsigned __int128)word << 64) | key;
        unsigned __int128 wanted = ((unsigned __int128)new_word << 64) | new_key;
        return __sync_bool_compare_and_swap((unsigned __int128 *)slot, expected, wanted);
    #else
    #error "lease_table needs a 16-byte compare-and-swap (x86-64 or aarch64)"
    #endif
    }
    static inline int cw_lease_lock(uint64_t *lock, uint64_t old, uint64_t wanted) {
        return __atomic_compare_exchange_n(lock, &old, wanted, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    static inline uint64_t cw_lease_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline void cw_lease_store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
    static inline void cw_lease_store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
    static inline uint64_t cw_lease_mix(uint64_t h) {
        h ^= h >> 33; h *= 0xff51afd7ed558ccdULL; h ^= h >> 33; h *= 0xc4ceb9fe1a85ec53ULL; h ^= h >> 33;
        return h;
    }
    """
    bint cw_lease_swap(LeaseSlot* slot, uint64_t key, uint64_t word, uint64_t new_key, uint64_t new_word) noexcept nogil
    bint cw_lease_lock(uint64_t* lock, uint64_t old, uint64_t wanted) noexcept nogil
    uint64_t cw_lease_load(const uint64_t* p) noexcept nogil
    void cw_lease_store(uint64_t* p, uint64_t v) noexcept nogil
    void cw_lease_store32(uint32_t* p, uint32_t v) noexcept nogil
    uint64_t cw_lease_mix(uint64_t h) noexcept nogil

cdef enum:
    TOKEN_MASK = LEASE_MAX
    FLAG = 1 << 18
    TIME_SHIFT = 19
    UNIT_SHIFT = 4                  # a unit of time is 16 us

MAX_LEASE: Final = LEASE_MAX


cdef inline uint64_t down(uint64_t us) noexcept nogil:
    """A time as it stands in a word, rounded down: a lease never lives longer than it was given for."""
    return us >> UNIT_SHIFT << TIME_SHIFT


cdef inline uint64_t up(uint64_t us) noexcept nogil:
    """Rounded up: nobody asks before the time that Redis named."""
    return ((us + 15) >> UNIT_SHIFT) << TIME_SHIFT


cdef inline uint64_t time_of(uint64_t word) noexcept nogil:
    return (word >> TIME_SHIFT) << UNIT_SHIFT


cdef inline uint32_t tokens_of(uint64_t word) noexcept nogil:
    return <uint32_t>(word & TOKEN_MASK)


cdef uint64_t leased_key(uint64_t limit_hash, uint64_t caller) noexcept nogil:
    """One key for a limit and a caller; never 0, which marks a slot never used."""
    cdef uint64_t mixed = cw_lease_mix(limit_hash ^ cw_lease_mix(caller))
    return mixed if mixed else 1


@cython.final
cdef class LeaseTable:
    """The table over `slots` slots at `offset` of a writable buffer of zeros. The buffer stays exported while this object lives."""

    def __cinit__(self, buffer, Py_ssize_t offset, Py_ssize_t slots):
        self.slots = NULL
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        # size_for() refuses a bad count; below, [offset, offset + size) lies inside the buffer.
        size = self.size_for(slots)
        if offset < 0 or offset + size > self.view.len:
            raise ValueError("the lease table does not fit into the buffer")
        if (<uintptr_t>self.view.buf + <uintptr_t>offset) % LEASE_SLOT_BYTES:
            raise ValueError("the lease table must start at a multiple of 64 bytes")
        self.slots = <LeaseSlot*>(<char*>self.view.buf + offset)
        self.set_mask = <uint64_t>slots // LEASE_SET - 1

    def __dealloc__(self):
        PyBuffer_Release(&self.view)        # does nothing if the buffer was never taken

    @staticmethod
    def size_for(Py_ssize_t slots) -> int:
        """Bytes that a table of `slots` slots takes. Raises ValueError unless it is a power of two from 8 to 2^26."""
        if slots < LEASE_SET or slots > (1 << 26) or slots & (slots - 1):
            raise ValueError("the number of lease slots must be a power of two from 8 to 67108864")
        return slots * LEASE_SLOT_BYTES

    cdef int take(self, uint64_t key, uint64_t now_us, Spent* out) noexcept nogil:
        # The set and its slots: set <= set_mask and index < LEASE_SET, so every access lies inside the table.
        cdef LeaseSlot* base = self.slots + ((key >> 24) & self.set_mask) * LEASE_SET
        cdef LeaseSlot* slot
        cdef uint64_t word, ends
        cdef int i, start = <int>(key >> 61)
        cdef uint32_t tokens
        cdef int found = LEASE_NONE
        out.low = False
        for i in range(LEASE_SET):
            slot = base + ((start + i) & (LEASE_SET - 1))
            while True:
                word = cw_lease_load(&slot.word)
                if cw_lease_load(&slot.key) != key:
                    break
                ends = time_of(word)
                if ends <= now_us:
                    break
                if word & FLAG:
                    # A second slot of the key may still hold tokens: look on.
                    out.remaining = 0
                    out.wait_us = <int64_t>((slot.retry_at if slot.retry_at > ends else ends) - now_us)
                    found = LEASE_REFUSED
                    break
                tokens = tokens_of(word)
                if tokens == 0:
                    break
                if not cw_lease_swap(slot, key, word, key, word - 1):
                    continue
                out.remaining = <int64_t>tokens - 1 + <int64_t>slot.left
                out.wait_us = <int64_t>(slot.reset_at - now_us) if slot.reset_at > now_us else 0
                out.low = 2 * (tokens - 1) <= slot.size and slot.size > 1 and cw_lease_load(&slot.lock) <= now_us
                return LEASE_TAKEN
        return found

    # -- what the fetching worker does with a slot; `number` names the slot, and with it the lease, to Redis

    def take_key(self, uint64_t key, uint64_t now_us) -> tuple[int, int, int, bool]:
        """Spend one token: (1 spent | 0 refused | -1 none, remaining, microseconds to wait, next lease wanted)."""
        cdef Spent out
        cdef int result
        out.remaining, out.wait_us = 0, 0
        result = self.take(key, now_us, &out)
        return result, out.remaining, out.wait_us, bool(out.low)

    def begin(self, uint64_t key, uint64_t now_us, uint64_t locked_us) -> tuple[int, int, int, int] | None:
        """Claim the right to fetch the key's next lease, for `locked_us`: (slot number, tokens unspent, their slice, size of the last).

        None when somebody else is at work on it, or no slot is free: then the caller fetches what it spends at once, and no
        lease.
        """
        cdef LeaseSlot* base = self.slots + ((key >> 24) & self.set_mask) * LEASE_SET
        cdef LeaseSlot* slot
        cdef LeaseSlot* free = NULL
        cdef uint64_t word, other, free_word = 0, free_key = 0, lock
        cdef int i, start = <int>(key >> 61)
        for i in range(LEASE_SET):
            slot = base + ((start + i) & (LEASE_SET - 1))
            word, other = cw_lease_load(&slot.word), cw_lease_load(&slot.key)
            if other == key:
                lock = cw_lease_load(&slot.lock)
                if lock > now_us or not cw_lease_lock(&slot.lock, lock, now_us + locked_us):
                    return None
                return slot - self.slots, unspent(slot, key, now_us), slot.slice, slot.size
            if free == NULL and time_of(word) <= now_us and cw_lease_load(&slot.lock) <= now_us:
                free, free_word, free_key = slot, word, other
        if free == NULL:
            self.full_count = self.full_count + 1
            return None
        lock = cw_lease_load(&free.lock)
        if lock > now_us or not cw_lease_lock(&free.lock, lock, now_us + locked_us):
            return None
        if not cw_lease_swap(free, free_key, free_word, key, down(now_us)):
            cw_lease_lock(&free.lock, now_us + locked_us, 0)
            return None
        cw_lease_store32(&free.size, 0)
        cw_lease_store32(&free.slice, 0)
        cw_lease_store(&free.granted_at, 0)
        cw_lease_store(&free.left, 0)
        cw_lease_store(&free.retry_at, 0)
        cw_lease_store(&free.reset_at, 0)
        return free - self.slots, 0, 0, 0

    def granted_at(self, Py_ssize_t number) -> int:
        """When the slot's last lease was entered, in monotonic microseconds; 0 never."""
        return cw_lease_load(&self.slots[self.checked(number)].granted_at)

    def enter(self, Py_ssize_t number, uint64_t key, uint64_t now_us, uint32_t granted, uint64_t ends_us, bint kept,
              uint64_t left, uint64_t reset_at, uint32_t slice=0) -> bool:
        """Add a lease's tokens to the slot, to live until `ends_us`; `kept`: what is unspent lives as long, else it is dropped.

        False when the lease came too late, or the slot is another key's by now: its tokens are lost.
        """
        cdef LeaseSlot* slot = &self.slots[self.checked(number)]
        cdef uint64_t word
        cdef uint32_t total
        if ends_us <= now_us or cw_lease_load(&slot.key) != key:
            return False
        cw_lease_store32(&slot.slice, slice)        # before the tokens: see quota.lua, which drops those of another window
        while True:
            word = cw_lease_load(&slot.word)
            if cw_lease_load(&slot.key) != key:
                return False
            total = granted + (tokens_of(word) if kept and not word & FLAG else 0)
            if total > LEASE_MAX:
                total = LEASE_MAX
            if cw_lease_swap(slot, key, word, key, down(ends_us) | total):
                break
        cw_lease_store32(&slot.size, total)
        cw_lease_store(&slot.granted_at, now_us)
        cw_lease_store(&slot.left, left)
        cw_lease_store(&slot.reset_at, reset_at)
        return True

    def refuse(self, uint64_t key, uint64_t now_us, uint64_t until_us, uint64_t retry_at) -> bool:
        """Note that Redis gave nothing: nobody asks before `until_us`. `retry_at` is what clients are told.

        False when the key has no slot, or tokens in it.
        """
        cdef LeaseSlot* base = self.slots + ((key >> 24) & self.set_mask) * LEASE_SET
        cdef LeaseSlot* slot
        cdef uint64_t word
        cdef int i, start = <int>(key >> 61)
        for i in range(LEASE_SET):
            slot = base + ((start + i) & (LEASE_SET - 1))
            word = cw_lease_load(&slot.word)
            if cw_lease_load(&slot.key) != key:
                continue
            if tokens_of(word) and time_of(word) > now_us and not word & FLAG:
                return False
            if cw_lease_swap(slot, key, word, key, up(until_us) | <uint64_t>FLAG):
                cw_lease_store(&slot.retry_at, retry_at)
                return True
        return False

    def end(self, Py_ssize_t number, uint64_t locked_until) -> None:
        """Give up the right that begin() gave; `locked_until` is its now_us + locked_us."""
        cw_lease_lock(&self.slots[self.checked(number)].lock, locked_until, 0)

    def empty(self, Py_ssize_t number, uint64_t key, uint64_t now_us) -> int:
        """Take all living tokens out of the slot, to be given back; 0 when there are none or the slot is another key's."""
        cdef LeaseSlot* slot = &self.slots[self.checked(number)]
        cdef uint64_t word
        while True:
            word = cw_lease_load(&slot.word)
            if cw_lease_load(&slot.key) != key or word & FLAG or time_of(word) <= now_us or not tokens_of(word):
                return 0
            if cw_lease_swap(slot, key, word, key, word & ~<uint64_t>TOKEN_MASK):
                return tokens_of(word)

    def held(self, uint64_t now_us) -> int:
        """Living tokens of all leases; a figure for tests and metrics."""
        cdef uint64_t i, word, total = 0
        for i in range((self.set_mask + 1) * LEASE_SET):
            word = cw_lease_load(&self.slots[i].word)
            if not word & FLAG and time_of(word) > now_us:
                total += tokens_of(word)
        return total

    cdef Py_ssize_t checked(self, Py_ssize_t number) except -1:
        if not 0 <= number < <Py_ssize_t>((self.set_mask + 1) * LEASE_SET):
            raise IndexError(f"there is no lease slot {number}")
        return number


cdef inline uint32_t unspent(LeaseSlot* slot, uint64_t key, uint64_t now_us) noexcept nogil:
    """Tokens of the slot that may still be spent: never fewer than there are, for they only become fewer meanwhile."""
    cdef uint64_t word = cw_lease_load(&slot.word)
    if cw_lease_load(&slot.key) != key or word & FLAG or time_of(word) <= now_us:
        return 0
    return tokens_of(word)
