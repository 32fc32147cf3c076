"""The demo: every step does what it should, what goes wrong is told, and nothing stays behind.

Strategy: the demo runs as its own command with a temporary directory of its own, which must be empty afterwards; its
processes carry that directory in their environment, so those that are left can be found. That its verdicts can be bad is shown by
banks that are built wrongly.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from gateway.demo import chapters
from gateway.demo.caller import TIMEOUT, Answer, Call, Caller
from gateway.demo.load import Load
from gateway.demo.member import Member
from gateway.demo.processes import StageError
from gateway.demo.stage import Stage, Watch
from gateway.demo.story import Outcome, Story

ROOT = Path(__file__).resolve().parents[2]
LONG = 300  # seconds for a whole demo on a busy machine; it takes half a minute on a quiet one


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gateway", "demo", *arguments]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def left(folder: Path) -> list[psutil.Process]:
    """Return the processes that were started with this temporary directory and still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("once")
    done = subprocess.run(
        command("--once"), cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=LONG, check=False
    )
    return done, folder


@pytest.mark.timeout(LONG + 30)
def test_every_step_does_what_it_should(once: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, _ = once
    assert done.returncode == 0, done.stdout + done.stderr
    for what, least in (("requests", 16), ("steps", 34)):
        right, total = re.search(rf"(\d+) of (\d+) {what} did what they should", done.stdout).groups()  # type: ignore[union-attr]
        assert right == total
        assert int(total) >= least
    assert "✗" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100  # it is not a terminal


@pytest.mark.timeout(LONG + 30)
def test_once_leaves_nothing_behind(once: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, folder = once
    assert list(folder.iterdir()) == []
    assert left(folder) == []


@pytest.fixture
def staying(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The demo, which stays up."""
    process = subprocess.Popen(
        command(), cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(left(tmp_path), timeout=15)
        for each in alive:
            each.kill()


def invitation(stdout: IO[str]) -> dict[str, str]:
    """Return the lines of the invitation by their first word, of commands by the two that follow."""
    lines = {}
    for line in stdout:
        if line.startswith("Ctrl-C"):
            return lines
        if "crossway mesh " in line:
            lines[" ".join(line.split()[1:3])] = line.strip()
        first, _, rest = line.strip().partition(" ")
        lines[first] = rest.strip()
    raise AssertionError(f"the demo ended: {lines}")


def reads(stdout: IO[str] | None, text: str) -> None:
    """Read the demo's output up to a line that contains a text."""
    assert stdout is not None
    seen = []
    for line in stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"the demo ended: {''.join(seen)}")


@pytest.mark.timeout(LONG)
def test_it_stays_up_with_working_addresses_until_interrupted(staying: subprocess.Popen[str], tmp_path: Path) -> None:
    assert staying.stdout is not None
    lines = invitation(staying.stdout)
    with urllib.request.urlopen(lines["status"], timeout=10) as status:
        assert [each["name"] for each in json.load(status)["listeners"]] == ["public"]
    for page in (lines["metrics"], lines["sidecar"].split()[0]):
        with urllib.request.urlopen(page, timeout=10) as metrics:
            assert b"istio_requests_total" in metrics.read()
    pasted = subprocess.run(
        ["sh", "-c", f"curl -s {lines['curl']}"], capture_output=True, text=True, timeout=20, check=True
    )
    assert "201 Created" in pasted.stdout
    shown = subprocess.run(lines["mesh status"].split(), cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "6 healthy" in shown.stdout
    assert Path(lines["configuration"]).is_file()
    staying.send_signal(signal.SIGINT)
    assert staying.wait(60) == 130
    assert left(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(LONG)
def test_asked_to_end_in_the_middle_of_its_load_it_removes_everything(staying: subprocess.Popen[str], tmp_path: Path) -> None:
    reads(staying.stdout, "SIGKILL to ledger-1")
    staying.terminate()
    assert staying.wait(60) == 128 + signal.SIGTERM
    assert left(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(LONG)
def test_killed_outright_it_takes_its_children_along(staying: subprocess.Popen[str], tmp_path: Path) -> None:
    reads(staying.stdout, "The edge")
    assert len(left(tmp_path)) > 10
    staying.kill()
    staying.wait(10)
    deadline = time.monotonic() + 60
    while left(tmp_path) and time.monotonic() < deadline:
        psutil.wait_procs(left(tmp_path), timeout=1)
    assert left(tmp_path) == []


class Impatient(Caller):
    """Does not wait for the answer to a request that it never completes: payments waits for the rest."""

    def call(self, call: Call) -> Answer:
        self.close()
        self._timeout = TIMEOUT if call.declared is None else 0.5
        return super().call(call)


class Unguarded(Stage):
    """A bank without edge and mesh: calls go straight to payments, which refuses nothing, and from there to the ledger."""

    def surroundings(self, member: Member) -> dict[str, str]:
        return {"LEDGER": f"http://127.0.0.1:{self.members['ledger-1'].app_port}"}

    def _start_mesh(self, watch: Watch) -> None:
        self.public = self.members["payments"].app_port
        for port in (self.auth, self.public, self.members["ledger-1"].app_port):
            self.until(lambda port=port: connects(port), "the bank")  # type: ignore[misc]

    def caller(self) -> Caller:
        return Impatient(self.public)


def connects(port: int) -> bool:
    caller = Caller(port)
    try:
        caller.call(Call("GET", "/"))
        return True
    except OSError:
        return False
    finally:
        caller.close()


@pytest.mark.timeout(LONG)
def test_an_edge_that_lets_everything_through_is_told() -> None:
    with Unguarded(once=True) as stage:
        stage.start()
        outcomes: dict[str, Outcome] = {outcome.title: outcome for outcome in Story(stage).play()}
    assert outcomes["payment, RS256 token"].good
    for title in (
        "no token",
        "forged token",
        "unsigned token (alg none)",
        "expired token",
        "missing scope",
        "Python policy refuses",
    ):
        assert outcomes[title].problem.startswith("expected 4"), title
        assert outcomes[title].reached == 1, title
    for title in ("oversized body", "unknown path", "request smuggling", "burst over the limit"):
        assert not outcomes[title].good, title


@pytest.mark.timeout(LONG)
def test_payments_that_fail_are_counted_and_entries_that_are_lost_are_told() -> None:
    with Unguarded(once=True) as stage:
        stage.start()
        with Load(stage) as load:
            stage.until(lambda: load.since().booked > 3, "payments")
            assert load.since().problem == ""
            stage.members["ledger-1"].children[0].kill()
            stage.until(lambda: load.since().failed.total() > 3, "failures")
        tally = load.since()
        assert f"{tally.failed.total()} failed" in str(tally)
        assert "502 no answer" in tally.problem
        load.payments = lambda: {"p-never"}  # type: ignore[method-assign]
        (found,) = chapters.books(stage, load)
        assert found.problem == "1 payments are not in the book"


class Permissive(Stage):
    """A mesh whose rules let accounts read the entries."""

    def _write(self) -> None:
        super()._write()
        self.registry.edit("prefix: /balance", "prefix: /")


@pytest.mark.timeout(LONG)
def test_a_mesh_that_lets_everything_through_is_told() -> None:
    with Permissive(once=True) as stage:
        stage.start()
        found = list(chapters.guarded(chapters.denied(stage)))
    assert found[0].problem == ""
    assert found[1].problem.startswith("expected 403, not 200")
    assert all(each.problem for each in found[1:])


class Broken(Stage):
    """A control plane that cannot read its file."""

    def _write(self) -> None:
        super()._write()
        self.registry.edit("trust_domain: bank.test", "trust_domain: Bank")


@pytest.mark.timeout(LONG)
def test_what_does_not_start_is_told_with_its_own_words() -> None:
    stage = Broken(once=True)
    with stage, pytest.raises(StageError, match=r"(?s)control plane ended with status 2\n.*trust_domain"):
        stage.start()
    assert not stage.folder.exists()
    assert not any(child.process.poll() is None for child in stage.children)
