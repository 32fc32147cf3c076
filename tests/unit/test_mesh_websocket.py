"""The WebSocket of the control plane's stream: against the library `websockets`, and against servers that keep no rule."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from gateway.mesh.websocket import MAGIC, WebSocket, WebSocketError, begin, judge

MOST = 1 << 20
PATIENCE = 30.0
TEXT, CLOSE, PING, PONG = 0x81, 0x88, 0x89, 0x8A


def run(what: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(PATIENCE):
            return await what

    return asyncio.run(bounded())


async def dial(port: int, most: int = MOST, silence: float = PATIENCE) -> WebSocket:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    return await begin(reader, writer, f"127.0.0.1:{port}", "/v1/stream?version=0", most, silence)


async def heard(socket: WebSocket) -> list[str]:
    return [text async for text in socket]


# -- with the library

Serve = Callable[[ServerConnection], Awaitable[None]]


async def beside(server: Serve, client: Callable[[WebSocket], Awaitable[Any]], silence: float = PATIENCE, **options: Any) -> Any:
    async with serve(server, "127.0.0.1", 0, max_size=None, **options) as listening:
        return await client(await dial(listening.sockets[0].getsockname()[1], silence=silence))


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 200_000])
def test_messages_of_every_length_arrive_whole_both_ways(size: int) -> None:
    text = "".join(chr(0x20 + number % 0x2000) for number in range(size))

    async def client(socket: WebSocket) -> list[str]:
        await socket.send(text)
        answers = [answer async for answer in socket]
        await socket.close()
        return answers

    async def echo(connection: ServerConnection) -> None:
        await connection.send(await connection.recv())

    assert run(beside(echo, client)) == [text]


def test_a_message_in_pieces_with_pings_between_is_one_message() -> None:
    async def server(connection: ServerConnection) -> None:
        async def pieces() -> Any:
            for piece in ("al", "l o", "f it"):
                yield piece
                await (await connection.ping())  # returns once the pong is there

        await connection.send(pieces())

    assert run(beside(server, heard)) == ["all of it"]


def test_our_ping_is_answered_and_keeps_the_connection() -> None:
    async def server(connection: ServerConnection) -> None:
        await connection.wait_closed()

    async def client(socket: WebSocket) -> None:
        listening = asyncio.create_task(heard(socket))
        for _ in range(20):
            socket.ping()
            await asyncio.sleep(0.1)
        assert not listening.done()
        await socket.close()
        assert await listening == []

    run(beside(server, client, silence=1.0))


def test_the_end_that_we_give_is_quiet_and_its_code_arrives() -> None:
    codes: list[int | None] = []

    async def server(connection: ServerConnection) -> None:
        await connection.wait_closed()
        codes.append(connection.close_code)

    async def client(socket: WebSocket) -> list[str]:
        listening = asyncio.create_task(heard(socket))
        await socket.close(1012)
        with pytest.raises(WebSocketError, match="has ended"):
            await socket.send("late")
        return await listening

    assert run(beside(server, client)) == [] and codes == [1012]


@pytest.mark.parametrize(("code", "quiet"), [(1000, True), (1001, True), (1012, False), (4403, False)])
def test_the_end_that_they_give(code: int, quiet: bool) -> None:
    async def server(connection: ServerConnection) -> None:
        await connection.send("last")
        await connection.close(code, "so it is")

    async def client(socket: WebSocket) -> list[str]:
        if quiet:
            return await heard(socket)
        with pytest.raises(WebSocketError, match=f"closed with {code} so it is"):
            await heard(socket)
        return ["last"]

    assert run(beside(server, client)) == ["last"]


def test_what_nobody_takes_waits_and_holds_the_other_side_up() -> None:
    sent = 0

    async def server(connection: ServerConnection) -> None:
        nonlocal sent
        for _ in range(200):
            await connection.send("x" * 500_000)
            sent += 1

    async def client(socket: WebSocket) -> int:
        before = -1
        while sent != before:  # until it gets no further
            before = sent
            await asyncio.sleep(0.5)
        stuck = sent
        assert len(await heard(socket)) == 200
        return stuck

    assert run(beside(server, client, ping_interval=None)) < 100


def test_pings_are_answered_while_a_message_is_dealt_with() -> None:
    answered = asyncio.Event()

    async def server(connection: ServerConnection) -> None:
        await connection.send("slow")
        await (await connection.ping())
        answered.set()

    async def client(socket: WebSocket) -> list[str]:
        found = []
        async for text in socket:
            found.append(text)
            await answered.wait()  # dealt with for as long as it takes the server to hear the pong
        return found

    assert run(beside(server, client)) == ["slow"]


def test_a_server_that_refuses_is_named_by_its_status() -> None:
    async def client(_: WebSocket) -> None:
        pytest.fail("it is no WebSocket")

    async def refused() -> None:
        with pytest.raises(WebSocketError, match="status 403"):
            await beside(lambda _: asyncio.sleep(0), client, process_request=lambda connection, _: connection.respond(403, "no\n"))

    run(refused())


# -- with servers that keep no rule


def frame(first: int, data: bytes = b"") -> bytes:
    size = len(data)
    return bytes((first,)) + (bytes((size,)) if size < 126 else b"\x7e" + size.to_bytes(2, "big") if size < 1 << 16 else b"\x7f" + size.to_bytes(8, "big")) + data


def accept(key: bytes) -> bytes:
    return base64.b64encode(hashlib.sha1(key + MAGIC).digest())


async def against(raw: bytes, *, most: int = 1000, silence: float = PATIENCE, end: bool = False) -> tuple[list[str], str, bytes]:
    """What is made of these bytes behind a good handshake: messages, the error's text, and what the client sent."""
    said = asyncio.get_running_loop().create_future()

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        key = next(line.split(b": ")[1] for line in head.split(b"\r\n") if line.startswith(b"sec-websocket-key"))
        writer.write(b"HTTP/1.1 101 X\r\nUpgrade: WebSocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Accept: " + accept(key) + b"\r\n\r\n" + raw)
        if end:
            writer.write_eof()
        said.set_result(await reader.read(-1))
        writer.close()

    async with await asyncio.start_server(server, "127.0.0.1", 0) as listening:
        socket = await dial(listening.sockets[0].getsockname()[1], most, silence)
        texts: list[str] = []
        try:
            async for text in socket:
                texts.append(text)
            error = ""
        except WebSocketError as problem:
            error = str(problem)
        await socket.close()
        return texts, error, await said


def unmasked(sent: bytes) -> list[tuple[int, bytes]]:
    """Take the client's short frames apart; every one of them has to be masked."""
    found = []
    while sent:
        assert sent[1] & 0x80 and sent[1] & 0x7F < 126
        size, key = sent[1] & 0x7F, sent[2:6]
        found.append((sent[0], bytes(byte ^ key[at % 4] for at, byte in enumerate(sent[6 : 6 + size]))))
        sent = sent[6 + size :]
    return found


@pytest.mark.parametrize(
    ("raw", "code", "why"),
    [
        (frame(0x82, b"x"), 1003, "not text"),
        (frame(0xC1, b"x"), 1002, "mean nothing"),  # compressed, which was not offered
        (frame(0x83), 1002, "mean nothing"),
        (frame(0x8B), 1002, "mean nothing"),
        (b"\x81\x81\0\0\0\0x", 1002, "mean nothing"),  # masked
        (frame(0x80, b"x"), 1002, "without a beginning"),
        (frame(0x01, b"x") + frame(0x81, b"y"), 1002, "within another"),
        (frame(0x09, b"x"), 1002, "in pieces"),
        (frame(PING, b"x" * 126), 1002, "too long"),
        (b"\x81\x7e\0\x05hello", 1002, "longer than it is"),
        (b"\x81\x7f" + (65535).to_bytes(8, "big"), 1002, "longer than it is"),
        (b"\x81\x7f" + b"\xff" * 8, 1009, "larger than 1000"),
        (b"\x81\x7e" + (1001).to_bytes(2, "big"), 1009, "larger than 1000"),
        (frame(0x01, b"x" * 600) + frame(0x80, b"x" * 401), 1009, "larger than 1000"),
        (frame(TEXT, b"\xff"), 1007, "UTF-8"),
        (frame(0x01, "é".encode()[:1]) + frame(0x80, b"x"), 1007, "UTF-8"),
        (frame(CLOSE, b"\x03"), 1002, "no valid code"),
        (frame(CLOSE, (1005).to_bytes(2, "big")), 1002, "no valid code"),
        (frame(CLOSE, (999).to_bytes(2, "big")), 1002, "no valid code"),
        (frame(CLOSE, (5000).to_bytes(2, "big")), 1002, "no valid code"),
    ],
)
def test_what_is_against_the_protocol_ends_it_with_the_code_for_that(raw: bytes, code: int, why: str) -> None:
    texts, error, sent = run(against(frame(TEXT, b"before") + raw))
    assert texts == ["before"] and why in error
    assert unmasked(sent) == [(CLOSE, code.to_bytes(2, "big"))]


def test_the_largest_message_is_taken_in_one_piece_and_in_many() -> None:
    pieces = frame(0x01, b"x") + frame(0x00, b"x") * 998 + frame(0x80, b"x")
    texts, error, sent = run(against(frame(TEXT, b"x" * 1000) + pieces + frame(CLOSE)))
    assert (texts, error, unmasked(sent)) == (["x" * 1000] * 2, "", [(CLOSE, b"")])


def test_a_ping_is_answered_with_its_own_bytes() -> None:
    _, _, sent = run(against(frame(PING, b"are you there") + frame(PONG, b"unasked") + frame(CLOSE, b"\x03\xe8")))
    assert unmasked(sent) == [(PONG, b"are you there"), (CLOSE, b"\x03\xe8")]


@pytest.mark.parametrize("raw", [b"", b"\x81", frame(TEXT, b"hello")[:-1], frame(0x01, b"hello")])
def test_a_connection_that_breaks_off_is_an_error(raw: bytes) -> None:
    texts, error, _ = run(against(raw, end=True))
    assert texts == [] and "the connection is gone" in error


@pytest.mark.parametrize("raw", [b"", b"\x81", frame(TEXT, b"hello")[:-1]])
def test_who_says_nothing_is_taken_for_gone(raw: bytes) -> None:
    texts, error, _ = run(against(raw, silence=0.3))
    assert texts == [] and "nothing came for 0.3 s" in error


# -- the handshake

KEY = base64.b64encode(os.urandom(16))
GOOD = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: " + accept(KEY)


def test_the_example_of_the_rfc() -> None:
    judge(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
        b"dGhlIHNhbXBsZSBub25jZQ==",
    )


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (GOOD.replace(b"1.1 101", b"1.1 200"), "status 200"),
        (GOOD.replace(b"1.1 101", b"1.0 101"), "no HTTP/1.1"),
        (b"SSH-2.0-x", "no HTTP/1.1"),
        (GOOD + b"\r\n folded", "no HTTP/1.1"),
        (GOOD + b"\r\nno colon", "no HTTP/1.1"),
        (GOOD + b"\r\nx: " + b"y" * 16384, "no HTTP/1.1"),
        (GOOD.replace(b"upgrade: websocket", b"upgrade: h2c"), "no WebSocket"),
        (GOOD.replace(b"connection: upgrade", b"connection: close"), "no WebSocket"),
        (GOOD.replace(accept(KEY), accept(b"x")), "no WebSocket"),
        (GOOD + b"\r\nsec-websocket-accept: " + accept(KEY), "no WebSocket"),
        (GOOD + b"\r\nsec-websocket-extensions: permessage-deflate", "not offered"),
        (GOOD + b"\r\nsec-websocket-protocol: chat", "not offered"),
    ],
)
def test_what_does_not_accept_our_handshake(answer: bytes, why: str) -> None:
    judge(GOOD + b"\r\n\r\n", KEY)
    with pytest.raises(WebSocketError, match=why):
        judge(answer + b"\r\n\r\n", KEY)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 101 X\r\n", b"x" * 200_000])
def test_a_handshake_without_an_answer(answer: bytes) -> None:
    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def client() -> None:
        async with await asyncio.start_server(server, "127.0.0.1", 0) as listening:
            with pytest.raises(WebSocketError, match="not answered"):
                await dial(listening.sockets[0].getsockname()[1])

    run(client())


def test_a_connection_that_ends_while_we_say_something_is_an_error_of_ours() -> None:
    async def server(connection: ServerConnection) -> None:
        connection.transport.abort()

    async def client(socket: WebSocket) -> None:
        with pytest.raises((WebSocketError, OSError)):
            while True:
                await socket.send("x" * 1000)
        with pytest.raises(WebSocketError, match="is gone"):
            await heard(socket)

    run(beside(server, client))
