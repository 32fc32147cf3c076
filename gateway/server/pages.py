"""A very small HTTP server for a process that has no room for a real one: GET, a few pages, one answer per connection.

Strategy: for loopback and for scrapers. The head has a bound in bytes and in time, connections are counted, and everything but a GET of a
known page is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Mapping

HEAD = 8192  # bytes
PATIENCE = 6.0  # seconds for the head, and for the answer to be taken
OPEN = 32  # connections
REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 500: "Internal Server Error", 503: "Service Unavailable"}

Answer = tuple[int, str, bytes]  # status, media type, body
Page = Callable[[], Answer | Awaitable[Answer]]


def bound(host: str, port: int, only_v6: bool = False) -> socket.socket:
    """Bind a socket to a numeric address; a loop that is given a host starts threads to look it up. Raises OSError.

    An IPv6 address takes IPv4 as well where it can, unless `only_v6`.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if only_v6 and sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


class Pages:
    """Serves `pages` by path. `hosts` are the names by which it may be asked: a web page of elsewhere must not read it."""

    def __init__(self, pages: Mapping[str, Page]) -> None:
        self.pages = pages
        self._open = 0
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; return the address that it became. Raises OSError."""
        sock = bound(host, port, only_v6=True)
        self._server = await asyncio.start_server(self._serve, sock=sock, limit=HEAD)
        name = sock.getsockname()
        return name[0], name[1]

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= OPEN:
                async with asyncio.timeout(PATIENCE):
                    head = await reader.readuntil(b"\r\n\r\n")
                    status, media, body = await self._answer(head)
                    writer.write(
                        f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: {media}\r\ncontent-length: {len(body)}\r\n"
                        "cache-control: no-store\r\nconnection: close\r\n\r\n".encode("ascii") + body
                    )
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            self._open -= 1
            with contextlib.suppress(Exception):
                writer.close()

    async def _answer(self, head: bytes) -> Answer:
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return 400, "text/plain", b"not a request\n"
        if words[0] not in (b"GET", b"HEAD"):
            return 405, "text/plain", b"only GET\n"
        page = self.pages.get(words[1].split(b"?", 1)[0].decode("ascii", "replace"))
        if page is None:
            return 404, "text/plain", ("there are: " + " ".join(self.pages) + "\n").encode("ascii")
        found = page()
        status, media, body = found if isinstance(found, tuple) else await found
        return status, media, b"" if words[0] == b"HEAD" else body
