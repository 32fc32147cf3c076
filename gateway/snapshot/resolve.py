"""Host names of endpoints: resolved in the background, again and again.

Strategy: the loop's getaddrinfo (libuv's thread pool), never on the request path. Every address of a name is an endpoint of its
own. What was known is kept while the name server is down; a target without any address yet is no endpoint.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from gateway._speedups.pool import Endpoint, Upstream

log = logging.getLogger("crossway.resolve")

FIRST_RETRY = 0.5           # seconds, doubled up to the interval


@dataclass(frozen=True, slots=True)
class Target:
    """What the configuration names: host:port, its weight and its zone."""

    address: str
    weight: int = 1
    zone: str | None = None

    def at(self, host: str) -> Endpoint:
        """Return the endpoint at a numeric host; raises ValueError when it is not numeric."""
        text = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        return Endpoint(text, self.weight, target=self.address, zone=self.zone)

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].removeprefix("[").removesuffix("]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


class Resolver:
    """Keeps an upstream's endpoints current: those with numeric addresses at once, the named ones every `interval` seconds."""

    def __init__(self, upstream: Upstream, targets: Sequence[Target], interval: float) -> None:
        self.upstream = upstream
        self.targets = targets
        self.interval = interval
        self.names: list[Target] = []
        self._found: dict[Target, list[Endpoint]] = {}
        self._task: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()
        for target in targets:
            try:
                self._found[target] = [target.at(target.host)]
            except ValueError:
                self.names.append(target)
                upstream.unresolved.add(target.address)
        self._publish()

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
            found = await asyncio.gather(*(self._resolve(loop, target) for target in self.names))
            self._publish()
            self._tried.set()
            if all(found):
                retry = FIRST_RETRY
                await asyncio.sleep(self.interval)
            else:
                await asyncio.sleep(min(retry, self.interval))
                retry *= 2

    async def _resolve(self, loop: asyncio.AbstractEventLoop, target: Target) -> bool:
        try:
            answers = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        except OSError as error:
            log.warning("cannot resolve %s: %s", target.host, error)
            return False
        self._found[target] = [target.at(host) for host in dict.fromkeys(str(answer[4][0]) for answer in answers)]
        self.upstream.unresolved.discard(target.address)
        return True

    def _publish(self) -> None:
        """Hand over what is known; what an adopted snapshot knew of targets that are not resolved yet stays."""
        endpoints = [each for target in self.targets for each in self._found.get(target, ())]
        endpoints += [each for each in self.upstream.endpoints if each.target in self.upstream.unresolved]
        self.upstream.replace(endpoints)
