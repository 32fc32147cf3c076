"""What is to be told of a mesh: its instances, the versions they have, the control planes, what is revoked; for people and for programs.

Strategy: made from the store alone, so that a command can tell it while no control plane runs, and any control plane for all of them.
"""

from __future__ import annotations

import json
import time
from typing import Any

from gateway.config.mesh_file import MeshFile
from gateway.mesh import documents, revocation
from gateway.mesh.clock import compared, span
from gateway.mesh.registry import COMEBACK, judge, read_instances
from gateway.mesh.store import Store

BEATING = 5.0  # seconds since the last sign of a control plane that is called alive; it gives one each second


LATE = 0.4  # of its life: a certificate with less left should have been renewed long ago


def problems(row: dict[str, Any], now: float, begun: int | None) -> list[str]:
    """Return what somebody should look at, of an instance that is there; `row` is of a report, `begun` when its certificate's life did."""
    found: list[str] = []
    if row["state"] == "gone":
        return found
    if row["refused"]:
        found.append(f"REFUSED {row['refused']}: {row['reason']}")
    if row["seconds_waiting"] is not None:
        found.append(f"sent {row['sent']} {span(row['seconds_waiting'])} ago, no answer yet")
    if row["state"] == "unhealthy":
        found.append("says that its app does not answer")
    if row["state"] == "silent":
        found.append(f"no stream for {span(now - row['since'])}, but it can be reached: offered as it was last. How its app is is not known, and what it was told may be old")
    if row["state"] == "unreachable":
        since = span(now - row["unreachable_since"])
        found.append(f"cannot be reached: {row['unreachable']} (for {since})" + ("; offered all the same, since too many of the service cannot" if row["offered"] else ""))
    if row["seconds_ahead"]:
        found.append(f"its machine's clock is {compared(row['seconds_ahead'])}")
    if row["not_after"] is not None:
        left = row["not_after"] - now
        if left <= 0:
            found.append("the certificate has expired")
        elif begun is not None and left < LATE * (row["not_after"] - begun):
            found.append(f"the certificate is not renewed: {span(left)} left")
    return found


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
    rows = await read_instances(store)
    for row in rows:
        row["present"] = bool(row["connected"]) and (row["replica"] in counted or grace)
        if row["connected"] and not row["present"]:  # since its control plane is
            row["since"] = next((each["seen"] for each in replicas if each["id"] == row["replica"]), row["since"])
    # Certificates of another authority are not in the list: when their lives began is not known here.
    begun = {row["serial"]: row["not_before"] for row in await store.rows("SELECT c.serial, c.not_before FROM certificates c JOIN instances i ON i.serial = c.serial")}
    probe = mesh.control.health
    judge(rows, None if probe is None else probe.most)
    for row in rows:
        waiting = row["sent"] is not None and row["sent"] not in (row["applied"], row["refused"])
        said = {
            "service": row["service"], "instance": row["instance"], "state": row["state"], "since": row["since"], "offered": row["offered"], "inbound": row["inbound"], "zone": row["zone"],
            "labels": json.loads(row["labels"]), "replica": row["replica"], "serial": row["serial"], "not_after": row["not_after"],
            "sent": row["sent"], "applied": row["applied"], "applied_at": row["applied_at"],
            "seconds_waiting": round(now - row["sent_at"], 3) if waiting else None,
            "refused": row["refused"], "reason": row["reason"], "seconds_ahead": row["seconds_ahead"] or 0,
            "unreachable": row["unreachable"] if row["state"] == "unreachable" else None, "unreachable_since": row["unreachable_since"],
        }  # fmt: skip
        instances.append(said | {"problems": problems(said, now, begun.get(row["serial"]))})
    applied = await documents.newest(store) if mesh.control.source == "state" else None
    return {
        "document": None if applied is None else {"version": applied.mark, "digest": applied.digest, "applied": applied.applied, "by": applied.who},
        "trust_domain": mesh.trust_domain, "time": now, "version": counters["version"], "policy": counters["policy"],
        "default": mesh.authorization.default, "services": list(mesh.services),
        "control_planes": [{**row, "alive": row["id"] in alive} for row in replicas], "instances": instances,
        "revoked": await revocation.listed(store),
    }  # fmt: skip
