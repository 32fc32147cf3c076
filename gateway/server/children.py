"""The supervisor's book of its children: who they are, which slot they serve, when a dead one is replaced.

Strategy: a slot is permanent (its sockets, its shared memory), the worker in it is not. Replacement is at once for a worker
that lived, and slower each time for one that dies young, so that a crash loop costs one fork in 5 s and never a core.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

from gateway.server.channel import Channel
from gateway.server.wait import Timer

FIRST_DELAY = 0.05  # seconds before a dead worker is replaced
LONGEST_DELAY = 5.0
PROVEN = 10.0  # a worker that lived this long was no part of a crash loop


class Role(StrEnum):
    WORKER = "worker"
    ADMIN = "admin"
    CHECKER = "checker"
    COMPILER = "compiler"


class Condition(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    HUNG = "hung"


@dataclass
class Child:
    """A process that the supervisor started and has not reaped."""

    role: Role
    pid: int
    channel: Channel
    slot: int = -1
    version: int = 0  # of the configuration it runs
    condition: Condition = Condition.STARTING
    started: float = field(default_factory=time.monotonic)
    epoch: float = field(default_factory=time.time)
    kill: Timer | None = None  # pending SIGKILL

    @property
    def age(self) -> float:
        return time.monotonic() - self.started


@dataclass
class Slot:
    """A worker's place: the worker in it, and how its predecessors ended."""

    index: int
    child: Child | None = None
    young_deaths: int = 0
    respawn: Timer | None = None

    def delay_after(self, age: float) -> float:
        """Return the seconds to wait before the successor of a worker that lived `age` seconds."""
        self.young_deaths = 1 if age >= PROVEN else self.young_deaths + 1
        return float(min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(self.young_deaths - 1, 10)))
