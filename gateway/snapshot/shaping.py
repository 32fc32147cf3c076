"""Splits, canaries and mirrors: from a route's settings to what its requests meet before they are forwarded.

Strategy: each choice becomes a RouteEntry of its own, so that its timeouts and header edits are those of any route; metrics know it
as ROUTE>UPSTREAM. A route with one upstream and no mirror gets no Shape and pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from gateway._speedups.exchange import Edits, RouteEntry, Shape
from gateway._speedups.pool import Upstream
from gateway._speedups.shaping import Chooser, Conditions, Mirror, Shaper
from gateway.config import Config, schema
from gateway.config.client_tls import ClientTls
from gateway.config.conditions import triples
from gateway.config.mesh_parts import ServiceTraffic
from gateway.config.policies import HeaderEdits
from gateway.config.shaping import Mirror as MirrorSettings
from gateway.policies import RouteParts, Workshop
from gateway.policies.mirror import Sender
from gateway.policies.transform import edit_lines
from gateway.telemetry.shared import choice_name

NO_EDITS = HeaderEdits()
STRIPPED = ("authorization", "cookie")


@dataclass(frozen=True)
class Way:
    """One way through a route: an upstream, its metric, and what is changed in the headers."""

    upstream: Upstream
    metric: int
    request: Edits | None
    response: Edits | None


def chooser_of(route: schema.Route) -> Chooser | None:
    """Return what chooses among the route's canaries and splits; None when there is one upstream."""
    if route.split is None and not route.canary:
        return None
    canaries = [Conditions(triples(each.when.headers), triples(each.when.cookies)) for each in route.canary]
    return Chooser(canaries, [(split.upstream, split.weight) for split in route.splits], route.sticky)


def shape_of(
    route: schema.Route, config: Config, upstreams: Mapping[str, Upstream], parts: RouteParts, workshop: Workshop,
    add: Callable[[str], int], entry: Callable[[Way], RouteEntry],
) -> Shape | None:
    """Return the route's Shape, None when it needs none. `add` numbers a metric's name, `entry` makes a way's RouteEntry."""
    chooser = chooser_of(route)
    if chooser is None and route.mirror is not None and config.upstreams[route.splits[0].upstream].traffic is not None:
        chooser = Chooser([], [(route.splits[0].upstream, 1)])  # the mirror's place is taken: the parts are one choice further
    mirror = None
    if route.mirror is not None:
        mirror = _mirror(route, route.mirror, config, upstreams[route.mirror.upstream], workshop)
    if chooser is None and mirror is None:
        return None
    entries = () if chooser is None else tuple(
        entry(Way(
            upstreams[choice.upstream], add(choice_name(route.name, choice.upstream)),
            edits(parts.request_remove, parts.request_add, choice.request_headers),
            edits(parts.response_remove, parts.response_add, choice.response_headers),
        ))
        for choice in route.choices
    )  # fmt: skip
    return Shaper(chooser, entries, mirror)


def service_shape(
    route: schema.Route, way: Way, config: Config, upstreams: Mapping[str, Upstream], add: Callable[[str], int],
    entry: Callable[[Way], RouteEntry],
) -> Shape | None:
    """Return how the mesh deals out the requests that go this way; None when its upstream is not divided."""
    traffic = config.upstreams[way.upstream.name].traffic
    if traffic is None:
        return None
    entries = tuple(
        entry(replace(way, upstream=upstreams[part.name], metric=add(choice_name(route.name, part.name)))) for part in traffic.parts
    )
    return Shaper(service_chooser(traffic), entries, spare=True)


def service_chooser(traffic: ServiceTraffic) -> Chooser:
    """Return what chooses among the parts of a service."""
    canaries = [Conditions(part.headers, part.cookies) for part in traffic.canaries]
    return Chooser(canaries, [(part.label, part.weight) for part in traffic.splits], traffic.sticky)


def edits(remove: list[bytes], add: list[bytes], more: HeaderEdits = NO_EDITS) -> Edits | None:
    """Return the edits of a route's policies, and after them those of a split: what it sets or removes, it also takes from theirs."""
    removed, added = edit_lines(more)
    kept = [line for line in add if line.partition(b":")[0] not in removed]
    names, lines = [*remove, *removed], [*kept, *added]
    return Edits(names, b"".join(lines)) if names or lines else None


def _mirror(
    route: schema.Route, settings: MirrorSettings, config: Config, upstream: Upstream, workshop: Workshop
) -> Mirror:
    keep = config.upstreams[settings.upstream].keepalive
    strip = settings.strip if settings.strip is not None else (*STRIPPED, *_key_headers(route, config))
    host = config.upstreams[settings.upstream].host
    tls = config.upstreams[settings.upstream].tls
    sender = Sender(
        strip=strip, host={"preserve": None, "target": ""}.get(host, host), timeout=settings.timeout, keep=keep.connections,
        idle=keep.idle, tls=None if tls is None else ClientTls(tls, "http/1.1"),
    )
    workshop.sources.append(sender)
    return Mirror(
        upstream, send=sender.send, methods=settings.methods, percent=settings.percent, body=settings.body,
        in_flight=settings.in_flight,
    )


def _key_headers(route: schema.Route, config: Config) -> list[str]:
    """The headers in which the route's api_key policies expect a key."""
    used = [config.policies[use.use] if use.use is not None else use.inline for use in route.policies]
    return [policy.api_key.header for policy in used if policy is not None and policy.api_key is not None]
