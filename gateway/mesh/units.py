"""Durations, sizes and shares as a mesh's files write them, and as numbers: what an assignment may carry.

Strategy: the control plane has checked them; here they are only read, without the configuration's schema, which a sidecar does not hold in
memory.
"""

from __future__ import annotations

import re
from typing import Any

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def seconds(value: Any) -> float:
    """Return a duration such as 2, 2.5, "500ms" or "1h" in seconds. Raises ValueError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no duration")
    return float(match[1]) * _SECONDS[match[2]]


def share(value: Any) -> float:
    """Return a percentage such as "20%" or a fraction such as 0.2 as a fraction. Raises ValueError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?%", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no percentage")
    return float(match[1]) / 100


def size(value: Any) -> int:
    """Return a size such as 4096 or "64KiB" in bytes. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"([0-9]+) ?(|B|KiB|MiB|GiB)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no size")
    return int(match[1]) * _BYTES[match[2]]
