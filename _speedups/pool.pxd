"""Upstreams, their endpoints, and the keep-alive connections that wait at each.

Strategy: LIFO per endpoint, so that a small load keeps few connections warm and the rest age out. A connection lies here
only while nothing is owed in either direction. Python is called from here: never, but for building and resolution.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from gateway._speedups.sockets cimport sockaddr_storage, socklen_t

cdef class Endpoint:
    cdef readonly str address           # where it is: numeric host:port
    cdef readonly str target            # as configured or discovered; several endpoints share one when a name has several addresses
    cdef readonly bytes host_field      # value of Host when the upstream asks for the endpoint's own
    cdef sockaddr_storage sockaddr
    cdef socklen_t length
    cdef readonly int weight
    cdef readonly str zone              # None: unknown
    cdef int current                    # smooth weighted round robin
    cdef int64_t down_until             # monotonic us; a failed connect skips the endpoint for a second
    cdef list idle                      # connections, most recent last
    cdef public int active              # connections in use
    cdef public bint retired            # replaced or gone: nobody will draw from its pool
    cdef object succeed(self, Endpoint before, Upstream upstream)
    cdef void begin(self, int64_t now) noexcept
    # How an attempt ended: OUTCOME_*, the answer's status if there was one, the time that it took, and its Retry-After.
    cdef void finish(self, Upstream upstream, int64_t now, int outcome, int status, int64_t us, int64_t retry_after_us)
    cdef void leave(self) noexcept

cdef class Upstream:
    cdef readonly str name
    cdef readonly list endpoints        # changed by replace() only
    cdef readonly set unresolved        # targets whose addresses nobody has found yet
    cdef int64_t connect_us, head_us, idle_us, total_us         # timeouts
    cdef int64_t keep_idle_us, keep_age_us
    cdef int keep_max
    cdef int requests_max
    cdef public int active              # exchanges in flight from this worker
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
    # -- the queue of those for whom there was no room
    cdef dict waiting                   # Exchange -> None, oldest first
    cdef int pending_max
    cdef int64_t queue_us
    cdef int host_mode                  # HOST_*
    cdef bytes host_literal
    # A place in flight, the queue, and how many places are free.
    cdef bint enter(self, int64_t now) noexcept
    cdef void leave(self) noexcept
    cdef int room(self, int64_t now) noexcept
    cdef bint queue(self, object x) except -1
    cdef void unqueue(self, object x)
    # Whether another attempt may be paid for, and how long to wait before it (us).
    cdef bint pay(self, int64_t now) noexcept
    cdef int64_t backoff(self, int tries) noexcept
    # The endpoint for the exchange's next attempt, another one than `avoid` if possible; None when none is available.
    cdef Endpoint pick(self, int64_t now, object x, Endpoint avoid)

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

# How an attempt ended, for balancing and ejection.
cdef enum:
    OUTCOME_NONE = 0            # cancelled: says nothing about the endpoint
    OUTCOME_ANSWERED            # a head came; its status says the rest
    OUTCOME_CONNECT
    OUTCOME_RESET
    OUTCOME_TIMEOUT
    OUTCOME_BAD                 # not HTTP

cdef enum:
    HOST_PRESERVE = 0
    HOST_TARGET = 1
    HOST_LITERAL = 2
