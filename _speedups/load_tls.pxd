"""The TLS sessions of the load generator's connections, and what became of their handshakes.

Strategy: the generator works without the interpreter's lock, sessions need it (a callback of OpenSSL keeps tickets in Python
objects), so each call takes it for its own duration. A session is found by the index of its connection.
"""

from libc.stdint cimport uint32_t, uint64_t
from gateway._speedups.tls cimport Tls, TlsUpstream

cdef class LoadTls:
    cdef TlsUpstream settings
    cdef str host               # for SNI and verification, unless the settings name another
    cdef bint resume            # a connection goes on with the session of the one whose place it takes
    cdef list sessions          # by index of the connection: its Tls, or None
    cdef dict kinds             # (version, cipher) -> complete handshakes that counted
    cdef dict failures          # reason -> handshakes that counted and failed; REASONS_KEPT at most, then `other`
    cdef uint64_t handshakes, resumed

    # `counted`: it belongs to what is reported (not to the warm-up).
    cdef int begin(self, uint32_t at, int fd, bint counted) noexcept with gil          # 0, or -1 and a reason noted
    cdef int handshake(self, uint32_t at, bint ended, bint counted) noexcept with gil  # 1 complete, 0 more events, -1 failed
    cdef bint wake(self, uint32_t at, bint ended) noexcept with gil                    # whether reading waited for room to write
    # Both as the calls of sockets.pxd; `rest`: nothing is left, here or in the kernel, so the next event is the next news.
    cdef ssize_t recv(self, uint32_t at, char* data, size_t n, bint* rest) noexcept with gil
    cdef ssize_t send(self, uint32_t at, const char* data, size_t n) noexcept with gil
    # Whether a session that broke before its first answer was refused: TLS 1.3 refuses a client after the client's handshake.
    # An alert says so; without one it is plain when no request had been sent (`idle`).
    cdef bint refused(self, uint32_t at, bint idle, bint counted) noexcept with gil
    cdef void too_late(self, bint counted) noexcept with gil
    cdef void close(self, uint32_t at) noexcept with gil
    cdef void note(self, str reason, bint counted)
