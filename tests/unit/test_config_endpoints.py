"""The configuration of where endpoints are found and how they are checked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from gateway.cli import explain
from gateway.config import Config, findings, load
from gateway.config.document import json_schema
from gateway.config.source import Document
from gateway.errors import ConfigError

HEAD = "version: 1\nadmin: {bind: 127.0.0.1:0}\nlisteners: {public: {bind: 127.0.0.1:0}}\n"
ROUTES = "routes: [{name: all, match: {prefix: /}, upstream: pay}]\n"


def write(folder: Path, upstream: str) -> Path:
    path = folder / "edge.yaml"
    path.write_text(f"{HEAD}upstreams:\n  pay: {{{upstream}}}\n{ROUTES}")
    return path


def made(folder: Path, upstream: str) -> Config:
    return load(write(folder, upstream))


def test_sources_and_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("- 192.0.2.1:80\n- {address: '[2001:db8::1]:443', weight: 3, zone: eu-1a}\n")
    discovery = made(tmp_path, "discovery: {file: e.yaml}").upstreams["pay"].discovery
    assert [(str(each.address), each.weight, each.zone) for each in discovery.endpoints] == [
        ("192.0.2.1:80", 1, None), ("[2001:db8::1]:443", 3, "eu-1a")
    ]
    discovery = made(tmp_path, "discovery: {srv: _Pay._tcp.Bank.test., resolver: 10.0.0.53}").upstreams["pay"].discovery
    assert (discovery.srv, discovery.resolver) == ("_pay._tcp.bank.test", "10.0.0.53:53")
    discovery = made(tmp_path, "targets: [a.test:1], discovery: {resolver: 'fd00::53'}").upstreams["pay"].discovery
    assert discovery.resolver == "[fd00::53]:53"


def test_checks_and_their_defaults(tmp_path: Path) -> None:
    check = made(tmp_path, "targets: [a.test:1], health: {check: {http: {path: '/a?b=1', status: [204, 401-403]}}}").upstreams["pay"].health.check
    assert check is not None and check.http is not None
    assert [status in check.http.status for status in (200, 204, 401, 403, 404)] == [False, True, True, True, False]
    assert (check.interval, check.timeout, check.jitter, check.healthy, check.unhealthy) == (5, 1, 0.1, 2, 3)
    check = made(tmp_path, "targets: [a.test:1], health: {check: {grpc: , interval: 1m, jitter: 0%}}").upstreams["pay"].health.check
    assert check is not None and check.grpc is not None and check.grpc.service == "" and check.jitter == 0


@pytest.mark.parametrize(
    ("upstream", "message", "hint"),
    [
        ("retries: 0", "no endpoints: neither `targets` nor a `discovery`", "add `targets: [host:port]`"),
        ("targets: []", "no endpoints", "add `targets"),
        ("targets: [a:1], discovery: {srv: _a._tcp.b}", "both `targets` and `discovery: {srv}`", "keep one"),
        ("discovery: {srv: _a._tcp.b, file: e.yaml}", "both `srv` and `file`", "keep one"),
        ("discovery: {srv: single}", "not a name of SRV records", "_payments._tcp.bank.test"),
        ("targets: [a:1], discovery: {resolver: dns.test:53}", "a name server is given by its IP address", "10.0.0.53:53"),
        ("discovery: {file: missing.yaml}", "cannot be read: No such file or directory", ""),
        ("discovery: {file: .}", "cannot be read: not a regular file", ""),
        ("targets: [a:1], health: {check: {}}", "expected one of `http`, `tcp` and `grpc`", "http: {path: /healthz}"),
        ("targets: [a:1], health: {check: {http: {}, tcp: {}}}", "expected one of", ""),
        ("targets: [a:1], health: {check: {http: {path: healthz}}}", "a path starts with /", "/healthz"),
        ("targets: [a:1], health: {check: {http: {path: '/a b'}}}", "holds no space", ""),
        ("targets: [a:1], health: {check: {http: {status: 700}}}", "expected status codes", "200-299"),
        ("targets: [a:1], health: {check: {http: {status: 299-200}}}", "ends before it begins", ""),
        ("targets: [a:1], health: {check: {http: {host: '*.a'}}}", "expected one host", ""),
        ("targets: [a:1], health: {check: {tcp: {}, interval: 10ms}}", "an interval is at least 100ms", ""),
        ("targets: [a:1], health: {check: {tcp: {}, jitter: 51%}}", "the jitter is at most 50%", ""),
        ("targets: [a:1], health: {check: {tcp: {}, jitter: 5}}", "expected a percentage", "20%"),
        ("targets: [a:1], health: {check: {tcp: {}, unhealthy: 0}}", "must be at least 1", ""),
        ("targets: [a:1], health: {check: {tcp: {port: 1}}}", "unknown key 'port'", ""),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(tmp_path: Path, upstream: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, upstream)
    (problem,) = caught.value.problems
    assert message in problem.message and hint in problem.hint, problem.render()
    assert problem.line == 5 or problem.message.startswith("cannot be read")


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("- 192.0.2.1:80\n- 192.0.2.1:80\n", (2, 3), "the same endpoint twice"),
        ("- {address: 192.0.2.1:80, weight: 999}\n", (1, 35), "must be at most 256"),
        ("targets: [192.0.2.1:80]\n", (1, 1), "expected a list"),
        ("[]\n", (1, 1), "must not be empty"),
        ("- 192.0.2.1\n", (1, 3), "expected host:port"),
        ("- [\n", (1, 1), "while parsing a flow"),
        ("".join(f"- 192.0.2.1:{port}\n" for port in range(1, 258)), (257, 3), "more than 256 endpoints"),
    ],
)
def test_mistakes_in_a_file_of_endpoints_have_their_place(tmp_path: Path, text: str, place: tuple[int, int], message: str) -> None:
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, "discovery: {file: e.yaml}")
    (problem,) = caught.value.problems
    assert problem.file == str(tmp_path / "e.yaml") and message in problem.message
    assert (problem.line, problem.column) == place, problem.render()


@pytest.mark.parametrize(
    ("upstream", "message"),
    [
        ("targets: [192.0.2.1:1], discovery: {resolver: 10.0.0.53}", "a name server for an upstream of which every target is an address"),
        ("targets: [192.0.2.1:1], resolve: 5s", "there is no name to resolve"),
        ("targets: [192.0.2.1:1], health: {check: {tcp: {}, interval: 1s, timeout: 2s}}", "longer than the interval of 1s"),
    ],
)
def test_what_does_nothing_is_doubted(tmp_path: Path, upstream: str, message: str) -> None:
    (problem,) = findings(made(tmp_path, upstream))
    assert problem.severity == "warning" and message in problem.message and problem.line == 5
    assert findings(made(tmp_path, "targets: [a.test:1], resolve: 5s, discovery: {resolver: 10.0.0.53}")) == []


def test_the_content_of_a_file_of_endpoints_is_no_part_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("- 192.0.2.1:80\n")
    before = made(tmp_path, "discovery: {file: e.yaml}").digest
    (tmp_path / "e.yaml").write_text("- 192.0.2.2:80\n")
    assert made(tmp_path, "discovery: {file: e.yaml}").digest == before


@pytest.mark.parametrize(
    "text", ["- a:1\n- {address: b:2, zone: &z x}\n- {address: c:3, zone: *z}\n", "[a:1, b:2]", "", "- {\n", "- a\n---\n- b\n", "- *gone\n", "\t- a\n"]
)
def test_reading_in_steps_is_reading(tmp_path: Path, text: str) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(text)
    whole, steps = Document(path), Document(path)
    whole.read()
    for _ in steps.reading():
        pass
    assert (steps.data, steps.root, steps.problems) == (whole.data, whole.root, whole.problems)


def test_explain_says_where_endpoints_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.yaml").write_text("- 192.0.2.7:80\n")
    parser = argparse.ArgumentParser()
    explain.register(parser.add_subparsers())
    for upstream, shown in (("discovery: {file: e.yaml}", "192.0.2.7:80"), ("discovery: {srv: _a._tcp.b}", "SRV _a._tcp.b")):
        args = parser.parse_args(["explain", "-c", str(write(tmp_path, upstream)), "GET", "http://x/"])
        args.run(args)
        assert shown in capsys.readouterr().out


def test_the_schema_for_editors_has_the_new_keys() -> None:
    text = json.dumps(json_schema())
    for word in ('"discovery"', '"srv"', '"resolver"', '"check"', '"grpc"', '"unhealthy"', '"zone"'):
        assert word in text
