"""A fixed number of requests through one worker's engine, for callgrind to count.

Strategy: client, engine and origin share one process and one thread, over loopback sockets: the client writes a request on
every connection (in HTTP/2: on every stream of every connection), the engine is polled until it has nothing left, the origin answers
them all, the engine is polled, the client reads. Nothing waits and nothing races, so every run does the same work. callgrind collects inside Engine.poll() only
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

from benchmarks.instructions.streams import STREAMS, Client, Origin
from benchmarks.load.programs import fill
from benchmarks.load.scenarios import ANSWER, PAYMENT
from benchmarks.load.tokens import Issuer
from gateway._speedups.engine import Engine
from gateway._speedups.timing import measured_from_here
from gateway.config import load
from gateway.snapshot import build
from gateway.telemetry.shared import SharedState

HERE = Path(__file__).resolve().parent
SCENARIOS = ("bare", "edge", "http2", "grpc")
STREAMED = ("http2", "grpc")
CONNECTIONS = 32
STREAM_CONNECTIONS = 8  # in HTTP/2, with STREAMS streams each
BACKLOG = 128
REQUESTS = 1280
WARM_UP = 3  # rounds
ANSWER_HEAD = (
    "HTTP/1.1 200 OK\r\nServer: origin\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(ANSWER)}\r\nConnection: keep-alive\r\n\r\n"
)

AGENT = ("user-agent", "benchmark")
GET_REQUEST = [(":method", "GET"), (":scheme", "http"), (":authority", "127.0.0.1:8080"), (":path", "/v1/payments"), AGENT]
GET_ANSWER = [
    (":status", "200"),
    ("server", "origin"),
    ("date", "Thu, 01 Jan 2026 00:00:00 GMT"),
    ("content-type", "application/json"),
    ("content-length", str(len(ANSWER))),
]
GRPC_REQUEST = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "127.0.0.1:8080"),
    (":path", "/bank.v1.Payments/Transfer"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
    AGENT,
    ("grpc-accept-encoding", "identity, deflate, gzip"),
]
GRPC_ANSWER = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-accept-encoding", "identity, deflate, gzip")]
TRAILERS = [("grpc-status", "0"), ("grpc-message", "")]


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
        self.scenario = scenario
        self.origin = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
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
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self.listener.setblocking(False)
        self.engine.listen("public", self.listener.fileno())
        self.request = request_of(scenario, issuer.token())
        self.answer = ANSWER_HEAD.encode() + ANSWER.encode()
        self.connect()

    def connect(self) -> None:
        """Open the clients' connections."""
        self.clients = [socket.create_connection(self.listener.getsockname()) for _ in range(CONNECTIONS)]

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
        return len(self.upstreams) == self.expected() and all(map(readable, self.upstreams))

    def expected(self) -> int:
        """How many requests a round has."""
        return CONNECTIONS

    def answers_arrived(self) -> bool:
        """True when every client connection holds an answer."""
        return all(map(readable, self.clients))


class StreamsWorkload(Workload):
    """Clients that speak HTTP/2, each with STREAMS requests at a time; for gRPC so does the origin."""

    def connect(self) -> None:
        """Open the clients' connections; the engine has opened none yet."""
        self.grpc = self.scenario == "grpc"
        self.origins: list[Origin] = []
        self.body = message(ANSWER) if self.grpc else ANSWER.encode()
        request, sent = (GRPC_REQUEST, message(PAYMENT)) if self.grpc else (GET_REQUEST, b"")
        address = self.listener.getsockname()
        self.streams = [Client(address, request, sent, self.grpc) for _ in range(STREAM_CONNECTIONS)]

    def round(self) -> None:
        """One request and its answer on every stream."""
        for client in self.streams:
            client.send()
        if self.grpc:
            self.poll_until(self.calls_arrived)
            for origin in self.origins:
                origin.answer(GRPC_ANSWER, self.body, TRAILERS)
        else:
            self.poll_until(self.requests_arrived)
            for upstream in self.upstreams:
                if not upstream.recv(65536).startswith(b"GET /v1/payments HTTP/1.1\r\n"):
                    raise RuntimeError("the origin received something else than the request")
                upstream.sendall(self.answer)
        self.poll_until(self.streams_answered)

    def expected(self) -> int:
        """How many requests a round has."""
        return STREAM_CONNECTIONS * STREAMS

    def calls_arrived(self) -> bool:
        """True when the upstream connections hold all calls; accepts what the engine opens for them."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.origins.append(Origin(self.origin.accept()[0]))
        return sum(origin.read() for origin in self.origins) == self.expected()

    def streams_answered(self) -> bool:
        """True when no client waits for anything."""
        return all(client.answered(self.body) for client in self.streams)


def message(text: str) -> bytes:
    """Return a gRPC message, not compressed."""
    return b"\0" + len(text).to_bytes(4, "big") + text.encode()


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
    streams = options.scenario in STREAMED
    batch = STREAM_CONNECTIONS * STREAMS if streams else CONNECTIONS
    if options.requests < batch or options.requests % batch:
        parser.error(f"--requests must be a multiple of {batch}")
    folder = Path(tempfile.mkdtemp(prefix="crossway-instructions-"))
    loop = uvloop.new_event_loop()
    try:
        workload = (StreamsWorkload if streams else Workload)(options.scenario, folder, loop)
        for _ in range(WARM_UP):
            workload.round()
        gc.collect()
        gc.disable()  # a collection would fall into some run's requests and not into another's
        measured_from_here()
        began = time.perf_counter()
        for _ in range(options.requests // batch):
            workload.round()
        print(f"{options.requests} requests in {time.perf_counter() - began:.2f} s")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
