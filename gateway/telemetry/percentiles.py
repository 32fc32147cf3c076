"""Percentiles and the summary of workers and routes, from the same arrays as the metrics.

Strategy: log-linear bins are at most 12.5 % wide, so a percentile interpolated inside its bin is right to within that
width, without keeping any sample. Summing slots first makes the percentile of all workers, not a mean of percentiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gateway._speedups.histogram import BIN_LOWS_US, OVERFLOW, WorkerSlot
from gateway.telemetry.shared import SharedState

OVERFLOW_NAME = "(overflow)"
UNMATCHED_NAME = "(no route)"


def bins_quantile(bins: Sequence[int], q: float) -> float | None:
    """The q-quantile (0..1) in seconds of a log-linear histogram; None when it is empty."""
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"a quantile lies between 0 and 1, not {q}")
    count = sum(bins)
    if count == 0:
        return None
    rank = q * count
    seen = 0
    for index, number in enumerate(bins):
        if number and seen + number >= rank:
            low = BIN_LOWS_US[index]
            high = BIN_LOWS_US[index + 1] if index + 1 < len(BIN_LOWS_US) else low
            return (low + (high - low) * max(0.0, rank - seen) / number) / 1e6
        seen += number
    return BIN_LOWS_US[-1] / 1e6


def quantile(slots: Iterable[WorkerSlot], route: int, q: float) -> float | None:
    """The q-quantile of a route's request duration over the slots, in seconds; None without requests."""
    total = [0] * len(BIN_LOWS_US)
    for slot in slots:
        for number, bins, *_ in slot.routes():
            if number == route:
                total = [a + b for a, b in zip(total, bins, strict=True)]
    return bins_quantile(total, q)


@dataclass(frozen=True, slots=True)
class WorkerSummary:
    """One running worker, for `crossway workers`."""

    index: int
    pid: int
    requests: int
    connections: int
    exchanges: int
    cpu_seconds: float
    config_version: int
    started: int                    # seconds since 1970
    ready: bool
    draining: bool


@dataclass(frozen=True, slots=True)
class RouteSummary:
    """One route over all workers, ended ones included; durations in seconds."""

    route: str
    count: int
    server_errors: int              # answers with 5xx
    client_errors: int              # answers with 4xx
    p50: float | None
    p99: float | None
    overhead_p50: float | None
    overhead_p99: float | None

    @property
    def error_share(self) -> float:
        """The share of 5xx answers, 0..1."""
        return self.server_errors / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    workers: tuple[WorkerSummary, ...]
    routes: tuple[RouteSummary, ...]
    requests: int


def _worker(index: int, slot: WorkerSlot) -> WorkerSummary:
    return WorkerSummary(
        index=index,
        pid=slot.gauge("pid"),
        requests=slot.counter("requests"),
        connections=slot.gauge("connections"),
        exchanges=slot.gauge("exchanges"),
        cpu_seconds=slot.gauge("cpu_us") / 1e6,
        config_version=slot.gauge("config_version"),
        started=slot.gauge("started"),
        ready=bool(slot.gauge("ready")),
        draining=bool(slot.gauge("draining")),
    )


def shown_name(shared: SharedState, route: int) -> str:
    """A route's name for people."""
    return OVERFLOW_NAME if route == OVERFLOW else shared.route_name(route) or UNMATCHED_NAME


def summary(shared: SharedState) -> Summary:
    """Running workers in the order of their slots, and routes with the busiest first."""
    workers = tuple(_worker(index, shared.slot(index)) for index in shared.alive())
    total = shared.total()
    statuses: dict[int, dict[int, int]] = {}
    for route, _method, status, buckets, *_ in total.series():
        by_class = statuses.setdefault(route, {})
        by_class[status // 100] = by_class.get(status // 100, 0) + sum(buckets)
    routes = [
        RouteSummary(
            route=shown_name(shared, route),
            count=sum(bins),
            server_errors=statuses.get(route, {}).get(5, 0),
            client_errors=statuses.get(route, {}).get(4, 0),
            p50=bins_quantile(bins, 0.5),
            p99=bins_quantile(bins, 0.99),
            overhead_p50=bins_quantile(overhead, 0.5),
            overhead_p99=bins_quantile(overhead, 0.99),
        )
        for route, bins, overhead, _buckets, _sum in total.routes()
    ]
    requests = total.counter("requests")
    return Summary(workers, tuple(sorted(routes, key=lambda one: (-one.count, one.route))), requests)
