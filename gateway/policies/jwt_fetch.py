"""Fetch one small JSON document over HTTP(S), within a deadline and a size, without redirects.

Strategy: on the worker's loop, with asyncio streams and httptools (which the admin API brings along), not in a thread: a
worker runs no second Python thread, uvloop resolves the name, and one deadline covers resolving, connecting, TLS and the
body, which no per-read timeout of a blocking client does. Whatever goes wrong is a FetchError.
"""

import asyncio
import ipaddress
import re
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpResponseParser

HEAD_ALLOWANCE = 64 << 10       # bytes of head and chunk framing on top of the document
_VISIBLE = re.compile(r"[\x21-\x7e]{1,2048}")


class FetchError(Exception):
    """No document; the message says why, for an operator, and holds nothing of the answer."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where to ask, taken apart and checked once."""

    secure: bool
    host: str
    port: int
    request: bytes

    @classmethod
    def parse(cls, url: str) -> "Origin":
        """Raises ValueError unless `url` is https, or http to this machine, without user or fragment."""
        if not _VISIBLE.fullmatch(url):
            raise ValueError("the URL has characters that need escaping, or more than 2048")
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if parts.scheme not in ("https", "http") or not host:
            raise ValueError("the URL must be https://host/path")
        if parts.scheme == "http" and not _is_loopback(host):
            raise ValueError("keys over plain http could be replaced on their way: use https")
        if parts.username is not None or parts.password is not None or "#" in url:
            raise ValueError("the URL must not hold a user, a password or a fragment")
        secure = parts.scheme == "https"
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        request = (
            f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: application/jwk-set+json, application/json\r\n"
            "Accept-Encoding: identity\r\nUser-Agent: crossway\r\nConnection: close\r\n\r\n"
        )
        return cls(secure, host, port or (443 if secure else 80), request.encode("ascii"))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Answer:
    """What httptools reports of one answer. Nothing is raised in here: httptools would wrap it."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.started = False                        # the head is complete
        self.complete = False
        self.framed = False                         # by Content-Length or chunks, not by the end of the connection
        self.encoded = False

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self.framed = self.framed or name in (b"content-length", b"transfer-encoding")
        self.encoded = self.encoded or (name == b"content-encoding" and value.lower() != b"identity")

    def on_headers_complete(self) -> None:
        self.started = True

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True


async def fetch(origin: Origin, *, timeout: float, limit: int, tls: ssl.SSLContext | None = None) -> bytes:
    """The body of a 200 answer of at most `limit` bytes, complete within `timeout` seconds. Raises FetchError.

    Must run inside a task: its deadline cancels the task it runs in.
    """
    try:
        async with asyncio.timeout(timeout):
            context = (tls or ssl.create_default_context()) if origin.secure else None
            reader, writer = await asyncio.open_connection(origin.host, origin.port, ssl=context)
            try:
                writer.write(origin.request)
                return await _read(reader, limit)
            finally:
                writer.transport.abort()            # no waiting for a closing handshake
    except TimeoutError:
        raise FetchError(f"no complete answer within {timeout:g} s") from None
    except ssl.SSLError as error:
        raise FetchError(f"TLS failed: {error.reason or 'no reason given'}") from None
    except UnicodeError:
        raise FetchError("the host name is invalid") from None
    except OSError as error:
        raise FetchError(f"the connection failed: {error.strerror or type(error).__name__}") from None


async def _read(reader: asyncio.StreamReader, limit: int) -> bytes:
    answer = _Answer()
    parser = HttpResponseParser(answer)
    received = 0
    while not answer.complete:
        data = await reader.read(64 << 10)
        if not data:
            break
        received += len(data)
        try:
            parser.feed_data(data)
        except HttpParserError:
            raise FetchError("the answer is not HTTP") from None
        if answer.started and parser.get_status_code() != 200:
            raise FetchError(f"the answer was {parser.get_status_code()}, not 200")
        if answer.encoded:
            raise FetchError("the answer has a content coding that was not asked for")
        if received > limit + HEAD_ALLOWANCE or len(answer.body) > limit:
            raise FetchError(f"the answer has more than {limit} bytes")
    # Without framing the end of the connection ends the body; a cut document is no JSON object, so it is found out.
    if not answer.complete and (answer.framed or not answer.started):
        raise FetchError("the answer was cut short")
    return bytes(answer.body)
