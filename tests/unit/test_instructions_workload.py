"""What callgrind runs: the requests pass through a real engine, without valgrind as with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.instructions.record import SCENARIOS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_workload_of_each_scenario_runs(scenario: str) -> None:
    command = [sys.executable, "-m", "benchmarks.instructions.workload", scenario, "--requests", "320"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("320 requests"), done.stderr


@pytest.mark.parametrize(("scenario", "batch"), [("bare", 32), ("grpc", 80)])
def test_requests_that_are_no_whole_rounds_are_refused(scenario: str, batch: int) -> None:
    command = [sys.executable, "-m", "benchmarks.instructions.workload", scenario, "--requests", str(3 * batch + 1)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"multiple of {batch}" in done.stderr
