"""Which route takes a request: a trie over host, path segments and predicates, in one block of C memory.

Strategy: the routes of a snapshot are sorted into a tree of path segments per host pattern, laid out depth first in one
arena. A match splits the path once, hashes each segment at most once, and walks the tree; where branches compete, the order
in which they are tried is the order of precedence, which therefore does not depend on the order in the file:

- host: the exact name, then `*.suffix` from longest to shortest, then any;
- path, segment by segment from the left: a static segment, then {name}, then a prefix that ends here. When a branch fails
  further on, for its path, method, header or query predicates, the next one is tried, and finally the next host pattern.
  {name} takes one segment that is not empty; a prefix ends on a segment boundary; its own trailing slash does not count;
- at the same pattern: routes that name methods, then those with more header and query predicates, then those that name
  HEAD themselves, then by name.

GET includes HEAD (RFC 9110 9.1 asks for both), a route without methods takes all of them; CONNECT and TRACE are never routed.
A header predicate holds when any line of that name does; a query predicate when any parameter of that name does, after
percent-decoding; "+" stays a plus.

There is no result cache and no scan over routes. Backtracking visits each node at most once per host pattern, so 2^depth
alternatives need a configuration with that many nodes; the worst case of any request is computed while building, and a
configuration where it exceeds MAX_STEPS is refused. No request is ever cut short for its cost.

Python is called from here: never by match(); building, find() and explain() are Python.
"""

import os
from collections import namedtuple

cimport cython
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memchr, memcmp, memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from gateway._speedups.headers cimport F_OTHER, M_COUNT, M_OTHER, Head, field_id, head_find, head_reset
from gateway._speedups.http1 cimport Limits, error_detail, normalise_path, parse_request
from gateway._speedups.route_plan cimport (MAX_HOST, OP_ABSENT, OP_PREFIX, OP_PRESENT, Candidate, HostSlot, Node, Plan,
                                           Predicate, Slot, cw_trie_hash, cw_trie_mix, host_step, node_candidates,
                                           node_label, node_param, node_slots)
from gateway._speedups.wire cimport cw_hex, cw_lower

from gateway._speedups.route_plan import METHOD_IDS

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void** out, size_t alignment, size_t size)

cdef enum:
    NO_METHOD = -1
    MATCHES = -2

Verdict = namedtuple("Verdict", ("route", "outcome", "detail"))


cdef class Route:
    """What a match yields; `index` is the caller's own."""

    def __init__(self, str name, int index=-1):
        self.name = name
        self.index = index
        self.captures = ()


# -- matching ---------------------------------------------------------------------------------------------------------

cdef bint decodes_to(const char* p, uint32_t n, const char* want, uint32_t want_len, bint prefix) noexcept nogil:
    """Whether p[0:n), percent-decoded, equals `want` (or starts with it). "%" without two hex digits stands for itself."""
    cdef uint32_t i = 0, k = 0
    cdef uint8_t c
    while i < n:
        c = <uint8_t>p[i]
        if c == 37 and i + 2 < n and cw_hex[<uint8_t>p[i + 1]] and cw_hex[<uint8_t>p[i + 2]]:
            c = <uint8_t>((cw_hex[<uint8_t>p[i + 1]] - 1) << 4 | (cw_hex[<uint8_t>p[i + 2]] - 1))
            i += 2
        i += 1
        if k == want_len:
            return prefix
        if c != <uint8_t>want[k]:
            return False
        k += 1
    return k == want_len


cdef bint query_holds(const Walk* walk, const Predicate* want) noexcept nogil:
    cdef const char* p = walk.head.base + walk.head.query_at
    cdef const char* end
    cdef const char* equals
    cdef const char* stop
    if walk.head.has_query:
        end = p + walk.head.query_len
        while p <= end:
            stop = <const char*>memchr(p, 38, end - p)
            if stop == NULL:
                stop = end
            equals = <const char*>memchr(p, 61, stop - p)
            if equals == NULL:
                equals = stop
            if equals > p and decodes_to(p, <uint32_t>(equals - p), walk.text + want.name, want.name_len, False):
                if want.op == OP_ABSENT:
                    return False
                if want.op == OP_PRESENT:
                    return True
                p = equals + 1 if equals < stop else stop
                if decodes_to(p, <uint32_t>(stop - p), walk.text + want.value, want.value_len, want.op == OP_PREFIX):
                    return True
            p = stop + 1
    return want.op == OP_ABSENT


cdef bint header_holds(const Walk* walk, const Predicate* want) noexcept nogil:
    cdef const Head* head = walk.head
    cdef const char* value
    cdef uint32_t length
    cdef int i = head.first[want.id] if want.id != F_OTHER else head_find(head, walk.text + want.name, want.name_len, 0)
    if want.op == OP_ABSENT or want.op == OP_PRESENT:
        return (i < 0) == (want.op == OP_ABSENT)
    while i >= 0:
        value = head.base + head.fields[i].value
        length = head.fields[i].value_len
        if (length == want.value_len or (want.op == OP_PREFIX and length > want.value_len)) \
                and memcmp(value, walk.text + want.value, want.value_len) == 0:
            return True
        i = head_find(head, walk.text + want.name, want.name_len, i + 1)
    return False


cdef int failing(Walk* walk, const Candidate* candidate) noexcept nogil:
    """Index of the first predicate that does not hold, or MATCHES."""
    cdef const Predicate* want = walk.predicates + candidate.predicate
    cdef int i = 0
    if candidate.predicate == 0:
        return MATCHES
    while True:
        walk.steps += 1
        if not (query_holds(walk, want) if want.query else header_holds(walk, want)):
            return i
        if want.last:
            return MATCHES
        want += 1
        i += 1


cdef const Candidate* choose(Walk* walk, const Candidate* pool, uint32_t count) noexcept nogil:
    """The first of the candidates at one node that takes the request; while explaining, record all and choose none."""
    cdef uint32_t i
    cdef const Candidate* candidate
    cdef Traced* record
    for i in range(count):
        candidate = pool + i
        walk.steps += 1
        if walk.trace != NULL:
            record = walk.trace + walk.traced
            walk.traced += 1
            record.route = candidate.route
            record.pool = pool
            record.root = walk.root
            record.verdict = failing(walk, candidate) if candidate.methods & walk.method else NO_METHOD
        elif candidate.methods & walk.method:
            if failing(walk, candidate) == MATCHES:
                return candidate
        elif candidate.methods & ~walk.allowed and failing(walk, candidate) == MATCHES:
            walk.allowed |= candidate.methods       # with one of these methods the same request would be routed
    return NULL


cdef inline const Node* labelled(const Walk* walk, uint32_t unit, const char* label, uint32_t length) noexcept nogil:
    """The node at `unit` if that is its label, else NULL."""
    cdef const Node* node = <const Node*>(walk.stream + 8 * <size_t>unit)
    return node if node.label_len == length and memcmp(node_label(node), label, length) == 0 else NULL


cdef const Node* static_child(Walk* walk, const Node* node, uint32_t depth) noexcept nogil:
    """The child behind the static segment number `depth`, or NULL. Ends: every table has an empty slot."""
    cdef const char* label = walk.path + walk.at[depth]
    cdef uint32_t length = walk.len[depth], mask, i
    cdef const Slot* slots
    cdef const Node* child
    if node.bits == 0:
        return labelled(walk, node.child, label, length) if node.child else NULL
    if not (walk.hashed >> depth) & 1:
        walk.hash[depth] = cw_trie_hash(label, length, walk.seed)
        walk.hashed |= <uint64_t>1 << depth
    slots = node_slots(node)
    mask = (<uint32_t>1 << node.bits) - 1
    i = <uint32_t>walk.hash[depth] & mask
    while slots[i].child:
        if slots[i].tag == <uint32_t>(walk.hash[depth] >> 32):
            child = labelled(walk, slots[i].child, label, length)
            if child != NULL:
                return child
        i = (i + 1) & mask
    return NULL


cdef const Candidate* descend(Walk* walk, const Node* node, uint32_t depth, uint32_t captured) noexcept nogil:
    """Try a node, whose first `depth` segments matched, and all below it. Recursion ends at the trie's depth, <= MAX_DEPTH."""
    cdef const Candidate* found
    cdef const Node* child
    walk.steps += 1
    if depth == walk.count:
        if node.exacts:
            found = choose(walk, node_candidates(node), node.exacts)
            if found != NULL:
                walk.params = captured
                walk.prefix_len = 0
                return found
    else:
        child = static_child(walk, node, depth)
        if child != NULL:
            found = descend(walk, child, depth + 1, captured)
            if found != NULL:
                return found
        if node.param and walk.len[depth]:
            walk.captured[captured] = depth
            found = descend(walk, node_param(node), depth + 1, captured + 1)
            if found != NULL:
                return found
    if node.prefixes:
        found = choose(walk, node_candidates(node) + node.exacts, node.prefixes)
        if found != NULL:
            walk.params = captured
            walk.prefix_len = walk.at[depth - 1] + walk.len[depth - 1] if depth else 0
            return found
    return NULL


cdef class RouteTrie:
    """An immutable set of routes. Built once per snapshot from (Route, spec) pairs; a spec has the attributes of
    gateway.snapshot.matching.RouteSpec. ValueError says which route cannot be built and why."""

    def __cinit__(self, routes):
        self._seed = int.from_bytes(os.urandom(8), "little")
        self._routes = [route for route, _ in routes]
        self._specs = [spec for _, spec in routes]
        self._fill(Plan(self._routes, self._specs, self._seed))

    def __dealloc__(self):
        free(self._arena)

    def __len__(self):
        return len(self._routes)

    cdef uint32_t _method_bit(self, const char* name, uint32_t length) noexcept nogil:
        cdef uint32_t i
        for i in range(self._customs):
            if self._custom_len[i] == length and memcmp(self._text + self._custom_at[i], name, length) == 0:
                return <uint32_t>1 << (M_COUNT + i)
        return 1 << M_OTHER     # only a route without methods has this bit

    cdef bint _begin(self, Walk* walk, const Head* head, const char* path, uint32_t path_len) noexcept nogil:
        """Prepare a walk; False when the path is none (an OPTIONS "*")."""
        cdef uint32_t at = 1, n = 0
        cdef const char* end
        walk.stream = self._stream
        walk.predicates = self._predicates
        walk.text = self._text
        walk.seed = self._seed
        walk.head = head
        walk.path = path
        walk.hashed = 0
        walk.allowed = 0
        walk.steps = 0
        walk.trace = NULL
        walk.traced = 0
        walk.method = <uint32_t>1 << head.method if head.method != M_OTHER else self._method_bit(
            head.base + head.method_at, head.method_len)
        if path_len == 0 or path[0] != 47:
            return False
        while n <= self._depth:         # _depth <= MAX_DEPTH: within at[65]
            end = <const char*>memchr(path + at, 47, path_len - at)
            walk.at[n] = at
            walk.len[n] = (<uint32_t>(end - path) if end != NULL else path_len) - at
            n += 1
            if end == NULL:
                break
            at = <uint32_t>(end - path) + 1
        walk.count = n
        return True

    cdef uint32_t _host_root(self, uint64_t hash, const char* name, uint32_t length) noexcept nogil:
        cdef uint32_t i = <uint32_t>hash & self._host_mask
        cdef const HostSlot* slot
        while True:
            slot = self._hosts + i
            if slot.name_len == 0:
                return 0
            if slot.hash == hash and slot.name_len == length and memcmp(self._text + slot.name, name, length) == 0:
                return slot.root
            i = (i + 1) & self._host_mask

    cdef const Candidate* _search(self, Walk* walk, const char* host, uint32_t host_len) noexcept nogil:
        """Walk the trees of the host patterns that fit, the most specific one first."""
        cdef const Candidate* found = NULL
        cdef char name[MAX_HOST]
        cdef uint64_t hash = self._seed
        cdef uint64_t hashes[MAX_HOST]
        cdef uint8_t starts[MAX_HOST]
        cdef uint32_t i, marks = 0
        if self._host_mask:
            if host_len > 1 and host[host_len - 1] == 46:
                host_len -= 1
            if 0 < host_len <= MAX_HOST:
                i = host_len
                while i:
                    i -= 1
                    name[i] = <char>cw_lower(<uint8_t>host[i])
                    hash = host_step(hash, <uint8_t>name[i])
                    if name[i] == 46 and i and self._wildcards:
                        starts[marks] = <uint8_t>i
                        hashes[marks] = cw_trie_mix(hash)
                        marks += 1
                walk.root = self._host_root(cw_trie_mix(hash), name, host_len) if name[0] != 46 else 0
                if walk.root:
                    found = descend(walk, <const Node*>(self._stream + 8 * <size_t>walk.root), 0, 0)
                while found == NULL and marks:
                    marks -= 1
                    walk.root = self._host_root(hashes[marks], name + starts[marks], host_len - starts[marks])
                    if walk.root:
                        found = descend(walk, <const Node*>(self._stream + 8 * <size_t>walk.root), 0, 0)
        if found == NULL and self._any_root:
            walk.root = self._any_root
            found = descend(walk, <const Node*>(self._stream + 8 * <size_t>walk.root), 0, 0)
        return found

    cdef int match(self, const Head* head, const char* host, uint32_t host_len, const char* path, uint32_t path_len,
                   Match* out) noexcept:
        cdef Walk walk
        cdef const Candidate* found
        cdef uint32_t i
        out.route = NULL
        out.params = 0
        out.prefix_len = 0
        out.allowed = 0
        if not self._begin(&walk, head, path, path_len):
            return 0
        found = self._search(&walk, host, host_len)
        if found == NULL:
            out.allowed = walk.allowed
            return -1 if walk.allowed else 0
        out.route = found.route
        out.prefix_len = walk.prefix_len
        out.params = walk.params
        for i in range(walk.params):
            out.param_at[i] = walk.at[walk.captured[i]]
            out.param_len[i] = walk.len[walk.captured[i]]
        return 1

    cdef list _method_names(self, uint32_t mask):
        names = [name for name, bit in METHOD_IDS.items() if mask >> <uint32_t>bit & 1]
        for i in range(self._customs):
            if mask >> (M_COUNT + i) & 1:
                names.append(self._text[self._custom_at[i]:self._custom_at[i] + self._custom_len[i]])
        return names

    cdef bytes allow(self, Match* m):
        return b", ".join(self._method_names(m.allowed))

    cdef int _fill(self, object source) except -1:
        """Copy the plan into the arena."""
        cdef Plan plan = source
        cdef size_t hosts = len(plan.hosts) * sizeof(HostSlot), predicates = len(plan.predicates) * sizeof(Predicate)
        cdef size_t size = len(plan.stream) + hosts + predicates + len(plan.text)
        cdef uint32_t i
        if posix_memalign(&self._arena, 64, size):
            self._arena = NULL
            raise MemoryError("no memory for the route trie")
        memset(self._arena, 0, size)
        # In falling order of alignment: the stream is whole units of 8, HostSlot 8, Predicate 4, text 1.
        self._stream = <char*>self._arena
        self._hosts = <HostSlot*>(self._stream + len(plan.stream))
        self._predicates = <Predicate*>(<char*>self._hosts + hosts)
        self._text = <char*>self._predicates + predicates
        memcpy(self._stream, <const char*>plan.stream, len(plan.stream))
        memcpy(self._text, <const char*>plan.text, len(plan.text))
        for i, (query, op, at, length, value, value_len, last) in enumerate(plan.predicates):
            self._predicates[i] = Predicate(at, length, value, value_len, query, op,
                                            F_OTHER if query else field_id(self._text + <uint32_t>at, length), last)
        for i, (hash, at, length, root) in enumerate(plan.hosts):
            self._hosts[i] = HostSlot(hash, at, length, root)
        for i, (at, length) in enumerate(plan.custom):
            self._custom_at[i], self._custom_len[i] = at, length
        self._customs = len(plan.custom)
        self._host_mask = len(plan.hosts) - 1 if plan.hosts else 0
        self._any_root = plan.any_root
        self._depth = plan.depth
        self._wildcards = plan.wildcards
        self.worst_case = plan.worst_case
        for route, captures in zip(self._routes, plan.captures):
            (<Route>route).captures = captures
        return 0

    # -- for people and tests: the same walk, over a head made for it --------------------------------------------------

    def find(self, str method, str host, str path, headers=(), bytes query=b""):
        """Match a request as the data path does: (route name or None, captures, methods of Allow when the answer is 405).

        ValueError when the parser would refuse the request. `host` has no port, `query` no "?".
        """
        cdef _Sample sample = _Sample(method, host, path, headers, query)
        cdef Match m
        cdef Route route
        cdef bytes text = sample.path
        cdef int result = self.match(&sample.head, sample.host, len(sample.host), text, len(text), &m)
        if result <= 0:
            return None, {}, tuple(name.decode() for name in self._method_names(m.allowed)) if result < 0 else ()
        route = <Route>m.route
        values = [text[m.param_at[i]:m.param_at[i] + m.param_len[i]].decode() for i in range(m.params)]
        return route.name, dict(zip(route.captures, values)), ()

    def _probe(self, str method, str host, str path, headers=(), bytes query=b""):
        """(alternatives tried, matched prefix length, Allow), for tests and benchmarks."""
        cdef _Sample sample = _Sample(method, host, path, headers, query)
        cdef Walk walk
        cdef Match m
        self.match(&sample.head, sample.host, len(sample.host), sample.path, len(sample.path), &m)
        if self._begin(&walk, &sample.head, sample.path, len(sample.path)):
            self._search(&walk, sample.host, len(sample.host))
        return walk.steps, m.prefix_len, self.allow(&m)

    def _time_match(self, str method, str host, list paths, int rounds):
        """Nanoseconds per match over `paths` (normalised, all routed), for benchmarks."""
        cdef _Sample sample = _Sample(method, host, "/", (), b"")
        cdef Match m
        cdef timespec begin, end
        cdef bytes joined = "".join(paths).encode()
        cdef const char* text = joined
        cdef bytes name = sample.host
        cdef const char* where = name
        cdef uint32_t where_len = len(name)
        cdef list sizes = [len(path) for path in paths]
        cdef uint32_t lengths[16384]
        cdef uint32_t i, count = len(sizes), at
        cdef int64_t found = 0
        if count > 16384:
            raise ValueError("at most 16384 paths")
        for i in range(count):
            lengths[i] = sizes[i]
        clock_gettime(CLOCK_MONOTONIC, &begin)
        for _ in range(rounds):
            at = 0
            for i in range(count):
                found += self.match(&sample.head, where, where_len, text + at, lengths[i], &m) == 1
                at += lengths[i]
        clock_gettime(CLOCK_MONOTONIC, &end)
        if found != <int64_t>count * rounds:
            raise ValueError(f"{<int64_t>count * rounds - found} matches found no route")
        return ((end.tv_sec - begin.tv_sec) * 1e9 + (end.tv_nsec - begin.tv_nsec)) / found

    cdef list _trace(self, object source):
        """Every candidate on the request's way as (owner, verdict, pool, root), in order of precedence."""
        cdef _Sample sample = source
        cdef Walk walk
        cdef bytearray space = bytearray(max(1, self.worst_case) * sizeof(Traced))
        if not self._begin(&walk, &sample.head, sample.path, len(sample.path)):
            return []
        walk.trace = <Traced*><char*>space      # worst_case bounds the candidates of any request
        self._search(&walk, sample.host, len(sample.host))
        owners = {<size_t><PyObject*>route: owner for owner, route in enumerate(self._routes)}
        return [(owners[<size_t>walk.trace[i].route], walk.trace[i].verdict, <size_t>walk.trace[i].pool, walk.trace[i].root)
                for i in range(walk.traced)]

    def explain(self, str method, str host, str path, headers=(), bytes query=b"", int limit=10):
        """Verdicts in order of precedence: those of the routes that were tried, the winner's outcome being "won", then the
        nearest of the routes that were not. At most `limit` losers. Outcomes: won, less specific, method, header, query,
        path, host. ValueError as for find()."""
        cdef _Sample sample = _Sample(method, host, path, headers, query)
        verdicts, seen, winner = [], set(), None
        for owner, verdict, pool, root in self._trace(sample):
            if owner in seen:
                continue        # the same route under a less specific host of its own
            seen.add(owner)
            if verdict == MATCHES and winner is None:
                winner = (pool, root)
                verdicts.append(Verdict(self._routes[owner].name, "won", ""))
            else:
                verdicts.append(_verdict(self._routes[owner].name, self._specs[owner], verdict, (pool, root), winner))
        rest = sorted((_miss(self._routes[owner].name, self._specs[owner], sample.host.decode(), sample.path.decode())
                       for owner in range(len(self._routes)) if owner not in seen))
        verdicts.extend(verdict for _, verdict in rest)
        kept, losers = [], 0
        for verdict in verdicts:
            losers += verdict.outcome != "won"
            if verdict.outcome == "won" or losers <= limit:
                kept.append(verdict)
        return kept


@cython.final
cdef class _Sample:
    """A request head made from its parts and parsed as one from the wire."""
    cdef Head head
    cdef bytes raw, host, path

    def __cinit__(self, str method, str host, str path, headers, bytes query):
        cdef Limits limits
        cdef int result
        cdef bytearray plain
        limits.head, limits.target, limits.fields = 1 << 20, 1 << 20, 250
        target = path.encode() + (b"?" + query if query else b"")
        lines = [b"%s %s HTTP/1.1" % (method.encode(), target), b"Host: " + (host.encode() or b"localhost")]
        lines.extend(name + b": " + value for name, value in headers)
        self.raw = b"\r\n".join(lines) + b"\r\n\r\n"
        head_reset(&self.head)
        self.head.base = self.raw
        result = parse_request(self.raw, len(self.raw), &self.head, &limits)
        if result == len(self.raw):
            plain = bytearray(self.head.path_len)
            result = normalise_path(self.head.base + self.head.path_at, self.head.path_len, plain)
            if result > 0:
                self.path = bytes(plain[:result])
        if result <= 0 or self.path is None:
            reason = (<bytes>error_detail(-result)).decode() if result < 0 else "it does not end where it should"
            raise ValueError(f"not a valid request: {reason}")
        self.host = host.encode()


# -- words for explain() ----------------------------------------------------------------------------------------------

def _describe(kind, name, op, value):
    return f"{kind} {name} must " + {"exact": f"be {value!r}", "prefix": f"start with {value!r}",
                                     "present": "be present", "absent": "be absent"}[op]


def _verdict(name, spec, verdict, place, winner):
    """Why a route that was tried did not win."""
    if verdict == NO_METHOD:
        methods = [*spec.methods, *(("HEAD",) if "GET" in spec.methods and "HEAD" not in spec.methods else ())]
        return Verdict(name, "method", "takes " + ", ".join(methods or ("every method",)))
    if verdict >= 0:
        predicates = [("header", *each) for each in spec.headers] + [("query", *each) for each in spec.query]
        return Verdict(name, predicates[verdict][0], _describe(*predicates[verdict]))
    if place == winner:
        return Verdict(name, "less specific", "the same host and path, but fewer predicates or a later name")
    what = "path" if place[1] == winner[1] else "host pattern"
    return Verdict(name, "less specific", f"it matches too, but by a less specific {what}")


def _host_fits(pattern, host):
    host = host.lower().removesuffix(".")
    pattern = pattern.lower().removesuffix(".")
    return pattern in ("*", host) or (pattern.startswith("*.") and host.endswith(pattern[1:]) and len(host) > len(pattern) - 1)


def _miss(name, spec, host, path):
    """(sort key, verdict) of a route that was not tried: its host or its path does not fit. Nearest first."""
    pattern = spec.path if spec.path is not None else (spec.prefix or "/")
    shared = 0
    for want, got in zip(pattern.split("/"), path.split("/")):
        if want != got and not want.startswith("{"):
            break
        shared += 1
    if spec.hosts and not any(_host_fits(each, host) for each in spec.hosts):
        return (1, -shared, name), Verdict(name, "host", "is for " + ", ".join(spec.hosts))
    kind = "path" if spec.path is not None else "prefix"
    return (0, -shared, name), Verdict(name, "path", f"its {kind} is {pattern}")
