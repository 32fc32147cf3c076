"""TLS of one connection, and the settings that a listener's or an upstream's connections share.

Strategy: OpenSSL works on the connection's own descriptor through a BIO of ours, which knows when the kernel has nothing more
(edge-triggered) and so saves the call that would say so. A session is driven like a socket: recv() and send() return what the
system calls of sockets.pxd do. Sessions know nothing of HTTP: a raw TCP listener or a mesh drives them in the same way.
Python is called from here: per connection and per handshake, never per record.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t
from gateway._speedups.certificates cimport ClientCertificate
from gateway._speedups.sockets cimport iovec

# What the two sides agreed to speak above TLS (RFC 7301).
cdef enum:
    ALPN_NONE = 0
    ALPN_HTTP1
    ALPN_HTTP2
    ALPN_OTHER

# Why a handshake failed.
cdef enum:
    FAILED_NOT = 0
    FAILED_PLAIN        # what came was an HTTP request in clear text
    FAILED_TLS          # an alert, a certificate, or bytes that are no handshake
    FAILED_GONE         # the other side left
    FAILED_VISITOR      # nothing did: who is there came to see whether somebody answers, and is let in no further

cdef struct Wire:
    int fd
    bint dry            # the kernel had nothing more: no call before the next event
    bint ended          # the other side's end is announced: short reads prove nothing
    bint eof
    int error           # errno of the last failure
    int stirred         # messages that are no data, since the last data: a flood of them ends the session
    bint spoken         # something was written
    bint more           # what is written now is not the last: the kernel may keep it for what follows (MSG_MORE; 200 ms at most)
    bint held           # it may have kept some

cdef class Tls:
    cdef void* ssl                      # SSL*, owned
    cdef Wire wire
    cdef object settings                # TlsListener or TlsUpstream: keeps what OpenSSL's callbacks look at
    cdef str key                        # TlsUpstream: under which sessions are kept
    cdef bint accepting                 # the server's side
    cdef bint established
    cdef bint broken                    # no close_notify: the stream ended in the middle, or failed
    cdef bint starved                   # reading waits for room to write
    cdef int failed                     # errno to report once what was read is taken
    cdef uint8_t failure                # FAILED_*
    cdef readonly str reason            # of a failed handshake, or the alert that ended the session; for a log
    cdef readonly bint resumed
    cdef int place                      # among those that keep their buffers; 0: none
    cdef bint used                      # since the last tick
    cdef uint8_t alpn                   # ALPN_*
    cdef readonly ClientCertificate certificate     # of the other side, verified; None when it showed none, or is a server without `admit`

    cdef void wake(self, bint ended) noexcept
    cdef void warm(self) noexcept
    # 1 complete, 0 more events are needed, -1 failed (see failure, reason).
    cdef int handshake(self) except -2
    cdef ssize_t recv(self, void* data, size_t n) noexcept
    cdef ssize_t send(self, const void* data, size_t n) noexcept
    cdef ssize_t sendv(self, iovec* pieces, int count) noexcept
    cdef bint silent(self) noexcept
    # Whether the last read left nothing, here or (as of then) in the kernel.
    cdef bint at_rest(self) noexcept
    # What was written with `more`, and nothing behind it yet, leaves now.
    cdef void push(self) noexcept
    # The next send() is the last one before shut(): both leave in one segment.
    cdef void conclude(self) noexcept
    # Says that our side ends here (close_notify). The end of the socket's own side has to follow at once: it takes the record
    # along. False when the kernel has no room for it now.
    cdef bint shut(self) noexcept
    cdef void take_session(self) noexcept
    cdef int fail(self, int result) noexcept
    cdef int refused(self, str why) except -2
    cdef int finish(self) except -2
    cdef str explain(self)

cdef class TlsListener:
    cdef readonly str name
    cdef readonly bytes digest          # of everything that decides whom it trusts
    cdef list contexts                  # capsules of SSL_CTX*, owned
    cdef void* first                    # SSL_CTX* for clients without a known name
    cdef dict by_name                   # server name (bytes, lower case, maybe *.suffix) -> its Context
    cdef dict staples                   # certificate's address -> (OcspResponse)
    cdef bytes alpn                     # length-prefixed
    cdef bint forward_certificate       # RFC 9440 lines for the upstream
    cdef bint ktls
    cdef bint asks                      # for client certificates
    cdef int64_t handshake_us
    cdef int handshakes_max             # in flight in each worker
    cdef object admit                   # None, or a function of a client's Certificate: why it is refused, "" for a visitor, None when it is let in
    cdef list groups(self, list pairs)
    cdef dict names(self, list pairs)
    cdef Tls accept(self, int fd)

cdef class TlsUpstream:
    cdef readonly bytes digest          # of all settings: two upstreams with the same one make equivalent connections
    cdef object context
    cdef str server_name
    cdef frozenset sans
    cdef object admit                   # the same for a server's
    cdef bint verify
    cdef readonly tuple alpn            # names that are offered, in the order of preference
    cdef bint demands_alpn              # nothing offered is what a server without ALPN would speak
    cdef dict sessions                  # endpoint's address, with the name that was verified -> list of Session, most recent last
    cdef str session_key(self, str address, str host)
    cdef Tls connect(self, int fd, str address, str host)

cdef int tls_live() noexcept
# To be called now and then: sessions that rested since the last call give their buffers back.
cdef bint tls_cool() noexcept
