"""Files that are exchanged under a running process, as a kubelet exchanges those of a Secret: whoever uses them is told.

Strategy: two looks that agree before anybody is told, since a certificate and its key are two files. A look is one stat for each file and no thread, which
would cost a sidecar more memory than it saves time: these are few files, and in memory wherever a Secret is mounted.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

LOOK = 2.0  # seconds
Version = tuple[int, int, int]


def versions(files: Sequence[str]) -> list[Version | None]:
    """Return what tells whether each file is the one that it was; None for one that is not there."""
    found: list[Version | None] = []
    for each in files:
        try:
            status = os.stat(each)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return found


async def follow(files: Sequence[str], changed: Callable[[], None], look: float = LOOK) -> None:
    """Call `changed` whenever the files are others than before and have rested for one look; returns only by cancellation."""
    used = seen = versions(files)
    while True:
        await asyncio.sleep(look)
        last, seen = seen, versions(files)
        if seen != used and seen == last:
            used = seen
            changed()
