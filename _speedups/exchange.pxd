"""One request and its response: what is known of it, the steps it passes, and the answer to be given.

Strategy: plain C fields, filled once and read by the later phases. An exchange belongs to one downstream connection, is
taken from a free list at the first byte of a request and given back when its answer has left. `generation` changes at each
use, so that whoever kept a reference (a hook's task) can tell that it is not his any more.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from gateway._speedups.buffers cimport Buffer
from gateway._speedups.certificates cimport ClientCertificate
from gateway._speedups.grpc_web cimport WebCall
from gateway._speedups.headers cimport Head
from gateway._speedups.http1 cimport Chunked, Limits
from gateway._speedups.http2_settings cimport Http2
from gateway._speedups.histogram cimport WorkerSlot
from gateway._speedups.journal cimport Journal
from gateway._speedups.pool cimport Endpoint, Upstream
from gateway._speedups.route_trie cimport Match, Route, RouteTrie
from gateway._speedups.tls cimport TlsListener
from gateway._speedups.token_bucket cimport BucketTable
from gateway._speedups.token_cache cimport Principal

# How a body is delimited, arriving and leaving.
cdef enum:
    BODY_NONE = 0
    BODY_LENGTH
    BODY_CHUNKED
    BODY_CLOSE          # by the end of the connection (responses only)

cdef struct Body:
    uint8_t mode        # arriving
    uint8_t out         # leaving
    bint done           # all of it arrived and was handed on
    int64_t remaining   # BODY_LENGTH: bytes to come
    uint64_t bytes      # payload so far
    Chunked chunked

# What a step says.
cdef enum:
    STEP_GO = 0
    STEP_ANSWERED = 1   # refuse() or respond() was called
    STEP_PARK = 2       # Python is needed: park() is called after the batch
    STEP_COLLECT = 3    # the same, and the body is wanted first: at most Step.body_limit bytes

# Phases, in the order in which they run whatever the order in the configuration.
cdef enum:
    PHASE_IDENTIFY = 0
    PHASE_AUTHORISE
    PHASE_LIMIT
    PHASE_VALIDATE
    PHASE_TRANSFORM
    PHASE_RECORD

# Where an exchange ended, for the audit record and the metrics.
cdef enum:
    SIDE_NONE = 0
    SIDE_GATEWAY        # answered here: a refusal, or a hook's answer
    SIDE_DOWNSTREAM     # the client's doing
    SIDE_UPSTREAM       # the upstream's doing

cdef class Networks:
    cdef unsigned char* entries         # count times 17 bytes: address, then prefix length in bits
    cdef int count
    cdef bint contains(self, const unsigned char* address) noexcept nogil

cdef class Step:
    cdef readonly int phase
    cdef readonly str name
    cdef public int64_t body_limit      # STEP_COLLECT: bytes of the body at most
    cdef public double timeout          # seconds that an awaitable from park() may take; 0: the exchange's total only
    cdef int run(self, Exchange x) except -1
    # In the slow lane: returns None (go on), an awaitable, or what resumed() understands.
    cdef object park(self, Exchange x)
    # Takes park()'s result. STEP_GO or STEP_ANSWERED.
    cdef int resumed(self, Exchange x, object result) except -1
    # Takes what park() raised. STEP_GO or STEP_ANSWERED.
    cdef int failed(self, Exchange x, object error) except -1
    # The same three for the upstream's answer (x.answer_fields) and for the end of the exchange.
    cdef object park_answer(self, Exchange x)
    cdef int record(self, Exchange x, int64_t total_us) except -1

# Header edits of a route, in one direction: removals first, then lines appended.
cdef class Edits:
    cdef readonly tuple remove          # lower-case names, bytes
    cdef readonly bytes add             # complete lines

# What a route with more than one upstream, or with a mirror, does before a request is forwarded; see shaping.
cdef class Shape:
    cdef int apply(self, Exchange x) except -1          # x.route becomes the entry of the upstream that was chosen

# Sees a request's body pass by on its way to the upstream; see shaping.
cdef class Tap:
    # data[0:n) is what x.body.bytes counted last; x.body.done when it was the end.
    cdef int take(self, Exchange x, const char* data, uint32_t n) except -1
    cdef void give_up(self) noexcept                    # the exchange ended before its body did

# How a route lets WebSockets pass: how long a tunnel may be silent, and how many there may be over all workers.
cdef class Tunnels:
    cdef readonly uint32_t metric       # of the route, whichever of its upstreams was chosen: its cell in shared memory
    cdef int64_t idle_us
    cdef uint32_t most
    cdef bint expire                    # a tunnel ends with the token by which it was opened

cdef class RouteEntry(Route):
    cdef readonly Upstream upstream
    cdef readonly uint32_t metric       # id in the shared name table
    cdef readonly bytes label           # name, JSON-escaped without quotes
    cdef tuple steps                    # owns what `step` points to
    cdef void** step                    # Step*, borrowed from `steps`
    cdef int step_count
    cdef int64_t body_limit             # -1: the listener's
    cdef int64_t head_us, idle_us, total_us
    cdef Edits request_edits, response_edits
    cdef bytes rewrite_prefix           # replaces the matched prefix
    cdef tuple rewrite_path             # alternating literal bytes and capture indexes
    cdef bytes rewrite_host
    cdef tuple audits                   # AuditStep objects, in the record phase
    cdef tuple response_hooks, end_hooks
    cdef bint strip_authorization
    cdef object cors                    # CorsStep or None
    cdef Shape shape                    # None: one upstream, no mirror
    cdef Tunnels tunnels                # None: Upgrade is stripped
    cdef bytes unswitched               # a line for the answers to WebSocket handshakes that are passed on as plain requests; None: nothing is said
    cdef bint grpc_web                  # its clients may speak gRPC-Web

cdef class ListenerEntry:
    cdef readonly str name
    cdef RouteTrie trie
    cdef Limits limits
    cdef int64_t body_limit
    cdef int64_t head_us, body_us, keepalive_us, write_us
    cdef int requests_max, connections_max
    cdef Networks trusted
    cdef int proxy_protocol             # 0 off, 1 optional, 2 required
    cdef readonly TlsListener tls       # None: clear text
    cdef public bint leaving            # answers end their connections: this listener drains, others may go on
    cdef readonly object originals      # None, or of connections that the kernel redirected here: (address, port) -> listener
    cdef readonly Http2 http2           # None: HTTP/1.1 only
    cdef readonly object tcp            # a TcpListener: no HTTP here; None: HTTP

cdef class Snapshot:
    cdef readonly int version
    cdef readonly str digest
    cdef readonly dict listeners        # name -> ListenerEntry
    cdef readonly dict upstreams        # name -> Upstream
    cdef readonly list routes
    cdef public list journals
    cdef public list sources            # background work with start(loop) and stop()
    cdef public object condemned        # a function of a server's ClientCertificate: whether it is shut out of the mesh; None: there is no mesh
    cdef public tuple identity_names    # names under which policies assert identities: deleted in every spelling first
    cdef public uint32_t unrouted       # metric id of requests that reached no route

cdef class Exchange:
    # -- identity of this use
    cdef public uint64_t generation
    cdef object connection              # the downstream Connection; None when free
    cdef bint cancelled                 # the client is gone, or the deadline passed, while parked
    # -- surroundings, borrowed from the engine
    cdef WorkerSlot slot
    cdef BucketTable buckets
    # -- request
    cdef Head* head
    cdef Snapshot snapshot
    cdef ListenerEntry listener
    cdef RouteEntry route
    cdef Match match
    cdef int64_t started                # monotonic us, head complete
    cdef int64_t total_at               # monotonic us, the total deadline
    cdef int64_t wall                   # unix us
    cdef uint32_t body_at               # offset of unread bytes behind the head, from the head's start
    cdef Body body
    cdef bint keep_alive                # the downstream connection goes on after this exchange
    cdef bint replayable                # what was sent so far can be sent again from the pinned buffer
    cdef char* path_copy                # normalised path when it differs from the received one; NULL else
    cdef uint32_t path_len
    cdef uint32_t host_len              # of the Host without port
    cdef unsigned char client[16]       # effective client address
    cdef char client_text[48]
    cdef int client_len
    cdef const char* peer_text          # the connection's own address; points into the downstream connection
    cdef int peer_len
    cdef bint trusted                   # the connection comes from a trusted proxy
    cdef bint secure                    # the client's side of the edge spoke TLS
    cdef bint http2                     # ... and HTTP/2
    cdef bint grpc                      # ... and gRPC: refusals are told by grpc-status
    cdef WebCall web                    # the client speaks gRPC-Web; None: it does not
    cdef ClientCertificate certificate  # of the client, verified
    cdef char request_id[36]
    cdef char trace[55]
    cdef Principal principal
    # -- steps
    cdef int64_t store_us               # time spent waiting for limits kept elsewhere, of all steps
    cdef int step                       # next to run
    cdef Step parked                    # in the slow lane
    cdef object task                    # its asyncio task, when it suspended
    cdef bint collecting
    cdef bytearray collected            # a body that a hook asked for
    cdef list request_set, request_removed          # edits by hooks: bytes lines, lower-case bytes names
    cdef list response_set, response_removed
    cdef object view                    # the hooks' Request
    cdef list answer_fields             # the upstream's header fields as (name, value) bytes, for response hooks only
    cdef int answer_hook                # next response hook
    cdef Tap tap                        # a mirror that waits for the body; None most of the time
    # -- a tunnel (tunnel.pxi)
    cdef bint upgrade                   # a WebSocket handshake that its route lets pass: no other request follows it
    cdef char websocket_key[24]         # what the client sent for Sec-WebSocket-Key
    cdef Tunnels place                  # whose place it holds; None: none
    cdef int64_t tunnel_from            # monotonic us, both sides have switched; 0: they have not
    cdef int64_t tunnel_until           # monotonic us, the end of the token; 0: none
    # -- answer
    cdef object upstream_connection
    cdef Endpoint endpoint
    cdef Upstream upstream
    # -- attempts
    cdef object hedge                   # a second upstream connection that was asked as well
    cdef object timer                   # a TimerHandle: the back-off before the next attempt, or the moment to hedge
    cdef int tries                      # attempts after the first
    cdef int attempts                   # how many of them there may be
    cdef uint64_t balance_key           # for consistent hashing; 0: not computed
    cdef bint entered                   # counted as in flight at its upstream
    cdef bint waiting                   # in its upstream's queue
    cdef bint repeatable                # the money rules allow to send it again though it was sent
    cdef bint keeping                   # what streams of the body is kept in `kept`
    cdef int refusals                   # times that an HTTP/2 server refused it unread
    cdef bint raced                     # sent again once because a pooled connection turned out to be closed
    cdef Buffer kept                    # the body so far, for another attempt
    cdef int informational              # 1xx answers seen
    cdef Body answer
    cdef bint answer_started            # bytes of the final answer went to the client
    cdef uint16_t status
    cdef uint8_t side                   # who ended it
    cdef bint sent                      # request bytes went to an upstream: it may have been executed
    cdef bytes slug, detail             # of a local answer
    cdef bytes reply_headers            # complete lines added to a local answer
    cdef bytes reply_body               # a hook's answer; None: problem+json
    cdef bytes reply_type
    cdef bytes answer_headers           # lines that steps add to every answer (CORS, RateLimit)
    cdef int64_t upstream_us            # time spent waiting for the upstream
    cdef int64_t upstream_from
    cdef int64_t ended                  # monotonic us, the last of the upstream's answer was handed on; 0: no such moment

    cdef void reset(self) noexcept
    cdef int refuse(self, int status, bytes slug, bytes detail)
    cdef int respond(self, int status, bytes headers, bytes body, bytes content_type)
    cdef void add_answer_header(self, bytes line)
    cdef const char* path(self) noexcept
    cdef int64_t body_limit(self) noexcept
    cdef bytes field(self, int known)           # value of a known request field, None when absent
    cdef int keep(self, const char* data, uint32_t n) noexcept  # for another attempt, up to the upstream's limit
    cdef bytes named(self, bytes lower)         # value of any request field by lower-case name

cdef int exchanges_live() noexcept
