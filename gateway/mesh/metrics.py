"""What a member tells Prometheus: each hop by source and destination, in the names and labels that boards for Istio know, and the mesh's own.

Strategy: the engine counts per route, and a sidecar's routes are its callers and its destinations, so the labels are in the routes'
names and nothing is counted twice. Text format 0.0.4, written here: a sidecar holds no metrics library in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from gateway.mesh.authorization import Denials
from gateway.mesh.egress import EXTERNAL
from gateway.mesh.identity import Identity
from gateway.mesh.link import Link
from gateway.mesh.proxy import INBOUND, OUTBOUND

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS_US = (50, 100, 250, 500, 1000, 2500, 5000, 10000, 25000, 50000, 75000, 100000, 250000, 500000, 750000, 1000000, 2500000,
             5000000, 7500000, 10000000)  # fmt: skip
UNKNOWN = "unknown"
# What cannot be said of an external host.
NOT_OURS = ("destination_workload_namespace", "destination_principal", "destination_cluster", "destination_service_namespace")


def line(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"  # all digits: six of them would let large counters stand still


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def family(name: str, kind: str, text: str, samples: Iterable[str]) -> list[str]:
    found = list(samples)
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *found] if found else []


def hop(route: str, service: str, domain: str, version: str = "") -> dict[str, str] | None:
    """The labels of a sidecar's route; None for a route that is no hop. `version` is the sidecar's own."""
    side, _, other = route.partition(">")
    if side == EXTERNAL:
        return labels("source", service, other, domain, (version, "")) | dict.fromkeys(NOT_OURS, UNKNOWN)
    if side not in (INBOUND, OUTBOUND) or not other:
        return None
    if side == INBOUND:
        return labels("destination", other, service, domain, (UNKNOWN, version))
    other, _, part = other.partition(">")
    return labels("source", service, other, domain, (version, part))


def labels(reporter: str, source: str, destination: str, domain: str, versions: tuple[str, str] = ("", "")) -> dict[str, str]:
    """What Istio's standard metrics say of a hop between two services of a trust domain; `versions` are theirs, where known."""
    source_version, destination_version = (each or UNKNOWN for each in versions)

    def principal(name: str) -> str:
        return UNKNOWN if name in (UNKNOWN, "others") else name if "://" in name else f"spiffe://{domain}/service/{name}"

    return {
        "reporter": reporter,
        "source_workload": source, "source_workload_namespace": domain, "source_principal": principal(source), "source_app": source,
        "source_canonical_service": source, "source_version": source_version, "source_cluster": domain,
        "destination_workload": destination, "destination_workload_namespace": domain, "destination_principal": principal(destination),
        "destination_app": destination, "destination_canonical_service": destination, "destination_version": destination_version,
        "destination_cluster": domain, "destination_service": destination, "destination_service_name": destination,
        "destination_service_namespace": domain, "request_protocol": "http", "grpc_response_status": "",
        "connection_security_policy": "mutual_tls" if reporter == "destination" else UNKNOWN,
    }  # fmt: skip


FLAGS = {503: "UF", 504: "UT", 499: "DC"}  # Envoy's words for why, as far as the status tells


def istio(memory: Any, labels_of: Callable[[str], dict[str, str] | None]) -> Iterator[str]:
    """istio_requests_total, istio_request_duration_milliseconds, istio_request_bytes and istio_response_bytes; by route's name."""
    totals: dict[tuple[tuple[str, str], ...], list[Any]] = {}
    for route, _method, status, buckets, sum_us, request, response in memory.total().series():
        found = labels_of(memory.route_name(route))
        if found is not None:
            found |= {"response_code": str(status), "response_flags": FLAGS.get(status, "-")}
            kept = totals.setdefault(tuple(found.items()), [[0] * len(buckets), 0, 0, 0])
            kept[0] = [a + b for a, b in zip(kept[0], buckets, strict=True)]
            for index, value in enumerate((sum_us, request, response), 1):
                kept[index] += value
    rows = [(dict(key), *values) for key, values in totals.items()]
    yield from family("istio_requests_total", "counter", "Requests by source, destination and outcome.",
                      (line("istio_requests_total", labels, sum(buckets)) for labels, buckets, *_ in rows))  # fmt: skip
    yield from family("istio_request_duration_milliseconds", "histogram", "How long they took.",
                      (each for labels, buckets, sum_us, *_ in rows for each in _histogram(labels, buckets, sum_us)))  # fmt: skip
    for index, name, text in ((3, "istio_request_bytes", "Their bodies."), (4, "istio_response_bytes", "The answers' bodies.")):
        yield from family(name, "summary", text, (
            each for row in rows for each in (line(f"{name}_sum", row[0], row[index]), line(f"{name}_count", row[0], sum(row[1])))
        ))  # fmt: skip


def _histogram(labels: Mapping[str, str], buckets: list[int], sum_us: int) -> Iterator[str]:
    name, count = "istio_request_duration_milliseconds", 0
    for bound, number in zip((*BOUNDS_US, None), buckets, strict=True):
        count += number
        yield line(f"{name}_bucket", {**labels, "le": "+Inf" if bound is None else f"{bound / 1000:g}"}, count)
    yield line(f"{name}_sum", labels, sum_us / 1000)
    yield line(f"{name}_count", labels, count)


def istio_tcp(memory: Any, labels_of: Callable[[str], dict[str, str] | None]) -> Iterator[str]:
    """istio_tcp_connections_opened_total, ..._closed_total, istio_tcp_sent_bytes_total and istio_tcp_received_bytes_total; by target's name."""
    totals: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for metric, opened, _ends, bytes_in, bytes_out, _failures, _duration, closed in memory.total().tcp_series():
        found = labels_of(memory.route_name(metric))
        if found is not None:
            del found["grpc_response_status"]
            found |= {"request_protocol": "tcp", "response_flags": "-"}
            kept = totals.setdefault(tuple(found.items()), [0, 0, 0, 0])
            for index, value in enumerate((opened, closed, bytes_out, bytes_in)):
                kept[index] += value
    for index, (name, text) in enumerate((
        ("istio_tcp_connections_opened_total", "Raw TCP connections by source and destination that reached it."),
        ("istio_tcp_connections_closed_total", "Those of them that ended."),
        ("istio_tcp_sent_bytes_total", "Bytes that went to their callers."),
        ("istio_tcp_received_bytes_total", "Bytes that came from their callers."),
    )):  # fmt: skip
        yield from family(name, "counter", text, (line(name, dict(key), values[index]) for key, values in totals.items()))


def tunnels(slot: Any, name_of: Callable[[int], str]) -> Iterator[str]:
    """WebSockets, in the words of an edge; the routes are `inbound` and `outbound>SERVICE`."""
    one = [("crossway_tunnels_total", "counter", "WebSockets that were opened.", slot.counter("tunnels")),
           ("crossway_tunnels_refused_total", "counter", "WebSockets refused because their service had as many as it may.", slot.counter("tunnels_refused")),
           ("crossway_tunnels_open", "gauge", "WebSockets that are open.", slot.gauge("tunnels"))]  # fmt: skip
    yield from numbers(one)
    for name, text, label, counters in (
        ("crossway_tunnels_ended_total", "WebSockets that the sidecar ended.", "cause", {"idle": "tunnels_idle", "cut": "tunnels_cut"}),
        ("crossway_tunnel_bytes_total", "Bytes that passed through WebSockets: in from clients, out to them.", "direction",
         {"in": "tunnel_bytes_in", "out": "tunnel_bytes_out"}),
    ):  # fmt: skip
        yield from family(name, "counter", text, (line(name, {label: key}, slot.counter(counter)) for key, counter in counters.items()))
    name = "crossway_route_tunnels_open"
    yield from family(name, "gauge", "WebSockets that are open or asked for, by way.", (
        line(name, {"http_route": name_of(route)}, count) for route, count in slot.tunnels()
    ))  # fmt: skip


def denied(denials: Denials) -> Iterator[str]:
    """Denials, real and supposed, by caller, rule and policy version."""
    for audit, name, text in (
        (False, "crossway_mesh_denied_total", "Calls that no rule allowed."),
        (True, "crossway_mesh_would_deny_total", "Calls that passed in audit mode and would have been denied."),
    ):
        yield from family(name, "counter", text, (
            line(name, {"caller": caller, "rule": rule, "policy": str(version)}, count)
            for (caller, rule, version, audited), count in denials.counts.items() if audited is audit
        ))  # fmt: skip


def membership(identity: Identity, link: Link) -> list[tuple[str, str, str, float]]:
    """How a member's certificate and its stream are."""
    held, ahead = identity.svid, identity.clock.ahead()
    clock = [] if ahead is None else [("crossway_mesh_clock_ahead_seconds", "gauge", "By what this machine's clock is ahead of the control plane's.", ahead)]
    return [
        *clock,
        ("crossway_mesh_certificate_not_after_timestamp_seconds", "gauge", "When the certificate ends.", held.leaf.not_after if held else 0),
        ("crossway_mesh_certificate_alarm", "gauge", "0 renewed in time, 1 late (60 % of its life over), 2 urgent (30 % left).", identity.alarm),
        ("crossway_mesh_certificate_renewals_total", "counter", "Certificates that took the place of another.", identity.renewals),
        ("crossway_mesh_certificate_failures_total", "counter", "Attempts to get a certificate that failed.", identity.failed),
        ("crossway_mesh_control_connected", "gauge", "1 while the stream of the control plane is open.", link.connected),
        ("crossway_mesh_control_connects_total", "counter", "Times that it was opened.", link.connects),
        ("crossway_mesh_assignment_version", "gauge", "The assignment in force.", link.current.version if link.current else 0),
        ("crossway_mesh_assignments_refused_total", "counter", "Assignments that were not taken.", link.refused),
        ("crossway_mesh_assignment_overdue_seconds", "gauge", "How long the assignment is older than it should get.", link.age() or 0),
    ]  # fmt: skip


def numbers(rows: Iterable[tuple[str, str, str, float]]) -> Iterator[str]:
    """Single values: (name, kind, help, value)."""
    for name, kind, text, value in rows:
        yield from family(name, kind, text, [f"{name} {value:.17g}"])
