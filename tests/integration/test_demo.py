"""The demo: every request of its story does what it should, a gateway that fails is told, and nothing stays behind.

Strategy: the demo runs as its own command with a temporary directory of its own, which must be empty afterwards; its
processes carry that directory in their arguments or environment, so those that are left can be found.
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

from gateway.demo.caller import TIMEOUT, Answer, Call, Caller
from gateway.demo.stage import Stage
from gateway.demo.story import Outcome, Story

ROOT = Path(__file__).resolve().parents[2]


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
        command("--once"), cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=60, check=False
    )
    return done, folder


def test_every_request_does_what_it_should(once: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, _ = once
    assert done.returncode == 0, done.stdout + done.stderr
    right, total = re.search(r"(\d+) of (\d+) requests did what they should", done.stdout).groups()  # type: ignore[union-attr]
    assert right == total
    assert int(total) >= 15
    assert "✗" not in done.stdout


def test_once_leaves_nothing_behind(once: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, folder = once
    assert list(folder.iterdir()) == []
    assert left(folder) == []


@pytest.fixture
def staying(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """Start the demo and read what it prints until it says how to end it."""
    process = subprocess.Popen(
        command(), cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        yield process, invitation(process.stdout)
    finally:
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(left(tmp_path), timeout=15)
        for each in alive:
            each.kill()


def invitation(stdout: IO[str]) -> dict[str, str]:
    """Return the lines of the invitation by their first word."""
    lines = {}
    for line in stdout:
        if line.startswith("Ctrl-C"):
            return lines
        first, _, rest = line.strip().partition(" ")
        lines[first] = rest.strip()
    raise AssertionError(f"the demo ended: {lines}")


def test_it_stays_up_with_working_addresses_until_interrupted(
    staying: tuple[subprocess.Popen[str], dict[str, str]], tmp_path: Path
) -> None:
    process, lines = staying
    with urllib.request.urlopen(lines["status"], timeout=10) as status:
        assert [each["name"] for each in json.load(status)["listeners"]] == ["public"]
    with urllib.request.urlopen(lines["metrics"], timeout=10) as metrics:
        assert b"# TYPE" in metrics.read()
    pasted = subprocess.run(
        ["sh", "-c", f"curl -s {lines['curl']}"], capture_output=True, text=True, timeout=20, check=True
    )
    assert "201 Created" in pasted.stdout
    assert Path(lines["configuration"]).is_file()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert left(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_killed_outright_it_takes_its_children_along(
    staying: tuple[subprocess.Popen[str], dict[str, str]], tmp_path: Path
) -> None:
    process, _ = staying
    assert len(left(tmp_path)) > 3
    process.kill()
    process.wait(10)
    deadline = time.monotonic() + 45
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
    """A stage without a gateway: calls go straight to payments, which refuses nothing."""

    def _start_gateway(self) -> None:
        self.public = self.ports["payments"]

    def caller(self) -> Caller:
        return Impatient(self.public)


def test_a_gateway_that_lets_everything_through_is_told() -> None:
    with Unguarded(once=True) as stage:
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
