"""Verified bearer tokens: who a token speaks for, and a byte-bounded cache from raw token to that answer.

Strategy: a Principal is immutable and carries everything that a request needs of its caller ready to use (rate-limit key,
header lines, audit name), so that a hit does no work but finding it. The cache is a fixed array of chains of C entries,
each of which owns a copy of its token. Only verified tokens are ever put in: see TokenCache.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from cpython.object cimport PyObject

cdef struct TokenEntry:
    TokenEntry* chain           # next entry of the same bucket
    TokenEntry* newer           # the eviction queue, newest first
    TokenEntry* older
    PyObject* principal         # one owned reference
    uint64_t hash
    uint64_t generation         # the cache's generation when it was put in
    int64_t expires             # unix seconds; dead from this second on
    Py_ssize_t cost             # bytes this entry counts for
    uint32_t length
    uint8_t referenced          # hit since it was last looked at for eviction
    char token[0]               # `length` bytes, in the same allocation


cdef class Principal:
    # Who is calling. Set once in __cinit__, never changed.
    cdef readonly str subject           # `sub`, else the client
    cdef readonly str client            # `client_id` or `azp` claim, or the API key's client, else the subject
    cdef readonly str issuer
    cdef readonly frozenset scopes
    cdef readonly object claims         # read-only mapping; nested objects are read-only too, arrays are tuples
    cdef readonly int64_t expires       # unix seconds; not accepted from this second on
    # Made ready for the fast lane.
    cdef readonly uint64_t key          # 64-bit hash of (issuer, client), never 0, the same in every worker
    cdef readonly bytes headers         # complete lines `name: value\r\n` to add upstream
    cdef readonly bytes audit_name      # the subject, JSON-escaped, without quotes
    cdef readonly Py_ssize_t size       # bytes of memory this object keeps alive, estimated


cdef class TokenCache:
    # Counters, for metrics.
    cdef public uint64_t hits, misses, evictions
    cdef readonly uint64_t generation   # entries of another generation are dead
    # Bounds. Invariant: 0 <= used <= max_bytes, count <= buckets.
    cdef readonly Py_ssize_t max_bytes
    cdef readonly Py_ssize_t used       # bytes
    cdef readonly Py_ssize_t count
    # Table and queue. Invariant: an entry is in exactly one chain and once in the queue.
    cdef TokenEntry** buckets
    cdef size_t mask                    # number of buckets - 1, a power of two - 1
    cdef TokenEntry* newest
    cdef TokenEntry* oldest
    cdef uint64_t k0, k1                # hash key, random per cache

    # The principal of exactly these token bytes, or None. Borrows `token` for the call only. Never raises.
    cdef Principal get(self, const char* token, Py_ssize_t length, int64_t now)
    # True when stored; False when it alone exceeds the bound or memory is short.
    cpdef bint put(self, bytes token, Principal principal) except -1
    # All entries die now; their memory is given back as they are met or evicted. O(1).
    cpdef bint invalidate(self) except -1

    cdef uint64_t digest(self, const char* token, Py_ssize_t length) noexcept
    cdef TokenEntry* find(self, const char* token, Py_ssize_t length, uint64_t value) noexcept
    cdef void link_newest(self, TokenEntry* entry) noexcept
    cdef void unlink_queue(self, TokenEntry* entry) noexcept
    cdef void drop(self, TokenEntry* entry) noexcept
    cdef void evict(self) noexcept
