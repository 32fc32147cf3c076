"""One check of one endpoint over HTTP or bare TCP, on a connection of its own.

Strategy: returns an empty text for a healthy endpoint and else the reason, in words for the log; the caller limits the time.
What an endpoint sends is read up to a bound, whatever it sends. A failure of this machine (no descriptors, no memory) is no
answer of the endpoint's: it judges nobody.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable

import httptools

from gateway.config.health import Check, HttpCheck
from gateway.discovery.found import Found
from gateway.health.grpc import ask_grpc
from gateway.health.http2 import ask_http2

MAX_HEAD = 32 << 10  # bytes of an answer before its body
MAX_BODY = 64 << 10  # bytes of a body that are searched
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.EAGAIN)

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Opener = Callable[[Found], Awaitable[Connection]]


class Inconclusive(Exception):
    """The check could not be made, for a reason that lies here."""


async def open_plain(found: Found) -> Connection:
    """Connect without TLS."""
    return await asyncio.open_connection(found.address.host, found.address.port, limit=MAX_HEAD)


async def probe(check: Check, found: Found, opener: Opener = open_plain, *, http2: bool = False, secure: bool = False) -> str:
    """Make one check; return why it failed, or an empty text. `http2`: what the endpoint speaks. Raises Inconclusive."""
    try:
        reader, writer = await opener(found)
    except OSError as error:
        if error.errno in _OURS:
            raise Inconclusive(_words(error)) from None
        return f"no connection: {_words(error)}"
    try:
        scheme = "https" if secure else "http"
        if check.http is not None and http2:
            return await ask_http2(reader, writer, check.http, check.http.host or found.host, scheme)
        if check.http is not None:
            return await ask_http(reader, writer, check.http, check.http.host or found.host)
        if check.grpc is not None:
            return await ask_grpc(reader, writer, check.grpc.service, found.host, check.timeout, scheme)
        return ""
    except OSError as error:
        return f"the connection broke: {_words(error)}"
    finally:
        writer.close()


def _words(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__


class _Answer:
    """What httptools finds in an answer; interim answers are passed over."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.status = 0  # of the final answer, once its head is complete
        self.body = bytearray()
        self.complete = False

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        if status >= 200:
            self.status = status

    def on_body(self, data: bytes) -> None:
        self.body += data[: MAX_BODY - len(self.body)]

    def on_message_complete(self) -> None:
        self.complete = self.status != 0


async def ask_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, check: HttpCheck, host: str) -> str:
    """Send the request and judge the answer; return why it is not healthy."""
    request = (
        f"GET {check.path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: crossway-check\r\naccept: */*\r\nconnection: close\r\n\r\n"
    )
    writer.write(request.encode("ascii"))
    answer, wanted = _Answer(), (check.body or "").encode()
    size = 0
    while not answer.complete and len(answer.body) < MAX_BODY:
        data = await reader.read(MAX_HEAD)
        if not data:
            break
        size += len(data)
        try:
            answer.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return "it wants to change the protocol"
        except httptools.HttpParserError:
            return "the answer is not HTTP/1.1"
        if not answer.status and size > MAX_HEAD:
            return f"the head of the answer is longer than {MAX_HEAD >> 10}KiB"
        if answer.status and (answer.status not in check.status or wanted in answer.body):
            break
    if not answer.status:
        return "no answer before the end of the connection"
    if answer.status not in check.status:
        return f"status {answer.status}"
    return "" if wanted in answer.body else "the expected text is not in the body"
