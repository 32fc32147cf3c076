"""The PROXY protocol header, versions 1 and 2, that a balancer in front puts before the first byte (HAProxy's specification)."""

from libc.stdint cimport uint32_t
from gateway._speedups.sockets cimport sockaddr_storage

# Returns the header's length, 0 when bytes are missing, -1 when it is malformed or no header at all.
# *kind: 0 no header, 1 an address was given, 2 none (LOCAL, UNKNOWN or a family without addresses), 3 a header, but malformed.
cdef int parse_proxy_header(const char* data, uint32_t length, sockaddr_storage* address, int* kind) noexcept nogil

# Writes a version 2 header that says who connected to whom; LOCAL when it was no TCP connection. Returns its length, at most PROXY_MAX.
cdef enum:
    PROXY_MAX = 52
cdef int compose_proxy_header(char* out, const sockaddr_storage* source, const sockaddr_storage* destination) noexcept nogil
