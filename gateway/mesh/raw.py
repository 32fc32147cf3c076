"""Services that speak tcp: who may connect to one, and where an app's own connections to others go.

Strategy: the engine's raw TCP between mutual TLS and clear text, so a connection costs what it does at an edge. It is authorized once, by
caller and port, before its first byte passes; when the policy changes, those that it no longer lets in are closed. Each caller's
connections have a name of their own, like its requests, and the metrics are made of the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gateway._speedups.pool import Upstream
from gateway._speedups.tcp_listener import TcpListener, TcpTarget
from gateway.mesh.authorization import Denials, make_gate
from gateway.mesh.units import seconds

IDLE = 3600.0  # seconds without a byte in either direction
CONNECTIONS = 1024  # open at once


def places(said: Mapping[str, Any]) -> int:
    """Return how many connections of a service may be open at once. Raises ValueError."""
    found = said.get("connections")
    if found is None:
        return CONNECTIONS
    if type(found) is not int or found < 1:
        raise ValueError(f"connections is a number above 0, not {found!r}")
    return found


def limits(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a service's settings say of its connections, as a TcpListener takes it. Raises ValueError."""
    return {"idle": IDLE if said.get("idle") is None else seconds(said["idle"]), "connections": places(said)}


def way_in(
    said: Mapping[str, Any], domain: str, denials: Denials, own: Mapping[str, Any], app: Upstream, names: Callable[[str], int],
    named: Callable[[str], str], port: int,
) -> TcpListener:  # fmt: skip
    """Return how connections of members reach the app. `named` gives the name under which a caller's are counted, `names` its number.

    Raises ValueError, KeyError or TypeError for what is no policy.
    """

    def target_of(identity: str) -> TcpTarget:
        return TcpTarget(app, names(named(identity)))

    gate = make_gate(said, domain, denials, target_of, port)
    return TcpListener(names("tcp:inbound"), default=TcpTarget(app, names(named(""))), policy=gate, **limits(own))


def way_out(name: str, said: Mapping[str, Any], upstream: Upstream, names: Callable[[str], int]) -> TcpListener:
    """Return how the app's connections reach a service."""
    return TcpListener(names(f"tcp:outbound>{name}"), default=TcpTarget(upstream, names(f"outbound>{name}")), **limits(said))
