"""Says in the gateway's own log what became of an exchange that was refused, failed or broken off.

Strategy: one line with the request id that the client was told, so that whoever is asked about it finds it, audit trail or not.
Anybody can cause such lines, so each kind has an allowance a second; what goes beyond is counted and said in the next line of its
kind. What was simply answered costs one comparison in the caller. Python is called from here: per line.

Safety: bytes of the request are read through Head offsets within the call, while the caller still holds its connection's buffer.
"""

from libc.stdint cimport int64_t
from gateway._speedups.exchange cimport SIDE_DOWNSTREAM, SIDE_GATEWAY, SIDE_UPSTREAM, Exchange
from gateway._speedups.headers cimport Head

import logging

cdef tuple EVENTS = ("a request was refused", "a client left before its answer was complete", "an exchange failed")
cdef tuple LEVELS = (logging.INFO, logging.INFO, logging.WARNING)


cdef class Notices:
    def __cinit__(self):
        cdef int kind
        self.log = logging.getLogger("crossway.exchange")
        self.second = 0
        for kind in range(N_KINDS):
            self.lines[kind] = 0
            self.unsaid[kind] = 0

    cdef int note(self, Exchange x, int64_t total_us, const char* peer, int peer_len) except -1:
        cdef int kind = kind_of(x)
        if kind < 0 or not self.may(kind, x.started + total_us):
            return 0
        said = described(x)
        said["client"] = (x.client_text[:x.client_len] if x.listener is not None else peer[:peer_len]).decode("ascii")
        said["duration_us"] = total_us
        self.write(kind, EVENTS[kind], said)
        return 0

    cdef void no_proxy_header(self, str listener, int64_t now_us, const char* peer, int peer_len):
        if self.may(N_REFUSED, now_us):
            self.write(N_REFUSED, "a connection without a valid PROXY header was closed", {
                "listener": listener, "client": peer[:peer_len].decode("ascii"),
            })

    cdef bint may(self, int kind, int64_t now_us) noexcept:
        """Takes a line from the allowance of the second; false, and counted, when there is none left."""
        cdef int each
        if now_us // 1000000 != self.second:
            self.second = now_us // 1000000
            for each in range(N_KINDS):
                self.lines[each] = 0
        if self.lines[kind] >= PER_SECOND:
            self.unsaid[kind] = self.unsaid[kind] + 1     # the checked build refuses += here
            return False
        self.lines[kind] = self.lines[kind] + 1
        return True

    cdef int write(self, int kind, str event, dict said) except -1:
        if self.unsaid[kind]:
            said["unsaid"] = self.unsaid[kind]
            self.unsaid[kind] = 0
        self.log.log(LEVELS[kind], event, extra=said)
        return 0


cdef int kind_of(Exchange x) noexcept:
    """The kind of line that an exchange calls for; -1: none, it was answered, be it by a policy of the user's own."""
    if x.side == SIDE_UPSTREAM or x.side == SIDE_GATEWAY and (x.status >= 500 or x.answer_started):
        return N_FAILED
    if x.slug is not None:
        return N_REFUSED
    return N_LEFT if x.side == SIDE_DOWNSTREAM else -1


cdef dict described(Exchange x):
    """What may be said of it: never the query, a header or the body, which may hold secrets."""
    cdef Head* head = x.head
    cdef dict said = {
        "request_id": x.request_id[:36].decode("ascii"),
        "status": x.status,
        "reason": None if x.slug is None else x.slug.decode("ascii"),
        "detail": None if x.detail is None else x.detail.decode("ascii", "replace"),
    }
    if x.listener is not None:                  # its head was read: else there is nothing of it to be trusted
        said["listener"] = x.listener.name
        said["method"] = head.base[head.method_at:head.method_at + head.method_len].decode("ascii", "replace")
        if x.path_len:
            said["path"] = x.path()[:min(x.path_len, NOTICE_PATH)].decode("ascii", "replace")
    if x.route is not None:
        said["route"] = x.route.name
    if x.endpoint is not None:
        said["upstream"] = x.endpoint.address
    if x.sent:
        said["sent"] = True                     # it may have been executed
    return said
