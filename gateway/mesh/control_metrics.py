"""What the control plane counts, for Prometheus.

Strategy: counters are kept where things happen, everything that can be looked at (who is there, what ends when) is read when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from gateway.mesh.control import ControlPlane

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The metrics of one control plane."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "crossway_control"}
        self.issued = Counter("certificates_issued", "Certificates by service and by how they were asked for", ("service", "how"), **own)  # type: ignore[arg-type]
        self.refusals = Counter("requests_refused", "Requests for certificates that got none, by reason", ("reason",), **own)  # type: ignore[arg-type]
        self.pushes = Counter("pushes", "Assignments and deltas that were sent", **own)  # type: ignore[arg-type]
        self.push_bytes = Counter("push_bytes", "Their bytes", **own)  # type: ignore[arg-type]
        self.answers = Counter("answers", "What members made of them", ("answer",), **own)  # type: ignore[arg-type]
        self.seconds = Histogram("push_seconds", "From sending an assignment to its acknowledgement", buckets=SECONDS, **own)  # type: ignore[arg-type]
        self.probes = Counter("probes", "Looks whether an instance can be reached", ("outcome",), **own)  # type: ignore[arg-type]
        self.reloads = Counter("file_reloads", "Changes of the mesh's file", ("outcome",), **own)  # type: ignore[arg-type]
        self.registry.register(self)

    def pushed(self, size: int) -> None:
        self.pushes.inc()
        self.push_bytes.inc(size)

    def answered(self, seconds: float, good: bool) -> None:
        self.answers.labels("ack" if good else "nack").inc()
        if good:
            self.seconds.observe(seconds)

    def probed(self, reached: bool) -> None:
        self.probes.labels("reached" if reached else "failed").inc()

    def describe(self) -> list[Metric]:
        """Nothing is asked while the registry is made."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield what is looked at now."""
        plane = self.plane
        instances = GaugeMetricFamily("crossway_control_instances", "Instances in the registry", labels=("service", "state"))
        counts: dict[tuple[str, str], int] = {}
        for row in plane.registry.rows:
            counts[row["service"], row["state"]] = counts.get((row["service"], row["state"]), 0) + 1
        for labels, count in sorted(counts.items()):
            instances.add_metric(labels, count)
        yield instances
        yield GaugeMetricFamily("crossway_control_streams", "Open streams", value=len(plane.hub.streams))
        spared = GaugeMetricFamily("crossway_control_probe_spared", "Services of which too many instances cannot be reached: none is taken out", labels=("service",))
        for service in sorted({row["service"] for row in plane.registry.rows}):
            spared.add_metric((service,), int(service in plane.registry.spared))
        yield spared
        yield GaugeMetricFamily("crossway_control_policy_version", "Version of the authorization", value=plane.policy)
        yield GaugeMetricFamily("crossway_control_revoked", "Entries of the deny list", value=len(plane.deny.serials) + len(plane.deny.identities))
        yield GaugeMetricFamily("crossway_control_store_up", "1 when the state can be used", value=0 if plane.store_error else 1)
        yield GaugeMetricFamily("crossway_control_file_valid", "1 when the mesh's file on disk is in force", value=0 if plane.file_error else 1)
        behind = sum(1 for each in plane.hub.streams.values() if (now := plane.assignments.current(each.scope)) is not None and each.have != now.version)
        yield GaugeMetricFamily("crossway_control_streams_behind", "Streams that have not acknowledged the newest assignment", value=behind)
        ends = GaugeMetricFamily("crossway_control_authority_not_after_timestamp_seconds", "When a signing certificate ends", labels=("generation", "which"))
        for number, which, when in plane.ca.ends():
            ends.add_metric((str(number), which), when)
        yield ends
