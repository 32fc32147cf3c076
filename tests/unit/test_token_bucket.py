"""The shared token buckets against an exact model, and hammered by several processes.

Strategy: time is an argument of take(), so the clock is virtual everywhere; the model is GCRA over fractions.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway._speedups.token_bucket import BucketTable, RateLimit
from tests.unit.forked import fork

SECOND = 1_000_000
DAY = 86_400 * SECOND
SKEW = 100_000


def table(slots: int = 64) -> BucketTable:
    return BucketTable(mmap.mmap(-1, BucketTable.size_for(slots)), 0, slots)


class Model:
    """GCRA with rational numbers: per key a theoretical arrival time."""

    def __init__(self, count: int, period_us: int, burst: int) -> None:
        self.interval = Fraction(period_us, count)
        self.burst = burst
        self.tat: dict[bytes, Fraction] = {}

    def take(self, key: bytes, now: int) -> tuple[int, int, int, int]:
        start = max(self.tat.get(key, Fraction(0)), Fraction(now))
        tat = start + self.interval
        room = now + self.burst * self.interval - tat
        if room < 0:
            return 0, 0, -(room.numerator // room.denominator), self.up(start - now)
        self.tat[key] = tat
        return 1, int(room / self.interval), 0, self.up(tat - now)

    @staticmethod
    def up(value: Fraction) -> int:
        return max(0, -(-value.numerator // value.denominator))


limits = st.tuples(st.integers(1, 16384), st.sampled_from([SECOND, 60 * SECOND, 3600 * SECOND, DAY]), st.integers(1, 5000))


@settings(max_examples=300, deadline=None)
@given(limits, st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 2_000_000)), max_size=120), st.data())
def test_every_decision_equals_the_exact_model(figures, steps, data) -> None:
    count, period, burst = figures
    burst = min(burst, 6000)
    buckets, limit, model = table(), RateLimit("exact", count, period, burst), Model(count, period, burst)
    now = data.draw(st.integers(1, 1 << 45))
    interval = max(1, period // count)
    for key_number, scale, jump in steps:
        now += (0, jump % 7, jump % (3 * interval), jump)[scale]
        key = b"client-%d" % key_number
        assert buckets.take_key(limit, key, now) == model.take(key, now)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60_000)), max_size=200), st.integers(1, 4))
def test_taking_slots_over_loses_nothing(steps, burst) -> None:
    """One set of eight slots and many more keys: a decision is the model's, or `full` while eight buckets may be live."""
    buckets, limit, model = table(8), RateLimit("churn", 20, SECOND, burst), Model(20, SECOND, burst)
    now = 5 * SECOND
    for key_number, jump in steps:
        now += jump
        key = b"%d" % key_number
        decision = buckets.take_key(limit, key, now)
        if decision[0] == -1:
            others = sum(1 for name, tat in model.tat.items() if name != key and tat + SKEW + 1 >= now)
            assert others >= 8 and model.tat.get(key, Fraction(0)) <= now
        else:
            assert decision == model.take(key, now)


@pytest.mark.parametrize(
    "count,period,burst",
    [(3, SECOND, 5), (7, SECOND, 100), (16_383, SECOND, 50), (999_900, SECOND, 200), (1, DAY, 2), (11, DAY, 3)],
)
def test_a_long_run_at_the_limit_does_not_drift(count: int, period: int, burst: int) -> None:
    """Always asked for more than there is, and never full: admitted is burst + floor(elapsed * rate) to the token."""
    buckets, limit = table(), RateLimit("backlog", count, period, burst)
    start, admitted, now = SECOND, 0, SECOND
    stride = (burst - 1) * period // count - 1           # up to one token is left over before each step
    for step in range(5000):
        while buckets.take_key(limit, b"k", now)[0] == 1:
            admitted += 1
        assert admitted == burst + (now - start) * count // period
        now += 1 + step * 7919 % stride


def test_rates_are_exact_or_rounded_down() -> None:
    assert RateLimit("a", 100, SECOND, 1).interval == (10_000, 1)
    assert RateLimit("a", 1_000_000, SECOND, 1).interval == (1, 1)
    assert RateLimit("a", 3, SECOND, 1).interval == (1_000_000, 3)
    assert RateLimit("a", 1, DAY, 1).interval == (DAY, 1)
    for count in (16_385, 99_991, 300_007, 999_983):
        wanted, got = Fraction(SECOND, count), Fraction(*RateLimit("a", count, SECOND, 1).interval)
        assert wanted <= got <= wanted * Fraction(10_001, 10_000)


@pytest.mark.parametrize("figures", [(0, SECOND, 1), (1, 0, 1), (1, SECOND, 0), (2_000_000, SECOND, 1), (1, DAY, 10_000_000)])
def test_impossible_limits_are_refused(figures) -> None:
    with pytest.raises(ValueError, match="limit 'x'"):
        RateLimit("x", *figures)


def test_a_limit_with_other_figures_has_its_own_buckets() -> None:
    buckets = table()
    for limit in (RateLimit("x", 1, DAY, 1), RateLimit("x", 100, SECOND, 1), RateLimit("y", 1, DAY, 1)):
        assert buckets.take_key(limit, b"k", SECOND)[0] == 1
        assert buckets.take_key(limit, b"k", SECOND)[0] == 0


def test_a_full_set_says_so_and_recovers() -> None:
    buckets, limit = table(8), RateLimit("x", 1, SECOND, 1)
    assert [buckets.take_key(limit, b"%d" % n, SECOND)[0] for n in range(8)] == [1] * 8
    assert buckets.take_key(limit, b"new", SECOND)[0] == -1
    assert buckets.full_count == 1
    assert buckets.live(SECOND) == 8
    assert buckets.take_key(limit, b"0", SECOND)[0] == 0, "a key that has a slot is still decided"
    assert buckets.take_key(limit, b"new", 2 * SECOND + SKEW)[0] == -1
    assert buckets.take_key(limit, b"new", 2 * SECOND + SKEW + 1)[0] == 1


def test_bad_geometry_is_refused() -> None:
    memory = mmap.mmap(-1, 8192)
    for slots in (0, 7, 12, -8):
        with pytest.raises(ValueError):
            BucketTable(memory, 0, slots)
    for offset in (-64, 8192, 8, 8128):
        with pytest.raises(ValueError):
            BucketTable(memory, offset, 64)
    BucketTable(memory, 64, 64)
    with pytest.raises(ValueError, match="64 slots, not 8"):
        BucketTable(memory, 64, 8)


def test_eight_processes_share_one_bucket_exactly() -> None:
    """burst 500 and 1000/s: at now = 1 s, 1.5 s and 2 s (fixed) the table admits 500, +500, +500, whoever asks."""
    results = mmap.mmap(-1, 4096)
    buckets, limit = table(), RateLimit("one", 1000, SECOND, 500)
    for phase, now in enumerate((SECOND, 3 * SECOND // 2, 2 * SECOND)):

        def hammer(index: int, phase: int = phase, now: int = now) -> None:
            admitted = sum(buckets.take_key(limit, b"hot", now)[0] for _ in range(2000))
            struct.pack_into("q", results, (phase * 8 + index) * 8, admitted)

        fork(8, hammer)
        assert sum(struct.unpack_from("8q", results, phase * 64)) == 500


def test_a_new_key_gets_one_slot_however_many_processes_insert_it() -> None:
    """Burst 1, one set, and keys that all processes meet at the same moment while older keys' slots are being taken over."""
    keys, workers = 12_000, 3
    results, progress = mmap.mmap(-1, workers * keys), mmap.mmap(-1, 4096)
    buckets, limit = table(8), RateLimit("one", 10, SECOND, 1)

    def insert(index: int) -> None:
        for key in range(keys):
            while min(struct.unpack_from(f"{workers}q", progress, 0)) < key:      # in step, so that clocks stay within SKEW
                os.sched_yield()
            now = SECOND + key * 40_000 + index * 7
            results[index * keys + key] = buckets.take_key(limit, b"key-%d" % key, now)[0] & 0xFF
            struct.pack_into("q", progress, index * 8, key + 1)

    fork(workers, insert)
    for key in range(keys):
        outcome = [results[index * keys + key] for index in range(workers)]
        assert sorted(outcome) == [0] * (workers - 1) + [1], (key, outcome)


def test_killed_workers_neither_wedge_nor_refund() -> None:
    """Processes killed at random points; afterwards the bucket still admits at most burst in all, and every slot recovers."""
    count, burst = mmap.mmap(-1, 4096), 8_000_000
    buckets, hot, churn = table(8), RateLimit("hot", 1, 60 * SECOND, burst), RateLimit("churn", 1000, SECOND, 1)
    assert buckets.take_key(hot, b"hot", SECOND)[0] == 1
    for round_number in range(12):
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            now = SECOND + round_number * SECOND
            done = 0
            while True:
                for n in range(20):
                    buckets.take_key(churn, b"%d" % n, now)
                    now += 20_000
                done += buckets.take_key(hot, b"hot", SECOND)[0] == 1
                struct.pack_into("q", count, round_number * 8, done)
        while struct.unpack_from("q", count, round_number * 8)[0] < 5:
            os.sched_yield()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    counted = sum(struct.unpack_from("12q", count, 0))
    used = burst - 1 - buckets.take_key(hot, b"hot", SECOND)[1]
    # A killed worker may have been admitted without having counted it: at most one each.
    assert counted + 1 <= used <= counted + 1 + 12
    late = 1 << 45
    assert [buckets.take_key(churn, b"late-%d" % n, late)[0] for n in range(7)] == [1] * 7
