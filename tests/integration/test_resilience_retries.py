"""Retries in a storm: an upstream that refuses everything is asked at most a fifth more often, and payments never again.

Strategy: scripted counting origins that refuse before they execute; what they saw is divided by what the clients asked. The
reserve of further attempts per second is switched off where the figure is to be exact.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.integration.bank import WatchedGateway
from tests.integration.faults import Script, ScriptedOrigin, Stream, connect, get
from tests.integration.ledger import Book, Counting
from tests.integration.resilience import Payments, payments

BUSY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 0\r\ncontent-length: 4\r\n\r\nbusy"
STORM = "retries: {attempts: 3, on: [connect-failure, reset, 503], backoff: {base: 1ms, max: 5ms}, budget: 20%, reserve: 0}"
KEPT = "health: {eject: {failures: 0}}"


def refusing(counting: Counting, refuses: Callable[[int], bool]) -> Script:
    """An origin that answers 503 to the nth request when `refuses(n)`, and executes the others."""
    numbers = itertools.count(1)

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        connection = counting.connection()
        while True:
            order = counting.receive(stream, connection)
            if refuses(next(numbers)):
                stream.send(BUSY)
                continue
            stream.send(counting.execute(order))
            counting.complete(order)

    return script


@contextlib.contextmanager
def refused(folder: Path, refuses: Callable[[int], bool], *more: str) -> Iterator[Payments]:
    """Two origins of this kind."""
    book = Book(folder / "origin-book")
    origins = [ScriptedOrigin(refusing(Counting(book, name), refuses)) for name in ("a", "b")]
    try:
        with payments(folder, [origin.port for origin in origins], *more) as bank:
            bank.book = book
            yield bank
    finally:
        for origin in origins:
            origin.close()
        book.close()


def test_a_storm_of_refusals_is_amplified_by_a_fifth_at_most(tmp_path: Path) -> None:
    with refused(tmp_path, lambda number: True, STORM, KEPT) as bank:
        with bank.trade(8, reads=1.0, pause=0.0) as customers:
            customers.told_so(503, 1_500)
        verdict = bank.verdict()
    assert verdict.answered == 0
    assert 1.1 < verdict.amplification <= 1.2  # it does try, and it stops


def test_payments_that_were_refused_are_the_clients_to_send_again(tmp_path: Path) -> None:
    with refused(tmp_path, lambda number: True, STORM, KEPT) as bank:
        with bank.trade(8, reads=0.0, pause=0.0) as customers:
            customers.told_so(503, 500)
        verdict = bank.verdict()
    assert verdict.amplification == 1.0
    assert not bank.book.lines("executed")


def test_few_refusals_are_made_good(tmp_path: Path) -> None:
    """Every tenth request is refused: the budget suffices for the reads, and payments are told."""
    with refused(tmp_path, lambda number: number % 10 == 0, STORM, KEPT) as bank:
        with bank.trade(8, reads=0.7) as customers:
            customers.paid(1_000)
        verdict = bank.verdict()
        told = Counter((record.method, record.status) for record in customers.records.values())
    assert told["GET", 503] <= told["GET", 200] / 50
    assert told["POST", 503] > 0
    assert 1.0 < verdict.amplification <= 1.2


def test_an_endpoint_that_refuses_everything_is_passed_by(tmp_path: Path) -> None:
    """One origin of two answers 503 at once, which is quick: the requests go where they are executed."""
    book = Book(tmp_path / "origin-book")
    bad = ScriptedOrigin(refusing(Counting(book, "bad"), lambda number: True))
    good = ScriptedOrigin(Counting(book, "good").serve)
    try:
        with payments(tmp_path, [bad.port, good.port], "health: {eject: {failures: 5, base: 1s}}") as bank:
            bank.book = book
            with bank.trade(8) as customers:
                customers.paid(1_000)
            verdict = bank.verdict()
    finally:
        bad.close()
        good.close()
        book.close()
    assert verdict.arrivals["bad"] < verdict.arrivals["good"] / 10, verdict.arrivals


def test_an_attempt_that_may_have_been_executed_is_not_called_unsent(tmp_path: Path) -> None:
    """The origin executes, breaks the connection and is gone before the next attempt."""
    book = Book(tmp_path / "origin-book")
    counting = Counting(book, "a")

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        order = counting.receive(stream, counting.connection())
        counting.execute(order)
        origin.refuse()
        stream.reset()

    origin = ScriptedOrigin(script)
    try:
        with payments(tmp_path, [origin.port], STORM.replace("reserve: 0", "reserve: 10"), KEPT) as bank:
            bank.book = book
            with bank.trade(1, reads=1.0) as customers:
                customers.told_so(502, 1)
            bank.verdict()
        (executed,) = book.lines("executed")
        record = customers.records[executed.payment]
        assert (record.status, record.problem) == (502, "upstream-unreachable")
        assert "may have been executed" in record.detail and "retry-after" not in record.fields
    finally:
        origin.close()
        book.close()


def test_payments_are_repeated_where_the_service_executes_a_key_once(tmp_path: Path) -> None:
    """It breaks a tenth of its connections right after it has executed: asked again, it gives the receipt that it kept."""
    book = Book(tmp_path / "origin-book")
    counting = Counting(book, "a")
    receipts: dict[str, bytes] = {}
    numbers = itertools.count(1)

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        connection = counting.connection()
        while True:
            order = counting.receive(stream, connection)
            first = order.payment not in receipts
            if first:
                receipts[order.payment] = counting.execute(order)
            if first and next(numbers) % 10 == 0:
                stream.reset()
                return
            stream.send(receipts[order.payment])
            counting.complete(order)

    retries = "retries: {attempts: 2, on: [connect-failure, reset], idempotency_key: true, backoff: {base: 1ms, max: 5ms}}"
    origin = ScriptedOrigin(script)
    try:
        with payments(tmp_path, [origin.port], retries, KEPT) as bank:
            bank.book = book
            with bank.trade(6, reads=0.0) as customers:
                customers.paid(600)
            verdict = bank.verdict()
    finally:
        origin.close()
        book.close()
    assert verdict.answered == verdict.requests
    assert verdict.amplification > 1.05  # it was needed
    assert len({line.payment for line in book.lines("executed")}) == verdict.requests


def test_an_attempt_after_a_pause_that_finds_no_endpoint_is_an_answer(tmp_path: Path) -> None:
    """The pause ends, and the only endpoint is out by then: 502, and the worker lives."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()

    origin = ScriptedOrigin(script)
    path = tmp_path / "edge.yaml"
    path.write_text(
        "version: 1\nworkers: 1\nadmin: {bind: 127.0.0.1:0}\nlisteners: {public: {bind: 127.0.0.1:0}}\n"
        f"upstreams: {{bank: {{targets: [127.0.0.1:{origin.port}], retries: {{attempts: 1, on: [reset]}}, "
        "health: {eject: {failures: 1, share: 100%}}}}\nroutes: [{name: all, match: {prefix: /}, upstream: bank}]\n"
    )
    try:
        with WatchedGateway(path) as gateway:
            with connect(gateway.port()) as stream:
                assert stream.ask(get()).status == 502
            gateway.calm()
    finally:
        origin.close()
