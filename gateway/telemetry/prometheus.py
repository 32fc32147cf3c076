"""The Prometheus collector: one answer for all workers, read from shared memory at each scrape.

Strategy: sum every slot and the retired one, then name the sums: OpenTelemetry's HTTP names in Prometheus spelling, the
gateway's own under crossway_. Nothing is kept between scrapes, so any process that has the mapping gives the same answer,
and a histogram's count is the sum of its buckets by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gateway._speedups.histogram import CLASSIC_BOUNDS_US, COUNTER_NAMES, OVERFLOW, WorkerSlot
from gateway.telemetry import tcp, upstreams
from gateway.telemetry.shared import SharedState

# The order of headers.pxd's Method; unknown methods are "_OTHER" (OpenTelemetry, http.request.method).
METHODS = ("_OTHER", "GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT")
BOUNDS = [*(repr(bound / 1e6) for bound in CLASSIC_BOUNDS_US), "+Inf"]
SERIES_LABELS = ["http_request_method", "http_route", "http_response_status_code"]


@dataclass(frozen=True, slots=True)
class ConfigState:
    """What the metrics say about the configuration."""

    version: int
    hash: str
    last_reload_success: bool
    last_reload_timestamp: float        # seconds since 1970 of the last successful load


@dataclass(frozen=True, slots=True)
class _Total:
    """How one slot counter is exported."""

    name: str
    help: str
    label: tuple[str, str] | None = None
    factor: float = 1


def _grouped(name: str, help: str, label: str, **values: str) -> dict[str, _Total]:
    return {counter: _Total(name, help, (label, value)) for counter, value in values.items()}


COUNTERS: dict[str, _Total] = {
    "connections_accepted": _Total("connections_accepted", "Client connections accepted."),
    "connections_closed": _Total("connections_closed", "Client connections closed."),
    "requests": _Total("requests", "Requests whose head was read completely."),
    "responses_local": _Total("responses_local", "Responses made by the gateway itself."),
    "bad_requests": _Total("bad_requests", "Requests refused because their syntax or framing is not valid."),
    **_grouped("downstream_timeouts", "Client connections that ran into a deadline.", "phase", timeouts_head="head",
               timeouts_body="body", timeouts_idle="idle", timeouts_write="write"),
    "client_aborts": _Total("client_aborts", "Exchanges whose client went away before the response was sent."),
    "upstream_connects": _Total("upstream_connects", "Connections to upstreams that were started."),
    "upstream_connect_failures": _Total("upstream_connect_failures", "Connections to upstreams that failed."),
    "upstream_reused": _Total("upstream_reused", "Requests sent on a kept-alive upstream connection."),
    "upstream_discarded": _Total("upstream_discarded", "Upstream connections closed instead of kept for reuse."),
    "upstream_timeouts": _Total("upstream_timeouts", "Exchanges whose upstream ran into a deadline."),
    "upstream_bad": _Total("upstream_bad", "Upstream responses refused because their syntax or framing is not valid."),
    "upstream_resets": _Total("upstream_resets", "Upstream connections lost during an exchange."),
    "retries": _Total("retries", "Requests sent to an upstream a second time."),
    "bytes_in": _Total("received_bytes", "Bytes received from clients."),
    "bytes_out": _Total("sent_bytes", "Bytes sent to clients."),
    "upstream_bytes_in": _Total("upstream_received_bytes", "Bytes received from upstreams."),
    "upstream_bytes_out": _Total("upstream_sent_bytes", "Bytes sent to upstreams."),
    **_grouped("tokens", "Bearer tokens seen: verified from the cache, verified anew, refused.", "result",
               token_hits="cached", token_misses="verified", token_refused="refused"),
    "limited": _Total("rate_limited", "Requests refused by a rate limit."),
    "limit_table_full": _Total("rate_limit_table_full", "Rate-limit decisions without a free slot in the table."),
    **_grouped("limit_without_redis", "Requests whose limit over several gateways was decided without Redis.", "decision",
               limit_local="local", limit_denied="deny", limit_allowed="allow"),
    "limit_leases": _Total("limit_leases", "Leases of tokens taken from Redis in advance."),
    "limit_leased": _Total("limit_leased_tokens", "Tokens taken from Redis in advance."),
    "limit_returned": _Total("limit_returned_tokens", "Leased tokens given back to Redis unspent."),
    "limit_waits": _Total("limit_waits", "Requests that waited for an answer of Redis about a limit."),
    "limit_wait_us": _Total("limit_wait_seconds", "Time that requests waited for Redis.", factor=1e-6),
    "lease_table_full": _Total("lease_table_full", "Callers for whom there was no room in the table of leases."),
    "redis_trips": _Total("redis_round_trips", "Round trips to Redis."),
    "redis_commands": _Total("redis_commands", "Scripts that Redis was asked to run."),
    "redis_errors": _Total("redis_errors", "Errors and timeouts of Redis, attempts to come back included."),
    "audit_records": _Total("audit_records", "Audit records accepted for writing."),
    "audit_lost": _Total("audit_records_lost", "Audit records lost because the buffer was full."),
    "hooks": _Total("hooks", "Calls of Python policies."),
    "hook_errors": _Total("hook_errors", "Calls of Python policies that raised."),
    "hook_timeouts": _Total("hook_timeouts", "Calls of Python policies that took too long."),
    **_grouped("mirrored_requests", "Copies of requests for mirrors: how they were answered, or why they were not.", "result",
               mirrored_2xx="2xx", mirrored_3xx="3xx", mirrored_4xx="4xx", mirrored_5xx="5xx", mirror_failed="failed",
               mirror_dropped="dropped", mirror_skipped="skipped"),
    **_grouped("faults_injected", "Requests delayed or answered by a fault policy.", "fault", fault_delays="delay",
               fault_aborts="abort"),
    "accept_paused": _Total("accept_paused", "Times that accepting was paused (connection limit or descriptors)."),
    "loop_polls": _Total("loop_polls", "Times that a worker collected events."),
    "loop_events": _Total("loop_events", "Events that workers collected."),
    "retries_denied": _Total("retries_denied", "Further attempts that the retry budget did not allow."),
    "hedges": _Total("hedges", "Second requests sent because the first one took long."),
    "orphans": _Total("orphaned_exchanges", "Exchanges that were finished after their client had left."),
    "upstream_overloaded": _Total("upstream_overloaded", "Requests refused because the upstream's queue was full."),
    "upstream_queue_timeouts": _Total("upstream_queue_timeouts", "Requests refused because no place at the upstream became free."),
    "lookups": _Total("lookups", "Names that workers asked for to find endpoints."),
    "lookup_failures": _Total("lookup_failures", "Of these, the ones that led to nothing: the last good answer stayed."),
    "files_rejected": _Total("endpoint_files_rejected", "Versions of watched files of endpoints that could not be used."),
    "tls_handshakes": _Total("tls_handshakes", "TLS handshakes with clients that were completed."),
    "tls_resumed": _Total("tls_sessions_resumed", "TLS handshakes with clients that resumed a session."),
    **_grouped("tls_handshake_failures", "TLS handshakes with clients that came to nothing.", "cause", tls_failed="failed",
               tls_timeouts="timeout", tls_evicted="evicted"),
    "upstream_tls_handshakes": _Total("upstream_tls_handshakes", "TLS handshakes with upstreams that were completed."),
    "upstream_tls_resumed": _Total("upstream_tls_sessions_resumed", "TLS handshakes with upstreams that resumed a session."),
    "upstream_tls_failures": _Total("upstream_tls_failures", "TLS handshakes with upstreams that failed."),
    "tunnels": _Total("tunnels", "WebSockets that were opened."),
    "tunnels_refused": _Total("tunnels_refused", "WebSockets refused because their route had as many as it may."),
    **_grouped("tunnels_ended", "WebSockets that the gateway ended.", "cause", tunnels_idle="idle",
               tunnels_expired="expired", tunnels_cut="cut"),
    **_grouped("tunnel_bytes", "Bytes that passed through WebSockets: in from clients, out to them.", "direction",
               tunnel_bytes_in="in", tunnel_bytes_out="out"),
    "h2_connections": _Total("http2_connections", "HTTP/2 connections of clients."),
    "h2_streams": _Total("http2_streams", "HTTP/2 streams that were opened, by clients and to upstreams."),
    "h2_refused": _Total("http2_streams_refused", "HTTP/2 streams refused because their connection had as many as it may."),
    **_grouped("http2_resets", "HTTP/2 streams given up: in by the other side, out by the gateway.", "direction",
               h2_resets_in="in", h2_resets_out="out"),
    "h2_malformed": _Total("http2_malformed", "HTTP/2 messages that were no HTTP."),
    "h2_frames_empty": _Total("http2_empty_frames", "HTTP/2 frames that carried nothing: paid from a budget."),
    "h2_errors": _Total("http2_connection_errors", "HTTP/2 connections that the gateway ended with an error."),
    "h2_calmed": _Total("http2_floods", "HTTP/2 connections ended because their client flooded the gateway."),
    "upstream_h2_connections": _Total("upstream_http2_connections", "HTTP/2 connections made to upstreams."),
    "upstream_h2_pings": _Total("upstream_http2_pings", "PINGs sent to find out whether an upstream's HTTP/2 connection is alive."),
    "upstream_h2_silent": _Total("upstream_http2_silent_connections", "HTTP/2 connections to upstreams that were ended because they did not answer."),
    "series_overflow": _Total("metrics_overflow", "Observations counted in the overflow series."),
}
assert COUNTERS.keys() == set(COUNTER_NAMES)

SUMMED_GAUGES = {
    "connections": ("connections", "Open client connections."),
    "exchanges": ("exchanges", "Requests in flight."),
    "parked": ("exchanges_parked", "Requests that wait for Python."),
    "buffers": ("buffers", "Blocks of memory that connections hold for bytes under way."),
    "tunnels": ("tunnels_open", "WebSockets that are open."),
    "tls_handshakes": ("tls_handshakes_in_flight", "TLS handshakes with clients that are under way."),
    "descriptors": ("descriptors", "Sockets that the workers watch: listening, clients' and upstreams'."),
}
WORKER_GAUGES = {
    "config_version": ("config_version", "The configuration that the worker runs.", 1.0),
    "ready": ("ready", "1 while the worker takes requests.", 1.0),
    "draining": ("draining", "1 while the worker finishes its last requests.", 1.0),
    "cpu_us": ("cpu_seconds", "Processor time of the worker since it started.", 1e-6),
    "started": ("start_time_seconds", "When the worker started, in seconds since 1970.", 1.0),
    "rss": ("resident_memory_bytes", "Resident memory of the worker.", 1.0),
    "limit_wait_max_us": ("limit_wait_max_seconds", "The longest that a request has waited for Redis since the worker started.", 1e-6),
}


class _Sums(dict[tuple[str, ...], tuple[tuple[int, ...], list[int]]]):
    """Buckets and sums by label values. A route with several upstreams has a series for each; for its own they are added up."""

    def add(self, key: tuple[str, ...], buckets: tuple[int, ...], sums: list[int]) -> None:
        if key in self:
            before, others = self[key]
            buckets = tuple(a + b for a, b in zip(before, buckets, strict=True))
            sums = [a + b for a, b in zip(others, sums, strict=True)]
        self[key] = buckets, sums


class SharedCollector(Collector):
    """Metrics of all workers, for a prometheus_client registry.

    config: returns what is known about the configuration, None before the first load. by_worker: one series per running
    worker, and worker="retired" for the sum of the ended ones, instead of their sum.
    """

    def __init__(
        self, shared: SharedState, config: Callable[[], ConfigState | None] = lambda: None, *, by_worker: bool = False
    ) -> None:
        self._shared = shared
        self._config = config
        self._by_worker = by_worker

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering the collector must not read the slots."""
        return []

    def collect(self) -> Iterator[Metric]:
        if self._by_worker:
            named = [(str(index), self._shared.slot(index)) for index in range(self._shared.workers)]
            yield from self._slots([*named, ("retired", self._shared.retired)])
        else:
            yield from self._slots([("", self._shared.total())])
        yield from self._gauges()
        yield from upstreams.metrics(self._shared)
        yield from self._config_metrics()

    def _slots(self, slots: list[tuple[str, WorkerSlot]]) -> Iterator[Metric]:
        yield from self._counters(slots)
        yield from self._series(slots)
        yield self._overhead(slots)
        yield from tcp.counters(self._shared, slots, self._by_worker)

    def _names(self, labels: list[str]) -> list[str]:
        return ["worker", *labels] if self._by_worker else labels

    def _values(self, worker: str, values: list[str]) -> list[str]:
        return [worker, *values] if self._by_worker else values

    def _counters(self, slots: list[tuple[str, WorkerSlot]]) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily] = {}
        for counter, total in COUNTERS.items():
            if total.name not in families:
                labels = self._names([total.label[0]] if total.label else [])
                families[total.name] = CounterMetricFamily(f"crossway_{total.name}", total.help, labels=labels)
            for worker, slot in slots:
                values = self._values(worker, [total.label[1]] if total.label else [])
                families[total.name].add_metric(values, slot.counter(counter) * total.factor)
        yield from families.values()

    def _route(self, route: int) -> tuple[str, str]:
        """A route's name, and of what it sent to one of several upstreams that upstream's."""
        if route == OVERFLOW:
            return "_OVERFLOW", ""
        name, _, upstream = self._shared.route_name(route).partition(">")
        return name, upstream

    def _series(self, slots: list[tuple[str, WorkerSlot]]) -> Iterator[Metric]:
        labels = self._names(SERIES_LABELS)
        duration = HistogramMetricFamily(
            "http_server_request_duration_seconds", "Time from a request's first byte to its response's last.", labels=labels
        )
        request = SummaryMetricFamily("http_server_request_body_size_bytes", "Request bodies received.", labels=labels)
        response = SummaryMetricFamily("http_server_response_body_size_bytes", "Response bodies sent.", labels=labels)
        chosen = HistogramMetricFamily(
            "crossway_route_upstream_request_duration_seconds",
            "The same time, of requests whose route chose among several upstreams, by the upstream that it chose.",
            labels=self._names(["http_route", "upstream", "http_response_status_code"]),
        )
        for worker, slot in slots:
            served, sent = _Sums(), _Sums()
            for route, method, status, buckets, *sums in slot.series():
                known = METHODS[method] if method < len(METHODS) else METHODS[0]
                name, upstream = self._route(route)
                served.add((known, name, str(status)), buckets, sums)
                if upstream:
                    sent.add((name, upstream, str(status)), buckets, sums)
            for key, (buckets, (sum_us, request_bytes, response_bytes)) in served.items():
                values = self._values(worker, list(key))
                cumulated, count = _cumulated(buckets)
                duration.add_metric(values, cumulated, sum_us / 1e6)
                request.add_metric(values, count, request_bytes)
                response.add_metric(values, count, response_bytes)
            for key, (buckets, (sum_us, *_)) in sent.items():
                chosen.add_metric(self._values(worker, list(key)), _cumulated(buckets)[0], sum_us / 1e6)
        yield from (duration, request, response)
        if chosen.samples:
            yield chosen

    def _overhead(self, slots: list[tuple[str, WorkerSlot]]) -> Metric:
        overhead = HistogramMetricFamily(
            "crossway_gateway_overhead_seconds",
            "Time of a request that was not spent waiting for its upstream.",
            labels=self._names(["http_route"]),
        )
        for worker, slot in slots:
            spent = _Sums()
            for route, _total, _bins, buckets, sum_us in slot.routes():
                spent.add((self._route(route)[0],), buckets, [sum_us])
            for key, (buckets, (sum_us,)) in spent.items():
                overhead.add_metric(self._values(worker, list(key)), _cumulated(buckets)[0], sum_us / 1e6)
        return overhead

    def _gauges(self) -> Iterator[Metric]:
        alive = [(str(index), self._shared.slot(index)) for index in self._shared.alive()]
        yield GaugeMetricFamily("crossway_workers", "Workers that run.", value=len(alive))
        labels = self._names([])
        for gauge, (name, text) in SUMMED_GAUGES.items():
            family = GaugeMetricFamily(f"crossway_{name}", text, labels=labels)
            for values, value in self._summed(alive, gauge, []):
                family.add_metric(values, value)
            yield family
        yield self._tunnels(alive)
        yield from tcp.gauges(self._shared, alive, self._by_worker)
        upstream = GaugeMetricFamily("crossway_upstream_connections", "Upstream connections.", labels=self._names(["state"]))
        for gauge, state in (("upstream_active", "active"), ("upstream_idle", "idle")):
            for values, value in self._summed(alive, gauge, [state]):
                upstream.add_metric(values, value)
        yield upstream
        for gauge, (name, text, factor) in WORKER_GAUGES.items():
            family = GaugeMetricFamily(f"crossway_worker_{name}", text, labels=["worker"])
            for worker, slot in alive:
                family.add_metric([worker], slot.gauge(gauge) * factor)
            yield family
        up = GaugeMetricFamily("crossway_redis_up", "1 while the worker can use Redis, 0 while it cannot.", labels=["worker"])
        for worker, slot in alive:
            if slot.gauge("redis"):     # 0: none is configured
                up.add_metric([worker], slot.gauge("redis") - 1)
        yield up

    def _tunnels(self, alive: list[tuple[str, WorkerSlot]]) -> Metric:
        family = GaugeMetricFamily(
            "crossway_route_tunnels_open", "WebSockets that are open or asked for, by route.", labels=self._names(["http_route"])
        )
        found: dict[tuple[str, ...], int] = {}
        for worker, slot in alive:
            for route, count in slot.tunnels():
                if tcp.is_tcp(self._shared, route):
                    continue
                key = tuple(self._values(worker, [self._route(route)[0]]))
                found[key] = found.get(key, 0) + count
        for values, count in found.items():
            family.add_metric(list(values), count)
        return family

    def _summed(self, alive: list[tuple[str, WorkerSlot]], gauge: str, extra: list[str]) -> Iterator[tuple[list[str], float]]:
        if self._by_worker:
            yield from (([worker, *extra], slot.gauge(gauge)) for worker, slot in alive)
        else:
            yield extra, sum(slot.gauge(gauge) for _worker, slot in alive)

    def _config_metrics(self) -> Iterator[Metric]:
        state = self._config()
        if state is None:
            return
        info = {"version": str(state.version), "hash": state.hash}
        yield InfoMetricFamily("crossway_config", "The configuration in force.", value=info)
        yield GaugeMetricFamily(
            "crossway_config_last_reload_success",
            "1 if the last attempt to load a configuration succeeded.",
            value=int(state.last_reload_success),
        )
        yield GaugeMetricFamily(
            "crossway_config_last_reload_success_timestamp_seconds",
            "When a configuration was last loaded successfully, in seconds since 1970.",
            value=state.last_reload_timestamp,
        )


def _cumulated(buckets: tuple[int, ...]) -> tuple[list[tuple[str, float]], int]:
    """Classic buckets as (le, cumulated count), and the count of all."""
    cumulated: list[tuple[str, float]] = []
    count = 0
    for bound, number in zip(BOUNDS, buckets, strict=True):
        count += number
        cumulated.append((bound, count))
    return cumulated, count
