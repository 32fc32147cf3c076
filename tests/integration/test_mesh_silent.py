"""Whose stream is lost and who can be reached all the same stays an endpoint: a broken way to the control plane takes nobody from his callers."""

from __future__ import annotations

import contextlib
import http.client
import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from gateway.mesh.registry import COMEBACK
from tests.integration.control_kit import FILE, ControlProcess, Door, Member, metric, serial_of
from tests.integration.mesh_kit import Sidecar
from tests.integration.postgres_kit import open_postgres
from tests.integration.processes import PATIENCE, Origin, eventually
from tests.integration.relay import Relay

pytestmark = pytest.mark.timeout(240)  # for as long as a control plane waits
HEARTBEAT = 10
PROBE = f"  heartbeat: {HEARTBEAT}s\n  health: {{interval: 500ms, timeout: 500ms, failures: 3}}\n"
CALM = PROBE.replace("500ms", "2s")  # nobody gives up on a busy machine
Open = Callable[[ControlProcess, int], "There"]
LOST = "a member has no stream but can be reached: it goes on being offered"


def in_time(condition: Callable[[], Any], what: str, seconds: float = COMEBACK) -> Any:
    """Wait for what comes only when the control plane's own time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    return eventually(condition, what)


class Calls(threading.Thread):
    """Somebody who calls a service all the time."""

    def __init__(self, sidecar: Sidecar, service: str) -> None:
        super().__init__(daemon=True)
        self.sidecar, self.service = sidecar, service
        self.seen: Counter[object] = Counter()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.seen[self._call()] += 1

    def _call(self) -> object:
        connection = http.client.HTTPConnection("127.0.0.1", self.sidecar.outbound, timeout=PATIENCE)
        try:
            connection.request("GET", "/v1/x", headers={"host": self.service})
            return connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return repr(error)
        finally:
            connection.close()

    def __enter__(self) -> Self:
        eventually(lambda: self._call() == 200, "a call")
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join(PATIENCE)


class Beats(threading.Thread):
    """The heartbeats of a member made by hand, who says what `say` was told last."""

    def __init__(self, member: Member) -> None:
        super().__init__(daemon=True)
        self.member = member
        self.said: dict[str, Any] = {}
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.start()

    def run(self) -> None:
        while not self.over.wait(1):
            with contextlib.suppress(Exception):  # the stream may be over
                self.say(**self.said)

    def say(self, **said: Any) -> None:
        with self.lock:
            self.said = said
            self.member.beat(**said)

    def end(self) -> None:
        """The stream ends, without a further word."""
        self.over.set()
        self.join(PATIENCE)
        self.member.close()


class There:
    """An instance of ledger that can be reached, with its stream."""

    def __init__(self, control: ControlProcess, number: int) -> None:
        self.door = Door(Member(control, "ledger", number))
        status, answer = self.member.join()
        assert status == 200, answer
        self.door.open()
        self.beats = Beats(self.member.open())

    @property
    def member(self) -> Member:
        return self.door.member

    @property
    def address(self) -> str:
        return self.member.inbound

    def close(self) -> None:
        self.beats.end()
        self.door.close()


@pytest.fixture
def opened() -> Iterator[Open]:
    with contextlib.ExitStack() as stack:
        yield lambda control, number: stack.enter_context(contextlib.closing(There(control, number)))


@contextlib.contextmanager
def watching(control: ControlProcess) -> Iterator[Member]:
    """An instance of payments."""
    payments = Member(control, "payments", 1)
    assert payments.join()[0] == 200
    beats = Beats(payments.open())
    try:
        yield payments
    finally:
        beats.end()


def row_of(control: ControlProcess, instance: str) -> dict[str, Any]:
    return next(row for row in json.loads(control.page("/status")[1])["instances"] if instance in (row["instance"], row["service"]))


def becomes(control: ControlProcess, instance: str, state: str) -> dict[str, Any]:
    def there() -> dict[str, Any] | None:
        with contextlib.suppress(StopIteration, KeyError):  # not joined yet; a page that cannot be made now
            return row if (row := row_of(control, instance))["state"] == state else None
        return None

    return dict(in_time(there, f"{instance}, {state},"))


def changes_of(control: ControlProcess) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{control.folder / 'mesh.db'}?mode=ro", uri=True)) as state:
        return int(state.execute("SELECT value FROM counters WHERE name = 'changes'").fetchone()[0])


def told(member: Member, since: int = 0) -> list[list[str]]:
    """The endpoints of ledger, as they were told one after the other."""
    settings = [(message.get("assignment") or message["changes"]).get("services", {}).get("ledger") for message in member.messages[since:]]
    return [[each["address"] for each in found["endpoints"]] for found in settings if found is not None]


def test_a_restart_and_a_broken_way_to_the_control_plane_take_no_endpoint_away(tmp_path: Path, origin: Origin) -> None:
    with (
        ControlProcess(tmp_path, control=CALM) as control, Relay(control.port) as near, Relay(control.port) as broken,
        Sidecar(control, "payments", origin.port, "--control", f"https://127.0.0.1:{near.port}") as payments,  # type: ignore[arg-type]
        Sidecar(control, "ledger", origin.port, "--control", f"https://127.0.0.1:{broken.port}") as ledger,  # type: ignore[arg-type]
        Calls(payments, "ledger") as calls,
    ):  # fmt: skip
        becomes(control, "ledger", "healthy")
        edge = Member(control, "edge", 1)
        assert edge.join(inbound="0.0.0.0:0")[0] == 200
        edge.open()
        becomes(control, "edge-1", "healthy")
        broken.partition()
        control.kill()
        control.start()
        began, near.target = time.monotonic(), control.port
        near.break_all()
        eventually(lambda: payments.status()["control"]["connected"], "the other one's return")
        row = becomes(control, "ledger", "silent")
        assert row["offered"] and row["inbound"] == f"127.0.0.1:{ledger.inbound}"
        assert time.monotonic() - began > COMEBACK - 5
        (taken,) = control.logged("a control plane is not heard any more; its instances are taken over")
        assert (taken["looked_at"], taken["gone"]) == (1, 1)
        assert row_of(control, "edge-1")["state"] == "gone"  # at an edge nobody can look
        # The caller has the newest assignment, and calls go on for longer than anything that is waited for.
        eventually(lambda: time.monotonic() - began > COMEBACK + HEARTBEAT + 5, "the end of all grace")
        assert row_of(control, "ledger")["state"] == "silent"
        assert set(calls.seen) == {200}, calls.seen
        # That it is there is known by looking at it alone.
        calls.over.set()
        calls.join(PATIENCE)
        ledger.process.kill()
        becomes(control, "ledger", "gone")
        kept = payments.state / "assignment.json"
        eventually(lambda: json.loads(kept.read_text())["assignment"]["services"]["ledger"]["endpoints"] == [], "its callers' news")


def test_an_operator_sees_who_has_no_stream_and_it_comes_back_without_a_gap(tmp_path: Path, origin: Origin) -> None:
    with (
        ControlProcess(tmp_path, control=CALM) as control, Relay(control.port) as way, watching(control) as caller,
        Sidecar(control, "payments", origin.port) as payments,  # type: ignore[arg-type]
        Sidecar(control, "ledger", origin.port, "--control", f"https://127.0.0.1:{way.port}") as ledger,  # type: ignore[arg-type]
        Calls(payments, "ledger") as calls,
    ):  # fmt: skip
        becomes(control, "ledger", "healthy")
        caller.has(lambda held: caller.endpoints("ledger"), "the endpoint")
        known = len(caller.messages)
        way.partition()
        row = becomes(control, "ledger", "silent")
        assert row["offered"] and len(row["problems"]) == 1
        shown = " ".join(control.command("status").stdout.split())
        assert "1 silent" in shown and "no stream for" in shown and "but it can be reached" in shown
        assert control.command("status", "--check").returncode == 1
        assert metric(control, 'crossway_control_instances{service="ledger",state="silent"}') == 1
        (line,) = control.logged(LOST)
        assert (line["service"], line["inbound"]) == ("ledger", f"127.0.0.1:{ledger.inbound}")
        assert control.command("rotate-root", "prepare").returncode == 0
        refused = control.command("rotate-root", "activate")
        assert refused.returncode == 1 and "ledger/" in refused.stderr  # it cannot be given the new root
        way.heal()
        way.break_all()
        becomes(control, "ledger", "healthy")
        assert set(calls.seen) == {200}, calls.seen
        assert [] not in told(caller, known)


def test_who_said_goodbye_is_gone_though_something_answers_at_its_address(tmp_path: Path, opened: Open) -> None:
    with ControlProcess(tmp_path, control=PROBE) as control, watching(control) as payments:
        one, two = opened(control, 1), opened(control, 2)
        payments.has(lambda held: len(payments.endpoints("ledger")) == 2, "both endpoints")
        eventually(lambda: len(one.door.met) > 1 and len(two.door.met) > 1, "looks at them")
        one.beats.say(draining=True)
        one.beats.end()
        two.beats.end()  # without a word
        becomes(control, "ledger-2", "silent")
        assert row_of(control, "ledger-1")["state"] == "gone"
        assert payments.endpoints("ledger") == [two.address]
        before = len(one.door.met), len(two.door.met)
        changes = changes_of(control)
        eventually(lambda: len(two.door.met) > before[1] + 5, "more looks at the one that is offered")
        assert changes_of(control) == changes  # that all is as it was is not written down
        assert len(one.door.met) <= before[0] + 1


def test_who_is_ill_or_revoked_or_not_looked_at_is_gone(tmp_path: Path, opened: Open) -> None:
    with ControlProcess(tmp_path, control=PROBE) as control, watching(control) as payments:
        ill, revoked, last = (opened(control, number) for number in (1, 2, 3))
        payments.has(lambda held: len(payments.endpoints("ledger")) == 3, "the endpoints")
        ill.beats.say(healthy=False)
        payments.has(lambda held: len(payments.endpoints("ledger")) == 2, "its illness")
        for each in (ill, revoked, last):
            each.beats.end()
        becomes(control, "ledger-2", "silent")
        becomes(control, "ledger-3", "silent")
        becomes(control, "ledger-1", "gone")
        assert control.command("revoke", serial_of(revoked.member)).returncode == 0
        payments.has(lambda held: payments.endpoints("ledger") == [last.address], "who is not revoked")
        becomes(control, "ledger-2", "gone")
        control.edit(PROBE.splitlines()[1], "  health: off")
        payments.has(lambda held: payments.endpoints("ledger") == [], "nobody of whom nothing is known")
        becomes(control, "ledger-3", "gone")


@pytest.mark.parametrize("silent_before", [True, False])
def test_a_new_instance_at_the_same_address_takes_the_old_ones_place(tmp_path: Path, opened: Open, silent_before: bool) -> None:
    with ControlProcess(tmp_path, control=PROBE) as control, watching(control) as payments:
        old = opened(control, 1)
        payments.has(lambda held: payments.endpoints("ledger") == [old.address], "the endpoint")
        old.beats.end()
        if silent_before:
            becomes(control, "ledger-1", "silent")
        fresh = Member(control, "ledger", 2)
        fresh.inbound = old.address  # where the same door answers, with a certificate of the same service
        assert fresh.join()[0] == 200
        beats = Beats(fresh.open())
        try:
            becomes(control, "ledger-2", "healthy")
            becomes(control, "ledger-1", "gone")
            row = row_of(control, "ledger-2")
            assert row["state"] == "healthy" and row["offered"]
            assert payments.endpoints("ledger") == [old.address]
            assert {tuple(each) for each in told(payments)[1:]} <= {(old.address,)}, "once, and all the time"
        finally:
            beats.end()


def test_the_same_process_under_a_new_name_is_not_kept_out_by_its_old_one(tmp_path: Path, opened: Open) -> None:
    with ControlProcess(tmp_path, control=PROBE) as control, watching(control) as payments:
        old = opened(control, 1)
        payments.has(lambda held: payments.endpoints("ledger") == [old.address], "the endpoint")
        old.beats.end()
        becomes(control, "ledger-1", "silent")
        old.member.instance = "ledger-renamed"
        beats = Beats(old.member.open())
        try:
            beats.say(inbound=old.address)
            becomes(control, "ledger-renamed", "healthy")
            payments.has(lambda held: payments.endpoints("ledger") == [old.address], "the endpoint")
            assert [row["instance"] for row in control.status()["instances"] if row["service"] == "ledger"] == ["ledger-renamed"]
        finally:
            beats.end()


def test_who_is_taken_over_is_given_back(tmp_path: Path, opened: Open) -> None:
    """Two control planes, and one's way to the state is broken for longer than the other one waits for it."""
    with open_postgres() as server, Relay(server.port) as way:
        (tmp_path / "mesh.yaml").write_text(FILE.format(state=server.url, lifetime="1h", control=PROBE))
        apart = tmp_path / "apart.yaml"
        apart.write_text((tmp_path / "mesh.yaml").read_text().replace(f":{server.port}/", f":{way.port}/"))
        with ControlProcess(tmp_path) as one, ControlProcess(tmp_path, path=apart) as two, watching(one) as payments:
            ledger = opened(two, 1)
            before = becomes(one, "ledger-1", "healthy")
            payments.has(lambda held: payments.endpoints("ledger") == [ledger.address], "the endpoint")
            way.partition()
            way.break_all()
            row = becomes(one, "ledger-1", "silent")
            assert row["replica"] != before["replica"] and row["offered"]
            assert not ledger.member.closed.is_set()
            way.heal()
            row = becomes(one, "ledger-1", "healthy")
            assert row["replica"] == before["replica"]
            assert two.logged("a member that was taken for lost has its stream here")
            assert {tuple(each) for each in told(payments)[1:]} <= {(ledger.address,)}, "offered all the time"
            ledger.beats.say(healthy=False)
            becomes(one, "ledger-1", "unhealthy")
            assert not ledger.member.closed.is_set()
