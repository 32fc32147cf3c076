"""How many CPUs this process may use.

Strategy: the smaller of the scheduler's affinity and the quota of every cgroup (v2) above us; never the host's core
count, which in a container has nothing to do with what we get.
"""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cpus(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of CPUs to plan for, at least 1; a quota of 1.5 CPUs counts as 2."""
    cpus = len(os.sched_getaffinity(0))
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return cpus
    group = next((line[3:].strip("/") for line in lines if line.startswith("0::")), None)
    while group is not None:
        try:
            quota, period = (root / group / "cpu.max").read_text().split()
            if quota != "max":
                cpus = min(cpus, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError, ZeroDivisionError):
            pass  # the root group has no cpu.max, and cgroup v1 has none at all
        group = group.rpartition("/")[0] if "/" in group else ("" if group else None)
    return max(1, cpus)
