"""What a route matches, in the form in which the trie takes it.

Strategy: the configuration's models stay out of the native modules, so a RouteSpec holds plain tuples; everything that
builds a trie, the data path's snapshot as well as `crossway explain`, gets its specs here and so matches alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway._speedups.route_trie import Route, RouteTrie
from gateway.config.conditions import Triple, triples

if TYPE_CHECKING:
    from gateway.config.schema import Config, Match
    from gateway.config.schema import Route as RouteConfig


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """Which requests a route takes: either `path` (a template) or `prefix`; both None is the prefix "/"."""

    hosts: tuple[str, ...] = ()  # names, "*.suffix", "*"; empty: any
    path: str | None = None
    prefix: str | None = None
    methods: tuple[str, ...] = ()  # empty: any
    headers: tuple[Triple, ...] = ()  # (name, op, value); no value for "present" and "absent"
    query: tuple[Triple, ...] = ()


def spec_of(match: Match) -> RouteSpec:
    """Return the spec of a route's `match`."""
    return RouteSpec(
        hosts=tuple(match.host),
        path=match.path,
        prefix=match.prefix,
        methods=tuple(match.methods or ()),
        headers=triples(match.headers),
        query=triples(match.query),
    )


def routes_on(config: Config, listener: str) -> list[RouteConfig]:
    """Return the routes that a listener offers, in the order of the file."""
    return [route for route in config.routes if route.listeners is None or listener in route.listeners]


def build_trie(routes: Iterable[RouteConfig]) -> RouteTrie:
    """Return a trie over routes of the configuration; Route.index is the position in `routes`.

    ValueError names the routes that cannot be built, or not beside each other.
    """
    return RouteTrie([(Route(route.name, index), spec_of(route.match)) for index, route in enumerate(routes)])
