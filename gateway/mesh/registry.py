"""Who is there: instances of services, how they are, and which control plane hears them.

Strategy: the store holds the truth for all control planes; each one writes what it hears itself and reads the rest. Whoever is silent is out: an
instance by its control plane's judgement, and all instances of a control plane that is silent itself, when they had time to come to another. One that
starts, or stood still, gives everybody time to come back before it calls them gone, so that its own restart takes no endpoint away. Then another one
takes the rows over: who has no stream and can be reached all the same stays an endpoint (gateway.mesh.stream), the rest is gone.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from gateway.config.web import parse_address
from gateway.mesh.networks import network_of
from gateway.mesh.store import Row, Store, Value

log = logging.getLogger("crossway.mesh")

GONE, HEARD, REACHED = 0, 1, 2  # `connected`: no stream; a stream, perhaps until a moment ago; none since longer, but it can be reached
INSTANCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
LABELS, LABEL_VALUE = 32, 128
OTHER = "there is "  # how the reason begins when somebody else than the instance is at its address
NOWHERE = ("0.0.0.0:0", "[::]:0")  # of a member that nobody calls, such as an edge
COMEBACK = 45.0  # seconds that members have after a start: a pause, a try that hangs, and one more pause of a member (gateway.mesh.link)
STALL = 5.0  # seconds between two looks at who is there, after which it was not they who were away
KEPT = 7 * 86400  # seconds that an instance without a certificate is remembered
STATES = {HEARD: "healthy", REACHED: "silent"}  # of those that said that they are well

Place = tuple[str, str, str]  # service, network, address


class BadInstance(Exception):
    """What an instance says of itself cannot be used."""


class Registry:
    """The instances of one mesh, as one control plane (`replica`) sees and changes them."""

    def __init__(self, store: Store, replica: str, heartbeat: float) -> None:
        self.store = store
        self.replica = replica
        self.heartbeat = heartbeat
        self.started = time.time()
        self.rows: list[Row] = []  # as they were read last
        self.known: dict[tuple[str, str], Row] = {}  # the same by service and instance
        self.keeps: Callable[[Row], bool] = lambda row: False  # whether it may be an endpoint without a stream, for as long as it can be reached
        self.most: float | None = None  # part of a service that may be out because it cannot be reached; None: nobody looks
        self.spared: set[str] = set()  # services of which more than that cannot be reached: nobody is taken out
        self._came = self._listened = time.monotonic()
        self._signs: dict[str, tuple[float, float]] = {}  # of each control plane: what it wrote last, and when that was seen here

    async def start(self) -> None:
        """Enter this control plane."""
        await self.store.run(
            "INSERT INTO replicas (id, started, seen) VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET seen = excluded.seen",
            self.replica, self.started, time.time(),
        )  # fmt: skip

    def wait(self) -> None:
        """Give everybody time to come back, as after a start."""
        self._came = time.monotonic()

    async def beat(self) -> None:
        """Say that this control plane lives."""
        await self.start()

    # -- what is heard

    async def joined(self, service: str, instance: str, inbound: str | None, labels: dict[str, str], zone: str | None) -> None:
        """Note where an instance will be; it counts when its stream opens."""
        await self.store.run(
            "INSERT INTO instances (service, instance, inbound, labels, zone, replica, connected, healthy, draining, since)"
            " VALUES (?, ?, ?, ?, ?, ?, 0, 0, 0, ?) ON CONFLICT (service, instance) DO UPDATE SET"
            " inbound = excluded.inbound, labels = excluded.labels, zone = excluded.zone,"
            " connected = CASE WHEN instances.connected = 2 THEN 0 ELSE instances.connected END",  # it begins anew: what was known of it is over
            service, instance, inbound, json.dumps(labels, sort_keys=True), zone, self.replica, time.time(),
        )  # fmt: skip
        await self.touch()

    async def connected(self, service: str, instance: str, serial: str, not_after: int) -> None:
        """Note that an instance's stream is open here."""
        await self.store.run(
            "INSERT INTO instances (service, instance, labels, replica, connected, healthy, draining, since, serial, not_after)"
            " VALUES (?, ?, '{}', ?, 1, 0, 0, ?, ?, ?) ON CONFLICT (service, instance) DO UPDATE SET"
            " replica = excluded.replica, healthy = CASE WHEN instances.connected = 0 THEN 0 ELSE instances.healthy END,"
            " connected = 1, draining = 0, since = excluded.since, serial = excluded.serial, not_after = excluded.not_after",
            service, instance, self.replica, time.time(), serial, not_after,
        )  # fmt: skip
        await self.touch()

    async def is_now(self, service: str, instance: str, healthy: bool, draining: bool) -> None:
        """Note how an instance says it is."""
        await self.store.run(
            "UPDATE instances SET healthy = ?, draining = ? WHERE service = ? AND instance = ? AND replica = ?",
            int(healthy), int(draining), service, instance, self.replica,
        )  # fmt: skip
        await self.touch()

    async def moved(self, service: str, instance: str, inbound: str | None, labels: dict[str, str], zone: str | None) -> None:
        """Note that an instance is reached elsewhere now; nothing, when another control plane has it by now."""
        await self.store.run(
            "UPDATE instances SET inbound = ?, labels = ?, zone = ? WHERE service = ? AND instance = ? AND replica = ?",
            inbound, json.dumps(labels, sort_keys=True), zone, service, instance, self.replica,
        )  # fmt: skip
        await self.touch()

    async def unreached(self, service: str, instance: str, reason: str) -> None:
        """Note that an instance cannot be reached."""
        await self.store.run(
            "INSERT INTO unreachable (service, instance, since, reason) VALUES (?, ?, ?, ?) ON CONFLICT (service, instance) DO UPDATE SET reason = excluded.reason",
            service, instance, time.time(), reason,
        )  # fmt: skip
        await self.touch()

    async def reached(self, service: str, instance: str) -> None:
        """Note that an instance can be reached again."""
        await self.store.run("DELETE FROM unreachable WHERE service = ? AND instance = ?", service, instance)
        await self.touch()

    async def clocks(self, rows: Sequence[Sequence[Value]]) -> None:
        """Note by how many seconds the clocks of instances are ahead of this machine's: (service, instance, ahead)."""
        statement = "INSERT INTO clocks (service, instance, ahead) VALUES (?, ?, ?) ON CONFLICT (service, instance) DO UPDATE SET ahead = excluded.ahead"
        await self.store.many(statement, rows)

    async def silent(self, service: str, instance: str, since: float, serial: str, not_after: int) -> None:
        """Note that an instance has no stream since then and can be reached all the same, with this certificate."""
        await self.store.run(
            "UPDATE instances SET since = CASE WHEN connected = 2 THEN since ELSE ? END, connected = 2, serial = ?, not_after = ?"
            " WHERE service = ? AND instance = ? AND replica = ? AND connected <> 0",
            since, serial, not_after, service, instance, self.replica,
        )  # fmt: skip
        await self.touch()

    async def left(self, service: str, instance: str) -> None:
        """Note that an instance is gone, unless another control plane has it by now."""
        changed = await self.store.run(
            "UPDATE instances SET connected = 0, healthy = 0, since = ? WHERE service = ? AND instance = ? AND replica = ? AND connected <> 0",
            time.time(), service, instance, self.replica,
        )  # fmt: skip
        if changed:
            await self.touch()

    async def told(self, rows: Sequence[Sequence[Value]]) -> None:
        """Note what instances were sent and what they made of it: (sent, sent_at, applied, applied_at, refused, reason, service, instance)."""
        await self.store.many(
            "UPDATE instances SET sent = ?, sent_at = ?, applied = ?, applied_at = ?, refused = ?, reason = ? WHERE service = ? AND instance = ?", rows
        )

    async def applied(self, service: str, instance: str) -> int | None:
        """Return the version that an instance is known to have."""
        rows = await self.store.rows("SELECT applied FROM instances WHERE service = ? AND instance = ?", service, instance)
        return rows[0]["applied"] if rows else None

    async def touch(self) -> None:
        """Tell every control plane that something changed."""
        await self.store.run("UPDATE counters SET value = value + 1 WHERE name = 'changes'")

    async def changes(self) -> int:
        """Return a number that changes with every touch()."""
        return int((await self.store.rows("SELECT value FROM counters WHERE name = 'changes'"))[0]["value"])

    # -- what is known

    async def load(self) -> None:
        """Read who is there, and take over those whom nobody hears any more."""
        rows = await self._read()
        if lost := [row for row in rows if row["connected"] and not row["present"]]:
            await self._take_over(lost)
            rows = await self._read()
        self.spared = judge(rows, self.most)
        self.rows = rows
        self.known = {(row["service"], row["instance"]): row for row in rows}

    async def _read(self) -> list[Row]:
        rows = await read_instances(self.store)
        hearing = await self.hearing()  # after them: whose they are is known by now, also when it has just started
        for row in rows:
            row["present"] = bool(row["connected"]) and hearing.get(row["replica"], self._starting())
        return rows

    async def _take_over(self, lost: list[Row]) -> None:
        """Their control plane is over. Each row is changed once: another control plane may be doing the same, or have its stream by now."""
        kept, gone = [row for row in lost if self.keeps(row)], [row for row in lost if not self.keeps(row)]
        since = "since = CASE WHEN connected = 2 THEN since ELSE COALESCE((SELECT seen FROM replicas WHERE id = instances.replica), since) END"
        for rows, connected, more in (kept, REACHED, ""), (gone, GONE, ", healthy = 0"):
            if rows:
                await self.store.many(
                    f"UPDATE instances SET {since}, replica = ?, connected = ?{more} WHERE service = ? AND instance = ? AND replica = ? AND connected <> 0",
                    [(self.replica, connected, row["service"], row["instance"], row["replica"]) for row in rows],
                )
        await self.touch()
        log.warning("a control plane is not heard any more; its instances are taken over", extra={"looked_at": len(kept), "gone": len(gone)})

    async def hearing(self) -> dict[str, bool]:
        """Whether each control plane still hears its instances, or may be about to be followed by another.

        Judged by its signs going on, not by the time in them: clocks of several machines differ.
        """
        # Its members notice by their pings when it goes without a word (its machine's power, a network), and then come to another: longer than a heartbeat.
        replicas = await self.store.rows("SELECT id, seen FROM replicas")
        now, patience = time.monotonic(), max(COMEBACK, self.heartbeat)
        if now - self._listened > STALL:
            self.wait()  # nobody was heard because nobody listened
        self._listened = now
        for row in replicas:
            if self._signs.get(row["id"], (None, 0.0))[0] != row["seen"]:
                self._signs[row["id"]] = row["seen"], now
        return {
            name: name == self.replica or self._starting() or now - since < patience for name, (_, since) in self._signs.items()
        }

    def _starting(self) -> bool:
        return time.monotonic() < self._came + max(COMEBACK, self.heartbeat)

    def endpoints(self, revoked: Collection[str] = ()) -> dict[str, list[dict[str, Any]]]:
        """Return the endpoints of each service that has any, in a fixed order; none whose certificate's serial is `revoked`."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            if row["offered"] and row["serial"] not in revoked:
                each = {"address": row["inbound"], "weight": 1, "zone": row["zone"], "labels": json.loads(row["labels"])}
                found.setdefault(row["service"], []).append(each)
        return found

    def networks(self) -> dict[str, frozenset[str]]:
        """Return the networks in which each service has instances, up or not."""
        found: dict[str, set[str]] = {}
        for row in self.rows:
            found.setdefault(row["service"], set()).add(network_of(json.loads(row["labels"])))
        return {service: frozenset(networks) for service, networks in found.items()}

    async def network(self, service: str, instance: str) -> str:
        """Return where an instance said it is."""
        rows = await self.store.rows("SELECT labels FROM instances WHERE service = ? AND instance = ?", service, instance)
        return network_of(json.loads(rows[0]["labels"]) if rows else None)

    async def clean(self) -> None:
        """Forget what has been over for long."""
        now = int(time.time())
        await self.store.run("DELETE FROM instances WHERE connected = 0 AND since < ? AND COALESCE(not_after, 0) < ?", now - KEPT, now)
        for table in ("unreachable", "clocks"):
            await self.store.run(
                f"DELETE FROM {table} WHERE NOT EXISTS (SELECT 1 FROM instances i WHERE i.service = {table}.service AND i.instance = {table}.instance)"
            )
        await self.store.run("DELETE FROM certificates WHERE not_after < ?", now - KEPT)
        await self.store.run("DELETE FROM replicas WHERE seen < ?", now - KEPT)
        # Long after they ended, for a clock that was wrong for a while must not let a stolen certificate in again.
        await self.store.run("DELETE FROM revocations WHERE until IS NOT NULL AND until < ?", now - KEPT)


async def read_instances(store: Store) -> list[Row]:
    """Return the instances as the store has them, with `unreachable` (why, or None), `unreachable_since` and `seconds_ahead` of their clocks."""
    return await store.rows(
        "SELECT i.*, u.reason AS unreachable, u.since AS unreachable_since, c.ahead AS seconds_ahead FROM instances i"
        " LEFT JOIN unreachable u ON u.service = i.service AND u.instance = i.instance"
        " LEFT JOIN clocks c ON c.service = i.service AND c.instance = i.instance ORDER BY i.service, i.instance"
    )


def judge(rows: list[Row], most: float | None) -> set[str]:
    """Say of each row, whose `present` is known, whether it is `offered` and in which `state`; return the services that are spared.

    When more than `most` of a service that is well cannot be reached, the wall is likelier around the control plane than around
    them: then nobody of that service is taken out. But no wall answers with another member's certificate: who is not where he says
    he is is out, and counts for nothing.

    An address is offered once. Who has no stream is gone when a later one is where he was (`replaced`): it is that one which a look at him finds.
    """
    well: dict[str, list[Row]] = {}
    latest = latest_at(rows)
    for row in rows:
        row["replaced"] = latest.get(row["place"], row) is not row
        there = row["present"] and not (row["connected"] == REACHED and row["replaced"])
        row["state"] = "gone" if not there else "draining" if row["draining"] else "unhealthy" if not row["healthy"] else STATES[row["connected"]]
        row["offered"] = row["state"] in STATES.values() and bool(row["inbound"])
        if row["offered"]:
            well.setdefault(row["service"], []).append(row)
    spared = set()
    for service, each in well.items():
        for row in [row for row in each if most is not None and (row["unreachable"] or "").startswith(OTHER)]:
            row["state"], row["offered"] = "unreachable", False
            each.remove(row)
        out = [row for row in each if row["unreachable"] is not None and most is not None]
        if most is not None and len(out) > most * len(each):
            spared.add(service)
        for row in out:
            row["state"] = "unreachable"
            row["offered"] = service in spared
    for row in rows:
        row["offered"] = row["offered"] and not (row["replaced"] and latest[row["place"]]["offered"])
    return spared


def latest_at(rows: list[Row]) -> dict[Place, Row]:
    """Return who of a service came last to each address, of those that are there: one with a stream before any without."""
    found: dict[Place, Row] = {}
    for row in rows:
        row["place"] = place = (row["service"], network_of(json.loads(row["labels"])), row["inbound"]) if row["present"] and row["inbound"] else None
        if place is not None and (place not in found or _rank(found[place]) < _rank(row)):
            found[place] = row
    return found


def _rank(row: Row) -> tuple[bool, float, int, str]:
    return row["connected"] == HEARD, row["since"], row["not_after"] or 0, row["instance"]


def read_place(said: dict[str, Any]) -> tuple[str | None, dict[str, str], str | None]:
    """Return (inbound, labels, zone) of what an instance says. Raises BadInstance."""
    inbound, labels, zone = said.get("inbound"), said.get("labels"), said.get("zone")
    labels = {} if labels is None else labels
    if inbound in NOWHERE:
        inbound = None
    if inbound is not None:
        try:
            address = parse_address(inbound)
        except Exception:  # noqa: BLE001 - the schema's own error: its text is for a file
            raise BadInstance("inbound: host:port is expected") from None
        if not address.literal or address.host in ("0.0.0.0", "::"):
            raise BadInstance("inbound: a numeric address that others can reach is expected")
        inbound = str(address)
    if not isinstance(labels, dict) or len(labels) > LABELS:
        raise BadInstance(f"labels: a mapping of at most {LABELS} is expected")
    for name, value in labels.items():
        if not LABEL.fullmatch(name) or not isinstance(value, str) or len(value) > LABEL_VALUE or not value.isprintable():
            raise BadInstance("labels: short names and printable values are expected")
    if zone is not None and (not isinstance(zone, str) or not LABEL.fullmatch(zone)):
        raise BadInstance("zone: a short name is expected")
    return inbound, labels, zone


def read_instance(said: object) -> str:
    """Return the name of an instance. Raises BadInstance."""
    if not isinstance(said, str) or not INSTANCE.fullmatch(said):
        raise BadInstance("instance: letters, digits, dots, - and _ are expected, at most 128")
    return said
