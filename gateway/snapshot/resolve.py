"""An upstream's endpoints in a worker: those that the configuration gives by address at once, all others as they are found.

Strategy: discovery decides what there is; here it becomes endpoints of the pool, where those that stay keep their connections.
What a snapshot took over from the one before and has not found anew yet stays as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gateway._speedups.pool import Endpoint, Upstream
from gateway.config import schema
from gateway.discovery.book import book_of
from gateway.discovery.found import Found
from gateway.discovery.source import Discovery


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

    def begin_with(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Use what other processes have found, as the shared table tells it, until something is found here.

        For a worker that takes the place of a dead one, perhaps while no name server answers.
        """
        given, unresolved = self.upstream.endpoints, self.upstream.unresolved
        rows = [row for row in rows if row["upstream"] == self.upstream.name]
        if self.moving and (unresolved or not given):
            known = [row for row in rows if row["target"] in unresolved or not given and not unresolved]
            self.upstream.replace([
                *given,
                *(Endpoint(row["address"], row["weight"], target=row["target"], zone=row["zone"] or None) for row in known),
            ])

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
