"""The way out of the mesh: external hosts that a rule lets this service call, judged and called over verified TLS.

Strategy: what is denied is denied here, at the caller's own sidecar, by the native step that judges calls at services: nobody behind it
would. Each host is an upstream of its own, whose addresses are those of its name that the policy allows (outside.py); nothing that is the mesh's own
leaves with a request, nor comes back with an answer.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

from gateway._speedups.authorization import Authorization, AuthorizationStep, Caller
from gateway._speedups.certificates import parse_certificates, parse_key
from gateway._speedups.exchange import Edits, RouteEntry, Step
from gateway._speedups.pool import Upstream
from gateway._speedups.tls import TlsUpstream
from gateway.mesh.authorization import Denials, make_rule
from gateway.workload.authorities import system_authorities

EXTERNAL = "external"  # how routes of the way out begin
PROTOCOLS = {"http": ("http1", ("http/1.1",)), "http2": ("http2", ("h2",))}
KNOWN = frozenset({"hosts", "port", "protocol", "ca", "resolver", "addresses", "rules", "timeout", "retries", "balance"})
# Of requests: who asked whom inside is nobody's business outside. Identity headers of the mesh are dropped by their names anyway.
KEPT_INSIDE = (
    b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"forwarded", b"x-real-ip", b"x-crossway-mirror", b"tracestate", b"baggage",
)  # fmt: skip
# Of answers: words that mean something when this mesh says them.
KEPT_OUTSIDE = (b"crossway-denied", b"crossway-would-deny", b"crossway-websocket", b"x-crossway-attempts-left", b"x-crossway-fault")

Network = IPv4Network | IPv6Network


@dataclass(frozen=True)
class Destination:
    """One external host."""

    name: str  # of the entry
    host: str
    port: int
    resolver: str | None
    networks: tuple[Network, ...] | None  # None: public addresses
    upstream: Upstream = field(compare=False)

    @property
    def target(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Way:
    """A host and the route that leads to it."""

    destination: Destination
    route: RouteEntry


@dataclass(frozen=True)
class Leaving:
    """What an assignment says of the way out, the policy's version, who we are, and our certificates there: files by the entry's name."""

    said: Mapping[str, Any]
    version: int
    identity: str
    certificates: Mapping[str, tuple[str, ...]]


def ways(
    leaving: Leaving, denials: Denials, steps: tuple[Step, ...], audits: tuple[Step, ...], keep: Callable[[Any, Callable[[], TlsUpstream]], TlsUpstream],
    upstream: Callable[[str, Mapping[str, Any], TlsUpstream, str], Upstream], metric: Callable[[str], int],
) -> list[Way]:
    """Return the ways out. Raises ValueError, KeyError, TypeError, OSError or TlsError for what is not understood or cannot be read.

    `keep(key, make)` takes over what was made of the same before, `upstream(name, settings, tls, host)` so the upstream of one host.
    """
    found = []
    for name, each in leaving.said.items():
        if unknown := set(each) - KNOWN:
            raise ValueError(f"external {name}: {', '.join(sorted(unknown))} is not known to this version")
        networks = None if each["addresses"] is None else tuple(ipaddress.ip_network(network) for network in each["addresses"])
        policy = Authorization(leaving.version, partial(denials.record, to=name))
        port = int(each["port"])
        judge = AuthorizationStep("egress", policy, Caller(leaving.identity, [make_rule(rule, port) for rule in each["rules"]]))
        tls = _tls(each["ca"], leaving.certificates.get(name, ()), PROTOCOLS[each.get("protocol", "http")][1], keep)
        for host in each["hosts"]:
            up = upstream(name, each, tls, host if port == 443 else f"{host}:{port}")
            if not up.endpoints:
                up.unresolved.add(f"{host}:{port}")  # what the snapshot before knows of it stays until it is looked up
            route = RouteEntry(
                f"{EXTERNAL}>{name}", 1, upstream=up, metric=metric(f"{EXTERNAL}>{name}"), steps=(*steps, judge), audits=audits,
                request_edits=Edits(KEPT_INSIDE), response_edits=Edits(KEPT_OUTSIDE),
            )  # fmt: skip
            found.append(Way(Destination(name, host, port, each["resolver"], networks, up), route))
    return found


def _tls(
    authorities: str | None, files: tuple[str, ...], alpn: tuple[str, ...], keep: Callable[[Any, Callable[[], TlsUpstream]], TlsUpstream]
) -> TlsUpstream:
    """TLS 1.2 or later, the chain and the host's own name verified. The machine's authorities are 140: parsed again only when they change."""
    if authorities is None:
        path = system_authorities()
        if path is None:
            raise ValueError("this machine has no certificates of authorities, and the mesh's file names none")
        trusted = path.read_bytes()
    else:
        trusted = authorities.encode("ascii")
    own = b"\n".join(Path(each).read_bytes() for each in files)
    digest = hashlib.sha256(b"".join(hashlib.sha256(each).digest() for each in (trusted, own, " ".join(alpn).encode()))).digest()

    def make() -> TlsUpstream:
        chain, key = (parse_certificates(own), parse_key(own)) if own else (None, None)
        if chain and key and not key.matches(chain[0]):
            raise ValueError(f"{' and '.join(files)}: the key does not belong to the certificate")
        return TlsUpstream(
            digest=digest, authorities=parse_certificates(trusted, strict=authorities is not None), alpn=alpn, chain=chain, key=key
        )

    return keep((EXTERNAL, digest), make)
