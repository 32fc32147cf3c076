"""Places and the retry budget of an upstream over all workers, on a virtual clock, against models.

Strategy: several workers are several states over one table; races and deaths are in test_upstream_processes.py.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.upstream_memory import OK, SECOND, START, STATUS, seen_by, send, table

PLACES = [("enter", "leave", "in_flight"), ("enqueue", "dequeue", "queued"), ("connect", "disconnect", "connections")]


@pytest.mark.parametrize("take,give,count", PLACES)
def test_a_limit_holds_over_all_workers(take: str, give: str, count: str) -> None:
    shared = table()
    seats = [seen_by(shared, worker)[0] for worker in range(4)]
    assert [getattr(seats[n % 4], take)(10) for n in range(14)] == [True] * 10 + [False] * 4
    assert {getattr(seat, count)() for seat in seats} == {10}
    getattr(seats[1], give)()
    assert getattr(seats[3], take)(10) and not getattr(seats[0], take)(10)


def test_the_kinds_of_places_are_apart() -> None:
    upstream, (one,) = seen_by(table(), 0)
    assert upstream.enter(1) and upstream.enqueue(1) and upstream.connect(1) and one.enter(1)
    assert not (upstream.enter(1) or upstream.enqueue(1) or upstream.connect(1) or one.enter(1))
    assert (upstream.in_flight(), upstream.queued(), upstream.connections(), one.in_flight()) == (1, 1, 1, 1)


def test_no_limit_still_counts() -> None:
    upstream, (one,) = seen_by(table(), 0)
    assert all(upstream.enter(0) and one.enter(0) for _ in range(3000))
    assert upstream.in_flight() == one.in_flight() == one.own_in_flight() == 3000


def test_a_limit_that_was_lowered_admits_again_when_enough_have_left() -> None:
    upstream, _ = seen_by(table(), 0)
    assert all(upstream.enter(10) for _ in range(10))
    for _ in range(8):
        assert not upstream.enter(3)
        upstream.leave()
    assert upstream.enter(3) and not upstream.enter(3)


def test_two_snapshots_of_one_worker_share_its_places() -> None:
    shared = table()
    before, _ = seen_by(shared, 0)
    assert before.enter(2) and before.enter(2)
    after, _ = seen_by(shared, 0)
    assert not after.enter(2)
    before.leave()
    assert after.enter(2)
    del before
    assert after.in_flight() == 2


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=100))
def test_entering_and_leaving_equals_a_counter(limit: int, steps) -> None:
    shared = table()
    seats = [seen_by(shared, worker)[0] for worker in range(4)]
    held = [0] * 4
    for worker, entering in steps:
        if entering:
            assert seats[worker].enter(limit) == (sum(held) < limit)
            held[worker] += sum(held) < limit
        elif held[worker]:
            seats[worker].leave()
            held[worker] -= 1
        assert seats[worker].in_flight() == sum(held)


def test_leaving_more_often_than_entering_does_not_make_room() -> None:
    upstream, _ = seen_by(table(), 0)
    upstream.leave()
    assert upstream.in_flight() == 0 and upstream.enter(1) and not upstream.enter(1)


class BudgetModel:
    """Finagle's arithmetic with deposits and withdrawals of the current second and the nine before it."""

    def __init__(self, ratio: int, reserve: int) -> None:
        self.ratio, self.reserve = ratio, reserve
        self.requests: list[int] = []
        self.retries: list[int] = []

    def left(self, now: int) -> int:
        def count(seconds: list[int]) -> int:
            return sum(second > now // SECOND - 10 for second in seconds)

        return count(self.requests) * self.ratio + self.reserve * 10_000 - count(self.retries) * 1000

    def withdraw(self, now: int) -> bool:
        granted = self.left(now) >= 1000
        if granted:
            self.retries.append(now // SECOND)
        return granted


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([0, 1, 200, 300, 333, 700, 1000, 2500]),
    st.sampled_from([0, 0, 1, 10]),
    st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 1_500_000)), max_size=150),
)
def test_the_budget_equals_the_model(ratio: int, reserve: int, steps) -> None:
    shared = table()
    seats = [seen_by(shared, worker, budget=ratio / 1000, reserve=reserve)[0] for worker in range(3)]
    model, now = BudgetModel(ratio, reserve), START
    for worker, retrying, jump in steps:
        now += jump
        if retrying:
            assert seats[worker].withdraw(now) == model.withdraw(now)
        else:
            seats[worker].deposit(now)
            model.requests.append(now // SECOND)
        assert seats[(worker + 1) % 3].balance(now) == max(model.left(now), 0)


@pytest.mark.parametrize("permille", [100, 200, 300, 333, 700, 1000])
def test_no_ratio_is_rounded(permille: int) -> None:
    """1000 requests in a second, each of which is retried as often as the budget allows, and no reserve."""
    upstream, _ = seen_by(table(), 0, budget=permille / 1000, reserve=0)
    retries = 0
    for _ in range(1000):
        upstream.deposit(START)
        while upstream.withdraw(START):
            retries += 1
    assert retries == permille


def test_the_reserve_is_there_without_any_request_and_comes_back() -> None:
    upstream, _ = seen_by(table(), 0, budget=0.2, reserve=10)
    assert upstream.balance(START) == 100_000
    assert [upstream.withdraw(START) for _ in range(101)] == [True] * 100 + [False]
    assert not upstream.withdraw(START + 9 * SECOND) and upstream.balance(START + 9 * SECOND) == 0
    assert upstream.withdraw(START + 10 * SECOND) and upstream.balance(START + 10 * SECOND) == 99_000


def test_a_worker_whose_clock_is_behind_sees_what_others_spent() -> None:
    shared = table()
    ahead, behind = (seen_by(shared, worker, budget=0, reserve=1)[0] for worker in range(2))
    assert all(ahead.withdraw(START) for _ in range(10))
    assert not behind.withdraw(START - 50_000)


def test_an_outage_of_everything_costs_the_budget_and_not_more() -> None:
    """100 requests a second for a minute, all fail, each would be retried twice: 20 % and the reserve."""
    upstream, _ = seen_by(table(), 0, budget=0.2, reserve=10)
    attempts = 0
    for request in range(6000):
        now = START + request * SECOND // 100
        upstream.deposit(now)
        attempts += 1 + sum(upstream.withdraw(now) for _ in range(2))
    assert 6000 * 1.2 <= attempts <= 6000 * 1.2 + 7 * 100


def test_what_happened_is_counted_for_all_workers() -> None:
    shared = table()
    for worker in range(2):
        upstream, (one,) = seen_by(shared, worker, budget=0, reserve=0)
        upstream.deposit(START)
        assert not upstream.withdraw(START)
        send(upstream, one, OK, START)
        send(upstream, one, STATUS, START)
        assert upstream.enter(1 + worker) and not upstream.enter(1)
        one.set_ewma(2000 * (worker + 1))
        upstream.count(1)
        upstream.count(-1)
        upstream.count(16)
        one.count(8)
    (row,), (endpoint,) = shared.upstreams(START), shared.endpoints(START)
    counters = row["counters"]
    assert (counters["requests"], counters["successes"], counters["attempts"], counters["attempt_successes"]) == (2, 2, 4, 2)
    assert (counters["budget_empty"], counters["requests_full"], counters["retries"]) == (2, 2, 0)
    assert row["in_flight"] == 2 and row["budget_left"] == 0
    assert endpoint["counters"]["ok"] == 2 and endpoint["counters"]["status"] == 2 and endpoint["counters"]["retries"] == 2
    assert endpoint["ewma_us"] == 3000, "the mean of those who know one"
