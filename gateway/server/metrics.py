"""What the admin process tells of the shared memory: the exposition for Prometheus and a worker's own counters.

Strategy: the collectors read the shared memory and the supervisor's last state at each scrape and keep nothing. Classic text
or OpenMetrics is chosen by the Accept header, as prometheus_client does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gateway.server.channel import Message
from gateway.telemetry.prometheus import ConfigState, SharedCollector
from gateway.telemetry.shared import SharedState


class ProcessCollector(Collector):
    """What only the supervisor knows: how many workers it wants, and how often it had to replace one."""

    def __init__(self, state: Message) -> None:
        self._state = state

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        workers = self._state["workers"]
        yield GaugeMetricFamily("crossway_workers_wanted", "Workers of the configuration in force.", value=len(workers))
        ready = sum(worker["state"] == "ready" for worker in workers)
        yield GaugeMetricFamily("crossway_workers_ready", "Workers that take requests.", value=ready)
        restarts = CounterMetricFamily("crossway_worker_restarts", "Workers replaced because they died or hung.")
        restarts.add_metric([], self._state["restarts"])
        yield restarts
        expiry = GaugeMetricFamily(
            "crossway_certificate_not_after_timestamp_seconds",
            "When a certificate in use ends, in seconds since 1970.",
            labels=["owner", "subject", "file"],
        )
        for each in self._state["certificates"]:
            expiry.add_metric([each["owner"], each["subject"], each["file"]], each["not_after"])
        yield expiry


def exposition(memory: SharedState, state: Message, accept: str, by_worker: bool) -> tuple[bytes, str]:
    """Return (body, content type) of a scrape."""
    config = ConfigState(
        version=state["config"]["version"],
        hash=state["config"]["hash"],
        last_reload_success=state["reload"]["ok"],
        last_reload_timestamp=state["config"]["loaded"],
    )
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SharedCollector(memory, lambda: config, by_worker=by_worker))
    registry.register(ProcessCollector(state))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def worker_counters(memory: SharedState, slot: int) -> dict[str, int]:
    """Return what a worker has counted since it started."""
    counted = memory.slot(slot)
    return {
        "requests": counted.counter("requests"),
        "connections": counted.gauge("connections"),
        "exchanges": counted.gauge("exchanges"),
        "resident_bytes": counted.gauge("rss"),
    }
