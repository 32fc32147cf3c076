"""The collector's output, read back by prometheus_client's own parsers."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from gateway._speedups.histogram import COUNTER_NAMES, OVERFLOW
from gateway.telemetry.prometheus import ConfigState, SharedCollector
from gateway.telemetry.shared import SharedState, choice_name

STATE = ConfigState(version=3, hash="abc", last_reload_success=True, last_reload_timestamp=1700000000.5)


def scrape(shared: SharedState, **options) -> dict[tuple[str, frozenset], float]:
    registry = CollectorRegistry()
    registry.register(SharedCollector(shared, lambda: STATE, **options))
    list(parse_openmetrics(generate_openmetrics(registry).decode()))
    text = generate_latest(registry).decode()
    found: dict[tuple[str, frozenset], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} is given twice"
            found[key] = sample.value
    return found


def value(found, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


@pytest.fixture
def shared() -> SharedState:
    state = SharedState(2, 8)
    pay = state.names.add('create "payment"\n')
    for index in range(2):
        slot = state.slot(index)
        slot.set_gauge("pid", 100 + index)
        slot.set_gauge("connections", 5)
        slot.set_gauge("upstream_idle", 2)
        slot.set_gauge("cpu_us", 2_500_000)
        slot.add("requests", 3)
        slot.add("timeouts_head", 1)
        slot.record(pay, 3, 201, 300, 250, 100, 20)
        slot.record(pay, 3, 201, 20_000_000, 0, 100, 20)
        slot.record(0, 0, 404, 40)
    return state


def test_histograms_counters_and_gauges_of_all_workers(shared: SharedState) -> None:
    found = scrape(shared)
    labels = {"http_request_method": "POST", "http_route": 'create "payment"\n', "http_response_status_code": "201"}
    name = "http_server_request_duration_seconds"
    assert value(found, f"{name}_bucket", le="0.00025", **labels) == 0
    assert value(found, f"{name}_bucket", le="0.0005", **labels) == 2
    assert value(found, f"{name}_bucket", le="10.0", **labels) == 2
    assert value(found, f"{name}_bucket", le="+Inf", **labels) == value(found, f"{name}_count", **labels) == 4
    assert value(found, f"{name}_sum", **labels) == pytest.approx(40.0006)
    unmatched = {"http_request_method": "_OTHER", "http_route": "", "http_response_status_code": "404"}
    assert value(found, f"{name}_bucket", le="5e-05", **unmatched) == 2
    assert value(found, "http_server_request_body_size_bytes_sum", **labels) == 400
    assert value(found, "http_server_response_body_size_bytes_count", **labels) == 4
    assert value(found, "crossway_gateway_overhead_seconds_bucket", le="5e-05", http_route=labels["http_route"]) == 2
    assert value(found, "crossway_requests_total") == 6
    assert value(found, "crossway_downstream_timeouts_total", phase="head") == 2
    assert value(found, "crossway_downstream_timeouts_total", phase="idle") == 0
    assert value(found, "crossway_connections") == 10
    assert value(found, "crossway_upstream_connections", state="idle") == 4
    assert value(found, "crossway_workers") == 2
    assert value(found, "crossway_worker_cpu_seconds", worker="1") == 2.5


def test_the_configuration_in_force(shared: SharedState) -> None:
    found = scrape(shared)
    assert value(found, "crossway_config_info", version="3", hash="abc") == 1
    assert value(found, "crossway_config_last_reload_success") == 1
    assert value(found, "crossway_config_last_reload_success_timestamp_seconds") == 1700000000.5


def test_by_worker_adds_a_label_and_sums_to_the_same(shared: SharedState) -> None:
    shared.fold(0)
    found = scrape(shared, by_worker=True)
    counts = {worker: value(found, "crossway_requests_total", worker=worker) for worker in ("0", "1", "retired")}
    assert counts == {"0": 0, "1": 3, "retired": 3}
    assert value(found, "crossway_connections", worker="1") == 5
    assert ("crossway_connections", frozenset({("worker", "0")})) not in found


def test_folding_changes_no_counter(shared: SharedState) -> None:
    def cumulative() -> dict:
        return {
            key: number for key, number in scrape(shared).items() if key[0].endswith(("_total", "_bucket", "_count", "_sum"))
        }

    before = cumulative()
    shared.fold(1)
    shared.fold(0)
    assert cumulative() == before


def test_every_slot_counter_is_exported(shared: SharedState) -> None:
    before = scrape(shared)
    for name in COUNTER_NAMES:
        shared.slot(0).add(name, 1000)
        after = scrape(shared)
        changed = [key for key in after if key[0].startswith("crossway_") and after[key] != before[key]]
        assert len(changed) == 1 and changed[0][0].endswith("_total"), (name, changed)
        before = after


def test_overflow_has_its_own_route(shared: SharedState) -> None:
    shared.slot(0).record(OVERFLOW, 1, 200, 10)
    found = scrape(shared)
    assert value(found, "crossway_gateway_overhead_seconds_count", http_route="_OVERFLOW") == 1


def test_a_route_with_several_upstreams_is_one_route_and_each_of_its_upstreams() -> None:
    state = SharedState(1, 8)
    plain, first, second = (state.names.add(name) for name in ("pay", choice_name("pay", "v1"), choice_name("pay", "v2")))
    slot = state.slot(0)
    slot.record(plain, 1, 401, 100)
    for number, status, microseconds in ((first, 200, 300), (first, 200, 300), (first, 503, 300), (second, 200, 2_000)):
        slot.record(number, 1, status, microseconds, 50, 10, 20)
    found = scrape(state)
    labels = {"http_request_method": "GET", "http_route": "pay"}
    for status, count in (("200", 3), ("503", 1), ("401", 1)):
        assert value(found, "http_server_request_duration_seconds_count", http_response_status_code=status, **labels) == count
    assert value(found, "http_server_response_body_size_bytes_sum", http_response_status_code="200", **labels) == 60
    assert value(found, "crossway_gateway_overhead_seconds_count", http_route="pay") == 5
    chosen = {
        (labels["upstream"], labels["http_response_status_code"]): count
        for (name, pairs), count in found.items()
        if name == "crossway_route_upstream_request_duration_seconds_count" and (labels := dict(pairs))["http_route"] == "pay"
    }
    assert chosen == {("v1", "200"): 2, ("v1", "503"): 1, ("v2", "200"): 1}


def test_an_empty_state_is_a_valid_answer() -> None:
    found = scrape(SharedState(1, 8))
    assert value(found, "crossway_requests_total") == 0 and value(found, "crossway_connections") == 0


def test_labels_that_are_no_utf8_text_cannot_break_the_page() -> None:
    state = SharedState(1, 8)
    state.slot(0).record(state.names.add("x\ud800\\"), 250, 65535, 10)
    name = "http_server_request_duration_seconds_count"
    assert value(scrape(state), name, http_request_method="_OTHER", http_route="x?\\", http_response_status_code="65535") == 1
