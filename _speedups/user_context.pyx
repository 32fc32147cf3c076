"""The user for whom a member acts: taken from a signed context on the way in, told in a new one on the way out.

Strategy: a context that was verified once is found in the token cache by its bytes; a context that was signed for a user and a destination is
used again for half of its life. Python is called from here: per context that is seen or made for the first time.

Safety: bytes of a request are read through Head offsets of the exchange that is passed in, within the call only.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t
from gateway._speedups.exchange cimport *
from gateway._speedups.headers cimport *
from gateway._speedups.token_cache cimport Principal, TokenCache

import logging

log = logging.getLogger("crossway.mesh")

cdef enum:
    MADE_MAX = 4096             # users of one destination whose context is kept
    CONTEXT_MAX = 16384         # bytes

cdef const char* NAME = b"crossway-user"
cdef enum:
    NAME_LENGTH = 13


cdef class UserStep(Step):
    """crossway-user -> principal. `check(token)` verifies one; `from_caller`: it has to be the caller's own, who showed a certificate."""

    cdef object check
    cdef TokenCache cache
    cdef bint from_caller

    def __init__(self, str name, check, TokenCache cache not None, *, bint from_caller):
        self.phase = PHASE_IDENTIFY
        self.name = name
        self.check = check
        self.cache = cache
        self.from_caller = from_caller

    cdef int run(self, Exchange x) except -1:
        cdef int i = head_find(x.head, NAME, NAME_LENGTH, 0)
        cdef Field* field
        cdef Principal found
        if i < 0:
            return STEP_GO
        field = &x.head.fields[i]
        if field.value_len == 0 or field.value_len > CONTEXT_MAX or head_find(x.head, NAME, NAME_LENGTH, i + 1) >= 0:
            return self.refused(x, b"more than one, or too long")
        found = self.cache.get(x.head.base + field.value, field.value_len, x.wall // 1000000)
        if found is None:
            return STEP_PARK
        return self.take(x, found)

    cdef int take(self, Exchange x, Principal found) except -1:
        cdef tuple uris
        if self.from_caller:
            uris = () if x.certificate is None else x.certificate.leaf.uris
            if len(uris) != 1 or <str>uris[0] != found.issuer:
                return self.refused(x, b"it was not made by this caller")
        x.principal = found
        return STEP_GO

    cdef object park(self, Exchange x):
        cdef Field* field = &x.head.fields[head_find(x.head, NAME, NAME_LENGTH, 0)]
        cdef bytes token = PyBytes_FromStringAndSize(x.head.base + field.value, field.value_len)
        cdef Principal found = self.check(token)
        self.cache.put(token, found)
        return found

    cdef int resumed(self, Exchange x, object result) except -1:
        return self.take(x, <Principal?>result)

    cdef int failed(self, Exchange x, object error) except -1:
        if not isinstance(error, ValueError):
            log.error("a user context could not be verified", extra={"error": type(error).__name__})
            return self.refused(x, b"it cannot be verified")
        return self.refused(x, str(error).encode("ascii", "replace"))

    cdef int refused(self, Exchange x, bytes why) except -1:
        return x.refuse(403, b"user-context-invalid", b"the user context is not accepted: " + why)


cdef class TellUserStep(Step):
    """principal -> crossway-user for where the request goes. `make(principal)` gives (header line, unix seconds until it is used), or None."""

    cdef object make
    cdef dict made

    def __init__(self, str name, make):
        self.phase = PHASE_TRANSFORM
        self.name = name
        self.make = make
        self.made = {}

    cdef int run(self, Exchange x) except -1:
        cdef tuple kept
        if x.principal is None:
            return STEP_GO
        kept = self.made.get(x.principal)
        if kept is None or <int64_t>kept[1] <= x.wall // 1000000:
            kept = self.make(x.principal)
            if kept is None:
                return STEP_GO
            if len(self.made) >= MADE_MAX:
                self.made.clear()
            self.made[x.principal] = kept
        x.request_set = [kept[0]] if x.request_set is None else x.request_set + [kept[0]]
        return STEP_GO
