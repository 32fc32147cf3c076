"""The machine that a figure was taken on: without it the figure says nothing.

Strategy: read what the kernel tells for free; what cannot be read is None, never guessed. No host name and no user: results
are meant to be passed on.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

from gateway.config.cpus import available_cpus, cpu_quota


def machine() -> dict[str, Any]:
    """Return processor, cores, quota, kernel and memory, ready for JSON."""
    cpuinfo = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "cpu_quota": cpu_quota(),
        "cpus_available": available_cpus(),
        "virtual": bool(re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE)),
        "governor": governor or None,
        "memory_mib": int(memory[1]) // 1024 if memory else None,
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
        "python": ".".join(str(number) for number in sys.version_info[:3]),
    }


def tree(pid: int) -> list[int]:
    """A process and everything below it."""
    pids = [pid]
    for one in pids:
        for threads in _children(one):
            pids += threads
    return pids


def _children(pid: int) -> list[list[int]]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    return [[int(word) for word in _read(f"/proc/{pid}/task/{thread}/children").split()] for thread in threads]


def cpu_seconds(pid: int) -> float:
    """CPU time so far of a process and everything below it, by the kernel's own clocks: /proc counts whole ticks."""
    total = 0.0
    for one in tree(pid):
        # One that ended meanwhile has no clock. The id of a process's CPU clock is ~pid << 3 | 2.
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~one << 3) | 2)
    return total


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""
