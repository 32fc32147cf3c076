"""What a mesh's file says of WebSockets, what members are told of it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.config.mesh_file import MeshFile
from gateway.config.mesh_load import load_mesh, mesh_findings, mesh_schema
from gateway.errors import ConfigError
from gateway.mesh.assign import World, content_of
from gateway.mesh.revocation import DenyList
from gateway.mesh.tunnels import silence, tunnels_of, unspoken, untold

FILE = """\
version: 1
trust_domain: bank.test
services:
  payments: {{}}
  ledger: {{{service}}}
authorization:
  rules:
    - {{name: payments-to-ledger, from: [payments], to: ledger{rule}}}
"""
Load = Callable[..., MeshFile]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(service: str, rule: str = "") -> MeshFile:
        path = tmp_path / "mesh.yaml"
        path.write_text(FILE.format(service=service, rule=rule))
        return load_mesh(path)

    return load


def told(mesh: MeshFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """What callers of the ledger and its own sidecars hear."""
    world = World(mesh, 1, "", {}, DenyList())
    said = content_of("payments", world)["services"]["ledger"], content_of("ledger", world)["own"]
    json.dumps(said)
    return said


@pytest.mark.parametrize(
    ("service", "said"),
    [
        ("websocket: true", {}),
        ("websocket: {}", {}),
        ("protocol: http, websocket: {idle: 90s}", {"idle": 90}),
        ("websocket: {idle: 500ms, tunnels: 7}", {"idle": 0.5, "tunnels": 7}),
    ],
)
def test_members_are_told_what_is_said_and_no_more(load: Load, service: str, said: dict[str, Any]) -> None:
    assert [each["websocket"] for each in told(load(service))] == [said, said]


@pytest.mark.parametrize("service", ["", "protocol: http", "websocket: false", "protocol: http2", "protocol: tcp, idle: 1m"])
def test_members_hear_nothing_of_what_is_not_said(load: Load, service: str) -> None:
    for said in told(load(service)):
        assert "websocket" not in said, "a member of an earlier version would refuse it"


@pytest.mark.parametrize(
    ("service", "place", "message", "hint"),
    [
        ("protocol: http2, websocket: true", "5:40", "`websocket` for a service that speaks http2", "write `protocol: http`"),
        ("protocol: grpc, websocket: {idle: 1m}", "5:39", "`websocket` for a service that speaks grpc", "write `protocol: http`"),
        ("protocol: tcp, websocket: true", "5:38", "`websocket` for a service that speaks tcp", "tcp carries them as any other bytes: remove it"),
        ("websocket: {expiry: ignore}", "5:24", "unknown key 'expiry'", ""),
        ("websocket: {tunnels: 0}", "5:33", "must be at least 1", ""),
        ("websocket: {idle: 0s}", "5:30", "", ""),
        ("websocket: yes please", "5:23", "", ""),
    ],
)
def test_what_cannot_be_meant_is_told_at_its_place(load: Load, service: str, place: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as found:
        load(service)
    text = str(found.value)
    assert f"mesh.yaml:{place}:" in text and message in text and hint in text, text


@pytest.mark.parametrize(
    ("rule", "warned"),
    [("", False), (", methods: [GET]", False), (", methods: [POST, GET]", False), (", methods: [POST]", True)],
)
def test_that_nobody_may_open_one_is_told(load: Load, rule: str, warned: bool) -> None:
    found = [problem.render() for problem in mesh_findings(load("websocket: true", rule))]
    assert any("a handshake is a GET, which no rule allows at ledger" in text and "mesh.yaml:5:" in text for text in found) is warned
    assert not any("handshake" in problem.render() for problem in mesh_findings(load("", rule)))


def test_the_schema_knows_it() -> None:
    service = mesh_schema()["$defs"]["Service"]["properties"]["websocket"]
    assert "Upgrade is stripped" in service["description"]
    assert {"idle", "tunnels"} == set(mesh_schema()["$defs"]["ServiceWebSocket"]["properties"])


def test_places_are_counted_only_where_there_are_some() -> None:
    asked: list[int] = []

    def metric() -> int:
        asked.append(7)
        return 7

    assert tunnels_of({}, metric) is None and tunnels_of({"websocket": None}, metric) is None and not asked
    made = tunnels_of({"websocket": {}, "protocol": "http"}, metric)
    assert made is not None and made.metric == 7


@pytest.mark.parametrize(
    "said", [{"websocket": []}, {"websocket": {"idle": 0}}, {"websocket": {"idle": -1}}, {"websocket": {"tunnels": True}},
             {"websocket": {"tunnels": "3"}}, {"websocket": {"new": 1}}, {"websocket": {}, "protocol": "grpc"}],
)  # fmt: skip
def test_what_a_member_does_not_understand_it_refuses(said: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        tunnels_of(said, lambda: 1)


def test_silence_is_five_minutes_unless_it_is_said() -> None:
    assert (silence({}), silence({"idle": "2h"}), silence({"idle": 0.5})) == (300, 7200, 0.5)


def test_the_line_of_an_answer_is_one_line() -> None:
    for line in (untold("ledger"), unspoken("ledger", "grpc")):
        assert line.startswith(b"crossway-websocket: off; ") and line.endswith(b"\r\n") and line.count(b"\r\n") == 1
