"""Upstreams, their endpoints, and the keep-alive connections that wait at each.

Strategy: LIFO per endpoint, so that a small load keeps few connections warm and the rest age out. A connection lies here
only while nothing is owed in either direction. Python is called from here: never, but for building and resolution.
"""

from libc.stdint cimport int64_t, uint32_t
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

cdef class Upstream:
    cdef readonly str name
    cdef readonly list endpoints        # changed by replace() only
    cdef readonly set unresolved        # targets whose addresses nobody has found yet
    cdef int64_t connect_us, head_us, idle_us, total_us         # timeouts
    cdef int64_t keep_idle_us, keep_age_us
    cdef int keep_max
    cdef int requests_max
    cdef public int active              # exchanges in flight from this worker
    cdef bint retry_connect
    cdef int host_mode                  # HOST_*
    cdef bytes host_literal
    # The endpoint whose turn it is, preferring those that are not down and not `avoid`; None when there is none.
    cdef Endpoint pick(self, int64_t now, Endpoint avoid)

cdef enum:
    HOST_PRESERVE = 0
    HOST_TARGET = 1
    HOST_LITERAL = 2
