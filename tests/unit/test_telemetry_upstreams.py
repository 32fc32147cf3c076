"""What operators see of the upstreams: metrics, the report of the admin API, and the table of `crossway upstreams`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from gateway._speedups.upstream_state import EndpointState, UpstreamState
from gateway.cli import main
from gateway.cli.upstreams import percent, since
from gateway.telemetry.prometheus import SharedCollector
from gateway.telemetry.shared import SharedState
from gateway.telemetry.upstreams import report
from tests.unit.test_server_cli import Pages, admin
from tests.unit.upstream_memory import CONNECT, OK, PROBE, STATUS, TIMEOUT, seen_by, send

__all__ = ["admin"]             # the fixture
SUCCESSES, QUEUE_TIMEOUTS = 1, 7


class Bank:
    """Two workers, the upstream `pay` with one endpoint up and one ejected, and `idle` of which nothing is asked."""

    def __init__(self) -> None:
        self.memory = SharedState(2, 8)
        self.now = 0
        self.seats = [self._open(worker) for worker in range(2)]
        upstream, (good, bad) = self.seats[0]
        self.now = good.usable_since()
        for _ in range(20):
            upstream.deposit(self.now)
        for outcome in [OK] * 10 + [TIMEOUT]:
            send(upstream, good, outcome, self.now)
        for _ in range(7):
            send(upstream, bad, CONNECT, self.now)
        for _ in range(17):
            upstream.count(SUCCESSES)
        assert upstream.withdraw(self.now) and upstream.withdraw(self.now)
        other, (same, _) = self.seats[1]
        send(other, same, STATUS, self.now)
        other.count(QUEUE_TIMEOUTS)
        assert other.enter(5) and same.enter(0) and other.enqueue(9) and other.connect(9)
        good.set_ewma(2000)
        same.set_ewma(4000)

    def _open(self, worker: int) -> tuple[UpstreamState, list[EndpointState]]:
        table = self.memory.upstreams
        upstream = table.upstream(worker, "pay")
        endpoints = [
            table.endpoint(worker, "pay", "[fe80::1]:80", target="pay.test:80", zone="eu-1a", weight=3),
            table.endpoint(worker, "pay", "10.0.0.2:80", target="10.0.0.2:80"),
        ]
        upstream.set_members(endpoints)
        upstream.configure(limit=5, base=60)
        return upstream, endpoints


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank()


def scrape(memory: SharedState, **options: bool) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    registry = CollectorRegistry()
    registry.register(SharedCollector(memory, **options))
    list(parse_openmetrics(generate_openmetrics(registry).decode()))
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} is given twice"
            found[key] = sample.value
    return found


@pytest.mark.parametrize("by_worker", [False, True])
def test_metrics_of_an_upstream(bank: Bank, by_worker: bool) -> None:
    found = scrape(bank.memory, by_worker=by_worker)

    def value(name: str, **labels: str) -> float:
        return found[f"crossway_upstream_{name}", frozenset({"upstream": "pay", **labels}.items())]

    assert (value("requests_total"), value("successes_total")) == (20, 17)
    assert (value("attempts_total"), value("attempt_successes_total")) == (19, 10)
    assert (value("retries_total"), value("retries_denied_total")) == (2, 0)
    assert (value("requests_in_flight"), value("requests_limit"), value("requests_queued"), value("connections_open")) == (1, 5, 1, 1)
    assert value("refused_total", reason="queue_timeout") == 1 and value("refused_total", reason="queue") == 0
    assert value("retry_budget") == 100 + 20 // 5 - 2
    assert found["crossway_upstream_table_full_total", frozenset()] == 0


def test_metrics_of_endpoints(bank: Bank) -> None:
    found = scrape(bank.memory)

    def values(name: str, **labels: str) -> list[float | None]:
        return [
            found.get((f"crossway_endpoint_{name}", frozenset({"upstream": "pay", "endpoint": address, **labels}.items())))
            for address in ("[fe80::1]:80", "10.0.0.2:80")
        ]

    assert values("available") == [1, 0]
    shown, ejected = values("ejected_seconds")
    assert shown == 0 and ejected is not None and 0 < ejected <= 90
    assert values("requests_in_flight") == [1, 0]
    assert values("latency_ewma_seconds") == [0.003, None]
    assert values("attempts_total", outcome="ok") == [10, 0]
    assert values("attempts_total", outcome="connect") == [0, 7]
    assert values("attempts_total", outcome="status") == [1, 0]
    assert values("ejections_total") == [0, 1]


def test_an_upstream_without_processes_has_no_series() -> None:
    memory = SharedState(1, 8)
    seat = seen_by(memory.upstreams, 0)
    assert any(name == "crossway_upstream_requests_total" for name, _ in scrape(memory))
    del seat
    assert not any(name == "crossway_upstream_requests_total" for name, _ in scrape(memory))


def test_counters_stay_and_gauges_go_when_a_worker_is_folded() -> None:
    bank = Bank()
    before = report(bank.memory)[0]
    bank.memory.fold(1)
    after = report(bank.memory)[0]
    assert after["counters"] == before["counters"]
    assert [endpoint["counters"] for endpoint in after["endpoints"]] == [endpoint["counters"] for endpoint in before["endpoints"]]
    assert (before["in_flight"], before["queued"], before["connections"]) == (1, 1, 1)
    assert (after["in_flight"], after["queued"], after["connections"]) == (0, 0, 0)


def test_the_report_is_plain_and_judges_requests_that_ended(bank: Bank) -> None:
    row = json.loads(json.dumps(report(bank.memory)))[0]
    assert row["name"] == "pay"
    assert row["effective"] == pytest.approx(17 / 19, abs=1e-6), "one of the 20 is still in flight"
    assert row["actual"] == pytest.approx(10 / 19, abs=1e-6)
    bad, good = row["endpoints"]
    assert (bad["state"], good["state"]) == ("ejected", "up")
    assert 0 < bad["ejected_for_seconds"] <= 90 and bad["failures"] == 7 and good["failures"] == 2
    assert good["target"] == "pay.test:80" and good["zone"] == "eu-1a" and good["weight"] == 3


def test_nothing_has_no_success_rate() -> None:
    memory = SharedState(1, 8)
    seat = seen_by(memory.upstreams, 0)
    row = report(memory)[0]
    assert row["effective"] is None and row["actual"] is None and seat


def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["upstreams", *words]) == 0
    return capsys.readouterr().out


def test_the_table(bank: Bank, admin: str, capsys, monkeypatch) -> None:
    Pages.answers = {"/upstreams": (200, {"upstreams": report(bank.memory)})}
    text = show(capsys, monkeypatch, "--admin", admin)
    head, success, _titles, bad, good = (line for line in text.splitlines() if line)
    assert head == "pay   in flight 1 of 5, queue 1, refused 1"
    assert success.strip() == "success 89.47 % effective, 52.63 % actual; retries 2, denied 0, budget left 102"
    assert bad.split()[:2] == ["10.0.0.2:80", "-"] and "ejected for" in bad and "7 connect" in bad
    assert good.split() == [
        "[fe80::1]:80", "pay.test:80", "eu-1a", "3", "up", "1", "3.0", "ms", "12", "1", "timeout,", "1", "status", "0", "0",
    ]  # fmt: skip


def test_json_of_one_upstream(bank: Bank, admin: str, capsys, monkeypatch) -> None:
    Pages.answers = {"/upstreams": (200, {"upstreams": report(bank.memory)})}
    assert [row["name"] for row in json.loads(show(capsys, monkeypatch, "pay", "--json", "--admin", admin))] == ["pay"]
    assert main(["upstreams", "payy", "--admin", admin]) == 1
    assert "no upstream is called payy; there are pay" in capsys.readouterr().err


def test_a_refusal_of_the_admin_api_is_told(admin: str, capsys) -> None:
    Pages.answers = {"/upstreams": (401, {"detail": "a token is needed"})}
    assert main(["upstreams", "--admin", admin]) == 1
    assert "401: a token is needed" in capsys.readouterr().err


def test_what_happened_between_two_reports() -> None:
    bank = Bank()
    before = report(bank.memory)
    upstream, (good, _) = bank.seats[0]
    for outcome in (OK, OK, OK, TIMEOUT):
        upstream.deposit(bank.now)
        ticket = good.admit(bank.now, PROBE)
        good.report(upstream, outcome, ticket, bank.now)
    for _ in range(4):
        upstream.count(SUCCESSES)
    row: dict[str, Any] = since(before, report(bank.memory))[0]
    assert (row["effective"], row["actual"]) == (1.0, 0.75)
    assert row["counters"]["requests"] == 4
    assert [(endpoint["attempts"], endpoint["failures"]) for endpoint in row["endpoints"]] == [(0, 0), (4, 1)]


@pytest.mark.parametrize(
    "share,text", [(None, "-"), (1.0, "100.00 %"), (0.999999, "99.99 %"), (0.5, "50.00 %"), (0.0, "0.00 %")]
)
def test_percentages_do_not_flatter(share: float | None, text: str) -> None:
    assert percent(share) == text
