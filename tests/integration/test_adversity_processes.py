"""Workers that are killed, reloaded and drained under load, and one that runs out of descriptors: the ledger balances."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.integration.bank import WatchedGateway, write_faults_config
from tests.integration.faults import Cut, Ledger, Payers, ScriptedOrigin, Stream, connect, get, ok, post, serve
from tests.integration.processes import PATIENCE, Gateway, eventually


@pytest.fixture
def scripted() -> Iterator[ScriptedOrigin]:
    origin = ScriptedOrigin()
    yield origin
    origin.close()


def write(folder: Path, origin: ScriptedOrigin, workers: int = 2, listener: str = "") -> Path:
    return write_faults_config(
        folder / "faults.yaml", {"origin": origin.port}, workers=workers, listeners={"public": listener}
    )


def connections_of(gateway: WatchedGateway, slot: int) -> int:
    """Client connections that a worker holds, by the kernel's table: those of its descriptors that reached the listener."""
    inodes = set()
    for entry in Path(f"/proc/{gateway.workers()[slot]}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(entry.readlink().name)
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    port = f":{gateway.port():04X}"
    return sum(row[1].endswith(port) and row[3] == "01" and f"socket:[{row[9]}]" in inodes for row in rows)


def test_a_killed_worker_costs_only_what_was_in_flight_on_it(tmp_path: Path, scripted: ScriptedOrigin) -> None:
    with WatchedGateway(write(tmp_path, scripted)) as gateway, Payers(gateway.port(), 8) as payers:
        for round_ in range(3):
            payers.paid(200)
            slot = round_ % 2
            before = gateway.workers()
            failed = payers.count(0)
            lost = connections_of(gateway, slot)
            os.kill(before[slot], signal.SIGKILL)
            after = eventually(partial(successors, gateway, before), "the successor")
            assert after[1 - slot] == before[1 - slot]
            payers.paid(200)
            # One each for the connections of that worker; the others noticed nothing.
            assert payers.count(0) - failed <= lost
        payers.paid(100)
        assert payers.failed().keys() <= {0}
        payers.__exit__()
        payers.check(scripted.ledger)
        gateway.calm(same=False)


def successors(gateway: WatchedGateway, before: list[int]) -> list[int]:
    """The workers, once they are ready again and not the same."""
    return [] if (now := gateway.workers()) == before else now


def test_twenty_reloads_under_load_fail_nobody(tmp_path: Path, scripted: ScriptedOrigin) -> None:
    path = write(tmp_path, scripted)
    text = path.read_text()
    with WatchedGateway(path) as gateway:
        gateway.get("/x")
        files = gateway.files()
        with Payers(gateway.port(), 4) as kept, Payers(gateway.port(), 2, fresh=True) as fresh:
            for version in range(2, 22):
                path.write_text(text.replace("name: all", f"name: all-{version}"))
                gateway.signal(signal.SIGHUP)
                eventually(partial(runs, gateway, version), "the new version everywhere")
                kept.paid(5)
                fresh.paid(5)
        assert kept.failed() == {}
        assert fresh.failed() == {}
        ledger = Ledger(scripted.ledger.executed.copy())
        kept.told.update(fresh.told)
        kept.check(ledger)
        scripted.reset()
        gateway.calm()
        assert gateway.files() <= files


def runs(gateway: Gateway, version: int) -> bool:
    return versions(gateway) == {version}


def versions(gateway: Gateway) -> set[int]:
    return {row["version"] for row in gateway.admin("/status")[1]["workers"]}


def test_a_reload_strands_no_upstream_connection(tmp_path: Path, scripted: ScriptedOrigin) -> None:
    """Exchanges in flight finish on the old snapshot; their connections must not wait in pools that nobody draws from."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        origin.seen.release()
        assert origin.go.wait(PATIENCE)
        stream.send(ok())
        serve(origin, stream)

    scripted.script = script
    path = write(tmp_path, scripted, workers=1)
    with WatchedGateway(path) as gateway:
        clients = [connect(gateway.port()) for _ in range(5)]
        for client in clients:
            client.send(get("/slow"))
        for _ in clients:
            scripted.saw()
        path.write_text(path.read_text().replace("name: all", "name: other"))
        gateway.signal(signal.SIGHUP)
        eventually(lambda: versions(gateway) == {2})
        scripted.go.set()
        for client in clients:
            assert client.answer().status == 200
        asked = [client.ask(get("/slow")).status for client in clients]
        assert asked == [200] * 5
        # One after the other: one connection is enough for all, and what a pool holds can be used.
        assert eventually(lambda: pooled(gateway), "the end of what was in flight") == 1
        for client in clients:
            client.close()
        scripted.reset()
        gateway.calm()


def pooled(gateway: WatchedGateway) -> float:
    """Idle upstream connections, 0 while others are at work."""
    found = gateway.metrics()
    idle, active = (found[f'crossway_upstream_connections{{state="{state}"}}'] for state in ("idle", "active"))
    return 0 if active else idle


def test_a_drain_under_load_finishes_what_it_began(tmp_path: Path, scripted: ScriptedOrigin) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        while True:
            request = stream.request()
            origin.ledger.execute(request.fields["idempotency-key"])
            origin.go.wait(0.005)
            stream.send(ok(request.body))

    scripted.script = script
    with WatchedGateway(write(tmp_path, scripted)) as gateway, Payers(gateway.port(), 16) as payers:
        payers.paid(300)
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
        payers.__exit__()
        payers.check(scripted.ledger)
        # Nothing that was executed was lost on its way back, and nobody was told of a failure by the gateway.
        unpaid = [payment for payment, status in payers.told.items() if status != 200]
        assert not any(scripted.ledger.executed[payment] for payment in unpaid)
        assert payers.failed().keys() <= {0}
        assert gateway.events().count("exchange cut off at the end of the drain") == 0


def test_a_drain_ends_at_its_deadline_and_says_what_it_cut(tmp_path: Path, scripted: ScriptedOrigin) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        origin.seen.release()
        origin.go.wait(PATIENCE)

    scripted.script = script
    path = write(tmp_path, scripted, workers=1)
    path.write_text(path.read_text().replace("deadline: 10s", "deadline: 300ms"))
    with WatchedGateway(path) as gateway, connect(gateway.port()) as client, connect(gateway.port()) as reader:
        client.send(post("/slow/held", b"pay", "authorization: Bearer secret"))
        scripted.saw()
        reader.send(b"GET /slow HTTP/1.1\r\nhost: b\r\n")  # never ends its head
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
        with pytest.raises(Cut):
            client.answer()
        cut = [line for line in gateway.log() if line["event"] == "exchange cut off at the end of the drain"]
        assert ["POST" in str(line["exchange"]) for line in cut].count(True) == 1
        assert "secret" not in json.dumps(cut)


def test_a_worker_without_descriptors_waits_without_spinning(tmp_path: Path, scripted: ScriptedOrigin) -> None:
    path = write(tmp_path, scripted, workers=1, listener="timeouts: {head: 30s}")
    with WatchedGateway(path, wrapper=["prlimit", "--nofile=200"]) as gateway:
        first = connect(gateway.port())
        assert first.ask(get()).status == 200  # its upstream connection waits in the pool from now on
        patient = [connect(gateway.port()) for _ in range(300)]
        eventually(lambda: gateway.counter("accept_paused") > 0, "a pause of accepting")
        # What is inside goes on: with the pooled connection, and with a clear word where a new one is needed.
        assert first.ask(post("/x", b"1")).body == b"1"
        before = gateway.metrics()
        assert first.ask(get("/slow")).status in (200, 503)
        eventually(lambda: gateway.counter("accept_paused") >= before["crossway_accept_paused_total"] + 3)
        after = gateway.metrics()
        pauses = after["crossway_accept_paused_total"] - before["crossway_accept_paused_total"]
        # A pause lasts a tick, 100 ms: a loop that spins turns thousands of times in it.
        assert after["crossway_loop_polls_total"] - before["crossway_loop_polls_total"] < 20 * pauses
        for client in patient:
            client.close()
        eventually(lambda: gateway.metrics()["crossway_connections"] <= 1)
        with connect(gateway.port()) as late:
            assert late.ask(get("/slow")).status == 200
        assert first.ask(get()).status == 200
        first.close()
        scripted.reset()
        gateway.calm()


def test_a_full_disk_costs_audit_lines_not_requests(tmp_path: Path, scripted: ScriptedOrigin) -> None:
    path = write(tmp_path, scripted, workers=1)
    policies = "policies: {trail: {audit: {file: /dev/full}}, nobody: {ip: {allow: [10.9.9.9]}}}\n"
    path.write_text(path.read_text().replace("upstream: origin}", "upstream: origin, policies: [trail, nobody]}", 1) + policies)
    records = 20_000  # more than the buffer holds
    with WatchedGateway(path) as gateway, connect(gateway.port()) as client:
        thread = threading.Thread(target=client.send, args=(get() * records,))
        thread.start()
        assert {client.answer().status for _ in range(records)} == {403}
        thread.join(PATIENCE)
        counts = gateway.metrics()
        assert counts["crossway_audit_records_lost_total"] > 0
        assert counts["crossway_audit_records_total"] + counts["crossway_audit_records_lost_total"] >= records
        wrong = [line["event"] for line in gateway.log() if line["level"] == "error"]
        assert len(wrong) < 20  # a line for the state, not one for each record


def test_a_stopped_worker_s_backlog_is_served_when_it_wakes(tmp_path: Path, scripted: ScriptedOrigin) -> None:
    """A worker that slept looks at its sockets before its deadlines."""
    path = write(tmp_path, scripted, workers=1)
    with WatchedGateway(path) as gateway, connect(gateway.port()) as client:
        client.send(post("/x", b"1234")[:-2])
        eventually(lambda: gateway.metrics()["crossway_exchanges"] == 1)
        asleep = threading.Event()
        os.kill(gateway.pids[0], signal.SIGSTOP)
        try:
            client.send(b"34")
            asleep.wait(2.2)  # longer than any deadline of this configuration, shorter than the watchdog's patience
        finally:
            os.kill(gateway.pids[0], signal.SIGCONT)
        assert client.answer().body == b"1234"
    scripted.reset()
