"""What Prometheus sees of raw TCP: connections, how they ended, and their bytes, by listener and upstream.

Strategy: a connection is counted under the pair of listener and upstream, or under its listener alone when it reached none; the
names lie among those of the routes, told apart by a colon that no route's name holds.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from gateway._speedups.histogram import OVERFLOW, TCP_ENDS, WorkerSlot
from gateway.telemetry.shared import SharedState

_MARK = "tcp:"
Slots = list[tuple[str, WorkerSlot]]


def is_tcp(shared: SharedState, metric: int) -> bool:
    """Tell whether a metric's id is that of a TCP listener rather than of a route."""
    return metric != OVERFLOW and shared.route_name(metric).startswith(_MARK)


def _labels(shared: SharedState, metric: int) -> list[str]:
    if metric == OVERFLOW:
        return ["_OVERFLOW", ""]
    listener, _, upstream = shared.route_name(metric).removeprefix(_MARK).partition(">")
    return [listener, upstream]


def counters(shared: SharedState, slots: Slots, by_worker: bool) -> Iterator[Metric]:
    """Yield the families of what was counted; none while there was no connection."""
    worker = ["worker"] if by_worker else []
    names = [*worker, "listener", "upstream"]
    opened = CounterMetricFamily("crossway_tcp_connections_opened", "Raw TCP connections that reached their upstream.", labels=names)
    ended = CounterMetricFamily(
        "crossway_tcp_connections_ended", "Raw TCP connections that ended or were refused, by why.", labels=[*names, "reason"]
    )
    passed = CounterMetricFamily(
        "crossway_tcp_bytes", "Bytes that passed through raw TCP connections: in from clients, out to them.", labels=[*names, "direction"]
    )
    failures = CounterMetricFamily(
        "crossway_tcp_connect_failures", "Attempts to connect to an endpoint that failed; another one may have been tried.", labels=names
    )
    seconds = CounterMetricFamily("crossway_tcp_connection_seconds", "How long the connections that ended had lasted.", labels=names)
    for name, slot in slots:
        for metric, count, ends, bytes_in, bytes_out, failed, duration_us, _closed in slot.tcp_series():
            values = [*([name] if by_worker else []), *_labels(shared, metric)]
            if count or failed or values[-1]:
                opened.add_metric(values, count)
                failures.add_metric(values, failed)
                passed.add_metric([*values, "in"], bytes_in)
                passed.add_metric([*values, "out"], bytes_out)
            seconds.add_metric(values, duration_us / 1e6)
            for reason, number in zip(TCP_ENDS, ends, strict=True):
                if number:
                    ended.add_metric([*values, reason], number)
    yield from (family for family in (opened, ended, passed, failures, seconds) if family.samples)


def gauges(shared: SharedState, alive: Slots, by_worker: bool) -> Iterator[Metric]:
    """Yield how many are open now."""
    labels = [*(["worker"] if by_worker else []), "listener", "upstream"]
    found: dict[tuple[str, ...], int] = {}
    for name, slot in alive:
        for metric, count in slot.tunnels():
            if is_tcp(shared, metric) and (values := _labels(shared, metric))[1]:
                key = (*([name] if by_worker else []), *values)
                found[key] = found.get(key, 0) + count
    if found:
        family = GaugeMetricFamily("crossway_tcp_connections_open", "Raw TCP connections that are open or being connected.", labels=labels)
        for key, count in found.items():
            family.add_metric(list(key), count)
        yield family
