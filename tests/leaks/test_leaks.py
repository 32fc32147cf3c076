"""No way of failing leaves anything behind: not a connection, a buffer, a descriptor, a task, or memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.processes import ROOT, environment
from tests.leaks.paths import PATHS

COUNT = 20_000  # exchanges
RESIDENT = 512 << 10  # bytes that the process may grow in the last 16,000: 32 bytes an exchange would be seen
TRACED = 16 << 10  # bytes that Python may hold more after the last 1,000


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_left_behind(path: str, tmp_path: Path) -> None:
    count = COUNT // 5 if path == "late" else COUNT  # deadlines take their time
    command = [sys.executable, "-m", "tests.leaks.paths", path, str(count), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["after"] == found["before"]
    assert found["sizes"][-1] - found["sizes"][0] < RESIDENT, found["sizes"]
    assert found["traced"] < TRACED
