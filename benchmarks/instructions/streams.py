"""HTTP/2 for the instruction counts: clients with several streams a connection, and an origin of either version.

Strategy: as workload.py, whose rounds these are: a round is one request on every stream of every connection. Frames are written and
read here by hand, and header blocks by the `hpack` package, so that the work of both ends is not the engine's own code.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from hpack import Decoder, Encoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
WIDE = (1 << 30).to_bytes(4, "big")
STREAMS = 10
Fields = list[tuple[str, str]]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one frame."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


class Peer:
    """One end of a connection: frames in, frames out, and the windows so wide that they never matter."""

    def __init__(self, sock: socket.socket, opening: bytes) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.encoder, self.decoder = Encoder(), Decoder()
        self.bytes = b""
        self.sock.send(opening + frame(SETTINGS, 0, 0, b"\x00\x04" + WIDE) + frame(WINDOW_UPDATE, 0, 0, WIDE))

    def block(self, fields: Fields) -> bytes:
        """Return a header block; fields that came before are an index each, as every real client's and server's."""
        encoded: bytes = self.encoder.encode(fields)
        return encoded

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield (kind, flags, stream, payload) of each whole frame that has arrived, having answered what asks for it."""
        with contextlib.suppress(BlockingIOError):
            while got := self.sock.recv(1 << 18):
                self.bytes += got
        self.bytes = self.bytes.removeprefix(PREFACE)
        while len(self.bytes) >= 9 and len(self.bytes) >= 9 + (length := int.from_bytes(self.bytes[:3], "big")):
            kind, flags = self.bytes[3:5]
            stream, payload = int.from_bytes(self.bytes[5:9], "big"), self.bytes[9 : 9 + length]
            self.bytes = self.bytes[9 + length :]
            if kind in (RST_STREAM, GOAWAY):
                raise RuntimeError(f"the engine sent frame {kind} with {payload!r}")
            if kind in (SETTINGS, PING) and not flags & ACK:
                self.sock.send(frame(kind, ACK, 0, payload if kind == PING else b""))
            yield kind, flags, stream, payload


class Client(Peer):
    """A client's connection: `send` writes a request on each of STREAMS streams, `answered` tells when all answers are complete."""

    def __init__(self, address: tuple[str, int], request: Fields, body: bytes, trailers: bool) -> None:
        super().__init__(socket.create_connection(address), PREFACE)
        self.request, self.body, self.trailers = request, body, trailers
        self.next = 1
        self.waiting: dict[int, int] = {}

    def send(self) -> None:
        """Write one request on each stream."""
        out = []
        for _ in range(STREAMS):
            out.append(frame(HEADERS, END_HEADERS | (END_STREAM if not self.body else 0), self.next, self.block(self.request)))
            if self.body:
                out.append(frame(DATA, END_STREAM, self.next, self.body))
            self.waiting[self.next] = 0
            self.next += 2
        self.sock.send(b"".join(out))

    def answered(self, answer: bytes) -> bool:
        """Read what has arrived; True when nothing is missing. Raises RuntimeError for an answer other than the origin's."""
        for kind, flags, stream, payload in self.frames():
            if kind == HEADERS:
                fields = dict(self.decoder.decode(payload))
                due = ("grpc-status", "0") if self.trailers and flags & END_STREAM else (":status", "200")
                if fields.get(due[0]) != due[1]:
                    raise RuntimeError(f"the client received {fields!r}")
            elif kind == DATA:
                if payload and payload != answer:
                    raise RuntimeError(f"the client received {payload!r}")
                self.waiting[stream] += len(payload)
            if kind in (HEADERS, DATA) and flags & END_STREAM and self.waiting.pop(stream) != len(answer):
                raise RuntimeError("the client received an answer without its body")
        return not self.waiting


class Origin(Peer):
    """An upstream connection in HTTP/2: `ready` holds the streams whose requests are complete."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, b"")
        self.ready: list[int] = []

    def read(self) -> int:
        """Read what has arrived; return how many requests wait for their answers."""
        for kind, flags, stream, payload in self.frames():
            if kind == HEADERS:
                self.decoder.decode(payload)
            if kind in (HEADERS, DATA) and flags & END_STREAM:
                self.ready.append(stream)
        return len(self.ready)

    def answer(self, fields: Fields, body: bytes, trailers: Fields) -> None:
        """Answer every request that waits."""
        out = []
        for stream in self.ready:
            out.append(frame(HEADERS, END_HEADERS, stream, self.block(fields)))
            out.append(frame(DATA, 0 if trailers else END_STREAM, stream, body))
            if trailers:
                out.append(frame(HEADERS, END_HEADERS | END_STREAM, stream, self.block(trailers)))
        self.ready.clear()
        self.sock.send(b"".join(out))
