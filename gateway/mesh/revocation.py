"""Who is shut out: services and single certificates, from the mesh's file and from `crossway mesh revoke`.

Strategy: a service that is revoked gets no certificate and its certificates are worth nothing, whenever they were issued; a certificate is
named by its serial and forgotten when it would have ended anyway. Whoever has stolen a key may have renewed by it, so a certificate goes with all that
its instance holds. The list is short by nature and goes to every member whole.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from gateway.config.mesh_file import MeshFile
from gateway.mesh.spiffe import service_id, service_of
from gateway.mesh.store import Row, Store

SERVICE, SERIAL = "service", "serial"
DAY = 86400  # seconds that a revocation outlives its certificate: clocks differ


@dataclass(frozen=True)
class DenyList:
    """What every member is told."""

    serials: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    services: frozenset[str] = field(default_factory=frozenset)

    def said(self) -> dict[str, list[str]]:
        """Return it as an assignment has it."""
        return {"serials": list(self.serials), "identities": list(self.identities)}


async def load(store: Store, mesh: MeshFile) -> DenyList:
    """Return the list as it is now."""
    now = int(time.time())
    rows = await store.rows("SELECT kind, value FROM revocations WHERE until IS NULL OR until >= ?", now)
    services = {*mesh.revoked.services, *(row["value"] for row in rows if row["kind"] == SERVICE)}
    serials = {*mesh.revoked.serials, *(row["value"] for row in rows if row["kind"] == SERIAL)}
    return DenyList(
        tuple(sorted(serials)), tuple(sorted(service_id(mesh.trust_domain, name) for name in services)), frozenset(services)
    )


def read(what: str, mesh: MeshFile) -> tuple[str, str]:
    """Return (kind, value) of what a person wants to revoke: a service, its SPIFFE id, or a serial number. Raises ValueError."""
    if what.startswith("spiffe://"):
        name = service_of(what, mesh.trust_domain)
        if name is None:
            raise ValueError(f"{what} is the id of no service of {mesh.trust_domain}")
        return SERVICE, name
    if what in mesh.services:
        return SERVICE, what
    serial = what.lower().replace(":", "").removeprefix("0x").lstrip("0")
    if 8 <= len(serial) <= 40 and all(each in "0123456789abcdef" for each in serial):
        return SERIAL, serial
    raise ValueError(f"{what} is neither a service of the mesh's file ({', '.join(mesh.services)}) nor a serial number")


async def revoke(store: Store, kind: str, value: str, reason: str) -> int:
    """Put something on the list, a certificate with the others of its instance; return how many those are."""
    if kind == SERVICE:
        await _put(store, kind, value, None, reason)
        return 0
    found = await store.rows("SELECT not_after FROM certificates WHERE serial = ?", value)
    # This one first: a renewal that is under way looks for it when it has written down its own.
    await _put(store, kind, value, int(found[0]["not_after"]) + DAY if found else None, reason)
    others = await _others(store, value)
    for row in others:
        await _put(store, kind, row["serial"], int(row["not_after"]) + DAY, reason)
    return len(others)


async def _put(store: Store, kind: str, value: str, until: int | None, reason: str) -> None:
    await store.run(
        "INSERT INTO revocations (kind, value, made, until, reason) VALUES (?, ?, ?, ?, ?) ON CONFLICT (kind, value) DO UPDATE SET reason = excluded.reason",
        kind, value, int(time.time()), until, reason,
    )  # fmt: skip


async def _others(store: Store, serial: str) -> list[Row]:
    """The certificates that are not over of the instance that holds this one, without it."""
    return await store.rows(
        "SELECT c.serial, c.not_after FROM certificates c JOIN certificates named ON named.service = c.service AND named.instance = c.instance"
        " WHERE named.serial = ? AND named.instance <> '' AND c.serial <> named.serial AND c.not_after >= ? ORDER BY c.serial",
        serial, int(time.time()),
    )  # fmt: skip


async def inherit(store: Store, serial: str, by: str, not_after: int) -> bool:
    """Whether the certificate `by`, for which this one was issued, has been revoked meanwhile; then this one is too."""
    found = await store.rows("SELECT reason FROM revocations WHERE kind = ? AND value = ?", SERIAL, by)
    if found:
        await _put(store, SERIAL, serial, not_after + DAY, found[0]["reason"])
    return bool(found)


async def admit(store: Store, kind: str, value: str) -> bool:
    """Take something off the list, a certificate with the others of its instance; False when it was not there."""
    if await store.run("DELETE FROM revocations WHERE kind = ? AND value = ?", kind, value) == 0:
        return False
    for row in await _others(store, value) if kind == SERIAL else ():
        await store.run("DELETE FROM revocations WHERE kind = ? AND value = ?", kind, row["serial"])
    return True


async def listed(store: Store) -> list[Row]:
    """Return what `crossway mesh revoke` put there."""
    return await store.rows("SELECT kind, value, made, until, reason FROM revocations ORDER BY made")


async def revoked_serials(store: Store, deny: DenyList) -> list[tuple[str, int]]:
    """Return (serial, unix time) of every certificate that is not over and worth nothing: what a CRL lists."""
    now = int(time.time())
    made = {(row["kind"], row["value"]): int(row["made"]) for row in await listed(store)}
    found = {serial: made.get((SERIAL, serial), now) for serial in deny.serials}
    for service in sorted(deny.services):
        for row in await store.rows("SELECT serial FROM certificates WHERE service = ? AND not_after >= ?", service, now):
            found.setdefault(row["serial"], made.get((SERVICE, service), now))
    return sorted(found.items())
