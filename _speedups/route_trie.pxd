"""Which route takes a request: a trie over host, path segments and predicates, in one block of C memory.

Strategy: routes are sorted into a tree when a snapshot is compiled; a match walks the tree along the path's segments, so
its cost depends on the path and not on the number of routes. See route_trie.pyx for the order of precedence.
"""

from cpython.ref cimport PyObject
from libc.stdint cimport uint32_t, uint64_t
from gateway._speedups.headers cimport Head
from gateway._speedups.route_plan cimport Candidate, HostSlot, Predicate

# What a match yields. The engine's snapshot subclasses it.
cdef class Route:
    cdef readonly str name
    cdef readonly int index
    cdef readonly tuple captures        # names of the {name} segments in template order; set by RouteTrie

# The caller's result.
cdef struct Match:
    PyObject* route                     # borrowed: alive while the trie lives; NULL when none
    uint32_t params                     # captures in use
    uint32_t param_at[16]               # offsets into the path, in template order
    uint32_t param_len[16]
    uint32_t allowed                    # when -1 was returned: methods with which this request would be routed; for allow()
    uint32_t prefix_len                 # prefix routes: bytes of the path before the rest, which is empty or starts with
                                        # "/" (so 0 for the prefix "/"); 0 for templates

cdef struct Traced:
    PyObject* route
    const Candidate* pool               # first candidate of its kind at its node: equal for rivals at the same pattern
    uint32_t root
    int verdict                         # -2 it matches, -1 method, else the predicate that failed

# One match under way, on the stack.
cdef struct Walk:
    const char* stream
    const Predicate* predicates
    const char* text
    const Head* head
    const char* path
    uint64_t seed
    uint64_t hashed                     # bit per segment whose hash is known
    uint32_t count                      # segments, at most one more than the trie is deep
    uint32_t method                     # one bit
    uint32_t allowed
    uint32_t steps                      # alternatives tried so far, at most RouteTrie.worst_case
    uint32_t root
    uint32_t params
    uint32_t prefix_len
    Traced* trace                       # NULL except for explain()
    uint32_t traced
    uint32_t captured[16]               # segment of each capture
    uint32_t at[65]
    uint32_t len[65]
    uint64_t hash[64]

cdef class RouteTrie:
    # The arena; the pointers below lead into it and live as long as the trie.
    cdef void* _arena
    cdef char* _stream                  # see route_plan.pxd
    cdef Predicate* _predicates
    cdef HostSlot* _hosts
    cdef char* _text
    cdef uint32_t _host_mask            # 0: no route names a host
    cdef uint32_t _any_root             # root for any host, 0 when there is none
    cdef uint32_t _depth                # segments of the longest template or prefix
    cdef bint _wildcards
    cdef uint32_t _customs              # methods without a Method of their own, in the order of their bits
    cdef uint32_t _custom_at[22]
    cdef uint32_t _custom_len[22]
    cdef uint64_t _seed
    cdef readonly uint32_t worst_case   # alternatives tried by the worst request possible, at most MAX_STEPS
    # Owners of what candidates point to.
    cdef list _routes
    cdef list _specs

    # 1 found, 0 not found (404), -1 no route for this method (405, see allow). `host` is without its port, in any case, maybe
    # with a trailing dot; `path` is normalised. Python is never called.
    cdef int match(self, const Head* head, const char* host, uint32_t host_len, const char* path, uint32_t path_len,
                   Match* out) noexcept
    # Value of the Allow field after match() returned -1.
    cdef bytes allow(self, Match* m)

    cdef bint _begin(self, Walk* walk, const Head* head, const char* path, uint32_t path_len) noexcept nogil
    cdef const Candidate* _search(self, Walk* walk, const char* host, uint32_t host_len) noexcept nogil
    cdef uint32_t _host_root(self, uint64_t hash, const char* name, uint32_t length) noexcept nogil
    cdef uint32_t _method_bit(self, const char* name, uint32_t length) noexcept nogil
    cdef list _method_names(self, uint32_t mask)
    cdef int _fill(self, object plan) except -1
    cdef list _trace(self, object sample)
