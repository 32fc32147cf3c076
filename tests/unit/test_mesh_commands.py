"""Commands on a mesh's file: check, schema, can, token, revoke, rotate-root; no control plane runs."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path

import pytest

from gateway.cli import main

MESH = """\
version: 1
trust_domain: bank.test
services: {edge: {}, payments: {}, ledger: {}}
authorization:
  rules:
    - {name: edge-to-payments, from: [edge], to: payments, methods: [GET], prefix: /v1/payments}
    - {name: admins, from: [edge], to: ledger, headers: {x-channel: branch}, claims: {role: [1, admin]}}
"""


@pytest.fixture
def mesh(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    return path


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["crossway", *words])
    code = main(words)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("flag", [[], ["-c"]])
def test_check_knows_a_meshs_file(mesh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: list[str]) -> None:
    code, out, _ = run(capsys, monkeypatch, "check", *flag, str(mesh))
    assert code == 0 and "ok, mesh bank.test, 3 services, 2 rules" in out
    mesh.write_text(MESH.replace("to: payments", "to: paiments"))
    code, out, _ = run(capsys, monkeypatch, "check", *flag, str(mesh))
    assert code == 2 and f"{mesh}:6:50" in out and "did you mean 'payments'?" in out


def test_check_wants_one_file(mesh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(capsys, monkeypatch, "check")[0] == 2
    assert run(capsys, monkeypatch, "check", str(mesh), "-c", str(mesh))[0] == 2


def test_the_schema_of_a_mesh_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "schema", "--mesh")
    assert code == 0 and "trust_domain" in json.loads(out)["properties"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["edge", "payments", "GET", "/v1/payments/7?x=1"], 0, "rule edge-to-payments allows it"),
        (["edge", "payments", "POST", "/v1/payments"], 1, "method POST is not one of GET"),
        (["edge", "payments", "GET", "/v1/payments/../../admin"], 1, "path /admin is not below"),
        (["edge", "payments", "GET", "/v1/%70ayments"], 0, "ALLOWED"),
        (["ledger", "payments"], 1, "no rule names ledger"),
        (["edge", "ledger", "-H", "X-Channel: branch", "--claim", "role=admin"], 0, "rule admins"),
        (["edge", "ledger", "-H", "X-Channel: branch", "--claim", "role=1"], 0, "rule admins"),
        (["edge", "ledger", "-H", "X-Channel: branch"], 1, "acts for no user"),
        (["edge", "nobody"], 2, "nobody is not a service"),
        (["edge", "ledger", "GET", "v1"], 2, "is no path"),
        (["edge", "ledger", "-H", "x"], 2, "is no header"),
    ],
)
def test_can_says_why(
    mesh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str
) -> None:
    found, out, err = run(capsys, monkeypatch, "mesh", "can", *words, "-c", str(mesh))
    assert found == code, (out, err)
    assert said in out + err
    assert not (mesh.parent / "mesh.db").exists()  # asking makes nothing


def test_can_as_json_names_the_place(mesh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, _ = run(capsys, monkeypatch, "mesh", "can", "edge", "payments", "GET", "/v1/payments", "--json", "-c", str(mesh))
    answer = json.loads(out)
    assert answer["allowed"] is True and answer["rule"] == "edge-to-payments" and answer["place"] == f"{mesh}:6"


def test_audit_is_told_apart(mesh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    mesh.write_text(MESH.replace("authorization:", "authorization:\n  default: audit"))
    code, out, _ = run(capsys, monkeypatch, "mesh", "can", "ledger", "payments", "-c", str(mesh))
    assert code == 1 and out.startswith("AUDIT")


def test_a_token_can_be_written_to_a_file(mesh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "payments.token"
    code, out, err = run(capsys, monkeypatch, "mesh", "token", "payments", "--out", str(target), "-c", str(mesh))
    assert (code, out) == (0, ""), err
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert json.loads(base64.urlsafe_b64decode(target.read_text().strip() + "=="))["service"] == "payments"
    assert run(capsys, monkeypatch, "mesh", "token", "nobody", "-c", str(mesh))[0] == 2
    assert run(capsys, monkeypatch, "mesh", "token", "payments", "--life", "9d", "-c", str(mesh))[0] == 2


def test_revoking_is_remembered(mesh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(capsys, monkeypatch, "mesh", "can", "edge", "payments", "GET", "/v1/payments", "-c", str(mesh))[0] == 0
    assert run(capsys, monkeypatch, "mesh", "revoke", "edge", "--reason", "lost", "-c", str(mesh))[0] == 0
    assert "edge is revoked" in run(capsys, monkeypatch, "mesh", "can", "edge", "payments", "GET", "/v1/payments", "-c", str(mesh))[1]
    code, out, _ = run(capsys, monkeypatch, "mesh", "status", "-c", str(mesh))
    assert code == 0 and "revoked    service edge" in out and "lost" in out and "none is running" in out
    assert run(capsys, monkeypatch, "mesh", "status", "--check", "-c", str(mesh))[0] == 1
    assert run(capsys, monkeypatch, "mesh", "revoke", "edge", "--undo", "-c", str(mesh))[0] == 0
    assert run(capsys, monkeypatch, "mesh", "revoke", "edge", "--undo", "-c", str(mesh))[0] == 1


def test_rotation_says_where_it_stands(mesh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(capsys, monkeypatch, "mesh", "rotate-root", "show", "-c", str(mesh))
    assert code == 1 and "there is no authority" in err
    assert run(capsys, monkeypatch, "mesh", "token", "payments", "-c", str(mesh))[0] == 0
    assert "generation 1: issues, root key in the folder" in run(capsys, monkeypatch, "mesh", "rotate-root", "show", "-c", str(mesh))[1]
    assert "does not issue yet" in run(capsys, monkeypatch, "mesh", "rotate-root", "prepare", "-c", str(mesh))[1]
    assert run(capsys, monkeypatch, "mesh", "rotate-root", "prepare", "-c", str(mesh))[0] == 1
    assert run(capsys, monkeypatch, "mesh", "rotate-root", "activate", "-c", str(mesh))[0] == 0
    code, out, _ = run(capsys, monkeypatch, "mesh", "rotate-root", "retire", "-c", str(mesh))
    assert code == 0 and "generation 2: issues" in out and "generation 1:" not in out.partition("out of the bundle")[2]


def test_a_roots_key_that_is_named_and_not_there_stops_the_rotation(mesh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip in the path must not make a new root that nobody who knows the old one believes."""
    assert run(capsys, monkeypatch, "mesh", "token", "payments", "-c", str(mesh))[0] == 0
    for step in ("prepare", "issuing"):
        code, _, err = run(capsys, monkeypatch, "mesh", "rotate-root", step, "--root-key", "/no/such.key", "-c", str(mesh))
        assert (code, err) == (1, "crossway: /no/such.key: there is no such file\n")
    assert "generation 2" not in run(capsys, monkeypatch, "mesh", "rotate-root", "show", "-c", str(mesh))[1]


SIDECAR = {"--service": "a", "--app": "127.0.0.1:9001", "--inbound": "127.0.0.1:9101", "--outbound": "127.0.0.1:9102", "--control": "https://127.0.0.1:1", "--state": "/no/state"}
GATEWAY = {"--service": "a", "--network": "west", "--bind": "127.0.0.1:9443", "--control": "https://127.0.0.1:1", "--state": "/no/state"}


@pytest.mark.parametrize(
    ("command", "change", "said"),
    [
        ("sidecar", {"--control": "https://127.0.0.1:1:2"}, "'https://127.0.0.1:1:2' is not the control plane's address"),
        ("sidecar", {"--control": "https://[::1"}, "'https://[::1' is not the control plane's address"),
        ("sidecar", {"--control": "https://127.0.0.1:99999"}, "is not the control plane's address"),
        ("sidecar", {"--control": "127.0.0.1:9700"}, "such as https://10.0.0.2:9700"),
        ("gateway", {"--control": "https://a:b"}, "is not the control plane's address"),
        ("sidecar", {"--inbound": "0.0.0.0:9101"}, "name the one by which others reach it with --advertise"),
        ("sidecar", {"--inbound": "[::]:9101"}, "name the one by which others reach it with --advertise"),
        ("gateway", {"--bind": "0.0.0.0:9443"}, "name the one by which others reach it with --advertise"),
        ("sidecar", {"--app": "127.0.0.1:0"}, "name the port on which the app listens"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, change: dict[str, str], said: str
) -> None:
    words = [word for pair in ({"sidecar": SIDECAR, "gateway": GATEWAY}[command] | change).items() for word in pair]
    try:
        code, _, err = run(capsys, monkeypatch, "mesh", command, *words)
    except SystemExit as ended:  # argparse
        code, err = int(str(ended.code)), capsys.readouterr().err
    assert code == 2 and said in " ".join(err.split())
