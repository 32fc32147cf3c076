"""How the mesh deals out the requests of a service behind an upstream, as `crossway routes` and `crossway explain` show it.

Strategy: the control plane's last word is a file in the edge's state, so it is known where that state can be read, and nowhere else; which of the two it is is
always said. What decides for a request is asked of the engine's own chooser.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway.config import Config

WORDS = {"exact": "= {}", "prefix": "= {}...", "present": "present", "absent": "absent"}


def targets(config: Config, upstream: str) -> list[str]:
    """Return where an upstream's endpoints are, as the configuration has it now."""
    settings = config.upstreams[upstream]
    found = settings.discovery
    if found.srv is not None:
        return [f"SRV {found.srv}"]
    return [str(target.address) for target in settings.targets or found.endpoints]


def divided(config: Config, upstreams: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return, for each of the upstreams that is a service of the mesh, what is known of how it is divided."""
    return {name: _division(config, name) for name in upstreams if config.upstreams[name].service is not None}


def _division(config: Config, name: str) -> dict[str, Any]:
    settings = config.upstreams[name]
    traffic, why = settings.traffic, _unknown(config)
    found: dict[str, Any] = {"service": settings.service, "known": why is None}
    if why is not None:
        return {**found, "why": why}
    parts = traffic.splits if traffic is not None else ()
    canaries = traffic.canaries if traffic is not None else ()
    return {
        **found,
        "split": [{"labels": part.label, "weight": part.weight, "targets": targets(config, part.name)} for part in parts],
        "sticky": traffic.sticky if traffic is not None else None,
        "canary": [{"labels": part.label, "when": conditions(part.headers, part.cookies), "targets": targets(config, part.name)} for part in canaries],
    }  # fmt: skip


def _unknown(config: Config) -> str | None:
    """Why nothing is known here of the mesh's word; None when it is."""
    mesh = config.mesh
    if mesh is None or mesh.joined is None:
        state = "its state" if mesh is None else str(mesh.state)
        return f"{state} holds no certificate that can be read here: the edge has not joined yet, or runs elsewhere or as another user; ask where it runs"
    if not mesh.traffic.exists():
        return f"{mesh.traffic} is not there: the control plane has said nothing to this edge yet"
    return None


def conditions(headers: Iterable[Sequence[str]], cookies: Iterable[Sequence[str]]) -> list[str]:
    """Return a canary's conditions, each in a few words."""
    return [f"{kind} {name} {WORDS[op].format(value)}" for kind, all_of in (("header", headers), ("cookie", cookies)) for name, op, value in all_of]


def decided(config: Config, name: str, fields: list[tuple[bytes, bytes]], client: str | None, source: str | None) -> dict[str, Any] | None:
    """Return what the mesh makes of one request to an upstream; None when that is no service of a mesh. Raises ValueError as the chooser does."""
    from gateway.snapshot.shaping import service_chooser

    traffic = config.upstreams[name].traffic
    found = divided(config, [name]).get(name)
    if found is None or traffic is None or not found["known"]:
        return found
    how, index = service_chooser(traffic).explain(fields, client, source)
    if how == "canary":
        return {**found, "how": "canary", "part": found["canary"][index]}
    if how == "sticky":
        return {**found, "how": "sticky", "part": found["split"][index]}
    return {**found, "how": "weight"}


def share_texts(split: Sequence[Mapping[str, Any]], name: str = "upstream") -> list[str]:
    """Return each split as `NAME 12.5%`."""
    total = sum(each["weight"] for each in split)
    return [f"{each[name]} {100 * each['weight'] / total:.3g}%" for each in split]


def cell_lines(mesh: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table's cell about a route's services."""
    lines = []
    for name, each in mesh.items():
        if not each["known"]:
            lines.append(f"{name} in the mesh: not known here")
        elif each["split"]:
            sticky = f" (sticky by {each['sticky']})" if each["sticky"] else ""
            lines.append(f"{name} in the mesh: {', '.join(share_texts(each['split'], 'labels'))}{sticky}")
            lines += [f"{name} in the mesh: {canary['labels']} if {' and '.join(canary['when'])}" for canary in each["canary"]]
    return lines


def notes(mesh: Iterable[Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Return, once each, why something is not known."""
    return list(dict.fromkeys(f"how the mesh divides {each['service']} is not known here: {each['why']}" for facts in mesh for each in facts.values() if not each["known"]))


def explained(name: str, each: Mapping[str, Any]) -> list[str]:
    """Return the lines of an explanation about one upstream."""
    if not each["known"]:
        return [f"mesh      how it divides {each['service']} is not known here: {each['why']}"]
    if "how" not in each:
        return [f"mesh      service {each['service']}, all instances alike"]
    if each["how"] != "weight":
        part = each["part"]
        why = " and ".join(part["when"]) if each["how"] == "canary" else f"sticky by {each['sticky']}"
        return [f"mesh      {name}: {part['labels']}, {why}   ({_where(part)})"]
    lines = [f"mesh      {name}: sticky by {each['sticky']}, which this request does not say: it is drawn"] if each["sticky"] else []
    return lines + [f"mesh      {name}: {text}   ({_where(part)})" for text, part in zip(share_texts(each["split"], "labels"), each["split"], strict=True)]


def _where(part: Mapping[str, Any]) -> str:
    return ", ".join(part["targets"]) or "no instance: what would go there goes to the other parts"
