"""Endpoints found by DNS, while payments run: what changes moves the traffic, what fails changes nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.faults import Payers, ScriptedOrigin, Stream, connect, get, ok, serve
from tests.integration.name_server import NameServer
from tests.integration.processes import Gateway, eventually

HEAD = "version: 1\nworkers: 2\nadmin: {bind: 127.0.0.1:0}\nlisteners: {public: {bind: 127.0.0.1:0}}\n"
NAME = "pay.bank.test"


def write(folder: Path, upstream: str, more: str = "", routes: str = "") -> Path:
    path = folder / "edge.yaml"
    path.write_text(
        f"{HEAD}upstreams:\n  pay: {upstream}\n{more}"
        f"routes:\n  - {{name: pay, match: {{prefix: /x}}, upstream: pay}}\n{routes}"
    )
    return path


@pytest.fixture
def names() -> Iterator[NameServer]:
    with NameServer() as server:
        yield server


class Pair:
    """Two origins on one port of two loopback addresses."""

    def __init__(self) -> None:
        self.a = ScriptedOrigin(address="127.0.0.2")
        self.port = self.a.port
        self.b = ScriptedOrigin(address="127.0.0.3", port=self.port)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        pair = Pair()
        stack.callback(pair.a.close)
        stack.callback(pair.b.close)
        yield pair


def by_name(names: NameServer, port: int, resolve: str = "200ms", name: str = NAME) -> str:
    return f"{{targets: ['{name}:{port}'], resolve: {resolve}, discovery: {{resolver: '{names.address}'}}}}"


def flowing(origin: ScriptedOrigin, count: int = 50) -> None:
    """Wait until an origin has executed so many more payments."""
    goal = len(origin.ledger.executed) + count
    eventually(lambda: len(origin.ledger.executed) >= goal, "payments at this origin")


def settled(payers: Payers, *origins: ScriptedOrigin) -> None:
    """Every payment got its own answer, and was executed once, by one of the origins."""
    assert payers.told
    assert set(payers.told.values()) == {200}
    assert payers.mistaken == []
    executed = sum((origin.ledger.executed for origin in origins), start=type(origins[0].ledger.executed)())
    assert executed == dict.fromkeys(payers.told, 1)


def counted(gateway: Gateway, *names: str) -> list[float]:
    """Counters of all workers, at one moment."""
    lines = gateway.admin("/metrics")[1].splitlines()
    return [next(float(line.split()[1]) for line in lines if line.startswith(f"crossway_{name}_total ")) for name in names]


def test_a_name_that_moves_takes_its_traffic_along(tmp_path: Path, names: NameServer, pair: Pair) -> None:
    names.a(NAME, "127.0.0.2")
    with Gateway(write(tmp_path, by_name(names, pair.port))) as gateway:
        with Payers(gateway.port(), 6, "/x/pay") as payers:
            flowing(pair.a)
            assert not pair.b.ledger.executed
            names.a(NAME, "127.0.0.3")
            flowing(pair.b)
            eventually(lambda: pair.a.open == 0, "the end of the old address's connections")
            before = len(pair.a.ledger.executed)
            flowing(pair.b)
            assert len(pair.a.ledger.executed) == before
        settled(payers, pair.a, pair.b)
        changes = eventually(lambda: [line for line in gateway.log() if line["event"] == "endpoints changed"])
        assert [(line["added"], line["removed"]) for line in changes] == [
            ([f"127.0.0.3:{pair.port}"], [f"127.0.0.2:{pair.port}"])
        ]


def test_an_exchange_under_way_ends_at_the_old_address(tmp_path: Path, names: NameServer, pair: Pair) -> None:
    def held(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        origin.seen.release()
        origin.go.wait()
        stream.send(ok(b"late"))

    pair.a.script = held
    names.a(NAME, "127.0.0.2")
    with Gateway(write(tmp_path, by_name(names, pair.port))) as gateway, connect(gateway.port()) as client:
        client.send(get("/x/held"))
        pair.a.saw()
        pair.a.script = serve  # of the connections to come: a worker may learn of the change a little later
        names.a(NAME, "127.0.0.3")
        with Payers(gateway.port(), 2, "/x/pay") as payers:
            flowing(pair.b)
        settled(payers, pair.a, pair.b)
        pair.a.go.set()
        assert client.answer().body == b"late"


def test_every_address_of_a_name_is_an_endpoint(tmp_path: Path, names: NameServer, pair: Pair) -> None:
    names.a(NAME, "127.0.0.2", "127.0.0.3")
    with Gateway(write(tmp_path, by_name(names, pair.port))) as gateway:
        with Payers(gateway.port(), 4, "/x/pay") as payers:
            flowing(pair.a)
            flowing(pair.b)
        settled(payers, pair.a, pair.b)


@pytest.mark.parametrize("failure", ["NXDOMAIN", "SERVFAIL", "REFUSED", "silence", "no records"])
def test_a_name_server_that_fails_changes_nothing(tmp_path: Path, names: NameServer, pair: Pair, failure: str) -> None:
    names.a(NAME, "127.0.0.2")
    with Gateway(write(tmp_path, by_name(names, pair.port))) as gateway:
        with Payers(gateway.port(), 4, "/x/pay") as payers:
            flowing(pair.a)
            if failure == "silence":
                names.silent = True
            elif failure == "no records":
                names.a(NAME)
            else:
                names.failing = {NAME: failure}

            def told(event: str) -> list[dict[str, object]]:
                return [line for line in gateway.log() if line["event"] == event]

            eventually(lambda: told("a name cannot be resolved"), "the line about the failure")
            asked = names.asked.total()
            eventually(lambda: names.asked.total() > asked + 8, "more look-ups")
            flowing(pair.a)
            (line,) = told("a name cannot be resolved")
            assert (line["host"], line["kept"]) == (NAME, 1)
            if failure in ("NXDOMAIN", "SERVFAIL", "REFUSED"):
                assert line["reason"] == failure
            eventually(lambda: counted(gateway, "lookup_failures")[0] > 2, "the counter of failures")
            asked, failed = counted(gateway, "lookups", "lookup_failures")
            assert asked >= failed
            names.failing, names.silent = {}, False
            names.a(NAME, "127.0.0.3")
            flowing(pair.b)
            eventually(lambda: told("a name is found again"), "the line about the end of it")
            assert len(told("a name is found again")) == 1
        settled(payers, pair.a, pair.b)


def test_what_was_found_outlives_a_reload_without_a_name_server(tmp_path: Path, names: NameServer, pair: Pair) -> None:
    names.a(NAME, "127.0.0.2")
    path = write(tmp_path, by_name(names, pair.port))
    with Gateway(path) as gateway:
        with Payers(gateway.port(), 4, "/x/pay") as payers:
            flowing(pair.a)
            names.failing = {NAME: "SERVFAIL"}
            eventually(lambda: "a name cannot be resolved" in gateway.events())
            write(tmp_path, by_name(names, pair.port), routes="  - {name: more, match: {prefix: /more}, upstream: pay}\n")
            gateway.signal(signal.SIGHUP)
            eventually(lambda: {row["version"] for row in gateway.admin("/status")[1]["workers"]} == {2})
            flowing(pair.a)
            assert gateway.get("/more")[0] == 200
        settled(payers, pair.a)


def test_the_successor_of_a_worker_knows_what_the_others_have_found(tmp_path: Path, names: NameServer, pair: Pair) -> None:
    names.a(NAME, "127.0.0.2")
    names.a("host.bank.test", "127.0.0.3")
    names.srv("_pay._tcp.bank.test", f"0 0 {pair.port} host.bank.test.")
    service = f"  srv: {{discovery: {{srv: _pay._tcp.bank.test, resolver: '{names.address}'}}}}\n"
    route = "  - {name: srv, match: {prefix: /srv}, upstream: srv}\n"
    with Gateway(write(tmp_path, by_name(names, pair.port), service, route)) as gateway:
        old = gateway.workers()
        names.silent = True
        os.kill(old[0], signal.SIGKILL)
        eventually(lambda: (new := gateway.workers()) and new[0] != old[0], "the successor")
        # Connections are spread over both workers' sockets: a dozen of them meet the successor.
        assert [gateway.get("/x")[0] for _ in range(12)] == [200] * 12
        assert [gateway.get("/srv")[0] for _ in range(12)] == [200] * 12


def test_of_a_thousand_records_a_bounded_number_is_used(tmp_path: Path, names: NameServer) -> None:
    everywhere = ScriptedOrigin(address="0.0.0.0")
    names.a(NAME, *(f"127.1.{number // 250}.{number % 250 + 1}" for number in range(1000)))
    try:
        with Gateway(write(tmp_path, by_name(names, everywhere.port))) as gateway:
            with Payers(gateway.port(), 4, "/x/pay") as payers:
                flowing(everywhere, 300)
            settled(payers, everywhere)
            (line,) = [line for line in gateway.log() if line["event"] == "a name has more endpoints than are used"]
            assert (line["found"], line["used"]) == (1000, 256)
            assert names.asked[NAME, "A", "tcp"], "an answer of this size does not fit into a datagram"
    finally:
        everywhere.close()


def test_a_name_server_that_never_answers_holds_up_nobody_else(tmp_path: Path, names: NameServer, pair: Pair) -> None:
    names.silent = True
    other = f"  other: {{targets: ['127.0.0.2:{pair.port}']}}\n"
    route = "  - {name: other, match: {prefix: /other}, upstream: other}\n"
    with Gateway(write(tmp_path, by_name(names, pair.port), other, route)) as gateway:
        with Payers(gateway.port(), 4, "/other/pay") as payers:
            flowing(pair.a, 300)
            assert gateway.get("/x")[0] == 503  # nothing is known about it
            asked = names.asked.total()
            eventually(lambda: names.asked.total() > asked + 4, "more look-ups")
            flowing(pair.a, 300)
        settled(payers, pair.a)


def test_services_bring_their_ports_and_follow_their_priorities(tmp_path: Path, names: NameServer, pair: Pair) -> None:
    service = "_pay._tcp.bank.test"
    names.a("a.bank.test", "127.0.0.2")
    names.a("b.bank.test", "127.0.0.3")
    names.srv(service, f"10 5 {pair.port} a.bank.test.", f"20 5 {pair.port} b.bank.test.")
    upstream = f"{{resolve: 200ms, discovery: {{srv: {service}, resolver: '{names.address}'}}}}"
    with Gateway(write(tmp_path, upstream)) as gateway:
        with Payers(gateway.port(), 4, "/x/pay") as payers:
            flowing(pair.a)
            assert not pair.b.ledger.executed
            names.srv(service, f"10 5 {pair.port} a.bank.test.", f"5 5 {pair.port} b.bank.test.")
            flowing(pair.b)
            eventually(lambda: pair.a.open == 0, "the end of the old priority's connections")
            names.failing = {service: "NXDOMAIN"}  # the services are not known any more, and stay
            names.a("b.bank.test", "127.0.0.2")  # the host moves all the same
            flowing(pair.a)
        settled(payers, pair.a, pair.b)
