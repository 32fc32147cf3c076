"""The balancer under random histories: whatever happens, it chooses what may be chosen and its figures stay figures.

Strategy: hypothesis plays the pool: it starts and ends requests with every outcome, lets endpoints go, come back, be born and be
replaced, and moves the clock by nothing, by days or backwards; after each step the invariants are checked. Maglev's bound and
disruption, the smooth order and the weights have exact statements of their own.
"""

from __future__ import annotations

from collections import Counter
from math import isfinite, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway._speedups.balance import ALGORITHMS
from gateway._speedups.fleet import SAMPLES, Fleet

SECOND = 1_000_000
NOW = 1_000 * SECOND
EVEN_KEYS = 0x9E3779B97F4A7C15
SIZE = 6

algorithms = st.sampled_from(range(len(ALGORITHMS)))
endpoints = st.integers(0, SIZE - 1)
weights = st.lists(st.integers(1, 50), min_size=1, max_size=9)
times = st.one_of(st.integers(-SECOND, 20 * SECOND), st.sampled_from([0, 1, 3_600 * SECOND, 30 * 86_400 * SECOND]))
latencies = st.one_of(st.integers(0, 10 * SECOND), st.sampled_from([-1, 0, 1, 1 << 40, (1 << 62)]))
waits = st.sampled_from([0, -1, SECOND, 300 * SECOND, 1 << 61])


class Pool(RuleBasedStateMachine):
    """What the pool may do to a balancer, in any order."""

    @initialize(algorithm=algorithms, weights=st.lists(st.integers(0, 1_000_000), min_size=SIZE, max_size=SIZE),
                slow_start=st.sampled_from([0, 1, 30 * SECOND]), seed=st.integers(0, 1 << 63))  # fmt: skip
    def begin(self, algorithm: int, weights: list[int], slow_start: int, seed: int) -> None:
        self.fleet = Fleet(algorithm, weights, slow_start_us=slow_start, seed=seed + 1)
        self.now = NOW
        self.members = list(range(SIZE))
        self.weights = weights
        self.usable = [True] * SIZE
        self.waiting: list[int] = []

    def may_be_taken(self) -> set[int]:
        return {index for index in self.members if self.usable[index] and self.weights[index] > 0}

    @rule(key=st.integers(0, (1 << 64) - 1), avoid=st.one_of(st.just(-1), endpoints))
    def choose(self, key: int, avoid: int) -> None:
        avoid = avoid if avoid in self.members else -1
        index = self.fleet.choose(self.now, key, avoid)
        may = self.may_be_taken()
        if not may:
            assert index == -1
            return
        assert index in may
        assert index != avoid or may == {avoid}
        self.fleet.start(index)
        self.waiting.append(index)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), latency=latencies, sample=st.sampled_from(SAMPLES), wait=waits)
    def answer(self, data: st.DataObject, latency: int, sample: str, wait: int) -> None:
        index = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        before = self.fleet.expected_us(index, self.now)
        self.fleet.finish(index, self.now, latency, sample, wait)
        if sample != "good":
            assert self.fleet.expected_us(index, self.now) >= before

    @rule(step=times)
    def wait(self, step: int) -> None:
        self.now = max(1, self.now + step)

    @rule(index=endpoints, usable=st.booleans())
    def change(self, index: int, usable: bool) -> None:
        self.fleet.set(index, usable=usable)
        self.usable[index] = usable

    @rule(index=endpoints)
    def fall_without_a_word(self, index: int) -> None:
        self.fleet.set(index, usable=False, tell=False)
        self.usable[index] = False

    @rule(index=endpoints, weight=st.integers(0, 1_000_000), local=st.booleans(), elsewhere=st.integers(-5, 5_000))
    def configure(self, index: int, weight: int, local: bool, elsewhere: int) -> None:
        self.fleet.set(index, weight=weight, local=local, elsewhere=elsewhere)
        self.weights[index] = weight
        self.fleet.join(self.members)

    @rule(index=endpoints)
    def bear(self, index: int) -> None:
        self.fleet.set(index, born=self.now)

    @rule(members=st.lists(endpoints, unique=True))
    def replace(self, members: list[int]) -> None:
        self.fleet.join(members)
        self.members = members

    @invariant()
    def figures_are_figures(self) -> None:
        assert isfinite(self.fleet.typical_us) and self.fleet.typical_us > 0
        waiting = Counter(self.waiting)
        for index in range(SIZE):
            expected = self.fleet.expected_us(index, self.now)
            assert isfinite(expected) and expected > 0
            assert self.fleet.in_flight(index) == waiting[index]


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@given(algorithms, weights, st.integers(1, 1 << 63))
@settings(max_examples=60)
def test_idle_endpoints_share_by_weight(algorithm: int, weights: list[int], seed: int) -> None:
    count = 4_000
    taken = Fleet(algorithm, weights, seed=seed).count(count, NOW, EVEN_KEYS)
    for got, weight in zip(taken, weights, strict=True):
        share = weight / sum(weights)
        assert abs(got - count * share) <= 7 * sqrt(count * share * (1 - share)) + 3 + 0.01 * count, (taken, weights)


@given(weights)
def test_smooth_round_robin_is_exact_in_each_round_and_never_far_ahead(weights: list[int]) -> None:
    total = sum(weights)
    fleet = Fleet(ALGORITHMS.index("round_robin"), weights)
    taken = [fleet.choose(NOW) for _ in range(2 * total)]
    assert Counter(taken[:total]) == Counter(taken[total:]) == Counter(dict(enumerate(weights)))
    got: Counter[int] = Counter()
    for number, index in enumerate(taken, 1):
        got[index] += 1
        assert all(abs(got[i] - number * weight / total) < len(weights) for i, weight in enumerate(weights))


@given(st.integers(2, 12), st.data())
@settings(max_examples=40)
def test_an_endpoint_that_falls_moves_its_own_keys_only(count: int, data: st.DataObject) -> None:
    fleet = Fleet(ALGORITHMS.index("maglev"), data.draw(st.lists(st.integers(1, 5), min_size=count, max_size=count)))
    keys = data.draw(st.lists(st.integers(0, (1 << 64) - 1), min_size=50, max_size=50))
    gone = data.draw(st.integers(0, count - 1))
    before = [fleet.choose(NOW, key) for key in keys]
    fleet.set(gone, usable=False)
    assert all(new == old if old != gone else new != gone for old, new in zip(before, (fleet.choose(NOW, key) for key in keys), strict=True))


@given(st.integers(3, 30), st.data())
@settings(max_examples=25)
def test_removing_one_of_many_moves_few_other_keys(count: int, data: st.DataObject) -> None:
    fleet = Fleet(ALGORITHMS.index("maglev"), [1] * count, names=[f"{data.draw(st.integers(0, 1 << 32))}-{n}" for n in range(count)])
    before = fleet.places
    gone = data.draw(st.integers(0, count - 1))
    fleet.join([index for index in range(count) if index != gone])
    after = fleet.places
    if len(after) == len(before):  # not where the count crosses to another table
        moved = sum(1 for old, new in zip(before, after, strict=True) if old not in (gone, new))
        assert moved / len(before) < 0.12


@given(weights, st.sampled_from([101, 125, 200]), st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=200))
def test_the_bound_on_the_load_holds_after_every_choice(weights: list[int], percent: int, steps: list[tuple[int, bool]]) -> None:
    fleet = Fleet(ALGORITHMS.index("maglev"), weights, load_percent=percent)
    waiting: list[int] = []
    for key, ends in steps:
        if ends and waiting:
            fleet.finish(waiting.pop(0), NOW, 1_000)
            continue
        index = fleet.choose(NOW, key)
        fleet.start(index)
        waiting.append(index)
        # ceil(load x requests x share), with the rounding of a double; two are always allowed.
        bound = percent / 100 * len(waiting) * weights[index] / sum(weights) + 1e-9
        assert fleet.in_flight(index) <= 2 or fleet.in_flight(index) - 1 < bound


@pytest.mark.parametrize("algorithm", range(len(ALGORITHMS)), ids=ALGORITHMS)
@given(weights=weights, seed=st.integers(1, 1 << 63))
@settings(max_examples=20)
def test_nobody_starves_while_requests_come_and_go(algorithm: int, weights: list[int], seed: int) -> None:
    fleet = Fleet(algorithm, weights, seed=seed)
    now, taken = NOW, Counter[int]()
    for number in range(60 * sum(weights) // min(weights) if len(weights) > 1 else 10):
        now += 10_000
        index = fleet.choose(now, number * EVEN_KEYS % (1 << 64))
        fleet.start(index)
        fleet.finish(index, now, 2_000 + number % 7)
        taken[index] += 1
    assert set(taken) == set(range(len(weights)))
