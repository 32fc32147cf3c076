"""`crossway mesh apply`: the mesh's document in the state, for all control planes at once, checked, based on what was seen, by its owner alone."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.cli.mesh_apply import ask
from tests.integration.control_kit import FILE, ControlProcess, Member
from tests.integration.postgres_kit import open_postgres
from tests.integration.processes import PATIENCE, environment, eventually

SOURCE = "  source: state\n  health: off\n"


def file_of(folder: Path, state: str = "mesh.db", name: str = "mesh") -> Path:
    """A control plane's own file, with a socket for its admin."""
    path = folder / f"{name}.yaml"
    path.write_text(FILE.format(state=state, lifetime="1h", control=SOURCE).replace("admin: 127.0.0.1:0", f"admin: unix:{folder}/{name}.sock"))
    return path


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlProcess]:
    with ControlProcess(tmp_path, path=file_of(tmp_path)) as process:
        yield process


def document(control: ControlProcess, *changes: tuple[str, str], name: str = "next.yaml") -> Path:
    """The control plane's own file with something changed, elsewhere."""
    text = control.path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (control.folder / "git").mkdir(exist_ok=True)
    path = control.folder / "git" / name
    path.write_text(text)
    return path


def apply(control: ControlProcess, path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "gateway", "mesh", "apply", "-c", str(path), "--admin", f"unix:{socket_of(control)}", *more]
    return subprocess.run(words, cwd="/", env=environment(), capture_output=True, text=True, timeout=PATIENCE * 2, check=False)


def socket_of(control: ControlProcess) -> str:
    return control.addresses["admin"].removeprefix("http://unix:")


def test_a_document_is_in_force_at_once_and_after_a_restart(control: ControlProcess) -> None:
    assert stat.S_IMODE(os.stat(socket_of(control)).st_mode) == 0o600
    member = Member(control, "payments")
    assert member.join()[0] == 200
    member.open().has(lambda held: held["services"]["ledger"]["timeout"] == "2000ms", "what the file says")
    path = document(control, ("timeout: 2s", "timeout: 7s"), ("  accounts: {}\n", "  accounts: {}\n  fraud: {}\n"), ("from: [payments], to: ledger", "from: [payments, fraud], to: ledger"))
    tried = apply(control, path, "--dry-run")
    assert tried.returncode == 0, tried.stderr
    assert tried.stdout.splitlines()[0].startswith("it would follow version 0-")
    assert tried.stdout.splitlines()[1:] == [
        "  services.ledger.timeout: 2.0 -> 7.0", "  services.fraud: added", "  authorization.rules.payments-to-ledger.from: changed",
    ]  # fmt: skip
    assert control.logged("a document is applied to the mesh") == []
    done = apply(control, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("version 1-") and "services.fraud: added" in done.stdout
    member.has(lambda held: held["services"]["ledger"]["timeout"] == "7000ms", "the document")
    # Commands know the service that the file does not name, and say where a rule stands.
    assert control.command("token", "fraud").returncode == 0
    allowed = control.command("can", "fraud", "ledger")
    assert allowed.returncode == 0 and "document 1 of the state:" in allowed.stdout
    # Who did it, and when, is in the log and in the state.
    line = control.logged("a document is applied to the mesh")[0]
    assert f"(uid {os.geteuid()}, pid " in line["by"] and line["version"] == 1 and "services.fraud: added" in line["changes"]
    assert control.status()["document"]["by"] == line["by"] and control.status()["document"]["digest"] == line["digest"]
    assert "document         1-" in control.command("status").stdout
    again = apply(control, path)
    assert again.returncode == 0 and again.stdout.startswith("nothing to do: this is version 1-")
    control.kill()
    control.start()
    assert control.logged("the control plane is ready to serve")[-1]["document"] == 1
    shown = apply(control, path, "--show")
    assert shown.stdout == path.read_text() and shown.stderr.startswith("version 1-")
    member.control = control
    member.open(member.held["version"])
    eventually(lambda: [row["state"] for row in control.status()["instances"]] == ["healthy"], "its return")
    assert member.held["services"]["ledger"]["timeout"] == "7000ms"
    member.close()


def test_mistakes_are_told_as_check_tells_them_and_change_nothing(control: ControlProcess) -> None:
    path = document(control, ("from: [payments]", "from: [paiments]"), ("timeout: 2s", "timeout: never"))
    done = apply(control, path)
    assert done.returncode == 2
    checked = subprocess.run(
        [sys.executable, "-m", "gateway", "check", str(path)], env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert checked.returncode != 0
    for block in (checked.stdout + checked.stderr).split("\n\n")[:2]:
        assert block in done.stderr
    assert "2 errors, nothing has changed" in done.stderr
    foreign = apply(control, document(control, ("trust_domain: bank.test", "trust_domain: other.test"), name="foreign.yaml"))
    assert foreign.returncode == 2 and "the trust domain of this mesh is bank.test" in foreign.stderr and "foreign.yaml:2:" in foreign.stderr
    assert control.status()["document"] is None


def test_who_has_not_seen_the_newest_one_does_not_undo_it(control: ControlProcess) -> None:
    one, two = (document(control, ("timeout: 2s", f"timeout: {number}s"), name=f"{number}.yaml") for number in (3, 4))
    seen = ask(socket_of(control), "GET")[1]
    assert apply(control, one, "--if-match", seen).returncode == 0
    late = apply(control, two, "--if-match", seen)
    assert late.returncode == 1 and "the document is 1-" in late.stderr
    assert ask(socket_of(control), "PUT", two.read_bytes())[0] == 428
    assert ask(socket_of(control), "PUT", two.read_bytes(), "garbage")[0] == 400
    assert apply(control, two).stdout.startswith("version 2-")
    assert apply(control, one, "--if-match", "*").stdout.startswith("version 3-")


def test_what_is_under_control_stays_the_files(control: ControlProcess) -> None:
    done = apply(control, document(control, ("timeout: 2s", "timeout: 3s"), ("  bind: 127.0.0.1:0", "  bind: 127.0.0.1:1\n  heartbeat: 3s")))
    assert done.returncode == 0
    assert "control.bind is not taken" in done.stderr and "control.heartbeat is not taken" in done.stderr
    # A change of the file itself still counts for that section, and for nothing else.
    control.edit("timeout: 2s", "timeout: 9s")
    eventually(lambda: len(control.logged("a document of the state is in force")) == 2, "the reload")
    assert "timeout: 3s" in apply(control, control.path, "--show").stdout
    # Until the file says that the file counts.
    control.edit("source: state", "source: file")
    eventually(lambda: control.logged("the mesh's file is in force"), "the file")
    refused = apply(control, control.path)
    assert refused.returncode == 1 and "control.source" in refused.stderr
    assert "timeout: 9s" in apply(control, control.path, "--show").stdout


def test_large_documents_pass_and_larger_ones_do_not(control: ControlProcess) -> None:
    path = document(control, ("timeout: 2s", "timeout: 3s"))
    path.write_text(path.read_text() + "# a long story\n" * 50_000)
    assert apply(control, path).stdout.startswith("version 1-")
    path.write_text(path.read_text() + "# a long story\n" * 50_000)
    assert ask(socket_of(control), "PUT", path.read_bytes(), "*")[0] == 413
    assert ask(socket_of(control), "PUT", b"\xff\xfe", "*")[0] == 422
    assert control.status()["document"]["version"].startswith("1-")


def test_nothing_of_it_is_there_over_tcp(tmp_path: Path) -> None:
    with ControlProcess(tmp_path, control=SOURCE) as control:
        for method in ("GET", "PUT"):
            connection = http.client.HTTPConnection("127.0.0.1", int(control.addresses["admin"].rpartition(":")[2]), timeout=PATIENCE)
            connection.request(method, "/v1/mesh", b"version: 1\n" if method == "PUT" else None, {"if-match": "*"})
            answer = connection.getresponse()
            assert answer.status == 403 and "Unix socket" in json.loads(answer.read())["error"]
            connection.close()
        refused = control.command("apply")
        assert refused.returncode == 2 and "over a Unix socket" in refused.stderr
        checked = subprocess.run(
            [sys.executable, "-m", "gateway", "check", str(control.path)], env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert "nobody can apply a document to this control plane" in checked.stdout + checked.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_user_is_refused_even_where_the_socket_is_open_to_all(tmp_path: Path) -> None:
    own = file_of(tmp_path)
    with tempfile.TemporaryDirectory() as folder:  # which others can enter, as those of tests they cannot
        os.chmod(folder, 0o755)
        own.write_text(own.read_text().replace(f"unix:{tmp_path}/mesh.sock", f"unix:{folder}/mesh.sock"))
        with ControlProcess(tmp_path, path=own) as control:
            os.chmod(socket_of(control), 0o777)
            assert asked_as(0, socket_of(control)).startswith(b"HTTP/1.1 200 ")
            assert asked_as(65534, socket_of(control)).startswith(b"HTTP/1.1 403 ")


def asked_as(user: int, path: str) -> bytes:
    """What a process of another user is answered."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgid(user)
            os.setuid(user)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(PATIENCE)
                sock.connect(path)
                sock.sendall(b"GET /v1/mesh HTTP/1.1\r\nhost: x\r\n\r\n")
                os.write(writing, sock.recv(100))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        return said.read()


def test_one_apply_reaches_every_control_plane_and_one_of_two_at_once_wins(tmp_path: Path) -> None:
    with open_postgres() as server:
        paths = [file_of(tmp_path, server.url, name) for name in ("one", "two")]
        with ControlProcess(tmp_path, path=paths[0]) as one, ControlProcess(tmp_path, path=paths[1]) as two:
            member = Member(two, "payments")
            assert member.join()[0] == 200
            member.open().has(lambda held: held["services"]["ledger"]["timeout"] == "2000ms", "the file's word")
            seen = ask(socket_of(one), "GET")[1]
            assert apply(one, document(one, ("timeout: 2s", "timeout: 6s")), "--if-match", "0").returncode == 0, seen
            member.has(lambda held: held["services"]["ledger"]["timeout"] == "6000ms", "what was applied at the other one")
            running = [
                subprocess.Popen(
                    [sys.executable, "-m", "gateway", "mesh", "apply", "-c", str(document(each, ("timeout: 2s", f"timeout: {number}s"), name=f"{number}.yaml")),
                     "--admin", f"unix:{socket_of(each)}", "--if-match", "1"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
                for number, each in ((11, one), (12, two), (13, one), (14, two))
            ]  # fmt: skip
            outcomes = [process.communicate(timeout=PATIENCE * 2) and process.returncode for process in running]
            assert sorted(outcomes) == [0, 1, 1, 1]
            won = (11, 12, 13, 14)[outcomes.index(0)]
            member.has(lambda held: held["services"]["ledger"]["timeout"] == f"{won}000ms", "the winner")
            eventually(lambda: ask(socket_of(one), "GET")[2] == ask(socket_of(two), "GET")[2], "one mind")
            member.close()


def test_a_document_that_one_control_plane_cannot_use_is_refused_there_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_postgres() as server:
        paths = [file_of(tmp_path, server.url, name) for name in ("one", "two")]
        with ControlProcess(tmp_path, path=paths[0]) as one:
            monkeypatch.setenv("LEDGER_TIMEOUT", "never")
            with ControlProcess(tmp_path, path=paths[1]) as two:
                monkeypatch.delenv("LEDGER_TIMEOUT")
                done = apply(one, document(one, ("timeout: 2s", 'timeout: "${env:LEDGER_TIMEOUT:-6s}"')))
                assert done.returncode == 0, done.stderr
                line = eventually(lambda: two.logged("the mesh's file is refused, the old one goes on"), "the refusal")[0]
                assert line["problems"][0]["file"] == "document 1 of the state" and "never" not in json.dumps(line)
                member = Member(two, "payments")
                assert member.join()[0] == 200
                member.open().has(lambda held: held["services"]["ledger"]["timeout"] == "2000ms", "what it had before")
                member.close()
                assert apply(one, document(one, ("timeout: 2s", "timeout: 5s"))).returncode == 0
                member.open().has(lambda held: held["services"]["ledger"]["timeout"] == "5000ms", "the next one")
                member.close()
