"""The control plane looks whether instances can be reached: who cannot is not offered, and a wall around the control plane takes nobody out."""

from __future__ import annotations

import contextlib
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.mesh.ca import Ca
from tests.integration.control_kit import FILE, ControlProcess, Door, Member, metric
from tests.integration.mesh_kit import Sidecar
from tests.integration.postgres_kit import open_postgres
from tests.integration.processes import PATIENCE, Origin, eventually

PROBE = "  heartbeat: 60s\n  health: {interval: 300ms, timeout: 300ms, failures: 2}\n"

CALM = PROBE.replace("300ms", "3s")  # nobody gives up on a busy machine


@pytest.fixture
def doors() -> Iterator[list[Door]]:
    found: list[Door] = []
    yield found
    for door in found:
        door.close()
        door.member.close()


def opened(doors: list[Door], control: ControlProcess, number: int) -> Door:
    """An instance of ledger that can be reached, with its stream."""
    door = Door(Member(control, "ledger", number))
    status, answer = door.member.join()
    assert status == 200, answer
    doors.append(door.open())
    door.member.open()
    return door


def watching(control: ControlProcess) -> Member:
    """An instance of payments, the only one, that nobody can reach: a single one is never taken out."""
    payments = Member(control, "payments", 1)
    assert payments.join()[0] == 200
    return payments.open()


def states(control: ControlProcess, service: str = "ledger") -> list[str]:
    return [row["state"] for row in control.status()["instances"] if row["service"] == service]


def test_who_cannot_be_reached_is_taken_out_and_comes_back(tmp_path: Path, doors: list[Door]) -> None:
    with ControlProcess(tmp_path, control=PROBE) as control, contextlib.closing(watching(control)) as payments:
        one, two = opened(doors, control, 1), opened(doors, control, 2)
        payments.has(lambda held: len(payments.endpoints("ledger")) == 2, "both endpoints")
        eventually(lambda: one.met and two.met, "the control plane's look")
        assert {name for names in one.met for name in names} == {"spiffe://bank.test/control"}
        two.shut.set()
        payments.has(lambda held: payments.endpoints("ledger") == [one.member.inbound], "the one that answers")
        row = next(row for row in control.status()["instances"] if row["instance"] == "ledger-2")
        assert (row["state"], row["offered"]) == ("unreachable", False) and row["unreachable"] == "no connection within 0.3 s"
        assert "cannot be reached: no connection within 0.3 s" in control.command("status").stdout
        assert control.command("status", "--check").returncode == 1
        eventually(lambda: metric(control, 'crossway_control_instances{service="ledger",state="unreachable"}') == 1, "the metric")
        assert metric(control, 'crossway_control_probes_total{outcome="failed"}') >= 2
        line = next(line for line in control.logged("an instance cannot be reached") if line["instance"] == "ledger-2")
        assert line["inbound"] == two.member.inbound
        two.shut.clear()
        payments.has(lambda held: len(payments.endpoints("ledger")) == 2, "its return")
        eventually(lambda: states(control) == ["healthy", "healthy"], "the verdict's end")


def test_a_sidecar_that_stands_still_is_taken_out_and_none_counts_the_looks(tmp_path: Path, origin: Origin) -> None:
    with (
        ControlProcess(tmp_path, control=PROBE) as control, contextlib.closing(watching(control)) as payments,
        Sidecar(control, "ledger", origin.port) as one, Sidecar(control, "ledger", origin.port, state="ledger-2.state") as two,  # type: ignore[arg-type]
    ):  # fmt: skip
        ways = [f"127.0.0.1:{each.inbound}" for each in (one, two)]
        payments.has(lambda held: sorted(payments.endpoints("ledger")) == sorted(ways), "both endpoints")
        reached = 'crossway_control_probes_total{outcome="reached"}'
        eventually(lambda: metric(control, reached) >= 6, "the looks")
        two.process.send_signal(signal.SIGSTOP)
        try:
            payments.has(lambda held: payments.endpoints("ledger") == ways[:1], "the one that goes on")
            assert sorted(states(control)) == ["healthy", "unreachable"]
        finally:
            two.process.send_signal(signal.SIGCONT)
        payments.has(lambda held: sorted(payments.endpoints("ledger")) == sorted(ways), "its return")
        # To those who are looked at it was no client, and no mistake of one.
        lines = [line for line in one.logged("a client's TLS handshake failed") if line["pid"] == one.process.pid]
        assert [line for line in lines if line["reason"] != "the other side left"] == []  # which it does where a busy machine takes too long
        assert one.metric("crossway_mesh_denied_total") == 0


def test_a_service_that_speaks_tcp_has_no_line_of_it(tmp_path: Path, origin: Origin) -> None:
    (tmp_path / "mesh.yaml").write_text(
        FILE.format(state="mesh.db", lifetime="1h", control=CALM)
        .replace("ledger: {protocol: http, timeout: 2s, retries: {on: [connect-failure], budget: 20%}}", "ledger: {protocol: tcp}")
    )
    with ControlProcess(tmp_path) as control, Sidecar(control, "ledger", origin.port, "--app-protocol", "tcp") as ledger:  # type: ignore[arg-type]
        eventually(lambda: metric(control, 'crossway_control_probes_total{outcome="reached"}') >= 2, "the looks")
        assert states(control) == ["healthy"]
        text = ledger.errors.read_text()
        assert "a TCP connection" not in text and "handshake failed" not in text


@pytest.mark.parametrize("default", ["deny", "audit"])
def test_the_control_planes_certificate_asks_for_nothing(tmp_path: Path, origin: Origin, default: str) -> None:
    (tmp_path / "mesh.yaml").write_text(FILE.format(state="mesh.db", lifetime="1h", control="").replace("default: deny", f"default: {default}"))
    with ControlProcess(tmp_path) as control, Sidecar(control, "ledger", origin.port) as ledger:  # type: ignore[arg-type]
        ca = Ca(tmp_path / "ca", "bank.test").open(make=False)
        (tmp_path / "control.pem").write_bytes(ca.server_pem(600)[0])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(cadata=ca.bundle)
        context.load_cert_chain(tmp_path / "control.pem")
        said = b""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", ledger.inbound), PATIENCE) as raw, context.wrap_socket(raw) as secure:
            secure.sendall(b"GET / HTTP/1.1\r\nhost: ledger\r\n\r\n")
            said = secure.recv(100)
        assert said == b""
        assert ledger.metric("istio_requests_total") == 0


def test_a_wall_around_the_control_plane_empties_nothing(tmp_path: Path, doors: list[Door]) -> None:
    with ControlProcess(tmp_path, control=PROBE) as control, contextlib.closing(watching(control)) as payments:
        three = [opened(doors, control, number) for number in (1, 2, 3)]
        payments.has(lambda held: len(payments.endpoints("ledger")) == 3, "the endpoints")
        eventually(lambda: all(door.met for door in three), "the looks")
        for door in three:
            door.shut.set()
        spared = 'crossway_control_probe_spared{service="ledger"}'
        eventually(lambda: metric(control, spared) == 1 and states(control) == ["unreachable"] * 3, "the verdict")
        payments.has(lambda held: len(payments.endpoints("ledger")) == 3, "all that there were")
        assert all(row["offered"] for row in control.status()["instances"])
        shown = " ".join(control.command("status").stdout.split())
        assert "offered all the same" in shown
        assert [line["service"] for line in control.logged("more of a service cannot be reached than may be taken out; its instances are offered as they are")].count("ledger") == 1
        for door in three[:2]:
            door.shut.clear()
        payments.has(lambda held: sorted(payments.endpoints("ledger")) == sorted(door.member.inbound for door in three[:2]), "those that can be reached")
        eventually(lambda: metric(control, spared) == 0, "the end of it")


def test_somebody_else_at_the_address_is_not_the_instance(tmp_path: Path, doors: list[Door]) -> None:
    with ControlProcess(tmp_path, control=PROBE) as control, contextlib.closing(watching(control)) as payments:
        one, two = opened(doors, control, 1), opened(doors, control, 2)
        payments.has(lambda held: len(payments.endpoints("ledger")) == 2, "both endpoints")
        stranger = Door(Member(control, "accounts", 3))
        assert stranger.member.join()[0] == 200
        doors.append(stranger.open())
        two.member.beat(inbound=stranger.member.inbound)
        row = eventually(lambda: next((row for row in control.status()["instances"] if row["state"] == "unreachable" and row["service"] == "ledger"), None), "the verdict")
        assert "there is spiffe://bank.test/service/accounts" in row["unreachable"]
        payments.has(lambda held: payments.endpoints("ledger") == [one.member.inbound], "the one that is itself")
        two.member.beat(inbound=f"127.0.0.1:{two.port}")
        payments.has(lambda held: len(payments.endpoints("ledger")) == 2, "its return to its own place")


def test_it_can_be_switched_off_while_it_runs(tmp_path: Path, doors: list[Door]) -> None:
    with ControlProcess(tmp_path, control=PROBE) as control, contextlib.closing(watching(control)) as payments:
        opened(doors, control, 1)
        two = opened(doors, control, 2)
        payments.has(lambda held: len(payments.endpoints("ledger")) == 2, "both endpoints")
        two.shut.set()
        payments.has(lambda held: len(payments.endpoints("ledger")) == 1, "the one that answers")
        control.edit(PROBE.splitlines()[1], "  health: off")
        payments.has(lambda held: len(payments.endpoints("ledger")) == 2, "both, as they say that they are well")


def test_the_verdict_goes_with_the_instance_from_one_control_plane_to_another(tmp_path: Path, doors: list[Door]) -> None:
    with open_postgres() as server:
        (tmp_path / "mesh.yaml").write_text(FILE.format(state=server.url, lifetime="1h", control=PROBE))
        with ControlProcess(tmp_path) as one, ControlProcess(tmp_path) as two, contextlib.closing(watching(one)) as payments:
            good, bad = opened(doors, one, 1), opened(doors, two, 2)
            payments.has(lambda held: len(payments.endpoints("ledger")) == 2, "both endpoints")
            bad.shut.set()
            payments.has(lambda held: payments.endpoints("ledger") == [good.member.inbound], "what the other one found")
            known = len(payments.messages)
            two.kill()
            assert bad.member.closed.wait(PATIENCE)
            bad.member.control = one
            bad.member.open(bad.member.held.get("version", 0), one)
            row = eventually(lambda: next((row for row in one.status()["instances"] if row["instance"] == "ledger-2" and row["replica"] == good_replica(one)), None), "its stream")
            assert row["state"] == "unreachable"
            assert all(len(endpoints) == 1 for endpoints in told(payments, known))
            bad.shut.clear()
            payments.has(lambda held: len(payments.endpoints("ledger")) == 2, "its return, by the one that has it now")


def good_replica(control: ControlProcess) -> str:
    return str(next(row["replica"] for row in control.status()["instances"] if row["instance"] == "ledger-1"))


def told(member: Member, since: int) -> list[list[Any]]:
    found = []
    for message in member.messages[since:]:
        settings = (message.get("assignment") or message["changes"]).get("services", {}).get("ledger")
        if settings is not None:
            found.append(settings["endpoints"])
    return found
