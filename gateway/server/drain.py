"""How the gateway stops: not ready, a pause, no new connections, the rest in its own time, the end.

Strategy: the pause is for load balancers that learn of it from /readyz; connections are still accepted meanwhile. Workers
finish for themselves and say what they could not finish; the supervisor only keeps the time. The admin process goes
last, so that /livez and /metrics answer until nothing is left to tell. A second signal means now.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from gateway.server.children import Child, Role
from gateway.server.log import log

if TYPE_CHECKING:
    from gateway.server.supervisor import Supervisor

MARGIN = 2.0  # seconds a worker may need, after the deadline, to write down what it could not finish
LAST_WORDS = 0.5  # seconds between SIGTERM and SIGKILL once it is urgent


class Shutdown:
    """A stop under way; sets supervisor.exit_code when the last child is gone."""

    def __init__(self, supervisor: Supervisor, delay: float, deadline: float) -> None:
        self.supervisor = supervisor
        self.delay = delay
        self.deadline = deadline
        self.draining = False  # no new connections, no new workers
        self.forced = False
        self._leaving = False  # the admin process was told to go

    def begin(self) -> None:
        log.info("stopping", extra={"delay": self.delay, "deadline": self.deadline})
        self.supervisor.notifier.stopping("Draining")
        self.supervisor.publish()
        if self.supervisor.reload is not None:
            self.supervisor.reload.cancel("the gateway is stopping")
        self.supervisor.wait.after(self.delay, self.drain) if self.delay > 0 else self.drain()

    def drain(self) -> None:
        """Stop accepting, everywhere, and let the workers finish."""
        if self.draining:
            return
        self.draining = True
        for slot in self.supervisor.slots:
            if slot.respawn is not None:
                slot.respawn.cancel()
        for child in self._workers():
            self.supervisor.retire(child, self.deadline)
        # After the message: a worker accepts what its queue holds before it closes the last copy of the socket.
        for listener in self.supervisor.listeners.values():
            listener.close()
        self._next()

    def force(self) -> None:
        """End at once: workers get a moment to log what they cut off."""
        if self.forced:
            return
        self.forced = True
        log.warning("stopping at once; unfinished exchanges are cut off")
        self.drain()
        supervisor = self.supervisor
        for child in self._workers():
            child.channel.send({"type": "drain", "deadline": 0})
        supervisor.wait.after(LAST_WORDS, self._kill_all)

    def lost(self, child: Child) -> None:
        if self.draining:
            self._next()

    def _next(self) -> None:
        if any(True for _ in self._workers()):
            return
        supervisor = self.supervisor
        if not self._leaving:
            self._leaving = True
            for child in list(supervisor.children.values()):
                supervisor.signal_child(child, signal.SIGTERM)
            supervisor.wait.after(MARGIN, self._kill_all)
        if not supervisor.children:
            if supervisor.admin_listener is not None:
                supervisor.admin_listener.close()
            log.info("stopped", extra={"forced": self.forced})
            supervisor.exit_code = 0

    def _workers(self) -> list[Child]:
        return [child for child in self.supervisor.children.values() if child.role is Role.WORKER]

    def _kill_all(self) -> None:
        for child in list(self.supervisor.children.values()):
            self.supervisor.signal_child(child, signal.SIGKILL)
