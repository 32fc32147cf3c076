"""Connections to HTTP/2 upstreams that die without a word, and servers that do not like to be asked too often whether they live.

Strategy: a relay forgets the connections of now, or a server's process is stopped; new connections are as ever. What was never sent goes
elsewhere whatever its method, what was sent is a 502 that says so, and nothing is executed twice. Servers of h2 and of grpcio count PINGs.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.integration.bank import WatchedGateway
from tests.integration.faults import Message, connect, get, post
from tests.integration.h2_origin import Call, TwinOrigin
from tests.integration.processes import PATIENCE, ROOT, eventually
from tests.integration.relay import Relay

QUICK = "http2: {ping: 1s, ping_timeout: 1s}"
PINGS, SILENT, MADE = "upstream_http2_pings", "upstream_http2_silent_connections", "upstream_http2_connections"


@contextlib.contextmanager
def running(folder: Path, port: int, *more: str, protocol: str = "http2") -> Iterator[WatchedGateway]:
    path = folder / "edge.yaml"
    path.write_text(
        "version: 1\nworkers: 1\nadmin: {bind: 127.0.0.1:0}\n"
        "listeners: {public: {bind: 127.0.0.1:0, http2: {clear: true}}}\n"
        f"upstreams:\n  origin:\n    targets: [127.0.0.1:{port}]\n    protocol: {protocol}\n"
        + "".join(f"    {line}\n" for line in more)
        + "routes: [{name: all, match: {prefix: /}, upstream: origin}]\n"
    )
    with WatchedGateway(path) as gateway:
        yield gateway


@pytest.fixture
def origin() -> Iterator[TwinOrigin]:
    with TwinOrigin() as made:
        yield made
        assert not made.failures, made.failures


def rested(seconds: float = 1.2) -> None:
    """Let a connection say nothing for longer than `ping`."""
    time.sleep(seconds)  # silence is what is tested


def pay(gateway: WatchedGateway, path: str = "/pay") -> Message:
    with connect(gateway.port()) as stream:
        return stream.ask(post(path, b"100.00"))


class Later:
    """A request whose answer is not waited for yet."""

    def __init__(self, gateway: WatchedGateway, request: bytes) -> None:
        self.answer: Message | None = None
        self._thread = threading.Thread(target=self._ask, args=(gateway.port(), request), daemon=True)
        self._thread.start()

    def _ask(self, port: int, request: bytes) -> None:
        with connect(port) as stream:
            self.answer = stream.ask(request)

    def result(self) -> Message:
        self._thread.join(PATIENCE + 5)
        assert self.answer is not None, "no answer"
        return self.answer


# -- connections that are dead


def test_a_payment_after_a_rest_finds_the_dead_connection_out_and_is_executed_once(tmp_path: Path, origin: TwinOrigin) -> None:
    with Relay(origin.two) as relay, running(tmp_path, relay.port, QUICK, "retries: 0") as gateway:
        assert pay(gateway).status == 200
        rested()
        relay.silence()
        for _ in range(3):
            assert pay(gateway).status == 200
        assert [call.link is origin.links[0] for call in origin.calls] == [True, False, False, False]
        assert (gateway.counter(MADE), gateway.counter(SILENT)) == (2, 1) and gateway.counter(PINGS) >= 1
        assert gateway.counter("upstream_connect_failures") == 0, "the endpoint is not to blame"
        gateway.calm()


def test_requests_that_come_while_it_is_asked_wait_together(tmp_path: Path, origin: TwinOrigin) -> None:
    with Relay(origin.two) as relay, running(tmp_path, relay.port, QUICK, "retries: 0", "timeouts: {connect: 4s}") as gateway:
        assert pay(gateway).status == 200
        rested()
        relay.silence()
        waiting = [Later(gateway, post("/pay", b"%d" % n)) for n in range(8)]
        assert [one.result().status for one in waiting] == [200] * 8
        assert len(origin.calls) == 9 and gateway.counter(SILENT) == 1
        gateway.calm()


def test_an_exchange_on_a_connection_that_died_ends_and_says_that_it_may_have_been_executed(tmp_path: Path, origin: TwinOrigin) -> None:
    with Relay(origin.two) as relay, running(
        tmp_path, relay.port, QUICK, "timeouts: {head: 5m, idle: 5m, total: 10m}", "retries: {attempts: 2, on: [connect-failure, reset]}"
    ) as gateway:
        payment, read = Later(gateway, post("/held", b"100.00")), Later(gateway, get("/held"))
        origin.saw(2)
        relay.silence()
        answer = payment.result()
        assert answer.status == 502 and "may have been executed" in json.loads(answer.body)["detail"]
        origin.saw()  # the one that is safe to repeat is here again, on a connection that lives
        origin.release()
        assert (read.result().status, read.result().body) == (200, b"released")
        assert sorted(call.method for call in origin.calls) == ["GET", "GET", "POST"]
        assert gateway.counter(SILENT) == 1
        line = next(line for line in gateway.log() if line["event"] == "an HTTP/2 connection to an upstream does not answer")
        assert (line["upstream"], line["requests"]) == ("origin", 2)
        gateway.calm()


SERVER = """
import asyncio, sys
from tests.integration.h2_origin import TwinOrigin
with TwinOrigin() as origin:
    print(origin.two, flush=True)
    sys.stdin.read()
"""


def test_a_stopped_server_gives_its_exchanges_up_and_is_used_again_when_it_wakes(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with running(tmp_path, port, QUICK, "timeouts: {head: 5m, total: 10m}") as gateway:
            held = Later(gateway, post("/held", b"x"))
            eventually(lambda: gateway.metrics()["crossway_exchanges"] == 1 and gateway.counter(MADE) == 1, "the request at the server")
            assert gateway.get("/bytes/5")[0] == 200
            process.send_signal(signal.SIGSTOP)
            assert held.result().status == 502
            process.send_signal(signal.SIGCONT)
            assert gateway.get("/bytes/5")[0] == 200
            gateway.calm()
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        for end in (process.stdin, process.stdout):
            assert end is not None
            end.close()


def test_a_stream_whose_other_side_is_silent_ends(tmp_path: Path, origin: TwinOrigin) -> None:
    async def begun(call: Call) -> None:
        await call.head(200)
        await call.write(b"first")
        call.link.origin.seen.release()
        await call.released()

    origin.script = begun
    with Relay(origin.two) as relay, running(tmp_path, relay.port, QUICK, "timeouts: {idle: 5m, total: 10m}") as gateway:
        with connect(gateway.port()) as stream:
            stream.send(get("/events"))
            assert stream.head().status == 200
            origin.saw()
            relay.silence()
            eventually(lambda: gateway.counter(SILENT) == 1, "the verdict")
        gateway.calm()


# -- connections that live


def asked_often_enough(gateway: WatchedGateway, origin: TwinOrigin) -> Later:
    """A payment that is held, on a connection that has had the two PINGs that it gets without payload between."""
    held = Later(gateway, post("/held", b"x"))
    origin.saw()
    eventually(lambda: gateway.counter(PINGS) == 2, "two PINGs")
    rested(3)
    return held


def test_a_server_that_is_slow_and_answers_is_asked_twice_and_keeps_its_exchange(tmp_path: Path, origin: TwinOrigin) -> None:
    """Also a server of gRPC's takes that: it ends a connection at the fourth PING without payload between."""
    with running(tmp_path, origin.two, QUICK) as gateway:
        held = asked_often_enough(gateway, origin)
        assert gateway.counter(PINGS) == 2
        origin.release()
        assert held.result().status == 200
        assert pay(gateway).status == 200
        assert [link.pings for link in origin.links] == [2] and gateway.counter(SILENT) == 0


@pytest.mark.parametrize(("limits", "connections"), [("limits: {}", 2), ("limits: {connections: 1}", 1)])
def test_a_connection_that_was_asked_often_enough_is_passed_over_or_has_to_do(tmp_path: Path, origin: TwinOrigin, limits: str, connections: int) -> None:
    with running(tmp_path, origin.two, QUICK, limits) as gateway:
        held = asked_often_enough(gateway, origin)
        assert pay(gateway).status == 200
        assert gateway.counter(PINGS) == 2 and gateway.counter(MADE) == connections
        origin.release()
        assert held.result().status == 200
        gateway.calm()


def test_payload_makes_up_for_pings(tmp_path: Path, origin: TwinOrigin) -> None:
    """A stream that is silent for long, speaks, and then loses its connection: the verdict comes as soon as for any other."""

    async def speaks(call: Call) -> None:
        await call.head(200)
        await call.released()
        await call.write(b"payload")
        call.link.origin.seen.release()
        call.link.origin.go.clear()
        await call.released()

    origin.script = speaks
    with Relay(origin.two) as relay, running(tmp_path, relay.port, QUICK, "timeouts: {idle: 5m, total: 10m}") as gateway:
        with connect(gateway.port()) as stream:
            stream.send(get("/events"))
            assert stream.head().status == 200
            eventually(lambda: gateway.counter(PINGS) == 2, "two PINGs")
            rested(3)
            assert gateway.counter(PINGS) == 2
            origin.release()
            origin.saw()
            eventually(lambda: gateway.counter(PINGS) == 3, "a third one, after payload")
            relay.silence()
            eventually(lambda: gateway.counter(SILENT) == 1, "the verdict")
        gateway.calm()


def test_an_idle_connection_is_not_asked_until_it_is_to_be_used(tmp_path: Path, origin: TwinOrigin) -> None:
    with running(tmp_path, origin.two, QUICK) as gateway:
        assert pay(gateway).status == 200
        rested(3)
        assert gateway.counter(PINGS) == 0
        assert pay(gateway).status == 200
        assert [link.pings for link in origin.links] == [1] and gateway.counter(MADE) == 1
        gateway.calm()


def test_without_ping_nobody_is_asked(tmp_path: Path, origin: TwinOrigin) -> None:
    with running(tmp_path, origin.two, "http2: {ping: 0s}") as gateway:
        held = Later(gateway, get("/held"))
        origin.saw()
        rested(2)
        origin.release()
        assert held.result().status == 200
        rested(1.5)
        assert pay(gateway).status == 200
        assert [link.pings for link in origin.links] == [0] and gateway.counter(PINGS) == 0


def test_a_server_that_leaves_instead_of_an_answer_costs_nothing(tmp_path: Path, origin: TwinOrigin) -> None:
    """GOAWAY comes where the PING's answer is waited for: the payment has not been sent, and goes out on a new connection."""
    with Relay(origin.two) as relay, running(tmp_path, relay.port, QUICK, "retries: 0", "timeouts: {connect: 10s}") as gateway:
        assert pay(gateway).status == 200
        rested()
        relay.partition()
        payment = Later(gateway, post("/pay", b"x"))
        eventually(lambda: gateway.counter(PINGS) == 1, "the PING")
        origin.run(origin.links[0].goaway(1))  # type: ignore[attr-defined]
        relay.heal()
        assert payment.result().status == 200
        assert len(origin.calls) == 2
        gateway.calm()


class Silent(grpc.GenericRpcHandler):
    """A service whose stream says nothing until the test lets it."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def service(self, details: Any) -> Any:
        return grpc.unary_stream_rpc_method_handler(self._watch)

    def _watch(self, request: bytes, context: Any) -> Iterator[bytes]:
        self.begun.set()
        self.go.wait(PATIENCE)
        yield b"late"


def test_a_server_of_grpc_that_is_silent_for_long_does_not_find_it_too_many_pings(tmp_path: Path) -> None:
    service = Silent()
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[service])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with running(tmp_path, port, QUICK, protocol="grpc") as gateway, grpc.insecure_channel(f"127.0.0.1:{gateway.port()}") as channel:
            call = channel.unary_stream("/bank.v1.Watch/Watch")(b"", timeout=PATIENCE)
            assert service.begun.wait(PATIENCE)
            eventually(lambda: gateway.counter(PINGS) == 2, "two PINGs")
            rested(4)
            service.go.set()
            assert list(call) == [b"late"]
            for _ in range(3):  # each with an answer between: these are free
                rested()
                assert list(channel.unary_stream("/bank.v1.Watch/Watch")(b"", timeout=PATIENCE)) == [b"late"]
            assert (gateway.counter(MADE), gateway.counter(SILENT)) == (1, 0) and gateway.counter(PINGS) >= 5
    finally:
        service.go.set()
        server.stop(0)
