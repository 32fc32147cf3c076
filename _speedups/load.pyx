"""An open-loop HTTP/1.1 load generator over TCP or TLS and its latency histogram; see load.pxd for the schedule and the parts.

Strategy: the only thing this process does is generate load, so it drives its own epoll descriptor in a tight loop instead of
sitting inside uvloop: a loop between us and the kernel would add its own wake-ups to what is measured. The GIL is released
for a slice of the run at a time, and Python gets its turn between slices. A request is one send() of prebuilt bytes and
usually one recv(); sockets are watched once, edge-triggered for both directions, so no further epoll_ctl() is needed. A
TLS handshake is computation of a tenth of a millisecond and more, so what is due leaves between one event and the next.
Python is called from here: never while a slice runs, but for TLS (load_tls.pyx).

Safety: `links`, `ring` and `scratch` are allocated once and freed with the object; `wire` points into `request`, an immutable
bytes object that the object holds. An epoll event carries index and generation, and an event of an older socket is dropped.
`head` holds offsets into `scratch` and is used only between the parse and the return of `consume`. `statuses` and
`accepted` are indexed by a status that the parser limits to 100..599.
"""

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.math cimport log, sqrt
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset
from gateway._speedups.headers cimport MAX_FIELDS, head_reset
from gateway._speedups.http1 cimport CHUNK_DONE, Limits, chunked_decode, chunked_reset, parse_response
from gateway._speedups.load_tls cimport LoadTls
from gateway._speedups.sockets cimport *
from gateway._speedups.tls cimport TlsUpstream

cdef extern from *:
    """
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #ifndef SYS_epoll_pwait2
    #define SYS_epoll_pwait2 441
    #endif
    static inline int64_t cw_monotonic_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    }
    /* epoll_wait() in nanoseconds (Linux 5.11); before it, in whole milliseconds and spinning for the rest. */
    static inline int cw_epoll_wait_ns(int epoll, struct epoll_event *events, int count, int64_t wait) {
        static int absent;
        if (wait <= 0) return epoll_wait(epoll, events, count, 0);
        if (!absent) {
            struct timespec t = {wait / 1000000000, wait % 1000000000};
            int n = (int)syscall(SYS_epoll_pwait2, epoll, events, count, &t, NULL, 0);
            if (n >= 0 || (errno != ENOSYS && errno != EPERM)) return n;
            absent = 1;
        }
        return epoll_wait(epoll, events, count, (int)(wait / 1000000));
    }
    /* Sleep to the nanosecond that was asked for; the default lets the kernel be 50 us late. */
    static inline void cw_exact_timers(void) { (void)prctl(PR_SET_TIMERSLACK, 1UL, 0, 0, 0); }
    /* A pacing congestion control (BBR) sets a timer for each request and delays some: the load would not be ours to time. */
    static inline void cw_unpaced(int fd) { (void)setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4); }
    static inline uint64_t cw_next_random(uint64_t *s) {
        uint64_t z = (*s += 0x9e3779b97f4a7c15ULL);          /* SplitMix64 */
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
        return z ^ (z >> 31);
    }
    static inline int cw_top_bit(uint64_t v) { return 63 - __builtin_clzll(v); }
    """
    int64_t cw_monotonic_ns() nogil
    int cw_epoll_wait_ns(int epoll, epoll_event* events, int count, int64_t wait) nogil
    void cw_exact_timers() nogil
    void cw_unpaced(int fd) nogil
    uint64_t cw_next_random(uint64_t* state) nogil
    int cw_top_bit(uint64_t value) nogil

cdef enum:
    SCRATCH = 262144
    HEAD_MAX = 65536            # of an answer
    EVENTS = 256                # per epoll_wait
    SCAN_NS = 20000000          # how often timeouts are looked for
    PAUSE_NS = 10000000         # closed loop: after a refused connection, so that a dead server is not hammered
    OPENING = 128               # connections that `connect` opens at a time: within every usual listen backlog
    WATCHED = 0x2000 | 0x1 | 0x4 | <int>0x80000000      # EPOLLRDHUP | EPOLLIN | EPOLLOUT | EPOLLET

cdef Limits ANSWER_LIMITS
ANSWER_LIMITS.head = HEAD_MAX
ANSWER_LIMITS.target = 0
ANSWER_LIMITS.fields = MAX_FIELDS

ERRORS = ("connect", "tls", "reset", "closed", "timeout", "bad", "status", "unfinished")


def monotonic_ns():
    """CLOCK_MONOTONIC in nanoseconds: the clock of everything here."""
    return cw_monotonic_ns()


cdef inline uint32_t bin_of(int64_t value) noexcept nogil:
    cdef int shift
    if value < (2 << BIN_BITS):
        return <uint32_t>value if value > 0 else 0
    shift = cw_top_bit(<uint64_t>value) - BIN_BITS
    if shift >= TOP_BIT - BIN_BITS:
        return BIN_COUNT - 1
    return (<uint32_t>shift << BIN_BITS) + <uint32_t>(value >> shift)


cdef inline int64_t bin_top(uint32_t index) noexcept nogil:
    """The largest value of a bin."""
    cdef int shift
    if index < (2 << BIN_BITS):
        return index
    shift = <int>(index >> BIN_BITS) - 1
    return (((<int64_t>(index & ((1 << BIN_BITS) - 1)) + (1 << BIN_BITS)) + 1) << shift) - 1


# What is looked into without the GIL is `self`, or made together with it: never None.
@cython.nonecheck(False)
@cython.final
cdef class LatencyHistogram:
    """Durations in nanoseconds, each in a bin narrower than 0.1 % of it, from 0 to 137 s."""

    def __cinit__(self):
        self.bins = <uint64_t*>calloc(BIN_COUNT, sizeof(uint64_t))
        if self.bins == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.bins)

    cdef void add(self, int64_t value) noexcept nogil:
        cdef double v = <double>value
        self.bins[bin_of(value)] += 1
        if self.count == 0 or value < self.minimum:
            self.minimum = value
        if value > self.maximum:
            self.maximum = value
        self.count += 1
        self.total += v
        self.squares += v * v

    def record(self, int64_t value):
        """Add one duration in ns; a negative one counts as 0."""
        self.add(value if value > 0 else 0)

    @property
    def mean(self):
        """In ns; 0.0 when empty."""
        return self.total / self.count if self.count else 0.0

    @property
    def deviation(self):
        """The standard deviation in ns; 0.0 when empty."""
        if self.count == 0:
            return 0.0
        cdef double mean = self.total / self.count
        cdef double variance = self.squares / self.count - mean * mean
        return sqrt(variance) if variance > 0 else 0.0

    def value_at(self, double q):
        """The smallest value that at least the share `q` (0..1) of all samples does not exceed, in ns; 0 when empty."""
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"a quantile lies between 0 and 1, not {q}")
        # The nudge keeps 0.99 * 100 = 99.00000000000001 from asking for the hundredth sample.
        cdef double wanted = q * self.count * (1 - 1e-12)
        cdef uint64_t seen = 0
        cdef int i
        for i in range(BIN_COUNT):
            if self.bins[i]:
                seen += self.bins[i]
                if seen >= wanted:
                    return min(bin_top(i), self.maximum) if i < BIN_COUNT - 1 else self.maximum
        return self.maximum

    def filled(self):
        """[(largest value of the bin in ns, samples), ...] of the bins that are not empty, upwards."""
        cdef int i
        return [(min(bin_top(i), self.maximum) if i < BIN_COUNT - 1 else self.maximum, self.bins[i])
                for i in range(BIN_COUNT) if self.bins[i]]


# What is looked into without the GIL is `self`, or made together with it: never None.
@cython.nonecheck(False)
@cython.final
cdef class Load:
    """A run of requests over a fixed number of connections.

    host: a numeric IPv4 or IPv6 address. request: the bytes of every request. rate: requests a second, 0.0 for a closed loop.
    accepted: the statuses that count as an answer. timeout: ns that a request may take from its first byte, or a connection
    attempt. no_body: answers have no body whatever they declare (HEAD). keep_alive: False opens a connection a request.
    tls: how to speak TLS, for `server_name`; resume: with the sessions of earlier connections.
    """

    def __cinit__(self, str host not None, uint16_t port, bytes request not None, *, uint32_t connections, double rate,
                  bint poisson=False, uint64_t seed=1, accepted=range(200, 400), int64_t timeout=10_000_000_000,
                  bint no_body=False, bint keep_alive=True, TlsUpstream tls=None, str server_name="", bint resume=False):
        cdef uint32_t i
        cdef bytes numeric = host.encode()
        self.epoll = -1
        if not 1 <= connections <= 1000000:
            raise ValueError("connections must be from 1 to 1000000")
        if not 0 <= rate <= 1e8:
            raise ValueError("rate must be from 0 to 1e8 a second")
        if not request:
            raise ValueError("an empty request")
        if not cw_parse_address(numeric, port, &self.address, &self.address_length):
            raise ValueError(f"{host!r} is not a numeric address")
        self.request, self.wire, self.wire_length = request, request, len(request)
        self.rate, self.poisson, self.timeout = rate, poisson, timeout
        self.no_body, self.keep_alive = no_body, keep_alive
        self.next.random = self.due.random = seed
        for status in accepted:
            if not 100 <= status < 600:
                raise ValueError(f"{status} is not a status")
            self.accepted[<int>status] = 1
        self.latency, self.service, self.handshake = LatencyHistogram(), LatencyHistogram(), LatencyHistogram()
        if tls is not None:
            self.secure, self.encrypted = LoadTls(tls, server_name, connections, resume), True
        self.links = <Link*>calloc(connections, sizeof(Link))
        self.ring = <uint32_t*>calloc(connections, sizeof(uint32_t))
        self.scratch = <char*>malloc(SCRATCH)
        if self.links == NULL or self.ring == NULL or self.scratch == NULL:
            raise MemoryError
        self.links_count = connections
        for i in range(connections):
            self.links[i].fd = -1
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll < 0:
            raise OSError(errno, "epoll_create1")

    def __dealloc__(self):
        cdef uint32_t i
        if self.links != NULL:
            for i in range(self.links_count):
                if self.links[i].fd >= 0:
                    cw_close(self.links[i].fd)
                free(self.links[i].carry)
        if self.epoll >= 0:
            cw_close(self.epoll)
        free(self.links)
        free(self.ring)
        free(self.scratch)

    # -- schedule

    cdef int64_t time_of(self, Cursor* cursor) noexcept nogil:
        if self.poisson:
            return self.started + <int64_t>cursor.offset
        return self.started + <int64_t>(<double>cursor.index * 1e9 / self.rate)

    cdef void advance(self, Cursor* cursor) noexcept nogil:
        # 53 random bits, never 0: the logarithm of 0 would never come.
        cdef double uniform
        if self.poisson:
            uniform = (<double>(cw_next_random(&cursor.random) >> 11) + 1.0) * (1.0 / 9007199254740992.0)
            cursor.offset -= log(uniform) * 1e9 / self.rate
        cursor.index += 1
        cursor.time = self.time_of(cursor)

    cdef bint may_issue(self, int64_t now) noexcept nogil:
        """Whether a request is due that no connection carries yet."""
        if self.rate == 0:
            return self.started <= now < self.window_end and now >= self.paused_until
        return self.next.time <= now and self.next.time < self.window_end

    cdef void issue(self, Link* link, int64_t now) noexcept nogil:
        """Gives the next request to a link that is neither busy nor in the ring."""
        link.intended = now if self.rate == 0 else self.next.time
        if self.rate != 0:
            if link.intended > self.ring_empty_at and now - link.intended > self.late_max:
                self.late_max = now - link.intended
            self.advance(&self.next)
        link.sent = now
        link.busy = True
        link.phase = ANSWER_HEAD
        link.written = 0
        link.measured = self.window_start <= link.intended < self.window_end
        self.measured += link.measured
        self.issued += 1
        self.in_flight += 1
        if link.state == LINK_OPEN:
            self.write(link)
        elif link.state == LINK_EMPTY and self.open_link(link, now) < 0:
            self.fail(link, LOAD_CONNECT)

    # -- connections

    cdef int open_link(self, Link* link, int64_t now) noexcept nogil:
        """Starts to connect. 0, or -errno with the link left empty."""
        cdef int fd = cw_socket(self.address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
        cdef int error
        if fd < 0:
            return -errno
        cw_nodelay(fd)
        cw_unpaced(fd)
        if cw_connect(fd, <sockaddr*>&self.address, self.address_length) < 0 and errno != EINPROGRESS:
            error = -errno
            cw_close(fd)
            return error
        link.generation += 1
        error = cw_watch(self.epoll, fd, <uint32_t>WATCHED, (<uint64_t>link.generation << 32) | <uint64_t>(link - self.links))
        if error < 0:
            cw_close(fd)
            return error
        link.fd = fd
        link.state = LINK_CONNECTING
        link.ending = link.proven = False
        link.since = now
        return 0

    cdef void close_link(self, Link* link) noexcept nogil:
        if self.encrypted and link.state >= LINK_HANDSHAKE:
            self.secure.close(<uint32_t>(link - self.links))
        if link.fd >= 0:
            cw_close(link.fd)
        link.fd = -1
        link.state = LINK_EMPTY
        link.generation += 1
        link.carried = 0
        free(link.carry)
        link.carry = NULL

    cdef void release(self, Link* link) noexcept nogil:
        """Puts a link at the end of the ring: every connection gets its share, as those of many clients do."""
        cdef uint32_t at
        if link.free:
            return
        at = self.ring_head + self.ring_length
        if at >= self.links_count:
            at -= self.links_count
        self.ring[at] = <uint32_t>(link - self.links)
        self.ring_length += 1
        link.free = True

    cdef void reopen(self, Link* link, int64_t now) noexcept nogil:
        """Replaces a connection that carries no request, ahead of need unless each request opens its own."""
        self.close_link(link)
        if self.keep_alive and now < self.window_end and self.open_link(link, now) < 0:
            self.refused += 1

    # -- requests and answers

    cdef ssize_t send(self, Link* link) noexcept nogil:
        cdef size_t rest = <size_t>(self.wire_length - link.written)
        if self.encrypted:
            return self.secure.send(<uint32_t>(link - self.links), self.wire + link.written, rest)
        return cw_send(link.fd, self.wire + link.written, rest)

    cdef void write(self, Link* link) noexcept nogil:
        cdef ssize_t sent
        cdef uint32_t generation = link.generation
        while link.written < self.wire_length:
            sent = self.send(link)
            if sent == -EAGAIN:
                return
            if sent < 0:
                # What the server said before it closed may lie there still: an answer, or the alert that refuses us.
                if link.written and sent == -EPIPE:
                    return
                if self.encrypted and not link.proven:
                    self.secure.wake(<uint32_t>(link - self.links), True)
                    self.read(link)
                if link.busy and link.generation == generation:
                    self.fail(link, LOAD_RESET)
                return
            link.written += <uint64_t>sent

    cdef void read(self, Link* link) noexcept nogil:
        cdef ssize_t got
        cdef uint32_t have
        cdef uint32_t generation = link.generation
        cdef uint32_t at = <uint32_t>(link - self.links)
        cdef bint rest = False
        cdef int result
        while True:
            have = link.carried
            if have:
                memcpy(self.scratch, link.carry, have)
            if self.encrypted:
                got = self.secure.recv(at, self.scratch + have, SCRATCH - have, &rest)
            else:
                got = cw_recv(link.fd, self.scratch + have, SCRATCH - have)
                # Edge-triggered: a short read emptied the socket, unless the end of the stream stands behind it.
                rest = got < SCRATCH - have and not link.ending
            if got == -EAGAIN:
                return
            if got <= 0:
                self.stream_ended(link, <int>got)
                return
            self.received += <uint64_t>got
            if not link.busy:
                self.idle_closed += 1           # an answer that nobody asked for: this connection is not to be trusted
                self.reopen(link, cw_monotonic_ns())
                return
            link.carried = 0
            result = self.consume(link, self.scratch, have + <uint32_t>got)
            if result > 0:
                self.complete(link)
                return
            if result < 0:
                self.fail(link, LOAD_BAD)
                return
            if rest or link.generation != generation:
                return

    cdef int consume(self, Link* link, char* data, uint32_t length) noexcept nogil:
        """1 when the answer is complete, 0 when more must come, -1 when it is wrong."""
        cdef uint32_t at = 0, used = 0
        cdef uint64_t take
        cdef int size
        cdef char* carry
        while link.phase == ANSWER_HEAD:
            head_reset(&self.head)
            size = parse_response(data + at, length - at, &self.head, &ANSWER_LIMITS)
            if size < 0:
                return -1
            if size == 0:
                if length == at:
                    return 0
                carry = <char*>realloc(link.carry, length - at)
                if carry == NULL:
                    return -1
                memcpy(carry, data + at, length - at)
                link.carry = carry
                link.carried = length - at
                return 0
            at += <uint32_t>size
            if self.head.status >= 200:
                if self.begin_body(link) > 0:
                    return 1 if at == length else -1
            elif self.head.status == 101:
                return -1
        if link.phase == ANSWER_LENGTH:
            take = length - at
            if take > link.remaining:
                return -1
            link.remaining -= take
            return 1 if link.remaining == 0 else 0
        if link.phase == ANSWER_CHUNKED:
            if chunked_decode(&link.chunked, data + at, length - at, &used) < 0:
                return -1
            if link.chunked.state != CHUNK_DONE:
                return 0
            return 1 if at + used == length else -1
        return 0

    cdef int begin_body(self, Link* link) noexcept nogil:
        """How the body is framed (RFC 9112 6.3). 1 when there is none."""
        link.status = self.head.status
        if self.head.close or (self.head.minor == 0 and not self.head.keep_alive) or not self.keep_alive:
            link.ending = True
        if self.no_body or link.status == 204 or link.status == 304 or self.head.content_length == 0:
            return 1
        if self.head.chunked:
            link.phase = ANSWER_CHUNKED
            chunked_reset(&link.chunked)
        elif self.head.content_length > 0:
            link.phase = ANSWER_LENGTH
            link.remaining = <uint64_t>self.head.content_length
        else:
            link.phase = ANSWER_CLOSE
            link.ending = True
        return 0

    cdef void stream_ended(self, Link* link, int error) noexcept nogil:
        cdef int64_t now
        if self.encrypted and error < 0 and not link.proven:
            now = cw_monotonic_ns()
            if self.secure.refused(<uint32_t>(link - self.links), not link.busy, self.window_start <= now < self.window_end):
                self.unsecured(link)
                return
        if not link.busy:
            self.idle_closed += 1
            self.reopen(link, cw_monotonic_ns())
        elif error == 0 and link.phase == ANSWER_CLOSE:
            self.complete(link)
        else:
            self.fail(link, LOAD_RESET if error < 0 else LOAD_CLOSED)

    cdef void complete(self, Link* link) noexcept nogil:
        cdef int64_t now = cw_monotonic_ns()
        link.busy = False
        link.proven = True
        self.in_flight -= 1
        if link.measured:
            self.statuses[link.status] += 1
        if not self.accepted[link.status]:
            self.errors[link.measured][<int>LOAD_STATUS] += 1
        else:
            self.answered += 1
            if self.window_start <= now < self.window_end:
                self.in_window += 1
            if link.measured:
                self.latency.add(now - link.intended)
                self.service.add(now - link.sent)
        # An answer that came before the whole request was taken leaves half a request in the stream.
        if link.ending or link.written < self.wire_length:
            self.reopen(link, now)
        if self.ring_length == 0 and self.may_issue(now):
            self.issue(link, now)
        else:
            self.release(link)

    cdef void fail(self, Link* link, int error) noexcept nogil:
        cdef int64_t now = cw_monotonic_ns()
        self.errors[link.measured][error] += 1
        link.busy = False
        self.in_flight -= 1
        if error == LOAD_CONNECT or error == LOAD_TLS:
            self.close_link(link)
            self.paused_until = now + PAUSE_NS
        else:
            self.reopen(link, now)
        self.release(link)

    # -- the loop

    cdef bint connected(self, Link* link, uint32_t events) noexcept nogil:
        """Whether an event leaves a connection that can be used; with TLS the handshake has begun."""
        if cw_socket_error(link.fd) != 0:
            if link.busy:
                self.fail(link, LOAD_CONNECT)
            else:
                self.refused += 1
                self.close_link(link)
            return False
        if not events & EPOLLOUT:
            return False
        if not self.encrypted:
            self.ready(link)
            return True
        link.since = cw_monotonic_ns()
        link.state = LINK_HANDSHAKE
        if self.secure.begin(<uint32_t>(link - self.links), link.fd, self.window_start <= link.since < self.window_end) < 0:
            self.unsecured(link)
            return False
        return True

    cdef bint shake(self, Link* link, uint32_t events) noexcept nogil:
        """Whether an event completed the handshake."""
        cdef uint32_t generation = link.generation
        cdef bint ended = events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR) != 0
        cdef int64_t now = cw_monotonic_ns()
        cdef bint counted = self.window_start <= now < self.window_end
        cdef int result = self.secure.handshake(<uint32_t>(link - self.links), ended, counted)
        if result < 0:
            self.unsecured(link)
        if result <= 0:
            return False
        if counted:
            self.handshake.add(cw_monotonic_ns() - link.since)
        self.ready(link)
        return link.generation == generation

    cdef void ready(self, Link* link) noexcept nogil:
        link.state = LINK_OPEN
        self.opened += 1
        if link.busy:
            self.write(link)

    cdef void unsecured(self, Link* link) noexcept nogil:
        if link.busy:
            self.fail(link, LOAD_TLS)
        else:
            self.refused += 1
            self.close_link(link)

    cdef void on_events(self, Link* link, uint32_t events) noexcept nogil:
        cdef uint32_t generation = link.generation
        cdef bint ended = events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR) != 0
        cdef bint starved = False
        if link.state == LINK_OPEN:
            if self.encrypted:
                starved = self.secure.wake(<uint32_t>(link - self.links), ended)
            if events & EPOLLOUT and link.busy and link.written < self.wire_length:
                self.write(link)
        elif link.state == LINK_CONNECTING and not self.connected(link, events):
            return
        if link.state == LINK_HANDSHAKE and not self.shake(link, events):
            return
        if link.state != LINK_OPEN or link.generation != generation:
            return
        if ended:
            link.ending = True
        if events & EPOLLIN or ended or (starved and events & EPOLLOUT):
            self.read(link)

    cdef void scan_timeouts(self, int64_t now) noexcept nogil:
        cdef uint32_t i
        cdef Link* link
        self.next_scan = now + SCAN_NS
        for i in range(self.links_count):
            link = &self.links[i]
            if (now - link.sent if link.busy else now - link.since) <= self.timeout:
                continue
            if link.state == LINK_HANDSHAKE:
                self.secure.too_late(self.window_start <= now < self.window_end)
                self.unsecured(link)
            elif link.busy:
                self.fail(link, LOAD_CONNECT if link.state == LINK_CONNECTING else LOAD_TIMEOUT)
            elif link.state == LINK_CONNECTING:
                self.refused += 1
                self.close_link(link)

    cdef int64_t wait_until(self, int64_t now, int64_t until) noexcept nogil:
        if self.next_scan < until:
            until = self.next_scan
        if self.ring_length:
            if self.rate != 0:
                if self.next.time < until and self.next.time < self.window_end:
                    until = self.next.time
            elif self.started <= now < self.window_end and self.paused_until < until:
                until = self.paused_until
        return until - now

    cdef int collect(self, int64_t wait) noexcept nogil:
        cdef epoll_event events[EVENTS]
        cdef int i
        cdef uint32_t index
        cdef int n = cw_epoll_wait_ns(self.epoll, events, EVENTS, wait)
        if n < 0:
            return 0 if errno == EINTR else -errno
        for i in range(n):
            index = <uint32_t>events[i].cw_data
            if self.links[index].generation == <uint32_t>(events[i].cw_data >> 32):
                self.on_events(&self.links[index], events[i].events)
                if self.encrypted and self.started:
                    self.issue_due(cw_monotonic_ns())
        return n

    cdef void issue_due(self, int64_t now) noexcept nogil:
        """Gives what is due to the connections that are free."""
        cdef Link* link
        if self.rate != 0:
            while self.due.time <= now and self.due.time < self.window_end:
                self.advance(&self.due)
        while self.ring_length and self.may_issue(now):
            link = &self.links[self.ring[self.ring_head]]
            self.ring_head = self.ring_head + 1 if self.ring_head + 1 < self.links_count else 0
            self.ring_length -= 1
            link.free = False
            self.issue(link, now)
            now = cw_monotonic_ns()
        if self.ring_length == 0:
            self.ring_empty_at = now

    cdef bint finished(self, int64_t now) noexcept nogil:
        if now < self.window_end or self.in_flight:
            return False
        return self.rate == 0 or self.next.time >= self.window_end

    cdef int drive(self, int64_t until) noexcept nogil:
        """Runs until a time or the end of the work. 1 at the end of the work, 0 at the time, -errno."""
        cdef int64_t now
        cdef int n
        while True:
            self.issue_due(cw_monotonic_ns())
            now = cw_monotonic_ns()
            if self.due.index > self.next.index and self.due.index - self.next.index > self.backlog_max:
                self.backlog_max = self.due.index - self.next.index
            if now >= self.next_scan:
                self.scan_timeouts(now)
            if self.finished(now):
                return 1
            if now >= until:
                return 0
            n = self.collect(self.wait_until(now, until))
            if n < 0:
                return n

    # -- what Python sees

    def connect(self, double patience=5.0):
        """Open the connections, wait for them at most `patience` seconds; return how many are open."""
        cdef int64_t now = cw_monotonic_ns()
        cdef int64_t until = now + <int64_t>(patience * 1e9)
        cdef uint32_t at = 0
        cdef int result
        if not self.keep_alive:
            for at in range(self.links_count):
                self.release(&self.links[at])
            return 0
        self.window_end = 0x7fffffffffffffff
        while now < until:
            while at < self.links_count and at < self.opened + self.refused + OPENING:
                if self.open_link(&self.links[at], now) < 0:
                    self.refused += 1
                self.release(&self.links[at])
                at += 1
            if at == self.links_count and self.opened + self.refused >= at:
                break
            with nogil:
                result = self.collect(10000000)
            if result < 0:
                raise OSError(-result, "epoll_wait")
            now = cw_monotonic_ns()
        for at in range(self.links_count):
            if self.links[at].state == LINK_HANDSHAKE:
                self.secure.too_late(True)
        return self.opened

    def start(self, int64_t warmup, int64_t duration):
        """Begin: t0 is 1 ms from now, the measured window begins `warmup` ns after it. Return (its start, its end) in ns."""
        if warmup < 0 or duration <= 0:
            raise ValueError("the warm-up must be at least 0 and the duration above it")
        cw_exact_timers()
        self.started = cw_monotonic_ns() + 1000000
        self.window_start = self.started + warmup
        self.window_end = self.window_start + duration
        self.next_scan = self.started + SCAN_NS
        self.ring_empty_at = self.started
        self.opened = self.refused = self.idle_closed = 0
        for cursor in range(2):
            # The first arrival of a Poisson process comes after a gap, the first of a constant rate at t0.
            if self.poisson:
                self.advance(&self.due if cursor else &self.next)
                (&self.due if cursor else &self.next).index = 0
            else:
                (&self.due if cursor else &self.next).time = self.started
        return self.window_start, self.window_end

    def run(self, int64_t until):
        """Work until CLOCK_MONOTONIC reaches `until` ns. Return True when nothing is left to do. Raises OSError."""
        cdef int result
        if self.window_end == 0 or self.started == 0:
            raise RuntimeError("call start() first")
        with nogil:
            result = self.drive(until)
        if result < 0:
            raise OSError(-result, "epoll_wait")
        return result == 1

    def abandon(self):
        """Give up: what is scheduled and unanswered counts as unfinished. Return how many requests that were."""
        cdef uint32_t i
        cdef uint64_t before = self.errors[1][<int>LOAD_UNFINISHED]
        for i in range(self.links_count):
            if self.links[i].busy:
                self.fail(&self.links[i], LOAD_UNFINISHED)
        while self.rate != 0 and self.next.time < self.window_end:
            if self.next.time >= self.window_start:
                self.measured += 1
                self.errors[1][<int>LOAD_UNFINISHED] += 1
            self.advance(&self.next)
        return self.errors[1][<int>LOAD_UNFINISHED] - before

    def close(self):
        """Close every connection; with TLS the server is told."""
        cdef uint32_t i
        for i in range(self.links_count):
            self.close_link(&self.links[i])

    def tls_counts(self):
        """Handshakes before the start and in the measured window, None without TLS."""
        return self.secure.counts() if self.encrypted else None

    def counters(self):
        """Numbers of requests, connections and bytes so far; late_max in ns."""
        return {
            "issued": self.issued, "measured": self.measured, "answered": self.answered, "in_window": self.in_window,
            "in_flight": self.in_flight, "backlog": self.due.index - self.next.index if self.rate != 0 else 0,
            "backlog_max": self.backlog_max, "received_bytes": self.received, "opened": self.opened,
            "refused": self.refused, "idle_closed": self.idle_closed, "late_max": self.late_max,
        }

    def error_counts(self, bint warmup=False):
        """Failed requests by kind, of the measured window or of the warm-up."""
        return {name: self.errors[not warmup][i] for i, name in enumerate(ERRORS)}

    def status_counts(self):
        """Answers of the measured window by status."""
        return {i: self.statuses[i] for i in range(600) if self.statuses[i]}
