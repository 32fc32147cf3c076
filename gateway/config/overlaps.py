"""Routes that compete for the same requests.

Strategy: routes are grouped by the shape of their path (parameters without their names), which is what the trie sees;
within a group, pairs are compared by host, listener, method and conditions. Different shapes never compete: the more
specific wins.
"""

from __future__ import annotations

import re
from collections import defaultdict

from gateway.config.conditions import ValueMatch
from gateway.config.schema import Config, Match, Route

Shape = tuple[str, str]


def check_overlaps(config: Config) -> None:
    """Report duplicate and ambiguous routes, and templates that name the same parameter differently."""
    groups: dict[Shape, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, route in enumerate(config.routes):
        for host in route.match.host:
            groups[_shape(route.match)][host].append(number)
    for hosts in groups.values():
        reported: set[tuple[int, int]] = set()
        for numbers in hosts.values():
            for index, number in enumerate(numbers):
                for other in numbers[:index]:
                    if (other, number) not in reported and _compare(config, other, number):
                        reported.add((other, number))
                        break
        _parameter_names(config, sorted({number for numbers in hosts.values() for number in numbers}))


def _shape(match: Match) -> Shape:
    if match.path is not None:
        return "path", re.sub(r"\{[^}]*\}", "{}", match.path)
    return "prefix", match.prefix or "/"


def _compare(config: Config, first: int, second: int) -> bool:
    """Report the second route if it competes with the first; return whether it does."""
    one, two = config.routes[first], config.routes[second]
    if not _share_listeners(one, two):
        return False
    methods = _shared_methods(one.match, two.match)
    if methods is None or _exclusive(one.match, two.match):
        return False
    document = config.document
    line = document.spot(("routes", first)).line
    place = ("routes", second, "match")
    other = document.show(("routes", first, "name"), one.name)
    if _conditions(one.match) == _conditions(two.match):
        if (one.match.methods is None) != (two.match.methods is None):
            return False  # the route that names its methods is the more specific one
        if set(one.match.methods or ()) == set(two.match.methods or ()):
            document.report(
                place,
                f"unreachable: it takes exactly the requests of route {other} (line {line})",
                "remove one of them, or tell them apart",
            )
        else:
            document.report(
                place,
                f"{', '.join(sorted(methods))} is also taken by route {other} (line {line})",
                "list each method in one of the two routes",
            )
        return True
    if _count(one.match) == _count(two.match) and (one.match.methods is None) == (two.match.methods is None):
        document.warn(
            place,
            f"a request may meet the conditions of route {other} (line {line}) as well",
            "add a condition, so that one of them is the more specific",
        )
        return True
    return False


def _share_listeners(one: Route, two: Route) -> bool:
    return one.listeners is None or two.listeners is None or bool(set(one.listeners) & set(two.listeners))


def _shared_methods(one: Match, two: Match) -> set[str] | None:
    """Return the methods that both take (empty: all of them), or None when there is none."""
    if one.methods is None or two.methods is None:
        return set(one.methods or two.methods or ())
    return set(one.methods) & set(two.methods) or None


def _conditions(match: Match) -> frozenset[tuple[str, str, str]]:
    return frozenset(
        (kind, name, repr((each.value, each.present, each.prefix)))
        for kind, conditions in (("header", match.headers), ("query", match.query))
        for name, each in conditions.items()
    )


def _count(match: Match) -> int:
    return len(match.headers) + len(match.query)


def _exclusive(one: Match, two: Match) -> bool:
    """Tell whether no request can meet both sets of conditions."""
    for ours, theirs in ((one.headers, two.headers), (one.query, two.query)):
        if any(name in theirs and _contradict(condition, theirs[name]) for name, condition in ours.items()):
            return True
    return False


def _contradict(one: ValueMatch, two: ValueMatch) -> bool:
    if one.present is False or two.present is False:
        return one.present is not two.present
    if one.present or two.present:
        return False
    if one.value is not None and two.value is not None:
        return one.value != two.value
    if one.prefix is not None and two.prefix is not None:
        return not (one.prefix.startswith(two.prefix) or two.prefix.startswith(one.prefix))
    value, prefix = one.value or two.value or "", one.prefix or two.prefix or ""
    return not value.startswith(prefix)


def _parameter_names(config: Config, numbers: list[int]) -> None:
    first = numbers[0]
    names = config.routes[first].match.parameters
    for number in numbers[1:]:
        here = config.routes[number].match.parameters
        if here != names:
            document = config.document
            ours, theirs = next(pair for pair in zip(here, names, strict=True) if pair[0] != pair[1])
            outside = (
                document.spot(("routes", number, "match", "path")).resolved
                or document.spot(("routes", first, "match", "path")).resolved
            )
            shown = "" if outside else f": {{{ours}}} here, {{{theirs}}} in route '{config.routes[first].name}'"
            document.warn(
                ("routes", number, "match", "path"),
                f"the same path with another parameter name{shown}",
                "use one name for one thing",
            )
