"""Watches the files of TLS: their change reloads the configuration, and what nears its end is told.

Strategy: in the admin process, so that a slow disk delays nobody. Every two seconds the files, if there are any, are compared with the
versions that were loaded; a reload is asked for once they have rested for one look, since a certificate and its key are two files. A
refused reload keeps what was loaded, and the next change tries again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gateway.config.check_tls import SOON, FileVersion, file_versions
from gateway.server.log import log

LOOK = 2.0  # seconds
REMIND = 86400.0  # seconds between two reminders of the same certificate


class Watch:
    """Asks for a reload when files differ from what is loaded."""

    def __init__(self, state: Callable[[], Any], ask: Callable[[], None]) -> None:
        """`state` gives the supervisor's last report, `ask` asks it for a reload."""
        self._state = state
        self._ask = ask
        self._last: Mapping[str, FileVersion] = {}
        self._asked: Mapping[str, FileVersion] = {}
        self._reminded: dict[tuple[str, str], float] = {}
        self._news = asyncio.Event()

    def reported(self) -> None:
        """The supervisor has said something new: there may be files to watch."""
        self._news.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            loaded = self._state()["watched"]
            if loaded:
                seen = await loop.run_in_executor(None, file_versions, list(loaded))
                if not self._state()["reload"]["running"]:
                    self.compare(loaded, seen)
            self.remind(self._state()["certificates"], time.time())
            if loaded:
                await asyncio.sleep(LOOK)
            else:
                self._news.clear()
                await self._news.wait()

    def compare(self, loaded: Mapping[str, FileVersion], seen: Mapping[str, FileVersion]) -> None:
        """Ask for a reload when `seen` is not what is loaded, has not changed since the last look, and was not asked for."""
        rested, self._last = seen == self._last, seen
        if seen == loaded or not rested or seen == self._asked:
            return
        self._asked = seen
        changed = sorted(path for path in seen if seen[path] != loaded[path])
        log.info("reload asked for", extra={"by": "changed files", "files": changed})
        self._ask()

    def remind(self, certificates: Iterable[Any], now: float) -> None:
        """Log certificates that end soon or have ended, once a day each."""
        for each in certificates:
            key = (each["owner"], each["subject"])
            if each["not_after"] > now + SOON or now - self._reminded.get(key, 0.0) < REMIND:
                continue
            self._reminded[key] = now
            days = int((each["not_after"] - now) // 86400)
            if days < 0:
                log.error("a certificate has expired", extra={**each, "days": days})
            else:
                log.warning("a certificate expires soon", extra={**each, "days": days})
