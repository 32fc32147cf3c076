"""What is to be told of a mesh: its instances, the versions they have, the control planes, what is revoked; for people and for programs.

Strategy: made from the store alone, so that a command can tell it while no control plane runs, and any control plane for all of them.
"""

from __future__ import annotations

import json
import time
from typing import Any

from gateway.config.mesh_file import MeshFile
from gateway.mesh import revocation
from gateway.mesh.registry import COMEBACK
from gateway.mesh.store import Store

BEATING = 5.0  # seconds since the last sign of a control plane that is called alive; it gives one each second


async def report(store: Store, mesh: MeshFile) -> dict[str, Any]:
    """Return the state of the mesh as JSON. Raises StoreError."""
    now = time.time()
    counters = {row["name"]: row["value"] for row in await store.rows("SELECT name, value FROM counters")}
    replicas = await store.rows("SELECT id, started, seen FROM replicas ORDER BY started")
    alive = {row["id"] for row in replicas if now - row["seen"] < BEATING}
    counted = {row["id"] for row in replicas if now - row["seen"] < mesh.control.heartbeat}
    # A control plane that has just started gives members time to come back; until then nobody is called gone.
    started = max((row["started"] for row in replicas if row["id"] in alive), default=0.0)
    grace = now - started < max(COMEBACK, mesh.control.heartbeat)
    instances = []
    for row in await store.rows("SELECT * FROM instances ORDER BY service, instance"):
        present = bool(row["connected"]) and (row["replica"] in counted or grace)
        state = "gone" if not present else "draining" if row["draining"] else "healthy" if row["healthy"] else "unhealthy"
        waiting = row["sent"] is not None and row["sent"] not in (row["applied"], row["refused"])
        instances.append(
            {
                "service": row["service"], "instance": row["instance"], "state": state, "inbound": row["inbound"], "zone": row["zone"],
                "labels": json.loads(row["labels"]), "replica": row["replica"], "serial": row["serial"], "not_after": row["not_after"],
                "sent": row["sent"], "applied": row["applied"], "applied_at": row["applied_at"],
                "seconds_waiting": round(now - row["sent_at"], 3) if waiting else None,
                "refused": row["refused"], "reason": row["reason"],
            }
        )  # fmt: skip
    return {
        "trust_domain": mesh.trust_domain, "time": now, "version": counters["version"], "policy": counters["policy"],
        "default": mesh.authorization.default,
        "control_planes": [{**row, "alive": row["id"] in alive} for row in replicas], "instances": instances,
        "revoked": await revocation.listed(store),
    }  # fmt: skip
