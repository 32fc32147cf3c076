"""A gateway between misbehaving ends, watched: what it holds, what it counts, how large it is.

Strategy: one process serves all tests of the adversity files; after each of them its gauges have to come back to nothing, its
worker has to be the same process, and its log must not speak of an error of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.integration.faults import Message, ScriptedOrigin, Stream, connect
from tests.integration.processes import PATIENCE, Gateway, eventually


class WatchedGateway(Gateway):
    """A gateway whose figures are watched: see calm()."""

    def __init__(self, path: Path, *arguments: str, **options: Any) -> None:
        super().__init__(path, *arguments, **options)
        eventually(self.workers, "the workers")
        self.pids = self.workers()

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name with labels."""
        text: str = self.admin("/metrics")[1]
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def counter(self, name: str) -> float:
        return self.metrics()[f"crossway_{name}_total"]

    def held(self) -> dict[str, float]:
        """What the workers hold beyond their listening sockets."""
        found = self.metrics()
        names = ("connections", "exchanges", "exchanges_parked", "buffers", 'upstream_connections{state="active"}')
        held = {name: found[f"crossway_{name}"] for name in names}
        idle = found['crossway_upstream_connections{state="idle"}']
        held["descriptors"] = found["crossway_descriptors"] - idle - len(self.workers()) * (len(self.addresses) - 1)
        return {name: value for name, value in held.items() if value}

    def calm(self, *, same: bool = True) -> None:
        """Nothing is held any more, no worker died, and nothing was an error of the gateway's own."""
        end = time.monotonic() + PATIENCE
        while held := self.held():
            assert time.monotonic() < end, f"still held: {held}"
            time.sleep(0.02)
        assert not same or self.workers() == self.pids
        wrong = [line for line in self.log() if line["level"] in ("error", "critical")]
        assert not same or not wrong, wrong

    def rss(self) -> int:
        """Resident bytes of the first worker."""
        return resident(self.pids[0])

    def files(self) -> int:
        """Open descriptors of the first worker."""
        return len(os.listdir(f"/proc/{self.pids[0]}/fd"))


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class Peak:
    """The largest resident size of a process while a block runs, in bytes above that at its start."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.growth = 0
        self._start = resident(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.look()

    def look(self) -> int:
        self.growth = max(self.growth, resident(self.pid) - self._start)
        return self.growth

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.look()


LISTENERS = {
    "public": "",
    "patient": "timeouts: {head: 30s, body: 30s, write: 30s}",
    "few": "limits: {connections: 4}",
    "proxied": "proxy_protocol: required",
    "maybe": "proxy_protocol: optional",
}
TIMES = "timeouts: {head: 400ms, body: 400ms, keepalive: 20s, write: 400ms}"
LIMITS = "body: 2GiB, requests: 100000000"


def write_faults_config(path: Path, ports: Mapping[str, int], *, workers: int = 1, listeners: Mapping[str, str] = LISTENERS) -> Path:
    """Routes by first segment: /x and below to `origin`, and one for each of `ports`; /slow has patient deadlines."""
    lines = ["version: 1", f"workers: {workers}", "admin: {bind: 127.0.0.1:0}", "drain: {deadline: 10s}", "listeners:"]
    for name, more in listeners.items():
        parts = ["bind: 127.0.0.1:0"]
        parts += [TIMES] if "timeouts" not in more else []
        parts += [f"limits: {{{LIMITS}}}"] if "limits" not in more else []
        parts += [more] if more else []
        lines.append(f"  {name}: {{{', '.join(parts)}}}")
    lines.append("upstreams:")
    brief = "timeouts: {connect: 300ms, head: 400ms, idle: 400ms, total: 20s}"
    for name, port in ports.items():
        lines.append(f"  {name}: {{targets: [127.0.0.1:{port}], {brief}}}")
    lines.append(f"  slow: {{targets: [127.0.0.1:{ports['origin']}]}}")
    lines.append("routes:")
    lines.append("  - {name: all, match: {prefix: /x}, upstream: origin}")
    lines.append("  - {name: brief, match: {prefix: /brief}, upstream: origin, timeouts: {total: 900ms}}")
    lines.append("  - {name: small, match: {prefix: /small}, upstream: origin, limits: {body: 1KiB}}")
    for name in [*ports, "slow"]:
        lines.append(f"  - {{name: to-{name}, match: {{prefix: /{name}}}, upstream: {name}}}")
    path.write_text("\n".join(lines) + "\n")
    return path


class Ports:
    """Addresses that fail: `gone` refuses, `full` has a queue without room, `process` is kept for an OriginProcess."""

    def __init__(self) -> None:
        self._gone, self._kept, self._full = socket.socket(), socket.socket(), socket.socket()
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for sock in (self._gone, self._kept, self._full):
            sock.bind(("127.0.0.1", 0))
        self.gone, self.process, self.full = (sock.getsockname()[1] for sock in (self._gone, self._kept, self._full))
        self._full.listen(0)
        self._queued = [socket.socket() for _ in range(4)]
        for sock in self._queued:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", self.full))

    def close(self) -> None:
        for sock in (self._gone, self._kept, self._full, *self._queued):
            sock.close()


@dataclass
class Bank:
    """A gateway of one worker between a test and its origin."""

    gateway: WatchedGateway
    origin: ScriptedOrigin
    ports: Ports

    def client(self, name: str = "public", *, receive: int = 0) -> Stream:
        return connect(self.gateway.port(name), receive=receive)

    def ask(self, request: bytes, name: str = "public") -> Message:
        """One request on a connection of its own."""
        with self.client(name) as stream:
            return stream.ask(request)


@contextlib.contextmanager
def open_bank(folder: Path) -> Iterator[Bank]:
    origin, ports = ScriptedOrigin(), Ports()
    names = {"origin": origin.port, "gone": ports.gone, "full": ports.full, "process": ports.process}
    try:
        with WatchedGateway(write_faults_config(folder / "faults.yaml", names)) as gateway:
            yield Bank(gateway, origin, ports)
    finally:
        origin.close()
        ports.close()
