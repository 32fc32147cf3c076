"""The route trie before it is C: routes are checked, sorted into a tree, and laid out as bytes that route_trie copies.

Strategy: precedence is decided here, once: the order of rivals at a node is the order in which they are tried. So is the
cost: the most alternatives that any request can meet are added up along the tree, and more than MAX_STEPS is an error.

Python is called from here: always; nothing of this runs while requests are served.
"""

cimport cython
from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from gateway._speedups.headers cimport (M_CONNECT, M_COUNT, M_DELETE, M_GET, M_HEAD, M_OPTIONS, M_PATCH, M_POST, M_PUT,
                                        M_TRACE)
from gateway._speedups.http1 cimport normalise_path
from gateway._speedups.wire cimport CW_TOKEN, cw_span

cdef enum:
    LINE = 64                   # bytes of a cache line
    MAX_PROBES = 24             # three cache lines of slots

cdef uint32_t ALL_METHODS = 0xffffffffU & ~(<uint32_t>1 << M_CONNECT | <uint32_t>1 << M_TRACE)
METHOD_IDS = {b"GET": M_GET, b"HEAD": M_HEAD, b"POST": M_POST, b"PUT": M_PUT, b"DELETE": M_DELETE,
              b"PATCH": M_PATCH, b"OPTIONS": M_OPTIONS}
cdef dict OPS = {"exact": OP_EXACT, "prefix": OP_PREFIX, "present": OP_PRESENT, "absent": OP_ABSENT}


cdef uint64_t host_hash(const char* name, uint32_t length, uint64_t seed) noexcept nogil:
    cdef uint32_t i = length
    while i:
        i -= 1
        seed = host_step(seed, <uint8_t>name[i])
    return cw_trie_mix(seed)


@cython.final
cdef class _Branch:
    """A node while the tree grows. Rivals are (order, owner, methods, predicates)."""
    cdef dict children
    cdef _Branch param
    cdef list exact, prefix
    cdef dict taken             # (whether exact, methods, predicates) -> owner
    cdef bytes label

    def __cinit__(self, bytes label=b""):
        self.children, self.exact, self.prefix, self.taken, self.label = {}, [], [], {}, label


@cython.final
cdef class Plan:
    """The trie, ready to be copied into an arena. ValueError says which route cannot be built and why."""

    def __cinit__(self, list routes, list specs, uint64_t seed):
        self.routes, self.seed = routes, seed
        self.stream, self.predicates = bytearray(8), [(0, 0, 0, 0, 0, 0, 1)]
        self.hosts, self.custom, self.captures, self.methods, self.roots, self.parts = [], [], [], [], {}, []
        for owner, spec in enumerate(specs):
            try:
                self.captures.append(self.insert(owner, spec))
            except ValueError as error:
                raise ValueError(f"route {routes[owner].name!r}: {error}") from None
        self.custom = [(self.write(name), len(name)) for name in self.methods]
        self.lay_out()
        self.text = b"".join(self.parts)

    cdef uint32_t write(self, bytes piece):
        cdef uint32_t at = self.used
        self.parts.append(piece)
        self.used += len(piece)
        return at

    cdef uint32_t method_mask(self, methods) except 0:
        cdef uint32_t mask = 0
        for method in methods:
            name = method.encode()
            if name in (b"CONNECT", b"TRACE"):
                raise ValueError(f"{method} is not offered: leave it out of its methods")
            if not name or cw_span(name, len(name), CW_TOKEN) != <size_t>len(name):
                raise ValueError(f"{method!r} is not a method name")
            if name in METHOD_IDS:
                mask |= <uint32_t>1 << <int>METHOD_IDS[name]
                continue
            if name not in self.methods:
                if len(self.methods) == MAX_CUSTOM:
                    raise ValueError(f"all routes together name more than {MAX_CUSTOM} methods beside the usual ones")
                self.methods.append(name)
            mask |= <uint32_t>1 << (M_COUNT + <int>self.methods.index(name))
        if mask & (<uint32_t>1 << M_GET):
            mask |= <uint32_t>1 << M_HEAD
        return mask or ALL_METHODS

    cdef tuple insert(self, owner, spec):
        """Add a route under each of its hosts; returns the names of its captures."""
        cdef _Branch branch
        segments, captures = _segments(spec)
        methods = self.method_mask(spec.methods)
        predicates = tuple([(0, OPS[op], name.lower().encode(), value.encode()) for name, op, value in spec.headers]
                           + [(1, OPS[op], name.encode(), value.encode()) for name, op, value in spec.query])
        order = (not spec.methods, -len(predicates), "HEAD" not in spec.methods, self.routes[owner].name, owner)
        for key, host in {_host_key(host): host for host in spec.hosts or ("*",)}.items():
            branch = self.roots.setdefault(key, _Branch())
            for segment in segments:
                if segment is None:
                    if branch.param is None:
                        branch.param = _Branch()
                    branch = branch.param
                else:
                    if segment not in branch.children:
                        branch.children[segment] = _Branch(segment)
                    branch = branch.children[segment]
            exact = spec.path is not None
            other = branch.taken.setdefault((exact, methods, frozenset(predicates)), owner)
            if other != owner:
                raise ValueError(f"has the same match as route {self.routes[other].name!r} (host {host!r}, "
                                 f"{spec.path if exact else spec.prefix or '/'!s}): change one of them")
            rivals = branch.exact if exact else branch.prefix
            rivals.append((order, owner, methods, predicates))
        self.depth = max(self.depth, <uint32_t>len(segments))
        return captures

    cdef int lay_out(self) except -1:
        """Number the nodes, fill the host table, and find the worst case of any request."""
        cdef dict costs = {}, numbers = {}
        for key, branch in self.roots.items():
            numbers[key], costs[key] = self.place(branch)
        self.any_root = numbers.get(b"", 0)
        self.wildcards = any(key.startswith(b".") for key in costs)
        for key in list(costs) or [b""]:
            total = costs.get(key, 0) + (costs.get(b"", 0) if key else 0)
            at = key.find(b".", 1)
            while at > 0:
                total += costs.get(key[at:], 0)
                at = key.find(b".", at + 1)
            if total > MAX_STEPS:
                raise ValueError(f"one request to host {_host_text(key)!r} may have to try {total} alternatives, more than "
                                 f"{MAX_STEPS}: too many routes share a path and differ only by predicates, or static and "
                                 "{parameter} segments alternate too deeply")
            self.worst_case = max(self.worst_case, <uint32_t>total)
        named = [(host_hash(key, len(key), self.seed), key) for key in numbers if key]
        if named:
            self.hosts = [(hash, self.write(key), len(key), numbers[key]) if key else (0, 0, 0, 0)
                          for hash, key in _probed(named)]
        return 0

    cdef size_t extend(self, size_t size) except 0:
        """Append `size` zero bytes, rounded up to whole units, to the stream: the offset where they start."""
        cdef size_t at = len(self.stream)
        if at + size > <size_t>8 * 0xffffff00:
            raise ValueError("the routes do not fit into 32 GiB")
        self.stream.extend(bytes((size + 7) & ~<size_t>7))
        return at

    cdef tuple place(self, object source):
        """Lay a branch out: (its unit, the cost of its worst case)."""
        cdef _Branch branch = source
        cdef size_t at = self.extend(sizeof(Node) + len(branch.label)), slots_at = 0
        cdef Node node = Node(0, len(branch.exact), len(branch.prefix), len(branch.label), 0, branch.param is not None)
        cdef uint32_t exact_cost, prefix_cost, i
        cdef Slot* slots
        self.stream[at + sizeof(Node):at + sizeof(Node) + len(branch.label)] = branch.label
        exact_cost, prefix_cost = self.pool(branch.exact), self.pool(branch.prefix)
        table, below, units, static_cost = None, 0, {}, 0
        if len(branch.children) > 1:
            table = _probed([(cw_trie_hash(label, len(label), self.seed), label) for label in branch.children])
            node.bits = len(table).bit_length() - 1
            slots_at = self.extend(len(table) * sizeof(Slot))
        if branch.param is not None:
            _, below = self.place(branch.param)
        for label, child in branch.children.items():
            size = _footprint(child)
            if table is not None and size <= LINE and len(self.stream) % LINE + size > LINE:
                self.extend(LINE - len(self.stream) % LINE)
            units[label], cost = self.place(child)
            static_cost = max(static_cost, cost)
        # The stream does not grow any more while these pointers live.
        if table is not None:
            slots = <Slot*>(<char*>self.stream + slots_at)
            for i, (hash, label) in enumerate(table):
                if label is not None:
                    slots[i] = Slot(<uint64_t>hash >> 32, units[label])
        elif units:
            node.child, = units.values()
        (<Node*>(<char*>self.stream + at))[0] = node
        return at // 8, 1 + max(exact_cost, below + static_cost) + prefix_cost

    cdef uint32_t pool(self, list rivals) except? 0:
        """Append the candidates of one node in order of precedence; returns the cost of trying them all."""
        cdef size_t at
        cdef uint32_t i, cost = 0
        cdef Candidate* candidate
        if not rivals:
            return 0
        if len(rivals) > MAX_STEPS:
            raise ValueError(f"{len(rivals)} routes share one host and path and differ only by predicates: at most {MAX_STEPS} may")
        at = self.extend(len(rivals) * sizeof(Candidate))
        for i, (_, owner, methods, predicates) in enumerate(sorted(rivals)):
            candidate = <Candidate*>(<char*>self.stream + at) + i
            candidate[0] = Candidate(<PyObject*>self.routes[owner], methods, len(self.predicates) if predicates else 0)
            for number, (query, op, name, value) in enumerate(predicates, 1):
                self.predicates.append((query, op, self.write(name), len(name), self.write(value), len(value),
                                        number == len(predicates)))
            cost += 1 + <uint32_t>len(predicates)
        return cost


cdef size_t _footprint(_Branch branch) except 0:
    """Bytes that a match of this branch reads one after the other: the node with all behind it, and its {name} child's."""
    cdef size_t size = (sizeof(Node) + len(branch.label) + 7) & ~<size_t>7
    size += (len(branch.exact) + len(branch.prefix)) * sizeof(Candidate)
    if len(branch.children) > 1:
        return size + 2 * LINE
    return size + (_footprint(branch.param) if branch.param is not None else 0)


def _probed(pairs):
    """An open-addressed table of (hash, item) pairs with short probes and at least a quarter of it empty (item None)."""
    size = 2
    while 3 * size < 4 * len(pairs):
        size *= 2
    while True:
        table, longest = [(0, None)] * size, 0
        for hash, item in pairs:
            at, probes = hash & (size - 1), 0
            while table[at][1] is not None:
                at, probes = (at + 1) & (size - 1), probes + 1
            table[at] = (hash, item)
            longest = max(longest, probes)
        if longest <= MAX_PROBES or size > 64 * len(pairs):
            return table
        size *= 2


def _host_key(host):
    """Lower-case bytes of an exact name, ".suffix" for "*.suffix", b"" for any host."""
    if host == "*":
        return b""
    if not host.isascii():
        raise ValueError(f"host {host!r}: write an international name in its xn-- form")
    name = host.lower().removesuffix(".").removeprefix("*")
    if not name or "*" in name or len(name) > MAX_HOST or host.startswith("*") != name.startswith(".") or name == ".":
        raise ValueError(f"host {host!r} is neither a name, nor '*.suffix', nor '*'")
    return name.encode()


def _host_text(key):
    return "*" + key.decode() if not key or key.startswith(b".") else key.decode()


def _segments(spec):
    """(segments, names of captures) of a spec's path or prefix; a segment is bytes, or None for {name}."""
    if spec.path is not None and spec.prefix is not None:
        raise ValueError("has both a path and a prefix: a route has one of them")
    pattern = spec.path if spec.path is not None else (spec.prefix or "/")
    if not pattern.startswith("/"):
        raise ValueError(f"{pattern!r} must start with '/'")
    if spec.path is None:
        pattern = pattern.removesuffix("/")
    segments, captures = [], []
    for part in pattern.split("/")[1:]:
        name = part.removeprefix("{").removesuffix("}") if part.startswith("{") and part.endswith("}") else None
        if b"" in segments or (not part and spec.path is None):
            raise ValueError(f"{pattern!r} has an empty segment before its end: such a path is refused before routing")
        if len(part) > MAX_SEGMENT:
            raise ValueError(f"{part[:40] + '...'!r} is longer than {MAX_SEGMENT} characters")
        if name is None:
            segments.append(_static(part))
        elif not name.isidentifier():
            raise ValueError(f"{part!r} does not name a parameter: letters, digits and '_' stand between the braces")
        elif name in captures:
            raise ValueError(f"{part!r} occurs twice")
        else:
            captures.append(name)
            segments.append(None)
    if len(segments) > MAX_DEPTH or len(captures) > MAX_CAPTURES:
        raise ValueError(f"{pattern!r} is too long: at most {MAX_DEPTH} segments, {MAX_CAPTURES} of them parameters")
    return segments, tuple(captures)


def _static(str part):
    """A static segment as it looks in a normalised path (RFC 3986 6.2.2), so that `%7e` in a template matches `~`."""
    cdef bytes given = "".join(c if c.isascii() else "".join(f"%{byte:02X}" for byte in c.encode()) for c in part).encode()
    cdef bytearray plain = bytearray(len(given) + 1)
    cdef int length = normalise_path(b"/" + given, len(given) + 1, plain)
    if "{" in part or "}" in part:
        raise ValueError(f"{part!r}: a parameter is a whole segment, as in /accounts/{{id}}")
    if length < 1 or b"/" in plain[1:length] or (given and length == 1):
        raise ValueError(f"no request has the segment {part!r}: such a path is refused or resolved before routing")
    return bytes(plain[1:length])
