"""How this machine's clock compares with the control plane's: measured at each stream, told in the log, shown as a metric.

Strategy: certificates are judged by each machine's own clock, so a wrong one shuts its member out, and what it says then ("expired") blames
somebody else. The control plane says the time when a stream opens; from there on the monotonic clock counts, so that a clock that is
set while the stream lives is noticed as well. Nothing is believed by the other's time: it tells, and it decides when to ask for a renewal.
"""

from __future__ import annotations

import logging
import math
import time

log = logging.getLogger("crossway.mesh")

DIFFERS = 15.0  # seconds: half of what user contexts bear (gateway.workload.user), so it is told before anything fails
HEADER = "crossway-time"  # of the answer that opens a stream: unix time


def span(seconds: float) -> str:
    """A length of time in one or two units: 3 s, 12 min, 5 h 10 min, 3 d."""
    seconds = max(0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = int(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d"


def compared(ahead: float) -> str:
    """How a clock is that is so many seconds ahead of the control plane's."""
    return f"{span(round(abs(ahead)))} {'ahead of' if ahead > 0 else 'behind'} the control plane's"


def stamp(when: float) -> str:
    """A time for people, UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(when))


def doubt(fault: str) -> str:
    """What is to be added to a certificate's fault, when a wrong clock may be behind it."""
    if "yet valid" in fault.lower() or "expired" in fault.lower():
        return f" (is this machine's clock right? It says {stamp(time.time())})"
    return ""


def read(said: object) -> float | None:
    """The time that somebody says, or None when it is no time."""
    try:
        when = float(said)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return when if math.isfinite(when) else None


class Clock:
    """This machine's clock, beside the control plane's as it was heard last."""

    def __init__(self) -> None:
        self._heard: tuple[float, float] | None = None  # their time, and the monotonic time at which it was said
        self._told = False

    def hear(self, theirs: float | None) -> None:
        """Take the control plane's time, said now; None: it says none."""
        if theirs is not None:
            self._heard = theirs, time.monotonic()
            self.look()

    def theirs(self) -> float | None:
        """The control plane's time now; None when it was never heard."""
        return None if self._heard is None else self._heard[0] + time.monotonic() - self._heard[1]

    def ahead(self) -> float | None:
        """Seconds by which this machine is ahead of it; below 0: behind."""
        theirs = self.theirs()
        return None if theirs is None else time.time() - theirs

    def latest(self) -> float:
        """The later one of both clocks: by what is to be done in time."""
        theirs = self.theirs()
        return time.time() if theirs is None else max(time.time(), theirs)

    def look(self) -> None:
        """Tell, once, that the clocks differ, and that they agree again."""
        ahead = self.ahead()
        if ahead is None:
            return
        if abs(ahead) >= DIFFERS and not self._told:
            self._told = True
            log.error("this machine's clock is not the control plane's", extra={"clock": compared(ahead), "seconds_ahead": round(ahead, 1)})
        elif abs(ahead) < DIFFERS / 2 and self._told:
            self._told = False
            log.info("this machine's clock agrees with the control plane's again", extra={"seconds_ahead": round(ahead, 1)})
