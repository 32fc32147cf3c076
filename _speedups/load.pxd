"""The load generator's connections, its schedule and its histogram: an HTTP/1.1 client that measures, over TCP or TLS.

Strategy: request i has an intended time, t0 + i/rate or the i-th arrival of a seeded Poisson process, whatever the server
does. A request that finds every connection taken waits as a number, not as an object: requests leave in the order of their
intended times, so the schedule's cursor is the whole queue. Latency counts from the intended time, service time from the
first byte sent.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from gateway._speedups.headers cimport Head
from gateway._speedups.http1 cimport Chunked
from gateway._speedups.load_tls cimport LoadTls
from gateway._speedups.sockets cimport sockaddr_storage, socklen_t

cdef enum:              # LinkState
    LINK_EMPTY = 0      # no socket; a request that is given to it opens one
    LINK_CONNECTING
    LINK_HANDSHAKE      # TLS only
    LINK_OPEN

cdef enum:              # AnswerPhase
    ANSWER_HEAD = 0
    ANSWER_LENGTH       # `remaining` bytes of body follow
    ANSWER_CHUNKED
    ANSWER_CLOSE        # the body ends with the connection

cdef enum:              # LoadError, in the order of ERRORS
    LOAD_CONNECT = 0    # no connection could be opened for the request
    LOAD_TLS            # one was, but no TLS session on it, or the server refused it before the first answer
    LOAD_RESET          # the connection broke under the request
    LOAD_CLOSED         # it ended before the answer was complete
    LOAD_TIMEOUT
    LOAD_BAD            # the answer is not HTTP/1.1, or longer than it said
    LOAD_STATUS         # a well-formed answer with a status that was not accepted
    LOAD_UNFINISHED     # scheduled, but not answered when the run was given up
    LOAD_ERRORS

cdef enum:              # 2048 exact values, then 1024 bins to each power of two: a bin is narrower than 0.1 % of its value
    BIN_BITS = 10
    TOP_BIT = 37        # 2^37 ns = 137 s; above it a value counts in the last bin, and `maximum` stays exact
    BIN_COUNT = ((TOP_BIT - BIN_BITS) << BIN_BITS) + (1 << BIN_BITS)

cdef struct Link:
    int fd                      # -1 while LINK_EMPTY
    uint32_t generation         # of the socket; an event of an older one is dropped
    uint8_t state               # LinkState
    uint8_t phase               # AnswerPhase
    uint16_t status
    bint free                   # stands in the ring of free links
    bint busy                   # carries a request; never free at the same time
    uint8_t measured               # the request's intended time lies in the measured window
    bint ending                 # not to be used again after this answer
    bint proven                 # an answer came on this connection
    int64_t intended            # ns, CLOCK_MONOTONIC, as all times here
    int64_t sent
    int64_t since               # of the connection attempt, then of the handshake
    uint64_t written            # bytes of the request that the kernel took
    uint64_t remaining
    Chunked chunked
    char* carry                 # the beginning of a head that came in pieces, else NULL
    uint32_t carried

cdef struct Cursor:             # the intended time of one request after the other
    uint64_t index
    int64_t time
    double offset               # Poisson: ns since t0
    uint64_t random

cdef class LatencyHistogram:
    cdef uint64_t* bins         # BIN_COUNT, owned
    cdef readonly uint64_t count
    cdef readonly int64_t maximum
    cdef readonly int64_t minimum
    cdef double total
    cdef double squares
    cdef void add(self, int64_t value) noexcept nogil

cdef class Load:
    # What is sent, where to
    cdef bytes request          # keeps `wire` alive
    cdef const char* wire
    cdef uint64_t wire_length
    cdef sockaddr_storage address
    cdef socklen_t address_length
    cdef LoadTls secure         # None without TLS
    cdef bint encrypted         # it is not None
    cdef bint no_body           # answers to HEAD
    cdef bint keep_alive
    cdef uint8_t accepted[600]
    # Connections
    cdef int epoll
    cdef uint32_t links_count
    cdef Link* links            # owned, `links_count` of them; none moves
    cdef uint32_t* ring         # owned: free links, first in, first out
    cdef uint32_t ring_head, ring_length
    cdef char* scratch          # owned: what one recv() brings, behind a carried piece
    cdef Head head              # of the answer that is being looked at, never kept
    # Schedule
    cdef double rate            # requests a second; 0: closed loop
    cdef bint poisson
    cdef int64_t started, window_start, window_end
    cdef int64_t timeout, next_scan, paused_until, ring_empty_at
    cdef Cursor next, due
    # Results
    cdef readonly LatencyHistogram latency, service
    cdef readonly LatencyHistogram handshake    # of complete TLS handshakes, before the start and in the window
    cdef uint64_t errors[2][8]          # by LoadError: [0] of the warm-up's requests, [1] of the measured
    cdef uint64_t statuses[600]         # of measured requests
    cdef uint64_t issued, measured, answered, in_window, received, opened, refused, idle_closed, in_flight, backlog_max
    cdef int64_t late_max

    cdef int64_t time_of(self, Cursor* cursor) noexcept nogil
    cdef void advance(self, Cursor* cursor) noexcept nogil
    cdef bint may_issue(self, int64_t now) noexcept nogil
    cdef void issue(self, Link* link, int64_t now) noexcept nogil
    cdef int open_link(self, Link* link, int64_t now) noexcept nogil
    cdef void close_link(self, Link* link) noexcept nogil
    cdef void release(self, Link* link) noexcept nogil
    cdef void issue_due(self, int64_t now) noexcept nogil
    cdef ssize_t send(self, Link* link) noexcept nogil
    cdef void write(self, Link* link) noexcept nogil
    cdef void read(self, Link* link) noexcept nogil
    cdef int consume(self, Link* link, char* data, uint32_t length) noexcept nogil
    cdef int begin_body(self, Link* link) noexcept nogil
    cdef void stream_ended(self, Link* link, int error) noexcept nogil
    cdef void complete(self, Link* link) noexcept nogil
    cdef void fail(self, Link* link, int error) noexcept nogil
    cdef void reopen(self, Link* link, int64_t now) noexcept nogil
    cdef bint connected(self, Link* link, uint32_t events) noexcept nogil
    cdef bint shake(self, Link* link, uint32_t events) noexcept nogil
    cdef void ready(self, Link* link) noexcept nogil
    cdef void unsecured(self, Link* link) noexcept nogil
    cdef void on_events(self, Link* link, uint32_t events) noexcept nogil
    cdef void scan_timeouts(self, int64_t now) noexcept nogil
    cdef int64_t wait_until(self, int64_t now, int64_t until) noexcept nogil
    cdef int collect(self, int64_t wait) noexcept nogil
    cdef int drive(self, int64_t until) noexcept nogil
    cdef bint finished(self, int64_t now) noexcept nogil
