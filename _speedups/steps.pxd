"""The rate-limit step, for the one that counts over several machines; the other steps are nobody's business."""

from libc.stdint cimport int64_t, uint64_t
from gateway._speedups.exchange cimport Exchange, Step
from gateway._speedups.token_bucket cimport RateLimit

# Whose requests are counted together.
cdef enum:
    KEY_CLIENT = 0
    KEY_IP
    KEY_HEADER
    KEY_ROUTE

cdef class RateLimitStep(Step):
    cdef RateLimit rate
    cdef int kind
    cdef bytes header, policy, quoted   # the header's lower-case name; the RateLimit-Policy line; the policy's name as it stands in it
    cdef uint64_t route_key

    cdef uint64_t key(self, Exchange x) noexcept
    cdef int take(self, Exchange x) except -1
    cdef int refuse(self, Exchange x, int64_t wait_us) except -1
    cdef int unavailable(self, Exchange x) except -1
    cdef bytes line(self, int64_t remaining, int64_t seconds)

cdef bytes ascii_name(str text)
