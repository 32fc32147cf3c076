"""The engine; see engine.pxd for its parts and engine's life of a request in docs/life-of-a-request.md.

Strategy: this file holds the event loop's half: registration, deadlines, batches, the slow lane, pools. The two sides of an
exchange are in downstream.pxi and upstream.pxi, included below with what lies before and between them, because all of them call each other without a detour.
Python is called from here: per parked request, and once per connection for the object itself.

Safety: raw pointers are used for three things. `scratch` and `composed` are allocated once and live as long as the engine; no
function keeps a pointer into them beyond its own event. Timer links are covered in engine.pxd. Pointers into a connection's
buffer are taken anew after anything that may move it (buffer_reserve).
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.list cimport PyList_GET_SIZE
from cpython.ref cimport PyObject
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memcpy, memmove, memset, strlen
from gateway._speedups.buffers cimport *
from gateway._speedups.compose cimport *
from gateway._speedups.exchange cimport *
from gateway._speedups.grpc cimport *
from gateway._speedups.grpc_web cimport (
    WEB_NOT, WEB_TEXT, WebCall, web_encode, web_kind, web_reset, web_trailers, web_wants_text)
from gateway._speedups.headers cimport *
from gateway._speedups.histogram cimport *
from gateway._speedups.http1 cimport *
from gateway._speedups.http2 cimport *
from gateway._speedups.authorization cimport AuthorizationStep, Caller
from gateway._speedups.balance cimport SAMPLE_GOOD, hash_key
from gateway._speedups.certificates cimport ClientCertificate
from gateway._speedups.client_hello cimport HELLO_MAX, HELLO_NAME, HELLO_TOO_LONG, parse_client_hello
from gateway._speedups.pool cimport *
from gateway._speedups.proxy_protocol cimport PROXY_MAX, compose_proxy_header, parse_proxy_header
from gateway._speedups.sockets cimport *
from gateway._speedups.tcp_listener cimport TcpListener, TcpTarget
from gateway._speedups.tls cimport ALPN_HTTP2, FAILED_GONE, FAILED_PLAIN, FAILED_VISITOR, Tls, TlsUpstream, tls_cool, tls_live
from gateway._speedups.token_bucket cimport BucketTable
from gateway._speedups.upstream_state cimport OUT_NEUTRAL, OUT_OK, U_HEDGES, U_QUEUE_TIMEOUTS, classify_status
from gateway._speedups.wire cimport cw_equals_folded, cw_fold_name, cw_put_hex

import logging

from gateway._speedups.compose import seed_random

cdef enum:
    SCRATCH = 131072            # one recv() of a body; a bulk transfer makes few system calls, one copy of it per worker
    COMPOSED = 262144           # a head of 64 KiB and a piece of body behind it
    HEAD_ROOM = 131072          # what a head may take of it
    EVENTS = 128                # per epoll_wait
    BATCHES = 8                 # per poll()
    FEW = 4                     # events of a batch after which there is no other one
    BUDGET_US = 2000            # per poll(): coroutines wait no longer than this for their turn
    PIECES = 16                 # body pieces a connection moves before it queues up again
    ACCEPTS = 64                # per event of a listening socket
    SPARE_EXCHANGES = 256
    HEAD_MAX = 65536            # of an upstream's answer
    INFORMATIONAL_MAX = 8
    DIALLED = 1                 # dial(): the connection stands
    DIALLED_LATER = 2           # ... an event will tell
    TROUBLE = -998              # no errno: what was to be sent cannot be
    LINGER_US = 2000000
    EARLY_US = 10000            # before our own clock says that a call is over, its service may: it is told what is left in whole steps
    LINGER_BYTES = 1048576
    HANDSHAKES = 8              # steps per batch: a signature takes up to a millisecond, and the others have a turn between
    COMPLAINT_US = 1000000      # between two log lines about failed handshakes: strangers cause them at will
    STALL_US = 2000000          # the worker slept (SIGSTOP, a blocking hook, nothing to do): look at the sockets before the deadlines
    EARLY_TIMER_US = 1500       # the loop counts in ms, cut off: asked for the very end of a tick it would call before it, and once more

cdef Limits ANSWER_LIMITS
ANSWER_LIMITS.head = HEAD_MAX
ANSWER_LIMITS.target = 0
ANSWER_LIMITS.fields = MAX_FIELDS

cdef extern from *:
    """
    /* A list as a stack that comes and goes by the batch: append() and pop() would give memory back and ask for it again each time.
       The last item moves out, with its reference; the list must not be empty. */
    static inline PyObject *cw_list_take(PyObject *list) {
        Py_ssize_t n = PyList_GET_SIZE(list) - 1;
        PyObject *item = PyList_GET_ITEM(list, n);
        Py_SET_SIZE((PyVarObject *)list, n);
        return item;
    }
    static inline int cw_list_put(PyObject *list, PyObject *item) {
        Py_ssize_t n = PyList_GET_SIZE(list);
        if (n == ((PyListObject *)list)->allocated) return PyList_Append(list, item);
        Py_INCREF(item);
        ((PyListObject *)list)->ob_item[n] = item;
        Py_SET_SIZE((PyVarObject *)list, n + 1);
        return 0;
    }
    """
    object cw_list_take(list stack)
    int cw_list_put(list stack, object item) except -1
    PyObject* cw_item "PyList_GET_ITEM"(list items, Py_ssize_t i)
    PyObject* cw_type "(PyObject *)Py_TYPE"(PyObject* each)

cdef enum:
    WATCH = 0x2000 | 0x1 | 0x4 | <int>0x80000000        # EPOLLRDHUP | EPOLLIN | EPOLLOUT | EPOLLET


include "connection.pxi"
include "attempts.pxi"
include "relay.pxi"
include "tunnel.pxi"
include "grpc_web.pxi"
include "handshake.pxi"
include "request_head.pxi"
include "downstream.pxi"
include "upstream.pxi"
include "links.pxi"
include "tcp.pxi"


cdef class ListenSocket(Connection):
    """A listening socket, level-triggered so that what one batch leaves is reported again."""

    cdef int on_events(self, uint32_t events) except -1:
        self.accept_some()
        return 0

    cdef int accept_some(self) except -1:
        """Takes up to ACCEPTS connections; fewer when there are no more, or no room."""
        cdef int i, fd
        cdef sockaddr_storage address
        cdef socklen_t length
        for i in range(ACCEPTS):
            if self.fd < 0:
                return i
            length = sizeof(address)
            fd = accept4(self.fd, <sockaddr*>&address, &length, SOCK_NONBLOCK | SOCK_CLOEXEC)
            if fd < 0:
                if errno in (EMFILE, ENFILE, ENOBUFS, ENOMEM):
                    self.pause()
                if errno in (ECONNABORTED, EINTR):
                    continue
                return i
            self.engine.accepted(self.name, fd, &address)
            if self.engine.connections >= self.engine.connections_max(self.name):
                self.pause()
                return i
        return ACCEPTS

    cdef int on_timeout(self) except -1:
        """After a pause: what waits in the backlog is taken now, unless there is still no room."""
        if self.fd >= 0 and self.paused:
            if self.engine.connections >= self.engine.connections_max(self.name):
                self.engine.set_timer(self, T_LINGER, self.engine.now + TICK_US)
                return 0
            self.paused = False
            cw_rewatch(self.engine.epoll, self.fd, EPOLLIN, (<uint64_t>self.generation << 32) | <uint32_t>self.fd)
        return 0

    cdef void pause(self):
        """Out of descriptors, memory or places: leave new connections in the kernel's backlog for a tick, without spinning."""
        self.paused = True
        self.engine.slot.counters[C_ACCEPT_PAUSED] += 1
        cw_rewatch(self.engine.epoll, self.fd, 0, (<uint64_t>self.generation << 32) | <uint32_t>self.fd)
        self.engine.set_timer(self, T_LINGER, self.engine.now + TICK_US)


cdef class Engine:
    """One worker's data plane. All methods are called in the worker's only thread, on its loop."""

    def __cinit__(self):
        self.epoll = -1
        self.scratch = <char*>malloc(SCRATCH)
        self.composed = <char*>malloc(COMPOSED)
        self.answer_head = <Head*>malloc(sizeof(Head))
        memset(self.wheel, 0, sizeof(self.wheel))
        if self.scratch == NULL or self.composed == NULL or self.answer_head == NULL:
            raise MemoryError

    def __init__(self, int worker, WorkerSlot slot not None, BucketTable buckets not None):
        self.worker = worker
        self.slot = slot
        self.buckets = buckets
        self.by_fd = []
        self.again = []
        self.parked = []
        self.spare = []
        self.orphans = set()
        self.full = set()
        self.corked = []
        self.held = []
        self.closed = []
        self.listening = {}
        self.handshaking = {}
        self.complaints = {}
        self.log = logging.getLogger("crossway.engine")
        self.log_tcp = logging.getLogger("crossway.tcp")
        self.notices = Notices()
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll < 0:
            raise OSError(errno, "epoll_create1")
        self.take_time()
        self.ticked = self.now // TICK_US

    def __dealloc__(self):
        free(self.scratch)
        free(self.composed)
        free(self.answer_head)
        if self.epoll >= 0:
            cw_close(self.epoll)

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self, loop) -> None:
        """Let `loop` drive this engine from now on."""
        seed_random()
        self.loop = loop
        loop.add_reader(self.epoll, self.poll)
        self.tick_at = INT64_MAX
        self.take_time()

    def apply(self, Snapshot snapshot not None) -> None:
        """Swap to `snapshot`: exchanges under way finish on theirs. Pools of endpoints that stay are kept."""
        cdef Snapshot old = self.snapshot
        self.take_time()
        self.snapshot = snapshot
        if old is not None:
            snapshot.adopt(old)
        self.slot.gauges[G_CONFIG_VERSION] = snapshot.version

    def listen(self, str name not None, int fd) -> None:
        """Accept on the listening socket `fd` for the listener `name`; the engine works on a duplicate of its own."""
        cdef ListenSocket listening = ListenSocket.__new__(ListenSocket)
        import os
        listening.engine = self
        listening.name = name
        listening.fd = -1
        self.register(listening, os.dup(fd), EPOLLIN)
        self.listening.setdefault(name, []).append(listening)

    def unlisten(self, str name not None) -> None:
        """Stop accepting for `name`. What waits in the backlog is taken first: closing would reset it."""
        cdef ListenSocket listening
        self.take_time()
        for listening in self.listening.pop(name, ()):
            while not listening.paused and listening.accept_some() == ACCEPTS:
                pass
            listening.close()

    def drain(self) -> None:
        """Stop accepting, close idle client connections, and let the others end with their present exchange."""
        self.take_time()
        self.draining = True
        for name in list(self.listening):
            self.unlisten(name)
        for connection in list(self.by_fd):
            if isinstance(connection, FrontLink):
                (<FrontLink>connection).drain()
            elif isinstance(connection, TcpDownstream):
                (<TcpDownstream>connection).leave()
            elif isinstance(connection, Downstream) and (<Downstream>connection).state == D_IDLE:
                (<Downstream>connection).wake()
                (<Downstream>connection).advance()      # a request that is in the socket already is served
                if (<Downstream>connection).state == D_IDLE and not (<Downstream>connection).queued:
                    (<Downstream>connection).close()
            elif isinstance(connection, Downstream) and (<Downstream>connection).state == D_HANDSHAKE and \
                    (<Downstream>connection).tls is None and cw_silent((<Downstream>connection).fd):
                (<Downstream>connection).close()            # connected, and never said a word
        self.go_on()

    def leave(self, str name not None) -> None:
        """Drain one listener while the others go on: accept no more, close its idle connections, end the others with their answer."""
        cdef ListenerEntry listener = self.snapshot.listeners.get(name)
        if listener is not None:
            listener.leaving = True
        self.unlisten(name)
        for connection in list(self.by_fd):
            if isinstance(connection, FrontLink) and (<FrontLink>connection).face.listener_name == name:
                (<FrontLink>connection).drain()
            elif isinstance(connection, TcpDownstream) and (<TcpDownstream>connection).listener.name == name:
                (<TcpDownstream>connection).leave()
            elif isinstance(connection, Downstream) and (<Downstream>connection).listener_name == name:
                if (<Downstream>connection).state == D_IDLE:
                    (<Downstream>connection).wake()
                    (<Downstream>connection).advance()      # a request that is in the socket already is served
                if (<Downstream>connection).state == D_IDLE and not (<Downstream>connection).queued:
                    (<Downstream>connection).close()
        self.go_on()

    def serving(self, str name not None) -> int:
        """Open client connections of one listener."""
        return sum(1 for each in self.by_fd if (isinstance(each, Downstream) and (<Downstream>each).listener_name == name) or
                   (isinstance(each, FrontLink) and (<FrontLink>each).face.listener_name == name) or
                   (isinstance(each, TcpDownstream) and (<TcpDownstream>each).listener.name == name))

    def close_clients(self, judge) -> int:
        """Close at once the connections of clients whose ClientCertificate `judge` condemns; returns how many.

        Exchanges under way are cut.
        """
        cdef Connection client
        self.take_time()
        condemned = []
        for each in self.by_fd:
            if isinstance(each, (Downstream, FrontLink, TcpDownstream)):
                client = <Connection>each
                if client.tls is not None and client.tls.certificate is not None and judge(client.tls.certificate):
                    condemned.append(client)
        return self.close_all(condemned)

    def close_servers(self, judge) -> int:
        """Close at once what may last as long as it likes, raw TCP and WebSockets, to servers whose ClientCertificate `judge` condemns."""
        cdef TcpUpstream server
        cdef Downstream client
        self.take_time()
        condemned = []
        for each in self.by_fd:
            if isinstance(each, TcpUpstream):
                server = <TcpUpstream>each
                if server.downstream is not None and server.tls is not None and server.tls.certificate is not None and \
                        judge(server.tls.certificate):
                    condemned.append(server.downstream)
        for client in self.switching():
            tls = tls_under(<UpstreamConnection>client.x.upstream_connection)
            if tls is not None and (<Tls>tls).certificate is not None and judge((<Tls>tls).certificate):
                condemned.append(client)
        return self.close_all(condemned)

    cdef int close_all(self, list condemned) except -1:
        cdef Connection client
        for client in condemned:
            client.close_now()
        self.go_on()
        return <int>len(condemned)

    cdef list switching(self):
        """The clients whose WebSockets are open, or asked for at an upstream."""
        streams = [stream for link in self.by_fd if isinstance(link, FrontLink) for stream in (<FrontLink>link).owners()]
        return [each for each in [*self.by_fd, *streams] if isinstance(each, Downstream) and (<Downstream>each).x is not None and
                (<Downstream>each).x.place is not None]

    def close_denied(self, str name not None) -> int:
        """Close at once the raw TCP connections and WebSockets of a listener that its policy of now does not let in; returns how many."""
        cdef ListenerEntry listener = self.snapshot.listeners.get(name)
        cdef TcpDownstream client
        cdef RouteEntry route
        self.take_time()
        if listener is not None and listener.tcp is None:
            for route in self.snapshot.routes:
                if route.name == name:              # a sidecar's way in: one route, whose gate is that of all callers
                    return self.close_unwelcome(name, route)
        if listener is None or listener.tcp is None or (<TcpListener>listener.tcp).policy is None:
            return 0
        policy = (<TcpListener>listener.tcp).policy
        denied = [each for each in self.by_fd if isinstance(each, TcpDownstream) and (<TcpDownstream>each).listener.name == name and
                  (<TcpDownstream>each).state != D_HANDSHAKE and (<TcpDownstream>each).tls is not None and
                  (<TcpDownstream>each).tls.certificate is not None and not policy.admits((<TcpDownstream>each).tls.certificate)]
        for client in denied:
            client.end(END_DENIED, True)
        self.go_on()
        return len(denied)

    cdef int close_unwelcome(self, str name, RouteEntry route) except -1:
        cdef list gates = [step for step in route.steps if isinstance(step, AuthorizationStep)]
        cdef list condemned = []
        cdef Downstream client
        for client in self.switching():
            if gates and client.listener_name == name and not (<AuthorizationStep>gates[0]).policy.stays(client.x):
                condemned.append(client)
        return self.close_all(condemned)

    def active(self) -> int:
        """Client connections that still have something to finish, and exchanges whose clients have left."""
        return self.connections + len(self.orphans)

    def unfinished(self) -> list:
        """What would be cut now: one dict per open exchange."""
        found = []
        streams = [stream for link in self.by_fd if isinstance(link, FrontLink) for stream in (<FrontLink>link).owners()]
        for connection in [*self.by_fd, *streams, *self.orphans]:
            if isinstance(connection, Downstream) and (<Downstream>connection).x is not None:
                found.append((<Downstream>connection).describe())
            elif isinstance(connection, TcpDownstream) and (<TcpDownstream>connection).opened:
                found.append((<TcpDownstream>connection).describe())
        return found

    def reopen(self) -> None:
        """Open the audit files anew (after log rotation)."""
        if self.snapshot is not None:
            for journal in self.snapshot.journals:
                journal.reopen()

    def close(self) -> None:
        """Close every connection at once and stop watching."""
        self.take_time()
        self.tick_at = 0
        if self.tick_handle is not None:
            self.tick_handle.cancel()
        if self.look_handle is not None:
            self.look_handle.cancel()
        if self.loop is not None:
            self.loop.remove_reader(self.epoll)
        for connection in list(self.by_fd):
            if connection is not None:
                (<Connection>connection).close_now()

    def live(self) -> dict:
        """Counts of what is held now; all but `exchanges_spare` are zero once no client is connected and pools are empty."""
        return {
            "connections": self.connections,
            "exchanges": self.exchanges,
            "exchange_objects": exchanges_live() - PyList_GET_SIZE(self.spare),
            "buffers": blocks_live(),
            "tls": tls_live(),
            "parked": PyList_GET_SIZE(self.parked),
            "tunnels": self.tunnels,
            "descriptors": sum(1 for connection in self.by_fd if connection is not None),
        }

    # -- the loop -----------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Handle what is ready, in batches, for at most about BUDGET_US."""
        cdef epoll_event events[EVENTS]
        cdef int batch, n
        cdef int64_t began
        if self.polling:
            return
        self.polling = True
        self.take_time()
        began = self.now
        try:
            for batch in range(BATCHES):
                n = epoll_wait(self.epoll, events, EVENTS, 0)
                # What idle upstream connections have to say comes first, so that no request of this batch goes out on one that
                # ended or speaks unasked. A full batch may have left some unseen.
                self.crowded = n == EVENTS
                self.handshake_turns = HANDSHAKES
                self.meet_idle(events, n)
                self.dispatch(events, n)
                self.slot.counters[C_LOOP_EVENTS] += max(n, 0)
                if self.again:
                    self.run_again()
                if self.parked:
                    self.run_parked()
                if self.corked:
                    self.uncork()
                self.closed.clear()
                # The next call of epoll_wait() would nearly always find nothing after few events, and is dearer than what it could save: what
                # comes meanwhile makes the loop call again.
                if n < FEW and not self.again and not self.parked and not self.corked:
                    break
                self.now = cw_monotonic_us()
                if self.now - began > BUDGET_US:
                    break
            self.slot.counters[C_LOOP_POLLS] += 1
            if (self.again or self.parked or self.corked) and self.loop is not None:
                self.loop.call_soon(self.poll)
        finally:
            self.polling = False

    def tick(self) -> None:
        """Every 100 ms while anything happens: deadlines and gauges. Then only when a deadline may be due, or never."""
        cdef bint rested = cw_monotonic_us() - self.now > STALL_US
        cdef bint warm = True
        self.tick_handle = None
        self.tick_at = 0                    # what is asked for from here on is seen to at the end
        try:
            if rested:
                self.poll()                 # bytes that arrived while the process slept, if it was stopped, come before its deadlines
            self.take_time()
            self.closed.clear()
            self.expire()
            warm = tls_cool()
            if self.held:
                self.force_held()
            self.go_on()
            self.show()
        finally:
            self.tick_at = INT64_MAX
            self.tick_by(self.ticked + 1 if warm or self.held else self.next_tick())

    cdef void take_time(self) noexcept:
        """What time it is. Whatever comes from outside begins with this, since nobody has looked while nothing happened; a tick will follow it."""
        self.now = cw_monotonic_us()
        self.wall_ahead = cw_wall_us() - self.now
        if self.tick_at > self.now + TICK_US:
            self.tick_by(self.now // TICK_US + 1)

    cdef void tick_by(self, int64_t tick) noexcept:
        """Has tick() called when `tick` begins, or earlier if it was asked for before; 0: no matter when."""
        cdef int64_t at = tick * TICK_US
        cdef int64_t wait = at - cw_monotonic_us()
        if tick == 0 or at >= self.tick_at:
            return
        try:
            handle = self.loop.call_later(((wait if wait > 0 else 0) + EARLY_TIMER_US) / 1e6, self.tick)
        except BaseException as error:
            self.log.error("no timer to be had", exc_info=error)        # whatever comes next asks again
            return
        if self.tick_handle is not None:
            self.tick_handle.cancel()
        self.tick_handle = handle
        self.tick_at = at

    cdef int64_t next_tick(self) noexcept:
        """The first tick after the last one in which a deadline may be due; 0 when there is none at all."""
        cdef int64_t tick
        for tick in range(self.ticked + 1, self.ticked + 1 + WHEEL):
            if self.wheel[tick % WHEEL] != NULL:
                return tick                 # perhaps of a later turn: then it is one call for nothing
        return 0

    def show(self) -> None:
        """Put what is held now into the gauges. Of what changes between two ticks the worker's heartbeat tells: an address that is gone."""
        self.slot.gauges[G_CONNECTIONS] = self.connections
        self.slot.gauges[G_EXCHANGES] = self.exchanges
        self.slot.gauges[G_UPSTREAM_ACTIVE] = self.upstreams - self.upstreams_idle
        self.slot.gauges[G_UPSTREAM_IDLE] = self.upstreams_idle
        self.slot.gauges[G_PARKED] = PyList_GET_SIZE(self.parked) + self.tasks
        self.slot.gauges[G_BUFFERS] = blocks_live()
        self.slot.gauges[G_DESCRIPTORS] = self.descriptors
        self.slot.gauges[G_TUNNELS] = self.tunnels
        self.slot.gauges[G_HANDSHAKES] = len(self.handshaking)

    cdef void meet_idle(self, epoll_event* events, int n):
        """Hands on the events of connections that are idle in a pool, and no other."""
        cdef PyObject* found
        cdef uint32_t fd
        cdef int i
        for i in range(n):
            fd = <uint32_t>events[i].cw_data                # the lower half; masking would go through a Python int
            if fd < <uint32_t>PyList_GET_SIZE(self.by_fd):
                found = cw_item(self.by_fd, fd)             # borrowed, and looked at before anything else runs
                if cw_type(found) == <PyObject*>UpstreamConnection and (<UpstreamConnection>found).state == U_IDLE:
                    self.dispatch(events + i, 1)

    cdef void dispatch(self, epoll_event* events, int n):
        """Hands each event to its connection."""
        cdef Connection connection = None
        cdef uint32_t fd
        cdef int i = 0
        while i < n:
            try:                                            # around the loop: entering it costs more than what most events ask for
                while i < n:
                    fd = <uint32_t>events[i].cw_data
                    i += 1
                    if fd >= <uint32_t>PyList_GET_SIZE(self.by_fd):
                        continue
                    connection = <Connection>cw_item(self.by_fd, fd)        # None, or a Connection; held from here on
                    if connection is not None and connection.generation == <uint32_t>(events[i - 1].cw_data >> 32):
                        connection.on_events(events[i - 1].events)
            except BaseException as error:
                self.report(connection, error)

    cdef void run_again(self):
        cdef Connection connection
        queue, self.again = self.again, []
        for connection in queue:
            connection.queued = False
            if connection.fd >= 0:
                try:
                    connection.on_events(0)
                except BaseException as error:
                    self.report(connection, error)

    cdef void report(self, Connection connection, object error):
        """An error of ours while handling a connection costs that connection, never the worker."""
        self.log.error("internal error on a connection", exc_info=error)
        if isinstance(connection, ListenSocket):
            (<ListenSocket>connection).pause()      # it goes on a little later
        else:
            connection.close_now()
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self.loop.call_soon(raise_it, error)

    cdef void complain(self, str event, dict extra):
        """Logs what strangers can cause at will: one line a second for each kind, with the number of those that got none."""
        last, unlogged = self.complaints.get(event, (0, 0))
        if self.now - last < COMPLAINT_US:
            self.complaints[event] = (last, unlogged + 1)
            return
        self.complaints[event] = (self.now, 0)
        if unlogged:
            extra["unlogged"] = unlogged
        self.log.warning(event, extra=extra)

    # -- registration -------------------------------------------------------------------------------------------------

    cdef int register(self, Connection connection, int fd, uint32_t events) except -1:
        cdef int error
        self.generations += 1
        connection.fd = fd
        connection.generation = self.generations
        while PyList_GET_SIZE(self.by_fd) <= fd:
            self.by_fd.append(None)
        self.by_fd[fd] = connection
        error = cw_watch(self.epoll, fd, events, (<uint64_t>connection.generation << 32) | <uint32_t>fd)
        if error:
            self.by_fd[fd] = None
            cw_close(fd)
            connection.fd = -1
            raise OSError(-error, "epoll_ctl")
        self.descriptors += 1
        return 0

    cdef void unregister(self, Connection connection):
        if self.by_fd[connection.fd] is connection:
            self.by_fd[connection.fd] = None
            self.descriptors -= 1

    cdef int connections_max(self, str name):
        cdef ListenerEntry listener = self.snapshot.listeners.get(name)
        return 0 if listener is None else listener.connections_max

    cdef void accepted(self, str name, int fd, sockaddr_storage* address):
        cdef Downstream connection
        cdef uint16_t port = 0
        cdef ListenerEntry listener = self.snapshot.listeners.get(name) if self.snapshot is not None else None
        if listener is not None and listener.originals is not None:
            name = redirected(listener, fd)
            listener = self.snapshot.listeners.get(name)
        if listener is None:
            cw_close(fd)
            return
        if listener.tcp is not None:
            accept_tcp(self, listener, fd, address)
            return
        connection = Downstream.__new__(Downstream)
        connection.engine = self
        connection.listener = listener
        connection.listener_name = name
        connection.version = self.snapshot.version
        connection.proxied = listener.proxy_protocol != 0
        connection.text_len = cw_address_text(address, connection.text, sizeof(connection.text), &port)
        cw_address_bytes(address, connection.address)
        connection.peer_trusted = address.ss_family == AF_UNIX or listener.trusted.contains(connection.address)
        connection.state = D_IDLE if listener.tls is None else D_HANDSHAKE
        connection.writable = True
        cw_nodelay(fd)
        try:
            self.register(connection, fd, WATCH)
        except OSError as error:
            self.log.error("cannot watch a connection", exc_info=error)
            return
        self.connections += 1
        self.slot.counters[C_CONNECTIONS_ACCEPTED] += 1
        if listener.tls is None:
            self.set_timer(connection, T_KEEPALIVE, self.now + listener.head_us)
            return
        self.set_timer(connection, T_HANDSHAKE, self.now + listener.tls.handshake_us)
        if len(self.handshaking) >= listener.tls.handshakes_max:
            # An honest handshake is over in milliseconds: the oldest is the likeliest to be none.
            self.slot.counters[C_TLS_EVICTED] += 1
            (<Connection>next(iter(self.handshaking))).close()
        self.handshaking[connection] = None

    # -- deadlines ----------------------------------------------------------------------------------------------------

    cdef void set_timer(self, Connection connection, uint8_t why, int64_t at) noexcept:
        """Sets the connection's one deadline. A later one costs a store: its slot notices when it is reached."""
        cdef int64_t tick = at // TICK_US + 1
        connection.why = why
        connection.deadline = at
        if connection.timer_tick == 0 or tick < connection.timer_tick:
            self.unlink_timer(connection)
            self.link_timer(connection, tick if tick > self.ticked else self.ticked + 1)

    cdef void link_timer(self, Connection connection, int64_t tick) noexcept:
        cdef int slot = <int>(tick % WHEEL)
        if tick * TICK_US < self.tick_at:
            self.tick_by(tick)
        connection.timer_tick = tick
        connection.timer_prev = NULL
        connection.timer_next = self.wheel[slot]
        if self.wheel[slot] != NULL:
            (<Connection>self.wheel[slot]).timer_prev = <void*>connection
        self.wheel[slot] = <void*>connection

    cdef void unlink_timer(self, Connection connection) noexcept:
        if connection.timer_tick == 0:
            return
        if connection.timer_prev != NULL:
            (<Connection>connection.timer_prev).timer_next = connection.timer_next
        else:
            self.wheel[connection.timer_tick % WHEEL] = connection.timer_next
        if connection.timer_next != NULL:
            (<Connection>connection.timer_next).timer_prev = connection.timer_prev
        connection.timer_next = connection.timer_prev = NULL
        connection.timer_tick = 0

    cdef void expire(self):
        cdef int64_t current = self.now // TICK_US
        cdef int64_t tick = self.ticked + 1
        cdef void* at
        cdef Connection connection
        due = []
        if current - tick >= WHEEL:
            tick = current - WHEEL + 1          # one turn meets every slot
        while tick <= current:
            at = self.wheel[tick % WHEEL]
            while at != NULL:
                connection = <Connection>at
                at = connection.timer_next
                if connection.timer_tick <= current:
                    due.append(connection)
            tick += 1
        self.ticked = current
        for connection in due:
            self.unlink_timer(connection)
            if (connection.fd < 0 and not connection.orphaned) or connection.why == T_NONE:
                continue
            if connection.deadline > self.now:
                self.set_timer(connection, connection.why, connection.deadline)
                continue
            try:
                connection.on_timeout()
            except BaseException as error:
                self.report(connection, error)

    # -- exchanges ----------------------------------------------------------------------------------------------------

    cdef Exchange take_exchange(self):
        cdef Exchange x
        if PyList_GET_SIZE(self.spare):
            x = <Exchange>cw_list_take(self.spare)
        else:
            x = Exchange.__new__(Exchange)
            x.slot = self.slot
            x.buckets = self.buckets
            x.reset()
        self.exchanges += 1
        return x

    cdef void give_exchange(self, Exchange x):
        self.exchanges -= 1
        if x.upstream is not None:
            leave_upstream(self, x)
        if x.upgrade:
            give_place(self, x)
        x.reset()
        if PyList_GET_SIZE(self.spare) < SPARE_EXCHANGES:
            cw_list_put(self.spare, x)

    cdef void run_parked(self):
        """The slow lane: each waiting exchange's Python is called once; what suspends goes on as a task."""
        cdef Exchange x
        queue, self.parked = self.parked, []
        for x, generation in queue:
            if x.generation != generation or x.parked is None:
                continue
            try:
                result = x.parked.park_answer(x) if x.answer_fields is not None else x.parked.park(x)
                if hasattr(result, "__await__"):
                    self.spawn(x, result)
                    continue
            except BaseException as error:
                if x.generation == generation and x.parked is not None and x.task is None:
                    self.resume(x, None, error)
                continue
            self.resume(x, result, None)

    def spawn(self, Exchange x, awaitable) -> None:
        """Let an awaitable of a parked exchange run as a task; on_task() takes the exchange up again."""
        generation = x.generation
        step: Step = x.parked
        x.task = task = start_task(self.loop, awaitable)
        self.tasks += 1
        if (<Step>step).timeout > 0:
            timer = self.loop.call_later((<Step>step).timeout, task.cancel)
            task.add_done_callback(lambda done: timer.cancel())
        if task.done():
            self.on_task(x, generation, task)
        else:
            task.add_done_callback(lambda done: self.on_task(x, generation, done))

    def on_task(self, Exchange x, generation, task) -> None:
        self.tasks -= 1
        error = None if task.cancelled() else task.exception()
        if x.generation != generation or x.task is not task:
            return                              # the exchange ended meanwhile
        x.task = None
        self.take_time()
        if task.cancelled():
            import asyncio
            error = asyncio.CancelledError()
        self.resume(x, task.result() if error is None else None, error)
        self.go_on()

    cdef void go_on(self):
        """What came up outside poll() is no event of the epoll descriptor: nothing else would call it."""
        if (self.again or self.parked or self.corked) and not self.polling and self.loop is not None:
            self.loop.call_soon(self.poll)

    cdef int resume(self, Exchange x, object result, object error) except -1:
        cdef Downstream connection = x.connection
        cdef Step step = x.parked
        cdef UpstreamConnection upstream = x.upstream_connection        # owned here: it may end below
        cdef int verdict
        x.parked = None
        try:
            verdict = step.resumed(x, result) if error is None else step.failed(x, error)
            if upstream is not None and x.answer_fields is not None:
                upstream.answer_hooked(verdict)
            elif verdict == STEP_ANSWERED:
                connection.reply()
                connection.advance()
            else:
                x.step += 1
                connection.run_steps()
                connection.advance()
        except BaseException as failure:
            self.report(connection, failure)
        return 0

    # -- attempts ------------------------------------------------------------------------------------------------------

    def on_backoff(self, Exchange x, generation) -> None:
        """The pause before another attempt is over."""
        cdef Downstream client
        if x.generation == generation and x.timer is not None:
            client = x.connection                   # the attempt may end the exchange, which knows nobody then
            x.timer = None
            self.take_time()
            try:
                client.attach(True)
                client.advance()
            except BaseException as error:
                self.report(client, error)
            self.go_on()

    def on_hedge(self, Exchange x, generation) -> None:
        """The answer takes long: perhaps another endpoint is asked too."""
        cdef Downstream client
        if x.generation == generation and x.timer is not None:
            client = x.connection
            x.timer = None
            self.take_time()
            try:
                hedge(self, x)
            except BaseException as error:
                self.report(client, error)
            self.go_on()

    cdef void tell(self, Endpoint endpoint, int event):
        """A line in the log: an endpoint went out or came back."""
        told = endpoint.state.explain(event)
        words = told.pop("event")
        self.log.warning("endpoint %s", words, extra=told)

    cdef void look_soon(self):
        if self.look_handle is None and self.loop is not None:
            self.look_handle = self.loop.call_later(QUEUE_LOOK_MS / 1e3, self.look)

    def look(self) -> None:
        """Whether room was made at a full upstream, by whichever worker."""
        cdef Upstream upstream
        self.look_handle = None
        self.take_time()
        for upstream in list(self.full):
            if upstream.waiting:
                let_in(self, upstream)
            else:
                self.full.discard(upstream)
        if self.full:
            self.look_soon()

    # -- pools --------------------------------------------------------------------------------------------------------

    cdef UpstreamConnection obtain(self, Exchange x, Endpoint endpoint, bint fresh):
        """A connection to the endpoint: a proven idle one, or a new one on its way. None when there can be none; `no_room` says why."""
        cdef UpstreamConnection connection
        cdef bint safe = x.head.method == M_GET or x.head.method == M_HEAD or x.head.method == M_OPTIONS
        self.no_room = False
        if x.upstream.protocol != PROTOCOL_HTTP1:
            return self.obtain_stream(x, endpoint, fresh)
        while not fresh and PyList_GET_SIZE(endpoint.idle):
            connection = <UpstreamConnection>cw_list_take(endpoint.idle)
            # What must not be sent twice travels only on a connection that is alive and silent right now.
            if self.now - connection.born > x.upstream.keep_age_us or \
                    ((not safe or self.crowded) and not connection.silent()):
                self.slot.counters[C_UPSTREAM_DISCARDED] += 1
                connection.close()
                continue
            connection.reused = True
            self.upstreams_idle -= 1
            self.slot.counters[C_UPSTREAM_REUSED] += 1
            return connection
        return self.connect(x, endpoint)

    cdef UpstreamConnection obtain_stream(self, Exchange x, Endpoint endpoint, bint fresh):
        """A stream on a link that has room, or on a new one on its way; `fresh`: not on one that may be dead."""
        cdef UpstreamConnection connection
        cdef BackLink link = None, other
        cdef Py_ssize_t at = 0
        # The list may change in close() alone, which takes the link out and makes none: so its size is asked for each time, and the next one stands
        # where this one stood. Were it not taken out, it would be passed by as unusable, since it is closed. `other` is held meanwhile.
        while at < PyList_GET_SIZE(endpoint.links):
            other = <BackLink>cw_item(endpoint.links, at)
            if not other.usable(self.now) or (fresh and other.doubtful(self.now)):
                at += 1
                continue
            # What must not be sent twice travels only on a connection that is alive right now.
            if other.resting and (not is_safe(x.head.method) or x.upgrade) and other.left():
                self.slot.counters[C_UPSTREAM_DISCARDED] += 1
                other.close()
                continue
            link = other
            break
        if link is None:
            link = self.link_to(x, endpoint)
            if link is None:
                return None
        connection = UpstreamConnection.__new__(UpstreamConnection)
        connection.engine = self
        connection.endpoint = endpoint
        connection.upstream = x.upstream
        connection.born = self.now
        connection.link = link
        connection.stream = link.h2.make()
        connection.stream.owner = connection
        connection.fd = FD_STREAM
        connection.writable = True
        if link.stands:
            connection.state = U_HEAD
            connection.reused = link.served > 0
            link.served += 1
            if link.resting:
                link.resting = False
                self.upstreams_idle -= 1
                link.why = T_NONE
            self.slot.counters[C_UPSTREAM_REUSED] += 1
            if link.doubtful(self.now) and (link.asked_at or link.may_ask(self.now)):
                link.hold(connection)
        else:
            connection.state = U_CONNECTING
            link.waiting.append(connection)
        return connection

    cdef bint open_one(self, Upstream upstream):
        """A place for a connection; an idle one to another endpoint makes room. False, with `no_room`: there are as many as there may be."""
        self.no_room = not upstream.open_one() and not (make_room(upstream) and upstream.open_one())
        return not self.no_room

    cdef BackLink link_to(self, Exchange x, Endpoint endpoint):
        """A new link to the endpoint; None when there can be none."""
        cdef BackLink link
        if not self.open_one(x.upstream):
            return None
        link = BackLink.__new__(BackLink)
        link.engine = self
        link.endpoint = endpoint
        link.upstream = x.upstream
        link.born = self.now
        link.waiting = []
        link.h2 = LinkSession.__new__(LinkSession)
        link.h2.link = link
        link.h2.settings = x.upstream.http2
        if not self.dial(link, x.upstream, endpoint):
            return None
        self.set_timer(link, T_CONNECT, self.now + x.upstream.connect_us)
        endpoint.links.append(link)
        return link

    cdef void force_held(self):
        """Pieces that waited for more window have waited long enough."""
        cdef LinkSession session
        held, self.held = self.held, []
        for session in held:
            session.held = False
            if session.link is not None:
                try:
                    session.force()
                except BaseException as error:
                    self.report(session.link, error)

    cdef void uncork(self):
        """What the links have to say leaves."""
        cdef Link link
        corked, self.corked = self.corked, []
        for link in corked:
            if link.fd >= 0:
                try:
                    link.push()
                    if link.fd >= 0:
                        link.stirred()
                except BaseException as error:
                    self.report(link, error)

    cdef UpstreamConnection connect(self, Exchange x, Endpoint endpoint):
        cdef UpstreamConnection connection
        cdef int dialled
        if not self.open_one(x.upstream):
            return None
        connection = UpstreamConnection.__new__(UpstreamConnection)
        connection.engine = self
        connection.endpoint = endpoint
        connection.upstream = x.upstream
        connection.born = self.now
        dialled = self.dial(connection, x.upstream, endpoint)
        if not dialled:
            return None
        connection.state = U_CONNECTING if dialled == DIALLED_LATER or x.upstream.tls is not None else U_HEAD
        return connection

    cdef int dial(self, Connection connection, Upstream upstream, Endpoint endpoint) except -1:
        """Connects it to the endpoint, in the place that the upstream has given. 0 when that failed at once: the place is given back."""
        cdef int result
        cdef int fd = cw_socket(endpoint.sockaddr.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
        if fd < 0:
            upstream.close_one()
            return 0
        cw_nodelay(fd)
        result = cw_connect(fd, <sockaddr*>&endpoint.sockaddr, endpoint.length)
        if result < 0 and errno != EINPROGRESS:
            cw_close(fd)
            upstream.close_one()
            self.slot.counters[C_UPSTREAM_CONNECT_FAILURES] += 1
            return 0
        try:
            self.register(connection, fd, WATCH)
        except OSError as error:                    # closed already; as good as unreachable
            self.log.error("cannot watch a connection", exc_info=error)
            upstream.close_one()
            return 0
        self.upstreams += 1
        self.slot.counters[C_UPSTREAM_CONNECTS] += 1
        return DIALLED_LATER if result < 0 else DIALLED


cdef str redirected(ListenerEntry listener, int fd):
    """The name of the listener that serves a connection, by where it was going before the kernel redirected it to `listener`."""
    cdef sockaddr_storage address
    cdef char text[48]
    cdef int length
    cdef uint16_t port = 0
    if cw_original(fd, &address) != 0:
        return listener.name                        # it came here by itself
    length = cw_address_text(&address, text, sizeof(text), &port)
    return listener.originals.get((text[:length].decode("ascii"), port), listener.name)


def raise_it(error):
    raise error


def start_task(loop, awaitable):
    """A task for the awaitable, run at once up to its first suspension where Python offers that (3.12 and newer)."""
    import asyncio
    import sys

    async def wait():
        return await awaitable

    coroutine = awaitable if asyncio.iscoroutine(awaitable) else wait()
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, eager_start=True)
    return loop.create_task(coroutine)
