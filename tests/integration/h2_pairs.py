"""One client for both versions, so that a test can be run in every combination of a client's and an upstream's version."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import h11

from tests.integration.faults import Cut
from tests.integration.h2_kit import CANCEL, Answer, Fields, H2Client, dial, head, headers, octets, rst
from tests.integration.h2_origin import TwinOrigin
from tests.integration.h2_subject import Subject
from tests.integration.processes import PATIENCE

PAIRS = [(down, up) for down in ("one", "two", "secure") for up in ("one", "two", "secure") if (down, up) != ("secure", "secure")]


class OneClient:
    """HTTP/1.1 by h11, a request at a time, with the interface of H2Client as far as both can."""

    def __init__(self, port: int, *, receive: int = 0) -> None:
        self.sock = socket.socket()
        if receive:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(("127.0.0.1", port))
        self.h11 = h11.Connection(h11.CLIENT)
        self.now = Answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.sock.close()

    def open(self, fields: Fields, *, end: bool = True) -> int:
        if self.h11.our_state is h11.DONE:
            self.h11.start_next_cycle()
        self.now = Answer()
        pseudo = {octets(name): octets(value) for name, value in fields if octets(name).startswith(b":")}
        plain = [(octets(name), octets(value)) for name, value in fields if not octets(name).startswith(b":")]
        if not end and not any(name == b"content-length" for name, _ in plain):
            plain.append((b"transfer-encoding", b"chunked"))
        self._emit(h11.Request(method=pseudo[b":method"], target=pseudo[b":path"], headers=[(b"host", pseudo[b":authority"]), *plain]))
        if end:
            self._emit(h11.EndOfMessage())
        return 0

    def _emit(self, event: Any) -> None:
        if data := self.h11.send(event):
            with contextlib.suppress(ConnectionError):          # an early answer may be there to be read
                self.sock.sendall(data)

    def data(self, stream: int, body: bytes, *, end: bool = True, piece: int = 65536) -> None:
        for at in range(0, len(body), piece):
            self._emit(h11.Data(data=body[at : at + piece]))
        if end:
            self._emit(h11.EndOfMessage())

    def trail(self, stream: int, fields: Fields) -> None:
        self._emit(h11.EndOfMessage(headers=[*fields]))

    def step(self) -> None:
        """The next event. Raises Cut."""
        event = self.h11.next_event()
        if event is h11.NEED_DATA:
            try:
                piece = self.sock.recv(1 << 18)
                self.h11.receive_data(piece)
            except (ConnectionError, h11.RemoteProtocolError) as error:
                raise Cut(str(error)) from None
            if not piece:
                raise Cut("the end of the connection")
        elif isinstance(event, h11.InformationalResponse):
            self.now.interim.append(_fields(event))
        elif isinstance(event, h11.Response):
            self.now.fields = _fields(event)
        elif isinstance(event, h11.Data):
            self.now.body += event.data
        elif isinstance(event, h11.EndOfMessage):
            self.now.trailers = [(name.decode(), value.decode()) for name, value in event.headers]
            self.now.ended = True

    def until(self, condition: Any, what: str) -> None:
        while not condition():
            assert not self.now.ended, f"the answer ended before {what}"
            self.step()

    def headed(self, stream: int) -> Answer:
        self.until(lambda: self.now.fields, "a head")
        return self.now

    def answer_of(self, stream: int) -> Answer:
        return self.now

    def answer(self, stream: int) -> Answer:
        while not self.now.ended:
            try:
                self.step()
            except Cut:
                self.now.reset = CANCEL
                break
        return self.now

    def cancel(self, stream: int) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def _fields(event: Any) -> list[tuple[str, str]]:
    return [(":status", str(event.status_code)), *((name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers)]


class TwoClient(H2Client):
    def trail(self, stream: int, fields: Fields) -> None:
        self.send(headers(stream, fields))

    def cancel(self, stream: int) -> None:
        self.send(rst(stream))


@dataclass
class Pair:
    """A version on each side of the gateway."""

    h2: Subject
    down: str
    up: str

    @property
    def origin(self) -> TwinOrigin:
        return self.h2.origin

    def head(self, path: str, method: str = "GET", *more: tuple[str, str]) -> Fields:
        prefix = "" if self.up == "one" else "/" + self.up
        return head(prefix + path, method, *more, scheme="https" if self.down == "secure" else "http")

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[Any]:
        if self.down == "one":
            with OneClient(self.h2.watched.port("one"), receive=options.pop("receive", 0)) as one:
                yield one
        else:
            receive = options.pop("receive", 0)
            tls = self.h2.context() if self.down == "secure" else None
            with TwoClient(dial(self.h2.watched.port(self.down), receive=receive, tls=tls), **options) as two:
                yield two

    def ask(self, fields: Fields, body: bytes | None = None, trailers: Fields = ()) -> Answer:
        """A request on a connection of its own."""
        with self.client() as client:
            return exchange(client, fields, body, trailers)


def exchange(client: Any, fields: Fields, body: bytes | None = None, trailers: Fields = ()) -> Answer:
    stream = client.open(fields, end=body is None and not trailers)
    if body is not None:
        client.data(stream, body, end=not trailers)
    if trailers:
        client.trail(stream, trailers)
    answer: Answer = client.answer(stream)
    return answer
