"""Replace a worker, or the checker, whose loop stands still.

Strategy: a worker that turns writes the time into its word of the board; one that has not for too long gets SIGABRT, which
makes Python print where it stands, and SIGKILL a second later (a stopped process hears nothing else). Time in which the
supervisor itself did not run is not held against the workers: the machine, or the whole process group, was stopped.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from gateway.server.board import HEARTBEAT
from gateway.server.children import Child, Condition, Role
from gateway.server.log import log

if TYPE_CHECKING:
    from gateway.server.supervisor import Supervisor

SILENCE = 10.0 + HEARTBEAT  # seconds without one: who stands still for 10 s may have been about to give his next
START_LIMIT = 60.0  # seconds a worker may take to build its snapshot before its first heartbeat
OVERSLEPT = 5.0  # seconds between two looks after which nobody is blamed
LAST_WORDS = 1.0  # seconds between SIGABRT and SIGKILL


class Watchdog:
    """Looks at every worker once for each heartbeat that it gives, for as long as the supervisor turns."""

    def __init__(self, supervisor: Supervisor, silence: float) -> None:
        self.supervisor = supervisor
        self.silence = silence
        self._looked = self._trusted_since = time.monotonic()

    def look(self) -> None:
        now = time.monotonic()
        if now - self._looked > OVERSLEPT:
            self._trusted_since = now
        self._looked = now
        for child in list(self.supervisor.children.values()):
            if child.role is Role.WORKER and child.condition is not Condition.HUNG and self._owns_slot(child):
                limit = START_LIMIT if child.condition is Condition.STARTING else self.silence
                if (silent := self._silence(child, self.supervisor.board.silence(child.slot), now)) > limit:
                    self._replace(child, silent)
        checker = self.supervisor.checking.child
        if checker is not None and checker.condition is not Condition.HUNG:
            silent = self._silence(checker, self.supervisor.board.silence(self.supervisor.capacity), now)
            if silent > (START_LIMIT if checker.condition is Condition.STARTING else self.silence):
                self._replace(checker, silent)
        self.supervisor.wait.after(min(HEARTBEAT, self.silence / 4), self.look)

    def _silence(self, child: Child, silence: float, now: float) -> float:
        return min(silence, now - self._trusted_since, child.age)

    def _owns_slot(self, child: Child) -> bool:
        slots = self.supervisor.slots
        return child.slot < len(slots) and slots[child.slot].child is child

    def _replace(self, child: Child, silent: float) -> None:
        log.error(
            f"{child.role} hangs and is replaced",
            extra={"slot": child.slot, "child": child.pid, "silent": round(silent, 3)},
        )
        child.condition = Condition.HUNG
        self.supervisor.signal_child(child, signal.SIGABRT)
        if child.kill is not None:
            child.kill.cancel()
            child.kill = None
        self.supervisor.kill_after(child, LAST_WORDS)
        self.supervisor.publish()
