"""A fixed number of requests through one worker's engine, for callgrind to count.

Strategy: client, engine and origin share one process and one thread, over loopback sockets: the client writes a request on
every connection, the engine is polled until it has nothing left, the origin answers them all, the engine is polled, the
client reads. Nothing waits and nothing races, so every run does the same work. callgrind collects inside Engine.poll() only
(see count.py), so start-up, client, origin and the loop around the engine do not count; the warm-up fills pools and caches
and is forgotten when measured_from_here() is called.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from benchmarks.load.programs import fill
from benchmarks.load.scenarios import ANSWER, PAYMENT
from benchmarks.load.tokens import Issuer
from gateway._speedups.engine import Engine
from gateway._speedups.timing import measured_from_here
from gateway.config import load
from gateway.snapshot import build
from gateway.telemetry.shared import SharedState

HERE = Path(__file__).resolve().parent
SCENARIOS = ("bare", "edge")
CONNECTIONS = 32
REQUESTS = 1280
WARM_UP = 3  # rounds
ANSWER_HEAD = (
    "HTTP/1.1 200 OK\r\nServer: origin\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(ANSWER)}\r\nConnection: keep-alive\r\n\r\n"
)


def request_of(scenario: str, token: str) -> bytes:
    """Return the bytes that each client connection sends, over and over: those of wrk in benchmarks/load."""
    if scenario == "bare":
        return b"GET /v1/payments HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n\r\n"
    return (
        f"POST /v1/payments HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {token}\r\nContent-Length: {len(PAYMENT)}\r\n\r\n{PAYMENT}"
    ).encode()


class Workload:
    """One engine between CONNECTIONS client sockets and an origin."""

    def __init__(self, scenario: str, folder: Path, loop: uvloop.Loop) -> None:
        self.origin = socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS)
        self.origin.setblocking(False)
        self.upstreams: list[socket.socket] = []
        issuer = Issuer()
        issuer.publish(folder)
        config = folder / f"{scenario}.yaml"
        config.write_text(fill((HERE / config.name).read_text(), {"ORIGIN": self.origin.getsockname()[1]}))
        memory = SharedState(1)
        self.snapshot = build(load(config), names=memory.names, seed=1, version=1)
        self.engine = Engine(0, memory.slot(0), memory.buckets)
        loop.run_until_complete(self.start(loop))  # the loop's only turn; afterwards poll() is called from here
        listener = socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS)
        listener.setblocking(False)
        self.engine.listen("public", listener.fileno())
        self.request = request_of(scenario, issuer.token())
        self.clients = [socket.create_connection(listener.getsockname()) for _ in range(CONNECTIONS)]
        self.answer = ANSWER_HEAD.encode() + ANSWER.encode()

    async def start(self, loop: uvloop.Loop) -> None:
        """What a worker does before it listens."""
        self.snapshot.start(loop)
        self.engine.apply(self.snapshot)
        self.engine.start(loop)

    def round(self) -> None:
        """One request and its answer on every connection."""
        for client in self.clients:
            client.sendall(self.request)
        self.poll_until(self.requests_arrived)
        for upstream in self.upstreams:
            if not upstream.recv(65536).startswith(self.request[:20]):
                raise RuntimeError("the origin received something else than the request")
            upstream.sendall(self.answer)
        self.poll_until(self.answers_arrived)
        for client in self.clients:
            got = client.recv(65536)
            if not got.startswith(b"HTTP/1.1 200 ") or not got.endswith(ANSWER.encode()):
                raise RuntimeError(f"the client received {got!r}")

    def poll_until(self, arrived: Callable[[], bool]) -> None:
        """Poll the engine until the other ends have what they wait for. Loopback delivers within the system call."""
        for _ in range(100):
            self.engine.poll()
            if arrived():
                return
        raise RuntimeError("the engine did not pass on what it received")

    def requests_arrived(self) -> bool:
        """True when every upstream connection holds a request; connects what is still missing."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.upstreams.append(self.origin.accept()[0])
        return len(self.upstreams) == CONNECTIONS and all(map(readable, self.upstreams))

    def answers_arrived(self) -> bool:
        """True when every client connection holds an answer."""
        return all(map(readable, self.clients))


def readable(sock: socket.socket) -> bool:
    """True when bytes wait in the socket."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


def main() -> None:
    """Warm up, tell callgrind, then run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="measured ones; a multiple of the connections")
    options = parser.parse_args()
    if options.requests < CONNECTIONS or options.requests % CONNECTIONS:
        parser.error(f"--requests must be a multiple of {CONNECTIONS}")
    folder = Path(tempfile.mkdtemp(prefix="crossway-instructions-"))
    loop = uvloop.new_event_loop()
    try:
        workload = Workload(options.scenario, folder, loop)
        for _ in range(WARM_UP):
            workload.round()
        gc.collect()
        gc.disable()  # a collection would fall into some run's requests and not into another's
        measured_from_here()
        began = time.perf_counter()
        for _ in range(options.requests // CONNECTIONS):
            workload.round()
        print(f"{options.requests} requests in {time.perf_counter() - began:.2f} s")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
