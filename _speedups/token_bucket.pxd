"""Token buckets in shared memory: one limit, exact over all workers.

Strategy: GCRA keeps a bucket as one time, the theoretical arrival time (TAT), in one 64-bit word that is advanced by
compare-and-swap. Integer arithmetic only; see token_bucket.pyx for the argument why nothing is admitted twice.
"""

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    SLOTS_PER_SET = 8
    FRACTION_BITS = 14                      # a word is microseconds << 14 | fraction, the fraction in 1/unit microseconds
    FRACTION_MAX = 16384                    # hence `unit` is at most this

cdef extern from *:
    """
    #ifndef CROSSWAY_BUCKET_SLOT
    #define CROSSWAY_BUCKET_SLOT
    #include <stdint.h>
    typedef struct { uint64_t key, word; } __attribute__((aligned(16))) cw_bucket_slot;
    #endif
    """
    ctypedef struct BucketSlot "cw_bucket_slot":
        uint64_t key                        # 0 never used or given up; bit 0 set: reserved, not yet in use
        uint64_t word                       # TAT; grows with every change of the slot, key changes included

# One token is worth period/unit microseconds, in lowest terms; nothing is rounded while unit <= FRACTION_MAX.
cdef struct Limit:
    uint64_t id_hash                        # of name, rate and burst: a limit whose figures change starts with full buckets
    uint64_t unit
    uint64_t period
    uint64_t step                           # one token, as a word
    uint64_t span                           # `burst` tokens, as a word
    uint64_t burst

cdef struct Decision:
    int64_t remaining                       # whole tokens left
    int64_t retry_after_us                  # 0 when admitted, else the wait until one token is there
    int64_t reset_us                        # until the bucket is full again

cdef class RateLimit:
    cdef Limit limit                        # constant after construction
    cdef readonly str name

cdef class BucketTable:
    cdef Py_buffer view                     # held for the life of the object: keeps the mapping in place
    cdef BucketSlot* slots
    cdef uint64_t set_mask
    cdef const uint64_t* secret             # two words in the table's header, drawn when it was formatted
    cdef readonly uint64_t full_count       # of this process

    # 1 admitted, 0 refused, -1 every slot that could hold this key is live (the caller's configuration decides).
    # now_us: CLOCK_MONOTONIC, from 1 to 2^49. `key` should come from hash_key(), which nobody outside can collide on purpose.
    cdef int take(self, const Limit* limit, uint64_t key, uint64_t now_us, Decision* out) noexcept nogil
    # SipHash-1-3 under the table's secret.
    cdef uint64_t hash_key(self, const char* data, size_t length) noexcept nogil
