"""The balancer on a clock that stands still until it is told: what each algorithm takes, and what it must never take.

Strategy: the compiled balancer through Fleet, seeded, so a distribution is the same in every run; bounds are those of six
standard deviations or exact.
"""

from __future__ import annotations

from collections import Counter
from math import sqrt
from typing import Any

import pytest

from gateway._speedups.balance import ALGORITHMS, Balancer
from gateway._speedups.fleet import SAMPLES, Fleet, hash_key

MS, SECOND = 1_000, 1_000_000
NOW = 1_000 * SECOND
ANY = pytest.mark.parametrize("algorithm", ALGORITHMS)
EVEN_KEYS = 0x9E3779B97F4A7C15


def fleet(algorithm: str, weights: list[int], **options: Any) -> Fleet:
    return Fleet(ALGORITHMS.index(algorithm), weights, **options)


def learned(algorithm: str, latencies: list[int], weights: list[int] | None = None) -> Fleet:
    """A fleet whose endpoints have answered once in these times (us)."""
    made = fleet(algorithm, weights or [1] * len(latencies))
    for index, latency in enumerate(latencies):
        made.start(index)
        made.finish(index, NOW, latency)
    return made


def assert_shares(taken: list[int], weights: list[int], factor: float = 6) -> None:
    """Counts are binomial: each within `factor` standard deviations of its weight's share."""
    total, count = sum(weights), sum(taken)
    for got, weight in zip(taken, weights, strict=True):
        share = weight / total
        assert abs(got - count * share) <= factor * sqrt(count * share * (1 - share)) + 1, (taken, weights)


# -- what all have in common


@ANY
def test_without_a_usable_endpoint_there_is_no_choice(algorithm: str) -> None:
    assert fleet(algorithm, []).choose(NOW) == -1
    many = fleet(algorithm, [1, 1, 1])
    for index in range(3):
        many.set(index, usable=False)
    assert many.choose(NOW, 7) == -1
    many.set(1, usable=True)
    assert many.choose(NOW, 7) == 1


@ANY
def test_an_unusable_endpoint_is_never_taken_even_when_nobody_said_so(algorithm: str) -> None:
    many = fleet(algorithm, [1, 2, 3, 4])
    assert many.choose(NOW) >= 0
    many.set(3, usable=False, tell=False)
    assert {many.choose(NOW, key) for key in range(200)} == {0, 1, 2}
    many.set(0, usable=False, tell=False)
    many.set(1, usable=False, tell=False)
    many.set(2, usable=False, tell=False)
    assert many.choose(NOW) == -1
    many.set(2, usable=True, tell=False)
    assert many.choose(NOW) == 2


@ANY
def test_an_endpoint_that_comes_back_without_a_word_is_seen_within_a_tenth_of_a_second(algorithm: str) -> None:
    many = fleet(algorithm, [1, 1, 1])
    many.set(0, usable=False)
    assert 0 not in {many.choose(NOW, key) for key in range(200)}
    many.set(0, usable=True, tell=False)
    assert 0 in {many.choose(NOW + 100 * MS, key) for key in range(200)}


@ANY
def test_what_is_to_be_avoided_is_taken_only_when_it_is_alone(algorithm: str) -> None:
    many = fleet(algorithm, [1, 5, 1])
    for avoid in range(3):
        taken = {many.choose(NOW, key, avoid) for key in range(300)}
        assert taken == {0, 1, 2} - {avoid}
    many.set(0, usable=False)
    assert {many.choose(NOW, key, 1) for key in range(50)} == {2}
    many.set(2, usable=False)
    assert {many.choose(NOW, key, 1) for key in range(50)} == {1}


@ANY
def test_weight_nought_takes_nothing(algorithm: str) -> None:
    taken = fleet(algorithm, [0, 1, 1]).count(500, NOW, EVEN_KEYS)
    assert taken[0] == 0 and min(taken[1:]) > 0
    assert fleet(algorithm, [0, 0]).choose(NOW) == -1


@ANY
def test_idle_equal_endpoints_share_by_weight(algorithm: str) -> None:
    for weights in ([1, 1, 1, 1, 1], [3, 1], [5, 1, 1], [1, 2, 3, 4], [100, 300]):
        taken = fleet(algorithm, weights).count(20_000, NOW, EVEN_KEYS)
        # Of a weighted pair without difference the first counts. Maglev's places are even within about a per cent of the keys.
        assert_shares(taken, weights, 12 if algorithm == "maglev" else 6)


@ANY
def test_nobody_starves(algorithm: str) -> None:
    many = fleet(algorithm, [1, 1_000])
    assert min(many.count(40_000, NOW, EVEN_KEYS)) > 0


@ANY
def test_the_same_seed_chooses_the_same(algorithm: str) -> None:
    one, same = (fleet(algorithm, [1, 2, 3], seed=9) for _ in range(2))
    assert [one.choose(NOW, key) for key in range(100)] == [same.choose(NOW, key) for key in range(100)]


@ANY
def test_endpoints_that_go_and_come_keep_what_is_known_of_them(algorithm: str) -> None:
    many = learned(algorithm, [2 * MS, 40 * MS, 9 * MS])
    many.join([1, 2])
    assert {many.choose(NOW, key) for key in range(300)} <= {1, 2}
    assert many.expected_us(1, NOW) == 40 * MS
    many.join([2, 1, 0])
    assert many.expected_us(0, NOW) == 2 * MS
    many.join([])
    assert many.choose(NOW) == -1


def test_figures_out_of_range_are_refused() -> None:
    for algorithm, options in ((-1, {}), (5, {}), (0, {"slow_start_us": -1}), (4, {"load_percent": 100})):
        with pytest.raises(ValueError, match=r"algorithm|slow start|bound"):
            Balancer(algorithm, **options)


# -- p2c_ewma


def test_the_faster_of_two_is_taken() -> None:
    many = learned("p2c_ewma", [20 * MS, 2 * MS])
    assert many.count(100, NOW) == [0, 100]


def test_a_pair_is_never_one_endpoint_twice() -> None:
    # With replacement the slowest of two would still win a quarter.
    many = learned("p2c_ewma", [5 * MS, 5 * MS, 5 * MS, 500 * MS])
    assert many.count(10_000, NOW)[3] == 0


def test_requests_in_flight_multiply_the_latency() -> None:
    many = learned("p2c_ewma", [10 * MS, 21 * MS])
    many.start(0)
    assert many.choose(NOW) == 0  # 20 against 21
    many.start(0)
    assert many.choose(NOW) == 1  # 30 against 21


def test_requests_of_the_other_workers_count() -> None:
    many = learned("p2c_ewma", [10 * MS, 12 * MS])
    many.set(0, elsewhere=3, tell=False)
    assert many.choose(NOW) == 1
    many.set(0, elsewhere=-7, tell=False)
    assert many.choose(NOW) == 0


def test_a_peak_counts_at_once_and_fades_with_time() -> None:
    one = learned("p2c_ewma", [2 * MS])
    one.start(0)
    one.finish(0, NOW, 100 * MS)
    assert one.expected_us(0, NOW) == 100 * MS
    one.start(0)
    one.finish(0, NOW + 10 * SECOND, 2 * MS)
    assert one.expected_us(0, NOW + 10 * SECOND) == pytest.approx(100 * MS / 2.718281828 + 2 * MS * (1 - 1 / 2.718281828), rel=1e-6)


def test_reading_changes_nothing() -> None:
    one = learned("p2c_ewma", [50 * MS, 2 * MS])
    later = [one.expected_us(0, NOW + second * SECOND) for second in range(20)]
    for _ in range(100):
        one.choose(NOW + 15 * SECOND)
    assert [one.expected_us(0, NOW + second * SECOND) for second in range(20)] == later
    assert later == sorted(later, reverse=True)


@pytest.mark.parametrize("size", [2, 3])
def test_an_idle_endpoint_gets_a_probe_and_no_burst(size: int) -> None:
    # Endpoint 0 was slow and rested for an hour; the others are busy in their usual time.
    many = learned("p2c_ewma", [800 * MS] + [4 * MS] * (size - 1))
    late = NOW + 3_600 * SECOND
    for number in range(100):
        many.start(1 + number % (size - 1))
        many.finish(1 + number % (size - 1), late, 4 * MS)
    taken: Counter[int] = Counter()
    for _ in range(10 * size):
        index = many.choose(late)
        many.start(index)
        taken[index] += 1
    # With a cost of nothing it would win all pairs that it is in, 20 of these, until the first of them is answered.
    assert 1 <= taken[0] <= 16
    assert many.expected_us(0, late) == pytest.approx(2 * MS, rel=0.1)


def test_an_endpoint_without_history_gets_no_burst() -> None:
    many = learned("p2c_ewma", [2 * MS] * 4 + [2 * MS])
    unknown = fleet("p2c_ewma", [1] * 5)
    for some in (many, unknown):
        taken: Counter[int] = Counter()
        for _ in range(50):
            index = some.choose(NOW)
            some.start(index)
            taken[index] += 1
        assert max(taken.values()) - min(taken.values()) <= 4, taken


def test_the_typical_latency_is_that_of_the_upstream_not_a_constant() -> None:
    assert fleet("p2c_ewma", [1]).typical_us == 30 * MS
    assert learned("p2c_ewma", [3 * MS]).typical_us == 3 * MS
    # A new endpoint among fast ones is taken for one of them, not for one of 30 ms, which nobody would try for half a minute.
    fresh = fleet("p2c_ewma", [1, 1, 1])
    fresh.start(0)
    fresh.finish(0, NOW, 3 * MS)
    assert fresh.expected_us(2, NOW) == 2.7 * MS


@pytest.mark.parametrize("algorithm", ["p2c_ewma", "least_request"])
def test_an_endpoint_that_fails_fast_does_not_attract_requests(algorithm: str) -> None:
    many = fleet(algorithm, [1] * 10)
    now, taken = NOW, Counter[int]()
    for _ in range(2_000):
        now += MS
        index = many.choose(now)
        taken[index] += 1
        many.start(index)
        if index == 3:
            many.finish(index, now + 100, 100, "bad")
        else:
            many.finish(index, now + 5 * MS, 5 * MS)
    assert taken[3] <= 2, taken


def test_a_failure_costs_five_seconds_that_run_off() -> None:
    one = learned("p2c_ewma", [2 * MS])
    one.start(0)
    one.finish(0, NOW, 50, "bad")
    assert one.expected_us(0, NOW) == 5 * SECOND
    assert one.expected_us(0, NOW + 4 * SECOND) == 1 * SECOND
    assert one.expected_us(0, NOW + 6 * SECOND) <= 2 * MS


def test_a_failure_never_makes_an_endpoint_cheaper() -> None:
    one = learned("p2c_ewma", [8 * SECOND])
    one.start(0)
    one.finish(0, NOW, 50, "bad")
    assert one.expected_us(0, NOW) == 8 * SECOND


def test_retry_after_is_honoured_up_to_five_minutes() -> None:
    one = learned("p2c_ewma", [2 * MS, 2 * MS])
    for index, asked in ((0, 60), (1, 86_400)):
        one.start(index)
        one.finish(index, NOW, 50, "bad", asked * SECOND)
    assert one.expected_us(0, NOW) == 60 * SECOND
    assert one.expected_us(1, NOW) == 300 * SECOND
    # A success shortens our own penalty, never what was asked for.
    one.start(0)
    one.finish(0, NOW + 1, 2 * MS)
    assert one.expected_us(0, NOW) == 60 * SECOND


def test_a_success_halves_the_penalty() -> None:
    one = learned("p2c_ewma", [2 * MS])
    one.start(0)
    one.start(0)
    one.finish(0, NOW, 50, "bad")
    one.finish(0, NOW, 2 * MS)
    assert one.expected_us(0, NOW) == 2.5 * SECOND


@pytest.mark.parametrize("took", [50, 900 * MS, 2 * SECOND, 60 * SECOND])
def test_a_failure_says_nothing_about_latency_however_long_it_took(took: int) -> None:
    one = learned("p2c_ewma", [20 * MS])
    one.start(0)
    one.finish(0, NOW, took, "bad")
    assert one.expected_us(0, NOW) == 5 * SECOND
    assert 10 * MS < one.expected_us(0, NOW + 5 * SECOND) < 20 * MS


def test_a_request_given_up_shows_how_long_it_took_at_least() -> None:
    one = learned("p2c_ewma", [20 * MS])
    for took, shown in ((1 * MS, 20 * MS), (100 * MS, 100 * MS), (300 * MS, 300 * MS)):
        one.start(0)
        one.finish(0, NOW, took, "abandoned")
        assert one.expected_us(0, NOW) == shown


def test_a_request_given_up_long_after_its_time_counts_as_a_failure() -> None:
    # Where clients leave after 3 s, one that hangs would be empty for a minute after it has woken up.
    one = learned("p2c_ewma", [20 * MS])
    one.start(0)
    one.finish(0, NOW, 3 * SECOND, "abandoned")
    assert one.expected_us(0, NOW) == 5 * SECOND
    assert one.expected_us(0, NOW + 5 * SECOND) < 20 * MS


# -- endpoints that have failed, once their penalty is over

TRIED = pytest.mark.parametrize("algorithm", ["p2c_ewma", "least_request"])


def failed(algorithm: str, latencies: list[int], *which: int) -> Fleet:
    """A fleet of which these have just failed to be connected to."""
    made = learned(algorithm, latencies)
    for index in which:
        made.start(index)
        made.finish(index, NOW, 2 * SECOND, "bad")
    return made


@TRIED
def test_an_endpoint_that_could_not_be_reached_is_tried_after_five_seconds_by_one_request_at_a_time(algorithm: str) -> None:
    many = failed(algorithm, [4 * MS] * 4, 3)
    assert 3 not in {many.choose(NOW + 5 * SECOND - 1) for _ in range(200)}
    for turn in range(6):  # it hangs: nothing comes back
        now = NOW + (5 + turn * 5) * SECOND
        assert 3 in {many.choose(now) for _ in range(200)}
        many.start(3, now)
        assert 3 not in {many.choose(now + later) for later in (0, SECOND, 5 * SECOND - 1) for _ in range(200)}
        many.finish(3, now + 5 * SECOND, 1, "abandoned")  # which shows nothing


@TRIED
def test_a_success_ends_the_trial(algorithm: str) -> None:
    many = failed(algorithm, [8 * MS] * 3 + [4 * MS], 3)
    now = NOW + 6 * SECOND
    for _ in range(3):
        many.start(3, now)
        now += 3 * MS
        many.finish(3, now, 3 * MS)
        assert 3 in {many.choose(now) for _ in range(200)}


def test_a_failure_starts_it_again() -> None:
    many = failed("p2c_ewma", [8 * MS, 2 * MS], 1)
    for turn in range(1, 5):
        now = NOW + turn * 8 * SECOND
        assert many.choose(now) == 1
        many.start(1, now)
        many.finish(1, now + 2 * SECOND, 2 * SECOND, "bad")
        assert many.choose(now + 7 * SECOND - 100 * MS) == 0


@TRIED
def test_a_trial_without_a_failure_is_over_after_half_a_minute(algorithm: str) -> None:
    # Whoever carries nothing but streams that last for hours never shows a success.
    many = failed(algorithm, [4 * MS] * 2, 1)
    now = NOW + 36 * SECOND
    taken: Counter[int] = Counter()
    for _ in range(20):
        index = many.choose(now)
        many.start(index, now)
        taken[index] += 1
    assert min(taken.values()) >= 5, taken


@TRIED
def test_a_payment_leaves_the_trial_to_a_safe_request_for_a_second(algorithm: str) -> None:
    many = failed(algorithm, [4 * MS] * 2, 1)
    now = NOW + 5 * SECOND
    assert 1 not in {many.choose(now + later, 0, -1, False) for later in (0, SECOND - 1) for _ in range(100)}
    assert 1 in {many.choose(now) for _ in range(100)}
    assert 1 in {many.choose(now + SECOND, 0, -1, False) for _ in range(100)}


@TRIED
def test_half_of_the_endpoints_failing_get_nothing_while_the_other_half_is_there(algorithm: str) -> None:
    many = failed(algorithm, [4 * MS] * 8, 0, 2, 4, 6)
    taken = many.count(2_000, NOW + SECOND)
    assert sum(taken[::2]) <= 2, taken  # a quarter of the pairs are two of them
    everybody = failed(algorithm, [4 * MS] * 3, 0, 1, 2)
    assert sum(everybody.count(100, NOW + SECOND)) == 100


def test_one_that_returns_is_asked_at_once_where_the_others_are_faster_than_typical() -> None:
    many = learned("p2c_ewma", [80 * MS, 80 * MS])
    many.choose(NOW)
    now = NOW
    for took in [80 * MS] * 100 + [2 * MS] * 10:  # the upstream was slow, and has just become fast
        now += 10 * SECOND
        many.start(0)
        many.finish(0, now, took)
    assert many.typical_us > 40 * MS > 10 * MS > many.expected_us(0, now)
    many.set(1, born=now)
    assert many.choose(now) == 1
    many.start(1, now)
    assert many.choose(now) == 0


def test_an_endpoint_that_comes_back_begins_anew() -> None:
    many = learned("p2c_ewma", [4 * MS] * 3)
    many.choose(NOW)
    many.start(0)
    many.finish(0, NOW, 900 * MS, "bad")
    many.set(0, usable=False)
    many.choose(NOW + SECOND)
    many.set(0, usable=True, born=NOW + SECOND)
    assert 0 in {many.choose(NOW + SECOND) for _ in range(50)}
    assert many.expected_us(0, NOW + SECOND) == pytest.approx(many.typical_us * 0.9)
    # But for what it asked for itself.
    many.start(1)
    many.finish(1, NOW + SECOND, 50, "bad", 60 * SECOND)
    many.set(1, born=NOW + 2 * SECOND)
    many.choose(NOW + 2 * SECOND)
    assert many.expected_us(1, NOW + 2 * SECOND) == 59 * SECOND


def test_a_busy_upstream_fills_endpoints_in_proportion_to_their_weight() -> None:
    many = learned("p2c_ewma", [10 * MS] * 3, [1, 2, 5])
    for _ in range(800):
        many.start(many.choose(NOW))
    assert_shares([many.in_flight(index) for index in range(3)], [1, 2, 5])


# -- the others


def test_least_request_takes_the_one_with_fewer() -> None:
    many = fleet("least_request", [1, 1])
    for _ in range(100):
        many.start(many.choose(NOW))
    assert [many.in_flight(index) for index in range(2)] == [50, 50]
    many.set(1, elsewhere=10)
    assert many.choose(NOW) == 0


def test_least_request_fills_endpoints_in_proportion_to_their_weight() -> None:
    many = fleet("least_request", [1, 3])
    for _ in range(400):
        many.start(many.choose(NOW))
    assert many.in_flight(1) == pytest.approx(300, abs=2)


@pytest.mark.parametrize(
    ("weights", "order"), [([1, 1, 1], "012012"), ([5, 1, 1], "0010200"), ([2, 1], "010"), ([1, 2, 3], "210212")]
)
def test_round_robin_is_smooth(weights: list[int], order: str) -> None:
    many = fleet("round_robin", weights)
    taken = [many.choose(NOW) for _ in range(sum(weights) * 3)]
    assert "".join(map(str, taken)).startswith(order)
    for start in range(0, len(taken), sum(weights)):
        assert Counter(taken[start : start + sum(weights)]) == Counter(dict(enumerate(weights)))


def test_round_robin_keeps_its_turn_while_one_is_away() -> None:
    many = fleet("round_robin", [1, 1, 1])
    assert [many.choose(NOW) for _ in range(2)] == [0, 1]
    many.set(1, usable=False)
    assert Counter(many.choose(NOW) for _ in range(10)) in (Counter({0: 4, 2: 6}), Counter({0: 5, 2: 5}))
    many.set(1, usable=True)
    taken = Counter(many.choose(NOW) for _ in range(9))
    assert max(taken.values()) - min(taken.values()) <= 2


# -- slow start


@pytest.mark.parametrize("algorithm", ["p2c_ewma", "round_robin", "random", "least_request"])
def test_a_new_endpoint_starts_at_a_tenth_and_grows(algorithm: str) -> None:
    many = fleet(algorithm, [10, 10], slow_start_us=100 * SECOND)
    many.set(1, born=NOW)
    shares = []
    for age in (0, 5, 50, 99, 100, 1_000):
        taken = many.count(20_000, NOW + age * SECOND)
        shares.append(taken[1])
        assert_shares(taken, [100, min(100, max(10, age))])
    assert shares[0] < shares[2] < shares[4]


def test_a_clock_before_the_birth_is_an_age_of_nought() -> None:
    many = fleet("random", [1, 1], slow_start_us=10 * SECOND)
    many.set(1, born=NOW + SECOND)
    assert_shares(many.count(20_000, NOW), [10, 1])


# -- zones


def zones(algorithm: str, local: int, remote: int, down: int = 0, remote_down: int = 0) -> tuple[Fleet, int]:
    """So many local and remote endpoints, the first ones of each down."""
    many = fleet(algorithm, [1] * (local + remote))
    for index in range(local, local + remote):
        many.set(index, local=False, usable=index >= local + remote_down)
    for index in range(down):
        many.set(index, usable=False)
    return many, local


@ANY
@pytest.mark.parametrize(
    ("down", "remote_down", "share"),
    [(0, 0, 1.0), (3, 0, 1.0), (5, 0, 5 / 7), (8, 0, 2 / 7), (10, 0, 0.0), (10, 9, 0.0), (5, 10, 1.0), (8, 9, 2 / 3)],
)
def test_the_local_zone_is_preferred_and_spills_by_health(algorithm: str, down: int, remote_down: int, share: float) -> None:
    many, local = zones(algorithm, 10, 10, down, remote_down)
    taken = many.count(10_000, NOW, EVEN_KEYS)
    assert sum(taken[:local]) / 10_000 == pytest.approx(share, abs=0.03)
    assert sum(taken) == 10_000


@ANY
def test_a_zone_without_endpoints_of_its_own_uses_the_others(algorithm: str) -> None:
    many, _ = zones(algorithm, 0, 3)
    assert min(many.count(600, NOW, EVEN_KEYS)) > 0


@ANY
def test_a_retry_leaves_the_zone_rather_than_meet_the_same_endpoint(algorithm: str) -> None:
    many, _ = zones(algorithm, 1, 2)
    assert {many.choose(NOW, key) for key in range(100)} == {0}
    assert 0 not in {many.choose(NOW, key, 0) for key in range(100)}


# -- maglev


def keys(count: int) -> list[int]:
    return [hash_key(b"customer-%d" % number) for number in range(count)]


def test_equal_keys_meet_the_same_endpoint_in_every_process_and_order() -> None:
    names = [f"10.1.0.{n}:443" for n in range(7)]
    one = Fleet(ALGORITHMS.index("maglev"), [1] * 7, names=names, seed=3)
    other = Fleet(ALGORITHMS.index("maglev"), [1] * 7, names=names[::-1], seed=4)
    for key in keys(500):
        assert names[one.choose(NOW, key)] == names[::-1][other.choose(NOW, key)]


@pytest.mark.parametrize(("count", "size"), [(1, 251), (2, 251), (10, 1021), (40, 4093), (655, 65537), (900, 65537)])
def test_the_table_has_a_hundred_places_for_each_as_far_as_it_goes(count: int, size: int) -> None:
    places = Counter(fleet("maglev", [1] * count).places)
    assert sum(places.values()) == size and len(places) == count
    assert max(places.values()) - min(places.values()) <= 1


def test_only_the_keys_of_an_endpoint_that_fails_move_and_they_return() -> None:
    many = fleet("maglev", [1] * 10)
    before = {key: many.choose(NOW, key) for key in keys(3_000)}
    many.set(4, usable=False)
    away = {key: many.choose(NOW, key) for key in before}
    assert {key for key in before if before[key] != away[key]} == {key for key, index in before.items() if index == 4}
    spread = Counter(away[key] for key, index in before.items() if index == 4)
    assert len(spread) == 9 and max(spread.values()) < sum(spread.values()) / 3
    many.set(4, usable=True)
    assert {key: many.choose(NOW, key) for key in before} == before


def test_few_other_keys_move_when_an_endpoint_is_removed() -> None:
    many = fleet("maglev", [1] * 20)
    before = {key: many.choose(NOW, key) for key in keys(5_000)}
    many.join([index for index in range(20) if index != 6])
    moved = sum(1 for key, index in before.items() if index != 6 and many.choose(NOW, key) != index)
    assert moved / len(before) < 0.05


def test_a_hot_key_never_lifts_an_endpoint_above_its_bound() -> None:
    many = fleet("maglev", [1] * 8)
    hot = keys(1)[0]
    for total in range(1, 400):
        index = many.choose(NOW, hot)
        many.start(index)
        assert max(many.in_flight(i) for i in range(8)) <= max(2, -(-total * 125 // (100 * 8)))
    assert many.in_flight(many.choose(NOW, hot)) < 63


def test_what_one_has_too_much_of_is_not_passed_on_to_one_that_fails() -> None:
    many = fleet("maglev", [1] * 4)
    hot = keys(1)[0]
    own = many.choose(NOW, hot)
    failing = (own + 1) % 4
    for _ in range(40):
        many.start(failing)
        many.finish(failing, NOW, 50, "bad")
        many.start(many.choose(NOW, hot))
    # The other three may carry 3/4 of 125 %: one in sixteen must go somewhere.
    assert many.in_flight(failing) <= 3 < many.in_flight(own)
    assert failing in {many.choose(NOW, key) for key in keys(100)}  # its own keys stay


def test_a_slow_start_shrinks_the_bound_and_moves_no_idle_key() -> None:
    many = fleet("maglev", [1] * 4, slow_start_us=60 * SECOND)
    before = {key: many.choose(NOW, key) for key in keys(400)}
    many.set(2, born=NOW)
    assert {key: many.choose(NOW, key) for key in before} == before
    for key in keys(400):
        many.start(many.choose(NOW, key))
    assert many.in_flight(2) <= 20 < min(many.in_flight(index) for index in (0, 1, 3))


def test_one_of_very_many_is_found_without_a_long_walk() -> None:
    many = fleet("maglev", [1] * 600)
    for index in range(600):
        if index != 7:
            many.set(index, usable=index == 300, elsewhere=1_000)
    assert {many.choose(NOW, key) for key in keys(50)} == {7}


def test_hashes_tell_keys_apart_and_are_the_same_everywhere() -> None:
    assert len({hash_key(b"k" * length) for length in range(100)}) == 100
    assert len({hash_key(bytes([byte])) for byte in range(256)}) == 256
    assert hash_key(b"10.0.0.1:80") == hash_key(b"10.0.0.1:80") != hash_key(b"10.0.0.1:81")
    # Written down: gateways of different versions must send a key to the same endpoint.
    assert hash_key(b"customer-42") == CUSTOMER_42


CUSTOMER_42 = 0xc4d122c122657be5


def test_the_ends_that_fleet_offers_are_checked() -> None:
    one = fleet("random", [1])
    with pytest.raises(IndexError):
        one.start(1)
    with pytest.raises(ValueError, match="tuple"):
        one.finish(0, NOW, 1, "splendid")
    assert SAMPLES == ("good", "bad", "abandoned")
