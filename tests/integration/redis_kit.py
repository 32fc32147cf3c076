"""A redis-server of a test's own, an address that can be moved, an origin that counts, and a load: for limits over gateways.

Strategy: every server listens on a free port of loopback, keeps nothing on disk unless asked, and is ended by its process id. The
load runs in one thread over asyncio, so that the gateways, not the clients, are what is busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import redis

from tests.integration.processes import PATIENCE, Gateway, eventually


def free_port() -> int:
    """A port that nobody listens on, below the range from which the kernel gives ports to clients."""
    for port in range(20_000 + time.monotonic_ns() // 1000 % 8000, 32_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port + 10_000 < 65_536:
                with socket.socket() as bus:            # a cluster's nodes talk to each other there
                    bus.bind(("127.0.0.1", port + 10_000))
                    return port
    raise RuntimeError("no port is free")


class RedisServer:
    """A redis-server process; start() again after kill() is the same server, empty."""

    def __init__(self, folder: Path, *arguments: str, port: int | None = None, tls: bool = False, **options: Any) -> None:
        """`options` are those of the test's own client."""
        self.folder = folder
        self.options = options
        self.port = port or free_port()
        self.tls = tls
        self.arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        listen = ["--port", "0", "--tls-port", str(self.port)] if self.tls else ["--port", str(self.port)]
        common = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self.folder), "--daemonize", "no"]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(["redis-server", *common, *listen, *self.arguments], stdout=log, stderr=log)
        try:
            eventually(self.answers, "redis-server")
        except BaseException:
            self.kill()
            raise

    def answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError((self.folder / "redis.log").read_text())
        with contextlib.suppress(redis.RedisError, OSError):
            return bool(self.client().ping())
        return False

    def client(self) -> redis.Redis:
        secure: dict[str, Any] = {"ssl": True, "ssl_cert_reqs": "none", "ssl_check_hostname": False} if self.tls else {}
        return redis.Redis(port=self.port, socket_timeout=PATIENCE, **secure, **self.options)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE)
            self.process = None

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


class Loop:
    """An asyncio loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE * 3)

    def close(self) -> None:
        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PATIENCE)
        self.loop.close()


class CountingOrigin:
    """Answers every GET at once and keeps the moment of each, by path."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self._own = Loop()
        origin = self

        class Connection(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                self.transport, self.buffer = transport, b""

            def data_received(self, data: bytes) -> None:
                self.buffer += data
                while b"\r\n\r\n" in self.buffer:
                    head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
                    path = head.split(b" ", 2)[1].decode()
                    origin.times.setdefault(path, []).append(time.monotonic())
                    self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

        async def serve() -> Any:
            return await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)

        self.server = self._own.run(serve())
        self.port: int = self.server.sockets[0].getsockname()[1]

    def count(self, path: str) -> int:
        return len(self.times.get(path, []))

    def close(self) -> None:
        self._own.loop.call_soon_threadsafe(self.server.close)
        self._own.close()


class Relay:
    """An address that leads to whichever server it is pointed at, as a virtual address or a name does; old connections are cut."""

    def __init__(self, port: int) -> None:
        self.target = port
        self._own = Loop()
        self._writers: set[asyncio.StreamWriter] = set()

        async def serve() -> Any:
            return await asyncio.start_server(self._carry, "127.0.0.1", 0)

        self.server = self._own.run(serve())
        self.port: int = self.server.sockets[0].getsockname()[1]

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, back}

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(pump(reader, back), pump(there, writer))
        self._writers -= {writer, back}

    def point(self, port: int) -> None:
        self.target = port

        async def cut() -> None:
            for writer in self._writers:
                writer.transport.abort()

        self._own.run(cut())

    def close(self) -> None:
        self._own.loop.call_soon_threadsafe(self.server.close)
        self._own.close()


class Load:
    """Clients that ask several gateways for one path, as fast as they are answered or `pace` requests a second each, until stopped."""

    def __init__(self, gateways: Sequence[Gateway], path: str, *, clients: int = 4, pace: float = 0.0, headers: str = "") -> None:
        self.answers: Counter[int] = Counter()
        self.request = f"GET {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n".encode()
        self.pace = pace
        self._own = Loop()
        self._over = False
        self.started = time.monotonic()
        self._tasks = [
            asyncio.run_coroutine_threadsafe(self._client(gateway.port()), self._own.loop)
            for gateway in gateways for _ in range(clients)
        ]

    async def _client(self, port: int) -> None:
        while not self._over:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                while not self._over and await self._ask(reader, writer):
                    pass
            finally:
                writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; False when the gateway ends the connection after it, as it does after some thousands."""
        writer.write(self.request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        self.answers[int(head.split(b" ", 2)[1])] += 1
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(length)
        if self.pace:
            await asyncio.sleep(1 / self.pace)
        return b"connection: close" not in head

    def stop(self) -> Counter[int]:
        """End after the answers under way; raises what a client met."""
        self._over = True
        for task in self._tasks:
            task.result(PATIENCE)
        self._own.close()
        return self.answers


def metrics(gateway: Gateway) -> dict[str, float]:
    """Every sample of /metrics by its name with labels."""
    lines = (line.rpartition(" ") for line in gateway.admin("/metrics")[1].splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def shared_config(rest: str, origin: CountingOrigin, settings: str, *, workers: int = 2) -> str:
    """A configuration whose `rest` gives policies and routes; `settings` are those of redis, in braces."""
    return (
        f"version: 1\nworkers: {workers}\nadmin: {{bind: 127.0.0.1:0}}\nlisteners: {{public: {{bind: 127.0.0.1:0}}}}\n"
        f"redis: {settings}\nupstreams: {{origin: {{targets: [127.0.0.1:{origin.port}]}}}}\n{rest}"
    )


@contextlib.contextmanager
def gateways(folder: Path, text: str, count: int = 2) -> Iterator[list[Gateway]]:
    """So many gateways with one configuration, each in a folder of its own; Redis is there for all their workers."""
    with contextlib.ExitStack() as stack:
        running = []
        for number in range(count):
            own = folder / f"gateway-{number}"
            own.mkdir()
            (own / "edge.yaml").write_text(text)
            running.append(stack.enter_context(Gateway(own / "edge.yaml")))
        yield running
        for gateway in running:
            assert "Traceback" not in gateway.errors.read_text()


def ask(gateway: Gateway, path: str, **headers: str) -> tuple[int, dict[str, str]]:
    """One request on a connection of its own: status and header fields by lower-case name."""
    connection = gateway.connect()
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        response.read()
        return response.status, {name.lower(): value for name, value in response.getheaders()}
    finally:
        connection.close()


def there(gateway: Gateway, up: float = 1.0) -> bool:
    """Whether every worker says that Redis is there (or away, with `up` 0)."""
    found = [value for name, value in metrics(gateway).items() if name.startswith("crossway_redis_up{")]
    return bool(found) and len(found) == len(gateway.workers()) and set(found) == {up}


def longest_wait(gateway: Gateway) -> float:
    """The longest that any request of the gateway's workers has waited for Redis, in seconds, as the workers measured it."""
    return max(value for name, value in metrics(gateway).items() if name.startswith("crossway_worker_limit_wait_max_seconds"))
