"""What the table of upstreams tells: metrics for Prometheus, and one report for the admin API.

Strategy: both are made of the same rows (SharedState.upstream_rows), read from shared memory when somebody asks. Success is told
twice: *actual* is that of the attempts at the endpoints, *effective* is that of the requests after retries; what lies between
them is what retries hide from clients, and what they cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from gateway._speedups.upstream_state import OUTCOME_NAMES
from gateway.telemetry.shared import SharedState

Row = dict[str, Any]

# name: (help, key of an upstream's row)
UPSTREAM_GAUGES = {
    "requests_in_flight": ("Requests that have a place at the upstream.", "in_flight"),
    "requests_limit": ("Requests that the upstream may have at once: configured, or adapted.", "limit"),
    "requests_queued": ("Requests that wait for a place at the upstream.", "queued"),
    "connections_open": ("Connections to the upstream that count for its limit.", "connections"),
    "retry_budget": ("Further attempts that the retry budget allows now.", "budget_left"),
}
# name: (help, counter)
UPSTREAM_COUNTERS = {
    "requests": ("Requests for the upstream, each counted once however often it is tried.", "requests"),
    "successes": ("Requests whose final answer was no failure: the effective success.", "successes"),
    "attempts": ("Requests sent to endpoints, retries and hedges included.", "attempts"),
    "attempt_successes": ("Attempts that were no failure: the actual success.", "attempt_successes"),
    "retries": ("Further attempts that the retry budget allowed.", "retries"),
    "retries_denied": ("Further attempts that the retry budget did not allow.", "budget_empty"),
    "ejections_capped": ("Ejections that did not happen because the share of ejected endpoints was used up.", "capped"),
}
# Value of the label `reason`: counter.
REFUSED = {
    "requests": "requests_full", "queue": "pending_full", "queue_timeout": "queue_timeouts",
    "connections": "connections_full", "no_endpoint": "no_endpoint",
}  # fmt: skip
ENDPOINT_COUNTERS = {
    "retries": ("Attempts at the endpoint that were not their request's first.", "retries"),
    "ejections": ("Times that the endpoint was ejected, failed probes included.", "ejections"),
    "probes": ("Requests that tried an ejected endpoint.", "probes"),
    "returns": ("Times that the endpoint came back.", "returns"),
    "full": ("Attempts that found the endpoint's limit of requests reached.", "requests_full"),
}
ENDPOINT = ["upstream", "endpoint"]


def metrics(shared: SharedState) -> Iterator[Metric]:
    """The upstreams' and the endpoints' families."""
    upstreams, endpoints = shared.upstream_rows()
    yield from _upstream_metrics(sorted(upstreams, key=lambda row: str(row["name"])))
    yield from _endpoint_metrics(sorted(endpoints, key=lambda row: (str(row["upstream"]), str(row["address"]))))
    full = CounterMetricFamily(
        "crossway_upstream_table_full", "Upstreams and endpoints that found no place in shared memory; each worker counts them alone."
    )
    full.add_metric([], shared.upstreams.full_count)
    yield full


def _upstream_metrics(rows: list[Row]) -> Iterator[Metric]:
    for name, (text, key) in UPSTREAM_GAUGES.items():
        gauge = GaugeMetricFamily(f"crossway_upstream_{name}", text, labels=["upstream"])
        for row in rows:
            gauge.add_metric([row["name"]], _limit(row) if key == "limit" else row[key])
        yield gauge
    for name, (text, key) in UPSTREAM_COUNTERS.items():
        counter = CounterMetricFamily(f"crossway_upstream_{name}", text, labels=["upstream"])
        for row in rows:
            counter.add_metric([row["name"]], row["counters"][key])
        yield counter
    refused = CounterMetricFamily(
        "crossway_upstream_refused", "Times that a request got no place, no connection or no endpoint.", labels=["upstream", "reason"]
    )
    for row in rows:
        for reason, key in REFUSED.items():
            refused.add_metric([row["name"], reason], row["counters"][key])
    yield refused


def _endpoint_metrics(rows: list[Row]) -> Iterator[Metric]:
    available = GaugeMetricFamily("crossway_endpoint_available", "1 while the endpoint is given requests.", labels=ENDPOINT)
    ejected = GaugeMetricFamily(
        "crossway_endpoint_ejected_seconds", "How long the endpoint stays ejected; 0 when it is not.", labels=ENDPOINT
    )
    active = GaugeMetricFamily("crossway_endpoint_requests_in_flight", "Requests in flight at the endpoint.", labels=ENDPOINT)
    latency = GaugeMetricFamily(
        "crossway_endpoint_latency_ewma_seconds", "Latency as the balancer sees it, the mean of the workers.", labels=ENDPOINT
    )
    attempts = CounterMetricFamily(
        "crossway_endpoint_attempts", "Attempts at the endpoint by how they ended.", labels=[*ENDPOINT, "outcome"]
    )
    for row in rows:
        labels = [row["upstream"], row["address"]]
        available.add_metric(labels, int(row["state"] == "up"))
        ejected.add_metric(labels, row["ejected_for_us"] / 1e6)
        active.add_metric(labels, row["in_flight"])
        if row["ewma_us"] is not None:
            latency.add_metric(labels, row["ewma_us"] / 1e6)
        for outcome in OUTCOME_NAMES:
            attempts.add_metric([*labels, outcome], row["counters"][outcome])
    yield from (available, ejected, active, latency, attempts)
    for name, (text, key) in ENDPOINT_COUNTERS.items():
        counter = CounterMetricFamily(f"crossway_endpoint_{name}", text, labels=ENDPOINT)
        for row in rows:
            counter.add_metric([row["upstream"], row["address"]], row["counters"][key])
        yield counter


def _limit(row: Row) -> int:
    return int(row["adaptive_limit"] or row["limit"])


def report(shared: SharedState) -> list[Row]:
    """Every upstream with its endpoints, by name: plain JSON types. Counters count since the gateway started."""
    upstreams, endpoints = shared.upstream_rows()
    by_upstream: dict[str, list[Row]] = {}
    for endpoint in sorted(endpoints, key=lambda row: str(row["address"])):
        by_upstream.setdefault(str(endpoint["upstream"]), []).append(_endpoint(endpoint))
    return [_upstream(row, by_upstream.get(str(row["name"]), [])) for row in sorted(upstreams, key=lambda row: str(row["name"]))]


def _upstream(row: Row, endpoints: list[Row]) -> Row:
    counters = row["counters"]
    return {
        "name": row["name"],
        "in_flight": row["in_flight"],
        "limit": row["limit"],
        "adaptive_limit": row["adaptive_limit"],
        "min_rtt_seconds": None if row["min_rtt_us"] is None else row["min_rtt_us"] / 1e6,
        "queued": row["queued"],
        "connections": row["connections"],
        "retry_budget": row["budget_left"],
        # A request counts when it begins and is judged when it ends.
        "effective": _share(counters["successes"], counters["requests"] - row["in_flight"]),
        "actual": _share(counters["attempt_successes"], counters["attempts"]),
        "counters": counters,
        "endpoints": endpoints,
    }


def _endpoint(row: Row) -> Row:
    counters = row["counters"]
    return {
        "address": row["address"],
        "target": row["target"] or None,
        "zone": row["zone"] or None,
        "weight": row["weight"],
        "state": row["state"],
        "check": row["active"],
        "ejected_for_seconds": row["ejected_for_us"] / 1e6,
        "in_flight": row["in_flight"],
        "ewma_seconds": None if row["ewma_us"] is None else row["ewma_us"] / 1e6,
        "attempts": sum(counters[outcome] for outcome in OUTCOME_NAMES),
        "failures": sum(counters[outcome] for outcome in ("connect", "reset", "timeout", "status")),
        "last_ten_seconds": {"good": row["window"][0], "failed": row["window"][1]},
        "counters": counters,
    }


def _share(part: int, whole: int) -> float | None:
    """A share from 0 to 1; None of nothing. Counters are read one after the other, so the part may be ahead by a few."""
    return round(min(part / whole, 1.0), 6) if whole > 0 else None
