"""Adaptive concurrency on a virtual clock: a simulated upstream whose answers take longer the more there are at once."""

from __future__ import annotations

import itertools

import pytest

from gateway._speedups.upstream_state import UpstreamState
from tests.unit.upstream_memory import SECOND, START, seen_by, table

FIXED = {"update": 0.1, "measure": 60.0, "jitter": 0.15}


def drive(seats: list[UpstreamState], start: int, seconds: float, capacity: int, base_us: int = 10_000) -> tuple[int, list[int]]:
    """Always as many in flight as allowed, up to 500; an upstream with `capacity` servers. The limits seen, every 50 ms."""
    now, limits, turn = start, [], 0
    while now < start + seconds * SECOND:
        allowed = min(seats[0].allowed(0) or 500, 500)
        rtt = base_us * max(allowed, capacity) // capacity
        for _ in range(min(allowed, 40)):
            turn += 1
            seats[turn % len(seats)].sampled(now - rtt, now)
        now += 50_000
        limits.append(allowed)
    return now, limits


def test_it_is_off_unless_configured() -> None:
    upstream, _ = seen_by(table(), 0)
    upstream.sampled(START - 1000, START)
    assert upstream.allowed(0) == 0 and upstream.allowed(77) == 77


def test_the_limit_settles_near_what_the_upstream_can_do() -> None:
    shared = table()
    seats = [seen_by(shared, worker)[0] for worker in range(2)]
    for seat in seats:
        seat.adapt(highest=400, **FIXED)
    _, limits = drive(seats, START, 50, capacity=50)
    settled = limits[len(limits) // 2 :]
    # It keeps a queue of the buffer (25 %) and the headroom (a square root): not more than half as much again.
    assert all(45 <= limit <= 90 for limit in settled), (min(settled), max(settled))


def test_it_follows_an_upstream_that_becomes_weaker_and_recovers() -> None:
    upstream, _ = seen_by(table(), 0)
    upstream.adapt(highest=400, **FIXED)
    now, _ = drive([upstream], START, 20, capacity=100)
    now, weak = drive([upstream], now, 20, capacity=20)
    assert weak[-1] < 45
    now, strong = drive([upstream], now, 20, capacity=100)
    assert strong[-1] > 80


def test_the_limit_stays_within_its_bounds_and_under_the_configured_one() -> None:
    upstream, _ = seen_by(table(), 0)
    upstream.adapt(lowest=5, highest=30, **FIXED)
    now, limits = drive([upstream], START, 20, capacity=500)
    assert max(limits[10:]) == 30 and min(limits) >= 5
    assert upstream.allowed(10) == 10 and upstream.allowed(100) == 30
    _, limits = drive([upstream], now, 20, capacity=1)
    assert min(limits) >= 5 and limits[-1] < 15


def test_min_rtt_is_measured_again_later_than_the_interval_by_up_to_the_jitter() -> None:
    seen = set()
    for seed in range(6):
        upstream, _ = seen_by(table(), 0)
        upstream.adapt(lowest=3, highest=100, update=0.1, measure=10, jitter=0.5)
        upstream.seed(seed)
        _, limits = drive([upstream], START, 40, capacity=100)
        begins = [n for n in range(1, len(limits)) if limits[n] == 3 and limits[n - 1] != 3]
        gaps = [(b - a) / 20 for a, b in itertools.pairwise(begins)]
        assert gaps and all(10 <= gap <= 17 for gap in gaps)
        seen.add(tuple(gaps))
    assert len(seen) > 3, "the seed decides"


def test_the_same_seed_gives_the_same_course() -> None:
    def course() -> list[int]:
        upstream, _ = seen_by(table(), 0)
        upstream.adapt(highest=200, update=0.1, measure=5)
        upstream.seed(3)
        return drive([upstream], START, 20, capacity=40)[1]

    assert course() == course()


def test_a_measurement_without_enough_requests_ends() -> None:
    upstream, _ = seen_by(table(), 0)
    upstream.adapt(highest=100, samples=50, **FIXED)
    for second in range(10):
        now = START + second * SECOND
        upstream.sampled(now - 5000, now)
    assert upstream.allowed(0) == 100


def test_requests_from_before_a_measurement_are_not_measured() -> None:
    shared = table()
    upstream, _ = seen_by(shared, 0)
    upstream.adapt(highest=100, samples=10, **FIXED)
    now = START
    while upstream.allowed(0) != 3:
        upstream.sampled(now - 1000, now)
        now += 50_000
    for _ in range(30):                             # sent while all was loaded
        now += 10_000
        upstream.sampled(now - 2 * SECOND, now)
    assert upstream.allowed(0) == 3, "still measuring"
    for _ in range(30):
        now += 10_000
        upstream.sampled(now - 5000, now)
    assert shared.upstreams(now)[0]["min_rtt_us"] == pytest.approx(5000, rel=0.1)
    assert upstream.allowed(0) > 3


def test_turning_it_off_frees_the_limit() -> None:
    upstream, _ = seen_by(table(), 0)
    upstream.adapt(highest=10)
    drive([upstream], START, 2, capacity=1)
    assert upstream.allowed(0)
    upstream.fixed()
    assert upstream.allowed(0) == 0


@pytest.mark.parametrize("figures", [{"lowest": 0}, {"lowest": 9, "highest": 8}, {"samples": 0}, {"update": 0.001}, {"jitter": 2}])
def test_impossible_figures_are_refused(figures: dict[str, float]) -> None:
    upstream, _ = seen_by(table(), 0)
    with pytest.raises(ValueError, match="out of range"):
        upstream.adapt(**figures)
