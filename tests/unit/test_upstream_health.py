"""Ejection, the single probe, the share that may be out, and active checks: on a virtual clock, against models.

Strategy: time is an argument everywhere. Several workers are several states over one table; races are in
test_upstream_processes.py.
"""

from __future__ import annotations

import itertools
import mmap
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway._speedups.upstream_state import EndpointState, UpstreamState, classify_grpc, classify_status
from gateway._speedups.upstream_table import UpstreamTable
from tests.unit.upstream_memory import (
    CANCELLED,
    CHECK_FAILED,
    CHECK_PASSED,
    CONNECT,
    EJECT,
    EJECTED,
    MAY_PROBE,
    NEUTRAL,
    NONE,
    OK,
    PROBE,
    PROBE_FAILED,
    RESET,
    RETURNED,
    SECOND,
    START,
    STATUS,
    TIMEOUT,
    UNHEALTHY,
    USABLE,
    seen_by,
    send,
    table,
)

FAILURES = (CONNECT, RESET, TIMEOUT, STATUS)


def eject(upstream: UpstreamState, endpoint: EndpointState, now: int, failures: int = 7) -> None:
    assert [send(upstream, endpoint, STATUS, now) for _ in range(failures)] == [NONE] * (failures - 1) + [EJECT]


@pytest.mark.parametrize(
    "outcome,statuses",
    [
        (OK, [100, 200, 201, 302, 400, 401, 403, 404, 409, 422, 501, 505, 599]),
        (NEUTRAL, [429]),
        (STATUS, [500, 502, 503, 504, 600, -1]),
    ],
)
def test_which_statuses_are_failures(outcome: int, statuses: list[int]) -> None:
    assert [classify_status(status) for status in statuses] == [outcome] * len(statuses)


def test_a_refusal_by_grpc_is_no_failure() -> None:
    found = {code: classify_grpc(code) for code in range(18)}
    assert [code for code, outcome in found.items() if outcome == STATUS] == [2, 13, 14, 15, 17]
    assert [code for code, outcome in found.items() if outcome == NEUTRAL] == [1, 4, 8]
    assert found[7] == found[16] == OK              # PERMISSION_DENIED, UNAUTHENTICATED


@pytest.mark.parametrize("outcome", FAILURES)
def test_consecutive_failures_eject(outcome: int) -> None:
    upstream, (one, _) = seen_by(table(), 0, 2)
    assert [send(upstream, one, outcome, START) for _ in range(7)] == [NONE] * 6 + [EJECT]
    assert one.availability(START) == EJECTED and one.admit(START, PROBE) == 0 and one.ticket() == 0
    figures = one.explain(EJECT)
    assert (figures["upstream"], figures["endpoint"]) == ("pay", "10.0.0.1:80") and figures["consecutive_failures"] == 7
    assert 1.0 <= figures["seconds"] <= 1.5


def test_one_success_ends_a_run_and_a_refusal_to_serve_now_does_not() -> None:
    upstream, (one, _) = seen_by(table(), 0, 2)
    for outcome in [STATUS] * 6 + [OK] + [STATUS] * 3 + [NEUTRAL, CANCELLED] + [STATUS] * 3:
        assert send(upstream, one, outcome, START) == NONE
    assert send(upstream, one, STATUS, START) == EJECT


def test_business_refusals_eject_nobody() -> None:
    upstream, (one, _) = seen_by(table(), 0, 2, ratio=0.2)
    for status in itertools.islice(itertools.cycle([400, 401, 403, 404, 409, 422, 429]), 200):
        assert send(upstream, one, classify_status(status), START) == NONE
    assert one.availability(START) == USABLE


def test_failures_of_all_workers_make_one_run() -> None:
    shared = table()
    seats = [seen_by(shared, worker, 2) for worker in range(3)]
    events = [send(upstream, one, RESET, START) for upstream, (one, _) in itertools.islice(itertools.cycle(seats), 7)]
    assert events == [NONE] * 6 + [EJECT]
    assert {one.availability(START) for _, (one, _) in seats} == {EJECTED}


def test_a_success_at_another_worker_ends_the_run() -> None:
    shared = table()
    (first, (one, _)), (second, (same, _)) = seen_by(shared, 0, 2), seen_by(shared, 1, 2)
    for _ in range(6):
        send(first, one, STATUS, START)
    send(second, same, OK, START)
    assert [send(first, one, STATUS, START) for _ in range(6)] == [NONE] * 6


class WindowModel:
    """The ratio of failures in the current and the nine seconds before it, and the run, kept the slow way."""

    def __init__(self, failures: int, ratio: int, minimum: int) -> None:
        self.failures, self.ratio, self.minimum = failures, ratio, minimum
        self.seen: list[tuple[int, bool]] = []
        self.run = 0

    def ejects(self, now: int, bad: bool) -> bool:
        self.seen.append((now // SECOND, bad))
        self.run = self.run + 1 if bad else 0
        window = [failed for second, failed in self.seen if second > now // SECOND - 10]
        by_run = 0 < self.failures <= self.run
        by_ratio = bool(self.ratio) and len(window) >= self.minimum and sum(window) * 1000 > self.ratio * len(window)
        return bad and (by_run or by_ratio)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 8),
    st.sampled_from([0, 100, 200, 333, 500, 1000]),
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 2_500_000), st.booleans(), st.integers(0, 2)), max_size=80),
)
def test_when_it_is_ejected_equals_the_model(failures: int, ratio: int, minimum: int, steps) -> None:
    shared = table()
    rules = {"failures": failures, "ratio": ratio / 1000, "minimum": minimum}
    seats = [seen_by(shared, worker, 2, **rules) for worker in range(3)]
    model, now = WindowModel(failures, ratio, minimum), START
    for jump, bad, worker in steps:
        now += jump
        upstream, (one, _) = seats[worker]
        event = send(upstream, one, STATUS if bad else OK, now)
        expected = EJECT if model.ejects(now, bad) else NONE
        assert event == expected
        if event == EJECT:
            return


def test_exactly_one_request_of_all_workers_is_the_probe() -> None:
    shared = table()
    seats = [seen_by(shared, worker, 2) for worker in range(3)]
    upstream, (one, _) = seats[0]
    eject(upstream, one, START)
    back = one.ejected_until()
    assert one.availability(back - 1000) == EJECTED and one.admit(back - 1000, PROBE) == 0
    assert {state.availability(back) for _, (state, _) in seats} == {MAY_PROBE}
    tickets = [state.admit(back, PROBE) for _, (state, _) in seats for _ in range(3)]
    assert sum(map(bool, tickets)) == 1 and tickets[0]
    assert one.is_probe(tickets[0]) and not one.is_probe(0)
    assert {state.availability(back + SECOND) for _, (state, _) in seats} == {EJECTED}
    assert one.report(upstream, OK, tickets[0], back + SECOND) == RETURNED
    assert {state.availability(back + SECOND) for _, (state, _) in seats} == {USABLE}
    assert one.usable_since() == back + SECOND and one.ejected_until() == 0


@pytest.mark.parametrize("outcome,event", [(OK, RETURNED), (NEUTRAL, RETURNED), *((bad, PROBE_FAILED) for bad in FAILURES)])
def test_what_the_probe_decides(outcome: int, event: int) -> None:
    upstream, (one, _) = seen_by(table(), 0, 2)
    eject(upstream, one, START)
    assert send(upstream, one, outcome, one.ejected_until()) == event


def test_the_time_out_doubles_up_to_the_maximum_with_up_to_half_more() -> None:
    upstream, (one, _) = seen_by(table(), 0, 2, base=1, maximum=60)
    eject(upstream, one, START)
    now, times = START, []
    for _ in range(10):
        times.append(one.ejected_until() - now)
        now = one.ejected_until()
        assert send(upstream, one, CONNECT, now) == PROBE_FAILED
    for time, base in zip(times, [1, 2, 4, 8, 16, 32, 60, 60, 60, 60], strict=True):
        assert base * SECOND - 1000 <= time <= base * SECOND * 3 // 2
    assert len({time % SECOND for time in times}) > 5, "there is jitter"


def test_the_back_off_is_forgotten_after_a_healthy_time() -> None:
    upstream, (one, _) = seen_by(table(), 0, 2, base=1, maximum=60)
    now = START
    eject(upstream, one, now)
    for _ in range(4):
        now = one.ejected_until()
        assert send(upstream, one, CONNECT, now) == PROBE_FAILED
    now = one.ejected_until()
    assert send(upstream, one, OK, now) == RETURNED
    now += 25 * SECOND                              # two of the five steps
    eject(upstream, one, now)
    assert 8 * SECOND - 1000 <= one.ejected_until() - now <= 12 * SECOND
    now = one.ejected_until()
    assert send(upstream, one, OK, now) == RETURNED
    now += 1000 * SECOND
    eject(upstream, one, now)
    assert one.ejected_until() - now <= 3 * SECOND // 2


def test_a_result_from_before_the_ejection_says_nothing_afterwards() -> None:
    upstream, (one, _) = seen_by(table(), 0, 2)
    old = one.admit(START, PROBE)
    eject(upstream, one, START)
    assert one.report(upstream, OK, old, START) == NONE and one.availability(START) == EJECTED
    now = one.ejected_until()
    probe = one.admit(now, PROBE)
    assert one.report(upstream, STATUS, old, now) == NONE and one.is_probe(probe)
    assert one.report(upstream, OK, probe, now) == RETURNED
    for _ in range(20):                             # the rest of the storm arrives late
        assert one.report(upstream, TIMEOUT, old, now) == NONE
    assert one.availability(now) == USABLE


def test_failures_of_before_are_not_in_the_window_of_after() -> None:
    upstream, (one, _) = seen_by(table(), 0, 2, failures=0, ratio=0.2, minimum=5, base=0.001, maximum=0.001)
    for _ in range(5):
        event = send(upstream, one, STATUS, START)
    assert event == EJECT
    assert send(upstream, one, OK, START + 2000) == RETURNED
    for _ in range(4):
        assert send(upstream, one, STATUS, START + 2000) == NONE
    assert send(upstream, one, STATUS, START + 2000) == EJECT


def test_a_request_that_ignores_the_ejection_is_not_taken_for_the_probe() -> None:
    upstream, (one, _) = seen_by(table(), 0, 2, panic=True)
    eject(upstream, one, START)
    now = one.ejected_until()
    probe = one.admit(now, PROBE)
    assert one.ticket() == 0
    assert one.report(upstream, OK, one.ticket(), now) == NONE and one.is_probe(probe)


def test_a_lost_probe_is_replaced_after_its_time() -> None:
    shared = table()
    (first, (one, _)), (second, (same, _)) = seen_by(shared, 0, 2), seen_by(shared, 1, 2)
    eject(first, one, START)
    now = one.ejected_until()
    lost = one.admit(now, 2 * SECOND)
    assert lost and same.admit(now + 2 * SECOND - 1000, PROBE) == 0
    assert same.availability(now + 2 * SECOND + 1000) == MAY_PROBE
    found = same.admit(now + 2 * SECOND + 1000, PROBE)
    assert found
    assert one.report(first, STATUS, lost, now + 3 * SECOND) == NONE, "it comes too late to decide"
    assert same.report(second, OK, found, now + 3 * SECOND) == RETURNED


def test_a_cancelled_probe_lets_the_next_request_probe_at_once() -> None:
    upstream, (one, _) = seen_by(table(), 0, 2)
    eject(upstream, one, START)
    now = one.ejected_until()
    assert one.report(upstream, CANCELLED, one.admit(now, PROBE), now) == NONE
    assert one.availability(now) == MAY_PROBE and send(upstream, one, OK, now) == RETURNED


@pytest.mark.parametrize(
    "count,share,panic,most",
    [
        (1, 0.5, False, 0), (1, 0.5, True, 0), (1, 0, False, 0), (1, 1, False, 1), (2, 0.5, False, 1), (3, 0.5, False, 1),
        (4, 0.5, True, 2), (10, 0.1, False, 1), (9, 0.1, False, 1), (9, 0, False, 0), (5, 1, False, 5), (6, 0.5, False, 3),
    ],
)
def test_at_most_the_share_is_out(count: int, share: float, panic: bool, most: int) -> None:
    upstream, endpoints = seen_by(table(), 0, count, share=share, panic=panic)
    assert upstream.cap() == most
    for endpoint in endpoints:
        for _ in range(20):
            send(upstream, endpoint, CONNECT, START)
    assert [endpoint.availability(START) for endpoint in endpoints].count(EJECTED) == most


def test_one_that_returns_makes_room_for_the_next() -> None:
    upstream, (one, two) = seen_by(table(), 0, 2)
    eject(upstream, one, START)
    for _ in range(20):
        assert send(upstream, two, CONNECT, START) == NONE
    back = one.ejected_until()
    probe = one.admit(back, PROBE)
    assert send(upstream, two, CONNECT, back) == NONE, "one that is probed is still out"
    assert one.report(upstream, OK, probe, back) == RETURNED
    assert send(upstream, two, CONNECT, back) == EJECT


def test_a_decision_that_nobody_finishes_counts_for_a_moment_and_is_struck_out() -> None:
    """As a process leaves it that is killed between marking an endpoint and counting the others."""
    memory = mmap.mmap(-1, UpstreamTable.size_for(4, 4, 16))
    upstream, (one, two) = seen_by(table(memory=memory), 0, 2, failures=1)
    health = memory.find(b"10.0.0.1:80\0") - 64 - 256       # the first word of the slot that holds this address
    word = struct.unpack_from("Q", memory, health)[0]
    assert word == one.admit(START, PROBE), "open, and the generation alone"
    decided = START // 1000 << 24 | 1 << 22 | word
    struct.pack_into("Q", memory, health, decided)
    assert one.availability(START) == USABLE, "it serves meanwhile"
    assert send(upstream, two, CONNECT, START + 50_000) == NONE, "one of two is about to be out"
    assert send(upstream, two, CONNECT, START + 150_000) == EJECT
    assert struct.unpack_from("Q", memory, health)[0] == word
    struct.pack_into("Q", memory, health, decided)
    assert send(upstream, two, OK, two.ejected_until()) == RETURNED
    assert send(upstream, one, CONNECT, START + 10 * SECOND) == EJECT, "its own old mark is no obstacle"


def test_only_present_endpoints_count_for_the_share() -> None:
    upstream, endpoints = seen_by(table(), 0, 4)
    eject(upstream, endpoints[0], START)
    eject(upstream, endpoints[1], START)
    upstream.set_members(endpoints[1:])             # discovery removed one of the two
    assert upstream.cap() == 1
    for _ in range(9):
        assert send(upstream, endpoints[2], CONNECT, START) == NONE


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from([0.2, 0.34, 0.5, 1.0]),
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 2), st.sampled_from([OK, OK, CONNECT, CONNECT, CANCELLED]),
                  st.integers(0, 900_000)),
        max_size=150,
    ),
)
def test_never_more_out_than_the_share_whatever_happens(count: int, share: float, steps) -> None:
    shared = table()
    seats = [seen_by(shared, worker, count, failures=2, share=share, base=0.5, maximum=2) for worker in range(3)]
    now = START
    for number, worker, outcome, jump in steps:
        now += jump
        upstream, endpoints = seats[worker]
        send(upstream, endpoints[number % count], outcome, now)
        out = sum(endpoint.availability(now) != USABLE for endpoint in endpoints)
        assert out <= upstream.cap()


def test_active_checks_have_thresholds() -> None:
    _, (one, _) = seen_by(table(), 0, 2)
    hold = 20 * SECOND

    def check(*results: bool) -> list[int]:
        return [one.checked(good, START, hold, healthy=2, unhealthy=3) for good in results]

    assert check(False, False, True, False, False) == [NONE] * 5
    assert one.availability(START) == USABLE
    assert check(False) == [CHECK_FAILED]
    assert one.availability(START) == UNHEALTHY and one.admit(START, PROBE) == 0
    assert check(True, False, True) == [NONE] * 3
    assert check(True) == [CHECK_PASSED]
    assert one.availability(START) == USABLE


def test_a_verdict_holds_no_longer_than_it_is_renewed() -> None:
    _, (one, _) = seen_by(table(), 0, 2)
    assert one.checked(False, START, 5 * SECOND, unhealthy=1) == CHECK_FAILED
    assert one.availability(START + 5 * SECOND - 1) == UNHEALTHY
    assert one.availability(START + 5 * SECOND) == USABLE
    one.checked(False, START + 5 * SECOND, 5 * SECOND, unhealthy=1)
    one.unchecked()
    assert one.availability(START + 5 * SECOND) == USABLE


def backed_off(upstream: UpstreamState, endpoint: EndpointState) -> int:
    """Eject an endpoint and fail its probes until it is out for a minute; return when that was."""
    eject(upstream, endpoint, START)
    now = START
    while endpoint.ejected_until() - now < 60 * SECOND:
        now = endpoint.ejected_until()
        assert send(upstream, endpoint, CONNECT, now) == PROBE_FAILED
    return now


@pytest.mark.parametrize(
    ("results", "ended"),
    [
        ("++++++", False),      # it passed all along: checks know nothing of what the requests suffered
        ("-----", False),
        ("--+", False),
        ("-++", True),          # too few failures for a verdict, and yet it was away and is back
        ("---++", True),
        ("---+-+-+", False),
        ("+++-+++", True),
    ],
)
def test_checks_that_failed_and_pass_again_end_the_time_of_an_ejection(results: str, ended: bool) -> None:
    upstream, (one, _) = seen_by(table(), 0, 2)
    now = backed_off(upstream, one)
    for result in results:
        now += SECOND // 10
        assert one.availability(now) == EJECTED
        one.checked(result == "+", now, 60 * SECOND, healthy=2, unhealthy=3)
        if one.availability(now) == MAY_PROBE:
            break
    assert (one.availability(now) == MAY_PROBE) is ended


def test_after_checks_that_pass_again_one_request_decides() -> None:
    upstream, (one, _) = seen_by(table(), 0, 2)
    now = backed_off(upstream, one)
    for good in (False, True, True):
        one.checked(good, now, 60 * SECOND, healthy=2, unhealthy=3)
    ticket = one.admit(now, PROBE)
    assert ticket and one.admit(now, PROBE) == 0, "one request and no second"
    assert one.report(upstream, STATUS, ticket, now) == PROBE_FAILED
    assert one.ejected_until() - now >= 60 * SECOND, "no shorter than before"
    one.checked(True, now, 60 * SECOND)
    assert one.availability(now) == EJECTED, "nothing failed since"
    for good in (False, True, True):
        one.checked(good, now, 60 * SECOND, healthy=2, unhealthy=3)
    assert send(upstream, one, OK, now) == RETURNED
    assert one.availability(now) == USABLE


def test_a_check_ends_no_probe_that_is_under_way_and_no_turn_that_is_due() -> None:
    upstream, (one, _) = seen_by(table(), 0, 2)
    backed_off(upstream, one)
    now = one.ejected_until()
    ticket = one.admit(now, PROBE)
    for good in (False, True, True):
        one.checked(good, now, 60 * SECOND, healthy=2, unhealthy=3)
    assert one.is_probe(ticket) and one.admit(now, PROBE) == 0
    assert one.report(upstream, CANCELLED, ticket, now) == NONE
    for good in (False, True, True):
        one.checked(good, now + 5 * SECOND, 60 * SECOND, healthy=2, unhealthy=3)
    assert one.ejected_until() <= now


def test_an_unhealthy_endpoint_is_not_probed() -> None:
    upstream, (one, _) = seen_by(table(), 0, 2)
    eject(upstream, one, START)
    back = one.ejected_until()
    one.checked(False, back, 60 * SECOND, unhealthy=1)
    assert one.availability(back) == UNHEALTHY and one.admit(back, PROBE) == 0
    one.checked(True, back, 60 * SECOND, healthy=1)
    assert one.availability(back) == MAY_PROBE


@pytest.mark.parametrize(
    "figures",
    [{"ratio": 1.1}, {"share": -0.1}, {"budget": 11}, {"base": 0}, {"base": 5, "maximum": 4}, {"failures": -1}, {"minimum": 0}],
)
def test_impossible_figures_are_refused(figures: dict[str, float]) -> None:
    upstream, _ = seen_by(table(), 0)
    with pytest.raises(ValueError, match="out of range"):
        upstream.configure(**figures)
