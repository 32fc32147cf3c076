"""The exchange and the compiled snapshot that it runs on.

Strategy: see exchange.pxd. Everything a request needs is an attribute lookup by offset; the classes below are built once
per reload. Python is called from here: while a snapshot is built, and per parked request.

Safety: `RouteEntry.step` borrows from the tuple `steps`, which lives exactly as long. `Exchange.head` is allocated with the
exchange and freed with it; Head.base points into the downstream connection's buffer, which the connection keeps in place
(or re-points) while the exchange is its current one. `path_copy` is owned by the exchange until reset().
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset
from gateway._speedups.buffers cimport Buffer, buffer_append, buffer_release
from gateway._speedups.headers cimport MAX_FIELDS, Head, head_find, head_reset

import ipaddress

cdef extern from *:
    """
    #include <stdlib.h>
    #ifdef __GLIBC__
    #include <malloc.h>
    #else
    #define malloc_trim(pad) 0
    #endif
    """
    int malloc_trim(size_t pad) nogil

cdef int live = 0


cdef int exchanges_live() noexcept:
    return live


def return_free_memory():
    """Give whole free pages of the C heap back to the kernel: what a start and a snapshot's predecessor leave. About a millisecond."""
    with nogil:
        malloc_trim(0)


cdef class Networks:
    """A set of CIDR blocks, IPv4 and IPv6 together (IPv4 as ::ffff:0:0/96)."""

    def __cinit__(self, networks=()):
        cdef int i = 0
        self.count = len(networks)
        self.entries = <unsigned char*>malloc(17 * self.count + 1)
        if self.entries == NULL:
            raise MemoryError
        for text in networks:
            network = ipaddress.ip_network(text, strict=False)
            if network.version == 4:
                packed = b"\0" * 10 + b"\xff\xff" + network.network_address.packed
                bits = network.prefixlen + 96
            else:
                packed, bits = network.network_address.packed, network.prefixlen
            memcpy(self.entries + 17 * i, <const char*>packed, 16)
            self.entries[17 * i + 16] = bits
            i += 1

    def __dealloc__(self):
        free(self.entries)

    cdef bint contains(self, const unsigned char* address) noexcept nogil:
        cdef int i, bits, whole
        cdef const unsigned char* entry
        for i in range(self.count):
            entry = self.entries + 17 * i
            bits = entry[16]
            whole = bits >> 3
            if memcmp(entry, address, whole) == 0 and \
                    ((bits & 7) == 0 or ((entry[whole] ^ address[whole]) >> (8 - (bits & 7))) == 0):
                return True
        return False

    def __contains__(self, address):
        parsed = ipaddress.ip_address(address)
        packed = parsed.packed if parsed.version == 6 else b"\0" * 10 + b"\xff\xff" + parsed.packed
        return bool(self.contains(<const unsigned char*><const char*>packed))


cdef class Step:
    """One compiled policy of one route. Subclasses override run(), and park() when they may need Python."""

    cdef int run(self, Exchange x) except -1:
        return STEP_GO

    cdef object park(self, Exchange x):
        return None

    cdef int resumed(self, Exchange x, object result) except -1:
        return STEP_GO

    cdef int failed(self, Exchange x, object error) except -1:
        return x.refuse(500, b"policy-failed", b"a policy failed")

    cdef object park_answer(self, Exchange x):
        return None

    cdef int record(self, Exchange x, int64_t total_us) except -1:
        return 0


cdef class Edits:
    """Header changes: names to remove (lower case), then lines to append (each ending in CRLF)."""

    def __init__(self, remove=(), bytes add=b""):
        self.remove = tuple(remove)
        self.add = add


cdef class Shape:
    """See exchange.pxd; the one implementation is Shaper in shaping."""

    cdef int apply(self, Exchange x) except -1:
        return 0


cdef class Tap:
    """See exchange.pxd; the one implementation is Copy in shaping."""

    cdef int take(self, Exchange x, const char* data, uint32_t n) except -1:
        return 0

    cdef void give_up(self) noexcept:
        pass


cdef class Tunnels:
    """See exchange.pxd; `idle` in seconds."""

    def __init__(self, uint32_t metric, *, double idle=300, uint32_t most=1024, bint expire=True):
        self.metric = metric
        self.expire = expire
        self.idle_us = <int64_t>(idle * 1e6)
        self.most = most


cdef class RouteEntry(Route):
    """A route as the engine runs it. `steps` are in the order of their phases already."""

    def __cinit__(self):
        self.step = NULL

    def __init__(self, str name, int index, *, Upstream upstream, uint32_t metric, tuple steps=(), int64_t body_limit=-1,
                 double head=0, double idle=0, double total=0, Edits request_edits=None, Edits response_edits=None,
                 bytes rewrite_prefix=None, tuple rewrite_path=None, bytes rewrite_host=None, tuple audits=(),
                 tuple response_hooks=(), tuple end_hooks=(), bint strip_authorization=False, cors=None, Shape shape=None,
                 Tunnels tunnels=None, bytes unswitched=None, bint grpc_web=False):
        cdef int i
        Route.__init__(self, name, index)
        self.upstream = upstream
        self.metric = metric
        self.label = name.encode("unicode_escape").replace(b'"', b"'").replace(b"\\", b"/")
        for step in steps:
            if not isinstance(step, Step):
                raise TypeError(f"not a step: {step!r}")
        self.steps = steps
        self.step_count = len(steps)
        self.step = <void**>malloc(sizeof(void*) * (self.step_count + 1))
        if self.step == NULL:
            raise MemoryError
        for i in range(self.step_count):
            self.step[i] = <void*>steps[i]
        self.body_limit = body_limit
        self.head_us = <int64_t>(head * 1e6) or upstream.head_us
        self.idle_us = <int64_t>(idle * 1e6) or upstream.idle_us
        self.total_us = <int64_t>(total * 1e6) or upstream.total_us
        self.request_edits = request_edits
        self.response_edits = response_edits
        self.rewrite_prefix = rewrite_prefix
        self.rewrite_path = rewrite_path
        self.rewrite_host = rewrite_host
        self.audits = audits
        self.response_hooks = response_hooks
        self.end_hooks = end_hooks
        self.strip_authorization = strip_authorization
        self.cors = cors
        self.shape = shape
        self.tunnels = tunnels
        self.unswitched = unswitched
        self.grpc_web = grpc_web

    def __dealloc__(self):
        free(self.step)

    @property
    def step_names(self) -> list:
        """Names of the steps in the order in which they run."""
        return [step.name for step in self.steps]


cdef class ListenerEntry:
    """A listener's limits (bytes, counts) and timeouts (seconds), and the trie of its routes."""

    def __init__(self, str name, RouteTrie trie not None, *, int head_limit=32768, int target_limit=8192, int fields=100,
                 int64_t body_limit=1048576, double head=10, double body=30, double keepalive=75, double write=30,
                 int requests=10000, int connections=10000, trusted=(), str proxy_protocol="off",
                 TlsListener tls=None, Http2 http2=None, tcp=None, originals=None):
        self.name = name
        self.originals = originals
        self.trie = trie
        self.limits.head = head_limit
        self.limits.target = target_limit
        self.limits.fields = min(fields, MAX_FIELDS)
        self.body_limit = body_limit
        self.head_us = <int64_t>(head * 1e6)
        self.body_us = <int64_t>(body * 1e6)
        self.keepalive_us = <int64_t>(keepalive * 1e6)
        self.write_us = <int64_t>(write * 1e6)
        self.requests_max = requests
        self.connections_max = connections
        self.trusted = Networks(trusted)
        self.tls = tls
        self.http2 = http2
        self.tcp = tcp
        self.proxy_protocol = {"off": 0, "optional": 1, "required": 2}[proxy_protocol]


cdef class Snapshot:
    """Everything a worker runs on, immutable but for the pools inside its upstreams; swapped by one assignment."""

    def __init__(self, int version, str digest, dict listeners, dict upstreams, list routes):
        self.version = version
        self.digest = digest
        self.listeners = listeners
        self.upstreams = upstreams
        self.routes = routes
        self.journals = []
        self.identity_names = ()
        self.unrouted = 0
        self.sources = []

    def adopt(self, Snapshot old not None) -> None:
        """Take over the pools of endpoints that stay; close those of the others."""
        for name, upstream in old.upstreams.items():
            successor = self.upstreams.get(name)
            if successor is None:
                (<Upstream>upstream).abandon()
            elif successor is not upstream:
                (<Upstream>successor).adopt(upstream)

    def start(self, loop) -> None:
        """Begin the background work of this snapshot: key refresh, name resolution, journals."""
        for source in self.sources:
            source.start(loop)

    def stop(self) -> None:
        """End the background work; open exchanges may still use the snapshot's objects."""
        for source in self.sources:
            source.stop()


cdef class Exchange:
    """See exchange.pxd. Created by the engine only."""

    def __cinit__(self):
        global live
        self.head = <Head*>malloc(sizeof(Head))
        if self.head == NULL:
            raise MemoryError
        head_reset(self.head)
        self.path_copy = NULL
        memset(&self.kept, 0, sizeof(Buffer))
        live += 1

    def __dealloc__(self):
        global live
        free(self.head)
        free(self.path_copy)
        buffer_release(&self.kept)
        live -= 1

    cdef void reset(self) noexcept:
        """Forgets everything of the last use. Object fields that are rarely set are tested before they are cleared."""
        self.generation += 1
        head_reset(self.head)
        if self.path_copy != NULL:
            free(self.path_copy)
            self.path_copy = NULL
        self.cancelled = False
        self.connection = None
        self.snapshot = None
        self.listener = None
        self.route = None
        self.principal = None
        self.upstream_connection = None
        self.endpoint = None
        self.upstream = None
        self.match.route = NULL
        self.match.params = 0
        self.started = 0
        self.total_at = 0
        self.keep_alive = False
        self.body_at = 0
        self.path_len = 0
        self.store_us = 0
        self.step = 0
        self.parked = None
        self.task = None
        self.collecting = False
        self.replayable = True
        self.trusted = False
        self.secure = False
        self.http2 = False
        self.grpc = False
        self.web = None
        self.certificate = None
        self.tries = 0
        self.attempts = 0
        self.balance_key = 0
        self.repeatable = False
        self.raced = False
        self.refusals = 0
        self.upgrade = False
        self.tunnel_from = self.tunnel_until = 0
        if self.keeping or self.kept.cap:
            self.keeping = False
            buffer_release(&self.kept)
        self.informational = 0
        self.answer_started = False
        self.status = 0
        self.side = SIDE_NONE
        self.sent = False
        self.upstream_us = 0
        self.upstream_from = self.ended = 0
        self.slug = None
        self.detail = None
        self.reply_headers = None
        self.reply_body = None
        self.reply_type = None
        self.answer_headers = None
        self.collected = None
        self.request_set = self.request_removed = self.response_set = self.response_removed = None
        self.view = None
        self.answer_fields = None
        self.answer_hook = 0
        if self.tap is not None:
            self.tap.give_up()
            self.tap = None
        memset(&self.body, 0, sizeof(Body))
        memset(&self.answer, 0, sizeof(Body))

    cdef int refuse(self, int status, bytes slug, bytes detail):
        """Answers with problem+json (RFC 9457). `slug` ends the problem type; `detail` is ASCII without control bytes."""
        self.status = <uint16_t>status
        self.slug = slug
        self.detail = detail
        self.reply_body = None
        self.reply_headers = None
        return STEP_ANSWERED

    cdef int respond(self, int status, bytes headers, bytes body, bytes content_type):
        """Answers with a hook's own body."""
        self.status = <uint16_t>status
        self.reply_headers = headers
        self.reply_body = body
        self.reply_type = content_type
        return STEP_ANSWERED

    cdef void add_answer_header(self, bytes line):
        self.answer_headers = line if self.answer_headers is None else self.answer_headers + line

    cdef const char* path(self) noexcept:
        if self.path_copy != NULL:
            return self.path_copy
        if self.head.path_len == 0:
            return b"/"
        return self.head.base + self.head.path_at

    cdef int64_t body_limit(self) noexcept:
        return self.route.body_limit if self.route.body_limit >= 0 else self.listener.body_limit

    cdef int keep(self, const char* data, uint32_t n) noexcept:
        if self.kept.end - self.kept.start + <int64_t>n > self.upstream.replay_max or buffer_append(&self.kept, data, n) < 0:
            self.keeping = False                    # too large to be sent again
            self.repeatable = False
            buffer_release(&self.kept)
        return 0

    cdef bytes field(self, int known):
        cdef int i = self.head.first[known]
        if i < 0:
            return None
        return PyBytes_FromStringAndSize(self.head.base + self.head.fields[i].value, self.head.fields[i].value_len)

    cdef bytes named(self, bytes lower):
        cdef int i = head_find(self.head, lower, len(lower), 0)
        if i < 0:
            return None
        return PyBytes_FromStringAndSize(self.head.base + self.head.fields[i].value, self.head.fields[i].value_len)
