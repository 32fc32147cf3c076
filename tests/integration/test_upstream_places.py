"""Places at an upstream, hedges, zones and keys, through a real gateway of two workers.

Strategy: origins count what they have at once and answer only when the test lets them, so that nothing depends on how fast the
machine is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.integration.bank import WatchedGateway
from tests.integration.faults import Cut, Message, ScriptedOrigin, Stream, body_length, connect, get, ok, post
from tests.integration.processes import eventually

CONFIG = """\
version: 1
workers: 2
{top}
admin: {{bind: 127.0.0.1:0}}
listeners: {{public: {{bind: 127.0.0.1:0}}}}
upstreams:
  origin:
    targets: [{targets}]
{more}routes: [{{name: all, match: {{prefix: /}}, upstream: origin}}]
"""


class Busy:
    """An origin's script: how much it has at once, and answers that wait until the test opens the gate."""

    def __init__(self, name: str, *, open_gate: bool = False) -> None:
        self.name = name
        self.requests: list[str] = []
        self.now = self.most = 0
        self.gate = threading.Event()
        self._lock = threading.Lock()
        if open_gate:
            self.gate.set()

    def __call__(self, origin: ScriptedOrigin, stream: Stream) -> None:
        while True:
            message = stream.head()
            for _ in stream.pieces(body_length(message)):
                pass
            with self._lock:
                self.requests.append(message.start)
                self.now += 1
                self.most = max(self.most, self.now)
            self.gate.wait(30)
            with self._lock:
                self.now -= 1
            stream.send(ok(self.name.encode()))


@contextlib.contextmanager
def running(folder: Path, targets: list[str], *more: str, top: str = "") -> Iterator[WatchedGateway]:
    path = folder / "edge.yaml"
    lines = "".join(f"    {line}\n" for line in more)
    path.write_text(CONFIG.format(targets=", ".join(targets), more=lines, top=top))
    with WatchedGateway(path) as gateway:
        yield gateway


@contextlib.contextmanager
def origins(*scripts: Busy) -> Iterator[list[ScriptedOrigin]]:
    made = [ScriptedOrigin(script) for script in scripts]
    try:
        yield made
    finally:
        for script in scripts:
            script.gate.set()
        for origin in made:
            origin.close()


class Crowd:
    """Clients, each with one request on a connection of its own."""

    def __init__(self, port: int, requests: list[bytes]) -> None:
        self.answers: list[Message] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(port, request), daemon=True) for request in requests]
        for thread in self._threads:
            thread.start()

    def _ask(self, port: int, request: bytes) -> None:
        with connect(port) as stream:
            answer = stream.ask(request)
            with self._lock:
                self.answers.append(answer)

    def finish(self) -> list[int]:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        return sorted(answer.status for answer in self.answers)


def test_requests_above_the_limit_are_refused_at_once_over_all_workers(tmp_path: Path) -> None:
    busy = Busy("a")
    with origins(busy) as (origin,), running(
        tmp_path, [f"127.0.0.1:{origin.port}"], "limits: {requests: 4, pending: 0}"
    ) as gateway:
        crowd = Crowd(gateway.port(), [post("/pay", b"x") for _ in range(16)])
        eventually(lambda: len(crowd.answers) == 12, "the refusals, while nothing is answered")
        assert {answer.status for answer in crowd.answers} == {503}
        assert all(answer.fields["retry-after"] == "1" for answer in crowd.answers)
        assert all(b"upstream-overloaded" in answer.body for answer in crowd.answers)
        eventually(lambda: busy.now == 4, "the four at the origin")
        busy.gate.set()
        assert crowd.finish() == [200] * 4 + [503] * 12
        assert (busy.most, len(busy.requests)) == (4, 4)
        gateway.calm()


def test_who_waits_in_the_queue_gets_the_next_place_of_whichever_worker(tmp_path: Path) -> None:
    busy = Busy("a")
    with origins(busy) as (origin,), running(
        tmp_path, [f"127.0.0.1:{origin.port}"], "limits: {requests: 1, pending: 20, queue: 30s}"
    ) as gateway:
        crowd = Crowd(gateway.port(), [post("/pay", b"x") for _ in range(10)])
        queued = 'crossway_upstream_requests_queued{upstream="origin"}'
        eventually(lambda: busy.now == 1 and gateway.metrics().get(queued) == 9, "nine that wait")
        busy.gate.set()
        assert crowd.finish() == [200] * 10
        assert (busy.most, len(busy.requests)) == (1, 10)
        gateway.calm()


def test_who_waited_too_long_is_told_when_to_come_back(tmp_path: Path) -> None:
    busy = Busy("a")
    with origins(busy) as (origin,), running(
        tmp_path, [f"127.0.0.1:{origin.port}"], "limits: {requests: 1, pending: 5, queue: 300ms}"
    ) as gateway:
        crowd = Crowd(gateway.port(), [post("/pay", b"x") for _ in range(4)])
        eventually(lambda: len(crowd.answers) == 3, "those that waited too long")
        assert all(answer.status == 503 and b"upstream-queue-timeout" in answer.body for answer in crowd.answers)
        assert all(answer.fields["retry-after"] == "1" for answer in crowd.answers)
        busy.gate.set()
        assert crowd.finish() == [200, 503, 503, 503]
        assert len(busy.requests) == 1
        gateway.calm()


def test_a_killed_worker_s_places_are_free_again(tmp_path: Path) -> None:
    busy = Busy("a")
    with origins(busy) as (origin,), running(
        tmp_path, [f"127.0.0.1:{origin.port}"], "limits: {requests: 8, pending: 0}", "abandoned: cancel"
    ) as gateway:
        held = [connect(gateway.port()) for _ in range(8)]
        for stream in held:
            stream.send(get("/slow"))
        eventually(lambda: busy.now == 8, "all places taken")
        for pid in gateway.workers():
            os.kill(pid, signal.SIGKILL)
        busy.gate.set()
        eventually(lambda: len(gateway.workers()) == 2 and not set(gateway.workers()) & set(gateway.pids), "the successors")
        crowd = Crowd(gateway.port(), [get("/after") for _ in range(8)])
        assert crowd.finish() == [200] * 8
        for stream in held:
            stream.close()


def test_connections_are_bounded_over_all_workers(tmp_path: Path) -> None:
    busy = Busy("a")
    with origins(busy) as (origin,), running(
        tmp_path, [f"127.0.0.1:{origin.port}"], "limits: {connections: 3, pending: 50, queue: 30s}"
    ) as gateway:
        crowd = Crowd(gateway.port(), [get() for _ in range(12)])
        eventually(lambda: busy.now == 3, "three connections in use")
        busy.gate.set()
        statuses = crowd.finish()
        assert statuses.count(200) >= 3 and set(statuses) <= {200, 503}
        assert busy.most <= 3 and origin.open <= 3
        gateway.calm()


def test_an_endpoint_gets_no_more_than_its_own_limit(tmp_path: Path) -> None:
    one, two = Busy("one"), Busy("two")
    with origins(one, two) as (a, b), running(
        tmp_path, [f"127.0.0.1:{a.port}", f"127.0.0.1:{b.port}"], "limits: {endpoint_requests: 2, pending: 0}", "retries: 0"
    ) as gateway:
        crowd = Crowd(gateway.port(), [get() for _ in range(10)])
        eventually(lambda: one.now + two.now == 4 and len(crowd.answers) == 6, "both full, the others refused")
        one.gate.set()
        two.gate.set()
        assert crowd.finish() == [200] * 4 + [503] * 6
        assert (one.most, two.most) == (2, 2)


def test_a_slow_get_is_asked_of_a_second_endpoint_and_a_payment_never(tmp_path: Path) -> None:
    slow, fast = Busy("slow"), Busy("fast", open_gate=True)
    with origins(slow, fast) as (a, b), running(
        tmp_path, [f"127.0.0.1:{a.port}", f"127.0.0.1:{b.port}"], "balance: round_robin", "hedge: {after: 50ms}"
    ) as gateway, connect(gateway.port()) as stream:
        for _ in range(6):
            assert stream.ask(get("/read")).body == b"fast"
        hedged = len(slow.requests)
        assert hedged and gateway.counter("hedges") == hedged
        assert len(slow.requests) + len(fast.requests) == 6 + hedged
        before = len(slow.requests)
        crowd = Crowd(gateway.port(), [post("/pay", b"x") for _ in range(6)])
        eventually(lambda: len(slow.requests) > before, "a payment at the slow endpoint")
        assert gateway.counter("hedges") == hedged
        slow.gate.set()
        assert crowd.finish() == [200] * 6
        assert len([start for start in slow.requests + fast.requests if start.startswith("POST")]) == 6
        stream.close()
        gateway.calm()


def test_the_own_zone_is_preferred_and_the_other_one_takes_over(tmp_path: Path) -> None:
    near, far = Busy("near", open_gate=True), Busy("far", open_gate=True)
    with origins(near, far) as (a, b), running(
        tmp_path,
        [f"{{address: 127.0.0.1:{a.port}, zone: eu-1a}}", f"{{address: 127.0.0.1:{b.port}, zone: eu-1b}}"],
        "health: {eject: {failures: 1, base: 30s}}",
        top="zone: eu-1a",
    ) as gateway:
        for _ in range(20):
            assert gateway.get()[1] == b"near"
        a.refuse()
        a.reset()
        assert {gateway.get()[1] for _ in range(20)} == {b"far"}
        assert any(line["event"] == "endpoint ejected" for line in gateway.log())


def test_the_same_key_goes_to_the_same_endpoint_whichever_worker_it_came_to(tmp_path: Path) -> None:
    busy = [Busy(str(number), open_gate=True) for number in range(4)]
    with origins(*busy) as made, running(
        tmp_path, [f"127.0.0.1:{origin.port}" for origin in made], "balance: {maglev: {key: 'header:x-account'}}"
    ) as gateway:
        chosen = {}
        for account in range(24):
            found = set()
            for _ in range(3):
                with connect(gateway.port()) as stream:  # a new connection: either worker
                    found.add(stream.ask(get("/x", f"X-Account: {account}")).body)
            assert len(found) == 1, (account, found)
            chosen[account] = found.pop()
        assert len(set(chosen.values())) == 4
        with connect(gateway.port()) as stream:  # without the key: anywhere
            assert len({stream.ask(get()).body for _ in range(60)}) == 4


class Mute:
    """A host behind a partition: connections to it are neither accepted nor refused, until it heals."""

    def __init__(self) -> None:
        self._listening = socket.socket()
        self._listening.bind(("127.0.0.1", 0))
        self._listening.listen(0)
        self.port: int = self._listening.getsockname()[1]
        self._full = [self._knock() for _ in range(8)]  # the kernel drops who comes when so many wait

    def _knock(self) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", self.port))
        return sock

    def heal(self) -> None:
        threading.Thread(target=self._serve, daemon=True).start()
        self.close()

    def _serve(self) -> None:
        while True:
            sock, _ = self._listening.accept()
            threading.Thread(target=self._answer, args=(Stream(sock),), daemon=True).start()

    @staticmethod
    def _answer(stream: Stream) -> None:
        with contextlib.suppress(Cut, OSError):
            while stream.head():
                stream.send(ok(b"back"))

    def close(self) -> None:
        for sock in self._full:
            sock.close()


def test_a_host_that_nobody_reached_is_asked_again_seconds_after_the_network_has_healed(tmp_path: Path) -> None:
    """With the default balancer, few requests and no ejection: nothing but the balancer's own trial finds that it is back."""
    well, mute = Busy("well", open_gate=True), Mute()
    with contextlib.closing(mute), origins(well) as (origin,), running(
        tmp_path, [f"127.0.0.1:{origin.port}", f"127.0.0.1:{mute.port}"], "timeouts: {connect: 1s}", "health: {eject: {failures: 0}}"
    ) as gateway:

        def tried() -> float:
            assert gateway.get()[:2] == (200, b"well")
            return gateway.counter("retries")

        eventually(tried, "a request that meets the silent host, and goes elsewhere")
        mute.heal()

        def back() -> bool:
            time.sleep(0.2)
            status, body = gateway.get()[:2]
            assert status == 200
            return body == b"back"

        eventually(back, "a request at the host that is back")
