"""An assignment made into the snapshot of a mesh gateway: which names lead to which instances of its own network.

Strategy: the engine's raw TCP by server name, which reads a ClientHello and passes it on as it came. A gateway has no key of any service
and sees nothing of what passes; a name that nobody in another network may call is unknown to it, like any other. Its own name leads to
itself: the control plane looks there whether it can be reached, and sees its certificate.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from gateway._speedups.certificates import Certificate
from gateway._speedups.exchange import ListenerEntry, Snapshot
from gateway._speedups.pool import Endpoint, Upstream
from gateway._speedups.route_trie import RouteTrie
from gateway._speedups.tcp_listener import TcpListener, TcpTarget
from gateway._speedups.tls import TlsListener
from gateway.mesh.assignment import Assignment
from gateway.mesh.identity import Svid
from gateway.mesh.networks import place, server_name
from gateway.mesh.proxy import EJECT, EVERYBODY, INBOUND, endpoints_of
from gateway.mesh.raw import IDLE
from gateway.mesh.spiffe import control_id
from gateway.mesh.tunnels import WEBSOCKET, silence
from gateway.mesh.units import seconds
from gateway.workload.admission import Admit, Revoked, admission

log = logging.getLogger("crossway.mesh")

PASSAGE = "passage"
ITSELF = "itself"  # the listener for who asks for the gateway by its own name: the control plane, which looks whether it is there
HELLO = 10.0  # seconds for a ClientHello
CONNECT = 2.0  # seconds to an instance


@dataclass(frozen=True)
class Post:
    """What a gateway's snapshots have in common."""

    network: str
    memory: Any  # SharedState
    most: int  # connections that may pass at once
    itself: str  # host:port on loopback, where it ends the handshakes that are meant for it
    inbound: tuple[str, int]  # where it listens


def build_passage(assignment: Assignment, svid: Svid, post: Post, version: int) -> Snapshot:
    """Return the snapshot of a gateway. Raises ValueError, KeyError, TypeError or TlsError for what cannot be made."""
    network, memory, most = post.network, post.memory, post.most
    body = assignment.body
    domain, own = body["trust_domain"], body.get("own") or {}
    if own.get("gateway") != network:
        raise ValueError(f"the mesh's file does not name {body['service']} as the gateway of the network {network}")
    names = memory.names
    upstreams, known = {}, {}
    for name, said in body["services"].items():
        asked = server_name(name, domain)
        if asked is None:
            continue
        upstream = upstreams[f"service:{name}"] = Upstream(
            f"service:{name}", endpoints_of(name, others(name, said.get("endpoints", ()), post)), connect=CONNECT, requests=most, table=memory.upstreams, eject=EJECT,
        )  # fmt: skip
        known[asked] = TcpTarget(upstream, names.add(f"{PASSAGE}>{name}"))
    if (asked := server_name(svid.service, domain)) is not None:
        known[asked] = TcpTarget(Upstream(ITSELF, [Endpoint(post.itself)], table=memory.upstreams), names.add(f"tcp:{ITSELF}"))
    idle = max([IDLE, *(each for said in body["services"].values() for each in _silences(said))])
    tcp = TcpListener(names.add(f"tcp:{PASSAGE}"), sni=known, idle=idle, hello=HELLO, connections=most)
    listener = ListenerEntry(INBOUND, RouteTrie([]), trusted=EVERYBODY, tcp=tcp)
    tls = TlsListener(
        ITSELF, [(svid.chain, svid.key, None)], digest=svid.leaf.der, authorities=svid.roots, client_auth="required", tickets=False,
        admit=visitors(domain), alpn=(),
    )  # fmt: skip
    itself = ListenerEntry(ITSELF, RouteTrie([]), trusted=EVERYBODY, tls=tls)
    return Snapshot(version, f"{assignment.version}", {INBOUND: listener, ITSELF: itself}, upstreams, [])


def others(name: str, endpoints: Iterable[Mapping[str, Any]], post: Post) -> Iterator[Mapping[str, Any]]:
    """Yield the endpoints that are not this gateway, which would call itself for as long as it has connections."""
    for each in endpoints:
        host, port = place(str(each["address"]))
        if port == str(post.inbound[1]) and is_here(host, ipaddress.ip_address(post.inbound[0])):
            log.error("an endpoint is left out: it is this gateway", extra={"service": name, "address": each["address"]})
        else:
            yield each


def is_here(there: IPv4Address | IPv6Address, bound: IPv4Address | IPv6Address) -> bool:
    """Whether connections to an address come to who listens at `bound`, which may be all addresses of this machine."""
    if there == bound or not bound.is_unspecified:
        return there == bound
    if there.is_loopback:
        return True
    try:
        with socket.socket(socket.AF_INET6 if there.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as asked:
            asked.connect((str(there), 9))  # sends nothing; what is this machine's own is reached from itself
            return ipaddress.ip_address(asked.getsockname()[0]) == there
    except OSError:
        return False


def _silences(said: Mapping[str, Any]) -> Iterator[float]:
    """For how long connections of a service may be silent: the members at its ends are the ones to end them."""
    if said.get("idle") is not None:
        yield seconds(said["idle"])
    if said.get(WEBSOCKET) is not None:
        yield silence(said[WEBSOCKET])


def visitors(domain: str) -> Admit:
    """Return the function that lets nobody in, and the control plane see who is there."""
    look = admission(domain, Revoked({}), control_id(domain))

    def admit(leaf: Certificate) -> str | None:
        fault = look(leaf)
        return "nobody calls a mesh gateway" if fault is None else fault

    return admit
