"""Who may call whom: the reference of authorization, rule by rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config.mesh_file import MeshFile
from gateway.config.mesh_load import load_mesh
from gateway.mesh.decide import Call, below, decide, fits

SERVICES = "services: {edge: {}, payments: {}, ledger: {}, accounts: {}, db: {protocol: tcp}}"


@pytest.fixture
def mesh_of(tmp_path: Path):  # type: ignore[no-untyped-def]
    def make(rules: str, default: str = "deny") -> MeshFile:
        path = tmp_path / "mesh.yaml"
        path.write_text(f"version: 1\ntrust_domain: bank.test\n{SERVICES}\nauthorization:\n  default: {default}\n  rules:\n{rules}\n")
        return load_mesh(path)

    return make


ONE = "    - {name: one, from: [edge], to: payments, methods: [GET, POST], prefix: /v1/payments, headers: {x-channel: {prefix: web}}, claims: {scope: [pay, admin]}}"
GOOD = {"headers": {"x-channel": ["web-2"]}, "claims": {"scope": ["read", "pay"]}}


@pytest.mark.parametrize(
    ("change", "allowed", "unmet"),
    [
        ({}, True, ""),
        ({"method": "POST"}, True, ""),
        ({"method": "DELETE"}, False, "method DELETE"),
        ({"method": "get"}, False, "method get"),
        ({"path": "/v1/payments/7"}, True, ""),
        ({"path": "/v1/payments?x=1"}, True, ""),
        ({"path": "/v1/payments-old"}, False, "not below /v1/payments"),
        ({"path": "/v1"}, False, "not below"),
        ({"headers": {}}, False, "header x-channel"),
        ({"headers": {"x-channel": ["phone"]}}, False, "header x-channel"),
        ({"headers": {"x-channel": ["phone", "web"]}}, False, "header x-channel"),
        ({"headers": {"x-channel": ["web", "web"]}}, True, ""),
        ({"claims": None}, False, "acts for no user"),
        ({"claims": {"scope": "pay"}}, True, ""),
        ({"claims": {"scope": ["read"]}}, False, "claim scope"),
        ({"claims": {"other": "pay"}}, False, "claim scope"),
    ],
)
def test_everything_that_a_rule_says_must_hold(mesh_of, change: dict, allowed: bool, unmet: str) -> None:  # type: ignore[no-untyped-def, type-arg]
    said = {"caller": "edge", "to": "payments", "method": "GET", "path": "/v1/payments", **GOOD, **change}
    decision = decide(mesh_of(ONE), Call(**said))
    assert decision.allowed is allowed and decision.rule == ("one" if allowed else None)
    if not allowed:
        assert decision.considered[0][0] == "one" and unmet in decision.considered[0][1]


@pytest.mark.parametrize(
    ("to", "port", "allowed", "unmet"),
    [
        ("payments", 9001, True, ""),
        ("payments", 9002, False, "the app's port 9002 is not one of 9001"),
        ("payments", None, False, "the app's port is not known; say --port"),
        ("db", 5432, True, ""),
        ("db", None, True, ""),
    ],
)
def test_rules_by_port_and_of_connections(mesh_of, to: str, port: int | None, allowed: bool, unmet: str) -> None:  # type: ignore[no-untyped-def]
    mesh = mesh_of(
        "    - {name: gets, from: [edge], to: '*', methods: [PUT]}\n    - {name: port, from: [edge], to: payments, ports: [9001]}\n"
        "    - {name: open, from: [edge], to: db}"
    )
    decision = decide(mesh, Call("edge", to, port=port))
    assert decision.allowed is allowed, decision
    if not allowed:
        assert ("port", unmet) in decision.considered


def test_a_connection_satisfies_no_rule_about_requests(mesh_of) -> None:  # type: ignore[no-untyped-def]
    decision = decide(mesh_of("    - {name: gets, from: [edge], to: '*', methods: [GET]}"), Call("edge", "db"))
    assert decision.considered == (("gets", "it looks into requests, and db speaks tcp"),) and not decision.allowed


def test_who_is_not_named_is_denied(mesh_of) -> None:  # type: ignore[no-untyped-def]
    mesh = mesh_of("    - {name: one, from: [edge], to: payments}")
    decision = decide(mesh, Call("accounts", "payments"))
    assert not decision.allowed and decision.considered == () and "no rule names accounts" in decision.reason
    assert not decide(mesh, Call("edge", "ledger")).allowed
    assert not decide(mesh, Call("payments", "edge")).allowed


def test_audit_allows_and_says_so(mesh_of) -> None:  # type: ignore[no-untyped-def]
    mesh = mesh_of("    - {name: one, from: [edge], to: payments}", "audit")
    assert decide(mesh, Call("accounts", "payments")).audited
    allowed = decide(mesh, Call("edge", "payments"))
    assert allowed.allowed and not allowed.audited


def test_the_star_is_every_service_of_the_file(mesh_of) -> None:  # type: ignore[no-untyped-def]
    mesh = mesh_of('    - {name: health, from: ["*"], to: ["*"], prefix: /health}')
    assert decide(mesh, Call("ledger", "edge", "GET", "/health")).allowed
    assert not decide(mesh, Call("stranger", "edge", "GET", "/health")).allowed


def test_the_first_rule_that_allows_is_named(mesh_of) -> None:  # type: ignore[no-untyped-def]
    mesh = mesh_of("    - {name: a, from: [edge], to: payments, methods: [POST]}\n    - {name: b, from: [edge], to: payments}")
    decision = decide(mesh, Call("edge", "payments"))
    assert (decision.rule, decision.number, mesh.line(decision.number or 0)) == ("b", 1, 8)


@pytest.mark.parametrize("who", ["edge", "payments"])
def test_no_rule_helps_the_revoked(mesh_of, who: str) -> None:  # type: ignore[no-untyped-def]
    decision = decide(mesh_of("    - {name: one, from: [edge], to: payments}", "audit"), Call("edge", "payments"), frozenset({who}))
    assert not decision.allowed and f"{who} is revoked" in decision.reason


def test_absence_can_be_asked_for(mesh_of) -> None:  # type: ignore[no-untyped-def]
    mesh = mesh_of("    - {name: one, from: [edge], to: payments, headers: {x-debug: {present: false}}}")
    assert decide(mesh, Call("edge", "payments")).allowed
    assert not decide(mesh, Call("edge", "payments", headers={"x-debug": [""]})).allowed


@pytest.mark.parametrize(
    ("path", "prefix", "result"),
    [("/", "/", True), ("/x", "/", True), ("/v1", "/v1/", True), ("/v1/", "/v1", True), ("/v10", "/v1", False), ("/V1", "/v1", False)],
)
def test_prefixes_end_at_segments(path: str, prefix: str, result: bool) -> None:
    assert below(path, prefix) is result


@pytest.mark.parametrize(
    ("path", "template", "result"),
    [
        ("/v1/a/7", "/v1/a/{id}", True), ("/v1/a/", "/v1/a/{id}", False), ("/v1/a/7/8", "/v1/a/{id}", False), ("/v1/a", "/v1/a", True),
        ("/v1/a/", "/v1/a", False), ("/", "/", True), ("/x", "/", False), ("/7/b/8", "/{one}/b/{two}", True), ("//b/8", "/{one}/b/{two}", False),
    ],
)  # fmt: skip
def test_a_path_is_a_whole_one(path: str, template: str, result: bool) -> None:
    assert fits(path, template) is result


def test_a_rule_by_path_says_what_did_not_hold(mesh_of) -> None:  # type: ignore[no-untyped-def]
    mesh = mesh_of("    - {name: one, from: [edge], to: payments, path: '/v1/payments/{id}'}")
    assert decide(mesh, Call("edge", "payments", path="/v1/payments/7?x=/")).allowed
    decision = decide(mesh, Call("edge", "payments", path="/v1/payments/7/refund"))
    assert decision.considered == (("one", "path /v1/payments/7/refund is not /v1/payments/{id}"),)
