"""The fault relay does what its faults say, or the tests that stand on it would prove nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.faults import Cut, ScriptedOrigin, Stream, connect, get, ok, post
from tests.integration.ledger import Book, Counting, Customers, Line, Told, check
from tests.integration.processes import eventually
from tests.integration.relay import Fault, Relay


@pytest.fixture
def echo() -> Iterator[ScriptedOrigin]:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        while True:
            request = stream.request()
            stream.send(ok(request.body or b"x" * 1000))

    origin = ScriptedOrigin(script)
    yield origin
    origin.close()


def test_without_a_fault_bytes_pass_both_ways(echo: ScriptedOrigin) -> None:
    with Relay(echo.port) as relay, connect(relay.port) as client:
        body = bytes(range(256)) * 4_000
        assert client.ask(post("/", body)).body == body
        assert client.ask(get()).body == b"x" * 1000
    assert relay.ended == 0 and relay.accepted == 1


@pytest.mark.parametrize("ending", ["reset", "close", "half"])
def test_an_answer_is_cut_after_so_many_bytes(echo: ScriptedOrigin, ending: str) -> None:
    with Relay(echo.port, lambda number: Fault(cut_answer=500, ending=ending)) as relay, connect(relay.port) as client:  # type: ignore[arg-type]
        client.send(get())
        received, clean = client.rest()
        assert len(received) <= 500 and clean == (ending != "reset")
        eventually(lambda: relay.ended == 1, "the cut")


def test_a_request_is_cut_after_so_many_bytes(tmp_path: Path) -> None:
    book = Book(tmp_path / "book")
    origin = ScriptedOrigin(Counting(book, "a").serve)
    with Relay(origin.port, lambda number: Fault(cut_request=300)) as relay, connect(relay.port) as client, pytest.raises(Cut):
        client.ask(post("/", b"x" * 1000, "x-request-id: 1"))
    eventually(lambda: book.lines("arrived"), "the head at the origin")
    eventually(lambda: origin.open == 0, "the end of what was cut")
    assert len(book.lines("arrived")) == 1 and book.lines("executed") == []
    origin.close()


def test_a_drip_gives_everything_piece_by_piece(echo: ScriptedOrigin) -> None:
    with Relay(echo.port, lambda number: Fault(drip=(100, 0.002))) as relay, connect(relay.port) as client:
        began = time.monotonic()
        assert client.ask(get()).body == b"x" * 1000
        assert time.monotonic() - began >= 0.02


def test_a_hole_takes_connections_and_says_nothing(echo: ScriptedOrigin) -> None:
    with Relay(echo.port, lambda number: Fault(hole=True)) as relay, connect(relay.port) as client:
        client.sock.settimeout(0.2)
        client.send(get())
        with pytest.raises(TimeoutError):
            client.answer()
        assert echo.accepted == 0


def test_a_partition_holds_everything_back_until_it_heals(echo: ScriptedOrigin) -> None:
    with Relay(echo.port) as relay, connect(relay.port) as client:
        assert client.ask(get()).status == 200
        relay.partition()
        client.send(get())
        client.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.answer()
        relay.heal()
        client.sock.settimeout(10)
        assert client.answer().status == 200


def test_idle_connections_are_closed_and_busy_ones_are_not(echo: ScriptedOrigin) -> None:
    with Relay(echo.port, lambda number: Fault(idle=(0.05, 0.1), ending="close")) as relay, connect(relay.port) as client:
        for _ in range(5):
            assert client.ask(get()).status == 200
        assert client.closed()
        assert relay.ended == 1


# -- the check itself: it must find what it is there to find

ID = "2b1f0a5e-5d0c-4f6a-9d5e-1f2a3b4c5d6e"


def customers(told: Told) -> Customers:
    made = Customers(1, 1)
    made.records[ID] = told
    return made


def book_of(path: Path, *events: str, digest: str = "d") -> Book:
    book = Book(path / "book")
    for event in events:
        book.write(Line(event, ID, digest, "a", "a/1"))
    return book


@pytest.mark.parametrize(
    ("told", "events", "digest", "law"),
    [
        (Told("POST", "d", 200, True, True), (), "d", "L1"),
        (Told("POST", "d", 200, True, True), ("executed", "executed"), "d", "L2"),
        (Told("POST", "d", 200, True, False), ("executed",), "d", "L3"),
        (Told("POST", "d", 0, True), ("executed",), "d", "L3"),
        (Told("POST", "d", 200, True, True), ("executed",), "e", "L4"),
        (Told("POST", "d", 500, True), ("executed",), "d", "L5"),
        (Told("POST", "d", 503, True, problem="upstream-unreachable", detail="it was not sent"), (), "d", "L5"),
        (Told("POST", "d", 502, True, problem="upstream-closed", detail="it was not sent"), ("executed",), "d", "L5"),
        (Told("POST", "d", 503, True, False, {"retry-after": "1"}, "queue", "no room"), ("executed",), "d", "L5"),
    ],
)
def test_a_broken_invariant_is_found(tmp_path: Path, told: Told, events: tuple[str, ...], digest: str, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check([customers(told)], book_of(tmp_path, *events, digest=digest))


@pytest.mark.parametrize(
    ("told", "events"),
    [
        (Told("POST", "d", 200, True, True), ("arrived", "executed", "completed")),
        (Told("GET", "d", 200, True, True), ("arrived", "executed", "executed")),
        (Told("POST", "d", 502, True, problem="upstream-closed", detail="it may have been executed"), ("executed",)),
        (Told("POST", "d", 503, True, False, {"retry-after": "1"}, "upstream-unreachable", "it was not sent"), ()),
    ],
)
def test_what_is_in_order_is_let_pass(tmp_path: Path, told: Told, events: tuple[str, ...]) -> None:
    verdict = check([customers(told)], book_of(tmp_path, *events))
    assert verdict.requests == 1 and verdict.answered == (told.status == 200)
    assert verdict.amplification == events.count("arrived")


def test_a_second_answer_is_found(tmp_path: Path) -> None:
    made = customers(Told("POST", "d", 200, True, True))
    made.unasked.append(b"HTTP/1.1 200 OK")
    with pytest.raises(AssertionError, match="more than one answer"):
        check([made], book_of(tmp_path, "executed"))


@pytest.mark.parametrize("records", [0, 2])
def test_a_missing_and_a_second_audit_record_are_found(tmp_path: Path, records: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.integration.processes.PATIENCE", 0.1)
    audit = tmp_path / "audit.jsonl"
    audit.write_text(f'{{"id": "{ID}"}}\n' * records)
    with pytest.raises(AssertionError, match="L7"):
        check([customers(Told("POST", "d", 200, True, True))], book_of(tmp_path, "executed"), audit=audit)
