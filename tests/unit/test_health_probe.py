"""What a check takes for a healthy answer, from endpoints that answer in every way."""

from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest

from gateway.config.health import Check
from gateway.config.web import Address
from gateway.discovery.found import Found
from gateway.health.grpc import MAX_MESSAGE, request, serving_status
from gateway.health.probe import Connection, Inconclusive, probe

PATIENCE = 20.0  # seconds, used up by a failure only
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def check(**settings: Any) -> Check:
    return Check.model_validate(settings, context={"models": {}, "base": "/", "documents": []})


def told(settings: Check, serve: Serve | None, name: str = "", *, http2: bool = False) -> str:
    """What a check of an endpoint that serves like this says."""

    async def run() -> str:
        async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert serve is not None
            try:
                await serve(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(guarded, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        if serve is None:
            server.close()
            await server.wait_closed()
        try:
            async with asyncio.timeout(PATIENCE):
                return await probe(settings, Found(Address("127.0.0.1", port), name=name), http2=http2)
        finally:
            server.close()

    return asyncio.run(run())


def answering(*pieces: bytes, seen: list[bytes] | None = None, endless: bytes = b"") -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if seen is not None:
            seen.append(head)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        while endless:
            writer.write(endless)
            await writer.drain()

    return serve


HTTP = check(http={"path": "/ready?deep=1", "status": [200, "401-403"], "body": "up"})
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nup"


def test_the_request_names_the_endpoint_or_the_host_that_is_configured() -> None:
    seen: list[bytes] = []
    assert told(HTTP, answering(OK, seen=seen), "pay.bank.test") == ""
    assert told(check(http={"host": "health.bank.test"}), answering(OK, seen=seen)) == ""
    lines = [head.decode().split("\r\n") for head in seen]
    assert lines[0][0] == "GET /ready?deep=1 HTTP/1.1" and lines[1][0] == "GET / HTTP/1.1"
    assert lines[0][1].startswith("host: pay.bank.test:") and lines[1][1] == "host: health.bank.test"
    assert "connection: close" in lines[0]


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([OK], ""),
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\n u", b"p\r\n0\r\n\r\n"], ""),
        ([b"HTTP/1.1 403 No\r\n\r\nshut", b" up until the end"], ""),
        ([b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + OK], ""),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndown"], "the expected text is not in the body"),
        ([b"HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\nup"], "status 500"),
        ([b"HTTP/1.1 404 Not Found\r\n\r\n"], "status 404"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n"], "no answer before the end of the connection"),
        ([], "no answer before the end of the connection"),
        ([b"SSH-2.0-OpenSSH\r\n"], "the answer is not HTTP/1.1"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: zwei\r\n\r\n"], "the answer is not HTTP/1.1"),
    ],
)
def test_answers_are_judged(pieces: list[bytes], reason: str) -> None:
    assert told(HTTP, answering(*pieces)) == reason


def test_only_so_much_of_an_answer_is_read() -> None:
    endless = answering(b"HTTP/1.1 200 OK\r\n\r\n", endless=b"x" * 4096)
    assert told(HTTP, endless) == "the expected text is not in the body"
    assert told(check(http={}), endless) == ""
    assert told(HTTP, answering(b"HTTP/1.1 200 OK\r\n", endless=b"x-more: " + b"y" * 4000 + b"\r\n")) == (
        "the head of the answer is longer than 32KiB"
    )


def test_a_connection_is_enough_for_tcp() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    assert told(check(tcp={}), silent) == ""
    assert told(check(tcp={}), None) == "no connection: Connection refused"


def test_a_failure_of_this_machine_judges_nobody() -> None:
    async def without_descriptors(found: Found) -> Connection:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(Inconclusive):
        asyncio.run(probe(check(tcp={}), Found(Address("127.0.0.1", 1)), without_descriptors))


# -- gRPC


def grpc_server(*answer: Any, seen: list[Any] | None = None) -> Serve:
    """A server over h2: sends the given headers (dicts) and messages (bytes), the last with the end of the stream."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        connection.initiate_connection()
        body, left = b"", []
        while True:
            writer.write(connection.data_to_send())
            data = await reader.read(65536)
            if not data:
                return
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.RequestReceived) and seen is not None:
                    seen.append(dict(event.headers))
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data
                elif isinstance(event, h2.events.StreamEnded):
                    if seen is not None:
                        seen.append(body)
                    left = list(answer)
            while left and connection.streams[1].open:
                part = left.pop(0)
                if isinstance(part, dict):
                    connection.send_headers(1, list(part.items()), end_stream=not left)
                elif isinstance(part, int):
                    connection.reset_stream(1, part)
                else:
                    room = min(16384, connection.local_flow_control_window(1))
                    rest = part[room:]
                    if room or not part:
                        connection.send_data(1, part[:room], end_stream=not left and not rest)
                    if rest:
                        left.insert(0, rest)
                    if not room:
                        break                       # until there is window again

    return serve


def message(status: int) -> bytes:
    return struct.pack("!BI", 0, 2) + bytes([8, status])


HEAD = {":status": "200", "content-type": "application/grpc"}
FINE = {"grpc-status": "0"}
GRPC = check(grpc={"service": "bank.Payments"}, timeout="1s")


def test_the_call_is_a_check_of_the_service() -> None:
    seen: list[Any] = []
    assert told(GRPC, grpc_server(HEAD, message(1), FINE, seen=seen), "pay.bank.test") == ""
    fields, body = seen
    assert fields[":path"] == "/grpc.health.v1.Health/Check" and fields[":method"] == "POST"
    assert fields["content-type"] == "application/grpc" and fields["te"] == "trailers" and fields["grpc-timeout"] == "1000m"
    assert fields[":authority"].startswith("pay.bank.test:")
    assert body == b"\0\0\0\0\x0f\x0a\x0dbank.Payments"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((HEAD, message(2), FINE), "NOT_SERVING"),
        ((HEAD, message(0), FINE), "UNKNOWN"),
        ((HEAD, message(3), FINE), "SERVICE_UNKNOWN"),
        ((HEAD, message(9), FINE), "an unknown status"),
        ((HEAD, b"\0\0\0\0\0", FINE), "UNKNOWN"),
        ((HEAD, b"\0\0\0", FINE), "the answer is malformed"),
        ((HEAD, message(1), {"grpc-status": "14"}), "gRPC status UNAVAILABLE"),
        (({**HEAD, "grpc-status": "12"},), "gRPC status UNIMPLEMENTED"),
        (({**HEAD, "grpc-status": "5"},), "gRPC status NOT_FOUND"),
        ((HEAD, message(1)), "gRPC status missing"),
        (({":status": "404"},), "HTTP status 404"),
        ((HEAD, 7), "the call was reset (7)"),
        ((HEAD, bytes(MAX_MESSAGE + 1), FINE), "the answer is too long"),
    ],
)
def test_grpc_answers_are_judged(answer: tuple[Any, ...], reason: str) -> None:
    assert told(GRPC, grpc_server(*answer)) == reason


def test_a_server_of_another_protocol_is_not_healthy() -> None:
    async def http1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(24)
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)

    async def noise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(24)
        writer.write(b"\0\0\x08\x06\0\0\0\0\x01" + bytes(8))  # a PING on a stream

    assert told(GRPC, http1) == "the answer is HTTP/1.1, not HTTP/2"
    assert told(GRPC, noise) == "the answer is not HTTP/2"
    assert told(GRPC, closing) == "no answer before the end of the connection"


def test_messages_are_read_within_their_bounds() -> None:
    assert request("") == b"\0\0\0\0\0"
    assert len(request("x" * 300)) == 5 + 3 + 300
    frame = lambda body: struct.pack("!BI", 0, len(body)) + body
    assert serving_status(frame(b"\x12\x02hi\x08\x01\x15abcd")) == 1  # unknown fields are skipped
    for bad in (b"\x08", b"\x08" + b"\xff" * 11, b"\x12\x7fhi", b"\x0b", b"\x12\xff\xff\xff\xff\x0f"):
        assert serving_status(frame(bad)) == -1
    assert serving_status(b"\x01\0\0\0\x02\x08\x01") == -1  # compressed, which nobody offered


# -- HTTP over HTTP/2


def test_an_upstream_of_http2_is_asked_in_http2() -> None:
    seen: list[Any] = []
    answer = ({":status": "200"}, b"up", {"x-end": "1"})
    assert told(HTTP, grpc_server(*answer, seen=seen), "pay.bank.test", http2=True) == ""
    assert told(check(http={"host": "health.bank.test"}), grpc_server({":status": "204"}, seen=seen), http2=True) == ""
    first, _, second, _ = seen
    assert (first[":method"], first[":path"], first[":scheme"]) == ("GET", "/ready?deep=1", "http")
    assert first[":authority"].startswith("pay.bank.test:") and second[":authority"] == "health.bank.test"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (({":status": "403"}, b"still up"), ""),
        (({":status": "200"}, bytes(60_000) + b"up"), ""),
        (({":status": "200"}, bytes(65_536) + b"up"), "the expected text is not in the body"),
        (({":status": "200"}, bytes(500_000)), "the expected text is not in the body"),
        (({":status": "200"}, b"down"), "the expected text is not in the body"),
        (({":status": "500"}, b"up"), "status 500"),
        (({":status": "404"},), "status 404"),
        ((7,), "the call was reset (7)"),
    ],
)
def test_answers_over_http2_are_judged(answer: tuple[Any, ...], reason: str) -> None:
    assert told(HTTP, grpc_server(*answer), http2=True) == reason


def test_a_server_of_http1_is_no_healthy_one_of_http2() -> None:
    async def http1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(24)
        writer.write(OK)

    assert told(HTTP, http1, http2=True) == "the answer is HTTP/1.1, not HTTP/2"
    assert told(HTTP, None, http2=True) == "no connection: Connection refused"
