"""Processes that race for places, probes, ejections and retries of one upstream, and are killed in the middle.

Strategy: limits are proved by what is done under them (a counter that only mutual exclusion keeps right, sums that must come out
exactly), not by watching. A killed process is buried as the supervisor does it.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import time

import pytest

from gateway._speedups.testing import contend
from gateway._speedups.upstream_table import UpstreamTable
from tests.unit.forked import fork, killed
from tests.unit.upstream_memory import (
    CONNECT,
    EJECT,
    EJECTED,
    MAY_PROBE,
    NONE,
    OK,
    PROBE,
    RETURNED,
    SECOND,
    START,
    USABLE,
    seen_by,
    send,
    table,
)


def test_a_limit_of_one_is_mutual_exclusion() -> None:
    """Each adds to a common number with no other protection, in a C loop: not one addition is lost."""
    shared, memory, rounds = table(), mmap.mmap(-1, 4096), 3_000_000
    number = memoryview(memory).cast("Q")

    def work(index: int) -> None:
        upstream, _ = seen_by(shared, index)
        contend(upstream, number, rounds)

    fork(3, work)
    assert number[0] == 3 * rounds
    upstream, _ = seen_by(shared, 3)
    assert upstream.in_flight() == 0


@pytest.mark.parametrize("kind", ["enter", "enqueue", "connect"])
def test_racing_processes_fill_a_limit_exactly(kind: str) -> None:
    shared, limit, results = table(), 500, mmap.mmap(-1, 4096)

    def work(index: int) -> None:
        upstream, _ = seen_by(shared, index)
        struct.pack_into("q", results, index * 8, sum(getattr(upstream, kind)(limit) for _ in range(3000)))

    fork(4, work)
    assert sum(struct.unpack_from("4q", results, 0)) == limit


def test_racing_processes_spend_the_budget_exactly() -> None:
    shared, results = table(), mmap.mmap(-1, 4096)

    def work(index: int) -> None:
        upstream, _ = seen_by(shared, index, budget=0.2, reserve=10)
        for _ in range(500):
            upstream.deposit(START)
        struct.pack_into("q", results, 64 + index * 8, 1)
        while sum(struct.unpack_from("4q", results, 64)) < 4:
            os.sched_yield()
        struct.pack_into("q", results, index * 8, sum(upstream.withdraw(START) for _ in range(2000)))

    fork(4, work)
    assert sum(struct.unpack_from("4q", results, 0)) == 4 * 500 // 5 + 100


def test_racing_processes_get_one_probe() -> None:
    shared, rounds, results = table(), 300, mmap.mmap(-1, 4096)
    upstream, (one, _) = seen_by(shared, 3, 2, base=0.001, maximum=0.001)
    for _ in range(7):
        send(upstream, one, CONNECT, START)
    step = mmap.mmap(-1, 4096)                      # each process's round

    def work(index: int) -> None:
        own, (state, _) = seen_by(shared, index, 2, base=0.001, maximum=0.001)
        for number in range(rounds):
            while min(struct.unpack_from("3q", step, 0)) < number:
                os.sched_yield()
            now = START + (number + 1) * SECOND
            ticket = state.admit(now, SECOND // 2)
            if ticket:
                wins = struct.unpack_from("q", results, index * 8)[0]
                struct.pack_into("q", results, index * 8, wins + 1)
            struct.pack_into("q", step, index * 8, number + 1)
        del own

    fork(3, work)
    assert sum(struct.unpack_from("3q", results, 0)) == rounds


def test_racing_ejections_never_pass_the_share() -> None:
    """Eight endpoints, half of which may be out; all fail everywhere, and come back after a millisecond of the real clock."""
    shared, seen, endless = table(endpoints=8), mmap.mmap(-1, 4096), 4_000_000

    def work(index: int) -> None:
        upstream, endpoints = seen_by(shared, index, 8, failures=1, base=0.001, maximum=0.001)
        dice, ejections = random.Random(index), 0
        for _ in range(endless):
            outcome = dice.choice([CONNECT, CONNECT, OK])
            ejections += send(upstream, dice.choice(endpoints), outcome, time.monotonic_ns() // 1000) == EJECT
            # Eight words read one after the other may show one that returned and its successor; what stays is over the share.
            if all(sum(e.ejected_until() > 0 for e in endpoints) > 4 for _ in range(50)):
                os._exit(3)
            struct.pack_into("q", seen, index * 8, ejections)
            if min(struct.unpack_from("3q", seen, 0)) >= 200:
                return

    fork(3, work)
    assert min(struct.unpack_from("3q", seen, 0)) >= 200, "all of them decided"
    _, endpoints = seen_by(shared, 3, 8)
    assert sum(endpoint.ejected_until() > 0 for endpoint in endpoints) <= 4


@pytest.mark.parametrize("kind,count", [("enter", "in_flight"), ("enqueue", "queued"), ("connect", "connections")])
def test_a_killed_process_leaves_no_place_taken(kind: str, count: str) -> None:
    shared = table()
    survivor, _ = seen_by(shared, 1)
    assert getattr(survivor, kind)(50)
    for _ in range(6):

        def work(tell) -> None:
            upstream, _ = seen_by(shared, 0)
            for _ in range(20):
                assert getattr(upstream, kind)(50)
            tell()
            while True:                             # at its limit or not, somewhere in between
                getattr(upstream, kind)(50)
                getattr(upstream, {"enter": "leave", "enqueue": "dequeue", "connect": "disconnect"}[kind])()

        killed(work)
        assert getattr(survivor, count)() >= 21
        shared.bury(0)
        assert getattr(survivor, count)() == 1, "its own place stays"
    assert sum(getattr(survivor, kind)(50) for _ in range(60)) == 49


def test_a_killed_process_leaves_no_endpoint_place_taken_and_its_counts_stay() -> None:
    shared = table()
    upstream, (one,) = seen_by(shared, 1)

    def work(tell) -> None:
        own, (state,) = seen_by(shared, 0)
        for _ in range(5):
            assert state.enter(10)
            own.deposit(START)
        assert all(own.withdraw(START) for _ in range(3))
        send(own, state, CONNECT, START)
        tell()
        signal.pause()

    killed(work)
    assert one.in_flight() == 5
    before = upstream.balance(START)
    figures = (shared.upstreams(START)[0]["counters"], shared.endpoints(START)[0]["counters"])
    shared.bury(0)
    assert one.in_flight() == 0
    assert (shared.upstreams(START)[0]["counters"], shared.endpoints(START)[0]["counters"]) == figures
    assert upstream.balance(START) == before, "what it spent of the budget is still spent"
    shared.bury(0)
    assert (shared.upstreams(START)[0]["counters"], shared.endpoints(START)[0]["counters"]) == figures


def test_processes_killed_while_they_eject_block_nothing() -> None:
    """Killed at random points of report() and admit(); afterwards another process can still eject, probe and bring back."""
    shared = table()
    for turn in range(10):
        now = START + turn * 100 * SECOND

        def work(tell, now: int = now) -> None:
            upstream, endpoints = seen_by(shared, 0, 4, failures=1, base=0.001, maximum=0.001, share=0.5)
            for number in range(10_000_000):
                if number == 100:
                    tell()
                now += 500
                send(upstream, endpoints[number % 4], CONNECT, now)

        killed(work)
        shared.bury(0)
    upstream, endpoints = seen_by(shared, 1, 4, failures=1, share=0.5)
    now = START + 2000 * SECOND * 10_000
    for endpoint in endpoints:                      # bring back whoever is out
        if endpoint.availability(now) == MAY_PROBE:
            assert send(upstream, endpoint, OK, now) == RETURNED
    assert [endpoint.availability(now) for endpoint in endpoints] == [USABLE] * 4
    assert [send(upstream, endpoint, CONNECT, now) for endpoint in endpoints] == [EJECT, EJECT, NONE, NONE]
    assert [endpoint.availability(now) for endpoint in endpoints] == [EJECTED, EJECTED, USABLE, USABLE]


def test_a_killed_prober_does_not_keep_the_endpoint_out_until_its_claim_expires() -> None:
    shared = table()
    upstream, (one, _) = seen_by(shared, 1, 2, failures=1)
    assert send(upstream, one, CONNECT, START) == EJECT
    now = one.ejected_until()

    def work(tell) -> None:
        _, (state, _) = seen_by(shared, 0, 2)
        assert state.admit(now, PROBE)
        tell()
        signal.pause()

    killed(work)
    shared.bury(2)
    assert one.availability(now) == EJECTED and one.admit(now, PROBE) == 0, "another process's end is no reason"
    shared.bury(0)
    assert one.availability(now) == MAY_PROBE and send(upstream, one, OK, now) == RETURNED
    assert send(upstream, one, CONNECT, now) == EJECT


def test_many_processes_open_the_same_endpoints_once() -> None:
    shared = table(workers=4, upstreams=8, endpoints=64)

    def work(index: int) -> None:
        kept = []
        for name in random.Random(index).sample(range(8), 8):
            kept.append(seen_by(shared, index, 8, name=f"upstream-{name}"))
        for upstream, endpoints in kept:
            upstream.deposit(START)
            for endpoint in endpoints:
                endpoint.count(9)

    fork(4, work)
    seats = [seen_by(shared, 0, 8, name=f"upstream-{name}") for name in range(8)]
    assert [row["counters"]["requests"] for row in shared.upstreams(START)] == [4] * 8
    assert [row["counters"]["ejections"] for row in shared.endpoints(START)] == [4] * 64
    assert shared.full_count == 0 and len(seats) == 8


def test_processes_killed_while_they_open_leave_the_table_whole() -> None:
    shared = table(workers=2, upstreams=2, endpoints=4)
    kept, (endpoint,) = seen_by(shared, 1, name="kept")
    assert kept.enter(5) and endpoint.enter(5)
    for turn in range(15):

        def work(tell, turn: int = turn) -> None:
            number = 0
            while True:                             # each takes the other's place over: the table is full all the time
                seen_by(shared, 0, 1 + number % 3, name=f"{turn}-{number}")
                number += 1
                if number == 20:
                    tell()

        killed(work)
        shared.bury(0)
        upstream, endpoints = seen_by(shared, 1, 3, name="after")
        assert upstream.shared and all(state.shared for state in endpoints)
        assert upstream.in_flight() == 0 and upstream.enter(1)
        upstream.leave()
        rows = shared.endpoints(START)
        assert sorted((row["upstream"], row["address"]) for row in rows if row["upstream"] == "after") == [
            ("after", f"10.0.0.{n}:80") for n in (1, 2, 3)
        ]
        del upstream, endpoints
    assert kept.in_flight() == endpoint.in_flight() == 1


def test_a_lock_that_is_not_given_back_costs_sharing_and_not_traffic() -> None:
    """A process stopped while it has the table: others count alone, after a moment, until it goes on or is reaped."""
    memory = mmap.mmap(-1, UpstreamTable.size_for(2, 2, 2))
    shared = UpstreamTable(memory, 0, 2, 2, 2)
    struct.pack_into("Q", memory, 4 * 8, 2 + 0)     # the lock word, as worker 0 leaves it
    upstream, (one,) = seen_by(shared, 1)
    assert not upstream.shared and not one.shared and shared.full_count == 2
    assert upstream.enter(1) and not upstream.enter(1)
    shared.bury(0)
    assert seen_by(shared, 1)[0].shared
