"""The parser's tests once more, with native modules built under AddressSanitizer and UBSan.

Strategy: `script/sanitize` builds into build/asan, beside the ordinary build. First it must report an over-read that is
planted; only then does silence mean something. Only the parser is built here; CI runs `script/sanitize` alone, which builds
all modules and plays the wire transcripts as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = "headers,http1,testing"
NO_RUNTIME = 77


def sanitized(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command on the sanitized modules; skips when the compiler has no sanitizer runtime."""
    done = subprocess.run(
        [str(ROOT / "script" / "sanitize"), sys.executable, *command],
        env={**os.environ, "PYTHON": sys.executable, "CROSSWAY_MODULES": MODULES, "HYPOTHESIS_PROFILE": "sanitized"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    if done.returncode == NO_RUNTIME:
        pytest.skip(done.stderr.strip())
    return done


def passes(*tests: str) -> None:
    """Run tests on the sanitized modules; all must pass."""
    done = sanitized("-m", "pytest", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout and " failed" not in done.stdout


@pytest.mark.timeout(600)  # the first one builds
def test_reading_one_byte_too_many_is_reported() -> None:
    done = sanitized("-c", "from gateway._speedups import testing; testing.read_past_the_end()")
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
    assert done.returncode == 99


@pytest.mark.timeout(600)  # the first one builds
def test_the_parsers_tests_pass_under_sanitizers() -> None:
    passes(*sorted(str(path) for path in (ROOT / "tests" / "model").glob("test_http1_*.py")))


@pytest.mark.timeout(600)  # the first one builds
def test_a_short_fuzz_run_under_sanitizers_finds_nothing() -> None:
    done = sanitized("-m", "tests.fuzz.run", "--runs", "4000", "--seconds", "10", "--seed", "3")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("nothing found") == 4
