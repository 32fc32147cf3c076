"""Where the external hosts of an assignment are: each name looked up for as long as it is named, and only addresses that may be called.

Strategy: beside egress.py, which needs none of it: a sidecar whose service calls nobody outside keeps the resolver out of its memory. While
nothing was learned of a name, what the snapshot before knew stays.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Any

from gateway._speedups.pool import Endpoint
from gateway.discovery.book import Book, Subscription, book_of
from gateway.discovery.names import Wanted
from gateway.mesh.egress import Destination, Network

log = logging.getLogger("crossway.mesh")

INTERVAL = 30.0  # seconds that an address is used at most before its name is looked up again

NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052


def allowed(text: str, networks: tuple[Network, ...] | None) -> bool:
    """Whether an address may be called: in one of the networks, or else public. One that stands for an IPv4 address is judged as that."""
    address = _meant(ipaddress.ip_address(text))
    if networks is not None:
        return any(address in network for network in networks)
    if isinstance(address, IPv6Address) and address.is_site_local:  # RFC 3879: no longer assigned, and still somebody's own network
        return False
    inside = (address.sixtofour, *(address.teredo or ())) if isinstance(address, IPv6Address) else ()
    return all(each.is_global and not (each.is_multicast or each.is_reserved) for each in (address, *inside) if each is not None)


def _meant(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    if isinstance(address, IPv6Address) and address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


class Followed:
    """A host whose addresses are kept current for as long as an assignment names it."""

    def __init__(self, destination: Destination, book: Book) -> None:
        self.destination = destination
        self.refused: frozenset[str] = frozenset()
        wanted = Wanted(destination.host, resolver=destination.resolver)
        self.subscription: Subscription = book.watch(wanted, INTERVAL, self._changed)
        self._changed()

    def move(self, destination: Destination) -> None:
        """The same host in a new snapshot."""
        self.destination = destination
        self._changed()

    def _changed(self) -> None:
        """Use what may be used of what is known; while nothing was learned yet, what was taken over stays."""
        found = [value for value in self.subscription.values if isinstance(value, str)]
        upstream, target = self.destination.upstream, self.destination.target
        upstream.unresolved.clear()
        if not found:
            upstream.unresolved.add(target)
            return
        good = [each for each in found if allowed(each, self.destination.networks)]
        refused = frozenset(found) - set(good)
        if refused - self.refused:
            log.error(
                "addresses of an external host are refused",
                extra={"external": self.destination.name, "host": self.destination.host, "addresses": sorted(refused), "left": len(good)},
            )
        self.refused = refused
        port = self.destination.port
        upstream.replace([Endpoint(f"[{each}]:{port}" if ":" in each else f"{each}:{port}", target=target) for each in good])


class Outside:
    """All external hosts of a sidecar."""

    def __init__(self) -> None:
        self._followed: dict[tuple[Any, ...], Followed] = {}

    def follow(self, destinations: Iterable[Destination], loop: asyncio.AbstractEventLoop) -> None:
        """Look for exactly these from now on: the destinations of the snapshot that has just taken effect."""
        book = book_of(loop)
        wanted = {(each.host, each.port, each.resolver): each for each in destinations}
        for key, each in wanted.items():
            if key in self._followed:
                self._followed[key].move(each)
            else:
                self._followed[key] = Followed(each, book)
        for key in [key for key in self._followed if key not in wanted]:
            self._followed.pop(key).subscription.stop()
