"""A server for tests of the load generator, in a process of its own: stalls on purpose, or answers wrongly, by path; over TLS, too.

Strategy: one thread, so that a stall stops everything at once, as a garbage collection or a failover does. It says its port on
stdout and ends with its stdin.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
ANSWERS = {
    b"/chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n3;x=y\r\nfin\r\n0\r\n\r\n",
    b"/early": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + GOOD,
    b"/empty": b"HTTP/1.1 204 No Content\r\n\r\n",
    b"/head": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
    b"/unavailable": b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
    b"/bad": b"HTTP/1.1 abc\r\n\r\n",
    b"/long": GOOD + b"more",
    b"/short": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok",
    b"/eof": b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
    b"/closing": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    b"/never": b"",
    b"/large": b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(1_000_000),
}
ANSWERED: list[int] = []  # when each request for / was answered: ns, CLOCK_MONOTONIC, which is one clock for all processes
CLOSES = {b"/eof", b"/closing", b"/short"}


class Serve(asyncio.Protocol):
    def __init__(self) -> None:
        self.pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.pending += data
        while b"\r\n\r\n" in self.pending and not self.transport.is_closing():
            head, _, rest = self.pending.partition(b"\r\n\r\n")
            length = next((int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: ")), 0)
            if len(rest) < length:
                return
            self.pending = rest[length:]
            self.answer(head.split(b" ")[1])

    def answer(self, path: bytes) -> None:
        if path == b"/reset":
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.transport.abort()
        elif path == b"/pieces":
            asyncio.ensure_future(self.drip(GOOD))
        elif path == b"/answered":
            body = json.dumps(ANSWERED).encode()
            ANSWERED.clear()
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        else:
            if path == b"/":
                ANSWERED.append(time.monotonic_ns())
            self.transport.write(ANSWERS.get(path, GOOD))
            if path in CLOSES:
                self.transport.close()

    async def drip(self, data: bytes) -> None:
        for i in range(0, len(data), 7):
            self.transport.write(data[i : i + 7])
            await asyncio.sleep(0.001)


def freeze(until: float) -> None:
    time.sleep(max(0.0, until - time.monotonic()))


async def stalls(period: float, stall: float) -> None:
    """Stop everything for `stall` seconds at the end of each `period`, on a clock that does not drift."""
    at = time.monotonic()
    while True:
        at += period
        await asyncio.sleep(max(0.0, at - stall - time.monotonic()))
        freeze(at)


def tls_context(cert: Path, client_ca: Path | None, version: str | None) -> ssl.SSLContext:
    """CERT.crt and CERT.key; `client_ca`: clients must show a certificate; `version`: the only one."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(cert.with_suffix(".crt"), cert.with_suffix(".key"))
    if client_ca is not None:
        made.verify_mode = ssl.CERT_REQUIRED
        made.load_verify_locations(client_ca)
    if version is not None:
        made.minimum_version = made.maximum_version = ssl.TLSVersion[version]
    return made


async def serve(period: float, stall: float, context: ssl.SSLContext | None) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Serve, "127.0.0.1", 0, backlog=1024, ssl=context)
    print(server.sockets[0].getsockname()[1], flush=True)
    if stall:
        stalling = asyncio.ensure_future(stalls(period, stall))
    ended = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()
    if stall:
        stalling.cancel()


class BenchServer:
    """The server as a context manager; `url(path)`. `cert`: it speaks TLS with CERT.crt and CERT.key, see tls_context()."""

    def __init__(
        self, period: float = 1.0, stall: float = 0.0, *,
        cert: Path | None = None, client_ca: Path | None = None, version: str | None = None, host: str = "127.0.0.1",
    ) -> None:  # fmt: skip
        self.words = [f"--period={period}", f"--stall={stall}"]
        self.words += [f"--{name}={value}" for name, value in (("cert", cert), ("client-ca", client_ca), ("version", version)) if value]
        self.scheme, self.host = "http" if cert is None else "https", host

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, __file__, *self.words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def answered(self) -> list[int]:
        """When it answered each request for / since the last time it was asked this."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", "/answered")
        times = json.loads(connection.getresponse().read())
        connection.close()
        return list(times)

    def url(self, path: str = "/") -> str:
        return f"{self.scheme}://{self.host}:{self.port}{path}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--period", type=float)
    parser.add_argument("--stall", type=float)
    parser.add_argument("--cert", type=Path)
    parser.add_argument("--client-ca", type=Path)
    parser.add_argument("--version")
    given = parser.parse_args()
    asyncio.run(serve(given.period, given.stall, given.cert and tls_context(given.cert, given.client_ca, given.version)))
