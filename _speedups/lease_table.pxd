"""Tokens leased from Redis, in shared memory: spent by all workers of a machine, each token once.

Strategy: a lease is one 16-byte pair {key, word} that is only ever changed as a pair, by compare-and-swap; the rest of its
slot is advice (how large the next lease is, what to tell the client) that decides nothing. See lease_table.pyx.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef enum:
    LEASE_SLOT_BYTES = 64
    LEASE_SET = 8                   # slots in which a key may lie
    LEASE_TOKEN_BITS = 18
    LEASE_MAX = (1 << 18) - 1       # tokens that a lease may hold

# What take() says.
cdef enum:
    LEASE_TAKEN = 1
    LEASE_REFUSED = 0               # Redis said not before `until`: nobody asks again until then
    LEASE_NONE = -1                 # no lease, or all of it is spent

cdef extern from *:
    """
    #ifndef CROSSWAY_LEASE_SLOT
    #define CROSSWAY_LEASE_SLOT
    #include <stdint.h>
    typedef struct {
        uint64_t key, word;         /* the pair: see lease_table.pyx */
        uint64_t lock;              /* monotonic us until which one worker is at work on the next lease; 0 free */
        uint64_t granted_at, retry_at, reset_at;    /* monotonic us */
        uint32_t size, slice;       /* tokens of the last lease, and where a quota counted them */
        uint64_t left;              /* what Redis had left when it gave the last one */
    } __attribute__((aligned(64))) cw_lease_slot;
    #endif
    """
    ctypedef struct LeaseSlot "cw_lease_slot":
        uint64_t key
        uint64_t word
        uint64_t lock
        uint64_t granted_at
        uint64_t retry_at
        uint64_t reset_at
        uint32_t size
        uint32_t slice
        uint64_t left

cdef struct Spent:
    int64_t remaining               # tokens: of the lease, and of what Redis had left
    int64_t wait_us                 # until one may be there again (refused), or until all are (taken)
    bint low                        # the next lease is wanted, and nobody is at work on it

cdef class LeaseTable:
    cdef Py_buffer view             # held for the life of the object: keeps the mapping in place
    cdef LeaseSlot* slots
    cdef uint64_t set_mask
    cdef public uint64_t full_count

    # `key` is the hash of limit and caller (see leased_key). now_us: CLOCK_MONOTONIC.
    cdef int take(self, uint64_t key, uint64_t now_us, Spent* out) noexcept nogil
    cdef Py_ssize_t checked(self, Py_ssize_t number) except -1

cdef uint64_t leased_key(uint64_t limit_hash, uint64_t caller) noexcept nogil
