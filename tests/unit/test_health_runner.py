"""When endpoints are checked, and which results count: with the shared table, and without a network."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gateway._speedups.upstream_table import CHECKER
from gateway.config import Config, load
from gateway.config.web import Address
from gateway.discovery.found import Found
from gateway.health import runner
from gateway.health.probe import Connection
from gateway.health.runner import Checks, Verdict
from gateway.telemetry.shared import SharedState

PATIENCE = 20.0  # seconds, used up by a failure only
UNHEALTHY = 3  # EndpointState.availability()
B = Found(Address("192.0.2.1", 2), name="192.0.2.1")


def configuration(folder: Path, check: str = "", targets: str = "['192.0.2.1:1', '192.0.2.1:2']") -> Config:
    path = folder / "edge.yaml"
    path.write_text(
        "version: 1\nlisteners: {public: {bind: 127.0.0.1:0}}\n"
        f"upstreams:\n  pay: {{targets: {targets}, health: {{check: {{tcp: {{}}, interval: 100ms, {check}}}}}}}\n"
        "  plain: {targets: ['192.0.2.1:3']}\n"
        "routes: [{name: a, match: {prefix: /a}, upstream: pay}, {name: b, match: {prefix: /b}, upstream: plain}]\n"
    )
    return load(path)


class Closable(asyncio.Transport):
    """A connection to nobody."""

    def close(self) -> None:
        pass

    def is_closing(self) -> bool:
        return True


class Network:
    """Opens connections that a test lets fail; counts them."""

    def __init__(self) -> None:
        self.tried: dict[int, int] = {}
        self.failing: dict[int, Exception | None] = {}  # by port; None: never answers
        self.changed = asyncio.Condition()

    async def open(self, found: Found) -> Connection:
        port = found.address.port
        async with self.changed:
            self.tried[port] = self.tried.get(port, 0) + 1
            self.changed.notify_all()
        if port in self.failing:
            failure = self.failing[port]
            if failure is None:
                await asyncio.Event().wait()
            assert failure is not None
            raise failure
        reader = asyncio.StreamReader()
        return reader, asyncio.StreamWriter(Closable(), asyncio.StreamReaderProtocol(reader), reader, asyncio.get_running_loop())

    async def more(self, port: int, count: int = 4) -> None:
        """Wait for so many more attempts."""
        goal = self.tried.get(port, 0) + count
        async with self.changed:
            await self.changed.wait_for(lambda: self.tried.get(port, 0) >= goal)


class Table:
    """The shared table as the checker sees it."""

    def __init__(self) -> None:
        self.memory = SharedState(workers=1)

    def open(self, upstream: str, found: Found) -> Verdict:
        return self.memory.upstreams.endpoint(CHECKER, upstream, str(found.address), target=found.host)

    def out(self, port: int, upstream: str = "pay") -> bool:
        state = self.memory.upstreams.endpoint(0, upstream, f"192.0.2.1:{port}")
        return state.availability(time.monotonic_ns() // 1000) == UNHEALTHY


def run(test: Callable[[Table, Network], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE):
            await test(Table(), Network())

    asyncio.run(bounded())


def test_only_upstreams_with_a_check_are_asked(tmp_path: Path) -> None:
    async def test(table: Table, network: Network) -> None:
        checks = Checks(configuration(tmp_path), table.open, network.open)
        checks.start(asyncio.get_running_loop())
        await network.more(1)
        await network.more(2)
        checks.stop()
        assert set(network.tried) == {1, 2}

    run(test)


def test_failures_in_a_row_take_an_endpoint_out_and_successes_bring_it_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def test(table: Table, network: Network) -> None:
        network.failing[1] = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        checks = Checks(configuration(tmp_path, "healthy: 6, unhealthy: 6"), table.open, network.open)
        checks.start(asyncio.get_running_loop())
        await network.more(1, 3)
        assert not table.out(1)
        await network.more(1, 4)
        assert table.out(1) and not table.out(2)
        del network.failing[1]
        await network.more(1, 3)
        assert table.out(1)
        await network.more(1, 4)
        assert not table.out(1)
        checks.stop()

    run(test)
    lines = [(record.getMessage(), record.endpoint, getattr(record, "reason", None)) for record in caplog.records]
    assert lines == [
        ("an endpoint failed its checks and gets no requests", "192.0.2.1:1", "no connection: Connection refused"),
        ("an endpoint passed its checks and gets requests again", "192.0.2.1:1", None),
    ]


def test_no_answer_in_time_is_a_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(table: Table, network: Network) -> None:
        network.failing[1] = None
        checks = Checks(configuration(tmp_path, "timeout: 10ms, unhealthy: 1"), table.open, network.open)
        checks.start(asyncio.get_running_loop())
        await network.more(1, 2)
        assert table.out(1) and not table.out(2)
        checks.stop()

    run(test)
    assert {record.reason for record in caplog.records} == {"no answer within 0.01s"}


@pytest.mark.parametrize("failure", [OSError(errno.EMFILE, "Too many open files"), ZeroDivisionError()])
def test_what_fails_in_the_checker_judges_nobody(tmp_path: Path, failure: Exception) -> None:
    async def test(table: Table, network: Network) -> None:
        network.failing[1] = failure
        checks = Checks(configuration(tmp_path, "unhealthy: 1"), table.open, network.open)
        checks.start(asyncio.get_running_loop())
        await network.more(1, 5)
        assert not table.out(1)
        checks.stop()

    run(test)


def test_a_checker_that_stood_still_judges_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(table: Table, network: Network) -> None:
        network.failing[1] = None
        # Whenever it is looked at the clock, two seconds have passed: a process that is stopped again and again.
        clock = iter(range(0, 10_000_000, 2))
        monkeypatch.setattr(runner.time, "monotonic", lambda: float(next(clock)))
        checks = Checks(configuration(tmp_path, "timeout: 10ms, unhealthy: 1", "['192.0.2.1:1']"), table.open, network.open)
        checks.start(asyncio.get_running_loop())
        await network.more(1, 5)
        monkeypatch.undo()
        assert not table.out(1)
        checks.stop()

    run(test)


def test_a_successor_goes_on_where_the_checker_before_ended(tmp_path: Path) -> None:
    async def test(table: Table, network: Network) -> None:
        network.failing[1] = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        first = Checks(configuration(tmp_path, "unhealthy: 1, healthy: 6"), table.open, network.open)
        first.start(asyncio.get_running_loop())
        await network.more(1, 2)
        first.stop(["pay"])
        assert table.out(1)
        del network.failing[1]
        second = Checks(configuration(tmp_path, "unhealthy: 1, healthy: 6"), table.open, network.open)
        second.start(asyncio.get_running_loop())
        await network.more(1, 3)
        assert table.out(1)  # these successes are too few
        await network.more(1, 4)
        assert not table.out(1)
        second.stop()

    run(test)


def test_verdicts_end_with_the_checks(tmp_path: Path) -> None:
    async def test(table: Table, network: Network) -> None:
        network.failing = dict.fromkeys((1, 2), ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))
        checks = Checks(configuration(tmp_path, "unhealthy: 1"), table.open, network.open)
        checks.start(asyncio.get_running_loop())
        await network.more(1, 2)
        await network.more(2, 2)
        assert table.out(1) and table.out(2)
        kept = checks.upstreams[0].endpoints[B.address, B.name]
        checks.upstreams[0].replace([B])  # as discovery does
        assert not table.out(1) and table.out(2)
        assert list(checks.upstreams[0].endpoints.values()) == [kept]
        checks.stop(["other"])
        assert not table.out(2)

    run(test)


def test_intervals_vary_within_the_jitter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(table: Table, network: Network) -> None:
        waits: list[float] = []
        enough, real = asyncio.Event(), asyncio.sleep

        async def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) > 200:
                enough.set()
            await real(0)

        monkeypatch.setattr(runner.asyncio, "sleep", sleep)
        monkeypatch.setattr(runner.time, "monotonic", lambda: 0.0)  # checks take no time
        checks = Checks(configuration(tmp_path, "jitter: 20%", "['192.0.2.1:1']"), table.open, network.open)
        checks.start(asyncio.get_running_loop())
        await enough.wait()
        checks.stop()
        assert 0 <= waits[0] <= 0.1
        assert all(0.08 <= wait <= 0.12 for wait in waits[1:])
        assert max(waits[1:]) - min(waits[1:]) > 0.02

    run(test)
