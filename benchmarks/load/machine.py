"""The machine and the versions that a figure was taken with: without them it says nothing.

Strategy: read what the system tells for free; a program that cannot be asked is recorded as 'unknown', never guessed.
"""

import os
import platform
import re
import subprocess
import timeit
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gateway
from benchmarks.load.programs import locate
from benchmarks.load.scenarios import ROOT

ASKED = {
    "haproxy": (["-v"], r"version (\d[\d.]*)"),
    "haproxy-lts": (["-v"], r"version (\d[\d.]*)"),
    "nginx": (["-v"], r"nginx/(\S+)"),
    "envoy": (["--version"], r"/(\d+\.\d+\.\d+)/"),
    "caddy": (["version"], r"v(\d\S*)"),
    "traefik": (["version"], r"Version:\s+(\S+)"),
    "wrk": (["-v"], r"wrk (?:debian/)?(\S+)"),
    "h2load": (["--version"], r"nghttp2/(\S+)"),
    "openssl": (["version"], r"OpenSSL (\S+)"),
    "cc": (["--version"], r"(\d+\.\d+\.\d+)"),
}
PACE_LOOP, PACE_TIMES = 20_000, 15
PACKAGES = ("uvloop", "cython", "pyjwt", "cryptography")


def printed(command: list[str]) -> str:
    """Return what a program prints, on either stream; empty when it is not there or cannot be run."""
    path = locate(command[0])
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *command[1:]], capture_output=True, text=True, cwd=ROOT, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def versions() -> dict[str, str]:
    """Return the version of each program and package that takes part."""
    found = {"python": platform.python_version(), "crossway": gateway.__version__}
    for name, (words, pattern) in ASKED.items():
        match = re.search(pattern, printed([name, *words]))
        found[name] = match.group(1) if match else "unknown"
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def cpu_model() -> str:
    """Return the processor's name as the kernel spells it."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match.group(1) if match else platform.machine()


def under_hypervisor() -> bool:
    """True on a virtual machine, where microseconds are not comparable with anybody's."""
    return re.search(r"^flags\s*:.*\bhypervisor\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE) is not None


def pace(core: int) -> float:
    """Return how many microseconds a fixed piece of work takes on a core now: the best of some, so that being interrupted
    does not count, and only the processor's own speed does.
    """
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        return min(timeit.repeat(lambda: sum(range(PACE_LOOP)), number=1, repeat=PACE_TIMES)) * 1e6
    finally:
        os.sched_setaffinity(0, own)


def memory_mib() -> int:
    """Return the machine's memory in MiB."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(match.group(1)) // 1024 if match else 0


def commit() -> tuple[str, bool]:
    """Return (the commit's short hash, whether tracked files equal it); ('unknown', False) outside a clone."""
    name = printed(["git", "rev-parse", "--short=12", "HEAD"]).strip()
    if not re.fullmatch(r"[0-9a-f]{12}", name):
        return "unknown", False
    changes = printed(["git", "status", "--porcelain", "--untracked-files=no"]).splitlines()
    return name, not any(line[3:] for line in changes if not line[3:].startswith("benchmarks/results/"))


def facts() -> dict[str, object]:
    """Return everything about this machine and tree that belongs to a result."""
    name, clean = commit()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": name,
        "clean_tree": clean,
        "machine": {
            "kernel": platform.release(),
            "architecture": platform.machine(),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "memory_mib": memory_mib(),
            "virtual": under_hypervisor(),
            "load_average": round(os.getloadavg()[0], 2),
        },
        "versions": versions(),
    }
