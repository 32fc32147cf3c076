"""Lines in the gateway's own log about exchanges that did not go well.

Strategy: see notices.pyx.
"""

from libc.stdint cimport int64_t, uint64_t
from gateway._speedups.exchange cimport Exchange

cdef enum:
    PER_SECOND = 20         # lines of each kind, by each worker; a second's worth may come at once
    NOTICE_PATH = 256       # bytes of the path

# Kinds of lines. Each has its own allowance: a flood of refusals must not hide that an upstream fails.
cdef enum:
    N_REFUSED = 0           # the client's doing: 4xx
    N_LEFT                  # the client left
    N_FAILED                # the upstream's doing, or ours
    N_KINDS

cdef class Notices:
    cdef object log
    cdef int64_t second                 # in which `lines` were counted
    cdef int lines[3]                   # by kind
    cdef uint64_t unsaid[3]             # by kind: lines left out since the last one
    # Writes a line when the exchange `x`, which ended now, calls for one and the allowance is not used up. `peer` is the
    # connection's own address, for a request that was never read so far as to say whose it is.
    cdef int note(self, Exchange x, int64_t total_us, const char* peer, int peer_len) except -1
    # The same for a connection that was closed because no valid PROXY header began it: it has no request and no id.
    cdef void no_proxy_header(self, str listener, int64_t now_us, const char* peer, int peer_len)
    cdef bint may(self, int kind, int64_t now_us) noexcept
    cdef int write(self, int kind, str event, dict said) except -1
