"""What the supervisor tells about itself: the state that /readyz, /status and `crossway status` show.

Strategy: a pure function of the supervisor's book, made anew whenever something changed and pushed to the admin process;
plain JSON types and no secrets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from gateway.config import Config
from gateway.server.channel import Message
from gateway.server.children import Child, Slot
from gateway.server.log import log

if TYPE_CHECKING:
    from gateway.server.supervisor import Supervisor


@dataclass
class Outcome:
    """How the last reload ended."""

    time: float = field(default_factory=time.time)
    ok: bool = True
    version: int = 1
    problems: list[Any] = field(default_factory=list)
    text: str = ""


def describe(supervisor: Supervisor) -> Message:
    """Return the state as a message for the admin process."""
    phase = "running" if supervisor.announced else "starting"
    return {
        "type": "state",
        "phase": "draining" if supervisor.shutdown is not None else phase,
        "config": {
            "file": str(supervisor.path),
            "version": supervisor.version,
            "hash": supervisor.config.digest,
            "loaded": supervisor.loaded,
        },
        "workers": [_slot(slot) for slot in supervisor.slots],
        "checker": _checker(supervisor.checking.child),
        "listeners": [
            {"name": name, "bind": str(listener.bind), "address": str(listener.address), "tcp": supervisor.config.listeners[name].tcp is not None}
            for name, listener in supervisor.listeners.items()
        ],
        "reload": {**vars(supervisor.outcome), "running": supervisor.reload is not None},
        "certificates": [asdict(certificate) for certificate in supervisor.config.certificates],
        "watched": supervisor.config.watched,
        "restarts": supervisor.restarts,
        "supervisor": os.getpid(),
    }


def warn_insecure(config: Config) -> None:
    """Say at every start and reload which upstreams are believed whoever they are."""
    for name, upstream in config.upstreams.items():
        if upstream.tls is not None and upstream.tls.insecure:
            log.warning("the certificate of this upstream is not verified: `insecure: true`", extra={"upstream": name})


def _checker(child: Child | None) -> Mapping[str, Any] | None:
    return None if child is None else {"pid": child.pid, "state": str(child.condition), "started": child.epoch}


def _slot(slot: Slot) -> Mapping[str, Any]:
    child = slot.child
    if child is None:
        return {"slot": slot.index, "pid": None, "state": "dead", "version": None, "started": None}
    return {
        "slot": slot.index,
        "pid": child.pid,
        "state": str(child.condition),
        "version": child.version,
        "started": child.epoch,
    }
