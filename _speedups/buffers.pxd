"""Byte buffers with a read window, in blocks from a free list.

Strategy: a connection holds a buffer only while bytes wait in it; an idle connection holds none. Blocks are 16 KiB (a
browser's head and a small body fit); larger needs are allocated exactly and not kept. Python is called from here: never.

Invariant: base == NULL and cap == 0, or start <= end <= cap and base points to cap bytes.
"""

from libc.stdint cimport uint32_t
from libc.string cimport memcpy, memmove

cdef enum:
    BLOCK = 16384           # nginx: large_client_header_buffers 8k, HAProxy: tune.bufsize 16k
    BLOCKS_KEPT = 256       # 4 MiB of free blocks per worker at most

cdef struct Buffer:
    char* base
    uint32_t cap
    uint32_t start
    uint32_t end

cdef char* block_take(uint32_t size, uint32_t* cap) noexcept nogil
cdef void block_give(char* block, uint32_t cap) noexcept nogil
cdef int blocks_live() noexcept nogil

cdef inline uint32_t buffer_length(const Buffer* b) noexcept nogil:
    return b.end - b.start

cdef inline char* buffer_data(const Buffer* b) noexcept nogil:
    return b.base + b.start

cdef inline void buffer_release(Buffer* b) noexcept nogil:
    if b.base != NULL:
        block_give(b.base, b.cap)
    b.base = NULL
    b.cap = 0
    b.start = 0
    b.end = 0

cdef inline void buffer_consume(Buffer* b, uint32_t n) noexcept nogil:
    """Drops n bytes from the front (n <= length)."""
    b.start += n
    if b.start == b.end:
        b.start = 0
        b.end = 0

# Makes room for `more` bytes behind `end`; may move the window (offsets from `base` change). 0, or -1 when memory is out.
cdef int buffer_reserve(Buffer* b, uint32_t more) noexcept nogil
cdef int buffer_append(Buffer* b, const char* data, uint32_t n) noexcept nogil
