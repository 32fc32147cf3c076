"""The simulation behind docs/balancing.md: it loses no request, repeats itself, and its figures are those in the document."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from benchmarks.balancers.__main__ import DOCUMENT, PICTURE, RESULT, picture, placed, tables
from benchmarks.balancers.scenarios import SCENARIOS, measure, percentile
from benchmarks.balancers.simulation import MS, SECOND, Compiled, Endpoint, Outcome, Run, Textbook, World


def world(**changes: object) -> World:
    made = World([Endpoint(servers=8) for _ in range(4)], 5.0 * MS, lambda now: 500, 500, 2 * SECOND)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def run(algorithm: str, made: World) -> Outcome:
    return Run(made, [Compiled(algorithm, len(made.endpoints), seed) for seed in (1, 2)], 7).go()


def test_every_request_is_answered_once_and_the_run_repeats_itself() -> None:
    one, same = run("p2c_ewma", world()), run("p2c_ewma", world())
    assert len(one.latencies) == sum(one.taken) == pytest.approx(1_000, abs=150)
    assert one == same


def test_latency_is_service_time_when_nobody_waits_and_more_when_they_do() -> None:
    idle = run("round_robin", world())
    assert sum(latency for _, latency in idle.latencies) / len(idle.latencies) == pytest.approx(5 * MS, rel=0.15)
    busy = run("round_robin", world(endpoints=[Endpoint(servers=1)]))  # 2.5 times what one server can do
    assert max(latency for _, latency in busy.latencies) > SECOND and busy.peak[0] > 100


def test_a_failing_endpoint_refuses_and_holds_no_server() -> None:
    endpoints = [Endpoint(servers=1), Endpoint(servers=1)]
    endpoints[1].factor = lambda now, endpoint: None
    outcome = run("round_robin", world(endpoints=endpoints, rate=lambda now: 100, most=100))
    assert outcome.refused == outcome.taken[1] > 50 and endpoints[1].served == 0
    assert len(outcome.latencies) == outcome.taken[0]


def test_members_come_and_go() -> None:
    outcome = run("random", world(members=((0.0, (0, 1)), (1.0 * SECOND, (0, 1, 2)))))
    assert outcome.taken[3] == 0 < outcome.taken[2] < outcome.taken[0]


def test_a_slow_endpoint_is_seen_by_those_who_look() -> None:
    shares = {}
    for name in ("p2c_ewma", "least_request", "round_robin"):
        endpoints = [Endpoint() for _ in range(4)]
        endpoints[2].factor = lambda now, endpoint: 20.0
        outcome = run(name, world(endpoints=endpoints))
        shares[name] = outcome.taken[2] / sum(outcome.taken)
    assert shares["p2c_ewma"] < shares["least_request"] < shares["round_robin"] == pytest.approx(0.25, abs=0.01)


def test_a_request_to_one_that_is_cut_off_is_late_and_answered_elsewhere() -> None:
    endpoints = [Endpoint() for _ in range(2)]
    endpoints[1].cut = lambda now: True
    outcome = run("round_robin", world(endpoints=endpoints, rate=lambda now: 50, most=50))
    assert endpoints[1].served == 0 < outcome.taken[1]
    late = sum(latency > 2 * SECOND for _, latency in outcome.latencies)
    assert late == outcome.taken[1] and not outcome.reached


@pytest.mark.parametrize("seed", range(8))
def test_an_endpoint_behind_a_partition_that_heals_is_asked_again_within_seconds(seed: int) -> None:
    """At two requests a second: five seconds of penalty, two of an attempt under way, and some until a pair has it."""
    scenario = SCENARIOS["cut"]
    assert measure(scenario, "p2c_ewma", seed)["back_us"] < 10 * SECOND


def test_peak_ewma_as_published_takes_a_timeout_for_a_latency() -> None:
    figures = measure(SCENARIOS["cut"], "textbook")
    assert figures["back_us"] > 15 * SECOND


def test_the_published_algorithm_is_what_it_is_said_to_be() -> None:
    now = 1_000 * SECOND
    other = Textbook(2, 1)
    for index, latency in ((0, 4 * MS), (1, 400 * MS)):
        other.start(index)
        other.finish(index, now, latency)
    assert other.choose(now) == 0
    later = now + 600 * SECOND
    other.start(0)
    other.finish(0, later, 4 * MS)
    for _ in range(50):  # idle for ten minutes: it costs nothing, whatever it holds
        assert other.choose(later) == 1
        other.start(1)


def test_percentiles_are_values_that_were_seen() -> None:
    values = list(range(1, 1_001))
    assert [percentile(values, share) for share in (0.5, 0.99, 0.999, 1.0)] == [500, 990, 999, 1_000]
    assert percentile([3.0], 0.99) == 3.0


def test_the_document_and_the_picture_show_the_kept_figures() -> None:
    result = json.loads(RESULT.read_text("utf-8"))
    document = DOCUMENT.read_text("utf-8")
    assert placed(document, tables(result)) == document
    assert PICTURE.read_text("utf-8") == picture(result)
    ElementTree.fromstring(picture(result))
    with pytest.raises(ValueError, match="no <!-- balancers:start"):
        placed("nothing", "")
