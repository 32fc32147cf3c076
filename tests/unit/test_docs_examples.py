"""The examples of the documents about TLS, TCP, WebSockets, upstreams, endpoints and the mesh, and the README's: each is a file that `crossway check` takes.

Strategy: what an example leaves out (other sections, the files that it names) is added, nothing of it is changed. Those of policies, traffic shaping, HTTP/2 and gRPC are
judged in test_docs, those of Kubernetes in test_chart.
"""

from __future__ import annotations

import base64
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from ruamel.yaml import YAML

from gateway import snapshot
from gateway.config import findings, load
from gateway.config.mesh_load import load_mesh, mesh_findings
from tests.integration.pki import Authority
from tests.unit.test_docs import ROOT, blocks

WARNINGS = ("is used by no route", "looks at Origin", "has not joined the mesh yet", "cannot read what it joins with")  # of what an example leaves out
FILES = re.compile(r"[\w-]+\.(?:crt|pem)\b")


def document(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def indented(name: str, beginning: str) -> str:
    """The example that is set off by four spaces and begins so, up to the next empty line."""
    for each in re.findall(r"(?:^    [^\n]*\n)+", document(name), re.MULTILINE):
        text = textwrap.dedent(each)
        if text.startswith(beginning):
            return text
    raise AssertionError(f"{name} has no example that begins with {beginning}")


def files(folder: Path, text: str) -> None:
    """The certificates, keys and lists that a text names."""
    authority = Authority("Docs", number=98)
    for number, name in enumerate(sorted(set(FILES.findall(text)))):
        if "ca" in name.split(".")[0].split("-") or name.endswith(".pem"):
            (folder / name).write_bytes(authority.pem)
        else:
            stem = name.partition(".")[0]
            issued = authority.issue(f"{stem}.test", number=500 + number).write(folder, stem)
            (folder / f"{stem}.ocsp").write_bytes(authority.staple(issued))
    for name in re.findall(r"[\w-]+\.crl\b", text):
        (folder / name).write_bytes(authority.revocations())


def ec_jwk() -> dict[str, str]:
    """A public key for ES256."""
    numbers = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    x, y = (base64.urlsafe_b64encode(each.to_bytes(32, "big")).rstrip(b"=").decode() for each in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-256", "alg": "ES256", "kid": "1", "x": x, "y": y}


def upstreams_of(route: dict[str, Any]) -> list[str]:
    return [route["upstream"]] if "upstream" in route else []


def whole(given: dict[str, Any]) -> dict[str, Any]:
    """A gateway's file around an example."""
    routes = given.get("routes") or [{"name": "all", "match": {"prefix": "/"}, "upstream": next(iter(given["upstreams"]))}]
    if any("tcp" in each for each in given.get("listeners", {}).values()):
        routes = []
    named = {name: {"targets": ["127.0.0.1:9001"]} for route in routes for name in upstreams_of(route)}
    known = {"bank": {"jwt": {"issuer": "i", "audience": "a", "algorithms": "HS256", "secret": "a-secret-of-32-bytes-for-the-examples"}}, "web-app": {"cors": {"origins": "https://app.bank.test"}}}
    used = {each for route in routes for each in route.get("policies", []) if isinstance(each, str)}
    made = {
        "version": 1, "listeners": {"public": {"bind": "127.0.0.1:0"}}, "upstreams": named,
        "policies": {name: policy for name, policy in known.items() if name in used}, "routes": routes, **given,
    }  # fmt: skip
    return {name: value for name, value in made.items() if value}


def checked(folder: Path, text: str) -> list[str]:
    """What `crossway check` says of an example, but for what is no part of it."""
    files(folder, text)
    (folder / "fraud-endpoints.yaml").write_text(blocks(document("docs/discovery.md"), "yaml")[1])
    (folder / "jwks.json").write_text(json.dumps({"keys": [ec_jwk()]}))
    path = folder / "gateway.yaml"
    with path.open("w") as file:
        YAML().dump(whole(YAML(typ="safe").load(text)), file)
    config = load(path)
    return [each.render() for each in [*findings(config), *snapshot.check(config)] if not any(known in each.message for known in WARNINGS)]


GATEWAYS = {
    "README": blocks(document("README.md"), "yaml")[0], "tls": blocks(document("docs/tls.md"), "yaml")[0], "tcp": blocks(document("docs/tcp.md"), "yaml")[0],
    "websockets": blocks(document("docs/websockets.md"), "yaml")[0], "events": "routes:\n" + blocks(document("docs/websockets.md"), "yaml")[1],
    "upstreams": blocks(document("docs/upstreams.md"), "yaml")[0], "endpoints": blocks(document("docs/discovery.md"), "yaml")[0], "checks": blocks(document("docs/discovery.md"), "yaml")[2],
    "edge": indented("docs/mesh.md", "mesh: {service: edge, control: \"https://10.0.0.2:9700\", token"),
    "edge with spire": indented("docs/mesh.md", "mesh: {service: edge, control: \"https://10.0.0.2:9700\", spire") + "upstreams: {payments: {service: payments}}\n",
}  # fmt: skip


@pytest.mark.parametrize("name", GATEWAYS)
def test_an_example_of_a_gateway_is_good(tmp_path: Path, name: str) -> None:
    assert checked(tmp_path, GATEWAYS[name]) == []


MESH = blocks(document("docs/mesh.md"), "yaml")
MESHES = {
    "control plane": MESH[0], "splits": MESH[1], "the way out": MESH[2], "tcp services": indented("docs/mesh.md", "services:\n  db:"), "networks": indented("docs/mesh.md", "networks: {west"),
    "spire": indented("docs/mesh.md", "control: {spire"), "by API": indented("docs/mesh.md", "control: {admin"), "an HSM": indented("docs/mesh.md", "control:\n  keys"),
}  # fmt: skip


@pytest.mark.parametrize("name", MESHES)
def test_an_example_of_a_mesh_is_good(tmp_path: Path, name: str) -> None:
    text = MESHES[name].replace("/usr/lib/softhsm/libsofthsm2.so", str(tmp_path / "module.so"))
    files(tmp_path, text)
    (tmp_path / "module.so").write_text("")
    (tmp_path / "mesh.pin").write_text("1234")
    (tmp_path / "mesh.pin").chmod(0o600)
    given = YAML(typ="safe").load(text)
    services = {name: {} for name in ("payments", "ledger")} | given.pop("services", {})
    with (tmp_path / "mesh.yaml").open("w") as file:
        YAML().dump({"version": 1, "trust_domain": "bank.test", "services": services, **given}, file)
    assert [each.render() for each in mesh_findings(load_mesh(tmp_path / "mesh.yaml"))] == []
