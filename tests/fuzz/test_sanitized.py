"""The parser's tests once more, with native modules built under AddressSanitizer and UBSan.

Strategy: `script/sanitize` builds into build/asan, beside the ordinary build. First it must report an over-read that is
planted; only then does silence mean something.
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
        timeout=280,
        check=False,
    )
    if done.returncode == NO_RUNTIME:
        pytest.skip(done.stderr.strip())
    return done


@pytest.mark.timeout(300)
def test_reading_one_byte_too_many_is_reported() -> None:
    done = sanitized("-c", "from gateway._speedups import testing; testing.read_past_the_end()")
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
    assert done.returncode == 99


@pytest.mark.timeout(300)
def test_the_parsers_tests_pass_under_sanitizers() -> None:
    done = sanitized("-m", "pytest", "-p", "no:cacheprovider", "tests/model/test_http1_differential.py", "tests/model/test_http1_properties.py")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


@pytest.mark.timeout(300)
def test_a_short_fuzz_run_under_sanitizers_finds_nothing() -> None:
    done = sanitized("-m", "tests.fuzz.run", "--runs", "4000", "--seconds", "10", "--seed", "3")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("nothing found") == 4
