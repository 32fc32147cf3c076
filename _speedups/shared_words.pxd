"""Words in memory that several processes share: loads, stores and exchanges with a stated order.

Strategy: "own" words have one writer, so adding to one is a load and a store; "all" words are changed by compare-and-swap.
Sequential consistency wherever two processes each write one word and then read the other's; relaxed for figures that are
only shown. Python is called from here: never.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    """
    #ifndef CROSSWAY_SHARED_WORDS
    #define CROSSWAY_SHARED_WORDS
    #include <stdint.h>
    static inline uint64_t sw_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline void sw_store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t sw_look(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static inline void sw_put(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline void sw_add(uint64_t *p, uint64_t v) { __atomic_store_n(p, *p + v, __ATOMIC_RELAXED); }
    static inline int sw_swap(uint64_t *p, uint64_t was, uint64_t v) {
        return __atomic_compare_exchange_n(p, &was, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    static inline uint32_t sw_load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline uint32_t sw_look32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static inline void sw_put32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline void sw_exchange32(uint32_t *p, uint32_t v) { __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
    static inline void sw_pause(void) {
    #if defined(__x86_64__)
        __builtin_ia32_pause();
    #endif
    }
    #endif
    """
    uint64_t sw_load(const uint64_t* p) noexcept nogil              # in the one order of all such operations
    void sw_store(uint64_t* p, uint64_t v) noexcept nogil
    uint64_t sw_look(const uint64_t* p) noexcept nogil              # not torn, no order
    void sw_put(uint64_t* p, uint64_t v) noexcept nogil             # what was written before is seen by who sees this
    void sw_add(uint64_t* p, uint64_t v) noexcept nogil             # one writer
    bint sw_swap(uint64_t* p, uint64_t was, uint64_t v) noexcept nogil
    uint32_t sw_load32(const uint32_t* p) noexcept nogil
    uint32_t sw_look32(const uint32_t* p) noexcept nogil
    void sw_put32(uint32_t* p, uint32_t v) noexcept nogil
    void sw_exchange32(uint32_t* p, uint32_t v) noexcept nogil
    void sw_pause() noexcept nogil
