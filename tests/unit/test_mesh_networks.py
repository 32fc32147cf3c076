"""Networks of a mesh, as pure functions: who is seen as what from where, and what a gateway leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.config.mesh_load import load_mesh, mesh_findings
from gateway.mesh.assign import World, content_of
from gateway.mesh.networks import network_of, scope, scoped, seen_from, server_name
from gateway.mesh.revocation import DenyList

MESH = """\
version: 1
trust_domain: bank.test
networks: {west: {gateway: door}, default: {gateway: door}}
services: {edge: {}, payments: {}, ledger: {}, db: {protocol: tcp, idle: 2h}, door: {}}
authorization:
  default: DEFAULT
  rules:
    - {name: one, from: [payments], to: [ledger, db]}
    - {name: two, from: [edge], to: payments}
"""


def at(address: str, network: str | None = None, weight: int = 1, **labels: str) -> dict[str, Any]:
    return {"address": address, "weight": weight, "zone": "z1", "labels": labels | ({} if network is None else {"network": network})}


def world(folder: Path, default: str = "deny", **known: set[str]) -> World:
    path = folder / "mesh.yaml"
    path.write_text(MESH.replace("DEFAULT", default))
    endpoints = {
        "ledger": [at("10.0.0.1:1", "west", version="2", tier="a"), at("10.0.0.2:1", "west", version="2", tier="b"), at("10.1.0.1:1", version="1")],
        "db": [at("10.0.0.3:1", "west")], "payments": [at("10.1.0.2:1")], "door": [at("192.0.2.1:9443", "west"), at("192.0.2.2:9443", "west")],
    }  # fmt: skip
    networks = {name: frozenset(network_of(each["labels"]) for each in found) for name, found in endpoints.items()}
    return World(load_mesh(path), 1, "", endpoints, DenyList(), networks | {name: frozenset(each) for name, each in known.items()})


def addresses(content: dict[str, Any], service: str) -> list[str]:
    return [each["address"] for each in content["services"][service]["endpoints"]]


def test_another_network_is_its_gateways(tmp_path: Path) -> None:
    told = content_of("payments", world(tmp_path))
    assert addresses(told, "ledger") == ["10.1.0.1:1", "192.0.2.1:9443", "192.0.2.2:9443"] and addresses(told, "db") == ["192.0.2.1:9443", "192.0.2.2:9443"]
    assert told["services"]["ledger"]["endpoints"][1] == {"address": "192.0.2.1:9443", "weight": 1, "zone": None, "labels": {"network": "west", "version": "2"}, "network": "west"}
    # From the west the others are in a network without a gateway that is up: they are not offered.
    told = content_of("payments", world(tmp_path), "west")
    assert addresses(told, "ledger") == ["10.0.0.1:1", "10.0.0.2:1"]
    assert "door" not in content_of("edge", world(tmp_path, "audit"))["services"], "nobody calls a gateway"


def test_gateways_behind_one_load_balancer_are_one_way(tmp_path: Path) -> None:
    mesh = world(tmp_path)
    mesh.endpoints["door"] = [at("192.0.2.1:9443", "west"), at("192.0.2.1:9443", "west"), at("192.0.2.2:9443", "west")]
    told = content_of("payments", mesh)
    assert addresses(told, "db") == ["192.0.2.1:9443", "192.0.2.2:9443"]
    mesh.endpoints["ledger"] *= 2
    assert [each["weight"] for each in content_of("payments", mesh)["services"]["ledger"]["endpoints"] if "network" in each] == [2, 2]


def test_a_gateway_leads_to_what_somebody_elsewhere_may_call(tmp_path: Path) -> None:
    told = content_of("door", world(tmp_path), "west")
    assert told["own"]["gateway"] == "west" and addresses(told, "ledger") == ["10.0.0.1:1", "10.0.0.2:1"]
    assert set(told["services"]) == {"ledger", "db"} and told["services"]["db"]["idle"] == 7200
    assert "payments" in content_of("door", world(tmp_path, edge={"west"}))["services"], "edge is in the west and may call it"
    assert "payments" not in content_of("door", world(tmp_path, edge={"default"}))["services"]
    assert "gateway" not in content_of("door", world(tmp_path), "north")["own"]


@pytest.mark.parametrize("address", ["192.0.2.1:9443", "192.0.2.2:9443", "[::ffff:192.0.2.1]:9443"])
def test_an_instance_that_says_a_gateways_address_is_not_led_to(tmp_path: Path, address: str) -> None:
    mesh = world(tmp_path)
    mesh.endpoints["ledger"].append(at(address, "west"))
    assert addresses(content_of("door", mesh, "west"), "ledger") == ["10.0.0.1:1", "10.0.0.2:1"]


def test_without_networks_everybody_reaches_everybody(tmp_path: Path) -> None:
    flat = world(tmp_path)
    flat.mesh.__dict__["networks"] = {}
    assert len(content_of("payments", flat, "west")["services"]["ledger"]["endpoints"]) == 3


def test_weights_are_shared_among_gateways() -> None:
    far = [at(f"10.0.0.{n}:1", "west", 2) for n in range(1, 6)]
    assert [each["weight"] for each in seen_from("east", far, {"west": ["192.0.2.1:1", "192.0.2.2:1"]})] == [5, 5]
    assert [each["weight"] for each in seen_from("east", far[:1], {"west": [f"192.0.2.{n}:1" for n in range(1, 8)]})] == [1] * 7
    assert seen_from("east", far, {"west": []}) == [] and seen_from("west", far, {}) == far


@pytest.mark.parametrize(("service", "network"), [("ledger", "default"), ("ledger", "west"), ("a.b-c", "x.y")])
def test_scopes_have_names(service: str, network: str) -> None:
    assert scoped(scope(service, network)) == (service, network)


def test_names_that_are_asked_for() -> None:
    assert server_name("ledger", "bank.test") == "ledger.bank.test"
    assert server_name("a" * 63, "b" * 189) is not None and server_name("a" * 63, "b" * 190) is None


def test_a_rule_towards_a_gateway_is_doubted(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH.replace("DEFAULT", "deny").replace("to: payments", "to: door"))
    assert any("door is a mesh gateway" in each.message for each in mesh_findings(load_mesh(path)))
