"""Endpoints that die, hang, limp, flap and are all gone: every client gets one answer that is its own, no payment runs twice.

Strategy: counting origins as processes, so that they can be killed and stopped; eight customers pay and ask all the time, and after
each fault the ledger is checked against the clients, the gateway and its audit file.
"""

from __future__ import annotations

import signal
from pathlib import Path

from tests.integration.processes import eventually
from tests.integration.resilience import Estate, estate

CUSTOMERS = 8
RETRIES = "retries: {attempts: 2, on: [connect-failure, reset, timeout], backoff: {base: 5ms, max: 50ms}}"
QUICK = "health: {eject: {failures: 3, base: 300ms, max: 1s}}"
THREE = (0.001, 0.001, 0.001)


def test_an_endpoint_is_killed_and_comes_back(tmp_path: Path) -> None:
    with estate(tmp_path, THREE, RETRIES, QUICK) as bank:
        with bank.trade(CUSTOMERS) as customers:
            for site in range(3):
                bank.served_by(site)
            bank.sites[1].stop()
            customers.paid(300)
            bank.sites[1].start()
            bank.served_by(1)
        verdict = bank.verdict()
    # What it was at when it died, at most one request of each customer, and only what may not be repeated.
    assert verdict.requests - verdict.answered <= CUSTOMERS
    assert set(verdict.statuses) <= {502}
    assert verdict.amplification <= 1.2


def test_payments_in_progress_at_an_endpoint_that_is_killed_are_not_tried_elsewhere(tmp_path: Path) -> None:
    with estate(tmp_path, (0.3, 0.3), RETRIES, QUICK) as bank:
        with bank.trade(CUSTOMERS, reads=0.0) as customers:
            bank.served_by(0, CUSTOMERS)
            eventually(lambda: len(bank.book.lines("executed")) > len(bank.book.lines("completed")), "a payment in progress")
            bank.sites[0].stop()
            bank.served_by(1)
        verdict = bank.verdict()
    assert customers.count(502) >= 1 and verdict.problems.keys() == {"upstream-closed"}
    executed = {line.payment for line in bank.book.lines("executed")}
    told = {payment: record for payment, record in customers.records.items() if record.status == 502}
    assert executed & told.keys()  # the very case in which another attempt would have paid twice
    assert all("may have been executed" in record.detail for record in told.values())


def test_an_endpoint_hangs_and_wakes(tmp_path: Path) -> None:
    with estate(tmp_path, THREE, RETRIES, QUICK) as bank:
        with bank.trade(CUSTOMERS) as customers:
            for site in range(3):
                bank.served_by(site)
            hung = bank.sites[2].process
            assert hung is not None
            hung.signal(signal.SIGSTOP)
            customers.paid(600)
            hung.signal(signal.SIGCONT)
            # It does now what it was given and what nobody waits for any more, then what is new.
            bank.served_by(2, 30)
        verdict = bank.verdict()
    assert set(verdict.statuses) <= {504}
    # Those that met it while it hung: not a third of all, which is what it would get if nobody noticed.
    assert verdict.requests - verdict.answered < verdict.requests / 10


def test_a_slow_endpoint_among_fast_ones_gets_little(tmp_path: Path) -> None:
    with estate(tmp_path, (0.001, 0.001, 0.15)) as bank:
        with bank.trade(CUSTOMERS) as customers:
            customers.paid(800)
        verdict = bank.verdict()
    assert verdict.answered == verdict.requests == sum(verdict.arrivals.values())
    assert verdict.arrivals["site-2"] < verdict.requests / 6, verdict.arrivals  # in turn it would be a third


def test_all_endpoints_are_down_and_come_back(tmp_path: Path) -> None:
    with estate(tmp_path, THREE, RETRIES, QUICK) as bank:
        with bank.trade(CUSTOMERS) as customers:
            customers.paid(100)
            for site in bank.sites:
                site.stop()
            refused = customers.count(503)
            eventually(lambda: customers.count(503) >= refused + 50, "fifty refusals")
            for site in bank.sites:
                site.start()
            customers.paid(100)
            for number in range(3):
                bank.served_by(number)
        verdict = bank.verdict()
    # The check has seen that each of them says when to come back and that nothing was sent.
    assert set(verdict.statuses) <= {502, 503} and verdict.statuses[503] >= 50
    assert verdict.statuses.get(502, 0) <= 3 * CUSTOMERS
    assert verdict.amplification <= 1.2


def flap(bank: Estate, site: int, times: int, more: int) -> None:
    for _ in range(times):
        bank.sites[site].stop()
        bank.customers[-1].paid(more)
        bank.sites[site].start()
        bank.customers[-1].paid(more)


def test_a_flapping_endpoint_costs_what_it_was_at_and_no_storm(tmp_path: Path) -> None:
    with estate(tmp_path, THREE, RETRIES, QUICK) as bank:
        with bank.trade(CUSTOMERS) as customers:
            customers.paid(100)
            flap(bank, 1, 5, 80)
        verdict = bank.verdict()
    assert set(verdict.statuses) <= {502}
    assert verdict.requests - verdict.answered <= 5 * CUSTOMERS
    assert verdict.amplification <= 1.2
