"""The free list behind buffers.pxd, and growing.

Strategy: free blocks are chained through their own first bytes. Python is called from here: never.
"""

from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove

cdef struct FreeBlock:
    FreeBlock* following

cdef FreeBlock* free_blocks = NULL
cdef int free_count = 0
cdef int live = 0


cdef char* block_take(uint32_t size, uint32_t* cap) noexcept nogil:
    """A block of at least `size` bytes, or NULL."""
    global free_blocks, free_count, live
    cdef char* block
    if size <= BLOCK:
        size = BLOCK
        if free_blocks != NULL:
            block = <char*>free_blocks
            free_blocks = free_blocks.following
            free_count -= 1
            cap[0] = BLOCK
            live += 1
            return block
    block = <char*>malloc(size)
    if block == NULL:
        return NULL
    cap[0] = size
    live += 1
    return block


cdef void block_give(char* block, uint32_t cap) noexcept nogil:
    global free_blocks, free_count, live
    live -= 1
    if cap == BLOCK and free_count < BLOCKS_KEPT:
        (<FreeBlock*>block).following = free_blocks
        free_blocks = <FreeBlock*>block
        free_count += 1
    else:
        free(block)


cdef int blocks_live() noexcept nogil:
    return live


cdef int buffer_reserve(Buffer* b, uint32_t more) noexcept nogil:
    """Moves the window to the front, or into a larger block, when `more` bytes do not fit behind it."""
    cdef uint32_t length = b.end - b.start
    cdef uint32_t cap = 0
    cdef char* block
    if b.cap - b.end >= more:
        return 0
    if b.base != NULL and b.cap - length >= more:
        memmove(b.base, b.base + b.start, length)
        b.start = 0
        b.end = length
        return 0
    if more > 0x7fffffffU - length:
        return -1
    cap = b.cap
    if cap < BLOCK:
        cap = BLOCK
    while cap < length + more:
        cap *= 2
    block = block_take(cap, &cap)
    if block == NULL:
        return -1
    if b.base != NULL:
        memcpy(block, b.base + b.start, length)
        block_give(b.base, b.cap)
    b.base = block
    b.cap = cap
    b.start = 0
    b.end = length
    return 0


cdef int buffer_append(Buffer* b, const char* data, uint32_t n) noexcept nogil:
    if n == 0:
        return 0                    # of an empty buffer neither base nor data need be an address (memcpy demands both)
    if buffer_reserve(b, n) < 0:
        return -1
    memcpy(b.base + b.end, data, n)
    b.end += n
    return 0
