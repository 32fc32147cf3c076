"""One shared word per worker slot that says when its loop last turned.

Strategy: an anonymous shared mapping made before the first fork; a heartbeat is a plain aligned 8-byte store by the one
worker that owns the word, read by the supervisor. It is all that an idle worker wakes up for, hence so rare. A word of its own, and not a metric, because a metric may be folded or
reset while the watchdog must never see a time that was not written by the worker it watches.
"""

import mmap
import time

HEARTBEAT = 2.0  # seconds between two
WORD = 8
LINE = 64  # bytes between two words: two workers never write to one cache line


class Board:
    """Heartbeats of all slots, in nanoseconds of CLOCK_MONOTONIC (the same clock in every process)."""

    def __init__(self, slots: int) -> None:
        self._map = mmap.mmap(-1, max(1, slots) * LINE)
        self._words = memoryview(self._map).cast("Q")

    def beat(self, slot: int) -> None:
        self._words[slot * (LINE // WORD)] = time.monotonic_ns()

    def silence(self, slot: int) -> float:
        """Return the seconds since the slot's last heartbeat."""
        return (time.monotonic_ns() - self._words[slot * (LINE // WORD)]) / 1e9
