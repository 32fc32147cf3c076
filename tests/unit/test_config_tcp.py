"""Raw TCP listeners in the configuration: what is accepted, what is an error at its place, what the commands show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.cli import main
from tests.integration.pki import Authority
from tests.unit.checked import problems

UPSTREAMS = "pg: {targets: [127.0.0.1:9001]}, legacy: {targets: [127.0.0.1:9002]}"


def write(folder: Path, db: str, *, upstreams: str = UPSTREAMS, more: str = "") -> Path:
    path = folder / "edge.yaml"
    path.write_text(f"version: 1\nworkers: 1\nlisteners:\n  db: {{bind: 127.0.0.1:5432, {db}}}\nupstreams: {{{upstreams}}}\n{more}")
    return path


@pytest.mark.parametrize(
    "tcp",
    [
        "tcp: {upstream: pg}",
        "tcp: {sni: {a.test: pg}, default: legacy, starttls: postgres}",
        "tcp: {upstream: pg, idle: 2h, connections: 100, allow: [10.0.0.0/8, '::1'], proxy_protocol: v2}, proxy_protocol: required",
        "tcp: {upstream: pg, allow: 10.0.0.0/8}, limits: {connections: 5}, backlog: 10",
        "tcp: {sni: {db.bank.test: pg, '*.legacy.test': legacy}, default: legacy, hello: 5s}",
    ],
)
def test_what_is_accepted(tmp_path: Path, tcp: str) -> None:
    found = problems(write(tmp_path, tcp))
    assert all("used by no route" in problem.message for problem in found), [problem.render() for problem in found]


ROUTE = "routes: [{name: all, match: {prefix: /}, upstream: web%s}]\n"
WEB = UPSTREAMS + ", web: {targets: [127.0.0.1:9003]}"


@pytest.mark.parametrize(
    ("db", "message", "options"),
    [
        ("tcp: {}", "neither `upstream` nor `sni`", {}),
        ("tcp: {upstream: pg, sni: {a.test: pg}}", "both `upstream` and `sni`", {}),
        ("tcp: {upstream: pg, default: pg}", "`default` without `sni`", {}),
        ("tcp: {upstream: pg, starttls: postgres}", "there is no TLS here to ask for", {}),
        ("tcp: {upstream: pg, starttls: mysql}", "", {}),
        ("tcp: {upstream: pq}", "unknown upstream 'pq'", {}),
        ("tcp: {sni: {a.test: pq}}", "unknown upstream 'pq'", {}),
        ("tcp: {sni: {a.test: pg}, default: lagacy}", "unknown upstream 'lagacy'", {}),
        ("tcp: {sni: {'*': pg}}", "a star alone is no server name", {}),
        ("tcp: {sni: {'a.*.test': pg}}", "a star stands for the first labels only", {}),
        ("tcp: {sni: {'x*.test': pg}}", "a star stands for the first labels only", {}),
        ("tcp: {sni: {10.0.0.1: pg}}", "a server name is never an address", {}),
        ("tcp: {sni: {a.test: pg, A.test: legacy}}", "the same server name twice", {}),
        ("tcp: {upstream: pg, connections: 0}", "", {}),
        ("tcp: {upstream: pg, allow: []}", "", {}),
        ("tcp: {upstream: pg}, timeouts: {head: 5s}", "`timeouts` is of HTTP", {}),
        ("tcp: {upstream: pg}, limits: {body: 5MiB}", "a limit of requests (`body`)", {}),
        ("tcp: {upstream: pg}, http2: false", "`http2` is of HTTP", {}),
        ("tcp: {upstream: pg}, trusted_proxies: [10.0.0.0/8]", "`trusted_proxies` is of HTTP", {}),
        ("tcp: {upstream: pg}", "has no protocol for it", {"upstreams": "pg: {targets: [127.0.0.1:1], protocol: grpc}"}),
        ("tcp: {upstream: pg}", "cannot be asked twice", {"upstreams": "pg: {targets: [127.0.0.1:1], hedge: {after: 1s}}"}),
        ("tcp: {upstream: pg}", "an adaptive limit", {"upstreams": "pg: {targets: [127.0.0.1:1], limits: {adaptive: {}}}"}),
        ("tcp: {upstream: pg}", "neither header nor cookie",
         {"upstreams": "pg: {targets: [127.0.0.1:1], balance: {maglev: {key: 'header:x'}}}"}),
        ("tcp: {sni: {a.test: pg}}", "encrypted a second time", {"upstreams": "pg: {targets: [127.0.0.1:1], tls: {insecure: true}}"}),
        ("tcp: {upstream: pg}}\n  web: {bind: 127.0.0.1:80", "this listener answers 404 to everything", {}),
        ("tcp: {upstream: pg}}\n  web: {bind: 127.0.0.1:80", "listener 'db' passes raw TCP",
         {"upstreams": WEB, "more": ROUTE % ", listeners: [web, db]"}),
        ("tcp: {upstream: web}}\n  web: {bind: 127.0.0.1:80", "raw TCP", {"upstreams": WEB, "more": ROUTE % ""}),
    ],
)  # fmt: skip
def test_what_is_an_error(tmp_path: Path, db: str, message: str, options: dict[str, str]) -> None:
    errors = [problem for problem in problems(write(tmp_path, db, **options)) if problem.severity == "error"]
    assert len(errors) == 1 and message in errors[0].message, [problem.render() for problem in errors]
    assert errors[0].hint or not message


def test_passthrough_beside_termination(tmp_path: Path) -> None:
    Authority("Root", number=93).issue("db.bank.test").write(tmp_path, "db")
    tls = "tls: {certificates: [{cert: db.crt, key: db.key}]%s}"
    assert not [each for each in problems(write(tmp_path, f"{tls % ''}, tcp: {{upstream: pg}}")) if each.severity == "error"]
    for db, message in [
        (f"{tls % ''}, tcp: {{sni: {{a.test: pg}}}}", "`sni` passes TLS on undecrypted"),
        (f"{tls % ', alpn: [h2]'}, tcp: {{upstream: pg}}", "`alpn` is of HTTP"),
    ]:
        errors = [each for each in problems(write(tmp_path, db)) if each.severity == "error"]
        assert len(errors) == 1 and message in errors[0].message, [each.render() for each in errors]


def test_routes_shows_where_bytes_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "tcp: {sni: {db.bank.test: pg}, default: legacy, connections: 7}")
    assert main(["routes", "-c", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "RAW TCP" in shown and "db.bank.test" in shown and "at most 7" in shown and "ROUTE  " not in shown
    assert main(["routes", "-c", str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["listener"], row["server_name"], row["upstream"]) for row in rows] == [("db", "db.bank.test", "pg"), ("db", None, "legacy")]


def test_explain_says_that_there_are_no_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "-c", str(write(tmp_path, "tcp: {upstream: pg}")), "GET", "/"]) == 2
    assert "passes raw TCP" in capsys.readouterr().err
