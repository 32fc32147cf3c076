"""An upstream's endpoints in a worker: those that the configuration gives by address at once, all others as they are found.

Strategy: discovery decides what there is; here it becomes endpoints of the pool, where those that stay keep their connections.
What a snapshot took over from the one before and has not found anew yet stays as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gateway._speedups.pool import Endpoint, Upstream
from gateway.config import schema
from gateway.discovery import Discovery, Found, book_of


class Endpoints:
    """Keeps one upstream's endpoints current; `moving` is false when there is nothing to look for.

    Only a `loud` one lets its process log what it finds: all workers find the same.
    """

    def __init__(self, upstream: Upstream, settings: schema.Upstream, *, loud: bool = True) -> None:
        self.upstream = upstream
        self.loud = loud
        self.discovery = Discovery(upstream.name, settings)
        self.discovery.apply = self._apply
        self.moving = self.discovery.moving
        self._apply(self.discovery.given())

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        book_of(loop).loud = self.loud
        self.discovery.start(loop)

    def stop(self) -> None:
        self.discovery.stop()

    async def settled(self) -> None:
        """Return when everything was looked for once, whatever came of it."""
        await self.discovery.settled()

    def _apply(self, found: Sequence[Found]) -> None:
        unresolved = self.upstream.unresolved
        unresolved.clear()
        unresolved.update(self.discovery.unresolved())
        endpoints = [Endpoint(str(each.address), each.weight, target=each.host, zone=each.zone) for each in found]
        self.upstream.replace(endpoints + [each for each in self.upstream.endpoints if each.target in unresolved])
