"""Names that a configuration uses and must also define.

Strategy: on the raw data, so that a wrong name is reported together with mistakes of the schema rather than after
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from gateway.config.source import Document, Path_


def check_names(document: Document) -> None:
    """Report unknown upstreams, policies and listeners in routes and listeners, and route names that are used twice."""
    data = document.data if isinstance(document.data, dict) else {}
    known = {kind: _names(data.get(kind)) for kind in ("upstreams", "policies", "listeners")}
    listeners = data.get("listeners")
    for listener, settings in listeners.items() if isinstance(listeners, dict) else ():
        tcp = settings.get("tcp") if isinstance(settings, dict) else None
        if isinstance(tcp, dict):
            at_tcp = ("listeners", listener, "tcp")
            for key in ("upstream", "default"):
                _known(document, (*at_tcp, key), tcp.get(key), known["upstreams"], "upstream")
            sni = tcp.get("sni")
            for name, upstream in sni.items() if isinstance(sni, dict) else ():
                _known(document, (*at_tcp, "sni", name), upstream, known["upstreams"], "upstream")
    seen: dict[str, int] = {}
    routes = data.get("routes")
    for number, route in enumerate(routes if isinstance(routes, list) else []):
        if not isinstance(route, dict):
            continue
        at = ("routes", number)
        name = route.get("name")
        if isinstance(name, str) and name in seen:
            line = document.spot(("routes", seen[name], "name")).line
            document.report(
                (*at, "name"),
                f"duplicate route name {document.show((*at, 'name'), name)}",
                f"it is already at line {line}",
            )
        elif isinstance(name, str):
            seen[name] = number
        for place, upstream in _upstreams(route):
            _known(document, (*at, *place), upstream, known["upstreams"], "upstream")
        policies = route.get("policies")
        used: set[str] = set()
        for index, policy in enumerate(policies if isinstance(policies, list) else []):
            _known(document, (*at, "policies", index), policy, known["policies"], "policy")
            if isinstance(policy, str) and policy in used:
                document.report(
                    (*at, "policies", index),
                    f"policy {document.show((*at, 'policies', index), policy)} twice in one route",
                    "remove one",
                )
            elif isinstance(policy, str):
                used.add(policy)
        listeners = route.get("listeners")
        if isinstance(listeners, str):
            _known(document, (*at, "listeners"), listeners, known["listeners"], "listener")
        for index, listener in enumerate(listeners if isinstance(listeners, list) else []):
            _known(document, (*at, "listeners", index), listener, known["listeners"], "listener")


def _upstreams(route: dict[str, Any]) -> Iterator[tuple[Path_, Any]]:
    """Yield what a route names as its upstreams, each with its place below the route."""
    yield ("upstream",), route.get("upstream")
    for key in ("split", "canary"):
        choices = route.get(key)
        for index, choice in enumerate(choices if isinstance(choices, list) else []):
            if isinstance(choice, dict):
                yield (key, index, "upstream"), choice.get("upstream")
    if isinstance(mirror := route.get("mirror"), dict):
        yield ("mirror", "upstream"), mirror.get("upstream")


def _names(section: Any) -> list[str]:
    return [str(name) for name in section] if isinstance(section, dict) else []


def _known(document: Document, at: Path_, name: Any, known: Iterable[str], kind: str) -> None:
    known = list(known)
    if not isinstance(name, str) or name in known:
        return
    plural = {"policy": "policies"}.get(kind, f"{kind}s")
    close = [] if document.spot(at).resolved else get_close_matches(name, known, 1, 0.6)
    hint = f"did you mean '{close[0]}'?" if close else f"defined under `{plural}`: {', '.join(known[:20]) or 'none'}"
    document.report(at, f"unknown {kind} {document.show(at, name)}", hint)
