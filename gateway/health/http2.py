"""One request over HTTP/2 on a fresh connection, for checks: prior knowledge in clear text, ALPN over TLS.

Strategy: h2 does the framing. What a server sends is read up to a bound, whatever it sends; a reason that is not empty says in words
why there is no answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import h2.config
import h2.connection
import h2.events
import h2.exceptions

if TYPE_CHECKING:  # a sidecar asks by this, and does not hold the schema
    from gateway.config.health import HttpCheck

PIECE = 16 << 10  # bytes of one read
MAX_BODY = 64 << 10  # bytes of a body that are searched
ROOM = 64 << 10  # bytes of heads and frames around it


class Answer:
    """What came back: the fields of head and trailers, the body as far as it was read."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.body = b""
        self.ended = False
        self.failure = ""

    def take(self, event: h2.events.Event) -> None:
        if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
            self.fields |= {_text(name): _text(value) for name, value in event.headers or ()}
        elif isinstance(event, h2.events.DataReceived):
            self.body += event.data or b""
        elif isinstance(event, h2.events.StreamEnded):
            self.ended = True
        elif isinstance(event, h2.events.StreamReset):
            self.failure = f"the call was reset ({int(event.error_code or 0)})"
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.failure = f"the connection was ended by GOAWAY ({int(event.error_code or 0)})"


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: Sequence[tuple[str, str]], body: bytes, *, most: int,
    enough: Callable[[Answer], bool] = lambda answer: False,
) -> Answer:
    """Send a request and return its answer once it has ended, is `enough`, or has failed; at most `most` bytes are read."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    connection.initiate_connection()
    connection.send_headers(1, head, end_stream=not body)
    if body:
        connection.send_data(1, body, end_stream=True)
    writer.write(connection.data_to_send())
    answer, size = Answer(), 0
    while not (answer.ended or answer.failure or enough(answer)):
        data = await reader.read(PIECE)
        if not size and data.startswith(b"HTTP/1"):
            answer.failure = "the answer is HTTP/1.1, not HTTP/2"
            break
        size += len(data)
        if not data or size > most:
            answer.failure = "no answer before the end of the connection" if not data else "it sends without answering"
            break
        try:
            for event in connection.receive_data(data):
                answer.take(event)
                if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                    connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id or 1)
        except h2.exceptions.ProtocolError:
            answer.failure = "the answer is not HTTP/2"
            break
        writer.write(connection.data_to_send())
    return answer


async def ask_http2(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, check: HttpCheck, host: str, scheme: str) -> str:
    """Make the request of a check and judge the answer; return why it is not healthy."""
    wanted = (check.body or "").encode()

    def judged(answer: Answer) -> bool:
        status = _status(answer)
        return status >= 200 and (status not in check.status or wanted in answer.body or len(answer.body) >= MAX_BODY)

    head = [(":method", "GET"), (":scheme", scheme), (":path", check.path), (":authority", host), ("user-agent", "crossway-check"),
            ("accept", "*/*")]
    answer = await ask(reader, writer, head, b"", most=MAX_BODY + ROOM, enough=judged)
    status = _status(answer)
    if status < 200:
        return answer.failure or "no answer before the end of the connection"
    if status not in check.status:
        return f"status {status}"
    return "" if wanted in answer.body[:MAX_BODY] else "the expected text is not in the body"


def _status(answer: Answer) -> int:
    text = answer.fields.get(":status", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) == 3 else 0
