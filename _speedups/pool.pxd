"""Upstreams, their endpoints, and the keep-alive connections that wait at each.

Strategy: LIFO per endpoint, so that a small load keeps few connections warm and the rest age out. A connection lies here
only while nothing is owed in either direction. Python is called from here: never, but for building and resolution.
"""

from libc.stdint cimport int64_t, uint32_t
from gateway._speedups.sockets cimport sockaddr_storage, socklen_t

cdef enum:
    ADDRESSES_MAX = 16

cdef class Endpoint:
    cdef readonly str address           # as configured, host:port
    cdef readonly str host
    cdef readonly int port
    cdef readonly bytes host_field      # value of Host when the upstream asks for the endpoint's own
    cdef sockaddr_storage addresses[16]
    cdef socklen_t lengths[16]
    cdef int count                      # addresses in use; 0: not resolved (yet)
    cdef int turn                       # next address to try
    cdef readonly int weight
    cdef int current                    # smooth weighted round robin
    cdef int64_t down_until             # monotonic us; a failed connect skips the endpoint for a second
    cdef list idle                      # connections, most recent last
    cdef public int active              # connections in use
    cdef public bint retired            # of a snapshot that was replaced: nobody will draw from its pool

cdef class Upstream:
    cdef readonly str name
    cdef readonly list endpoints
    cdef int total_weight
    cdef int64_t connect_us, head_us, idle_us, total_us         # timeouts
    cdef int64_t keep_idle_us, keep_age_us
    cdef int keep_max
    cdef int requests_max
    cdef public int active              # exchanges in flight from this worker
    cdef bint retry_connect
    cdef int host_mode                  # HOST_*
    cdef bytes host_literal
    # The endpoint whose turn it is, preferring those that are not down and not `avoid`; None when none is resolved.
    cdef Endpoint pick(self, int64_t now, Endpoint avoid)

cdef enum:
    HOST_PRESERVE = 0
    HOST_TARGET = 1
    HOST_LITERAL = 2
