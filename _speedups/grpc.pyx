"""gRPC's own fields; see grpc.pxd.

Strategy: nothing is trusted: a number that is none is UNKNOWN, as the gRPC document says of clients.
Python is called from here: never.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memchr, memcmp
from gateway._speedups.headers cimport F_CONTENT_TYPE, F_GRPC_STATUS, F_GRPC_TIMEOUT, Head
from gateway._speedups.wire cimport cw_decimal

cdef enum:
    TIMEOUT_DIGITS = 8


cdef bint is_grpc(const Head* head) noexcept nogil:
    cdef int i = head.first[F_CONTENT_TYPE]
    cdef const char* p
    cdef uint32_t n
    if i < 0 or head.fields[i].value_len < 16:
        return False
    p = head.base + head.fields[i].value
    n = head.fields[i].value_len
    # application/grpc, or with +proto and the like, or with parameters; application/grpc-web is another protocol.
    return memcmp(p, b"application/grpc", 16) == 0 and (n == 16 or p[16] == 43 or p[16] == 59)


cdef int64_t grpc_timeout(const Head* head) noexcept nogil:
    cdef int i = head.first[F_GRPC_TIMEOUT]
    cdef const char* p
    cdef uint32_t n
    cdef int64_t value
    cdef char unit
    if i < 0:
        return -1
    p = head.base + head.fields[i].value
    n = head.fields[i].value_len
    if n < 2 or n > TIMEOUT_DIGITS + 1:
        return -2
    value = cw_decimal(p, n - 1)
    unit = p[n - 1]
    if value < 0:
        return -2
    if unit == 72:                                  # H
        return value * 3600 * 1000000
    if unit == 77:                                  # M
        return value * 60000000
    if unit == 83:                                  # S
        return value * 1000000
    if unit == 109:                                 # m
        return value * 1000
    if unit == 117:                                 # u
        return value
    return value // 1000 if unit == 110 else -2     # n


cdef int grpc_code(int status) noexcept nogil:
    if status == 400 or status == 414 or status == 431:
        return GRPC_INVALID_ARGUMENT
    if status == 401:
        return GRPC_UNAUTHENTICATED
    if status == 403:
        return GRPC_PERMISSION_DENIED
    if status == 404 or status == 405 or status == 415 or status == 501:
        return GRPC_UNIMPLEMENTED
    if status == 408 or status == 504:
        return GRPC_DEADLINE_EXCEEDED
    if status == 409:
        return GRPC_ABORTED
    if status == 412:
        return GRPC_FAILED_PRECONDITION
    if status == 413 or status == 429:
        return GRPC_RESOURCE_EXHAUSTED
    if status == 499:
        return GRPC_CANCELLED
    if status == 502 or status == 503:
        return GRPC_UNAVAILABLE
    return GRPC_INTERNAL if status >= 500 else GRPC_UNKNOWN


cdef int grpc_as_http(int code) noexcept nogil:
    if code == GRPC_UNAVAILABLE:
        return 503
    if code == GRPC_RESOURCE_EXHAUSTED:
        return 429
    if code == GRPC_DEADLINE_EXCEEDED:
        return 504
    return 500 if code == GRPC_INTERNAL or code == GRPC_UNKNOWN or code == GRPC_DATA_LOSS else 200


cdef int code_of(const char* p, uint32_t n) noexcept nogil:
    cdef int64_t value = cw_decimal(p, n) if n <= 2 else -1
    return <int>value if 0 <= value <= GRPC_UNAUTHENTICATED else GRPC_UNKNOWN


cdef int grpc_status_of(const Head* head) noexcept nogil:
    cdef int i = head.first[F_GRPC_STATUS]
    return -1 if i < 0 else code_of(head.base + head.fields[i].value, head.fields[i].value_len)


cdef int grpc_status_in(const char* lines, uint32_t n) noexcept nogil:
    """`lines` as HTTP/2 trailers are kept: lower-case name, colon, space, value, CRLF."""
    cdef const char* end
    cdef uint32_t size
    while n:
        end = <const char*>memchr(lines, 13, n)
        if end == NULL:
            return -1
        size = <uint32_t>(end - lines)
        if size > 13 and memcmp(lines, b"grpc-status: ", 13) == 0:
            return code_of(lines + 13, size - 13)
        lines += size + 2
        n -= size + 2
    return -1
