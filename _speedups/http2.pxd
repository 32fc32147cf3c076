"""HTTP/2 (RFC 9113): the frames of one connection, either side of it, and its streams.

Strategy: a stream is driven like a socket: recv() and send() return what the system calls of sockets.pxd do, so that what is
above knows HTTP/1.1 alone. A head that arrives becomes the text of an HTTP/1.1 head, which the strict parser of http1 then reads
like any other: nothing passes from one version to the other that the older would refuse. A head that leaves is composed as
text and encoded here. Payload is raw, delimited by the stream's end. Flow control is the backpressure: window is given back when
bytes are taken. Frames that carry nothing, and streams that are given up, are paid from budgets; who has spent them is told to
calm down (GOAWAY) and leaves. Sessions know nothing of sockets: bytes come by feed(), and go to `out`.
Python is called from here: per stream, for its objects; never per frame or field.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from gateway._speedups.buffers cimport Buffer
from gateway._speedups.http2_settings cimport Http2

cdef enum:                      # error codes (RFC 9113 7)
    H2_NO_ERROR = 0
    H2_PROTOCOL_ERROR
    H2_INTERNAL_ERROR
    H2_FLOW_CONTROL_ERROR
    H2_SETTINGS_TIMEOUT
    H2_STREAM_CLOSED
    H2_FRAME_SIZE_ERROR
    H2_REFUSED_STREAM
    H2_CANCEL
    H2_COMPRESSION_ERROR
    H2_CONNECT_ERROR
    H2_ENHANCE_YOUR_CALM
    H2_INADEQUATE_SECURITY
    H2_HTTP_1_1_REQUIRED

# What has stirred a stream, for Http2Session.stirred().
cdef enum:
    STIR_READ = 1               # bytes, or the end
    STIR_WRITE = 4              # there is window again
    STIR_RESET = 8              # the other side gave it up, or the connection is lost

cdef enum:
    PREFACE = 24                # bytes (RFC 9113 3.4)
    FRAME_MAX = 16384           # of payload, in both directions: nobody gains by more
    RECENT = 256                # how many streams' ends are remembered
    MEMOS = 4                   # heads that are remembered: a gRPC call's answer and trailers, or some requests that take turns
    MEMO_BLOCK = 24             # bytes of such a block
    MEMO_TEXT = 1024            # ... and of its text: at most 4.3 KiB for a connection

cdef class Http2Stream:
    cdef Http2Session session           # None once it is closed
    cdef object owner                   # the Connection that it carries
    cdef void* following                # in the session's table; Http2Stream*, owned by the table
    cdef uint32_t id                    # 0: not opened yet
    cdef int64_t send_window
    cdef int64_t window                 # what the other side may still send
    cdef uint32_t owed                  # taken, and not given back yet
    cdef Buffer inb                     # not taken: first the text of heads, then payload
    cdef uint32_t text_left             # bytes of it that are text: no window belongs to them
    cdef const char* at                 # payload of the frame that is being handled; valid within feed() only
    cdef uint32_t at_left
    cdef Buffer trailers                # received: lines
    cdef Buffer closing_lines           # to be sent behind the payload
    cdef int64_t expected               # Content-Length; -1: not said
    cdef int64_t received
    cdef uint32_t error                 # H2_* of a reset
    cdef bint ended                     # the other side's END_STREAM
    cdef bint done                      # ours
    cdef bint last                      # what is sent next ends the message
    cdef bint headed                    # client: the final answer's head is here
    cdef bint bodiless                  # client: no payload may follow (HEAD)
    cdef bint reset                     # nothing more comes, nor goes
    cdef bint refused                   # the other side has not acted on it (RFC 9113 8.7): it may be sent again
    cdef bint trailing                  # its client understands trailers (te: trailers)
    cdef bint connects                  # extended CONNECT (RFC 8441)
    cdef bint counted                   # in Http2Session.active; before it is opened: promised a place there
    cdef bint too_long                  # its head was over the limit
    cdef bint grpc                      # ... and that of a gRPC call, which is told so in gRPC

    cdef ssize_t recv(self, void* data, size_t n) noexcept
    cdef ssize_t send(self, const void* data, size_t n) noexcept
    # Whether nothing is to be read now, nor known to come.
    cdef bint at_rest(self) noexcept
    # Whether all payload is taken and the message is complete.
    cdef bint complete(self) noexcept
    # Sends the head that text[0:n) begins with; returns its length, or -1. `last`: nothing follows it.
    cdef int head(self, const char* text, uint32_t n, bint last) noexcept
    # Ends our side, once what was accepted is sent.
    cdef void end(self) noexcept
    cdef void give_up(self, uint32_t error) noexcept        # RST_STREAM
    # Forgets it: the session holds it no more. An end that is still owed is a reset.
    cdef void close(self) noexcept
    cdef void taken(self, uint32_t n) noexcept

cdef class Http2Session:
    cdef bint client
    cdef bint secure                    # the connection beneath is TLS
    cdef Buffer inb                     # frames not handled
    cdef Buffer out                     # frames to be sent
    cdef void* inflater                 # nghttp2_hd_inflater*, owned
    cdef void* memos[4]                 # Memo*, owned, or NULL (http2_memos.pxi)
    cdef int memo_next                  # the oldest one's place
    cdef void* table[64]                # streams by id, chained
    cdef dict blocked                   # streams that wait for window, oldest first (values unused)
    cdef Http2 settings
    cdef uint64_t* counters
    cdef uint32_t head_limit            # bytes of a head's text
    cdef uint32_t preface_left          # of the client's preface
    cdef uint32_t last_id               # highest of the other side's streams
    cdef uint32_t next_id               # client
    cdef uint32_t refuse_above          # streams of higher ids are not taken up: GOAWAY was sent
    cdef uint32_t recent[256]           # ids of streams that were, by their lower bits; bit 31: given up by us
    cdef int active                     # streams, exchanges that outlived theirs, and streams that are promised a place
    cdef int64_t send_window
    cdef int64_t window
    cdef uint32_t owed
    cdef int64_t peer_window            # initial, of streams
    cdef uint32_t peer_streams
    cdef bint peer_settings             # they have come
    cdef bint peer_leaves               # GOAWAY came
    cdef bint peer_connects             # it takes extended CONNECT (RFC 8441 3)
    cdef bint draining                  # GOAWAY was sent
    cdef bint resized                   # our encoder's table size (none) was told
    cdef bint dead                      # nothing more is handled
    cdef bint overrun                   # more waited than may: `out` is not what the other side has to read next, and must not be sent
    cdef bint feeding
    cdef bint dirty                     # out has something, and that was told
    cdef bint acknowledged              # our SETTINGS were
    cdef bint forced                    # small pieces may go
    cdef bint released                  # its memory is to be given back
    cdef bint pinged                    # the first GOAWAY of a drain waits for its PING
    cdef bint asked                     # client: a PING of ask() waits for its answer
    cdef uint32_t asks                  # client: such PINGs since payload or a head came last
    cdef uint32_t error                 # H2_* of its end
    cdef const char* reason             # in words; NULL without one
    # -- a head block under way
    cdef Buffer block
    cdef uint32_t block_id              # 0: none
    cdef uint8_t block_flags
    cdef uint32_t block_frames
    # -- decoding
    cdef Buffer pseudo
    cdef Buffer cookie
    # -- budgets
    cdef int64_t frames_left, resets_left
    cdef int64_t frames_at, resets_at   # monotonic us, when they were last filled

    # For the engine to override.
    cdef int opened(self, Http2Stream stream) except -1             # server: a request's head is in stream.inb
    cdef int stirred(self, Http2Stream stream, int what) except -1
    cdef void wants_out(self) noexcept                              # `out` has something
    cdef void hold(self) noexcept                                   # force() is wanted at the next tick

    cdef int begin(self, bint client, Http2 settings, uint32_t head_limit, uint64_t* counters) except -1
    cdef int feed(self) except -1       # handles what is complete in `inb`
    cdef void sent(self) except *       # `out` went out: those that waited may go on
    cdef int lost(self) except -1       # the connection ended: so do its streams
    cdef Http2Stream make(self)         # client: a stream to be opened by its head
    # A place among the streams for one that is not opened yet; given back by redeem(), which goes before its head, or by its close().
    cdef void promise(self, Http2Stream stream) noexcept
    cdef void redeem(self, Http2Stream stream) noexcept
    cdef bint room(self) noexcept       # client: whether another stream may be opened now
    cdef void ask(self) noexcept        # client: whether the other side still answers
    cdef void drain(self) noexcept
    cdef void drained(self) noexcept
    cdef int fail(self, uint32_t error, const char* reason) noexcept
    cdef Http2Stream find(self, uint32_t id)
    cdef void enter(self, Http2Stream stream)
    cdef void remove(self, Http2Stream stream) noexcept
    cdef void put_frame(self, uint32_t length, uint8_t kind, uint8_t flags, uint32_t id) noexcept
    cdef void put_word(self, uint8_t kind, uint32_t id, uint32_t word) noexcept
    cdef void put_data(self, uint32_t id, const char* data, uint32_t n, bint last) noexcept
    cdef uint32_t open_block(self, uint32_t id) noexcept
    cdef void close_block(self, uint32_t at, uint32_t id, bint last) noexcept
    cdef void tell_out(self) noexcept
    cdef void earn(self, int frames) noexcept
    cdef bint pay_frame(self) noexcept
    cdef bint pay_reset(self) noexcept
    cdef int wake(self) except -1
    cdef int force(self) except -1
    cdef void release(self) noexcept
    cdef int put_handshake(self, Buffer* text) except -1
    cdef int decode(self, int what, Buffer* text, Http2Stream stream, const char* p, uint32_t n, bint last=*) except -2
    cdef int inflate(self, void* into, const char* p, uint32_t n) noexcept       # a Block of http2.pyx
