"""The rules of an assignment made into a native policy, and the record of what it denied.

Strategy: a denial is counted by caller, rule and policy version, and told in the log; both are bounded, because whoever is denied may
ask as often as he likes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from gateway._speedups.authorization import Authorization, AuthorizationStep, Caller, Rule
from gateway._speedups.exchange import RouteEntry, Step
from gateway._speedups.tcp_listener import TcpTarget

log = logging.getLogger("crossway.mesh")

SERIES = 500  # (caller, policy version, audit) that are counted apart
LINES = 10  # in the log, a second


class Denials:
    """What was denied, or would have been, since the member started."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, int, bool], int] = {}
        self._second, self._lines, self._unsaid = 0, 0, 0

    def record(
        self, caller: str, rules: tuple[str, ...], request_id: str, method: str, path: str, audit: bool, version: int, *, to: str | None = None
    ) -> None:
        """Count one denial and tell it. `rules` are those that name the caller; none of them matched. Without a method: a raw connection.

        `to` is an external host's name.
        """
        key = (caller or "nobody", "none", version, audit)
        if key not in self.counts and len(self.counts) >= SERIES:
            key = ("others", "none", 0, audit)
        self.counts[key] = self.counts.get(key, 0) + 1
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._lines = second, 0
        if self._lines >= LINES:
            self._unsaid += 1
            return
        self._lines += 1
        told: dict[str, Any] = {"caller": caller or None, "rule": None, "considered": list(rules), "policy": version}
        if method:
            told |= {"method": method, "path": path, "request_id": request_id}
        what = "call" if method else "connection"
        if to is not None:
            told["external"] = to
        if self._unsaid:
            told["unsaid"], self._unsaid = self._unsaid, 0
        log.warning(f"a {what} would be denied" if audit else f"a {what} was denied", extra=told)


def conditions(said: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Header conditions as the native rule takes them: a value, {present: bool} or {prefix: text}. Raises ValueError."""
    found = []
    for name, wanted in said.items():
        if isinstance(wanted, str):
            found.append((name, "exact", wanted))
        elif isinstance(wanted, Mapping) and len(wanted) == 1 and isinstance(wanted.get("present"), bool):
            found.append((name, "present" if wanted["present"] else "absent", ""))
        elif isinstance(wanted, Mapping) and len(wanted) == 1 and isinstance(wanted.get("prefix"), str):
            found.append((name, "prefix", wanted["prefix"]))
        elif isinstance(wanted, Mapping) and len(wanted) == 1 and isinstance(wanted.get("exact"), str):
            found.append((name, "exact", wanted["exact"]))
        else:
            raise ValueError(f"a condition on the header {name} that this version does not know: {wanted!r}")
    return found


def make_rule(said: Mapping[str, Any], port: int | None = None) -> Rule:
    """Return a native rule of the app at `port`. Raises ValueError, since a rule that is not understood must not be left out silently."""
    unknown = set(said) - {"name", "from", "to", "methods", "path", "prefix", "headers", "claims", "ports"}
    if unknown:
        raise ValueError(f"rule {said.get('name')}: {', '.join(sorted(unknown))} is not known to this version")
    ports = said.get("ports")
    if ports is not None and not (isinstance(ports, list) and ports and all(type(each) is int for each in ports)):
        raise ValueError(f"rule {said.get('name')}: ports are numbers, not {ports!r}")
    claims = said.get("claims") or {}
    return Rule(
        said["name"],
        methods=said.get("methods"),
        path=said.get("path"),
        prefix=said.get("prefix"),
        headers=conditions(said.get("headers") or {}),
        claims=[(name, values if isinstance(values, (list, tuple)) else (values,)) for name, values in claims.items()],
        elsewhere=ports is not None and port not in ports,
    )


def _by_caller(said: Mapping[str, Any], domain: str, port: int | None) -> dict[str, list[Rule]]:
    """The rules that name each caller. Raises ValueError, KeyError or TypeError for what is no policy."""
    if said["default"] not in ("deny", "audit"):
        raise ValueError(f"authorization.default: {said['default']!r} is neither deny nor audit")
    by_caller: dict[str, list[Rule]] = {}
    for each in said["rules"]:
        rule = make_rule(each, port)
        for name in each["from"]:
            by_caller.setdefault(name if "://" in name else f"spiffe://{domain}/service/{name}", []).append(rule)
    return by_caller


def make_gate(
    said: Mapping[str, Any], domain: str, denials: Denials, target_of: Callable[[str], TcpTarget], port: int | None
) -> Authorization:
    """Return the policy of raw connections to the app at `port`; `target_of` says under which name a caller's are counted.

    Raises ValueError, KeyError or TypeError for what is no policy.
    """
    by_caller = _by_caller(said, domain, port)
    policy = Authorization(int(said["version"]), denials.record, audit=said["default"] == "audit", target_of=target_of)
    for identity, rules in by_caller.items():
        policy.add(Caller(identity, rules, target=target_of(identity)))
    return policy


def make_step(
    said: Mapping[str, Any], domain: str, denials: Denials, entry: Callable[[str, Step], RouteEntry | None], port: int | None = None
) -> AuthorizationStep:
    """Return the step of an assignment's `authorization`; `entry` makes the RouteEntry of a caller, whose steps are this one.

    `port` is the app's. Raises ValueError, KeyError or TypeError for what is no policy.
    """
    by_caller = _by_caller(said, domain, port)

    def entry_of(identity: str) -> RouteEntry | None:
        return entry(identity, step)

    policy = Authorization(int(said["version"]), denials.record, audit=said["default"] == "audit", entry_of=entry_of)
    step = AuthorizationStep("authorization", policy)
    for identity, rules in by_caller.items():
        policy.add(Caller(identity, rules, entry_of(identity)))
    return step
