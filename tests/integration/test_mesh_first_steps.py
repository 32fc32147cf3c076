"""What an operator meets first: members and control planes that cannot start, or are stopped before they have, say why in one sentence."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.mesh_kit import Control, free_port
from tests.integration.processes import PATIENCE, environment, eventually

MESH = """\
version: 1
trust_domain: bank.test
control: {{bind: "127.0.0.1:{port}", state: {state}, ca: {ca}}}
services: {{ledger: {{}}}}
"""


@pytest.fixture
def token(tmp_path: Path) -> Iterator[Path]:
    control = Control(tmp_path)
    yield control.token("ledger")
    control.stop()


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(8)
        yield sock.getsockname()[1]


def joining(folder: Path, control: int, *more: str) -> subprocess.Popen[str]:
    """A sidecar in a process group of its own, as a terminal starts it."""
    words = ["--service", "ledger", "--app", "127.0.0.1:9", "--inbound", f"127.0.0.1:{free_port()}", "--outbound", f"127.0.0.1:{free_port()}"]
    words += ["--control", f"https://127.0.0.1:{control}", "--state", "state", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "gateway", "mesh", "sidecar", *words], cwd=folder, env=environment(), text=True,
        stdout=subprocess.DEVNULL, stderr=(folder / "log").open("w"), start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("answers", [False, True], ids=["between two attempts", "in an attempt"])
def test_a_member_that_is_stopped_while_it_joins_ends_in_peace(tmp_path: Path, token: Path, number: signal.Signals, answers: bool) -> None:
    """Ctrl-C reaches every process of the terminal's group: none of them has a traceback to tell."""
    with silent() as port:
        process = joining(tmp_path, port if answers else free_port(), "--token", str(token))
        log = tmp_path / "log"
        if answers:
            eventually(lambda: Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip(), "the attempt")
        else:
            eventually(lambda: "joining the mesh failed" in log.read_text(), "a failed attempt")
        os.killpg(process.pid, number)
        assert process.wait(PATIENCE) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]  # nothing but records
    assert lines[-1]["event"] == "stopped before it joined the mesh"
    if not answers:
        assert lines[0]["error"].startswith("the control plane at https://127.0.0.1:") and lines[0]["error"].endswith("cannot be reached: Connection refused")


def test_a_token_that_has_ended_is_called_so(tmp_path: Path, token: Path) -> None:
    """A token that is over makes one attempt, whose failure may be the clock's; the sentence says both."""
    line = token.read_text().strip()
    said = json.loads(base64.urlsafe_b64decode(line + "=" * (-len(line) % 4))) | {"expires": 1}
    token.write_text(base64.urlsafe_b64encode(json.dumps(said).encode()).decode().rstrip("="))
    assert joining(tmp_path, free_port(), "--token", str(token)).wait(PATIENCE) == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("crossway: cannot join the mesh, and the token has ended (`crossway mesh token ledger` makes another): the control plane at https://")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--token", "nowhere"), "--token nowhere: No such file or directory; `crossway mesh token ledger` makes one"),
        (("--token", "log", "--state", "log"), "log: this is a file, and the member's state is a folder: name another"),
    ],
)
def test_a_member_names_the_option_that_it_cannot_use(tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    process = joining(tmp_path, 1, *more)
    assert process.wait(PATIENCE) == 1
    assert (tmp_path / "log").read_text() == f"crossway: {said}\n"


def control(folder: Path, *, port: int = 0, state: str = "mesh.db", ca: str = "ca") -> tuple[int, str]:
    (folder / "mesh.yaml").write_text(MESH.format(port=port, state=state, ca=ca))
    words = [sys.executable, "-m", "gateway", "mesh", "control", "-c", "mesh.yaml"]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.returncode, done.stderr


def test_a_control_plane_names_the_key_that_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for wrong, said in (
        ({"state": "folder"}, f"crossway: control.state: {tmp_path}/folder: Is a directory: name a file, which is made when it is not there\n"),
        ({"state": "nowhere/mesh.db"}, f"crossway: control.state: {tmp_path}/nowhere/mesh.db: No such file or directory: make its folder first\n"),
        ({"ca": "file"}, f"crossway: control.ca: {tmp_path}/file: this is a file: name a folder, which is made when it is not there\n"),
    ):
        assert control(tmp_path, **wrong) == (1, said)  # type: ignore[arg-type]


def test_a_control_plane_whose_port_is_taken_does_not_say_that_it_serves(tmp_path: Path) -> None:
    with silent() as port:
        code, said = control(tmp_path, port=port)
    assert code == 1 and said == (
        f"crossway: control.bind: cannot bind 127.0.0.1:{port}: it is in use by another process (ss -ltnp shows which); stop it or change bind: 127.0.0.1:{port}\n"
    )


def test_the_wrong_kind_of_file_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(MESH.format(port=0, state="mesh.db", ca="ca"))
    (tmp_path / "edge.yaml").write_text(
        "version: 1\nlisteners: {public: {bind: 127.0.0.1:0}}\nupstreams: {a: {targets: [127.0.0.1:9]}}\nroutes: [{name: a, match: {prefix: /}, upstream: a}]\n"
    )
    for words, said in (
        (["run", "-c", "mesh.yaml"], "mesh.yaml:2:1: this is a mesh's file (`trust_domain`), and a gateway's is wanted"),
        (["mesh", "control", "-c", "edge.yaml"], "edge.yaml:2:1: this is a gateway's file (`listeners`), and a mesh's is wanted"),
        (["mesh", "status", "-c", "edge.yaml"], "edge.yaml:2:1: this is a gateway's file (`listeners`), and a mesh's is wanted"),
    ):
        done = subprocess.run([sys.executable, "-m", "gateway", *words], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 2 and done.stderr.startswith(said) and "crossway " in done.stderr and done.stderr.count("this is") == 1 and "unknown key" not in done.stderr
