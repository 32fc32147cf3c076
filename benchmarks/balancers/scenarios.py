"""What happens to the endpoints of a simulated upstream, and which figures are of interest then.

Strategy: every scenario is a world without state of an earlier run, and a window of the requests that count, so that a
comparison shows the disturbance and not the rest. Ten endpoints serve 32 requests at a time in 5 ms; 4,000 requests a second keep
them at 6 %, the slow one, at its tenth of the requests, at 62 %: even dealing works, and costs what the slow one costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from benchmarks.balancers.simulation import MS, SECOND, Chooser, Compiled, Endpoint, Run, Textbook, World

RATE = 4_000
SERVICE_US = 5.0 * MS
WORKERS = 2
SLOW = 10.0
SEED = 20_261_125
JOIN_AT, JOIN_RATE, COLD = 10.0 * SECOND, 20_000, 20.0
AWAY_AT, BACK_AT = 5.0 * SECOND, 125.0 * SECOND
CUT_AT, HEAL_AT, QUIET_RATE = 10.0 * SECOND, 90.0 * SECOND, 2


def steady(rate: float) -> Callable[[float], float]:
    return lambda now: rate


def slow() -> World:
    endpoints = [Endpoint() for _ in range(10)]
    endpoints[3].factor = lambda now, endpoint: SLOW
    return World(endpoints, SERVICE_US, steady(RATE), RATE, 40 * SECOND)


def stall() -> World:
    """One endpoint is twenty times slower for a second in every ten."""
    endpoints = [Endpoint() for _ in range(10)]
    endpoints[3].factor = lambda now, endpoint: 20.0 if now % (10 * SECOND) > 9 * SECOND else 1.0
    return World(endpoints, SERVICE_US, steady(RATE), RATE, 40 * SECOND)


def failing() -> World:
    """One endpoint answers 503 in 0.2 ms from 10 s on, and nothing ejects it."""
    endpoints = [Endpoint() for _ in range(10)]
    endpoints[3].factor = lambda now, endpoint: None if now > 10 * SECOND else 1.0
    return World(endpoints, SERVICE_US, steady(RATE), RATE, 30 * SECOND)


def returning() -> World:
    """One of three is away for two quiet minutes; when it returns, what arrives in its first half second takes that long."""

    def rate(now: float) -> float:
        return RATE if now < AWAY_AT or now > BACK_AT - SECOND else RATE / 40

    endpoints = [Endpoint(servers=64) for _ in range(3)]
    endpoints[2].factor = lambda now, endpoint: 100.0 if BACK_AT <= now < BACK_AT + SECOND / 2 else 1.0
    members = ((AWAY_AT, (0, 1)), (BACK_AT, (0, 1, 2)))
    return World(endpoints, SERVICE_US, rate, RATE, BACK_AT + 5 * SECOND, members)


def joining() -> World:
    """A fifth endpoint joins four that are busy; until it has served some thousand requests its caches are cold."""
    endpoints = [Endpoint() for _ in range(5)]
    endpoints[4].factor = lambda now, endpoint: 1.0 + (COLD - 1) * exp(-endpoint.served / 1_500)
    members = ((0.0, (0, 1, 2, 3)), (JOIN_AT, (0, 1, 2, 3, 4)))
    return World(endpoints, SERVICE_US, steady(JOIN_RATE), JOIN_RATE, JOIN_AT + 12 * SECOND, members)


def cut_off() -> World:
    """One of two endpoints is behind a partition for 80 s, while little is asked."""
    endpoints = [Endpoint() for _ in range(2)]
    endpoints[1].cut = lambda now: CUT_AT <= now < HEAL_AT
    return World(endpoints, SERVICE_US, steady(QUIET_RATE), QUIET_RATE, HEAL_AT + 180 * SECOND)


@dataclass(frozen=True)
class Scenario:
    """A world, who is compared in it, and the endpoint and the time that count."""

    title: str
    world: Callable[[], World]
    rate: int
    odd: int  # the endpoint that is not like the others
    since: float  # only requests that arrive from here on count
    algorithms: Sequence[str]
    until: float = float("inf")
    slow_start_us: int = 0
    healed: float | None = None  # when those that were cut off can be reached again


# `textbook` is peak EWMA as published. Maglev's keys are 10,000 customers, each as often as another.
ALL = ("p2c_ewma", "textbook", "least_request", "round_robin", "random", "maglev")
SCENARIOS = {
    "slow": Scenario("one of ten is 10 times slower", slow, RATE, 3, 10 * SECOND, ALL),
    "stall": Scenario("one of ten is 20 times slower for 1 s in 10", stall, RATE, 3, 10 * SECOND, ALL),
    "failing": Scenario("one of ten fails at once", failing, RATE, 3, 10 * SECOND, ALL),
    "return": Scenario("one of three returns, slow for 0.5 s", returning, RATE, 2, BACK_AT, ALL, BACK_AT + 2 * SECOND),
    "join": Scenario("a cold endpoint joins", joining, JOIN_RATE, 4, JOIN_AT, ALL, JOIN_AT + 4 * SECOND),
    "join-slow-start": Scenario(
        "a cold endpoint joins, slow start 10 s", joining, JOIN_RATE, 4, JOIN_AT,
        tuple(name for name in ALL if name != "textbook"), JOIN_AT + 4 * SECOND, 10 * SECOND,
    ),
    "cut": Scenario("one of two is cut off for 80 s, few requests", cut_off, QUIET_RATE, 1, CUT_AT, ALL, healed=HEAL_AT),
}  # fmt: skip


def chooser(name: str, size: int, seed: int, slow_start_us: int) -> Chooser:
    return Textbook(size, seed) if name == "textbook" else Compiled(name, size, seed, slow_start_us)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of the values do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def measure(scenario: Scenario, algorithm: str, seed: int = SEED) -> dict[str, Any]:
    """Run a scenario with an algorithm and return the figures of the requests that count."""
    world = scenario.world()
    size = len(world.endpoints)
    workers = [chooser(algorithm, size, seed + number, scenario.slow_start_us) for number in range(WORKERS)]
    outcome = Run(world, workers, seed).go()
    counted = sorted(latency for arrival, latency in outcome.latencies if scenario.since <= arrival < scenario.until)
    figures: dict[str, Any] = {
        "p50_us": round(percentile(counted, 0.50)),
        "p99_us": round(percentile(counted, 0.99)),
        "p999_us": round(percentile(counted, 0.999)),
        "requests": len(counted) + outcome.refused,
        "refused": outcome.refused,
        "odd_share": round(outcome.taken[scenario.odd] / sum(outcome.taken), 4),
        "odd_peak": outcome.peak[scenario.odd],
    }
    if scenario.healed is not None:  # the last of them; one that nobody has asked again counts until the end
        back = [outcome.reached.get(index, world.until) for index, one in enumerate(world.endpoints) if one.cut(scenario.healed - 1)]
        figures["back_us"] = round(max(back) - scenario.healed)
    return figures
