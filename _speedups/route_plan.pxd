"""What the route trie and its builder share: limits, predicate operators, hashes, and the plan between them.

Strategy: the plan is Python rows, made and dropped while a snapshot is compiled; route_trie owns what serves requests.
"""

from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    MAX_CAPTURES = 16           # {name} segments of one template
    MAX_DEPTH = 64              # segments of one template or prefix
    MAX_STEPS = 4096            # alternatives that any one request may have to try; proved when the trie is built
    MAX_SEGMENT = 4096          # bytes of one static segment
    MAX_HOST = 253              # RFC 1035 2.3.4, without the trailing dot
    MAX_CUSTOM = 22             # methods beside those of Method: what is left of 32 bits

cdef enum PredicateOp:
    OP_EXACT = 0
    OP_PREFIX
    OP_PRESENT
    OP_ABSENT

cdef extern from *:
    """
    #ifndef CROSSWAY_ROUTE_PLAN_H
    #define CROSSWAY_ROUTE_PLAN_H
    #include <stdint.h>
    #include <string.h>
    /* Eight bytes a step, keyed by the trie's seed: clients choose the paths, but only the configuration fills the tables. */
    static inline uint64_t cw_trie_mix(uint64_t a) {
        __uint128_t product = (__uint128_t)(a ^ 0x9e3779b97f4a7c15ULL) * 0xe7037ed1a0b428dbULL;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    static inline uint64_t cw_trie_hash(const char *p, uint32_t n, uint64_t seed) {
        uint64_t h = seed ^ n, v;
        uint32_t a, b;
        for (; n >= 8; p += 8, n -= 8) { memcpy(&v, p, 8); h = cw_trie_mix(h ^ v); }
        if (n >= 4) { memcpy(&a, p, 4); memcpy(&b, p + n - 4, 4); v = ((uint64_t)a << 32) | b; }
        else if (n) v = (uint64_t)(uint8_t)p[0] | (uint64_t)(uint8_t)p[n >> 1] << 8 | (uint64_t)(uint8_t)p[n - 1] << 16;
        else return h;
        return cw_trie_mix(h ^ v);
    }
    /* One byte of a host name, taken from its end, so that one pass hashes every suffix. */
    static inline uint64_t host_step(uint64_t hash, uint8_t c) { return (hash ^ c) * 0x100000001b3ULL; }
    #endif
    """
    uint64_t host_step(uint64_t hash, uint8_t c) nogil
    uint64_t cw_trie_mix(uint64_t a) nogil
    uint64_t cw_trie_hash(const char* p, uint32_t n, uint64_t seed) nogil

# The stream: nodes depth first, in units of 8 bytes. Behind a node stand its label, its candidates (exact, then prefix) and
# its table of static children, then its {name} child with all below it, then the static children with all below them. What
# one match touches is small and lies together, and a short branch that many siblings compete with lies in one cache line:
# that is what keeps ten thousand routes about as fast as ten. Unit 0 is reserved, so that 0 means none.
cdef struct Node:
    uint32_t child                      # unit of the only static child, else 0
    uint16_t exacts                     # candidates whose template ends here
    uint16_t prefixes                   # candidates whose prefix ends here
    uint16_t label_len
    uint8_t bits                        # two or more static children: their table has 1 << bits slots; else 0
    uint8_t param                       # whether there is a {name} child

# One route at one node, in order of precedence beside its rivals.
cdef struct Candidate:
    PyObject* route                     # borrowed from RouteTrie._routes
    uint32_t methods                    # bit per Method, then per custom method
    uint32_t predicate                  # first of its predicates; 0 when it has none

cdef struct Slot:
    uint32_t tag                        # upper half of the segment's hash
    uint32_t child                      # unit; 0: empty

cdef struct Predicate:
    uint32_t name                       # offsets into `text`; header names in lower case
    uint32_t name_len
    uint32_t value
    uint32_t value_len
    uint8_t query                       # of the query, else of a header field
    uint8_t op                          # PredicateOp
    uint8_t id                          # FieldId, F_OTHER when the name is not a known one
    uint8_t last                        # of its candidate

cdef struct HostSlot:
    uint64_t hash
    uint32_t name                       # lower case; ".suffix" for "*.suffix"
    uint32_t name_len                   # 0: empty
    uint32_t root

# Where the parts of a node begin, from the node alone.
cdef inline const char* node_label(const Node* node) noexcept nogil:
    return <const char*>node + sizeof(Node)

cdef inline const Candidate* node_candidates(const Node* node) noexcept nogil:
    return <const Candidate*>(<const char*>node + ((sizeof(Node) + node.label_len + 7) & ~<size_t>7))

cdef inline const Slot* node_slots(const Node* node) noexcept nogil:
    return <const Slot*>(node_candidates(node) + node.exacts + node.prefixes)

cdef inline const Node* node_param(const Node* node) noexcept nogil:
    return <const Node*>(node_slots(node) + (<size_t>1 << node.bits if node.bits else 0))

cdef class Plan:
    cdef bytearray stream
    cdef bytes text             # what the rows' offsets point into
    cdef list predicates        # (query, op, name, name_len, value, value_len, last); the first is reserved
    cdef list hosts             # (hash, name, name_len, root)
    cdef list custom            # (at, length) of each custom method
    cdef list captures          # names of the captures, per route
    cdef uint32_t any_root, depth, worst_case
    cdef bint wildcards
    # While building.
    cdef list routes
    cdef list methods           # custom methods by name
    cdef dict roots             # host key -> branch; the key of "*.suffix" is ".suffix", of any host b""
    cdef list parts             # pieces of `text`
    cdef uint32_t used          # bytes in them
    cdef uint64_t seed

    cdef uint32_t write(self, bytes piece)
    cdef uint32_t method_mask(self, methods) except 0
    cdef tuple insert(self, owner, spec)
    cdef int lay_out(self) except -1
    cdef tuple place(self, object source)
    cdef uint32_t pool(self, list rivals) except? 0
    cdef size_t extend(self, size_t size) except 0
