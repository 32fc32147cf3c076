"""TLS for the load generator: the gateway's own client sessions, one to each connection; see load_tls.pxd.

Strategy: nothing here knows of requests or of the schedule. With `resume` a connection goes on with the session of the one whose
place it takes, as a client that comes back does; the newest ticket is kept, one for each place. Without it what servers hand
out is forgotten before each connection, so that every handshake is a full one.
Python is called from here: per handshake; for each read and write the lock is taken and one list item looked up.

Safety: `sessions` has an item for each connection from the start and never changes its length; `at` is the index of a Link. A
Tls does not own its descriptor: it is dropped in close(), before the descriptor's number can be another connection's.
"""

cimport cython
from cpython.list cimport PyList_GET_ITEM
from libc.stdint cimport uint32_t
from gateway._speedups.tls cimport Tls, TlsUpstream

cdef enum:
    REASONS_KEPT = 16


@cython.final
cdef class LoadTls:
    """The sessions of `connections` connections to `host`; verification is the settings' business."""

    def __cinit__(self, TlsUpstream settings not None, str host not None, uint32_t connections, bint resume):
        self.settings, self.host, self.resume = settings, host, resume
        self.sessions = [None] * connections
        self.kinds = {}
        self.failures = {}

    cdef void note(self, str reason, bint counted):
        if counted:
            if reason not in self.failures and len(self.failures) >= REASONS_KEPT:
                reason = "other"
            self.failures[reason] = self.failures.get(reason, 0) + 1

    cdef int begin(self, uint32_t at, int fd, bint counted) noexcept with gil:
        try:
            key = str(at) if self.resume else "-"
            kept = self.settings.sessions.get(self.settings.session_key(key, self.host))
            if kept:
                del kept[:-1 if self.resume else len(kept)]
            self.sessions[at] = self.settings.connect(fd, key, self.host)
            return 0
        except Exception as error:
            self.note(str(error), counted)
            return -1

    cdef int handshake(self, uint32_t at, bint ended, bint counted) noexcept with gil:
        cdef Tls session = <Tls>self.sessions[at]
        cdef int result
        try:
            session.wake(ended)
            result = session.handshake()
            if result < 0:
                self.note(session.reason or "the handshake failed", counted)
            elif result > 0 and counted:
                self.handshakes += 1
                self.resumed += session.resumed
                kind = (session.version, session.cipher)
                self.kinds[kind] = self.kinds.get(kind, 0) + 1
            return result
        except Exception as error:
            self.note(str(error), counted)
            return -1

    cdef bint wake(self, uint32_t at, bint ended) noexcept with gil:
        cdef Tls session = <Tls><object>PyList_GET_ITEM(self.sessions, at)
        session.wake(ended)
        return session.starved

    cdef ssize_t recv(self, uint32_t at, char* data, size_t n, bint* rest) noexcept with gil:
        cdef Tls session = <Tls><object>PyList_GET_ITEM(self.sessions, at)
        cdef ssize_t got
        session.wire.error = 0                  # a write that failed says nothing about what lies there to be read
        got = session.recv(data, n)
        rest[0] = session.at_rest()
        return got

    cdef ssize_t send(self, uint32_t at, const char* data, size_t n) noexcept with gil:
        return (<Tls><object>PyList_GET_ITEM(self.sessions, at)).send(data, n)

    cdef bint refused(self, uint32_t at, bint idle, bint counted) noexcept with gil:
        cdef Tls session = <Tls>self.sessions[at]
        if session.reason is None and not idle:
            return False
        self.note(session.reason or "the server left right after the handshake", counted)
        return True

    cdef void too_late(self, bint counted) noexcept with gil:
        self.note("the server did not complete the handshake in time", counted)

    cdef void close(self, uint32_t at) noexcept with gil:
        if self.sessions[at] is not None:
            (<Tls>self.sessions[at]).shut()
            self.sessions[at] = None

    def counts(self):
        """Handshakes complete and failed, before the start and in the measured window."""
        return {
            "handshakes": self.handshakes, "resumed": self.resumed, "failures": dict(self.failures),
            "sessions": [{"version": version, "cipher": cipher, "handshakes": number}
                         for (version, cipher), number in sorted(self.kinds.items())],
        }
