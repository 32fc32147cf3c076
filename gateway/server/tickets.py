"""Turns the key of session tickets, in the memory that all workers share.

Strategy: the supervisor is the only writer and its timers do it, so a new key is in force for all workers at once, those of a
coming respawn included. A listener's own `rotate` cannot be slower than the fastest: the keys are everyone's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway._speedups.tls import rotate_ticket_keys
from gateway.config import Config
from gateway.server.log import log

if TYPE_CHECKING:
    from gateway.server.wait import Timer, Wait

DEFAULT = 8 * 3600.0  # seconds, while no listener offers tickets


def interval(config: Config) -> float:
    """Return the seconds between two keys."""
    wanted = [each.tls.tickets.rotate for each in config.listeners.values() if each.tls and each.tls.tickets.enabled]
    return min(wanted, default=DEFAULT)


class TicketKeys:
    """The rotation; it goes on over reloads, and follows their settings from its next turn on."""

    def __init__(self, wait: Wait) -> None:
        self.wait = wait
        self.seconds = DEFAULT
        self._timer: Timer | None = None

    def follow(self, config: Config) -> None:
        """Take the interval of a configuration that is in force now."""
        seconds = interval(config)
        if self._timer is not None and seconds == self.seconds:
            return
        if self._timer is not None:
            self._timer.cancel()
        self.seconds = seconds
        self._timer = self.wait.after(seconds, self._turn)

    def _turn(self) -> None:
        rotate_ticket_keys()
        log.debug("session ticket keys rotated")
        self._timer = self.wait.after(self.seconds, self._turn)
