"""Which addresses an external host may have, and who may call it."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from gateway.config.mesh_load import load_mesh, mesh_findings
from gateway.errors import ConfigError
from gateway.mesh.assign import World, content_of
from gateway.mesh.decide import Call, decide
from gateway.mesh.metrics import hop
from gateway.mesh.outside import allowed
from gateway.mesh.revocation import DenyList
from tests.integration.pki import Authority

MESH = """\
version: 1
trust_domain: bank.test
services: {edge: {}, payments: {}, ledger: {}}
external:
  cards: {hosts: [api.cards.example], timeout: 2s}
authorization:
  rules:
    - {name: out, from: [payments], to: cards, methods: [POST], prefix: /v1}
    - {name: all, from: ["*"], to: "*"}
"""


def write(folder: Path, text: str = MESH) -> Path:
    path = folder / "mesh.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"])
def test_public_addresses_are_allowed_unless_networks_are_said(address: str) -> None:
    assert allowed(address, None)
    assert not allowed(address, (ipaddress.ip_network("10.0.0.0/8"),))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "198.18.0.1", "192.0.2.1", "::", "::1", "fe80::1", "fc00::1", "fd12::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::1", "2001:db8::1", "fec0::1", "feff::7f00:1",
    ],
)  # fmt: skip
def test_addresses_of_this_machine_its_links_and_private_ones_are_refused(address: str) -> None:
    assert not allowed(address, None)


def test_networks_that_are_said_are_the_only_ones() -> None:
    networks = (ipaddress.ip_network("10.20.0.0/16"), ipaddress.ip_network("fd00::/8"))
    assert allowed("10.20.3.4", networks) and allowed("fd12::1", networks)
    assert not allowed("10.21.0.1", networks) and not allowed("93.184.216.34", networks) and not allowed("127.0.0.1", networks)
    assert allowed("::ffff:10.20.3.4", networks) and not allowed("::ffff:10.21.0.1", networks)


def test_only_those_whom_a_rule_names_by_the_entry_may_leave(tmp_path: Path) -> None:
    mesh = load_mesh(write(tmp_path))
    assert decide(mesh, Call("payments", "cards", "POST", "/v1/x")).rule == "out"
    assert decide(mesh, Call("payments", "cards", "GET", "/v1/x")).considered == (("out", "method GET is not one of POST"),)
    refused = decide(mesh, Call("ledger", "cards", "POST", "/v1/x"))
    assert not refused.allowed and refused.reason == "no rule names ledger as a caller of cards"
    audit = load_mesh(write(tmp_path, MESH.replace("authorization:", "authorization:\n  default: audit")))
    refused = decide(audit, Call("ledger", "cards", "POST", "/v1/x"))
    assert not refused.allowed and not refused.audited


def test_members_are_told_of_their_own_way_out_only(tmp_path: Path) -> None:
    root = Authority("cards root")
    (tmp_path / "cards.pem").write_bytes(b"# of our partner\n" + root.pem)
    text = MESH.replace("timeout: 2s", "port: 8443, tls: {ca: cards.pem}, addresses: 10.0.0.0/8, resolver: 10.0.0.53")
    mesh = load_mesh(write(tmp_path, text))
    told = content_of("payments", World(mesh, 1, "", {}, DenyList()))
    assert told["external"] == {"cards": {
        "protocol": "http", "hosts": ["api.cards.example"], "port": 8443, "ca": root.pem.decode(), "resolver": "10.0.0.53:53", "addresses": ["10.0.0.0/8"],
        "rules": [{"name": "out", "from": ["payments"], "methods": ["POST"], "prefix": "/v1", "headers": {}, "claims": {}}],
    }}  # fmt: skip
    assert "cards" not in told["services"] and content_of("ledger", World(mesh, 1, "", {}, DenyList()))["external"] == {}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[api.cards.example]", '["*.cards.example"]', "not a host name"),
        ("[api.cards.example]", "[10.0.0.1]", "not a host name"),
        ("[api.cards.example]", "[localhost]", "not a host name"),
        ("[api.cards.example]", "[]", "must not be empty"),
        ("[api.cards.example]", "[api.cards.example, API.cards.example]", "the same host twice"),
        ("[api.cards.example]", "[ledger.bank.test]", "the host ledger.bank.test is the service ledger already"),
        ("  cards: {", "  shop: {hosts: [api.cards.example]}\n  cards: {", "the host api.cards.example is of external shop already"),
        ("  cards: {", "  ledger: {hosts: [a.example]}\n  cards: {", "ledger is a service already"),
        ("timeout: 2s", "port: 0", "must be at least 1"),
        ("timeout: 2s", "tls: {insecure: true}", "unknown key 'insecure'"),
        ("timeout: 2s", "tls: {ca: nowhere.pem}", "cannot read the certificates of authorities: No such file"),
        ("timeout: 2s", "tls: {ca: mesh.yaml}", "cannot be used"),
        ("timeout: 2s", "addresses: [10.0.0.1/8]", "not a network"),
        ("timeout: 2s", "resolver: ns.bank.test", "expected host:port"),
        ("from: [payments], to: cards", "from: [cards], to: ledger", "unknown service 'cards'"),
        ("to: cards", "to: card", "did you mean 'cards'?"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_mesh(write(tmp_path, MESH.replace(old, new)))
    assert message in raised.value.render()


def test_an_entry_that_nobody_may_call_is_doubted(tmp_path: Path) -> None:
    (found,) = mesh_findings(load_mesh(write(tmp_path, MESH.replace("to: cards, methods: [POST], prefix: /v1", "to: ledger, prefix: /v1"))))
    assert found.message == "nobody may call cards: no rule names it in `to`"


def test_a_hop_to_the_outside_has_no_identity() -> None:
    labels = hop("external>cards", "payments", "bank.test", "p7")
    assert labels is not None and (labels["destination_service"], labels["source_workload"], labels["reporter"]) == ("cards", "payments", "source")
    assert labels["destination_principal"] == "unknown" and labels["source_principal"] == "spiffe://bank.test/service/payments"
