"""Connections that break: within an answer, while idle, in the middle of a request, or by silence; and the ledger after each.

Strategy: a relay with a fault stands before a counting origin; the customers of the ledger pay through the gateway meanwhile.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.faults import ScriptedOrigin
from tests.integration.ledger import Book, Counting
from tests.integration.processes import PATIENCE, Gateway, Origin, eventually, write_config
from tests.integration.relay import Ending, Fault, Relay, untouched
from tests.integration.resilience import Payments, payments

RETRIES = "retries: {attempts: 2, on: [connect-failure, reset, timeout], backoff: {base: 5ms, max: 50ms}}"
PATIENT = "health: {eject: {failures: 0}}"  # the endpoint is the only one; what is to be seen is its connections
LARGE = 50_000  # bytes of an answer


@contextlib.contextmanager
def relayed(
    folder: Path, plan: Callable[[int], Fault] = untouched, *, size: int = 0, retries: str = RETRIES
) -> Iterator[tuple[Payments, Relay]]:
    book = Book(folder / "origin-book")
    origin = ScriptedOrigin(Counting(book, "a", size=size).serve)
    try:
        with Relay(origin.port, plan) as relay, payments(folder, [relay.port], retries, PATIENT) as bank:
            bank.book = book
            yield bank, relay
    finally:
        origin.close()
        book.close()


@pytest.mark.parametrize("ending", ["reset", "close", "half"])
def test_answers_cut_in_the_middle_are_never_whole_ones(tmp_path: Path, ending: Ending) -> None:
    """Every connection dies within one of its answers, at a random byte of it; a cut within a head is a 502, one later a cut."""

    def plan(number: int) -> Fault:
        return Fault(cut_answer=random.Random(number).randrange(LARGE, 6 * LARGE), ending=ending)

    with relayed(tmp_path, plan, size=LARGE) as (bank, relay):
        with bank.trade(6) as customers:
            customers.paid(300)
            eventually(lambda: customers.count(0) >= 20, "twenty cut answers")
        verdict = bank.verdict(cuts=True)
    assert relay.ended > 20
    # Each connection costs one request at most.
    assert verdict.requests - verdict.answered <= relay.accepted
    assert set(verdict.statuses) <= {0, 502}


def test_requests_cut_in_the_middle_are_not_executed(tmp_path: Path) -> None:
    def plan(number: int) -> Fault:
        return Fault(cut_request=random.Random(number).randrange(2_000, 60_000))

    with relayed(tmp_path, plan) as (bank, relay):
        with bank.trade(6) as customers:
            customers.paid(300)
        verdict = bank.verdict()
    assert relay.ended > 10
    assert set(verdict.statuses) <= {502}
    assert verdict.requests - verdict.answered <= relay.accepted


@pytest.mark.parametrize("ending", ["close", "reset"])
def test_the_keep_alive_race_with_a_stream_of_payments(tmp_path: Path, ending: Ending) -> None:
    """The upstream closes idle connections just as payments arrive on them: 0 to 3 ms after each answer."""

    def plan(number: int) -> Fault:
        return Fault(idle=(0.0, 0.003), ending=ending)

    with relayed(tmp_path, plan) as (bank, relay):
        with bank.trade(8, reads=0.2) as customers:
            customers.paid(1_500)
            eventually(lambda: relay.ended >= 200, "two hundred closed connections")
        verdict = bank.verdict()
        reads = [record for record in customers.records.values() if record.method == "GET"]
    assert set(verdict.statuses) <= {502}
    # What was written to a connection that was closed at that moment was not read by anybody.
    executed = {line.payment for line in bank.book.lines("executed")}
    assert not executed & {payment for payment, record in customers.records.items() if record.status == 502}
    assert verdict.requests - verdict.answered <= relay.ended / 2
    assert sum(record.status != 200 for record in reads) <= len(reads) / 50  # asked again on a fresh connection


def test_a_partition_heals_and_nothing_is_sent_again(tmp_path: Path) -> None:
    with relayed(tmp_path) as (bank, relay):
        with bank.trade(8, reads=0.0) as customers:
            customers.paid(100)
            relay.partition()
            eventually(lambda: sum(map(customers.count, (502, 503, 504))) >= 8, "an answer to everybody who waits")
            relay.heal()
            customers.paid(200)
        verdict = bank.verdict()
    assert set(verdict.statuses) <= {502, 503, 504} and 504 in verdict.statuses
    told = {payment for payment, record in customers.records.items() if record.status != 200}
    arrived = [line.payment for line in bank.book.lines("arrived")]
    assert all(arrived.count(payment) <= 1 for payment in told)


def test_a_black_hole_takes_connections_and_answers_nobody(tmp_path: Path) -> None:
    with relayed(tmp_path, lambda number: Fault(hole=True)) as (bank, _):
        with bank.trade(8) as customers:
            eventually(lambda: customers.count(504) >= 16, "sixteen timeouts")
        verdict = bank.verdict()
    assert verdict.answered == 0 and set(verdict.statuses) <= {503, 504}
    assert not verdict.arrivals


def test_slow_and_dripping_answers_arrive_whole(tmp_path: Path) -> None:
    def plan(number: int) -> Fault:
        return Fault(drip=(1_500, 0.0005)) if number % 2 else Fault(delay=0.02)

    with relayed(tmp_path, plan, size=4_000) as (bank, _):
        with bank.trade(6) as customers:
            customers.paid(120)
        verdict = bank.verdict()
    assert verdict.answered == verdict.requests


def test_a_burst_that_comes_again_finds_its_connections_open(tmp_path: Path, origin: Origin) -> None:
    """More requests at once than any small pool would keep; the second burst connects to nobody."""
    burst = 150

    def connects(gateway: Gateway) -> int:
        found = re.search(r"^crossway_upstream_connects_total (\S+)$", str(gateway.admin("/metrics")[1]), re.MULTILINE)
        assert found is not None
        return int(float(found[1]))

    with Gateway(write_config(tmp_path / "edge.yaml", origin.port, workers=1)) as gateway:
        clients = [gateway.connect() for _ in range(burst)]
        for number in range(2):
            origin.release.clear()
            for client in clients:
                client.request("GET", "/held")
            for _ in clients:
                assert origin.held.acquire(timeout=PATIENCE), number
            origin.release.set()
            for client in clients:
                answer = client.getresponse()
                assert (answer.status, answer.read()) == (200, b'{"from": "origin"}')
            eventually(lambda: connects(gateway) == burst, "one connection for each request")
