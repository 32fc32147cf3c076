"""The parser, the path normaliser, the decoders of bodies and a race as Python functions, for tests and fuzzing only.

Strategy: every input is copied into a malloc block of exactly its size before it is parsed, so that a sanitizer build
reports a read of one byte too many; nothing of the gateway imports this module.
Python is called from here: per call, never from a request.

Safety: `Copy` owns the block for as long as a pointer into it is used; slices are taken from the original bytes object
with the parser's offsets, so a wrong offset shows as a wrong value, not as a wild read.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy
from gateway._speedups.buffers cimport Buffer, buffer_length, buffer_release
from gateway._speedups.grpc_web cimport (
    WEB_BAD_BASE64, WEB_BAD_FRAME, WEB_BINARY, WEB_CUT, WEB_TEXT, WEB_TYPE_MAX, WebBody, web_answer_type, web_decode, web_encode,
    web_finish, web_kind, web_request_type, web_reset, web_trailers, web_wants_text,
)
from gateway._speedups.http2 cimport MEMOS, STIR_RESET, Http2Session, Http2Stream
from gateway._speedups.http2_settings cimport Http2
from gateway._speedups.client_hello cimport (
    HELLO_MALFORMED, HELLO_MAX, HELLO_NAME, HELLO_NOT_TLS, HELLO_TOO_LONG, parse_client_hello as parse_hello_records,
)
from gateway._speedups.headers cimport FIELD_DROP, FIELD_IDENTITY, Field, Head, head_mark_hop_by_hop, head_reset
from gateway._speedups.upstream_state cimport UpstreamState
from gateway._speedups.http1 cimport (
    CHUNK_DONE, Chunked, Limits, chunked_decode, chunked_reset, error_detail, error_slug, error_status, normalise_path as normalise,
    parse_request as parse_request_head, parse_response as parse_response_head,
)


class ParseError(ValueError):
    """What the parser refuses: `status` is the answer's, `slug` names the rule."""

    def __init__(self, status: int, slug: str, detail: str) -> None:
        super().__init__(f"{status} {slug}: {detail}")
        self.status = status
        self.slug = slug
        self.detail = detail


cdef object refused(int error):
    return ParseError(error_status(error), (<bytes>error_slug(error)).decode(), (<bytes>error_detail(error)).decode())


cdef class Copy:
    """A malloc block with exactly the bytes that were given; never empty, so that it has an address."""

    cdef char* data
    cdef uint32_t length

    def __cinit__(self, const unsigned char[:] source not None):
        self.length = <uint32_t>source.shape[0]
        self.data = <char*>malloc(self.length if self.length else 1)
        if self.data == NULL:
            raise MemoryError
        if self.length:
            memcpy(self.data, &source[0], self.length)

    def __dealloc__(self):
        free(self.data)


cdef dict described(bytes data, Head* head, bint request):
    """The head as Python values; offsets are applied to `data`, which holds the same bytes."""
    cdef list fields = []
    cdef int i
    cdef Field* field
    for i in range(head.count):
        field = &head.fields[i]
        fields.append((data[field.name:field.name + field.name_len], data[field.value:field.value + field.value_len]))
    found = {
        "fields": fields,
        "dropped": [bool(head.fields[i].flags & FIELD_DROP) for i in range(head.count)],
        "identity": [bool(head.fields[i].flags & FIELD_IDENTITY) for i in range(head.count)],
        "lines": [data[head.fields[i].name:head.fields[i].name + head.fields[i].line_len] for i in range(head.count)],
        "length": head.length,
        "minor": head.minor,
        "chunked": bool(head.chunked),
        "content_length": None if head.content_length < 0 else head.content_length,
        "close": bool(head.close),
        "keep_alive": bool(head.keep_alive),
    }
    if request:
        found["method"] = data[head.method_at:head.method_at + head.method_len]
        found["path"] = data[head.path_at:head.path_at + head.path_len]
        found["query"] = data[head.query_at:head.query_at + head.query_len] if head.has_query else None
        found["host"] = data[head.host_at:head.host_at + head.host_len]
        found["path_plain"] = bool(head.path_plain)
        found["expect"] = bool(head.expect)
    else:
        found["status"] = head.status
        found["reason"] = data[head.reason_at:head.reason_at + head.reason_len]
    return found


cdef object parse(bytes data, object chunks, Limits limits, bint request):
    """Parse data[:n] for each n of `chunks` in turn, as a connection does while bytes arrive."""
    cdef Head* head = <Head*>malloc(sizeof(Head))
    cdef Copy copy
    cdef int result = 0
    if head == NULL:
        raise MemoryError
    try:
        head_reset(head)
        for n in (*(chunks or ()), len(data)):
            copy = Copy(data[:n])
            if request:
                result = parse_request_head(copy.data, copy.length, head, &limits)
            else:
                result = parse_response_head(copy.data, copy.length, head, &limits)
            if result < 0:
                raise refused(-result)
            if result > 0:
                head.base = copy.data
                head_mark_hop_by_hop(head)
                return described(data, head, request)
        return None
    finally:
        free(head)


def parse_request(data: bytes, chunks=None, *, head: int = 32768, target: int = 8192, fields: int = 100):
    """Return the request head at the front of `data` as a dict, None while it is incomplete; raises ParseError.

    `chunks` are lengths, ascending: the parser is called with each prefix in turn and keeps its state.
    """
    return parse(data, chunks, Limits(head, target, fields), True)


def parse_response(data: bytes, chunks=None, *, head: int = 32768, target: int = 8192, fields: int = 100):
    """The same for the head of a response."""
    return parse(data, chunks, Limits(head, target, fields), False)


def scanned_bytes(data: bytes, chunks) -> int:
    """Return how many bytes the parser looks at for a line's end when the prefixes data[:n] arrive one after the other."""
    cdef Head* head = <Head*>malloc(sizeof(Head))
    cdef Limits limits = Limits(1 << 20, 1 << 20, 256)
    cdef Copy copy
    steps = 0
    if head == NULL:
        raise MemoryError
    try:
        head_reset(head)
        for n in chunks:
            copy = Copy(data[:n])
            steps += copy.length - (head.scanned if head.scanned > head.line else head.line)
            if parse_request_head(copy.data, copy.length, head, &limits) != 0:
                break
        return steps
    finally:
        free(head)


def decode_chunked(pieces):
    """Decode the pieces one after the other; returns (payload, bytes consumed, done) or raises ParseError."""
    cdef Chunked state
    cdef uint32_t used = 0
    cdef int64_t kept
    cdef Copy copy
    consumed = 0
    payload = []
    chunked_reset(&state)
    for piece in pieces:
        copy = Copy(piece)
        kept = chunked_decode(&state, copy.data, copy.length, &used)
        if kept < 0:
            raise refused(<int>-kept)
        payload.append(copy.data[:kept])
        consumed += used
        if state.state == CHUNK_DONE:
            break
    return b"".join(payload), consumed, state.state == CHUNK_DONE


cdef class WebCodec:
    """One direction of a gRPC-Web call; raises ValueError with the reason's name."""

    cdef WebBody body
    cdef Buffer out

    def __cinit__(self, bint text):
        web_reset(&self.body, text)

    def __dealloc__(self):
        buffer_release(&self.out)

    cdef bytes taken(self, int result):
        cdef bytes made = self.out.base[self.out.start:self.out.end] if buffer_length(&self.out) else b""
        buffer_release(&self.out)               # so that each piece is written to the begin of a block
        if result < 0:
            raise ValueError({WEB_BAD_BASE64: "base64", WEB_BAD_FRAME: "frame", WEB_CUT: "cut"}.get(result, "memory"))
        return made

    def decode(self, data: bytes) -> bytes:
        cdef Copy copy = Copy(data)
        return self.taken(web_decode(&self.body, copy.data, copy.length, &self.out))

    def encode(self, data: bytes) -> bytes:
        cdef Copy copy = Copy(data)
        return self.taken(web_encode(&self.body, copy.data, copy.length, &self.out))

    def trailers(self, lines: bytes) -> bytes:
        cdef Copy copy = Copy(lines)
        return self.taken(web_trailers(&self.body, copy.data, copy.length, &self.out))

    def finish(self) -> None:
        self.taken(web_finish(&self.body))


def web_types(value: bytes):
    """Return (kind, content type to the service, of a binary answer, of an answer in text) for a client's or a service's type."""
    cdef Copy copy = Copy(value)
    cdef char out[WEB_TYPE_MAX]
    cdef uint32_t suffix, suffix_len
    cdef int kind = web_kind(copy.data, copy.length, &suffix, &suffix_len)
    types = [out[:web_request_type(copy.data, copy.length, out)]]
    types.append(out[:web_answer_type(False, copy.data, copy.length, out)])
    types.append(out[:web_answer_type(True, copy.data, copy.length, out)])
    return {WEB_BINARY: "binary", WEB_TEXT: "text"}.get(kind), *types


def web_accepts_text(value: bytes) -> bool:
    """Tell whether an Accept asks for gRPC-Web in text."""
    cdef Copy copy = Copy(value)
    return web_wants_text(copy.data, copy.length)


cdef class Http2Probe(Http2Session):
    """One side of an HTTP/2 connection that takes all it gets and says nothing but what the protocol demands.

    Frames are handled in a block of exactly their size, so that a sanitizer build reports a read of one byte too many. A forgetful one
    decodes every head anew.
    """

    cdef readonly list heads            # texts, requests' or answers'
    cdef readonly list ends             # (id, payload, trailers, whole) of each stream that ended
    cdef dict bodies
    cdef bint forgetful
    cdef uint64_t numbers[128]

    def __init__(self, bint client, Http2 settings not None, int limit=8192, bint forgetful=False):
        self.forgetful = forgetful
        self.heads = []
        self.ends = []
        self.bodies = {}
        self.begin(client, settings, limit, self.numbers)

    cdef int opened(self, Http2Stream stream) except -1:
        self.heads.append(stream.inb.base[stream.inb.start:stream.inb.end])
        stream.text_left = 0
        buffer_release(&stream.inb)
        self.bodies[stream.id] = b""
        return self.stirred(stream, 0)

    cdef int stirred(self, Http2Stream stream, int what) except -1:
        cdef char piece[1000]
        cdef ssize_t n = stream.recv(piece, sizeof(piece))
        cdef int i
        for i in range(MEMOS if self.forgetful else 0):
            free(self.memos[i])
            self.memos[i] = NULL
        while n > 0:
            self.bodies[stream.id] = self.bodies.get(stream.id, b"") + piece[:n]
            n = stream.recv(piece, sizeof(piece))
        if n == 0 or what & STIR_RESET:
            trailers = stream.trailers.base[stream.trailers.start:stream.trailers.end] if buffer_length(&stream.trailers) else b""
            self.ends.append((stream.id, self.bodies.pop(stream.id, b""), trailers, n == 0))
            stream.close()
        return 0

    def ask(self, text: bytes) -> int:
        """Open a stream by a request's head (a client's); returns its id, 0 when there is no room."""
        cdef Http2Stream stream = self.make()
        stream.head(text, <uint32_t>len(text), True)
        return stream.id

    def take(self, data: bytes) -> bytes:
        """Handle these bytes; returns what is to be sent."""
        cdef uint32_t kept = self.inb.end - self.inb.start
        cdef char* block = <char*>malloc(kept + len(data) + 1)
        if block == NULL:
            raise MemoryError
        if kept:
            memcpy(block, self.inb.base + self.inb.start, kept)
        memcpy(block + kept, <const char*>data, len(data))
        if self.inb.base != NULL:
            free(self.inb.base)
        self.inb.base = <char*>realloc(block, kept + len(data)) if kept + len(data) else block
        self.inb.start = 0
        self.inb.end = kept + <uint32_t>len(data)
        self.inb.cap = self.inb.end if self.inb.end else 1
        self.feed()
        return self.said()

    def leave(self) -> None:
        """Say both GOAWAYs of a drain (a server's), as if the client's answer to the first one had not been waited for."""
        self.drain()
        self.drained()

    def said(self) -> bytes:
        """What is to be sent."""
        made = self.out.base[self.out.start:self.out.end] if buffer_length(&self.out) else b""
        buffer_release(&self.out)
        self.sent()
        return made

    def close(self) -> None:
        """Lose the connection: its open streams hold it, and it them, until then."""
        self.lost()

    @property
    def over(self):
        """(error, reason) when the connection is over."""
        return (self.error, None if self.reason == NULL else self.reason.decode()) if self.dead else None


def normalise_path(path: bytes) -> bytes:
    """Return the path as it is matched and forwarded; raises ParseError."""
    cdef Copy source = Copy(path)
    cdef Copy out = Copy(path)
    cdef int n = normalise(source.data, source.length, out.data)
    if n < 0:
        raise refused(-n)
    return out.data[:n]


def contend(UpstreamState upstream not None, uint64_t[::1] number not None, uint64_t rounds) -> int:
    """Add one to number[0] `rounds` times with no protection but the upstream's only place; returns how often it was asked for.

    Racing processes lose additions exactly when two of them hold the place at once.
    """
    cdef volatile uint64_t* word = &number[0]
    cdef uint64_t done = 0, asked = 0, seen
    cdef int pause
    with nogil:
        while done < rounds:
            asked += 1
            if upstream.enter(1):
                seen = word[0]
                for pause in range(20):
                    seen += word[1]         # always 0; time for another one to get in
                word[0] = seen + 1
                upstream.leave()
                done += 1
    return asked


def read_past_the_end() -> int:
    """Read one byte behind a block, so that a sanitizer build can prove that it would notice."""
    cdef Copy copy = Copy(b"x" * 24)
    cdef volatile char* at = copy.data
    return at[24]


def parse_client_hello(const unsigned char[:] data not None):
    """The host that a ClientHello names: None when it names none, False while bytes are missing. Raises ValueError for what is none."""
    cdef Copy copy = Copy(data)
    cdef char* work = <char*>malloc(HELLO_MAX)
    cdef char* name = <char*>malloc(HELLO_NAME)
    cdef uint32_t length = 0
    cdef int result
    try:
        if work == NULL or name == NULL:
            raise MemoryError
        result = parse_hello_records(copy.data, copy.length, work, name, &length)
        if result < 0:
            raise ValueError({HELLO_NOT_TLS: "not TLS", HELLO_TOO_LONG: "too long", HELLO_MALFORMED: "malformed"}[-result])
        if result == 0:
            return False
        return name[:length] if length else None
    finally:
        free(work)
        free(name)
