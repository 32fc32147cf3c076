"""Host names of endpoints: resolved in the background, again and again.

Strategy: the loop's getaddrinfo (libuv's thread pool), never on the request path. What was known is kept while the name server
is down; an endpoint without any address yet answers 503.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence

from gateway._speedups.pool import Endpoint

log = logging.getLogger("crossway.resolve")

FIRST_RETRY = 0.5           # seconds, doubled up to the interval


class Resolver:
    """Keeps the addresses of one upstream's named endpoints current, every `interval` seconds."""

    def __init__(self, endpoints: Sequence[Endpoint], interval: float) -> None:
        self.endpoints = endpoints
        self.interval = interval
        self._task: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._task = loop.create_task(self._run(loop))

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def settled(self) -> None:
        """Return when every name was asked for once, whatever came of it."""
        await self._tried.wait()

    async def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        retry = FIRST_RETRY
        while True:
            found = await asyncio.gather(*(self._resolve(loop, endpoint) for endpoint in self.endpoints))
            self._tried.set()
            if all(found):
                retry = FIRST_RETRY
                await asyncio.sleep(self.interval)
            else:
                await asyncio.sleep(min(retry, self.interval))
                retry *= 2

    async def _resolve(self, loop: asyncio.AbstractEventLoop, endpoint: Endpoint) -> bool:
        try:
            answers = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
        except OSError as error:
            log.warning("cannot resolve %s: %s", endpoint.host, error)
            return False
        endpoint.set_addresses(dict.fromkeys(str(answer[4][0]) for answer in answers))
        return True
