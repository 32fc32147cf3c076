"""What discovery finds: endpoints with one numeric address each, in an order and a number on which every process agrees.

Strategy: pure functions; of more addresses than an upstream may have, `order` says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gateway.config.schema import Endpoint
from gateway.config.web import Address
from gateway.discovery.dns_wire import Service
from gateway.discovery.order import chosen

MAX_WEIGHT = 256


@dataclass(frozen=True, slots=True)
class Target:
    """Where endpoints are looked for: an address or a name, with what all of them have in common."""

    address: Address
    weight: int = 1
    zone: str | None = None
    priority: int = 0  # lower is better; the next is used when nothing is found in this one


@dataclass(frozen=True, slots=True)
class Found:
    """One endpoint. `name` is the host it was found by: what is sent as its own Host, and what its certificate must name."""

    address: Address
    weight: int = 1
    zone: str | None = None
    name: str = ""

    @property
    def host(self) -> str:
        """Return `name:port`."""
        return str(Address(self.name or self.address.host, self.address.port))


def targets_of(endpoints: Iterable[Endpoint]) -> list[Target]:
    """Return the targets of endpoints as the configuration writes them."""
    return [Target(endpoint.address, endpoint.weight, endpoint.zone) for endpoint in endpoints]


def targets_of_services(services: Sequence[Service]) -> list[Target]:
    """Return the targets of SRV records. Their weights, which go up to 65535, are scaled down together; 0 is the least."""
    most = max((service.weight for service in services), default=0)
    scale = MAX_WEIGHT / most if most > MAX_WEIGHT else 1.0
    return [
        Target(Address(service.host, service.port), max(1, round(service.weight * scale)), None, service.priority)
        for service in sorted(services)
    ]


def merge(targets: Sequence[Target], addresses: dict[str, tuple[str, ...]]) -> list[Found]:
    """Return the endpoints of `targets`, the named ones at the `addresses` of their names.

    Only targets of the best priority that has any address count. An address that is found twice is used as it is first found.
    """
    for priority in sorted({target.priority for target in targets}):
        found: dict[Address, Found] = {}
        for target in targets:
            if target.priority != priority:
                continue
            host, port = target.address.host, target.address.port
            for each in (host,) if target.address.literal else addresses.get(host, ()):
                address = Address(each, port)
                found.setdefault(address, Found(address, target.weight, target.zone, host))
        if found:
            kept = set(chosen([*found]))
            return [each for address, each in found.items() if address in kept]
    return []
