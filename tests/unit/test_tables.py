"""Tables of commands on narrow terminals: every name and figure can still be read."""

from __future__ import annotations

import re

import pytest

from gateway.cli import mesh_status, upstreams

COUNTERS = {name: 0 for name in ("connect", "reset", "timeout", "status", "ejections", "retries", "pending_full", "queue_timeouts", "no_endpoint", "budget_empty")}
ENDPOINT = {
    "address": "10.211.144.254:19001", "target": None, "zone": "eu-central-1a", "weight": 1, "state": "up", "in_flight": 12, "ewma_seconds": 0.0123, "attempts": 123_456,
    "failures": 0, "counters": COUNTERS | {"timeout": 3, "reset": 14},
}  # fmt: skip
UPSTREAM = {
    "name": "payments", "in_flight": 3, "limit": 1024, "adaptive_limit": None, "queued": 0, "effective": 1.0, "actual": 0.99, "retry_budget": 100, "counters": COUNTERS,
    "endpoints": [ENDPOINT],
}  # fmt: skip
INSTANCE = {
    "service": "payments", "instance": "payments-f9ae0e12ce4d", "state": "healthy", "since": 0, "inbound": "10.211.144.254:9101", "zone": None, "labels": {"version": "v2"},
    "not_after": 90_000, "applied": 1234, "applied_at": 95, "refused": None, "seconds_waiting": None, "problems": [],
}  # fmt: skip
MESH = {
    "trust_domain": "bank.test", "policy": 7, "default": "deny", "time": 100, "control_planes": [], "document": None, "services": ["payments"], "instances": [INSTANCE], "revoked": [],
}  # fmt: skip


@pytest.mark.parametrize("columns", ["40", "60", "80", "200"])
def test_nothing_of_a_table_is_cut(columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    upstreams._print([UPSTREAM])
    shown = capsys.readouterr().out
    words = set(re.split(r"\s+", shown))
    assert {"endpoint", "zone", "weight", "in", "flight", "ewma", "attempts", "failures", "ejections", "retries"} <= words, shown
    assert {"10.211.144.254:19001", "eu-central-1a", "up", "12", "12.3", "123456", "3", "14"} <= words, shown
    mesh_status.show(MESH, False)
    shown = capsys.readouterr().out
    words = set(re.split(r"\s+", shown))
    assert {"service", "instance", "inbound", "certificate", "version", "payments", "payments-f9ae0e12ce4d", "10.211.144.254:9101", "healthy", "1234", "version=v2"} <= words, shown


def test_a_terminal_that_is_wide_enough_is_not_exceeded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    upstreams._print([UPSTREAM])
    mesh_status.show(MESH, False)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 140
