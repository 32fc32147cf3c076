"""The supervisor's part in active health checks: one checker process while the configuration has a check.

Strategy: the checker of a changed configuration starts when the one before has ended, so that no endpoint is asked by two; the
verdicts are in shared memory and hold meanwhile. A reload that changes nothing about checked upstreams does not touch it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gateway.config import Config
from gateway.server import log as logs
from gateway.server.channel import Channel
from gateway.server.children import Child, Role
from gateway.server.launch import CheckerLaunch
from gateway.server.log import log
from gateway.server.process import spawn
from gateway.server.wait import Timer

if TYPE_CHECKING:
    from gateway.server.supervisor import Supervisor

PROVEN = 10.0  # seconds; a checker that lived shorter is started again after RETRY
AT_ONCE = 0.05  # seconds
RETRY = 1.0
LAST_WORDS = 2.0  # seconds to end in when it is replaced


def checked(config: Config) -> dict[str, Any]:
    """Return what a checker goes by: the upstreams that have a check."""
    return {name: settings for name, settings in config.upstreams.items() if settings.health.check is not None}


class Checking:
    """Keeps the checker that the configuration asks for."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.child: Child | None = None
        self._restart: Timer | None = None

    def start(self) -> None:
        """Fork the checker of the configuration of now, if that has checks and there is none."""
        self._restart = None
        supervisor = self.supervisor
        if self.child is not None or supervisor.shutdown is not None or not checked(supervisor.config):
            return
        ours, theirs = Channel.pair()
        supervisor.board.beat(supervisor.capacity)

        def main() -> int:
            logs.name_process("checker")
            supervisor._abandon(ours)
            launch = CheckerLaunch(supervisor.config, theirs, supervisor.memory, supervisor.board, supervisor.capacity)
            return supervisor.programs.checker(launch)

        pid = spawn(main, "crossway/check")
        theirs.close()
        self.child = supervisor.children[pid] = Child(Role.CHECKER, pid, ours, version=supervisor.version)
        log.info("checker started", extra={"child": pid, "upstreams": len(checked(supervisor.config))})

    def change(self, old: Config) -> None:
        """A reload was committed: let the checker go by the new configuration."""
        wanted = checked(self.supervisor.config)
        if checked(old) == wanted:
            return
        if self.child is None:
            self.start()
        else:
            self.child.channel.send({"type": "checked", "upstreams": list(wanted)})
            self.supervisor.retire(self.child, LAST_WORDS)

    def ended(self, child: Child, reason: str) -> None:
        """A checker was reaped: start the next one, at once unless that may be a crash loop."""
        if child is not self.child:
            return
        self.child = None
        if self.supervisor.shutdown is not None or not checked(self.supervisor.config):
            return
        if child.kill is not None:  # it was told to end, for a changed configuration
            self.start()
            return
        log.error("checker ended, starting it again", extra={"child": child.pid, "reason": reason})
        self._restart = self.supervisor.wait.after(AT_ONCE if child.age > PROVEN else RETRY, self.start)
