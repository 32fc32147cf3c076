"""The mesh's document in the state: what `crossway mesh apply` put there, for all control planes at once.

Strategy: with `control.source: state` everything of a mesh's file but its section `control` is taken from the newest document, so that no two control
planes serve different rules because somebody forgot one machine. `control` stays the file's: it says where this very process listens, where the
state itself is, and by whose certificates one may join. Documents are numbered and only appended, each on the one that its author had seen: one
statement decides who was first. A document is checked as a file is, by the control plane that takes it, and again by each that puts it in force.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from gateway.config.mesh_file import MeshFile
from gateway.config.mesh_load import load_mesh
from gateway.errors import ConfigError, Problem
from gateway.mesh.store import Store

KEPT = 20  # documents
MOST = 1 << 20  # bytes of one


@dataclass(frozen=True)
class Applied:
    """A document of the state."""

    number: int
    digest: str  # of its text
    content: str
    applied: float  # unix time
    who: str

    @property
    def mark(self) -> str:
        """What names it beyond doubt: number and digest."""
        return f"{self.number}-{self.digest[:12]}"


async def newest(store: Store) -> Applied | None:
    """Return the document that counts; None before the first."""
    rows = await store.rows("SELECT number, digest, content, applied, who FROM documents ORDER BY number DESC LIMIT 1")
    return Applied(**rows[0]) if rows else None


async def number(store: Store) -> int:
    """Return the number of the document that counts, 0 before the first."""
    return int((await store.rows("SELECT COALESCE(MAX(number), 0) AS number FROM documents"))[0]["number"])


async def append(store: Store, content: str, digest: str, who: str, base: int) -> Applied | None:
    """Make a document the newest one after the one with number `base`; None when another one is there by now."""
    made = Applied(base + 1, digest, content, time.time(), who)
    # The types are said because PostgreSQL does not look for them at the table.
    changed = await store.run(
        "INSERT INTO documents (number, digest, content, applied, who)"
        " SELECT CAST(? AS BIGINT), CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS DOUBLE PRECISION), CAST(? AS TEXT)"
        " WHERE (SELECT COALESCE(MAX(number), 0) FROM documents) = CAST(? AS BIGINT) ON CONFLICT DO NOTHING",
        made.number, made.digest, made.content, made.applied, made.who, base,
    )  # fmt: skip
    if changed != 1:
        return None
    await store.run("DELETE FROM documents WHERE number <= ?", made.number - KEPT)
    return made


def read(content: bytes, own: MeshFile, name: str) -> tuple[MeshFile, list[str]]:
    """Return the mesh of a document, with the section `control` of a control plane's own file, and what of the document is not taken.

    Paths are those on this machine, relative ones beside its own file. Raises ConfigError.
    """
    mesh = load_mesh(own.path, content, name)
    if mesh.trust_domain != own.trust_domain:
        spot = mesh.spot("trust_domain")
        raise ConfigError([Problem(name, spot.line, spot.column, f"the trust domain of this mesh is {own.trust_domain}: it cannot change while members live in it")])
    other = [key for key in mesh.control.model_fields_set if getattr(mesh.control, key) != getattr(own.control, key)]
    notes = [f"control.{key} is not taken: it is of each control plane's own file" for key in sorted(other)]
    return mesh.model_copy(update={"control": own.control}), notes


def of_state(applied: Applied, own: MeshFile) -> MeshFile:
    """Return the mesh that a document of the state makes here. Raises ConfigError."""
    return read(applied.content.encode(), own, f"document {applied.number} of the state")[0]


async def in_force(store: Store, own: MeshFile) -> tuple[MeshFile, Applied | None]:
    """Return the mesh that counts, by a control plane's own file and the state, and the document that it is from. Raises ConfigError."""
    applied = await newest(store) if own.control.source == "state" else None
    return (own, None) if applied is None else (of_state(applied, own), applied)


def changes(before: MeshFile, after: MeshFile) -> list[str]:
    """Return what differs, a line each: `services.ledger: changed`, `authorization.rules.a-to-b: removed`."""
    old, new = (each.model_dump(mode="json", by_alias=True, exclude={"control"}) for each in (before, after))
    found: list[str] = []
    for key in {**old, **new}:
        _differ(key, old.get(key), new.get(key), 1, found)
    return found


def _differ(at: str, old: Any, new: Any, depth: int, found: list[str]) -> None:
    if old == new:
        return
    old, new = _named(old), _named(new)
    if depth < 4 and isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if key not in old or key not in new:
                found.append(f"{at}.{key}: {'added' if key in new else 'removed'}")
            else:
                _differ(f"{at}.{key}", old[key], new[key], depth + 1, found)
        if list(old) != list(new) and set(old) == set(new):
            found.append(f"{at}: another order")
    elif isinstance(new, (dict, list)) or isinstance(old, (dict, list)):
        found.append(f"{at}: changed")
    else:
        found.append(f"{at}: {old} -> {new}")


def _named(value: Any) -> Any:
    """A list of things that have names, by their names."""
    if isinstance(value, list) and value and all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in value):
        return {each["name"]: each for each in value}
    return value
