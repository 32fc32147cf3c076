"""The parser's and the wire tests once more, with every native module built under AddressSanitizer and UBSan.

Strategy: `script/sanitize` builds into build/asan, beside the ordinary build. First it must report an over-read that is
planted; only then does silence mean something. A compiler without the sanitizers' runtime fails these tests: gcc in Debian and
Ubuntu has it, and script/setup installs gcc.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 2400  # seconds; the first call builds every module, and the machine may be busy elsewhere


def sanitized(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command on the sanitized modules."""
    return subprocess.run(
        [str(ROOT / "script" / "sanitize"), sys.executable, *command],
        env={**os.environ, "PYTHON": sys.executable, "HYPOTHESIS_PROFILE": "sanitized"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def passes(*tests: str) -> None:
    """Run tests on the sanitized modules; all must pass."""
    # --capture=sys: a report is written past Python, to the descriptor, by a process that ends there.
    done = sanitized("-m", "pytest", "-p", "no:cacheprovider", "--capture=sys", *tests)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout and " failed" not in done.stdout


@pytest.mark.timeout(TIMEOUT + 20)
def test_reading_one_byte_too_many_is_reported() -> None:
    done = sanitized("-c", "from gateway._speedups import testing; testing.read_past_the_end()")
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
    assert done.returncode == 99


@pytest.mark.timeout(TIMEOUT + 20)
def test_the_parsers_tests_pass_under_sanitizers() -> None:
    passes(*sorted(str(path) for path in (ROOT / "tests" / "model").glob("test_http1_*.py")))


@pytest.mark.timeout(TIMEOUT + 20)
def test_the_wire_transcripts_pass_under_sanitizers() -> None:
    passes(str(ROOT / "tests" / "wire" / "test_transcripts.py"))


@pytest.mark.timeout(TIMEOUT + 20)
def test_noise_over_http2_touches_nothing_that_was_freed() -> None:
    passes(str(ROOT / "tests" / "integration" / "test_h2_noise.py"))


@pytest.mark.timeout(TIMEOUT + 20)
def test_a_short_fuzz_run_under_sanitizers_finds_nothing() -> None:
    done = sanitized("-m", "tests.fuzz.run", "--runs", "4000", "--seconds", "10", "--seed", "3")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("nothing found") == len(TARGETS)
