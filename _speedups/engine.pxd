"""The engine: one epoll descriptor per worker, its connections, and their deadlines.

Strategy: uvloop watches the epoll descriptor and calls poll(), which handles what is ready in bounded batches. Sockets are
edge-triggered and registered once; each connection remembers whether it may be readable or writable. The table `by_fd` owns
the connections; an event carries (descriptor, generation), so that an event of a closed connection finds nothing.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from gateway._speedups.buffers cimport Buffer
from gateway._speedups.exchange cimport Exchange, ListenerEntry, RouteEntry, Snapshot
from gateway._speedups.headers cimport Head
from gateway._speedups.histogram cimport TcpSeries, WorkerSlot
from gateway._speedups.http2 cimport Http2Session, Http2Stream
from gateway._speedups.notices cimport Notices
from gateway._speedups.pool cimport Endpoint, Upstream
from gateway._speedups.sockets cimport epoll_event, iovec, sockaddr_storage
from gateway._speedups.tcp_listener cimport TcpListener, TcpTarget
from gateway._speedups.tls cimport Tls
from gateway._speedups.token_bucket cimport BucketTable
cimport cython

# What a connection's deadline is for.
cdef enum:
    T_NONE = 0
    T_KEEPALIVE         # downstream idle between requests
    T_HEAD              # request head incomplete
    T_BODY              # no byte of the request body
    T_WRITE             # the client does not read
    T_CONNECT           # upstream connect
    T_UP_HEAD           # upstream answer's head
    T_UP_IDLE           # no byte of the upstream's answer
    T_TOTAL
    T_LINGER            # waiting for the client to close
    T_POOL              # upstream idle in its pool
    T_PING              # an upstream's HTTP/2 connection: when it is asked whether it lives, or has to have answered
    T_QUEUE             # a place at the upstream
    T_HANDSHAKE         # the client's TLS handshake
    T_TUNNEL            # no byte through a tunnel

cdef enum:
    FD_STREAM = 0x7ffffff0      # in place of a descriptor: a stream of an HTTP/2 connection, open
    TICK_US = 100000    # resolution of deadlines
    WHEEL = 1024        # slots: 102 s a turn; later deadlines take more turns

# Downstream states.
cdef enum:
    D_IDLE = 0          # between requests, no byte of the next one
    D_HEAD              # some of a head
    D_ACTIVE            # an exchange is on its way
    D_FLUSH             # the answer is complete but not all sent
    D_LINGER            # answered and shut down for writing; the rest is read and dropped
    D_CLOSED
    D_TUNNEL            # switched to another protocol: bytes pass as they come
    D_HANDSHAKE         # before the first request: a PROXY header where one is due, then TLS

# Upstream connection states.
cdef enum:
    U_CONNECTING = 0    # the TLS handshake included
    U_HEAD              # request (being) sent, no answer head
    U_BODY
    U_TUNNEL
    U_IDLE
    U_CLOSED

# Every byte of a connection passes through recv(), send() and sendv(), and its end through shut() and cut_short().
cdef class Connection:
    cdef Engine engine
    cdef int fd                     # -1 when closed
    cdef uint32_t generation
    cdef uint8_t state
    cdef bint readable, writable    # may be; cleared when the kernel says EAGAIN
    cdef bint ended                 # the other side sent its end: reads go on until recv() says so too
    cdef bint queued                # in Engine.again
    cdef bint finished              # of a tunnel: recv() has said that nothing follows
    cdef bint shut_out              # our end is said, or cannot be said any more
    cdef bint broken_off            # of a tunnel: writing failed
    cdef bint orphaned              # the client has left; its exchange goes on, and what is written to it is dropped
    cdef Tls tls                    # None: clear text
    cdef Http2Stream stream         # what it is of an HTTP/2 connection; None: a socket of its own
    cdef Buffer inb                 # received, not consumed
    cdef Buffer out                 # to be sent; empty most of the time
    # Deadline: linked into Engine.wheel by raw pointers. Safe because close() unlinks, and `by_fd` owns the connection until then.
    cdef void* timer_next
    cdef void* timer_prev
    cdef int64_t timer_tick         # slot it is linked in; 0: not linked
    cdef int64_t deadline           # monotonic us
    cdef uint8_t why                # T_*
    # Bytes received or sent, 0 at the end of the stream, or -errno (-EAGAIN when nothing goes now).
    @cython.final
    cdef ssize_t recv(self, void* data, size_t n) noexcept
    @cython.final
    cdef ssize_t send(self, const void* data, size_t n) noexcept
    @cython.final
    cdef ssize_t sendv(self, iovec* pieces, int count) noexcept
    # Whether recv() need not be asked again before the next event, after it gave n of at most `room` bytes.
    @cython.final
    cdef bint drained(self, ssize_t n, size_t room) noexcept
    # Whether an idle connection is open and has nothing to say, looked up now.
    @cython.final
    cdef bint silent(self) noexcept
    # After an event: there may be more to read.
    @cython.final
    cdef void wake(self) noexcept
    # Whether the last read proved that nothing more had arrived.
    @cython.final
    cdef bint at_rest(self) noexcept
    # Ends our side of the stream in good order. False when that has to wait for room to write.
    @cython.final
    cdef bint shut(self) noexcept
    # Makes the next close() an abrupt end, which nobody can take for the end of an answer.
    @cython.final
    cdef void cut_short(self) noexcept
    # Closes the socket and nothing else.
    @cython.final
    cdef void hang_up(self) noexcept
    cdef int on_events(self, uint32_t events) except -1
    cdef int on_timeout(self) except -1
    cdef void close(self)
    cdef void close_now(self)       # the same, whatever is under way
    # 0, or -errno when the connection is broken. What the kernel does not take at once is kept in `out`.
    cdef int put(self, const char* data, uint32_t n) noexcept
    cdef int put_chunk(self, const char* data, uint32_t n) noexcept
    # The same for a message's head with what there is of its body behind it; `last`: the message ends with it.
    @cython.final
    cdef int put_message(self, const char* data, uint32_t n, bint last) noexcept
    # What was put last ended the message: HTTP/1.1's framing has said so, a stream is told.
    @cython.final
    cdef void finish(self) noexcept
    cdef int flush(self) noexcept

cdef class Downstream(Connection):
    cdef str listener_name
    cdef ListenerEntry listener
    cdef Exchange x                 # from the first byte of a request until its answer was handed over
    cdef int version                # of the snapshot that `listener` belongs to
    cdef int requests
    cdef bint closing               # close after what is in `out`
    cdef bint proxied               # a PROXY header is still due
    cdef bint peer_trusted
    cdef int blanks                 # empty lines before the request line
    cdef uint32_t lingered
    cdef unsigned char address[16]
    cdef char text[48]
    cdef int text_len
    cdef Tls outer                  # of the connection, whatever lies between
    cdef Http2Session held          # orphaned: the connection in whose limit it still counts

    cdef int take_stream(self) except -1
    cdef int stream_over(self) except -1
    cdef int flushed(self) except -1
    cdef int exchange_timeout(self, uint8_t why) except -1
    cdef bint body_at_hand(self) noexcept
    cdef int keep_behind(self, const char* data, uint32_t n) except -1
    cdef int cut(self, int status, bytes slug, bytes detail) except -1
    cdef int truncated(self) except -1
    cdef int attach(self, bint fresh) except -1
    cdef int leave(self) except -1
    cdef int linger(self) except -1
    cdef int gone(self) except -1
    cdef int advance(self) except -1
    cdef int queue_up(self) except -1
    cdef int run_steps(self) except -1
    cdef int collect(self) except -1
    cdef int pump_request(self) except -1
    cdef int take_payload(self, char* data, uint32_t n, uint32_t* used) except -1
    cdef int reply(self) except -1
    cdef int refuse(self, int status, bytes slug, bytes detail) except -1
    cdef int answered(self) except -1
    cdef int settle(self) except -1
    cdef int abort(self, bint reset, int status=*) except -1
    cdef bint end_grpc(self, int code) except -1
    cdef void drop_upstream(self)
    cdef void finish_exchange(self)
    cdef bint waits_for_body(self) noexcept
    cdef void arm_body(self) noexcept
    cdef void arm_head(self) noexcept
    cdef void arm(self, uint8_t why, int64_t us) noexcept

cdef class UpstreamConnection(Connection):
    cdef Endpoint endpoint
    cdef Upstream upstream
    cdef Exchange x                 # None while idle
    cdef int64_t born               # monotonic us
    cdef int64_t idle_since
    cdef bint reused                # carried an exchange before this one
    cdef bint keep                  # the answer's head allows another exchange
    cdef bint broken                # writing failed; an answer may still be there to read
    cdef bint pending               # bytes behind an informational answer are not parsed yet
    cdef bint terminated            # the last chunk went out with the head
    cdef uint32_t seen              # bytes of an incomplete head that hold no empty line
    cdef int head_length            # of the answer, still in `inb`
    cdef bint held                  # a response hook has the answer
    cdef bint recorded              # how the present attempt ended was told to the endpoint
    cdef int64_t sent_at            # monotonic us, of the present attempt
    cdef uint32_t ticket            # its endpoint's
    # -- of a stream
    cdef BackLink link
    cdef uint32_t start_at          # of the body, when the present attempt began: it may be refused unread
    cdef int64_t start_remaining
    cdef uint64_t start_bytes
    cdef bint unsent                # nothing of the request had gone to anybody before
    cdef bint undecided             # a gRPC answer whose status is in its trailers
    cdef int64_t took               # us until its head came

    cdef void leave_pool(self)
    cdef void take_up(self, Exchange x) noexcept
    cdef void record(self, int outcome, int status, int64_t retry_after_us)
    cdef bint judge(self, Head* head) except -1
    cdef int put_again(self, int n) except -999
    cdef void detach(self)
    cdef int connected(self, uint32_t events) except -1
    cdef int secure(self) except -1
    cdef int serve(self) except -1
    cdef int connect_failed(self, int status, bytes slug, bytes detail) except -1
    cdef int append_body(self, int n) except -1
    cdef int send_answer(self, Head* head) except -1
    cdef int64_t decode_behind(self, char* out, int* n) except -2
    cdef int hold(self, Head* head) except -1
    cdef int send_request(self) except -1
    cdef int pump_answer(self) except -1
    cdef int read_answer_head(self) except -1
    cdef int take_head(self, int length) except -1
    cdef int start_answer(self, Head* head) except -1
    cdef int take_answer(self, char* data, uint32_t n) except -1
    cdef int end_of_answer(self) except -1
    cdef int lost(self, int error) except -1
    cdef int out_of_time(self) except -1
    cdef bint owes_trailers(self) noexcept
    cdef int answer_hooked(self, int verdict) except -1
    cdef void release(self)
    cdef int fail(self, int status, bytes slug, bytes detail) except -1

# A socket with HTTP/2 on it. Its exchanges are the streams' owners.
cdef class Link(Connection):
    cdef LinkSession h2
    cdef int pump(self) except -1
    cdef void count_in(self, ssize_t n) noexcept
    cdef int push(self) except -1           # sends what waits
    cdef void moved_on(self) noexcept
    cdef int over(self) except -1           # the connection is lost or at its end
    cdef int stirred(self) except -1        # after each event: deadlines, and the end of a connection that is to end
    cdef void tell_end(self)
    cdef list owners(self)                  # the streams' connections, open exchanges among them

cdef class LinkSession(Http2Session):
    cdef Link link                          # None once that is closed
    cdef bint held                          # in Engine.held

cdef class FrontLink(Link):
    cdef Downstream face                    # what the client's connection was before it was this
    cdef int take(self, Http2Stream stream) except -1
    cdef void drain(self)
    cdef int leave(self) except -1
    cdef int linger(self) except -1

cdef class BackLink(Link):
    cdef Endpoint endpoint
    cdef Upstream upstream
    cdef int64_t born                       # monotonic us
    cdef list waiting                       # UpstreamConnections whose streams may be opened once it stands, or is known to be alive
    cdef list settling                      # ... whose handshakes go out once its SETTINGS say that it takes them, and closed ones; None: none
    cdef bint stands
    cdef bint retiring                      # takes no more streams
    cdef int64_t heard_at                   # when bytes came last
    cdef bint resting                       # counted among the idle connections
    cdef uint32_t served
    # -- whether it is still there (all monotonic us)
    cdef int64_t asked_at                   # a PING waits for an answer since; 0: none does
    cdef int64_t answer_by                  # ... and until
    cdef int64_t hold_until                 # for so long `waiting` waits for it
    cdef int64_t last_asked
    cdef int connected(self, uint32_t events) except -1
    cdef int secure(self) except -1
    cdef int serve(self) except -1
    cdef int refuse(self, int status, bytes slug, bytes detail) except -1
    cdef bint usable(self, int64_t now) noexcept
    cdef void suspect(self, int64_t sent_at) noexcept
    cdef bint left(self) noexcept
    cdef bint doubtful(self, int64_t now) noexcept
    cdef bint may_ask(self, int64_t now) noexcept
    cdef void ask(self) noexcept
    cdef void hold(self, UpstreamConnection u)
    cdef int release_waiting(self) except -1
    cdef int send_elsewhere(self) except -1
    cdef int settle(self, UpstreamConnection u) except -1
    cdef int settled(self) except -1
    cdef int unsettled(self) except -1
    cdef int watch(self) except -1

# A client of a raw TCP listener: D_HANDSHAKE until it is known where it goes, D_ACTIVE until an endpoint is connected, then D_TUNNEL.
cdef class TcpDownstream(Connection):
    cdef ListenerEntry listener
    cdef TcpListener tcp
    cdef TcpTarget target                   # None until it is chosen
    cdef TcpUpstream upstream               # None until one is being connected
    cdef bint proxied                       # a PROXY header is still due
    cdef bint greeting                      # a client of PostgreSQL's may still ask for TLS
    cdef bint refused_gss                   # it has asked for GSSAPI, which is not offered
    cdef bint admitted                      # its address was looked at
    cdef bint placed                        # counted as open
    cdef bint entered                       # in flight at its upstream
    cdef bint over                          # counted and logged
    cdef int tries                          # endpoints after the first
    cdef uint32_t lingered
    cdef sockaddr_storage client
    cdef unsigned char address[16]
    cdef char text[48]
    cdef int text_len
    cdef bytes name                         # that the client asked for; None: none
    cdef TcpSeries* series                  # of the target, once it is chosen; valid as long as the engine's slot
    cdef uint64_t bytes_in, bytes_out
    cdef int64_t accepted, opened           # monotonic us; 0: not yet
    cdef int step(self) except -1
    cdef int take_header(self) except -2
    cdef int take_request(self) except -2
    cdef int secure(self) except -1
    cdef int authorize(self) except -1
    cdef int read_hello(self) except -1
    cdef int alert(self, int ending, int description) except -1
    cdef int attach(self) except -1
    cdef int connect(self, Endpoint avoid) except -1
    cdef bint may_try(self) noexcept
    cdef int stands(self) except -1
    cdef int pump(self) except -1
    cdef int broke(self, Connection source, Connection sink) except -1
    cdef void stir(self) noexcept
    cdef int end(self, int ending, bint cut) except -1
    cdef int linger(self) except -1
    cdef void leave(self)
    cdef void say(self, int ending)

cdef class TcpUpstream(Connection):
    cdef TcpDownstream downstream           # None once parted
    cdef Endpoint endpoint
    cdef Upstream upstream
    cdef uint32_t ticket
    cdef int64_t born, took                 # monotonic us; us until it was connected, 0: it is not
    cdef bint asking                        # a server of PostgreSQL's was asked for TLS
    cdef int connected(self) except -1
    cdef int asked(self) except -1
    cdef int begin(self) except -1
    cdef int secure(self) except -1
    cdef int failed(self) except -1
    cdef int stands(self) except -1
    cdef void part(self, int outcome)

cdef class ListenSocket(Connection):
    cdef readonly str name
    cdef bint paused
    cdef void pause(self)
    cdef int accept_some(self) except -1

cdef class Engine:
    cdef readonly int worker
    cdef WorkerSlot slot
    cdef BucketTable buckets
    cdef Notices notices            # of exchanges that did not go well
    cdef object loop
    cdef int epoll
    cdef Snapshot snapshot
    cdef list by_fd
    cdef list again                 # connections with more to do than their share of one batch
    cdef list parked                # exchanges that wait for Python
    cdef list spare                 # free exchanges
    cdef set orphans                # Downstreams whose clients have left: owned here until their exchanges end
    cdef set full                   # upstreams with a queue
    cdef list held                  # sessions with small pieces that wait for the tick
    # Connections closed in this batch. Whoever closes one from within a method of its, or of its other side, may go on using it:
    # nothing else may hold it any more.
    cdef list closed
    cdef list corked                # links with frames to be sent at the end of the batch
    cdef object look_handle
    cdef dict listening             # name -> ListenSocket
    cdef dict handshaking           # Downstream and TcpDownstream in D_HANDSHAKE, oldest first (values unused)
    cdef int handshake_turns        # steps of handshakes that this batch may still take
    cdef dict complaints            # event -> (monotonic us of its last log line, those since that got none)
    cdef int64_t said_in            # the second in which `said` was counted
    cdef int said[2]                # log lines of TCP connections that were served, and of others
    cdef uint64_t unsaid[2]         # those left out since the last one
    cdef uint32_t generations
    # The time as it was when this batch began, monotonic us. While nothing happens nobody looks at the clock: whatever comes into the engine
    # from outside, be it an event or a call of the worker's, begins with take_time().
    cdef int64_t now
    cdef int64_t wall_ahead         # what the wall clock is ahead of that one, us: looked up with it, once a poll()
    cdef int64_t ticked             # last tick handled
    cdef int64_t tick_at            # when tick() is called next; INT64_MAX: not before something happens; 0: nobody may ask for it now
    cdef void* wheel[1024]          # Connection*, borrowed
    cdef object tick_handle
    cdef bint draining
    cdef bint polling
    cdef bint crowded               # there may be events that this batch has not seen
    cdef bint no_room                       # obtain() found no connection because there are as many as there may be
    cdef public int connections     # downstream
    cdef public int exchanges
    cdef int tunnels                # open
    cdef int tasks                  # parked exchanges' awaitables that run
    cdef int descriptors            # registered: listening sockets and both kinds of connections
    cdef int upstreams              # upstream connections, idle ones included
    cdef int upstreams_idle         # those that wait in a pool
    cdef char* scratch              # SCRATCH bytes: body pieces
    cdef char* composed             # COMPOSED bytes: heads, with the body behind them when it fits
    cdef Head* answer_head          # the answer being parsed; valid during one event only
    cdef object log
    cdef object log_tcp

    cdef int register(self, Connection connection, int fd, uint32_t events) except -1
    cdef void unregister(self, Connection connection)
    cdef void set_timer(self, Connection connection, uint8_t why, int64_t at) noexcept
    cdef void unlink_timer(self, Connection connection) noexcept
    cdef Exchange take_exchange(self)
    cdef void give_exchange(self, Exchange x)
    cdef void meet_idle(self, epoll_event* events, int n)
    cdef void dispatch(self, epoll_event* events, int n)
    cdef void take_time(self) noexcept
    cdef void tick_by(self, int64_t tick) noexcept
    cdef int64_t next_tick(self) noexcept
    cdef void expire(self)
    cdef void run_again(self)
    cdef void go_on(self)
    cdef void run_parked(self)
    cdef int resume(self, Exchange x, object result, object error) except -1
    cdef void report(self, Connection connection, object error)
    cdef void complain(self, str event, dict extra)
    cdef int connections_max(self, str name)
    cdef void accepted(self, str name, int fd, sockaddr_storage* address)
    cdef void link_timer(self, Connection connection, int64_t tick) noexcept
    cdef void look_soon(self)
    cdef void tell(self, Endpoint endpoint, int event)
    cdef UpstreamConnection obtain(self, Exchange x, Endpoint endpoint, bint fresh)
    cdef UpstreamConnection connect(self, Exchange x, Endpoint endpoint)
    cdef UpstreamConnection obtain_stream(self, Exchange x, Endpoint endpoint, bint fresh)
    cdef int dial(self, Connection connection, Upstream upstream, Endpoint endpoint) except -1
    cdef bint open_one(self, Upstream upstream)
    cdef BackLink link_to(self, Exchange x, Endpoint endpoint)
    cdef void uncork(self)
    cdef void force_held(self)
    cdef list switching(self)
    cdef int close_unwelcome(self, str name, RouteEntry route) except -1
    cdef int close_all(self, list condemned) except -1
