"""`crossway routes` and `crossway explain`, called as the command line calls them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.cli import explain, routes

CONFIG = """\
version: 1
listeners:
  public: {bind: "127.0.0.1:0"}
  inner: {bind: "127.0.0.1:0"}
upstreams:
  payments: {targets: ["127.0.0.1:9001"]}
  accounts: {targets: ["127.0.0.1:9002"]}
policies:
  per-client: {rate_limit: {key: ip, rate: 100/s}}
  edits: {headers: {request: {set: {x-edge: "1"}}}}
routes:
  - name: read
    match: {path: "/v1/payments/{id}", methods: [GET]}
    policies: [edits, per-client, {ip: {deny: 10.0.0.0/8}}]
    upstream: payments
  - name: create
    match: {path: /v1/payments, methods: [POST], headers: {x-env: blue}}
    upstream: payments
  - name: hosted
    match: {host: "*.bank.test", prefix: /v1, query: {mode: {present: true}}}
    upstream: accounts
  - name: hidden
    match: {prefix: /hidden}
    upstream: accounts
    listeners: [inner]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "edge.yaml"
    file.write_text(CONFIG)
    return file


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    routes.register(subparsers)
    explain.register(subparsers)
    args = parser.parse_args(words)
    code: int = args.run(args)
    return code


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    code = call(*words, "--json")
    return code, json.loads(capsys.readouterr().out)


def test_routes_lists_every_route(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("routes", "-c", str(config)) == 0
    text = capsys.readouterr().out
    for each in ("read", "/v1/payments/{id}", "x-env = blue", "?mode present", "*.bank.test", "edits, per-client, ip"):
        assert each in text


def test_routes_as_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = answer(capsys, "routes", "-c", str(config))
    assert code == 0
    assert [each["name"] for each in facts] == ["read", "create", "hosted", "hidden"]
    assert facts[0]["policies"] == ["edits", "per-client", "ip"]
    assert facts[3]["listeners"] == ["inner"]


def test_explain_shows_the_winner_and_the_policies_in_phase_order(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = answer(capsys, "explain", "GET", "https://api.bank.test:8443/v1/payments/7?mode", "-c", str(config))
    assert (code, found["route"], found["upstream"]) == (0, "hosted", "accounts")
    assert found["others"][0]["route"] == "read"
    assert found["others"][0]["outcome"] == "less specific"
    code, found = answer(capsys, "explain", "HEAD", "/v1/payments/7", "-c", str(config))
    assert (code, found["route"], found["params"]) == (0, "read", {"id": "7"})
    assert [each["policy"] for each in found["policies"]] == ["ip", "per-client", "edits"]


def test_explain_takes_headers(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("explain", "POST", "/v1/payments", "-c", str(config))
    assert answer(capsys, *words)[0] == 1
    assert answer(capsys, *words, "-H", "X-Env: blue")[1]["route"] == "create"
    assert answer(capsys, *words, "-H", "Host: a.bank.test")[1]["status"] == 404


def test_explain_refusals_exit_1_and_say_why(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = answer(capsys, "explain", "DELETE", "/v1/payments/7", "-c", str(config))
    assert (code, found["status"], found["allow"]) == (1, 405, ["GET", "HEAD"])
    code, found = answer(capsys, "explain", "GET", "/nowhere", "-c", str(config))
    assert (code, found["status"]) == (1, 404)
    assert {each["outcome"] for each in found["others"]} == {"path", "host"}
    code, found = answer(capsys, "explain", "GET", "/a/../../b", "-c", str(config))
    assert (code, found["status"]) == (1, 400)
    assert call("explain", "DELETE", "/v1/payments/7", "-c", str(config)) == 1
    assert "405 Method Not Allowed" in capsys.readouterr().out


def test_explain_sees_what_the_listener_offers(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("explain", "GET", "/hidden", "-c", str(config))
    assert answer(capsys, *words)[0] == 1
    assert answer(capsys, *words, "--listener", "inner")[1]["route"] == "hidden"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("GET", "payments"), "is no URL"),
        (("GET", "ftp://a/b"), "is no URL"),
        (("GET", "/", "-H", "nocolon"), "is no header"),
        (("GET", "/", "--listener", "outer"), "there is no listener 'outer'"),
    ],
)
def test_unusable_arguments_exit_2(
    words: tuple[str, ...], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("explain", *words, "-c", str(config)) == 2
    assert message in capsys.readouterr().err


def test_missing_file_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("routes",), ("explain", "GET", "/")):
        assert call(*words, "-c", str(tmp_path / "none.yaml")) == 2
        assert "none.yaml" in capsys.readouterr().err


def test_websockets_are_shown(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(CONFIG + "    websocket: {idle: 90s, tunnels: 7}\n")
    code, found = answer(capsys, "routes", "--json", "-c", str(config))
    assert code == 0
    assert {each["name"]: each["websocket"] for each in found} == {
        "read": None, "create": None, "hosted": None, "hidden": {"idle": 90, "tunnels": 7},
    }  # fmt: skip
    assert call("routes", "-c", str(config)) == 0
    assert "WebSockets, at most 7" in capsys.readouterr().out
    assert call("explain", "GET", "/hidden", "--listener", "inner", "-c", str(config)) == 0
    assert "websocket at most 7, closed after 90s of silence" in capsys.readouterr().out


def test_what_upstreams_speak_and_grpc_services_are_shown(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(
        CONFIG.replace('["127.0.0.1:9002"]', '["127.0.0.1:9002"], protocol: grpc')
        + "  - {name: calls, match: {grpc: {service: bank.v1.Payments}}, upstream: accounts}\n"
        + "  - {name: transfer, match: {grpc: {service: bank.v1.Payments, method: Transfer}}, upstream: accounts}\n"
    )
    code, found = answer(capsys, "routes", "--json", "-c", str(config))
    assert code == 0
    shown = {each["name"]: (each["grpc"], each["protocols"]) for each in found}
    assert shown["read"] == (None, {"payments": "http1"})
    assert shown["calls"] == ({"service": "bank.v1.Payments", "method": None}, {"accounts": "grpc"})
    assert shown["transfer"] == ({"service": "bank.v1.Payments", "method": "Transfer"}, {"accounts": "grpc"})
    assert call("routes", "-c", str(config)) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "accounts (gRPC)" in lines["calls"] and "/bank.v1.Payments/{method}" in lines["calls"]
    assert "content-type = application/grpc..." in lines["calls"] and "POST" in lines["calls"]
    assert "(" not in lines["read"].rpartition("payments")[2]
    assert call("explain", "POST", "/bank.v1.Payments/Transfer", "-H", "content-type: application/grpc", "-c", str(config)) == 0
    shown_text = capsys.readouterr().out
    assert "route     transfer   (gRPC bank.v1.Payments/Transfer)" in shown_text
    assert "upstream  accounts   (127.0.0.1:9002, gRPC)" in shown_text
    assert "calls" in shown_text.partition("why not the others:")[2]
    assert call("explain", "POST", "/bank.v1.Payments/Transfer", "-c", str(config)) == 1
