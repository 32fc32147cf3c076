"""A client that speaks HTTP/2 frame by frame: sane frames by hyperframe and hpack, insane ones as bytes.

Strategy: one blocking socket and no thread. Whoever waits for something pumps the socket, and everything that arrives is kept in
`frames` and sorted by stream in `answers`, so a test asks for what it wants to know and never misses what came before it asked.
What the server sends is read by hyperframe and hpack, which are strict themselves; what a test sends may be anything.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import hpack
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.integration.faults import Cut
from tests.integration.processes import PATIENCE

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 0x1, 0x1, 0x4, 0x8, 0x20
TABLE_SIZE, ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME, MAX_HEADERS, EXTENDED_CONNECT = 1, 2, 3, 4, 5, 6, 8
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, SETTINGS_TIMEOUT, STREAM_CLOSED, FRAME_SIZE_ERROR = range(7)
REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, CONNECT_ERROR, ENHANCE_YOUR_CALM = range(7, 12)
NAMES = {TABLE_SIZE: "HEADER_TABLE_SIZE", INITIAL_WINDOW: "INITIAL_WINDOW_SIZE"}
WINDOW = 65535                                  # both windows, before anybody says otherwise

Text = str | bytes
Fields = Sequence[tuple[Text, Text]]


def octets(text: Text) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")


# -- bytes


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """Any frame; `length` is what its head says, when that is not the truth."""
    size = len(payload) if length is None else length
    return struct.pack("!I", size)[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, payload=b"".join(struct.pack("!HI", name, value) for name, value in pairs))


def ping(said: bytes = b"a" * 8, flags: int = 0) -> bytes:
    return frame(PING, flags, payload=said)


def window_update(stream: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack("!I", increment))


def rst(stream: int, code: int = CANCEL) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack("!I", code))


def goaway(last: int = 0, code: int = NO_ERROR, more: bytes = b"") -> bytes:
    return frame(GOAWAY, payload=struct.pack("!II", last, code) + more)


def priority(stream: int, parent: int = 0, weight: int = 15) -> bytes:
    return frame(PRIORITY, 0, stream, struct.pack("!IB", parent, weight))


def integer(value: int, prefix: int, first: int = 0) -> bytes:
    """RFC 7541 5.1."""
    most = (1 << prefix) - 1
    if value < most:
        return bytes([first | value])
    out, value = [first | most], value - most
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def literal(name: Text, value: Text, first: int = 0) -> bytes:
    """A field as it is, without Huffman; `first`: 0 not indexed, 0x10 never, 0x40 put into the table."""
    raw_name, raw_value = octets(name), octets(value)
    return bytes([first]) + integer(len(raw_name), 7) + raw_name + integer(len(raw_value), 7) + raw_value


def block(fields: Fields, first: int = 0) -> bytes:
    """A header block that touches no table, so it may be sent at any time, or never."""
    return b"".join(literal(name, value, first) for name, value in fields)


def head(path: Text = "/", method: Text = "GET", *more: tuple[Text, Text], authority: Text = "bank.test", scheme: Text = "http") -> Fields:
    return [(":method", method), (":scheme", scheme), (":authority", authority), (":path", path), *more]


def headers(stream: int, fields: Fields, *, end: bool = True, split: int = 16384) -> bytes:
    """HEADERS of literal fields, with CONTINUATION where the block is larger than `split`."""
    return cut_block(stream, block(fields), end=end, split=split)


def cut_block(stream: int, rest: bytes, *, end: bool = True, split: int = 16384) -> bytes:
    piece, rest = rest[:split], rest[split:]
    out = frame(HEADERS, (END_STREAM if end else 0) | (0 if rest else END_HEADERS), stream, piece)
    while rest:
        piece, rest = rest[:split], rest[split:]
        out += frame(CONTINUATION, 0 if rest else END_HEADERS, stream, piece)
    return out


# -- what came back


@dataclass
class Answer:
    """What the server has said on one stream. `reset`: the code of its RST_STREAM."""

    fields: list[tuple[str, str]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    trailers: list[tuple[str, str]] = field(default_factory=list)
    interim: list[list[tuple[str, str]]] = field(default_factory=list)
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int:
        return int(dict(self.fields).get(":status", 0))

    def get(self, name: str, default: str = "") -> str:
        return dict(self.fields).get(name, default)

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None


class H2Client:
    """One connection. With `start` the preface and SETTINGS go out at once and the server's own SETTINGS are awaited.

    `polite`: acknowledge SETTINGS and PING. `credit`: give back what DATA took from the windows.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        start: bool = True,
        offer: Mapping[int, int] | None = None,
        polite: bool = True,
        credit: bool = True,
    ) -> None:
        sock.settimeout(PATIENCE)
        self.sock = sock
        self.polite, self.credit = polite, credit
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self.decoder.max_header_list_size = 1 << 24
        self.frames: list[Frame] = []
        self.answers: dict[int, Answer] = {}
        self.settings: dict[int, int] = {}              # the server's
        self.greeted = False                            # the server's first SETTINGS have come
        self.pongs: list[bytes] = []
        self.gone: list[GoAwayFrame] = []
        self.end = ""                                   # how the connection ended: "closed" or "reset"
        self.next_stream = 1
        self.acked = 0                                  # our SETTINGS that were acknowledged
        self.window = WINDOW                            # what we may send on the connection
        self.windows: dict[int, int] = {}               # ... and on streams, relative to the initial window
        self._buffer = bytearray()
        self._out = bytearray()                         # whole frames, so that replies never come between the bytes of one
        self._block: tuple[int, bytearray, bool] | None = None
        if start:
            self.send(PREFACE, settings(*(offer or {}).items()))
            self.until(lambda: self.acked and self.greeted, "SETTINGS and their ACK")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def abort(self) -> None:
        """Close with RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    # -- out

    def send(self, *pieces: bytes | Frame) -> None:
        """Send; what arrives meanwhile is read, so that nobody waits for us. When the connection ends, `end` says so."""
        self._out += b"".join(piece if isinstance(piece, bytes) else piece.serialize() for piece in pieces)
        if isinstance(self.sock, ssl.SSLSocket):
            with self._ending():
                self.sock.sendall(self._out)
                self._out.clear()
            return
        deadline = time.monotonic() + PATIENCE
        while self._out and not self.end:
            readable, writable, _ = select.select([self.sock], [self.sock], [], max(0.0, deadline - time.monotonic()))
            assert readable or writable, "nothing can be sent and nothing comes"
            if writable:
                with self._ending():
                    del self._out[: self.sock.send(self._out[:65536], socket.MSG_DONTWAIT)]
            if readable and not self.end:
                self._receive()

    @contextlib.contextmanager
    def _ending(self) -> Any:
        try:
            yield
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except OSError:
            with contextlib.suppress(OSError):
                while self._receive():                  # what was said before the end
                    pass
            self.end = self.end or "reset"

    def stream(self) -> int:
        """The next stream's id."""
        number, self.next_stream = self.next_stream, self.next_stream + 2
        return number

    def open(self, fields: Fields | None = None, *, end: bool = True, split: int = 16384) -> int:
        """Begin a request, coded as a browser does (Huffman, indexed); returns its stream."""
        stream = self.stream()
        coded = self.encoder.encode([(octets(name), octets(value)) for name, value in (head() if fields is None else fields)])
        self.send(cut_block(stream, coded, end=end, split=split))
        return stream

    def data(self, stream: int, body: bytes, *, end: bool = True, piece: int = 16384) -> None:
        """Send a body as the windows allow; stops when the stream is over before."""
        answer, begin = self.answer_of(stream), 0
        while not answer.over:
            if begin < len(body):
                self.until(lambda: self.room(stream) > 0 or answer.over, "room in the windows")
            if answer.over:
                return
            size = min(len(body) - begin, max(self.room(stream), 0), piece)
            self.window -= size
            self.windows[stream] = self.windows.get(stream, 0) - size
            last = begin + size == len(body)
            self.send(frame(DATA, END_STREAM if end and last else 0, stream, body[begin : begin + size]))
            begin += size
            if last:
                return

    def room(self, stream: int) -> int:
        return min(self.window, self.settings.get(INITIAL_WINDOW, WINDOW) + self.windows.get(stream, 0))

    # -- in

    def _receive(self) -> bool:
        """Read once; False at the end."""
        try:
            piece = self.sock.recv(1 << 18)
        except TimeoutError:
            raise
        except OSError:
            self.end = self.end or "reset"
            return False
        if not piece:
            self.end = self.end or "closed"
            return False
        self._buffer += piece
        self._parse()
        return True

    def _parse(self) -> None:
        buffer = self._buffer
        while len(buffer) >= 9:
            size = int.from_bytes(buffer[:3], "big")
            if len(buffer) < 9 + size:
                return
            got, length = Frame.parse_frame_header(memoryview(bytes(buffer[:9])), strict=True)
            got.parse_body(memoryview(bytes(buffer[9 : 9 + length])))
            del buffer[: 9 + length]
            self.frames.append(got)
            self._take(got)

    def _take(self, got: Frame) -> None:
        assert self._block is None or (isinstance(got, ContinuationFrame) and got.stream_id == self._block[0]), got
        match got:
            case SettingsFrame() if "ACK" in got.flags:
                self.acked += 1
            case SettingsFrame():
                self.greeted = True
                self.settings |= got.settings
                self.encoder.header_table_size = min(4096, self.settings.get(TABLE_SIZE, 4096))
                if self.polite:
                    self._reply(frame(SETTINGS, ACK))
            case PingFrame() if "ACK" in got.flags:
                self.pongs.append(bytes(got.opaque_data))
            case PingFrame() if self.polite:
                self._reply(ping(bytes(got.opaque_data), ACK))
            case GoAwayFrame():
                self.gone.append(got)
            case WindowUpdateFrame(stream_id=0):
                self.window += got.window_increment
            case WindowUpdateFrame():
                self.windows[got.stream_id] = self.windows.get(got.stream_id, 0) + got.window_increment
            case RstStreamFrame():
                self.answer_of(got.stream_id).reset = got.error_code
            case HeadersFrame() | ContinuationFrame():
                self._headers(got)
            case DataFrame():
                self._data(got)
            case PushPromiseFrame():
                raise AssertionError("nobody allowed a push")

    def _headers(self, got: HeadersFrame | ContinuationFrame) -> None:
        stream, raw, ends = self._block or (got.stream_id, bytearray(), "END_STREAM" in got.flags)
        raw += got.data
        self._block = (stream, raw, ends)
        if "END_HEADERS" not in got.flags:
            return
        self._block = None
        fields = [(octets(name).decode("latin-1"), octets(value).decode("latin-1")) for name, value in self.decoder.decode(bytes(raw), raw=True)]
        answer = self.answer_of(stream)
        assert not answer.ended, f"HEADERS behind the end of stream {stream}"
        names = [name for name, _ in fields]
        if answer.fields:
            assert ends and not any(name.startswith(":") for name in names), f"not trailers: {fields}"
            answer.trailers = fields
        else:
            assert names[0] == ":status" and not any(name.startswith(":") for name in names[1:]), fields
            assert all(name == name.lower() for name in names), fields
            assert not {"connection", "transfer-encoding", "keep-alive", "upgrade", "proxy-connection"} & set(names), fields
            if fields[0][1].startswith("1"):
                assert not ends, "an interim answer ends nothing"
                answer.interim.append(fields)
            else:
                answer.fields = fields
        answer.ended = ends

    def _data(self, got: DataFrame) -> None:
        answer = self.answer_of(got.stream_id)
        assert answer.fields and not answer.ended, f"DATA in the wrong place: {got}"
        answer.body += got.data
        answer.ended = "END_STREAM" in got.flags
        if self.credit and got.flow_controlled_length:
            self._reply(window_update(0, got.flow_controlled_length))
            if not answer.ended:
                self._reply(window_update(got.stream_id, got.flow_controlled_length))

    def _reply(self, data: bytes) -> None:
        self._out += data

    def answer_of(self, stream: int) -> Answer:
        return self.answers.setdefault(stream, Answer())

    # -- waiting

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Read until the condition holds. Raises Cut when the connection ends before."""
        deadline = time.monotonic() + PATIENCE
        while not (value := condition()):
            if self.end:
                raise Cut(f"{self.end} before {what}; GOAWAY {[each.error_code for each in self.gone]}")
            left = deadline - time.monotonic()
            assert left > 0, f"{what} never came; {self.seen()}"
            self.sock.settimeout(left)
            with contextlib.suppress(TimeoutError):
                self._receive()
            self.sock.settimeout(PATIENCE)
            self.send()                                 # our replies
        return value

    def seen(self) -> list[str]:
        """The last frames, for messages."""
        return [f"{type(each).__name__}({each.stream_id}, {sorted(each.flags)}, {each.body_len})" for each in self.frames[-8:]]

    def answer(self, stream: int) -> Answer:
        """The whole answer, or what there was of it before the reset. Raises Cut."""
        answer = self.answer_of(stream)
        self.until(lambda: answer.over, f"the end of stream {stream}")
        return answer

    def headed(self, stream: int) -> Answer:
        """The answer as soon as its head is there."""
        answer = self.answer_of(stream)
        self.until(lambda: answer.fields or answer.over, f"an answer on stream {stream}")
        return answer

    def ask(self, fields: Fields | None = None, body: bytes | None = None, trailers: Fields = ()) -> Answer:
        """A request and its whole answer."""
        stream = self.open(fields, end=body is None and not trailers)
        if body is not None:
            self.data(stream, body, end=not trailers)
        if trailers:
            self.send(headers(stream, trailers))
        return self.answer(stream)

    def barrier(self) -> None:
        """Wait until the server has read all that was sent: it answers a PING."""
        said = os.urandom(8)
        self.send(ping(said))
        self.until(lambda: said in self.pongs, "the answer to a PING")

    def works(self) -> None:
        """The connection serves a request."""
        answer = self.ask()
        assert answer.status == 200 and answer.ended, answer

    def ended(self) -> None:
        """Read until the connection has ended."""
        with contextlib.suppress(Cut):
            self.until(lambda: False, "the end of the connection")

    def refused(self, stream: int, *codes: int) -> None:
        """The stream ends by RST_STREAM with one of these codes, and the connection goes on."""
        answer = self.answer(stream)
        assert answer.reset in codes, f"stream {stream}: {answer}"
        self.works()

    def malformed(self, stream: int) -> None:
        """RFC 9113 8.1.1: RST_STREAM PROTOCOL_ERROR, with or without an answer of 400 before it; the connection goes on."""
        answer = self.answer(stream)
        assert answer.reset == PROTOCOL_ERROR or answer.status == 400, f"stream {stream}: {answer}"
        assert not answer.fields or answer.status == 400, f"stream {stream}: {answer}"
        self.works()

    def dies(self, *codes: int) -> None:
        """The connection ends, after a GOAWAY with one of these codes."""
        self.ended()
        assert [each.error_code for each in self.gone if each.error_code in codes], (
            f"no GOAWAY {codes}: {[each.error_code for each in self.gone]}, {self.end}, {self.seen()}"
        )


def dial(port: int, *, receive: int = 0, tls: ssl.SSLContext | None = None, host: str = "bank.test") -> socket.socket:
    """A socket; with `tls` ALPN has to choose h2. `receive`: the size of its receive buffer."""
    sock = socket.socket()
    if receive:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    sock.settimeout(PATIENCE)
    sock.connect(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls is None:
        return sock
    wrapped = tls.wrap_socket(sock, server_hostname=host)
    assert wrapped.selected_alpn_protocol() == "h2", wrapped.selected_alpn_protocol()
    return wrapped


def connect_h2(port: int, *, receive: int = 0, tls: ssl.SSLContext | None = None, **options: Any) -> H2Client:
    return H2Client(dial(port, receive=receive, tls=tls), **options)


def all_over(client: H2Client, streams: Iterable[int]) -> list[Answer]:
    """The answers of all these streams."""
    return [client.answer(stream) for stream in streams]
