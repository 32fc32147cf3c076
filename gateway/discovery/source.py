"""The endpoints of one upstream, kept current: from targets, from SRV records or from a watched file, names resolved.

Strategy: whatever changes leads to one merge on the next turn of the loop. Nothing is taken away on a guess: as long as a name
was never asked for, or nothing at all is found, the endpoints of before stay. `apply` gets a whole list, and only when it
differs from the last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from gateway.config import schema
from gateway.config.web import Address
from gateway.discovery.book import Book, Subscription, book_of
from gateway.discovery.dns_wire import Service
from gateway.discovery.file import FileWatch
from gateway.discovery.found import Found, Target, merge, targets_of, targets_of_services
from gateway.discovery.names import Wanted
from gateway.discovery.order import chosen

log = logging.getLogger("crossway.discovery")

TOLD = 8  # endpoints that a line of the log names


class Discovery:
    """Finds the endpoints of one upstream until it is stopped."""

    def __init__(self, upstream: str, settings: schema.Upstream) -> None:
        self.upstream = upstream
        self.apply: Callable[[list[Found]], object] = _nobody  # to be set before start()
        self.found: list[Found] = []
        self._settings = settings
        self._registered = settings.service is not None  # a registry's word that there is none is no failed look-up
        self._targets: Sequence[Target] = targets_of(settings.targets or settings.discovery.endpoints)
        self._hosts: dict[str, Subscription] = {}
        self._service: Subscription | None = None
        self._file: FileWatch | None = None
        self._looking: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._book: Book | None = None
        self._due = False
        self._settled = asyncio.Event()

    @property
    def moving(self) -> bool:
        """Tell whether there is anything to look for."""
        settings = self._settings.discovery
        return bool(settings.srv or settings.file or any(not target.address.literal for target in self._targets))

    def given(self) -> list[Found]:
        """Return the endpoints that need no look."""
        return merge(self._targets, {})

    def unresolved(self) -> set[str]:
        """Return the named targets, as host:port, of which no address is known."""
        named = [target.address for target in self._targets if not target.address.literal]
        return {str(address) for address in named if address.host not in self._hosts or not self._hosts[address.host].values}

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to look, on `loop`, which runs."""
        self._loop, self._book = loop, book_of(loop)
        settings = self._settings.discovery
        if settings.srv is not None:
            wanted = Wanted(settings.srv, service=True, resolver=settings.resolver)
            self._service = self._book.watch(wanted, self._settings.resolve, self._services_changed)
            self._services_changed()
        else:
            if settings.file is not None:
                self._file = FileWatch(self.upstream, settings.file, settings.seen, self._book, self._file_changed, empty=self._registered)
                self._looking = loop.create_task(self._file.run(), name=f"endpoints of {self.upstream}")
            self._retarget(self._targets)

    def stop(self) -> None:
        """End the look-ups; what was applied stays."""
        for subscription in (*self._hosts.values(), self._service):
            if subscription is not None:
                subscription.stop()
        if self._looking is not None:
            self._looking.cancel()
        self._hosts, self._service, self._loop = {}, None, None

    async def settled(self) -> None:
        """Return when everything was looked for once, whatever came of it."""
        await self._settled.wait()

    # -- what changes

    def _services_changed(self) -> None:
        assert self._service is not None
        services = [value for value in self._service.values if isinstance(value, Service)]
        if services or self._service.tried:
            self._retarget(targets_of_services(services))

    def _file_changed(self, endpoints: tuple[schema.Endpoint, ...]) -> None:
        self._retarget(targets_of(endpoints))

    def _retarget(self, targets: Sequence[Target]) -> None:
        assert self._book is not None
        self._targets = targets
        hosts = dict.fromkeys(target.address.host for target in targets if not target.address.literal)
        for host in [host for host in self._hosts if host not in hosts]:
            self._hosts.pop(host).stop()
        for host in hosts:
            if host not in self._hosts:
                wanted = Wanted(host, resolver=self._settings.discovery.resolver)
                self._hosts[host] = self._book.watch(wanted, self._settings.resolve, self._changed)
        self._changed()

    def _changed(self) -> None:
        if self._loop is not None and not self._due:
            self._due = True
            self._loop.call_soon(self._merge)

    def _merge(self) -> None:
        self._due = False
        if self._loop is None or not all(subscription.tried for subscription in self._hosts.values()):
            return
        addresses = {
            host: tuple(value for value in subscription.values if isinstance(value, str))
            for host, subscription in self._hosts.items()
        }
        found = merge(self._targets, addresses)
        if (found or self._registered) and found != self.found:
            before, self.found = self.found, found
            if before:
                self._tell(before, found)
            self.apply(found)
        self._settled.set()

    def _tell(self, before: Sequence[Found], after: Sequence[Found]) -> None:
        old, new = {each.address for each in before}, {each.address for each in after}
        loud = self._book is not None and self._book.loud
        log.log(
            logging.INFO if loud else logging.DEBUG, "endpoints changed",
            extra={"upstream": self.upstream, "added": _some(new - old), "removed": _some(old - new), "endpoints": len(new)},
        )


def _nobody(found: list[Found]) -> None:
    """Hear of endpoints that nobody asked for."""


def _some(addresses: set[Address]) -> list[str]:
    texts = [str(address) for address in chosen([*addresses], TOLD)]
    return [*texts, f"and {len(addresses) - TOLD} more"] if len(addresses) > TOLD else texts
