"""Who may call what between services: rules by caller, method, path, header and claims, decided in one native step.

Strategy: default deny. Whatever does not depend on the request is settled when the snapshot is built (which rules a caller has, and
whether their ports are ours) or once per connection (who the caller is); a request costs the comparisons of the rules of its own
caller. A raw TCP connection is asked about once, before its first byte passes: rules that look into requests do not hold for it.
"""

from libc.stdint cimport uint32_t
from gateway._speedups.certificates cimport ClientCertificate
from gateway._speedups.exchange cimport Exchange, RouteEntry, Step
from gateway._speedups.shaping cimport Conditions

# One line of the policy; it allows.
cdef class Rule:
    cdef readonly str name
    cdef uint32_t methods               # bit per M_*; 0 with no `others`: any
    cdef tuple others                   # methods that have no number, bytes
    cdef bytes path                     # a whole path, in which NUL stands for any one segment; None: any
    cdef bytes prefix                   # a path and everything below it; None: any
    cdef Conditions headers             # None: none
    cdef tuple claims                   # (name, accepted values) of the end user; empty: none are needed
    cdef readonly bint elsewhere        # its ports are not ours: it allows nothing here
    cdef readonly bint layer7           # it looks into requests: it allows no raw connection
    cdef bint allows(self, Exchange x) except -1

# Somebody who calls: what was found out about an identity, for as long as the policy lasts.
cdef class Caller:
    cdef readonly str identity          # SPIFFE id
    cdef readonly tuple rules           # that name it
    cdef readonly RouteEntry entry      # as what its requests are counted and forwarded; None: as anybody's
    cdef readonly object target         # the TcpTarget of its raw connections; None: the listener's

cdef class Authorization:
    cdef readonly int version
    cdef readonly bint audit            # what would be denied is recorded, and passes
    cdef dict callers                   # identity -> Caller, those of the rules; others are added as they come, up to STRANGERS
    cdef int strangers
    cdef object entry_of                # a function of an identity: its RouteEntry, or None
    cdef object target_of               # ... its TcpTarget, or None
    cdef object record                  # called for each denial, as `Record` in gateway/mesh/authorization.py
    cdef Caller who(self, ClientCertificate certificate)
    # Whether an open tunnel's handshake would be let in now; nothing is recorded.
    cdef bint stays(self, Exchange x) except -1
    cdef int deny(self, Exchange x, Caller caller) except -1
    # Whether a raw connection of the caller (None: nobody known) may go on. `recorded`: a denial is told, and audit mode lets it pass.
    cdef bint connects(self, Caller caller, bint recorded) except -1

cdef class AuthorizationStep(Step):
    cdef readonly Authorization policy
    cdef Caller caller                  # who calls, whatever his certificate: our own app; None: his certificate says
