"""Services that carry WebSockets: how a handshake becomes a tunnel on the way to a service and at its app, and who is told when none does.

Strategy: the engine's tunnels between mutual TLS and clear text. Authorization sees the handshake as the GET that it is. The places are
a service's, whoever calls it and whichever part of it he is led to. A tunnel does not end with the user's context by which it was
allowed, which lasts a minute: the edge that verified the user's token ends it with that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gateway._speedups.exchange import Tunnels
from gateway.mesh.units import seconds

WEBSOCKET = "websocket"  # of a service's settings
IDLE = 300.0  # seconds without a byte in either direction
TUNNELS = 1024  # open at once
SPOKEN = frozenset({"http1", "http2"})  # by apps that can be asked for a WebSocket, over HTTP/2 by RFC 8441


def tunnels_of(said: Mapping[str, Any], metric: Callable[[], int]) -> Tunnels | None:
    """Return how a service carries WebSockets, None when it does not. `metric` gives the number under which its places are counted.

    Raises ValueError or TypeError for what is not understood.
    """
    settings = said.get(WEBSOCKET)
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise TypeError(f"websocket is a mapping, not {settings!r}")
    if unknown := set(settings) - {"idle", "tunnels"}:
        raise ValueError(f"websocket.{', websocket.'.join(sorted(unknown))} is not known to this version")
    if said.get("protocol", "http") != "http":
        raise ValueError(f"websocket for a service that speaks {said['protocol']}")
    most = settings.get("tunnels", TUNNELS)
    if type(most) is not int or most < 1:
        raise ValueError(f"websocket.tunnels is a number above 0, not {most!r}")
    return Tunnels(metric(), idle=silence(settings), most=most, expire=False)


def silence(settings: Mapping[str, Any]) -> float:
    """Return the seconds of silence after which a tunnel is closed. Raises ValueError."""
    idle = seconds(settings.get("idle", IDLE))
    if not idle > 0:
        raise ValueError(f"websocket.idle is a time above 0, not {idle!r}")
    return idle


def untold(service: str) -> bytes:
    """Return what an answer to a handshake says that was passed on as a plain request."""
    return b"crossway-websocket: off; the mesh's file does not say websocket for the service %b\r\n" % service.encode("ascii")


def unspoken(service: str, app_protocol: str) -> bytes:
    """The same where the file says it and the sidecar's command line contradicts."""
    return b"crossway-websocket: off; the sidecar of %b speaks %b to its app, which knows no WebSockets\r\n" % (
        service.encode("ascii"), app_protocol.encode("ascii"),
    )  # fmt: skip
