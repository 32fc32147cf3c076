"""When endpoints are checked, and what is made of the results.

Strategy: a task an endpoint, whose first check comes within half a second and whose intervals vary, so that neither endpoints nor
machines are asked in step. Endpoints come from the same discovery as in the workers. A result whose time limit was missed because
this process stood still judges nobody, nor does one that could not be obtained.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from gateway.config import Config
from gateway.config.health import Check
from gateway.config.schema import Upstream
from gateway.config.web import Address
from gateway.discovery.found import Found
from gateway.discovery.source import Discovery
from gateway.health.probe import Inconclusive, Opener, open_plain, probe
from gateway.health.tls import opener_of

log = logging.getLogger("crossway.health")

FIRST = 0.5  # seconds within which an endpoint's first check begins, if the interval is not shorter
AT_ONCE = 128  # checks on their way; more wait
STOOD_STILL = 1.0  # seconds beyond its time limit after which a check says more about us than about the endpoint
LEAST_VALID = 30.0  # seconds that a verdict holds without news, so that the checker's own restart changes nothing


class Verdict(Protocol):
    """What is known of one endpoint, shared by all processes."""

    def checked(self, good: bool, now: int, valid_us: int, *, healthy: int, unhealthy: int) -> int:
        """Count a result; return 0 when the verdict stays as it was."""
        ...

    def unchecked(self) -> None:
        """Nobody checks this endpoint any more."""
        ...


Open = Callable[[str, Found], Verdict]
Key = tuple[Address, str]  # of an endpoint: its address, and the name that it was found by


def _opener(settings: Upstream, plain: Opener) -> Opener:
    """Checks connect as the traffic does."""
    check = settings.health.check
    if settings.tls is None or check is None:
        return plain
    return opener_of(settings.tls, "h2" if check.grpc is not None or settings.protocol != "http1" else "http/1.1")


class Checks:
    """The checks of every upstream that has any; `verdict` opens an endpoint's place in the shared table."""

    def __init__(self, config: Config, verdict: Open, opener: Opener = open_plain) -> None:
        self.upstreams = [
            CheckedUpstream(
                name, settings.health.check, Discovery(name, settings), verdict, _opener(settings, opener),
                http2=settings.protocol != "http1", secure=settings.tls is not None,
            )
            for name, settings in config.upstreams.items()
            if settings.health.check is not None
        ]

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        limit = asyncio.Semaphore(AT_ONCE)
        for upstream in self.upstreams:
            upstream.start(loop, limit)

    def stop(self, still_checked: Sequence[str] | None = None) -> None:
        """End all checks. Verdicts stay for a successor, but for upstreams that are not `still_checked`."""
        for upstream in self.upstreams:
            upstream.stop(forget=still_checked is not None and upstream.name not in still_checked)


class CheckedUpstream:
    """One upstream's endpoints, each with its task."""

    def __init__(
        self, name: str, check: Check, discovery: Discovery, verdict: Open, opener: Opener, *, http2: bool = False, secure: bool = False
    ) -> None:
        self.name = name
        self.spoken = {"http2": http2, "secure": secure}
        self.check = check
        self.endpoints: dict[Key, CheckedEndpoint] = {}
        self._discovery = discovery
        self._verdict = verdict
        self._opener = opener
        self._loop: asyncio.AbstractEventLoop | None = None
        self._limit = asyncio.Semaphore(AT_ONCE)
        discovery.apply = self.replace

    def start(self, loop: asyncio.AbstractEventLoop, limit: asyncio.Semaphore) -> None:
        self._loop, self._limit = loop, limit
        self.replace(self._discovery.given())
        if self._discovery.moving:
            self._discovery.start(loop)

    def stop(self, *, forget: bool) -> None:
        if self._discovery.moving:
            self._discovery.stop()
        for endpoint in self.endpoints.values():
            endpoint.stop(forget=forget)
        self.endpoints = {}

    def replace(self, found: Sequence[Found]) -> None:
        """Check these from now on; those that were checked before go on as they were."""
        assert self._loop is not None
        wanted = {(each.address, each.name): each for each in found}
        for gone in [key for key in self.endpoints if key not in wanted]:
            self.endpoints.pop(gone).stop(forget=True)
        for key, each in wanted.items():
            if key not in self.endpoints:
                endpoint = CheckedEndpoint(self.name, each, self.check, self._verdict(self.name, each), self._opener, **self.spoken)
                self.endpoints[key] = endpoint
                endpoint.start(self._loop, self._limit)


class CheckedEndpoint:
    """One endpoint: asked again and again."""

    def __init__(
        self, upstream: str, found: Found, check: Check, verdict: Verdict, opener: Opener, *, http2: bool = False, secure: bool = False
    ) -> None:
        self.upstream = upstream
        self._spoken = {"http2": http2, "secure": secure}
        self.found = found
        self.check = check
        self.verdict = verdict
        self._opener = opener
        self._task: asyncio.Task[None] | None = None

    def start(self, loop: asyncio.AbstractEventLoop, limit: asyncio.Semaphore) -> None:
        self._task = loop.create_task(self._run(limit), name=f"checks of {self.upstream} {self.found.address}")

    def stop(self, *, forget: bool) -> None:
        if self._task is not None:
            self._task.cancel()
        if forget:
            self.verdict.unchecked()

    async def _run(self, limit: asyncio.Semaphore) -> None:
        check = self.check
        await asyncio.sleep(random.uniform(0, min(FIRST, check.interval)))
        while True:
            async with limit:
                began = time.monotonic()
                await self._once()
            interval = check.interval * random.uniform(1 - check.jitter, 1 + check.jitter)
            await asyncio.sleep(max(began + interval - time.monotonic(), check.interval / 10))

    async def _once(self) -> None:
        check, began = self.check, time.monotonic()
        try:
            async with asyncio.timeout(check.timeout):
                reason = await probe(check, self.found, self._opener, **self._spoken)
        except TimeoutError:
            if time.monotonic() - began > check.timeout + STOOD_STILL:
                return
            reason = f"no answer within {check.timeout:g}s"
        except Inconclusive as error:
            self._tell(logging.WARNING, "an endpoint could not be checked", reason=str(error))
            return
        except Exception as error:
            log.error("a check failed in itself", extra={"upstream": self.upstream}, exc_info=error)
            return
        valid = max(LEAST_VALID, 3 * (check.interval + check.timeout))
        changed = self.verdict.checked(
            not reason, time.monotonic_ns() // 1000, int(valid * 1e6), healthy=check.healthy, unhealthy=check.unhealthy
        )
        if changed and reason:
            self._tell(logging.WARNING, "an endpoint failed its checks and gets no requests", reason=reason)
        elif changed:
            self._tell(logging.INFO, "an endpoint passed its checks and gets requests again")

    def _tell(self, level: int, event: str, **more: object) -> None:
        log.log(level, event, extra={"upstream": self.upstream, "endpoint": str(self.found.address), "host": self.found.host, **more})
