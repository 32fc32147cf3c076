"""No way of failing leaves anything behind: not a connection, a buffer, a descriptor, a task, or memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.processes import PATIENCE, ROOT, environment
from tests.leaks.paths import PATHS

COUNT = int(os.environ.get("CROSSWAY_LEAK_EXCHANGES", "6000"))  # a release is tested with 20000
RESIDENT = 256 << 10  # bytes that the process may grow in the last four fifths: 54 bytes an exchange would be seen
TRACED = 16 << 10  # bytes that Python may hold more after the last twentieth, the same for each exchange


@pytest.mark.timeout(240)
@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_left_behind(path: str, tmp_path: Path) -> None:
    count = COUNT // 5 if path in ("late", "tls_clients", "tls_upstreams", "tls_moves") else COUNT  # deadlines and signatures take their time
    command = [sys.executable, "-m", "tests.leaks.paths", path, str(count), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE * 10, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["after"] == found["before"]
    assert found["sizes"][-1] - found["sizes"][0] < RESIDENT, found["sizes"]
    assert found["traced"] < TRACED
