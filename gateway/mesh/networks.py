"""Networks that reach each other through gateways only: where a service is, seen from one of them, and what its gateways let through.

Strategy: a member says its network as it says its zone. Whoever is in another one is seen as the gateways of that network, each as heavy
as its share of the instances behind it, so no address of another network leaves it. A gateway goes by the name that every member asks for
in its handshake, and ends none: who is there is proved from sidecar to sidecar. Pure: whoever calls brings the registry's word.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a sidecar uses some of this, and does not hold the schema
    from gateway.config.mesh_file import MeshFile

LABEL = "network"  # by which an instance says where it is
DEFAULT = "default"  # the network of those who say none
NAME_MAX = 253  # RFC 1035


def network_of(labels: Mapping[str, str] | None) -> str:
    return (labels or {}).get(LABEL) or DEFAULT


def place(address: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, str]:
    """Return where a numeric host:port leads, however it is written."""
    host, _, port = address.rpartition(":")
    found = ipaddress.ip_address(host.strip("[]"))
    return (found.ipv4_mapped or found if isinstance(found, ipaddress.IPv6Address) else found), port


def server_name(service: str, domain: str) -> str | None:
    """Return the name that is asked for in a handshake with a service; None when there is no room for it."""
    name = f"{service}.{domain}"
    return name if len(name) <= NAME_MAX else None


def scope(service: str, network: str) -> str:
    """Return a name for what is told to members of a service in a network."""
    return service if network == DEFAULT else f"{service}@{network}"


def scoped(name: str) -> tuple[str, str]:
    """Return the service and the network of a scope's name."""
    service, _, network = name.partition("@")
    return service, network or DEFAULT


def is_gateway(service: str, network: str, mesh: MeshFile) -> bool:
    """Tell whether instances of a service in a network are its gateways."""
    settings = mesh.networks.get(network)
    return settings is not None and settings.gateway == service


def all_gateways(mesh: MeshFile) -> frozenset[str]:
    """Return the services that are gateways of some network: nobody calls them."""
    return frozenset(settings.gateway for settings in mesh.networks.values())


def ways(mesh: MeshFile, endpoints: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[str]]:
    """Return the addresses of each network's gateways that are up; several behind one load balancer have one."""
    return {
        network: list(dict.fromkeys(each["address"] for each in endpoints.get(settings.gateway, ()) if network_of(each["labels"]) == network))
        for network, settings in mesh.networks.items()
    }


def seen_from(network: str, endpoints: Iterable[Mapping[str, Any]], gateways: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Return a service's endpoints as members of a network reach them: its own as they are, those of another by the gateways there."""
    here: list[dict[str, Any]] = []
    elsewhere: dict[str, list[Mapping[str, Any]]] = {}
    for each in endpoints:
        at = network_of(each["labels"])
        if at == network:
            here.append(dict(each))
        else:
            elsewhere.setdefault(at, []).append(each)
    for at, behind in sorted(elsewhere.items()):
        addresses = gateways.get(at, ())
        if not addresses:
            continue
        weight = max(1, round(sum(each["weight"] for each in behind) / len(addresses)))
        labels = dict(set.intersection(*(set(each["labels"].items()) for each in behind)))
        here += [
            {"address": address, "weight": weight, "zone": None, "labels": dict(sorted(labels.items())), "network": at} for address in addresses
        ]
    return here


def let_through(network: str, mesh: MeshFile, known: Mapping[str, Collection[str]], callable_of: Mapping[str, Collection[str]]) -> list[str]:
    """Return the services that a network's gateways pass on: those that somebody may call who is known in another network.

    known: the networks in which each service has instances, also such as are away just now. callable_of: whom each service may call.
    """
    outside = [caller for caller, networks in known.items() if any(each != network for each in networks)]
    wanted = {name for caller in outside for name in callable_of.get(caller, ())}
    return [name for name in mesh.services if name in wanted]
