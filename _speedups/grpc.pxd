"""What gRPC adds to HTTP/2: status codes, deadlines, and which answers deserve another attempt.

Strategy: functions over a parsed head; the formats are those of the gRPC project's "gRPC over HTTP2" document. Python is called
from here: never.
"""

from libc.stdint cimport int64_t, uint32_t
from gateway._speedups.headers cimport Head

cdef enum:                      # grpc-status
    GRPC_OK = 0
    GRPC_CANCELLED
    GRPC_UNKNOWN
    GRPC_INVALID_ARGUMENT
    GRPC_DEADLINE_EXCEEDED
    GRPC_NOT_FOUND
    GRPC_ALREADY_EXISTS
    GRPC_PERMISSION_DENIED
    GRPC_RESOURCE_EXHAUSTED
    GRPC_FAILED_PRECONDITION
    GRPC_ABORTED
    GRPC_OUT_OF_RANGE
    GRPC_UNIMPLEMENTED
    GRPC_INTERNAL
    GRPC_UNAVAILABLE
    GRPC_DATA_LOSS
    GRPC_UNAUTHENTICATED

cdef bint is_grpc(const Head* head) noexcept nogil
# Microseconds that the client allows (grpc-timeout); -1 when it does not say, -2 when it says it wrongly.
cdef int64_t grpc_timeout(const Head* head) noexcept nogil
# How a refusal of the gateway's own is called in gRPC.
cdef int grpc_code(int status) noexcept nogil
# The HTTP status of the same meaning, for what is configured by that: 503 for UNAVAILABLE; 200 for what is no failure.
cdef int grpc_as_http(int code) noexcept nogil
# The value of grpc-status: in a head without a body, in trailers. -1 without one, UNKNOWN when it is no number.
cdef int grpc_status_of(const Head* head) noexcept nogil
cdef int grpc_status_in(const char* lines, uint32_t n) noexcept nogil
