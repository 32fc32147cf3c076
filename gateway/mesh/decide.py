"""May this caller do this? The authorization of a mesh in plain Python: what `crossway mesh can` says, and what the engine must agree with.

Strategy: a rule allows when everything that it says holds; the first in the file's order is named. When none does, the answer is the default, and for
each rule between the two services the condition that failed. Revoked callers are denied before any rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gateway.config.mesh_file import MeshFile, Rule
from gateway.mesh.assign import callers_of, leaves, reaches


@dataclass(frozen=True)
class Call:
    """A request from one service to another, or a connection to one that speaks tcp: then only caller, service and port count.

    Header names are small; `claims` are the end user's, None when there is none. `port`: on which the app listens, None when unknown.
    """

    caller: str
    to: str
    method: str = "GET"
    path: str = "/"
    headers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    claims: Mapping[str, Any] | None = None
    port: int | None = None


@dataclass(frozen=True)
class Decision:
    """The answer, and why."""

    allowed: bool
    reason: str
    rule: str | None = None
    number: int | None = None  # of the rule in the file, from 0
    audited: bool = False  # allowed by the default `audit` only: the record says it would be denied
    considered: tuple[tuple[str, str], ...] = ()  # rules between the two services, and what did not hold


def decide(mesh: MeshFile, call: Call, revoked: frozenset[str] = frozenset()) -> Decision:
    """Return whether the call is allowed."""
    if call.caller in revoked:
        return Decision(False, f"{call.caller} is revoked")
    if call.to in revoked:
        return Decision(False, f"{call.to} is revoked: nobody connects to it")
    considered: list[tuple[str, str]] = []
    outside = call.to in mesh.external
    if outside:
        call = replace(call, port=mesh.external[call.to].port)
    for number, rule in enumerate(mesh.authorization.rules):
        if not (leaves if outside else reaches)(rule, call.to) or call.caller not in callers_of(rule, mesh):
            continue
        failed = unmet(rule, call, not outside and mesh.services[call.to].protocol == "tcp")
        if failed is None:
            return Decision(True, f"rule {rule.name} allows it", rule.name, number)
        considered.append((rule.name, failed))
    why = f"no rule lets {call.caller} do this at {call.to}" if considered else f"no rule names {call.caller} as a caller of {call.to}"
    audit = mesh.authorization.default == "audit" and not outside  # the way out of the mesh is never open by default
    return Decision(audit, why, audited=audit, considered=tuple(considered))


def unmet(rule: Rule, call: Call, tcp: bool = False) -> str | None:
    """Return what a rule says that does not hold for the call; None when all of it does. `tcp`: the service knows no requests."""
    if rule.ports is not None and call.port not in rule.ports:
        here = "is not known; say --port" if call.port is None else f"{call.port} is not one of {', '.join(map(str, rule.ports))}"
        return f"the app's port {here}"
    if tcp:
        return f"it looks into requests, and {call.to} speaks tcp" if rule.layer7 else None
    if rule.methods is not None and call.method not in rule.methods:
        return f"method {call.method} is not one of {', '.join(rule.methods)}"
    if rule.path is not None and not fits(call.path.partition("?")[0], rule.path):
        return f"path {call.path} is not {rule.path}"
    if rule.prefix is not None and not below(call.path.partition("?")[0], rule.prefix):
        return f"path {call.path} is not below {rule.prefix}"
    for name, match in rule.headers.items():
        _, kind, wanted = match.triple(name)
        if not _holds(call.headers.get(name, ()), kind, wanted):
            return f"header {name} is {'there' if kind == 'absent' else 'not as the rule says'}"
    for name, accepted in rule.claims.items():
        if call.claims is None:
            return f"claim {name}: the caller acts for no user"
        if not _has(call.claims.get(name), accepted):
            return f"claim {name} is not {' or '.join(map(str, accepted))}"
    return None


def fits(path: str, template: str) -> bool:
    """Whether a path is a template's; `{name}` takes one segment, which is not empty."""
    said, wanted = path.split("/"), template.split("/")
    return len(said) == len(wanted) and all(one != "" if each.startswith("{") else one == each for one, each in zip(said, wanted, strict=True))


def below(path: str, prefix: str) -> bool:
    """Whether a path is a prefix or below it, on segment boundaries."""
    prefix = prefix.rstrip("/")
    return path == prefix or path.startswith(f"{prefix}/")


def _holds(values: Sequence[str], kind: str, wanted: str) -> bool:
    if kind in ("present", "absent"):
        return bool(values) is (kind == "present")
    # One that holds beside one that does not would let the app read the other.
    return bool(values) and all(value == wanted if kind == "exact" else value.startswith(wanted) for value in values)


def _has(value: Any, accepted: Sequence[Any]) -> bool:
    values = value if isinstance(value, (list, tuple, set, frozenset)) else (value,)
    allowed = {(type(each), each) for each in accepted}
    return any(isinstance(each, (str, int, float)) and (type(each), each) in allowed for each in values)
