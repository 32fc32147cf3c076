"""HTTP/2 sessions and streams; see http2.pxd.

Strategy: framing and its rules are ours, so that every limit is checked before memory is spent; HPACK is decoded by nghttp2's
inflater (Huffman code and dynamic table), fed whole blocks whose size is bounded before. A block is decoded even when nobody
wants it, or the table would differ from the other side's. What a frame breaks is a stream (RST_STREAM) or the connection
(GOAWAY), as RFC 9113 says at each rule: http2_frames.pxi. What a head's fields become is in http2_fields.pxi, which heads are known
already in http2_memos.pxi.
Python is called from here: per stream, for its objects.

Safety: frames are handled only when complete in `inb`, whose block stays in place while feed() runs (nobody else appends to it).
`Http2Stream.at` points into it and is cleared before feed() turns to the next frame. Streams in the table hold a reference
taken by enter() and given back by remove(). Text is written by put_*() below, each of which reserves before it writes; what goes
into a line was checked byte by byte, so that no value can end its line.
"""

cimport cython
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset, strlen
from gateway._speedups.buffers cimport Buffer, buffer_append, buffer_consume, buffer_release, buffer_reserve
from gateway._speedups.grpc cimport is_grpc_type
from gateway._speedups.histogram cimport (
    C_H2_CALMED, C_H2_ERRORS, C_H2_FRAMES_EMPTY, C_H2_MALFORMED, C_H2_REFUSED, C_H2_RESETS_IN, C_H2_RESETS_OUT, C_H2_STREAMS)
from gateway._speedups.headers cimport (
    F_AUTHORIZATION, F_CONTENT_ENCODING, F_CONTENT_TYPE, F_COOKIE, F_EXPECT, F_IDEMPOTENCY_KEY, F_ORIGIN, F_TRACEPARENT, F_TRAILER, F_X_API_KEY,
    F_X_REQUEST_ID, field_id, field_is_identity)
from gateway._speedups.hpack cimport hpack_answer, hpack_lines, hpack_request
from gateway._speedups.http2_settings cimport WINDOW_DEFAULT, WINDOW_MAX
from gateway._speedups.sockets cimport EAGAIN, ECONNRESET, EPIPE, cw_monotonic_us
from gateway._speedups.wire cimport CW_TOKEN, CW_UPPER, cw_class, cw_decimal, cw_equals_folded, cw_reason, cw_span_value

from base64 import b64encode
from os import urandom

cdef extern from *:
    """
    #include <dlfcn.h>
    #include <nghttp2/nghttp2.h>
    static const char *cw_nghttp2_version(void) { return nghttp2_version(0)->version_str; }
    static const char *cw_nghttp2_file(void) {
        Dl_info found;
        return dladdr((void *)nghttp2_hd_inflate_new, &found) && found.dli_fname ? found.dli_fname : "";
    }
    """
    const char* cw_nghttp2_version()
    const char* cw_nghttp2_file()

cdef extern from "nghttp2/nghttp2.h" nogil:
    ctypedef struct nghttp2_nv:
        uint8_t* name
        uint8_t* value
        size_t namelen
        size_t valuelen
    ctypedef struct nghttp2_hd_inflater:
        pass
    int NGHTTP2_HD_INFLATE_FINAL, NGHTTP2_HD_INFLATE_EMIT
    int nghttp2_hd_inflate_new(nghttp2_hd_inflater** out)
    void nghttp2_hd_inflate_del(nghttp2_hd_inflater* inflater)
    ssize_t nghttp2_hd_inflate_hd2(nghttp2_hd_inflater* inflater, nghttp2_nv* field, int* flags, const uint8_t* data, size_t n,
                                   int final)
    int nghttp2_hd_inflate_end_headers(nghttp2_hd_inflater* inflater)

cdef enum:                      # frame types (RFC 9113 6)
    DATA = 0
    HEADERS
    PRIORITY
    RST_STREAM
    SETTINGS
    PUSH_PROMISE
    PING
    GOAWAY
    WINDOW_UPDATE
    CONTINUATION

cdef enum:                      # flags
    END_STREAM = 1
    ACK = 1
    END_HEADERS = 4
    PADDED = 8
    PRIORITISED = 32

cdef enum:                      # settings
    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6
    ENABLE_CONNECT_PROTOCOL = 8

cdef enum:
    HEAD = 9                    # bytes of a frame's head
    OUT_HIGH = 131072           # payload is taken while less than this waits to be sent
    OUT_LOW = 32768
    OUT_FULL = 1048576          # a server that leaves so much unread gets no further requests on this connection
    OUT_MAX = 4194304           # whoever makes us say so much and reads nothing of it is cut off
    BLOCK_MAX = 65536           # bytes of a head block, encoded
    BLOCK_FRAMES = 16           # CONTINUATION frames of one
    TRAILERS_MAX = 8192
    FRAMES_RATE = 100           # a second, into the budget of empty frames
    RESETS_RATE = 10
    SILLY = 4096                # a piece below this is not cut off for want of window
    SMALL_UPDATE = 256          # a WINDOW_UPDATE below this carries nothing
    PREPAID = 4                 # empty frames that a request pays for
    FOR_DATA = 2                # ... and payload that was sent

# What decode() is to make of a block.
cdef enum:
    REQUEST = 0
    ANSWER
    TRAILERS
    NOTHING

# What decode() found.
cdef enum:
    SOUND = 0
    MALFORMED
    BROKEN                      # COMPRESSION_ERROR
    BOMB                        # it grew beyond all measure

cdef const char* PREFACE_TEXT = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


cdef inline uint32_t word_at(const char* p) noexcept nogil:
    return (<uint32_t><uint8_t>p[0] << 24) | (<uint32_t><uint8_t>p[1] << 16) | (<uint32_t><uint8_t>p[2] << 8) | <uint8_t>p[3]


cdef inline void write_word(char* p, uint32_t word) noexcept nogil:
    p[0] = <char>(word >> 24)
    p[1] = <char>(word >> 16)
    p[2] = <char>(word >> 8)
    p[3] = <char>word


cdef inline void write_head(char* p, uint32_t length, uint8_t kind, uint8_t flags, uint32_t id) noexcept nogil:
    p[0] = <char>(length >> 16)
    p[1] = <char>(length >> 8)
    p[2] = <char>length
    p[3] = <char>kind
    p[4] = <char>flags
    write_word(p + 5, id)


def libraries() -> list:
    """The nghttp2 that decodes heads: its version, and the file it was loaded from."""
    return [f"nghttp2 {cw_nghttp2_version().decode()}", cw_nghttp2_file().decode()]


include "http2_fields.pxi"
include "http2_memos.pxi"


@cython.freelist(256)
cdef class Http2Stream:
    """One exchange's half of a connection."""

    def __cinit__(self):
        memset(&self.inb, 0, sizeof(Buffer))
        memset(&self.trailers, 0, sizeof(Buffer))
        memset(&self.closing_lines, 0, sizeof(Buffer))
        self.expected = -1

    def __dealloc__(self):
        buffer_release(&self.inb)
        buffer_release(&self.trailers)
        buffer_release(&self.closing_lines)

    cdef ssize_t recv(self, void* data, size_t n) noexcept:
        cdef uint32_t there = self.inb.end - self.inb.start
        cdef uint32_t left = self.at_left
        cdef uint32_t text
        if self.expected > 0 and self.received == self.expected and not self.ended:
            # All that was announced is here, and not the end: its last byte waits for that, so that nobody takes the message for
            # complete before the sender has said so, and trailers find it open.
            if left:
                left -= 1
            elif there > self.text_left:
                there -= 1
        if there:
            if there > n:
                there = <uint32_t>n
            memcpy(data, self.inb.base + self.inb.start, there)
            buffer_consume(&self.inb, there)
            if self.inb.end == self.inb.start:
                buffer_release(&self.inb)
            text = there if there < self.text_left else self.text_left
            self.text_left -= text
            if there > text:
                self.taken(there - text)
            return there
        if left and self.inb.end == self.inb.start:
            there = left if left < n else <uint32_t>n
            memcpy(data, self.at, there)
            self.at += there
            self.at_left -= there
            self.taken(there)
            return there
        if self.ended:
            return 0
        return -ECONNRESET if self.reset else -EAGAIN

    cdef void taken(self, uint32_t n) noexcept:
        """Payload was taken: its window is given back, in large pieces."""
        cdef Http2Session session = self.session
        if session is None or session.dead:
            return
        self.owed += n
        session.owed += n
        if session.owed >= session.settings.connection_window >> 1:
            session.put_word(WINDOW_UPDATE, 0, session.owed)
            session.window += session.owed
            session.owed = 0
        if self.owed >= session.settings.window >> 1 and not self.ended and not self.reset:
            session.put_word(WINDOW_UPDATE, self.id, self.owed)
            self.window += self.owed
            self.owed = 0

    cdef ssize_t send(self, const void* data, size_t n) noexcept:
        cdef Http2Session session = self.session
        cdef int64_t room
        cdef bint ends
        if session is None or session.dead or self.reset or self.done:
            return -EPIPE
        room = self.send_window if self.send_window < session.send_window else session.send_window
        if room > OUT_HIGH - <int64_t>(session.out.end - session.out.start):
            room = OUT_HIGH - <int64_t>(session.out.end - session.out.start)
        if room <= 0:
            session.blocked[self] = None
            return -EAGAIN
        if <int64_t>n < room:
            room = n
        elif room < SILLY and room < <int64_t>n and 2 * room < session.peer_window and not session.forced:
            # Pieces that only get smaller (RFC 1122 4.2.3.4): more window is waited for, until the next tick at most.
            session.blocked[self] = None
            session.hold()
            return -EAGAIN
        ends = self.last and room == <int64_t>n and self.closing_lines.end == self.closing_lines.start
        session.put_data(self.id, <const char*>data, <uint32_t>room, ends)
        self.send_window -= room
        session.send_window -= room
        if room < <int64_t>n:
            session.blocked[self] = None
            if room >= SILLY:
                session.earn(FOR_DATA)
            return room
        session.earn(FOR_DATA)                      # it will be acknowledged, in small pieces perhaps
        if ends:
            self.done = True
        elif self.last:
            self.end()
        return room

    cdef bint at_rest(self) noexcept:
        return self.inb.end == self.inb.start and self.at_left == 0 and not self.ended and not self.reset

    cdef bint complete(self) noexcept:
        return self.ended and self.inb.end == self.inb.start and self.at_left == 0

    cdef int head(self, const char* text, uint32_t n, bint last) noexcept:
        cdef Http2Session session = self.session
        cdef uint32_t at, length = 0
        cdef int result
        if session is None or session.dead or self.reset or self.done:
            return -1
        if self.id == 0:
            if not session.room():
                self.reset = self.refused = True
                return -1
            self.id = session.next_id
            session.next_id += 2
            session.earn(PREPAID)
            self.send_window = session.peer_window
            session.enter(self)
        at = session.open_block(self.id)
        if session.client:
            self.bodiless = n > 5 and memcmp(text, b"HEAD ", 5) == 0
            result = hpack_request(&session.out, text, n, session.secure, self.trailing, &length)
        else:
            result = hpack_answer(&session.out, text, n, &length)
        if result < 0:
            session.fail(H2_INTERNAL_ERROR, b"a head could not be encoded")
            return -1
        self.last = last
        self.done = last and length == n and self.closing_lines.end == self.closing_lines.start
        session.close_block(at, self.id, self.done)
        if last and length == n and not self.done:
            self.end()
        return <int>length

    cdef void end(self) noexcept:
        """Whatever was accepted before is in `out` already."""
        cdef Http2Session session = self.session
        cdef uint32_t at
        self.last = True
        if self.done or session is None or session.dead or self.reset:
            return
        self.done = True
        if self.closing_lines.end > self.closing_lines.start:
            at = session.open_block(self.id)
            if hpack_lines(&session.out, self.closing_lines.base + self.closing_lines.start,
                           self.closing_lines.end - self.closing_lines.start) < 0:
                session.fail(H2_INTERNAL_ERROR, b"a head could not be encoded")
                return
            session.close_block(at, self.id, True)
            buffer_release(&self.closing_lines)
        else:
            session.put_data(self.id, NULL, 0, True)

    cdef void give_up(self, uint32_t error) noexcept:
        cdef Http2Session session = self.session
        if session is None or self.reset:
            return
        self.reset = True
        self.error = error
        if self.id and not session.dead and not (self.done and self.ended):
            session.put_word(RST_STREAM, self.id, error)
            session.counters[C_H2_RESETS_OUT] += 1
            session.recent[(self.id >> 1) & (RECENT - 1)] |= 0x80000000

    cdef void close(self) noexcept:
        cdef Http2Session session = self.session
        cdef uint32_t left
        if session is None:
            return
        if not (self.done and self.ended):
            # After a complete answer the rest of the request is not wanted, and that is no error (RFC 9113 8.1).
            self.give_up(H2_NO_ERROR if self.done and not session.client else H2_CANCEL)
        left = self.inb.end - self.inb.start - self.text_left + self.at_left
        self.at_left = 0
        if left:
            self.taken(left)
        if session.blocked:
            session.blocked.pop(self, None)
        session.remove(self)
        self.session = None
        self.owner = None
        buffer_release(&self.inb)
        buffer_release(&self.trailers)
        buffer_release(&self.closing_lines)


cdef class Http2Session:
    """One connection's frames."""

    def __cinit__(self):
        memset(&self.inb, 0, sizeof(Buffer))
        memset(&self.out, 0, sizeof(Buffer))
        memset(&self.block, 0, sizeof(Buffer))
        memset(&self.pseudo, 0, sizeof(Buffer))
        memset(&self.cookie, 0, sizeof(Buffer))
        memset(self.table, 0, sizeof(self.table))
        memset(self.recent, 0, sizeof(self.recent))
        memset(self.memos, 0, sizeof(self.memos))
        self.blocked = {}

    def __dealloc__(self):
        self.release()

    cdef int opened(self, Http2Stream stream) except -1:
        return 0

    cdef int stirred(self, Http2Stream stream, int what) except -1:
        return 0

    cdef void wants_out(self) noexcept:
        pass

    cdef void hold(self) noexcept:
        pass

    # -- life ---------------------------------------------------------------------------------------------------------

    cdef int begin(self, bint client, Http2 settings, uint32_t head_limit, uint64_t* counters) except -1:
        cdef nghttp2_hd_inflater* inflater = NULL
        cdef char words[36]
        cdef uint32_t n
        if nghttp2_hd_inflate_new(&inflater) != 0:
            raise MemoryError
        self.inflater = <void*>inflater
        self.client = client
        self.settings = settings
        self.counters = counters
        self.head_limit = head_limit
        self.next_id = 1
        self.refuse_above = WINDOW_MAX
        self.send_window = self.peer_window = WINDOW_DEFAULT
        self.window = WINDOW_DEFAULT
        self.peer_streams = 100                     # until it says otherwise; unlimited is nobody's wish
        self.frames_left = settings.frames
        self.resets_left = settings.resets
        self.frames_at = self.resets_at = cw_monotonic_us()
        if client:
            buffer_append(&self.out, PREFACE_TEXT, PREFACE)
        else:
            self.preface_left = PREFACE
        n = 0
        if client:
            n += write_setting(words + n, ENABLE_PUSH, 0)
        else:
            n += write_setting(words + n, MAX_CONCURRENT_STREAMS, settings.streams)
            n += write_setting(words + n, ENABLE_CONNECT_PROTOCOL, 1)
        n += write_setting(words + n, INITIAL_WINDOW_SIZE, settings.window)
        n += write_setting(words + n, MAX_HEADER_LIST_SIZE, head_limit)
        self.put_frame(n, SETTINGS, 0, 0)
        buffer_append(&self.out, words, n)
        if settings.connection_window > WINDOW_DEFAULT:
            self.put_word(WINDOW_UPDATE, 0, settings.connection_window - WINDOW_DEFAULT)
            self.window = settings.connection_window
        return 0

    cdef void drain(self) noexcept:
        """No more streams, in two steps, so that none that is on its way is lost (RFC 9113 6.8)."""
        cdef char words[8]
        if self.draining or self.dead or self.client:
            return
        self.draining = True
        self.pinged = True
        self.put_frame(8, GOAWAY, 0, 0)
        write_word(words, WINDOW_MAX)
        write_word(words + 4, H2_NO_ERROR)
        buffer_append(&self.out, words, 8)
        self.put_frame(8, PING, 0, 0)
        buffer_append(&self.out, b"draining", 8)
        self.tell_out()

    cdef void drained(self) noexcept:
        """The second step: streams above the last one are not taken up any more."""
        cdef char words[8]
        if not self.pinged or self.dead:
            return
        self.pinged = False
        self.refuse_above = self.last_id
        self.put_frame(8, GOAWAY, 0, 0)
        write_word(words, self.last_id)
        write_word(words + 4, H2_NO_ERROR)
        buffer_append(&self.out, words, 8)
        self.tell_out()

    cdef void ask(self) noexcept:
        if self.dead:
            return
        self.asked = True
        self.asks += 1
        self.put_frame(8, PING, 0, 0)
        buffer_append(&self.out, b"crossway", 8)

    cdef int fail(self, uint32_t error, const char* reason) noexcept:
        """The connection is at its end: GOAWAY, and nothing more is handled. Always 0."""
        cdef char words[8]
        if self.dead:
            return 0
        self.put_frame(8, GOAWAY, 0, 0)
        write_word(words, 0 if self.client else min(self.last_id, self.refuse_above))
        write_word(words + 4, error)
        buffer_append(&self.out, words, 8)
        self.tell_out()
        self.dead = True
        self.error = error
        self.reason = reason
        self.counters[C_H2_ERRORS] += 1
        if error == H2_ENHANCE_YOUR_CALM:
            self.counters[C_H2_CALMED] += 1
        return 0

    cdef void release(self) noexcept:
        """Gives back all memory but the object's own; while frames are being handled that waits until they are."""
        if self.feeding:
            return
        buffer_release(&self.inb)
        buffer_release(&self.out)
        buffer_release(&self.block)
        buffer_release(&self.pseudo)
        buffer_release(&self.cookie)
        forget(self)
        if self.inflater != NULL:
            nghttp2_hd_inflate_del(<nghttp2_hd_inflater*>self.inflater)
            self.inflater = NULL

    cdef int lost(self) except -1:
        cdef Http2Stream stream
        cdef int i
        cdef list streams = []
        self.dead = True
        for i in range(64):
            at = self.table[i]
            while at != NULL:
                stream = <Http2Stream>at
                streams.append(stream)
                at = stream.following
        for stream in streams:
            if not stream.reset:
                stream.reset = True
                stream.error = self.error or H2_CANCEL
                if stream.session is not None:
                    self.stirred(stream, STIR_RESET)
        self.blocked.clear()
        return 0

    # -- streams ------------------------------------------------------------------------------------------------------

    cdef Http2Stream find(self, uint32_t id):
        cdef void* at = self.table[(id >> 1) & 63]
        while at != NULL:
            if (<Http2Stream>at).id == id:
                return <Http2Stream>at
            at = (<Http2Stream>at).following
        return None

    cdef void enter(self, Http2Stream stream):
        cdef uint32_t slot = (stream.id >> 1) & 63
        Py_INCREF(stream)
        stream.following = self.table[slot]
        self.table[slot] = <void*>stream
        stream.counted = True
        self.active += 1
        self.recent[(stream.id >> 1) & (RECENT - 1)] = stream.id
        self.counters[C_H2_STREAMS] += 1

    cdef void remove(self, Http2Stream stream) noexcept:
        cdef uint32_t slot = (stream.id >> 1) & 63
        cdef void* at = self.table[slot]
        cdef void* before = NULL
        while at != NULL and at != <void*>stream:
            before = at
            at = (<Http2Stream>at).following
        if at == NULL:
            self.redeem(stream)                     # it was never opened
            return
        if before == NULL:
            self.table[slot] = stream.following
        else:
            (<Http2Stream>before).following = stream.following
        stream.following = NULL
        if stream.counted:
            stream.counted = False
            self.active -= 1
        Py_DECREF(stream)

    cdef Http2Stream make(self):
        cdef Http2Stream stream = Http2Stream.__new__(Http2Stream)
        stream.session = self
        stream.window = self.settings.window
        return stream

    cdef void promise(self, Http2Stream stream) noexcept:
        if not stream.counted:
            stream.counted = True
            self.active += 1

    cdef void redeem(self, Http2Stream stream) noexcept:
        if stream.counted and stream.id == 0:
            stream.counted = False
            self.active -= 1

    cdef bint room(self) noexcept:
        cdef uint32_t most = self.settings.streams if self.settings.streams < self.peer_streams else self.peer_streams
        return not self.dead and not self.peer_leaves and not self.draining and <uint32_t>self.active < most and \
            self.next_id < <uint32_t>WINDOW_MAX - 2 and self.out.end - self.out.start < OUT_FULL

    # -- frames that leave --------------------------------------------------------------------------------------------

    cdef void tell_out(self) noexcept:
        if not self.dirty:
            self.dirty = True
            self.wants_out()

    cdef void put_frame(self, uint32_t length, uint8_t kind, uint8_t flags, uint32_t id) noexcept:
        """A frame's head; room for its payload is there as well."""
        if buffer_reserve(&self.out, HEAD + length) < 0 or self.out.end - self.out.start > OUT_MAX:
            # What waited is dropped, perhaps from the middle of a frame: nothing that is written from here on may go out behind it.
            buffer_release(&self.out)
            buffer_reserve(&self.out, HEAD + length)
            self.overrun = True
            if not self.dead:
                self.dead = True
                self.counters[C_H2_ERRORS] += 1
                self.counters[C_H2_CALMED] += 1
            self.error = H2_ENHANCE_YOUR_CALM
            self.reason = b"too much waits to be read"
        write_head(self.out.base + self.out.end, length, kind, flags, id)
        self.out.end += HEAD
        self.tell_out()

    cdef void put_word(self, uint8_t kind, uint32_t id, uint32_t word) noexcept:
        self.put_frame(4, kind, 0, id)
        write_word(self.out.base + self.out.end, word)
        self.out.end += 4

    cdef void put_data(self, uint32_t id, const char* data, uint32_t n, bint last) noexcept:
        cdef uint32_t piece
        while True:
            piece = n if n < FRAME_MAX else FRAME_MAX
            n -= piece
            self.put_frame(piece, DATA, END_STREAM if last and n == 0 else 0, id)
            if piece:
                memcpy(self.out.base + self.out.end, data, piece)
                self.out.end += piece
                data += piece
            if n == 0:
                return

    cdef uint32_t open_block(self, uint32_t id) noexcept:
        """Begins HEADERS; returns where, counted from the front of what waits: the window may move while the block grows."""
        cdef uint32_t at
        self.put_frame(0, HEADERS, 0, id)
        at = self.out.end - self.out.start - HEAD   # looked up behind put_frame(), which may have dropped all that was before it
        if not self.resized:
            self.resized = True
            buffer_append(&self.out, b"\x20", 1)    # a dynamic table of no bytes (RFC 7541 6.3): ours has none
        return at

    cdef void close_block(self, uint32_t at, uint32_t id, bint last) noexcept:
        """The block from `at` on is complete: its length and flags, and CONTINUATION frames if it is long."""
        cdef uint32_t length = self.out.end - self.out.start - at - HEAD
        cdef uint32_t piece, more
        cdef char* base
        piece = length if length < FRAME_MAX else FRAME_MAX
        write_head(self.out.base + self.out.start + at, piece, HEADERS,
                   (END_STREAM if last else 0) | (END_HEADERS if piece == length else 0), id)
        while piece < length:
            length -= piece
            at += HEAD + piece
            piece = length if length < FRAME_MAX else FRAME_MAX
            if buffer_reserve(&self.out, HEAD) < 0:
                self.dead = True
                return
            base = self.out.base + self.out.start + at
            for more in range(length):              # from the back: the two overlap
                base[HEAD + length - 1 - more] = base[length - 1 - more]
            self.out.end += HEAD
            write_head(base, piece, CONTINUATION, END_HEADERS if piece == length else 0, id)

    cdef void sent(self) except *:
        self.dirty = False
        if self.blocked and not self.dead:
            self.wake()

    cdef int force(self) except -1:
        """The tick: small pieces may go."""
        if self.dead:
            return 0
        self.forced = True
        try:
            self.wake()
        finally:
            self.forced = False
        return 0

    cdef int wake(self) except -1:
        """Those that waited for window or room, as far as there is some, in the order in which they came."""
        cdef Http2Stream stream
        if self.send_window <= 0 or self.out.end - self.out.start > OUT_LOW:
            return 0
        for stream in list(self.blocked):
            if self.send_window <= 0 or self.out.end - self.out.start >= OUT_HIGH:
                return 0
            if stream.session is None:
                self.blocked.pop(stream, None)
            elif stream.send_window > 0:
                self.blocked.pop(stream, None)
                self.stirred(stream, STIR_WRITE)
        return 0

    # -- budgets ------------------------------------------------------------------------------------------------------

    cdef void earn(self, int frames) noexcept:
        """Real work: it may cost as many frames that carry nothing, such as acknowledgements and measurements."""
        if self.frames_left < <int64_t>self.settings.frames:
            self.frames_left += frames

    cdef bint pay_frame(self) noexcept:
        """For a frame that carries nothing. False when that was one too many: the connection is over."""
        cdef int64_t now, gained
        self.counters[C_H2_FRAMES_EMPTY] += 1
        self.frames_left -= 1
        if self.frames_left >= 0:
            return True
        now = cw_monotonic_us()
        gained = (now - self.frames_at) * FRAMES_RATE // 1000000
        self.frames_at = now
        self.frames_left += gained
        if self.frames_left > <int64_t>self.settings.frames:
            self.frames_left = self.settings.frames
        if self.frames_left < 0:
            self.fail(H2_ENHANCE_YOUR_CALM, b"too many frames that carry nothing")
            return False
        return True

    cdef bint pay_reset(self) noexcept:
        """For a stream that the client gave up, or made us give up."""
        cdef int64_t now, gained
        if self.client:
            return True
        self.resets_left -= 1
        if self.resets_left >= 0:
            return True
        now = cw_monotonic_us()
        gained = (now - self.resets_at) * RESETS_RATE // 1000000
        self.resets_at = now
        self.resets_left += gained
        if self.resets_left > <int64_t>self.settings.resets:
            self.resets_left = self.settings.resets
        if self.resets_left < 0:
            self.fail(H2_ENHANCE_YOUR_CALM, b"too many streams given up")
            return False
        return True

    # -- frames that arrive -------------------------------------------------------------------------------------------

    cdef int feed(self) except -1:
        cdef const char* p
        cdef uint32_t there, length, n, id
        cdef uint8_t kind
        if self.feeding:
            return 0
        self.feeding = True
        try:
            while not self.dead:
                p = self.inb.base + self.inb.start
                there = self.inb.end - self.inb.start
                if self.preface_left and there:
                    n = there if there < self.preface_left else self.preface_left
                    if memcmp(p, PREFACE_TEXT + (PREFACE - self.preface_left), n) != 0:
                        self.fail(H2_PROTOCOL_ERROR, b"no HTTP/2 preface")
                        break
                    self.preface_left -= n
                    buffer_consume(&self.inb, n)
                    continue
                if there < HEAD:
                    break
                length = (<uint32_t><uint8_t>p[0] << 16) | (<uint32_t><uint8_t>p[1] << 8) | <uint8_t>p[2]
                kind = <uint8_t>p[3]
                if length > FRAME_MAX:
                    self.fail(H2_FRAME_SIZE_ERROR, b"a frame is too large")
                    break
                if there < HEAD + length:
                    break
                id = word_at(p + 5) & 0x7fffffff
                take_frame(self, kind, <uint8_t>p[4], id, p + HEAD, length)
                self.inb.start += HEAD + length
            if self.inb.start == self.inb.end or self.dead:
                buffer_release(&self.inb)
        finally:
            self.feeding = False
            if self.released:
                self.release()
        return 0

    # -- heads --------------------------------------------------------------------------------------------------------

    cdef int decode(self, int what, Buffer* text, Http2Stream stream, const char* p, uint32_t n, bint last=True) except -2:
        """Decodes a block into `text`; `last`: the message ends with it. Of BROKEN and BOMB the connection has died already."""
        cdef Block block
        cdef int found
        cdef uint32_t before = text.end - text.start if text != NULL else 0
        cdef uint32_t limit = TRAILERS_MAX if what == TRAILERS else self.head_limit
        cdef bint indexed = only_indexed(<const uint8_t*>p, n)
        cdef bint open = not last and not (what == ANSWER and stream.bodiless)
        cdef Memo* memo = recall(self, what, open, <const uint8_t*>p, n) if indexed else NULL
        if memo != NULL and before + memo.size <= limit:
            said(stream, what, memo.status, memo.expected, memo.trailing, memo.grpc)
            return SOUND if buffer_append(text, memo_text(memo), memo.size) == 0 else MALFORMED
        if not indexed:
            forget(self)
        memset(&block, 0, sizeof(block))
        block.what = what
        block.text = text
        block.pseudo = &self.pseudo
        block.cookie = &self.cookie
        block.limit = limit
        block.expected = -1
        block.open = open
        found = self.inflate(&block, p, n)
        if found != SOUND or what == NOTHING:
            return found
        if not block.malformed:
            finish_block(&block)
        buffer_release(&self.pseudo)
        buffer_release(&self.cookie)
        said(stream, what, block.status, block.expected, block.trailing, block.grpc)
        stream.too_long = stream.too_long or block.too_long
        if block.malformed or (what == TRAILERS and block.too_long):
            return MALFORMED
        if block.connects:
            stream.connects = True
            self.put_handshake(text)
        elif indexed and not block.too_long:
            keep(self, &block, <const uint8_t*>p, n, text.base + text.start + before, text.end - text.start - before)
        return SOUND

    cdef int inflate(self, void* into, const char* p, uint32_t n) noexcept:
        """Decodes a block's fields one by one into a Block."""
        cdef Block* block = <Block*>into
        cdef nghttp2_hd_inflater* inflater = <nghttp2_hd_inflater*>self.inflater
        cdef nghttp2_nv field
        cdef int flags
        cdef ssize_t used
        cdef uint64_t total = 0
        while True:
            flags = 0
            used = nghttp2_hd_inflate_hd2(inflater, &field, &flags, <const uint8_t*>p, n, 1)
            if used < 0:
                self.fail(H2_COMPRESSION_ERROR, b"a head block that cannot be decoded")
                return BROKEN
            p += used
            n -= <uint32_t>used
            if flags & NGHTTP2_HD_INFLATE_EMIT:
                total += field.namelen + field.valuelen + 32
                if total > 4 * <uint64_t>self.head_limit + BLOCK_MAX:
                    self.fail(H2_ENHANCE_YOUR_CALM, b"a head that grows without end")
                    return BOMB
                if block.what != NOTHING and not block.malformed:
                    take_field(block, field.name, field.namelen, field.value, field.valuelen)
            if flags & NGHTTP2_HD_INFLATE_FINAL:
                nghttp2_hd_inflate_end_headers(inflater)
                return SOUND
            if not flags & NGHTTP2_HD_INFLATE_EMIT and n == 0:
                self.fail(H2_COMPRESSION_ERROR, b"a head block that cannot be decoded")
                return BROKEN

    cdef int put_handshake(self, Buffer* text) except -1:
        """The rest of a WebSocket handshake as HTTP/1.1 has it: here the stream itself stands for the key's proof (RFC 8441 5)."""
        cdef bytes key = b64encode(urandom(16))
        text.end -= 2                               # the empty line
        put_field(text, b"connection", 10, b"upgrade", 7)
        put_field(text, b"upgrade", 7, b"websocket", 9)
        put_field(text, b"sec-websocket-key", 17, key, len(key))
        buffer_append(text, b"\r\n", 2)
        return 0


cdef uint32_t write_setting(char* p, uint32_t which, uint32_t value) noexcept nogil:
    p[0] = <char>(which >> 8)
    p[1] = <char>which
    write_word(p + 2, value)
    return 6


include "http2_frames.pxi"
