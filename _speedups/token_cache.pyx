"""Verified bearer tokens: who a token speaks for, and a byte-bounded cache from raw token to that answer.

Strategy: a hit costs one keyed hash of at most 64 bytes, one chain step and one memcmp over the whole token; no object is
made. The hash (SipHash-1-3, random key) covers the length and the last 64 bytes only: those are the signature, the part of a
verified token that nobody can choose, and the full compare decides. Eviction is a queue with second chances, at most
eight per eviction, so every operation is O(1). Expiry is checked at each hit; a change of keys bumps the generation, and
what is of an older generation is dead.
Python is called from here: per parked request (making a Principal, putting it in); never on lookup.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

import json
import os
from sys import getsizeof
from types import MappingProxyType

cdef extern from *:
    """
    #include <endian.h>
    #include <stdint.h>
    #include <string.h>
    #define CW_ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
    #define CW_SIPROUND \\
        do { \\
            v0 += v1; v1 = CW_ROTL(v1, 13); v1 ^= v0; v0 = CW_ROTL(v0, 32); \\
            v2 += v3; v3 = CW_ROTL(v3, 16); v3 ^= v2; \\
            v0 += v3; v3 = CW_ROTL(v3, 21); v3 ^= v0; \\
            v2 += v1; v1 = CW_ROTL(v1, 17); v1 ^= v2; v2 = CW_ROTL(v2, 32); \\
        } while (0)
    /* SipHash-1-3 (Aumasson, Bernstein: SipHash, 2012), as CPython and Rust use it for their hash tables. */
    static inline uint64_t cw_siphash13(const char *p, size_t n, uint64_t k0, uint64_t k1) {
        uint64_t v0 = k0 ^ 0x736f6d6570736575ULL, v1 = k1 ^ 0x646f72616e646f6dULL;
        uint64_t v2 = k0 ^ 0x6c7967656e657261ULL, v3 = k1 ^ 0x7465646279746573ULL;
        uint64_t last = (uint64_t)n << 56, word;
        size_t i = 0;
        for (; n - i >= 8; i += 8) {
            memcpy(&word, p + i, 8);
            word = le64toh(word);
            v3 ^= word; CW_SIPROUND; v0 ^= word;
        }
        for (size_t shift = 0; i < n; i++, shift += 8) last |= (uint64_t)(uint8_t)p[i] << shift;
        v3 ^= last; CW_SIPROUND; v0 ^= last;
        v2 ^= 0xff;
        CW_SIPROUND; CW_SIPROUND; CW_SIPROUND;
        return v0 ^ v1 ^ v2 ^ v3;
    }
    """
    uint64_t cw_siphash13(const char* p, size_t n, uint64_t k0, uint64_t k1) noexcept nogil


cdef enum:
    TAIL = 64                   # bytes of the token that are hashed: at least 256 bits of any signature we accept
    SECOND_CHANCES = 8          # bounds the work of one eviction
    SMALLEST = 512              # no entry costs less: a Principal alone is larger (see Principal.size)
    MAX_DEPTH = 64              # of claims; the verifier's own bound is far lower
    OBJECT = 160                # a Principal and its allocation


def siphash(bytes data not None, uint64_t k0, uint64_t k1) -> int:
    """SipHash-1-3 of `data` under the 128-bit key (k0, k1)."""
    return cw_siphash13(PyBytes_AS_STRING(data), <size_t>PyBytes_GET_SIZE(data), k0, k1)


cdef object frozen(object value, Py_ssize_t* size, int depth):
    """A read-only copy of a JSON value; adds the bytes it occupies to `size`."""
    cdef dict copy
    if depth > MAX_DEPTH:
        raise ValueError("claims are nested too deeply")
    size[0] += getsizeof(value)
    if isinstance(value, (dict, MappingProxyType)):
        copy = {}
        for name, item in value.items():
            size[0] += getsizeof(name)
            copy[name] = frozen(item, size, depth + 1)
        return MappingProxyType(copy)
    if isinstance(value, (list, tuple)):
        return tuple([frozen(item, size, depth + 1) for item in value])
    return value


cdef uint64_t identity_key(str issuer, str client, uint64_t seed):
    """The rate-limit key. The issuer's length goes first, so that ("ab", "c") and ("a", "bc") differ."""
    cdef bytes name = issuer.encode("utf-8", "surrogatepass")
    cdef bytes text = len(name).to_bytes(8, "little") + name + b"\0" + client.encode("utf-8", "surrogatepass")
    cdef uint64_t key = cw_siphash13(PyBytes_AS_STRING(text), <size_t>PyBytes_GET_SIZE(text), seed, ~seed)
    return key if key != 0 else 1           # 0 marks a free word in shared tables


# Without the collector: what it refers to is JSON and immutable, so it cannot be part of a cycle, and thousands of cached
# principals would make every full collection longer.
@cython.final
@cython.no_gc
cdef class Principal:
    """Who is calling, established by a verified credential. Immutable.

    `expires` is in unix seconds. `seed` keys the hash `key`, and must be the same in every worker.
    """

    def __cinit__(self, str subject not None, str client not None, str issuer not None, object scopes not None,
                  object claims not None, int64_t expires, uint64_t seed, bytes headers not None = b"",
                  bytes audit_name=None):
        cdef Py_ssize_t size = OBJECT
        cdef str quoted
        self.subject = subject
        self.client = client
        self.issuer = issuer
        self.scopes = frozenset(scopes)
        self.claims = frozen(claims, &size, 0)
        self.expires = expires
        self.key = identity_key(issuer, client, seed)
        self.headers = headers
        if audit_name is None:
            quoted = json.dumps(subject)
            audit_name = quoted[1:len(quoted) - 1].encode("ascii")
        self.audit_name = audit_name
        size += getsizeof(self.scopes) + sum([getsizeof(scope) for scope in self.scopes])
        size += getsizeof(subject) + getsizeof(client) + getsizeof(issuer)
        size += getsizeof(self.headers) + getsizeof(self.audit_name)
        self.size = size

    def __repr__(self):
        return f"<Principal {self.subject!r} of {self.issuer!r}>"


@cython.final
cdef class TokenCache:
    """Principals by raw token, at most `max_bytes` of tokens and principals; 0 stores nothing.

    Only what a verifier accepted is put in, and each verifier has a cache of its own: a token accepted for one audience
    says nothing about another. Refusals are never cached.
    """

    def __cinit__(self, Py_ssize_t max_bytes):
        cdef size_t wanted, buckets = 16
        cdef bytes key = os.urandom(16)
        if max_bytes < 0:
            raise ValueError("max_bytes of a token cache is not negative")
        self.max_bytes = max_bytes
        wanted = <size_t>max_bytes // SMALLEST
        while buckets < wanted:             # as many buckets as entries can exist: the table never grows
            buckets *= 2
        self.buckets = <TokenEntry**>calloc(buckets, sizeof(TokenEntry*))
        if self.buckets is NULL:
            raise MemoryError()
        self.mask = buckets - 1
        memcpy(&self.k0, PyBytes_AS_STRING(key), 8)
        memcpy(&self.k1, PyBytes_AS_STRING(key) + 8, 8)

    def __dealloc__(self):
        while self.oldest is not NULL:
            self.drop(self.oldest)
        free(self.buckets)

    cdef uint64_t digest(self, const char* token, Py_ssize_t length) noexcept:
        cdef Py_ssize_t tail = length if length < TAIL else TAIL
        return cw_siphash13(token + (length - tail), <size_t>tail, self.k0, self.k1 ^ <uint64_t>length)

    cdef TokenEntry* find(self, const char* token, Py_ssize_t length, uint64_t value) noexcept:
        cdef TokenEntry* entry = self.buckets[value & self.mask]
        while entry is not NULL:
            if entry.hash == value and entry.length == <uint64_t>length and memcmp(entry.token, token, <size_t>length) == 0:
                return entry
            entry = entry.chain
        return NULL

    cdef Principal get(self, const char* token, Py_ssize_t length, int64_t now):
        cdef TokenEntry* entry = self.find(token, length, self.digest(token, length))
        if entry is NULL:
            self.misses += 1
            return None
        if entry.generation != self.generation or now >= entry.expires:
            self.drop(entry)
            self.misses += 1
            return None
        self.hits += 1
        entry.referenced = 1
        return <Principal>entry.principal   # only put() stores here, and it takes Principals only

    cpdef bint put(self, bytes token, Principal principal) except -1:
        """Remember a verified token. False when it alone exceeds the bound, or memory is short."""
        cdef Py_ssize_t length, cost
        cdef uint64_t value
        cdef TokenEntry* entry
        if token is None or principal is None:
            raise TypeError("put() takes a token and its Principal")
        length = PyBytes_GET_SIZE(token)
        cost = <Py_ssize_t>sizeof(TokenEntry) + length + principal.size
        if cost > self.max_bytes or length > 0x7fffffff:
            return False
        value = self.digest(PyBytes_AS_STRING(token), length)
        entry = self.find(PyBytes_AS_STRING(token), length, value)
        if entry is not NULL:
            self.drop(entry)
        while self.used + cost > self.max_bytes:   # ends: an empty cache has used == 0 and cost <= max_bytes
            self.evict()
        entry = <TokenEntry*>malloc(sizeof(TokenEntry) + <size_t>length)
        if entry is NULL:
            return False
        memcpy(entry.token, PyBytes_AS_STRING(token), <size_t>length)
        entry.length = <uint32_t>length
        entry.hash = value
        entry.generation = self.generation
        entry.expires = principal.expires
        entry.cost = cost
        entry.referenced = 0
        Py_INCREF(principal)                        # given back by drop()
        entry.principal = <PyObject*>principal
        entry.chain = self.buckets[value & self.mask]
        self.buckets[value & self.mask] = entry
        self.link_newest(entry)
        self.used += cost
        self.count += 1
        return True

    cpdef bint invalidate(self) except -1:
        """Every entry dies now, in O(1)."""
        self.generation += 1
        return True

    def lookup(self, bytes token not None, int64_t now) -> Principal | None:
        """The principal of `token` at `now` (unix seconds), or None."""
        return self.get(PyBytes_AS_STRING(token), PyBytes_GET_SIZE(token), now)

    cdef void link_newest(self, TokenEntry* entry) noexcept:
        entry.newer = NULL
        entry.older = self.newest
        if self.newest is not NULL:
            self.newest.newer = entry
        else:
            self.oldest = entry
        self.newest = entry

    cdef void unlink_queue(self, TokenEntry* entry) noexcept:
        if entry.newer is not NULL:
            entry.newer.older = entry.older
        else:
            self.newest = entry.older
        if entry.older is not NULL:
            entry.older.newer = entry.newer
        else:
            self.oldest = entry.newer

    cdef void drop(self, TokenEntry* entry) noexcept:
        """Take an entry out and free it. Unlinked completely before the principal goes."""
        cdef TokenEntry** link = &self.buckets[entry.hash & self.mask]
        while link[0] != entry:             # it is in this chain: see the invariant
            link = &link[0].chain
        link[0] = entry.chain
        self.unlink_queue(entry)
        self.used -= entry.cost
        self.count -= 1
        Py_DECREF(<object>entry.principal)
        free(entry)

    cdef void evict(self) noexcept:
        """Drop one entry: the oldest without a hit since it was last looked at, or the ninth."""
        cdef int chance
        cdef TokenEntry* entry
        for chance in range(SECOND_CHANCES):
            entry = self.oldest
            if entry is NULL or not entry.referenced or entry.generation != self.generation:
                break
            entry.referenced = 0
            self.unlink_queue(entry)
            self.link_newest(entry)
        if self.oldest is not NULL:
            self.drop(self.oldest)
            self.evictions += 1
