"""What a raw TCP listener goes by: where its connections go, who may come, how long they may be silent.

Strategy: built once per snapshot and never changed; a connection keeps the one that it began with.
"""

from libc.stdint cimport int64_t, uint32_t
from gateway._speedups.authorization cimport Authorization
from gateway._speedups.exchange cimport Networks
from gateway._speedups.pool cimport Upstream

# Where connections go, and the names under which they are counted.
cdef class TcpTarget:
    cdef readonly Upstream upstream
    cdef readonly uint32_t metric       # of listener and upstream together

cdef class TcpListener:
    cdef TcpTarget only                 # without SNI, or for names that are none of `exact` and `suffixes`; None: refused
    cdef dict exact                     # server name (bytes, lower case) -> TcpTarget
    cdef dict suffixes                  # what follows the star of *.legacy.test, with its dot -> TcpTarget
    cdef bint reads_name                # of a ClientHello; the listener speaks no TLS itself
    cdef readonly uint32_t metric       # of the listener alone: all its connections, and those that reached no upstream
    cdef uint32_t most                  # open at once, over all workers
    cdef int64_t idle_us, hello_us
    cdef Networks allow                 # None: everybody
    cdef bint announce                  # the client's address to the upstream, by PROXY v2
    cdef bint postgres                  # clients ask for TLS as PostgreSQL's do, and so do we
    cdef readonly Authorization policy  # who may connect, by the certificate of the handshake; None: whoever it let in
    # None when connections with this name are refused; `name` of length 0: none was given.
    cdef TcpTarget choose(self, const char* name, uint32_t n)
