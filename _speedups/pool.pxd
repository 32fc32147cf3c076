"""Upstreams, their endpoints, and the keep-alive connections that wait at each.

Strategy: the place where arithmetic meets traffic. `balance` chooses, `upstream_state` knows what all processes of the machine
know, the engine asks here for a place, an endpoint or leave for another attempt, and says how each attempt ended. Connections
wait LIFO per endpoint, so that a small load keeps few of them warm and the rest age out; one lies here only while nothing is
owed in either direction. Python is called from here: while a snapshot is built, when endpoints change, and for a full upstream.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from gateway._speedups.balance cimport Balancer, Candidate
from gateway._speedups.http2_settings cimport Http2
from gateway._speedups.sockets cimport sockaddr_storage, socklen_t
from gateway._speedups.tls cimport TlsUpstream
from gateway._speedups.upstream_state cimport EndpointState, UpstreamState

# What may be tried again. Whether a request may be repeated at all is the money rules' to say (attempts.pxi).
cdef enum:
    RETRY_CONNECT = 1           # nothing was sent
    RETRY_RESET = 1 << 1        # the connection ended before the answer's head
    RETRY_TIMEOUT = 1 << 2      # no head in time
    RETRY_429 = 1 << 3
    RETRY_500 = 1 << 4
    RETRY_502 = 1 << 5
    RETRY_503 = 1 << 6
    RETRY_504 = 1 << 7

# How an attempt ended.
cdef enum:
    OUTCOME_NONE = 0            # cancelled: says nothing about the endpoint
    OUTCOME_ANSWERED            # a head came; its status says the rest
    OUTCOME_CONNECT
    OUTCOME_RESET
    OUTCOME_TIMEOUT
    OUTCOME_BAD                 # not HTTP
    OUTCOME_GRPC                # a gRPC answer; its `status` is the grpc-status

cdef enum:
    HOST_PRESERVE = 0
    HOST_TARGET = 1
    HOST_LITERAL = 2

# What is spoken with the endpoints. gRPC is HTTP/2 whose answers are judged by their grpc-status.
cdef enum:
    PROTOCOL_HTTP1 = 0
    PROTOCOL_HTTP2
    PROTOCOL_GRPC

# What consistent hashing takes for its key.
cdef enum:
    KEY_NONE = 0
    KEY_CLIENT                  # the verified identity, else the address
    KEY_SOURCE
    KEY_HEADER
    KEY_COOKIE

cdef class Endpoint:
    cdef readonly str address           # where it is: numeric host:port
    cdef readonly str target            # as configured or discovered; several endpoints share one when a name has several addresses
    cdef readonly bytes host_field      # value of Host when the upstream asks for the endpoint's own
    cdef readonly str host              # of the target: the name that TLS asks for and expects
    cdef sockaddr_storage sockaddr
    cdef socklen_t length
    cdef readonly int weight
    cdef readonly str zone              # None: unknown
    cdef list idle                      # connections, most recent last
    cdef list links                     # HTTP/2 connections, whatever they carry now
    cdef uint32_t streams_said          # how many streams its server allowed on a connection, last time; 100 before it has said
    cdef public bint retired            # replaced or gone: nobody will draw from its pool
    cdef Candidate candidate            # the balancer points to it while this is one of its upstream's endpoints
    cdef EndpointState state            # from the moment on that it is one
    cdef uint32_t ticket                # of the request that pick() chose it for

cdef class Upstream:
    cdef readonly str name
    cdef readonly list endpoints        # changed by replace() and adopt() only
    cdef readonly set unresolved        # targets whose addresses nobody has found yet
    cdef readonly str zone              # of this machine
    cdef object table                   # UpstreamTable
    cdef int worker
    cdef UpstreamState state
    cdef Balancer balancer
    cdef int key_kind                   # KEY_*
    cdef bytes key_name                 # of the header (lower case) or cookie
    # -- what the endpoints' states were when last looked at
    cdef int64_t look_at                # monotonic us; when to look again
    cdef int usable
    cdef int probes                     # endpoints that wait for a request to try them
    cdef bint panic                     # with all out they are used as if none were
    # -- timeouts, pool and limits
    cdef int64_t connect_us, head_us, idle_us, total_us
    cdef int64_t keep_idle_us, keep_age_us
    cdef int keep_max
    cdef uint32_t requests_max, endpoint_max, connections_max, pending_max     # over all workers; 0: no limit
    cdef bint adaptive
    cdef int64_t queue_us
    cdef dict waiting                   # Exchange -> None: those for whom there was no room, oldest first
    # -- attempts
    cdef uint32_t retry_on              # RETRY_*
    cdef int attempts                   # after the first, at most
    cdef int64_t per_try_us             # for the head of an answer while another attempt may follow; 0: the route's
    cdef int64_t backoff_us, backoff_max_us
    cdef uint64_t random                # xorshift state of the back-off
    cdef int64_t replay_max             # bytes of a body that are kept for another attempt
    cdef bint honours_key               # the service executes an Idempotency-Key once
    cdef int64_t hedge_us               # 0: no second request
    cdef bint finish_abandoned          # what was sent completely goes on when its client has left
    cdef bint foreign                   # not ours: it is told no deadline and no attempts, and has no say in ours
    cdef int host_mode                  # HOST_*
    cdef bytes host_literal
    cdef readonly TlsUpstream tls       # None: clear text; HTTP/2 by prior knowledge then
    cdef int protocol                   # PROTOCOL_*
    cdef readonly Http2 http2           # None exactly when PROTOCOL_HTTP1

    # A place in flight (False: wait or refuse), and giving it back; `good`: the client got an answer that was no failure.
    cdef bint enter(self, int64_t now) noexcept
    cdef void leave(self, bint good) noexcept
    cdef int room(self) noexcept
    cdef bint queue(self, object x) except -1
    cdef void unqueue(self, object x)
    # A connection over all workers, and giving it back.
    cdef bint open_one(self) noexcept
    cdef bint may_open(self) noexcept
    cdef void close_one(self) noexcept
    # Whether another attempt may be paid for, and how long to wait before it (us).
    cdef bint pay(self, int64_t now) noexcept
    cdef int64_t backoff(self, int tries) noexcept
    # The endpoint for a request's next attempt, another one than `avoid` if possible; None when none is available. `safe`: to be
    # sent to an endpoint that may still be broken. The caller owes start() or decline() for it.
    cdef Endpoint pick(self, int64_t now, uint64_t key, bint safe, Endpoint avoid)
    cdef void decline(self, Endpoint endpoint, int64_t now) noexcept
    cdef void start(self, Endpoint endpoint, int64_t now, bint again) noexcept
    # How the attempt ended, once for each start(): the answer's status if there was one, the time it took, its Retry-After.
    # Returns EVENT_* of upstream_state.
    cdef int finish(self, Endpoint endpoint, uint32_t ticket, int64_t now, int outcome, int status, int64_t us,
                    int64_t retry_after_us) noexcept
    cdef void stop(self, Endpoint endpoint) noexcept        # its place in flight, once for each start()
    cdef void look(self, int64_t now) noexcept
    cdef bint offers(self, int64_t now) noexcept            # an endpoint is up, or may be tried
    cdef Endpoint probe(self, int64_t now, bint safe)
    cdef bint has_idle(self) noexcept
    cdef int index_of(self, Endpoint wanted) noexcept
    cdef object rebuild(self)
    cdef object dismiss(self, Endpoint endpoint)
    cdef object join(self, Endpoint endpoint)
