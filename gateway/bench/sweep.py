"""How many workers to run: for each count the highest rate that holds the objective, and a sentence that says what to use.

Strategy: for each count a fresh gateway; a closed loop finds where it saturates, then bisection below that finds the highest
rate whose open-loop run is valid and holds the objective. Generator and gateway share the machine, so a count that leaves
the generator no core of its own is measured but not trusted, and the sentence says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gateway.bench.gateway_process import MeasuredGateway
from gateway.bench.machine import machine
from gateway.bench.percentiles import PERCENTILES, duration, needed
from gateway.bench.runner import LATE_WARNING, MOST_CPU, Document, Show, run
from gateway.bench.settings import Settings, UsageError, seconds

SCHEMA, VERSION = "crossway-bench-sweep", 1
WORTH = 1.10  # a count is worth its processes when it carries a tenth more than the one before
UNEVEN = 1.5  # of the mean: above it connections are badly spread over the workers
SATURATION = 2.0  # seconds of closed loop


@dataclass(frozen=True, slots=True)
class Objective:
    """A percentile and the most it may be, in microseconds."""

    name: str
    us: float

    @classmethod
    def read(cls, text: str) -> Objective:
        match = re.fullmatch(r"(p\d+(?:\.\d+)?)\s*(?:=|<=|<)\s*(\S+)", text.strip())
        if match is None or match[1] not in PERCENTILES:
            raise UsageError(f"{text!r} is not an objective such as p99=5ms; percentiles: {', '.join(PERCENTILES)}")
        return cls(match[1], seconds(match[2], "ms") * 1e6)

    def __str__(self) -> str:
        return f"{self.name} <= {duration(self.us)}"


@dataclass(frozen=True, slots=True)
class Point:
    """One run at one rate; latencies in us, None where the samples do not carry them."""

    rate: float
    holds: bool
    why: str
    achieved: float
    p50: float | None
    p99: float | None
    p999: float | None
    judged: float | None
    gateway_us: float  # CPU of the gateway's process tree for each answer
    generator_share: float  # of a core
    connections: tuple[int, ...]  # of each worker
    late: float = 0.0  # seconds that the generator was late by itself

    @property
    def imbalance(self) -> float | None:
        """The fullest worker's connections over the mean; 1.0 is even."""
        total = sum(self.connections)
        return max(self.connections) * len(self.connections) / total if total else None


@dataclass(slots=True)
class Count:
    """What was found for one number of workers."""

    workers: int
    saturation: float  # requests a second in a closed loop
    trusted: bool  # the generator had a core of its own
    points: list[Point] = field(default_factory=list)

    @property
    def best(self) -> Point | None:
        """The highest rate that holds."""
        return max((point for point in self.points if point.holds), key=lambda point: point.rate, default=None)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to sweep. rates: instead of a bisection of `steps` runs."""

    config: Path
    workers: tuple[int, ...]
    objective: Objective
    settings: Settings  # of every run; its URL and rate are filled in
    path: str
    listener: str | None = None
    rates: tuple[float, ...] = ()
    steps: int = 6
    pin: bool = True
    scheme: str = "http"


def cores(plan: Plan) -> tuple[set[int] | None, set[int] | None]:
    """(the gateway's CPUs, the generator's), both None when nothing is pinned."""
    allowed = sorted(os.sched_getaffinity(0))
    if not plan.pin or len(allowed) < 2:
        return None, None
    return set(allowed[:-1]), {allowed[-1]}


def sweep(plan: Plan, show: Show | None = None) -> tuple[list[Count], Document]:
    """Measure every count; return the counts and the document. Raises GatewayError, UsageError, CannotConnect."""
    replace(plan.settings, url=f"{plan.scheme}://127.0.0.1{plan.path}", rate=1.0).check()
    own = os.sched_getaffinity(0)
    gateways, generators = cores(plan)
    about = machine()
    say = show or (lambda text: None)
    try:
        if generators is not None:
            os.sched_setaffinity(0, generators)
        counts = [_measure(plan, workers, about["cpus_available"], gateways, say) for workers in plan.workers]
    finally:
        os.sched_setaffinity(0, own)
    trusted, sentence = recommend(counts, plan.objective, about["cpus_available"])
    return counts, _document(plan, counts, about, trusted, sentence, gateways, generators)


def _measure(plan: Plan, workers: int, cpus: int, pinned: set[int] | None, say: Callable[[str], None]) -> Count:
    with MeasuredGateway(plan.config, workers, pinned) as gateway:
        settings = replace(plan.settings, url=gateway.url(plan.listener, plan.path, plan.scheme))
        say(f"{workers} workers: looking for saturation")
        closed = run(replace(settings, rate=None, poisson=False, duration=SATURATION))
        # One core for the generator; the upstream is wherever it is, and its share is not known here.
        count = Count(workers, closed["result"]["achieved_rate"], workers + 1 <= cpus)
        if plan.rates:
            for rate in sorted(plan.rates):
                count.points.append(_point(plan, gateway, settings, rate, say))
        else:
            _bisect(plan, count, lambda rate: _point(plan, gateway, settings, rate, say))
    return count


def _bisect(plan: Plan, count: Count, measure: Callable[[float], Point]) -> None:
    """Halve the range in which the highest rate that holds must lie."""
    low, high = 0.0, max(count.saturation, 1.0)
    for step in range(plan.steps):
        # Saturation first at nine tenths: an objective far above the latencies is met right there.
        rate = round(high * 0.9 if step == 0 else (low + high) / 2, 1)
        point = measure(rate)
        count.points.append(point)
        if point.holds:
            low = rate
        else:
            high = rate


def _point(plan: Plan, gateway: MeasuredGateway, settings: Settings, rate: float, say: Callable[[str], None]) -> Point:
    say(f"{gateway.workers} workers: {rate:,.0f}/s")
    connections: list[int] = []
    document = run(
        replace(settings, rate=rate), measured=lambda: connections.extend(gateway.connections()), watch=gateway.pid
    )
    result, percentiles = document["result"], document["latency"]["percentiles"]
    judged = percentiles[plan.objective.name]["us"]
    holds, why = _holds(document, judged, plan.objective)
    return Point(
        rate=rate,
        holds=holds,
        why=why,
        achieved=result["achieved_rate"],
        p50=percentiles["p50"]["us"],
        p99=percentiles["p99"]["us"],
        p999=percentiles["p99.9"]["us"],
        judged=judged,
        gateway_us=result["server_us_per_request"],
        generator_share=result["generator"]["core_share"],
        connections=tuple(connections),
        late=(result["generator"]["late_max_ms"] or 0.0) / 1e3,
    )


def _holds(document: Document, judged: float | None, objective: Objective) -> tuple[bool, str]:
    if not document["valid"]:
        return False, "; ".join(document["reasons"])
    if judged is None:
        wanted = needed(objective.name)
        return False, f"{objective.name} needs {wanted:,} requests; make --duration longer"
    if judged > objective.us:
        return False, f"{objective.name} was {duration(judged)}"
    return True, ""


def efficiency(counts: Sequence[Count], count: Count) -> float | None:
    """Rate per worker beside the rate per worker of the smallest count."""
    first = min(counts, key=lambda one: one.workers)
    if first.best is None or count.best is None:
        return None
    return (count.best.rate / count.workers) / (first.best.rate / first.workers)


def recommend(counts: Sequence[Count], objective: Objective, cpus: int) -> tuple[bool, str]:
    """Return (whether it may be believed, the sentence)."""
    ordered = sorted(counts, key=lambda one: one.workers)
    sound = [count for count in ordered if count.trusted]
    doubtful = [str(count.workers) for count in ordered if not count.trusted]
    limit = (
        f"; this machine has {cpus} CPU{'' if cpus == 1 else 's'} for gateway and generator together, "
        f"so {', '.join(doubtful)} cannot be told here"
        if doubtful
        else ""
    )
    if not sound:
        return False, (
            f"The machine is too small to tell: it has {cpus} CPU{'' if cpus == 1 else 's'}, the generator needs one "
            f"for itself, and even {ordered[0].workers} worker{' shares' if ordered[0].workers == 1 else 's share'} it."
        )
    late = max((point.late for count in sound for point in count.points), default=0.0)
    if late > LATE_WARNING:
        limit += f"; the generator was up to {late * 1e3:.0f} ms late because something else used its core: measure again on a quiet machine"
    believed = not doubtful and late <= LATE_WARNING
    carrying = [(count, count.best) for count in sound if count.best is not None]
    if not carrying:
        why = sound[0].points[-1].why if sound[0].points else "nothing was measured"
        return believed, f"No rate held {objective}: {why}{limit}."
    chosen, best = carrying[0]
    reason = f"it holds {objective} up to {best.rate:,.0f}/s"
    for count, point in carrying[1:]:
        gain = point.rate / best.rate
        if gain < WORTH:
            reason += f", and {count.workers} change{'s' if count.workers == 1 else ''} that by {gain - 1:+.0%} only"
            break
        chosen, best = count, point
        reason = f"it holds {objective} up to {best.rate:,.0f}/s, {gain - 1:+.0%} over the count before"
    if best.generator_share > MOST_CPU * 0.9:
        reason += " (the generator was nearly at its own limit)"
    if best.imbalance is not None and best.imbalance > UNEVEN:
        reason += f" (connections were uneven, {best.imbalance:.1f} times the mean; use more of them)"
    return believed, f"Use {chosen.workers} worker{'' if chosen.workers == 1 else 's'}: {reason}{limit}."


def _document(
    plan: Plan,
    counts: Sequence[Count],
    about: dict[str, Any],
    trusted: bool,
    sentence: str,
    gateways: set[int] | None,
    generators: set[int] | None,
) -> Document:
    rows = []
    for count in counts:
        best = count.best
        rows.append(
            {
                "workers": count.workers,
                "trusted": count.trusted,
                "saturation_rate": count.saturation,
                "efficiency": efficiency(counts, count),
                "best": None if best is None else {**asdict(best), "imbalance": best.imbalance},
                "points": [{**asdict(point), "imbalance": point.imbalance} for point in count.points],
            }
        )
    config = {**plan.settings.described(), "url": plan.path}
    del config["rate"]
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "objective": {"percentile": plan.objective.name, "us": plan.objective.us},
        "conclusive": trusted,
        "recommendation": sentence,
        "config": config,
        "machine": about,
        "pinned": None if gateways is None else {"gateway": sorted(gateways), "generator": sorted(generators or ())},
        "counts": rows,
    }
