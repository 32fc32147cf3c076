"""Active health checks with real processes: one stream of checks an endpoint, and what they decide about traffic."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.integration.faults import ScriptedOrigin, Stream, ok
from tests.integration.name_server import NameServer
from tests.integration.processes import Gateway, alive, eventually

FAILED = "an endpoint failed its checks and gets no requests"
PASSED = "an endpoint passed its checks and gets requests again"


class Patient(ScriptedOrigin):
    """An origin whose health path answers what the test says; counts its checks and its requests."""

    def __init__(self, port: int = 0, address: str = "127.0.0.1") -> None:
        self.well = True
        self.serves = True
        self.checks: Counter[str] = Counter()  # by path
        self.requests = 0
        super().__init__(_answer, port, address)
        self.name = f"{address}:{self.port}".encode()

    @property
    def checked(self) -> int:
        return self.checks.total()


def _answer(origin: ScriptedOrigin, stream: Stream) -> None:
    assert isinstance(origin, Patient)
    while True:
        request = stream.request()
        if not request.path.startswith("/health"):
            origin.requests += 1
            stream.send(ok(origin.name) if origin.serves else b"HTTP/1.1 503 Down\r\ncontent-length: 0\r\n\r\n")
            continue
        origin.checks[request.path] += 1
        answer = b"HTTP/1.1 200 OK\r\n" if origin.well else b"HTTP/1.1 500 Down\r\n"
        stream.send(answer + b"content-length: 2\r\nconnection: close\r\n\r\nup")
        return


@pytest.fixture
def two() -> Iterator[tuple[Patient, Patient]]:
    with ExitStack() as stack:
        origins = Patient(), Patient()
        for origin in origins:
            stack.callback(origin.close)
        yield origins


CHECK = "http: {path: /health, body: up}, interval: 100ms, timeout: 5s, healthy: 2, unhealthy: 2"


def write(folder: Path, *origins: Patient, check: str = CHECK, workers: int = 2, upstream: str = "", eject: str = "{}") -> Path:
    path = folder / "edge.yaml"
    targets = ", ".join(f"'127.0.0.1:{origin.port}'" for origin in origins)
    health = f", health: {{check: {{{check}}}, eject: {eject}}}" if check else ""
    path.write_text(
        f"version: 1\nworkers: {workers}\nadmin: {{bind: 127.0.0.1:0}}\nlisteners: {{public: {{bind: 127.0.0.1:0}}}}\n"
        f"upstreams: {{pay: {{balance: round_robin, {upstream or f'targets: [{targets}]'}{health}}}}}\n"
        "routes: [{name: pay, match: {prefix: /x}, upstream: pay}]\n"
    )
    return path


def checker(gateway: Gateway) -> int:
    """The process id of the checker; 0 when there is none that is ready."""
    found: dict[str, Any] | None = gateway.admin("/status")[1]["checker"]
    return found["pid"] if found is not None and found["state"] == "ready" else 0


def told(gateway: Gateway, event: str) -> list[dict[str, Any]]:
    return [line for line in gateway.log() if line["event"] == event]


def more(origin: Patient, count: int = 5) -> None:
    """Wait for so many more checks at an origin."""
    goal = origin.checked + count
    eventually(lambda: origin.checked >= goal, "more checks")


def only(gateway: Gateway, origin: Patient, *others: Patient) -> None:
    """Wait until an origin answers every request, and see that no other gets any from then on."""
    mine = (200, origin.name)

    def all_mine() -> bool:
        answers = [gateway.get("/x") for _ in range(10)]
        return answers == [mine] * 10

    eventually(all_mine, "the end of the traffic elsewhere")
    before = [other.requests for other in others]
    assert all_mine() and all_mine()
    assert [other.requests for other in others] == before


def reload(gateway: Gateway) -> None:
    done = gateway.command("reload")
    assert done.returncode == 0, done.stderr


def test_an_endpoint_that_fails_its_checks_gets_no_traffic_until_it_passes_them(
    tmp_path: Path, two: tuple[Patient, Patient]
) -> None:
    sick, fine = two
    with Gateway(write(tmp_path, sick, fine)) as gateway:
        more(sick), more(fine)
        assert {gateway.get("/x")[1] for _ in range(20)} == {sick.name, fine.name}
        sick.well = False
        (line,) = eventually(lambda: told(gateway, FAILED), "the verdict")
        assert (line["upstream"], line["endpoint"], line["reason"]) == ("pay", f"127.0.0.1:{sick.port}", "status 500")
        assert line["process"] == "checker"
        only(gateway, fine, sick)
        sick.well = True
        eventually(lambda: told(gateway, PASSED), "the verdict")
        eventually(lambda: gateway.get("/x")[1] == sick.name, "traffic at the endpoint that is back")


def test_an_endpoint_that_passes_its_checks_again_is_not_kept_out_by_its_ejection(tmp_path: Path, two: tuple[Patient, Patient]) -> None:
    sick, fine = two
    with Gateway(write(tmp_path, sick, fine, eject="{failures: 1, base: 10m, max: 10m}")) as gateway:
        more(sick), more(fine)
        sick.serves = False
        eventually(lambda: gateway.get("/x") == (503, b""), "a failure")
        only(gateway, fine, sick)
        before = sick.requests
        more(sick, 10)
        only(gateway, fine)
        assert sick.requests == before, "checks that passed all along end nothing"

        sick.well = False
        eventually(lambda: told(gateway, FAILED), "the verdict")
        sick.well = True
        eventually(lambda: told(gateway, PASSED), "the verdict")
        eventually(lambda: gateway.get("/x")[0] and sick.requests > before, "the request that tries it")
        only(gateway, fine)
        more(sick, 10)
        only(gateway, fine)
        assert sick.requests == before + 1, "one, which failed"

        sick.well, sick.serves = False, True
        eventually(lambda: len(told(gateway, FAILED)) == 2, "the verdict")
        sick.well = True
        eventually(lambda: {gateway.get("/x")[1] for _ in range(10)} == {sick.name, fine.name}, "traffic at both")


def test_endpoints_are_checked_once_whatever_the_number_of_workers(tmp_path: Path, two: tuple[Patient, Patient]) -> None:
    a, b = two
    with Gateway(write(tmp_path, a, b, workers=4)) as gateway:
        more(a, 1), more(b, 1)
        before, began = a.checked + b.checked, time.monotonic()
        more(a, 40), more(b, 40)
        seen, took = a.checked + b.checked - before, time.monotonic() - began
        # One stream an endpoint makes 10 checks a second, and never catches up; five processes would make 50.
        assert seen / 2 <= 2 + 20 * took, "more than one stream of checks"
        (started,) = told(gateway, "checker started")
        assert len(gateway.workers()) == 4
        assert checker(gateway) == started["child"] and checker(gateway) not in gateway.workers()


def test_without_a_check_there_is_no_checker(tmp_path: Path, two: tuple[Patient, Patient]) -> None:
    with Gateway(write(tmp_path, *two, check="")) as gateway:
        assert gateway.get("/x")[0] == 200
        assert gateway.admin("/status")[1]["checker"] is None
        assert len(gateway.children()) == 3  # two workers, admin


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_checker_that_dies_is_back_and_its_verdicts_hold_meanwhile(
    tmp_path: Path, two: tuple[Patient, Patient], end: signal.Signals
) -> None:
    sick, fine = two
    sick.well = False
    with Gateway(write(tmp_path, sick, fine)) as gateway:
        eventually(lambda: told(gateway, FAILED), "the verdict")
        before = eventually(lambda: checker(gateway))
        only(gateway, fine, sick)
        requests = sick.requests
        os.kill(before, end)
        eventually(lambda: not alive(before), "the end of the checker")
        only(gateway, fine)
        eventually(lambda: checker(gateway) not in (0, before), "the next checker")
        more(sick)
        only(gateway, fine)
        assert sick.requests == requests
        assert len(told(gateway, FAILED)) == 1  # nothing changed, so nothing is said
        sick.well = True
        eventually(lambda: told(gateway, PASSED), "the verdict")


def test_a_checker_that_hangs_is_replaced(tmp_path: Path, two: tuple[Patient, Patient]) -> None:
    with Gateway(write(tmp_path, *two)) as gateway:
        before = eventually(lambda: checker(gateway))
        os.kill(before, signal.SIGSTOP)
        eventually(lambda: checker(gateway) not in (0, before), "the next checker")
        assert told(gateway, "checker hangs and is replaced")
        more(two[0])


def test_a_reload_changes_the_checks(tmp_path: Path, two: tuple[Patient, Patient]) -> None:
    sick, fine = two
    sick.well = False
    with Gateway(write(tmp_path, sick, fine)) as gateway:
        eventually(lambda: told(gateway, FAILED), "the verdict")
        first = eventually(lambda: checker(gateway))
        write(tmp_path, sick, fine, workers=1)
        reload(gateway)
        assert checker(gateway) == first  # nothing about checks has changed

        write(tmp_path, sick, fine, check=CHECK.replace("/health", "/health/deep"))
        reload(gateway)
        eventually(lambda: sick.checks["/health/deep"] > 3, "checks of the new path")
        assert eventually(lambda: checker(gateway)) != first and not alive(first)
        old = sick.checks["/health"]
        more(sick)
        assert sick.checks["/health"] == old
        only(gateway, fine, sick)

        write(tmp_path, sick, fine, check="")
        reload(gateway)
        eventually(lambda: gateway.admin("/status")[1]["checker"] is None, "the end of the checker")
        eventually(lambda: gateway.get("/x")[1] == sick.name, "traffic at an endpoint that nobody checks")

        write(tmp_path, sick, fine)
        reload(gateway)
        eventually(lambda: len(told(gateway, FAILED)) == 2, "the verdict of the new checks")


def test_what_discovery_finds_is_checked_and_what_goes_is_not(tmp_path: Path) -> None:
    with NameServer() as names, ExitStack() as stack:
        a = Patient(address="127.0.0.2")
        b = Patient(a.port, "127.0.0.3")
        stack.callback(a.close), stack.callback(b.close)
        names.a("pay.bank.test", "127.0.0.2")
        discovery = f"targets: ['pay.bank.test:{a.port}'], resolve: 200ms, discovery: {{resolver: '{names.address}'}}"
        with Gateway(write(tmp_path, upstream=discovery)) as gateway:
            more(a)
            names.a("pay.bank.test", "127.0.0.2", "127.0.0.3")
            more(b)
            b.well = False
            (line,) = eventually(lambda: told(gateway, FAILED), "the verdict")
            assert (line["endpoint"], line["host"]) == (f"127.0.0.3:{b.port}", f"pay.bank.test:{b.port}")
            only(gateway, a, b)
            names.a("pay.bank.test", "127.0.0.2")
            checked = eventually(lambda: _rested(b, a), "the end of the checks of an address that is gone")
            more(a)
            assert b.checked == checked


def _rested(still: Patient, other: Patient) -> int:
    """The number of an origin's checks, once it gets no more while another gets some; 0 until then."""
    before = still.checked
    more(other, 4)
    return before if still.checked == before else 0


def test_a_drain_is_not_held_up_by_a_check_under_way(tmp_path: Path, two: tuple[Patient, Patient]) -> None:
    def hanging(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        origin.seen.release()
        origin.go.wait()

    two[0].script = hanging
    with Gateway(write(tmp_path, *two, check=CHECK.replace("5s", "60s"))) as gateway:
        two[0].saw()
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
        assert told(gateway, "stopped")[0]["forced"] is False
