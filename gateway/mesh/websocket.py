"""The client's half of a WebSocket (RFC 6455), as far as the control plane's stream goes: text both ways, pings, and an end with a reason.

Strategy: `websockets` brings importlib.metadata, zipfile, urllib.request, http.client and email along, 3 MiB that every sidecar would hold for one
connection. No extension is offered, so that a frame is a head of two to ten bytes and what it announces; both are judged before anything is
held. A task reads, so that pings are answered while a message is dealt with; it stops when a few messages wait.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Mapping

MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
HEAD_MAX = 16 << 10  # bytes of the answer to the handshake
REASON_MAX = 4 << 10  # bytes of a refusal's body that are read: a piece of them, whatever comes at once
PIECE = 64 << 10  # bytes of one read
WAITING = 4  # messages that may wait for who takes them
CLOSE = 2.0  # seconds for the other side to end the connection as well
CONTINUATION, TEXT, BINARY, END, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
DATA, CONTROL = (CONTINUATION, TEXT), (END, PING, PONG)
NORMAL, GOING_AWAY, PROTOCOL_ERROR, UNSUPPORTED, NO_CODE, NOT_UTF8, TOO_LARGE = 1000, 1001, 1002, 1003, 1005, 1007, 1009


class WebSocketError(Exception):
    """The connection cannot be opened, or has ended otherwise than in good order; the text is for a log.

    `code` is that of the other side's close frame, `status` and `body` are those of an answer that refuses the handshake; 0 and b"" where there is none.
    """

    def __init__(self, text: str, *, code: int = 0, status: int = 0) -> None:
        super().__init__(text)
        self.code, self.status, self.body = code, status, b""


class _Refused(Exception):
    """What came is against the protocol or too large: the code of the close frame, and why."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, target: str, most: int, silence: float) -> WebSocket:
    """Shake hands on an open connection and return the WebSocket. Raises WebSocketError, and OSError of the connection.

    A message may have `most` bytes; after `silence` seconds without a byte from the other side, which pings are to prevent, it is taken for gone.
    """
    key = base64.b64encode(os.urandom(16))
    writer.write(
        f"GET {target} HTTP/1.1\r\nhost: {host}\r\nupgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-version: 13\r\n"
        f"sec-websocket-key: {key.decode()}\r\nuser-agent: crossway\r\n\r\n".encode("ascii")
    )
    try:
        fields = judge(await reader.readuntil(b"\r\n\r\n"), key)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        raise WebSocketError("the handshake is not answered") from None
    except WebSocketError as error:
        if error.status:
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                async with asyncio.timeout(CLOSE):
                    error.body = await reader.read(REASON_MAX)
        raise
    return WebSocket(reader, writer, most, silence, {name: values[0] for name, values in fields.items()})


def judge(answer: bytes, key: bytes) -> dict[str, list[str]]:
    """Return the fields of an answer that accepts the handshake of this key, by name in small letters (RFC 6455, 4.1). Raises WebSocketError."""
    first, *lines = answer[:-4].decode("latin-1").split("\r\n")
    status = re.fullmatch(r"HTTP/1\.1 ([0-9]{3})(?: .*)?", first)
    if len(answer) > HEAD_MAX or status is None:
        raise WebSocketError("the handshake is answered by what is no HTTP/1.1")
    if status[1] != "101":
        raise WebSocketError(f"the handshake is answered with status {status[1]}", status=int(status[1]))
    fields: dict[str, list[str]] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise WebSocketError("the handshake is answered by what is no HTTP/1.1")
        fields.setdefault(name.lower(), []).append(value.strip(" \t"))
    proof = base64.b64encode(hashlib.sha1(key + MAGIC, usedforsecurity=False).digest()).decode()
    words = [word.strip().lower() for value in fields.get("connection", ()) for word in value.split(",")]
    if [each.lower() for each in fields.get("upgrade", ())] != ["websocket"] or "upgrade" not in words or fields.get("sec-websocket-accept") != [proof]:
        raise WebSocketError("the handshake is answered by what is no WebSocket")
    if "sec-websocket-extensions" in fields or "sec-websocket-protocol" in fields:
        raise WebSocketError("the handshake is answered with what was not offered")
    return fields


class WebSocket:
    """An open connection. To be iterated over once, for its messages: they end when the connection does in good order; otherwise WebSocketError."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int, silence: float, fields: Mapping[str, str]) -> None:
        self.fields = fields  # of the answer to the handshake, by name in small letters
        self._reader = reader
        self._writer = writer
        self._most = most
        self._silence = silence
        self._came: deque[str] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._closing = False  # our close frame is out: nothing may follow it
        self._fault: str | None = None
        self._code = 0  # of the other side's close frame
        self._reading = asyncio.get_running_loop().create_task(self._read())
        self._reading.add_done_callback(lambda _: self._news.set())

    async def __aiter__(self) -> AsyncIterator[str]:
        while self._came or not self._reading.done():
            if self._came:
                text = self._came.popleft()
                self._room.set()
                yield text
            else:
                self._news.clear()
                await self._news.wait()
        if self._fault is not None:
            raise WebSocketError(self._fault, code=self._code)

    async def send(self, text: str) -> None:
        """Send a message. Raises WebSocketError when the connection has ended, OSError when that shows now."""
        self._put(TEXT, text.encode())
        await self._writer.drain()

    def ping(self) -> None:
        """Make the other side say that it is there. Raises WebSocketError when the connection has ended."""
        self._put(PING, b"")

    async def close(self, code: int = NORMAL) -> None:
        """End the connection in good order, or after two seconds anyhow."""
        self._end(code)
        await asyncio.wait([self._reading], timeout=CLOSE)
        self._reading.cancel()
        self._writer.transport.abort()

    def _end(self, code: int) -> None:
        """Send the close frame, once."""
        with contextlib.suppress(WebSocketError):
            self._put(END, b"" if code == NO_CODE else code.to_bytes(2, "big"))
        self._closing = True

    def _put(self, opcode: int, data: bytes) -> None:
        """Write one frame, masked as a client's has to be (5.3). Raises WebSocketError when none may follow."""
        if self._closing or self._writer.is_closing():
            raise WebSocketError("the connection has ended")
        size, key = len(data), os.urandom(4)
        length = bytes((0x80 | size,)) if size < 126 else b"\xfe" + size.to_bytes(2, "big") if size < 1 << 16 else b"\xff" + size.to_bytes(8, "big")
        mask = (key * (size // 4 + 1))[:size]
        masked = (int.from_bytes(data, "big") ^ int.from_bytes(mask, "big")).to_bytes(size, "big")
        self._writer.write(bytes((0x80 | opcode,)) + length + key + masked)

    async def _read(self) -> None:
        """Take frames until the end, whichever it is."""
        try:
            await self._frames()
        except _Refused as error:
            self._fault = str(error)
            self._end(error.code)
        except TimeoutError:
            self._fault = f"nothing came for {self._silence:g} s"
        except (OSError, EOFError) as error:
            self._fault = None if self._closing else f"the connection is gone: {getattr(error, 'strerror', None) or 'without a word'}"
        finally:
            self._closing = True
            self._writer.close()

    async def _frames(self) -> None:
        """Read frames, hand on messages, answer pings. Returns after the other side's close frame."""
        begun: bytearray | None = None  # a message that is not whole yet
        while True:
            last, opcode, size = await self._frame_head(begun)
            if opcode in DATA:
                begun = await self._append(bytearray() if begun is None else begun, size)
                if last:
                    await self._hand_on(begun)
                    begun = None
                continue
            data = bytes(await self._append(bytearray(), size))
            if opcode == END:
                return self._ended(data)
            if opcode == PING:
                with contextlib.suppress(WebSocketError):
                    self._put(PONG, data)

    async def _hand_on(self, message: bytearray) -> None:
        """Give a whole message to who iterates, when not too many wait; after our close frame nobody wants it."""
        try:
            text = message.decode()
        except UnicodeDecodeError:
            raise _Refused(NOT_UTF8, "a message is not in UTF-8") from None
        while len(self._came) >= WAITING:
            self._room.clear()
            await self._room.wait()
        if not self._closing:
            self._came.append(text)
            self._news.set()

    async def _frame_head(self, begun: bytearray | None) -> tuple[bool, int, int]:
        """Read (last of its message, opcode, size) of a frame, and refuse what may not be (5.2, 5.4, 5.5)."""
        first, second = await self._append(bytearray(), 2)
        last, opcode, size = first >= 0x80, first & 0x0F, second & 0x7F
        if first & 0x70 or second & 0x80 or opcode not in (*DATA, BINARY, *CONTROL):
            raise _Refused(PROTOCOL_ERROR, "a frame has bits that mean nothing here")
        if opcode in CONTROL and (not last or size > 125):
            raise _Refused(PROTOCOL_ERROR, "a control frame is in pieces or too long")
        if opcode == BINARY:
            raise _Refused(UNSUPPORTED, "a message is not text")
        if opcode in DATA and (opcode == CONTINUATION) != (begun is not None):
            raise _Refused(PROTOCOL_ERROR, "a message begins within another, or goes on without a beginning")
        if size > 125:
            wide, least = (2, 126) if size == 126 else (8, 1 << 16)
            size = int.from_bytes(await self._append(bytearray(), wide), "big")
            if size < least:
                raise _Refused(PROTOCOL_ERROR, "the length of a frame is written longer than it is")
        if opcode in DATA and len(begun or b"") + size > self._most:
            raise _Refused(TOO_LARGE, f"a message is larger than {self._most} bytes")
        return last, opcode, size

    async def _append(self, held: bytearray, size: int) -> bytearray:
        """Read so many bytes onto what is held; each piece of them has its own time. Raises TimeoutError, OSError or EOFError."""
        while size:
            async with asyncio.timeout(self._silence):
                piece = await self._reader.readexactly(min(size, PIECE))
            held += piece
            size -= len(piece)
        return held

    def _ended(self, data: bytes) -> None:
        """The other side's close frame: answer it, and remember why unless it is in good order (5.5.1, 7.4)."""
        code = int.from_bytes(data[:2], "big") if data else NO_CODE
        if len(data) == 1 or (data and not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999)):
            raise _Refused(PROTOCOL_ERROR, "a close frame has no valid code")
        if not self._closing:
            if code not in (NORMAL, GOING_AWAY, NO_CODE):
                self._code = code
                self._fault = f"closed with {code} {data[2:].decode('utf-8', 'replace')}".rstrip()
            self._end(code)
