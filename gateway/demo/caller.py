"""A client of the gateway over a plain socket: it can send what well-behaved clients cannot.

Strategy: blocking sockets and the standard library's response parser. A connection is kept between requests and made again
after an answer that closed it, as a browser or a service would.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from dataclasses import dataclass
from typing import Any

TIMEOUT = 10.0  # seconds for any single wait


@dataclass(frozen=True, slots=True)
class Call:
    """A request to send. `raw` replaces everything else: bytes exactly as they go on the wire."""

    method: str
    path: str
    token: str | None = None
    body: bytes = b""
    declared: int | None = None  # Content-Length to claim; None: the body's own
    raw: bytes | None = None

    def encode(self, host: str) -> bytes:
        """Return the bytes of the request to a host (RFC 9112 section 2.1)."""
        if self.raw is not None:
            return self.raw
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: {host}", "User-Agent: crossway-demo"]
        if self.token is not None:
            lines.append(f"Authorization: Bearer {self.token}")
        if self.body:
            lines += ["Content-Type: application/json", f"Content-Length: {self.declared or len(self.body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and how many seconds after the request was sent it was complete. Header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object; empty for other JSON, ValueError for anything else."""
        value = json.loads(self.body)
        # What is not an object has none of the members that anybody asks for.
        return value if isinstance(value, dict) else {}

    def reason(self) -> str:
        """Return what the problem details say (RFC 9457): the detail, or the title; empty for other answers."""
        if "problem+json" not in self.headers.get("content-type", ""):
            return ""
        problem = self.json()
        return str(problem.get("detail") or problem.get("title") or "")


class Caller:
    """One connection to a port of 127.0.0.1, opened when needed; `host` is the name that requests ask for."""

    def __init__(self, port: int, host: str = "", timeout: float = TIMEOUT) -> None:
        self._address = ("127.0.0.1", port)
        self._host = host or f"127.0.0.1:{port}"
        self._timeout = timeout
        self._connection: socket.socket | None = None

    def call(self, call: Call) -> Answer:
        """Send a request and return its answer; raise OSError or http.client.HTTPException when there is none."""
        if self._connection is None:
            self._connection = socket.create_connection(self._address, self._timeout)
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = time.perf_counter()
        response = http.client.HTTPResponse(self._connection, method=call.method)
        try:
            self._connection.sendall(call.encode(self._host))
            response.begin()
            body = response.read()
        except BaseException:
            self.close()
            raise
        seconds = time.perf_counter() - started
        headers = {name.lower(): value for name, value in response.getheaders()}
        if response.will_close:
            self.close()
        return Answer(response.status, headers, body, seconds)

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def ask(port: int, call: Call) -> Answer:
    """Send one request over a connection of its own; raise OSError or http.client.HTTPException when there is no answer."""
    caller = Caller(port)
    try:
        return caller.call(call)
    finally:
        caller.close()


def responds(port: int, path: str) -> bool:
    """Whether a page is there and says 200."""
    try:
        return ask(port, Call("GET", path)).status == 200
    except (OSError, http.client.HTTPException):
        return False
