"""Splits and canaries of a service by its instances' labels: what was said of them, and which instance belongs where.

Strategy: an instance belongs to every part whose labels it carries, whatever else it carries, and to none otherwise; the choice among
parts is the one that routes make. Whoever was named no share gets none: without a split, what no canary names is the rest. Plain data,
strictly read: what is not understood refuses the assignment.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("crossway.mesh")

KEYS = ("split", "canary", "sticky")  # of a service's settings
OPS = ("exact", "prefix", "present", "absent")
NAME_MAX = 96  # characters of a part's name
REST = "rest"
VERSION = "version"  # the label that metrics show

Triples = tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Part:
    """Instances with these labels; without labels those that no canary names."""

    labels: tuple[tuple[str, str], ...]
    weight: int = 0
    headers: Triples = ()  # of a canary
    cookies: Triples = ()

    @property
    def name(self) -> str:
        """Return the labels as text; the sticky choice hashes it, so every member makes the same one."""
        text = ",".join(f"{key}={value}" for key, value in self.labels) or REST
        return text if len(text) <= NAME_MAX else f"{text[: NAME_MAX - 17]}~{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def version(self) -> str:
        return dict(self.labels).get(VERSION, "")


@dataclass(frozen=True)
class Traffic:
    """How a service's requests are dealt out. There is always a split."""

    canaries: tuple[Part, ...]
    splits: tuple[Part, ...]
    sticky: str | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return canaries, then splits, as a Chooser counts them."""
        return (*self.canaries, *self.splits)

    def members(self, part: Part, endpoints: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the endpoints of a part."""
        if part.labels:
            return [each for each in endpoints if _carries(each, part)]
        return [each for each in endpoints if not any(_carries(each, canary) for canary in self.canaries)]


def _carries(endpoint: Mapping[str, Any], part: Part) -> bool:
    labels = endpoint.get("labels") or {}
    return all(labels.get(key) == value for key, value in part.labels)


def read(settings: Mapping[str, Any]) -> Traffic | None:
    """Return what a service's settings say of its traffic; None when they say nothing. Raises ValueError, KeyError or TypeError."""
    said, wanted = settings.get("split"), settings.get("canary") or []
    if said is None and not wanted:
        return None
    splits = tuple(Part(_labels(each), _weight(each["weight"])) for each in _known(said, {"labels", "weight"})) if said else (Part((), 1),)
    canaries = tuple(
        Part(_labels(each), 0, _triples(each["when"].get("headers")), _triples(each["when"].get("cookies")))
        for each in _known(wanted, {"labels", "when"})
    )
    if not any(part.weight for part in splits) or not all(part.headers or part.cookies for part in canaries):
        raise ValueError("a split without a weight, or a canary without a condition")
    sticky = settings.get("sticky")
    return Traffic(canaries, splits, None if sticky is None else str(sticky))


def _known(said: Any, keys: set[str]) -> list[Mapping[str, Any]]:
    for each in said:
        if unknown := set(each) - keys:
            raise ValueError(f"{', '.join(sorted(unknown))} of a split or canary is not known to this version")
    return list(said)


def _labels(said: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    labels = tuple(sorted((str(key), str(value)) for key, value in said["labels"].items()))
    if not labels:
        raise ValueError("a split or canary without labels")
    return labels


def _weight(said: Any) -> int:
    if type(said) is not int or not 0 <= said <= 1_000_000:
        raise ValueError(f"{said!r} is no weight")
    return said


def _triples(said: Any) -> Triples:
    found = tuple((str(name), str(op), str(value)) for name, op, value in said or ())
    for _, op, _ in found:
        if op not in OPS:
            raise ValueError(f"the condition {op!r} is not known to this version")
    return found


class Dealer:
    """Deals a service's instances out to its parts, and says when a part has none."""

    def __init__(self) -> None:
        self._empty: set[tuple[str, str]] = set()

    def of(self, service: str, settings: Mapping[str, Any], traffic: Traffic | None) -> list[tuple[str, dict[str, Any]]]:
        """Return (name of the part, settings with its endpoints) for each part; of a service that is not split, itself under no name."""
        if traffic is None:
            return [("", dict(settings))]
        bare = {key: value for key, value in settings.items() if key not in KEYS}
        found: dict[str, dict[str, Any]] = {}
        for part in traffic.parts:
            members = traffic.members(part, settings.get("endpoints", ()))
            found[part.name] = {**bare, "endpoints": members}
            self._tell((service, part.name), bool(members))
        return list(found.items())

    def _tell(self, which: tuple[str, str], there: bool) -> None:
        if there is (which not in self._empty):
            return
        told = {"service": which[0], "part": which[1]}
        if there:
            self._empty.discard(which)
            log.info("a part of a service has instances again", extra=told)
        else:
            self._empty.add(which)
            log.warning("a part of a service has no instance: what would go there goes to the other parts", extra=told)
