"""What routes and the services of a mesh say of WebSockets.

Strategy: the same words for both; `true` stands for the defaults, `false` for nothing said.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from gateway.config.base import Model, Shorthand, setting
from gateway.config.values import Deadline, Int

MOST = 10_000_000


class WebSocket(Model):
    """WebSockets of one route: tunnels once the handshake has passed the policies."""

    idle: Deadline = setting("5m", "without a byte in either direction; the tunnel is closed after it")
    tunnels: Int = Field(default=1024, ge=1, le=MOST, description="open at once, over all workers; 503 above it")
    expiry: Literal["close", "ignore"] = setting(
        "close", "when the token by which it was opened expires: close the tunnel, or let it go on"
    )


class ServiceWebSocket(Model):
    """WebSockets of a service: tunnels through its sidecars and its callers', once a rule allows the handshake."""

    idle: Deadline = setting("5m", "without a byte in either direction; each sidecar closes the tunnel after it")
    tunnels: Int = Field(
        default=1024, ge=1, le=MOST, description="open at once at each sidecar, its app's side and each caller's; 503 above it"
    )


def _widen(raw: Any) -> Any:
    if isinstance(raw, bool):
        return {} if raw else None
    return raw


AS_TRUE = Shorthand(_widen, {"type": "boolean", "x-is": "`true`"})
