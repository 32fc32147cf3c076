"""Clients of grpcio, the service they call in a process of its own, and a gateway between them.

Strategy: what a client sees is asserted on the client, what the service saw is asked of it past the gateway by the call's id; so a test
needs no order among the others, and all share one gateway and one service.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import grpc

from tests.integration.bank import WatchedGateway
from tests.integration.echo import ISSUER, jwks
from tests.integration.grpc_service import CONTROL, OTHER, SERVICE
from tests.integration.h2_kit import H2Client, connect_h2
from tests.integration.pki import Authority
from tests.integration.processes import PATIENCE, ROOT, Gateway, environment, eventually

IDS = itertools.count(1)
OPTIONS = [
    ("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),          # channels that share nothing
    ("grpc.default_authority", "bank.test"), ("grpc.ssl_target_name_override", "bank.test"),
]  # fmt: skip

CONFIG = """
version: 1
workers: {workers}
admin: {{bind: 127.0.0.1:0}}
drain: {{deadline: 20s}}
listeners:
  public: {{bind: 127.0.0.1:0, http2: {{clear: true}}, limits: {{body: 64MiB}}}}
  secure: {{bind: 127.0.0.1:0, tls: {{certificates: [{{cert: edge.crt, key: edge.key}}]}}, limits: {{body: 64MiB}}}}
  narrow: {{bind: 127.0.0.1:0, http2: {{clear: true, window: 64KiB, connection_window: 64KiB}}, limits: {{body: 64MiB}}}}
  brief: {{bind: 127.0.0.1:0, http2: {{clear: true}}, timeouts: {{body: 400ms}}}}
upstreams:
  clear: {{targets: [127.0.0.1:{clear}], protocol: grpc}}
  secure: {{targets: [127.0.0.1:{secure}], protocol: grpc, tls: {{ca: root.crt, server_name: bank.test}}}}
  narrow: {{targets: [127.0.0.1:{clear}], protocol: grpc, http2: {{window: 64KiB, connection_window: 64KiB}}}}
  again: {{targets: [127.0.0.1:{clear}], protocol: grpc, retries: {{attempts: 2, on: [connect-failure, reset, 503], idempotency_key: true}}}}
  gone: {{targets: [127.0.0.1:9], protocol: grpc}}
  full: {{targets: [127.0.0.1:{clear}], protocol: grpc, limits: {{requests: 1, pending: 10, queue: 20s}}}}
  finished: {{targets: [127.0.0.1:{clear}], protocol: grpc, abandoned: finish}}
policies:
  trail: {{audit: {{file: audit.jsonl}}}}
  keyed: {{api_key: {{header: x-api-key, keys: [{{client: batch, hash: "sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"}}]}}}}
  bank: {{jwt: {{issuer: {issuer}, audience: payments, keys: jwks.json, algorithms: [RS256]}}}}
  payer: {{scopes: [payments:write]}}
  slow: {{rate_limit: {{key: route, rate: 1/h, burst: 1}}}}
  nosy: {{python: {{class: "nosy:Nosy"}}}}
  waits: {{python: {{class: "nosy:Waits", timeout: 30s}}}}
  reads: {{python: {{class: "nosy:Reads"}}}}
routes:
  - {{name: ledger, match: {{grpc: {{service: {service}}}}}, upstream: clear, policies: [trail]}}
  - {{name: tls, match: {{grpc: {{service: {service}}}, host: tls.test}}, upstream: secure, policies: [trail]}}
  - {{name: narrow, match: {{grpc: {{service: {service}}}, host: narrow.test}}, upstream: narrow}}
  - {{name: again, match: {{grpc: {{service: {service}}}, host: again.test}}, upstream: again, policies: [trail]}}
  - {{name: gone, match: {{grpc: {{service: {service}}}, host: gone.test}}, upstream: gone, policies: [trail]}}
  - {{name: finished, match: {{grpc: {{service: {service}}}, host: finished.test}}, upstream: finished, policies: [trail]}}
  - {{name: brief, match: {{grpc: {{service: {service}}}, host: brief.test}}, upstream: clear, policies: [trail], timeouts: {{total: 1s}}}}
  - {{name: keyed, match: {{grpc: {{service: {service}}}, host: keyed.test}}, upstream: clear, policies: [trail, keyed]}}
  - {{name: bank, match: {{grpc: {{service: {service}}}, host: jwt.test}}, upstream: clear, policies: [trail, bank]}}
  - {{name: payer, match: {{grpc: {{service: {service}}}, host: scopes.test}}, upstream: clear, policies: [trail, bank, payer]}}
  - {{name: slow, match: {{grpc: {{service: {service}}}, host: slow.test}}, upstream: clear, policies: [trail, slow]}}
  - {{name: small, match: {{grpc: {{service: {service}}}, host: small.test}}, upstream: clear, policies: [trail], limits: {{body: 64KiB}}}}
  - {{name: nosy, match: {{grpc: {{service: {service}}}, host: nosy.test}}, upstream: clear, policies: [trail, nosy]}}
  - {{name: waits, match: {{grpc: {{service: {service}}}, host: waits.test}}, upstream: clear, policies: [trail, waits]}}
  - {{name: full, match: {{grpc: {{service: {service}}}, host: full.test}}, upstream: full, policies: [trail]}}
  - {{name: reads, match: {{grpc: {{service: {service}}}, host: reads.test}}, upstream: clear, policies: [trail, reads]}}
  - {{name: one-method, match: {{grpc: {{service: {service}, method: List}}, host: one.test}}, upstream: clear}}
  - {{name: other, match: {{grpc: {{service: {other}, method: Book}}}}, upstream: clear}}
"""
NOSY = """
import asyncio
from gateway import Policy, deny

class Nosy(Policy):
    def on_request(self, request):
        if "x-teapot" in request.headers:
            return deny(418, "no-coffee", "only 100 % tea")
        if "x-closed" in request.headers:
            return deny(403, "closed", "not today")

    def on_response(self, request, response):
        response.set_header("x-seen", str(response.status))

class Waits(Policy):
    async def on_request(self, request):
        await asyncio.sleep(20)

class Reads(Policy):
    body_limit = 1024

    def on_request(self, request):
        request.set_header("x-length", str(len(request.body)))
        if b"much" in request.body:
            return deny(403, "too-much", "that is too much")
"""


class GrpcProcess:
    """The service; a context manager that ends it."""

    def __init__(self, folder: Path, *options: str, clear: int = 0, secure: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.grpc_service", folder / "edge.crt", folder / "edge.key", str(clear), str(secure), *options],
            cwd=ROOT, env=environment(GRPC_ENABLE_FORK_SUPPORT="0"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        """Wait until it serves. Several are started at once when they are made before the first is entered."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the service did not start"
        self.clear, self.secure = map(int, line.split())
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self.clear}", OPTIONS)
        return self

    def __exit__(self, *error: object) -> None:
        self._channel.close()
        self.process.kill()
        self.process.wait(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def control(self, method: str, said: str = "") -> bytes:
        answer: bytes = self._channel.unary_unary(f"/{CONTROL}/{method}")(said.encode(), timeout=PATIENCE, wait_for_ready=True)
        return answer

    def seen(self, name: str = "") -> list[dict[str, Any]]:
        """The calls of this id, as the service saw them."""
        found: list[dict[str, Any]] = json.loads(self.control("Seen", name))
        return found

    def call(self, name: str) -> dict[str, Any]:
        """The one call of this id, waited for."""
        found = eventually(lambda: self.seen(name), f"the call {name}")
        assert len(found) == 1, found
        entry: dict[str, Any] = found[0]
        return entry

    def ended(self, name: str) -> dict[str, Any]:
        eventually(lambda: self.seen(name) and self.seen(name)[-1]["ended"], f"the end of {name}")
        return self.call(name)

    def told(self, name: str) -> dict[str, Any]:
        """The metadata of the one call of this id."""
        return {key: bytes(value) if isinstance(value, list) else value for key, value in self.call(name)["metadata"]}


def fresh(prefix: str = "call") -> str:
    """An id that no other call has."""
    return f"{prefix}-{next(IDS)}"


def code_of(refused: Any) -> str:
    """The name of the status in an RpcError, or in what pytest.raises caught."""
    name: str = getattr(refused, "value", refused).code().name
    return name


def hear(call: Any, heard: list[bytes] | None = None) -> tuple[list[bytes], str]:
    """The messages of a stream, put into `heard` as they come, and the name of the status with which it ended."""
    heard = [] if heard is None else heard
    try:
        for each in call:
            heard.append(each)
    except grpc.RpcError as error:
        return heard, code_of(error)
    return heard, "OK"


def framed(payload: bytes) -> bytes:
    """A message as it is on the wire, not compressed."""
    return b"\0" + len(payload).to_bytes(4, "big") + payload


class Client:
    """A channel, and the four kinds of calls on it. Keywords are metadata: `x_id` is x-id."""

    def __init__(self, channel: grpc.Channel, service: str = SERVICE) -> None:
        self.channel, self.service = channel, service

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.channel.close()

    def _options(self, timeout: float, told: dict[str, Any]) -> dict[str, Any]:
        return {"timeout": timeout, "metadata": tuple((name.replace("_", "-"), value) for name, value in told.items())}

    def path(self, method: str) -> str:
        return f"/{self.service}/{method}"

    def book(self, request: bytes = b"1", *, timeout: float = PATIENCE, method: str = "Book", **told: Any) -> bytes:
        answer: bytes = self.channel.unary_unary(self.path(method))(request, **self._options(timeout, told))
        return answer

    def booking(self, request: bytes = b"1", *, timeout: float = PATIENCE, **told: Any) -> Any:
        """A Book under way."""
        return self.channel.unary_unary(self.path("Book")).future(request, **self._options(timeout, told))

    def collect(self, requests: Any, *, timeout: float = PATIENCE, **told: Any) -> Any:
        return json.loads(self.channel.stream_unary(self.path("Collect"))(iter(requests), **self._options(timeout, told)))

    def collecting(self, requests: Any, *, timeout: float = PATIENCE, **told: Any) -> Any:
        return self.channel.stream_unary(self.path("Collect")).future(iter(requests), **self._options(timeout, told))

    def list(self, *, timeout: float = PATIENCE, **told: Any) -> Any:
        return self.channel.unary_stream(self.path("List"))(b"", **self._options(timeout, told))

    def talk(self, requests: Any, *, timeout: float = PATIENCE, **told: Any) -> Any:
        return self.channel.stream_stream(self.path("Talk"))(iter(requests), **self._options(timeout, told))


def client_of(gateway: Gateway, host: str = "bank.test", listener: str = "public", service: str = SERVICE, root: bytes = b"") -> Client:
    named = [*[pair for pair in OPTIONS if pair[0] != "grpc.default_authority"], ("grpc.default_authority", host)]
    address = f"127.0.0.1:{gateway.port(listener)}"
    if listener != "secure":
        return Client(grpc.insecure_channel(address, named), service)
    return Client(grpc.secure_channel(address, grpc.ssl_channel_credentials(root), named), service)


@dataclass
class Calls:
    """A gateway before the service."""

    folder: Path
    root: Authority
    service: GrpcProcess
    gateway: WatchedGateway

    def client(self, host: str = "bank.test", listener: str = "public", service: str = SERVICE) -> Client:
        """A channel of its own; `host` chooses the route."""
        return client_of(self.gateway, host, listener, service, self.root.pem)

    def raw(self, listener: str = "public", **options: Any) -> H2Client:
        return connect_h2(self.gateway.port(listener), **options)

    def records(self, route: str) -> list[dict[str, Any]]:
        trail = self.folder / "audit.jsonl"
        lines = trail.read_text().splitlines() if trail.exists() else []
        return [each for each in map(json.loads, lines) if each["route"] == route]


def request(host: str = "bank.test", method: str = "Book", *more: tuple[str, str], service: str = SERVICE) -> list[tuple[str, str]]:
    """A call's head for an H2Client."""
    return [
        (":method", "POST"), (":scheme", "http"), (":path", f"/{service}/{method}"), (":authority", host),
        ("content-type", "application/grpc"), ("te", "trailers"), *more,
    ]  # fmt: skip


class Load:
    """Clients that call Book one after the other while the block runs; a failure of any is kept."""

    def __init__(self, clients: list[Client], pause: float = 0.0, **told: str) -> None:
        self.clients, self.pause, self.told = clients, pause, told
        self.done = 0
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(client,), daemon=True) for client in clients]

    def _run(self, client: Client) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            try:
                assert client.book(b"%d" % number, **self.told) == b"booked %d" % number
                self.done += 1
            except grpc.RpcError as error:
                self.failures.append(f"{code_of(error)}: {cast(Any, error).details()}")
            self._stop.wait(self.pause)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def more(self, count: int) -> None:
        """Wait for so many further calls."""
        wanted = self.done + count
        eventually(lambda: self.done >= wanted or self.failures, f"{count} calls")

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        for client in self.clients:
            client.channel.close()


def write_files(folder: Path) -> Authority:
    root = Authority("Calls", number=40)
    root.issue("bank.test", "localhost", "127.0.0.1").write(folder, "edge")
    (folder / "root.crt").write_bytes(root.pem)
    (folder / "nosy.py").write_text(NOSY)
    (folder / "jwks.json").write_text(jwks(("RS256", "rs")))
    return root


def configure(folder: Path, process: GrpcProcess, *, workers: int = 1, more: str = "") -> Path:
    path = folder / "edge.yaml"
    ports = {"clear": process.clear, "secure": process.secure}
    path.write_text(CONFIG.format(workers=workers, service=SERVICE, other=OTHER, issuer=ISSUER, **ports) + more)
    return path


@contextlib.contextmanager
def open_calls(folder: Path, **options: Any) -> Iterator[Calls]:
    root = write_files(folder)
    with GrpcProcess(folder) as process, WatchedGateway(configure(folder, process, **options)) as gateway:
        yield Calls(folder, root, process, gateway)
