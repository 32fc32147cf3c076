"""Builds a snapshot: upstreams, routes with their compiled steps, and a trie per set of routes.

Strategy: a pure function of the configuration, but for what policies open (key files, audit files). Everything a request could
have to look up is resolved here. Nothing runs until Snapshot.start().
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from gateway._speedups.exchange import Edits, ListenerEntry, RouteEntry, Snapshot, Step
from gateway._speedups.pool import Endpoint, Upstream
from gateway._speedups.route_trie import RouteTrie
from gateway.config import Config
from gateway.config import schema
from gateway.config.policies import Policy
from gateway.policies import COMPILERS, RouteParts, Use, Workshop
from gateway.snapshot.matching import spec_of
from gateway.snapshot.resolve import Resolver


UNROUTED = 0                # metric id of the empty name: requests that reached no route


class Names(Protocol):
    """The shared table of metric names. add() gives a known name its number without writing."""

    def add(self, name: str) -> int: ...


def build(config: Config, *, names: Names, seed: int, version: int, worker: int = -1) -> Snapshot:
    """Compile `config`. `seed` must be the same in every worker; `version` counts up with each reload.

    `worker` is the index that audit records name; -1 for a snapshot that is only tried out.

    Raises OSError or ValueError for what a policy cannot open or make.
    """
    workshop = Workshop(config.base, seed, worker)
    upstreams = {name: _upstream(name, settings, workshop) for name, settings in config.upstreams.items()}
    routes = [
        _route(index, route, config, upstreams[route.upstream], names.add(route.name), workshop)
        for index, route in enumerate(config.routes)
    ]
    snapshot = Snapshot(version, config.digest, _listeners(config, routes), upstreams, routes)
    snapshot.journals = list(workshop.journals.values())
    snapshot.sources = workshop.sources
    snapshot.identity_names = tuple(sorted(workshop.identity_names))
    snapshot.unrouted = UNROUTED
    return snapshot


def _upstream(name: str, settings: schema.Upstream, workshop: Workshop) -> Upstream:
    endpoints = [Endpoint(str(target.address), target.weight) for target in settings.targets]
    named = [endpoint for endpoint in endpoints if not endpoint.numeric]
    if named:
        workshop.sources.append(Resolver(named, settings.resolve))
    times, keep = settings.timeouts, settings.keepalive
    return Upstream(
        name, endpoints, connect=times.connect, head=times.head, idle=times.idle, total=times.total,
        keep_connections=keep.connections, keep_idle=keep.idle, keep_age=keep.age, requests=settings.limits.requests,
        retry_connect=settings.retries > 0, host=settings.host,
    )


def _listeners(config: Config, routes: list[RouteEntry]) -> dict[str, ListenerEntry]:
    """Listeners that offer the same routes share a trie."""
    tries: dict[tuple[int, ...], RouteTrie] = {}
    listeners = {}
    for name, settings in config.listeners.items():
        offered = tuple(i for i, route in enumerate(config.routes) if route.listeners is None or name in route.listeners)
        if offered not in tries:
            tries[offered] = RouteTrie([(routes[i], spec_of(config.routes[i].match)) for i in offered])
        times, limits = settings.timeouts, settings.limits
        listeners[name] = ListenerEntry(
            name, tries[offered], head_limit=limits.head, target_limit=limits.target, fields=limits.fields,
            body_limit=limits.body, head=times.head, body=times.body, keepalive=times.keepalive, write=times.write,
            requests=limits.requests, connections=limits.connections,
            trusted=[str(network) for network in settings.trusted_proxies], proxy_protocol=settings.proxy_protocol,
        )
    return listeners


def _uses(route: schema.Route, config: Config) -> Iterable[tuple[str, Policy]]:
    for number, ref in enumerate(route.policies):
        if ref.use is not None:
            yield ref.use, config.policies[ref.use]
        elif ref.inline is not None:
            yield f"{route.name}#{number}:{ref.inline.kind}", ref.inline


def _route(index: int, route: schema.Route, config: Config, upstream: Upstream, metric: int, workshop: Workshop) -> RouteEntry:
    parts = RouteParts()
    for name, policy in _uses(route, config):
        use = Use(name, route.name, route.match.parameters, workshop)
        COMPILERS[policy.kind](policy.settings, use, parts)
    parts.steps.sort(key=_phase)                # stable: within a phase the order of the file
    times = route.timeouts
    return RouteEntry(
        route.name, index, upstream=upstream, metric=metric, steps=tuple(parts.steps),
        body_limit=_body_limit(route, parts), head=times.head or 0, idle=times.idle or 0,
        total=times.total or parts.total or 0,
        request_edits=_edits(parts.request_remove, parts.request_add),
        response_edits=_edits(parts.response_remove, parts.response_add),
        rewrite_prefix=parts.rewrite_prefix, rewrite_path=parts.rewrite_path, rewrite_host=parts.rewrite_host,
        audits=tuple(parts.audits), response_hooks=tuple(parts.response_hooks), end_hooks=tuple(parts.end_hooks),
        strip_authorization=parts.strip_authorization, cors=parts.cors,
    )


def _phase(step: Step) -> int:
    return step.phase


def _body_limit(route: schema.Route, parts: RouteParts) -> int:
    """Return the route's own limit, else its policy's, else -1: that of the listener it came by."""
    if route.limits.body is not None:
        return route.limits.body
    return -1 if parts.body_limit is None else parts.body_limit


def _edits(remove: list[bytes], add: list[bytes]) -> Edits | None:
    return Edits(remove, b"".join(add)) if remove or add else None
