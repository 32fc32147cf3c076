"""Several control planes on one PostgreSQL: what one hears all know, and the death of one takes nothing away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.control_kit import FILE, ControlProcess, Member, serial_of
from tests.integration.postgres_kit import Postgres, open_postgres
from tests.integration.processes import PATIENCE, eventually


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    with open_postgres() as server:
        yield server


@pytest.fixture
def pair(tmp_path: Path, postgres: Postgres) -> Iterator[tuple[ControlProcess, ControlProcess]]:
    (tmp_path / "mesh.yaml").write_text(FILE.format(state=postgres.url, lifetime="1h", control="  heartbeat: 5s\n"))
    with ControlProcess(tmp_path) as one, ControlProcess(tmp_path) as two:
        yield one, two


def test_one_dies_and_nothing_is_lost(pair: tuple[ControlProcess, ControlProcess]) -> None:
    one, two = pair
    payments, ledger = Member(one, "payments", 1), Member(two, "ledger", 2)
    try:
        for member in (payments, ledger):
            status, answer = member.join()
            assert status == 200, answer
        payments.open()
        ledger.open()
        # What the second hears, the first tells.
        payments.has(lambda held: payments.endpoints("ledger") == ["127.0.0.1:9002"], "the endpoint heard elsewhere")
        ledger.beat(healthy=False)
        payments.has(lambda held: payments.endpoints("ledger") == [], "its illness")
        ledger.beat()
        payments.has(lambda held: payments.endpoints("ledger") == ["127.0.0.1:9002"], "its recovery")
        two.kill()
        assert ledger.closed.wait(PATIENCE)
        # It comes back to the other one: same certificate, no endpoint lost, renewals answered.
        ledger.control = one
        known = len(payments.messages)
        ledger.open(ledger.held["version"], one)
        rows = eventually(lambda: [row for row in one.status()["instances"] if row["service"] == "ledger" and row["state"] == "healthy"], "its return")
        assert rows[0]["instance"] == "ledger-2"
        status, answer = ledger.renew()
        assert status == 200, answer
        assert payments.endpoints("ledger") == ["127.0.0.1:9002"]
        assert all(
            message.get("changes", {}).get("services", {}).get("ledger", {"endpoints": [1]})["endpoints"] for message in payments.messages[known:]
        )
        versions = [message["version"] for message in payments.messages]
        assert versions == sorted(set(versions))
    finally:
        payments.close()
        ledger.close()


def test_where_an_instance_is_is_what_its_present_stream_says(pair: tuple[ControlProcess, ControlProcess]) -> None:
    one, two = pair
    payments, ledger = Member(one, "payments", 1), Member(two, "ledger", 2)
    try:
        assert payments.join()[0] == 200 and ledger.join()[0] == 200
        payments.open()
        ledger.open()
        payments.has(lambda held: payments.endpoints("ledger") == ["127.0.0.1:9002"], "where it joined")
        ledger.beat(inbound="127.0.0.1:9444", labels={"version": "2"}, zone="b")
        payments.has(lambda held: payments.endpoints("ledger") == ["127.0.0.1:9444"], "where it is")
        assert payments.held["services"]["ledger"]["endpoints"] == [{"address": "127.0.0.1:9444", "weight": 1, "zone": "b", "labels": {"version": "2"}}]
        # It goes over to the first; what its old stream says after that counts no more.
        old, ledger.control = ledger.socket, one
        ledger.open(ledger.held["version"], one)
        eventually(lambda: [row for row in one.status()["instances"] if row["service"] == "ledger" and row["sent"] == row["applied"]], "its new stream")
        ledger.beat(inbound="127.0.0.1:9555")
        payments.has(lambda held: payments.endpoints("ledger") == ["127.0.0.1:9555"], "where it is now")
        old.send('{"type": "heartbeat", "healthy": true, "draining": false, "inbound": "127.0.0.1:9666"}')
        ledger.beat(inbound="127.0.0.1:9777")
        payments.has(lambda held: payments.endpoints("ledger") == ["127.0.0.1:9777"], "the last word")
        told = [each["address"] for message in payments.messages for each in ((message.get("assignment") or message["changes"]).get("services", {}).get("ledger") or {}).get("endpoints", [])]
        assert "127.0.0.1:9666" not in told
        old.close()
    finally:
        payments.close()
        ledger.close()


@pytest.mark.timeout(180)  # for as long as a control plane waits
def test_instances_of_a_dead_control_plane_that_do_not_come_back_are_out(pair: tuple[ControlProcess, ControlProcess]) -> None:
    one, two = pair
    payments, ledger = Member(one, "payments", 1), Member(two, "ledger", 2)
    stop = threading.Event()
    try:
        assert payments.join()[0] == 200 and ledger.join()[0] == 200
        payments.open()
        ledger.open()
        payments.has(lambda held: payments.endpoints("ledger"), "the endpoint")

        def beat() -> None:
            while not stop.wait(1):
                payments.beat()

        threading.Thread(target=beat, daemon=True).start()
        two.kill()
        # The first has started half a minute ago at most, and gives everybody that long to come back.
        for _ in range(4):
            if payments.endpoints("ledger"):
                try:
                    payments.has(lambda held: payments.endpoints("ledger") == [], "its end")
                except AssertionError:
                    continue
        assert payments.endpoints("ledger") == []
    finally:
        stop.set()
        payments.close()
        ledger.close()


def test_a_token_is_good_once_wherever_it_is_shown(pair: tuple[ControlProcess, ControlProcess]) -> None:
    one, two = pair
    token = one.token("payments").read_text()
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda at=at, number=number: codes.append(Member(at, "payments", number).join(token)[0]))
        for number, at in enumerate((one, two, one, two))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(codes) == [200, 403, 403, 403]


def test_revocation_reaches_members_of_every_control_plane(pair: tuple[ControlProcess, ControlProcess]) -> None:
    one, two = pair
    ledger = Member(two, "ledger", 2)
    try:
        assert ledger.join()[0] == 200
        ledger.open()
        ledger.has(lambda held: held["version"], "an assignment")
        assert one.command("revoke", serial_of(ledger)).returncode == 0
        assert ledger.closed.wait(PATIENCE)
    finally:
        ledger.close()


def test_streams_outlive_the_database(pair: tuple[ControlProcess, ControlProcess], postgres: Postgres) -> None:
    one, _ = pair
    payments = Member(one, "payments", 1)
    try:
        assert payments.join()[0] == 200
        payments.open()
        payments.has(lambda held: held["version"], "an assignment")
        eventually(lambda: [row["state"] for row in one.status()["instances"]] == ["healthy"], "its place in the registry")
        postgres.stop()
        eventually(lambda: one.logged("the state or the authority cannot be used; streams go on"), "the line in the log")
        assert one.page("/readyz")[0] == 503
        assert payments.renew()[0] == 503
        assert not payments.closed.is_set() and one.process.poll() is None
    finally:
        payments.close()
