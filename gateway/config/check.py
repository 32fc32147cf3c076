"""What is legal for the schema but cannot be meant, or cannot work on this machine.

Strategy: small checks over the loaded model, each with its own place in the file; errors refuse the configuration
(`load` runs these too), warnings are for a person. Nothing is bound, connected to or fetched.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from gateway.config.check_http2 import check_http2
from gateway.config.check_tcp import check_tcp
from gateway.config.check_tls import check_tls, file_versions, watched_files
from gateway.config.cpus import available_cpus
from gateway.config.hooks import check_hook
from gateway.config.keyfile import MAX_JWKS, read_file
from gateway.config.methods import warn_methods
from gateway.config.names import check_names
from gateway.config.overlaps import check_overlaps
from gateway.config.policies import AUDIT_FIELDS, DESCRIPTORS, Audit, Jwt, Policy, Python
from gateway.config.redis_check import check_redis
from gateway.config.schema import Config, Route, Upstream
from gateway.config.shaping_check import check_shaping
from gateway.config.source import Document, Key
from gateway.config.unusable import unreadable
from gateway.config.web import Bind, parameters
from gateway.errors import Problem

Place = tuple[Key, ...]

# A second one of these in the same route would contradict the first or do nothing.
_SINGLE = ("jwt", "api_key", "rewrite", "cors", "grpc_web", "limits")


def findings(config: Config) -> list[Problem]:
    """Return what is wrong or doubtful in a loaded configuration, in file order. Binds and fetches nothing."""
    document = config.document
    document.problems = []
    check_names(document)
    _binds(config, document)
    _admin(config, document)
    _machine(config, document)
    _mesh(config, document)
    config._watched = file_versions(watched_files(config))  # before they are read: what changes later is seen
    config._certificates = tuple(check_tls(config, document))
    for place, policy in _all_policies(config):
        _files(policy, place, document)
    for name, upstream in config.upstreams.items():
        if upstream.is_part:
            continue  # as what it is a part of
        _upstream(upstream, ("upstreams", name), document)
    check_redis(config.redis, _all_policies(config), document)
    for number, route in enumerate(config.routes):
        _route(config, number, route, document)
        warn_methods(document, ("routes", number, "match", "methods"), route.match.methods)
    check_http2(config)
    check_overlaps(config)
    check_tcp(config)
    _unused(config, document)
    found, document.problems = document.problems, []
    return sorted(found, key=lambda problem: (problem.line, problem.column))


def _all_policies(config: Config) -> list[tuple[Place, Policy]]:
    """Return every policy that the file writes out, with its place."""
    places: list[tuple[Place, Policy]] = [(("policies", name), policy) for name, policy in config.policies.items()]
    for number, route in enumerate(config.routes):
        for index, use in enumerate(route.policies):
            if use.inline is not None:
                places.append((("routes", number, "policies", index), use.inline))
    return places


def route_policies(config: Config, number: int) -> list[tuple[Place, Policy]]:
    """Return a route's policies with the places where the route names them; unknown names are left out."""
    found: list[tuple[Place, Policy]] = []
    for index, use in enumerate(config.routes[number].policies):
        policy = use.inline if use.inline is not None else config.policies.get(use.use or "")
        if policy is not None:
            found.append((("routes", number, "policies", index), policy))
    return found


# -- listeners, admin, machine


def _binds(config: Config, document: Document) -> None:
    binds: list[tuple[Place, Bind]] = (
        [(("admin", "bind"), config.admin.bind)] if document.has(("admin",)) else [(("admin",), config.admin.bind)]
    )
    binds += [(("listeners", name, "bind"), listener.bind) for name, listener in config.listeners.items()]
    for index, (place, bind) in enumerate(binds):
        for other_place, other in binds[:index]:
            if _conflict(bind, other):
                owner = ".".join(map(str, other_place[:-1] if other_place[-1] == "bind" else other_place))
                line = document.spot(other_place).line
                where = f" (line {line})" if document.has(other_place) else " (its default)"
                document.report(
                    place, f"{document.show(place, bind)} is taken by {owner}{where}", "give each its own port"
                )
                break
        if bind.unix and not Path(bind.path).parent.is_dir():
            document.report(
                place, "the folder of the Unix socket does not exist", f"create it: mkdir -p {Path(bind.path).parent}"
            )


def _conflict(one: Bind, other: Bind) -> bool:
    if one.unix or other.unix:
        return one.unix and other.unix and one.path == other.path
    if one.port == 0 or one.port != other.port:
        return False
    same_family = (":" in one.host) == (":" in other.host)
    return one.host == other.host or ((one.wildcard or other.wildcard) and same_family)


def _admin(config: Config, document: Document) -> None:
    admin = config.admin
    if admin.token is None and not admin.bind.loopback:
        document.report(
            ("admin", "bind"),
            "the admin endpoint is open to the network without a token",
            "add `token: ${env:NAME}` under admin, or bind it to 127.0.0.1 or unix:/path",
        )
    for name, listener in config.listeners.items():
        at = ("listeners", name, "trusted_proxies")
        for index, network in enumerate(listener.trusted_proxies):
            if network.prefixlen == 0:
                document.warn(
                    (*at, index),
                    "every client is trusted to say who it is",
                    "list the proxies in front of this gateway",
                )
        if listener.proxy_protocol == "optional":
            document.warn(
                ("listeners", name, "proxy_protocol"),
                "any client can claim any address with an optional PROXY header",
                "use `required` behind a balancer that sends it, else `off`",
            )


def _machine(config: Config, document: Document) -> None:
    cpus = available_cpus()
    if isinstance(config.workers, int) and config.workers > cpus:
        document.warn(
            ("workers",),
            f"{config.workers} workers on {cpus} available CPU{'s' if cpus > 1 else ''}",
            "use `auto`, which follows affinity and the cgroup's quota",
        )
    if config.log.file is not None:
        _folder(config.log.file, ("log", "file"), document)


def _mesh(config: Config, document: Document) -> None:
    if config.mesh is None:
        return
    if config.mesh.joined is None:
        document.warn(
            ("mesh", "state"), "this gateway has not joined the mesh yet", "`crossway run` joins, with a `token` of `crossway mesh token`"
        )
        for key in ("token", "kubernetes", "control_ca"):
            path = getattr(config.mesh, key)
            try:
                if path is not None:
                    read_file(path, 1)
            except OSError as error:
                document.warn(("mesh", key), f"cannot read what it joins with: {error.strerror}", unreadable(error, path))
    if not any(upstream.service for upstream in config.upstreams.values()):
        document.warn(("mesh",), "a member of a mesh that calls none of its services", "write `{service: NAME}` as an upstream")


def _folder(path: Path, place: Place, document: Document) -> None:
    if path.is_dir():
        document.report(place, "this is a folder, not a file", "name a file in it")
    elif not path.parent.is_dir():
        document.report(place, "the folder of this file does not exist", f"create it: mkdir -p {path.parent}")
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        document.report(
            place, "this file cannot be written by this user", "change its owner or mode, or choose another place"
        )


# -- upstreams


def _upstream(upstream: Upstream, place: Place, document: Document) -> None:
    discovery, check = upstream.discovery, upstream.health.check
    named = discovery.srv is not None or any(
        not endpoint.address.literal for endpoint in (*upstream.targets, *discovery.endpoints)
    )
    if discovery.resolver is not None and not named and discovery.file is None:
        document.warn(
            (*place, "discovery", "resolver"),
            "a name server for an upstream of which every target is an address",
            "remove it, or name hosts in `targets`",
        )
    if document.has((*place, "resolve")) and not named and discovery.file is None:
        document.warn((*place, "resolve"), "there is no name to resolve: every target is an address", "remove it")
    if check is not None and check.timeout > check.interval:
        document.warn(
            (*place, "health", "check", "timeout"),
            f"longer than the interval of {check.interval:g}s: a hanging endpoint is asked less often than that",
            "lower it, or raise `interval`",
        )


# -- what policies refer to


def _files(policy: Policy, place: Place, document: Document) -> None:
    settings = policy.settings
    if policy.audit is not None:
        _audit(policy.audit, (*place, "audit"), document)
    elif isinstance(settings, Jwt):
        _keys(settings, (*place, "jwt"), document)
    elif isinstance(settings, Python):
        check_hook(settings, (*place, "python"), document)


def _audit(audit: Audit, place: Place, document: Document) -> None:
    if audit.file not in DESCRIPTORS:
        _folder(audit.file, (*place, "file"), document)
    for index, name in enumerate(audit.fields or ()):
        if name not in AUDIT_FIELDS:
            close = get_close_matches(name, AUDIT_FIELDS, 1, 0.6)
            hint = f"did you mean '{close[0]}'?" if close else f"one of {', '.join(AUDIT_FIELDS)}"
            document.report((*place, "fields", index), "not a field of audit records", hint)


def _keys(jwt: Jwt, place: Place, document: Document) -> None:
    path = jwt.keys_file
    at = (*place, "keys")
    if jwt.leeway == 0:
        document.warn(
            (*place, "leeway"),
            "no leeway: a token of an issuer whose clock is ahead by a moment is refused",
            "30s is usual",
        )
    if path is None:
        return
    try:
        content = read_file(path, MAX_JWKS)
    except OSError as error:
        document.report(at, f"cannot read the keys: {error.strerror}", f"put the issuer's JWKS there: {path}")
        return
    document.files[f"file:{path}"] = content  # whether its keys can serve is seen when the policy is made


# -- routes and their policies


def _route(config: Config, number: int, route: Route, document: Document) -> None:
    place: Place = ("routes", number)
    used = route_policies(config, number)
    first: dict[str, Place] = {}
    for at, policy in used:
        if policy.kind in _SINGLE and policy.kind in first:
            document.report(
                at,
                f"a second {policy.kind} policy in this route",
                f"the first is at line {document.spot(first[policy.kind]).line}; keep one",
            )
        first.setdefault(policy.kind, at)
    identified = "jwt" in first or "api_key" in first
    for at, policy in used:
        if policy.kind == "scopes" and not identified:
            document.report(
                at, "scopes without a policy that says who calls", "add a jwt or api_key policy to this route"
            )
        if policy.kind == "claims" and "jwt" not in first:
            document.report(at, "claims without a token to carry them", "add a jwt policy to this route")
        counting = policy.rate_limit or policy.quota
        if counting is not None and counting.key == "client" and not identified:
            document.report(
                at,
                f"a {'limit' if policy.rate_limit else 'quota'} by client without a policy that says who calls",
                "add a jwt or api_key policy to this route, or use `key: ip`",
            )
        if policy.rewrite is not None:
            _rewrite(route, policy, at, document)
    totals = [config.upstreams[name].timeouts.total for name in route.upstreams if name in config.upstreams]
    total = route.timeouts.total or max(totals, default=None)
    for phase in ("head", "idle"):
        limit = getattr(route.timeouts, phase)
        if limit is not None and total is not None and limit > total:
            document.warn(
                (*place, "timeouts", phase),
                f"longer than the total of {total:g}s, which ends the exchange first",
                "raise `total`, or lower this",
            )
    _reachable(config, route, place, document)
    if route.websocket is not None:
        _websocket(route, place, document, by_origin="cors" in first)
        for service in [found.service for name in route.upstreams if (found := config.upstreams.get(name)) and found.carries_websockets is False]:
            document.warn(
                (*place, "websocket"), f"the mesh does not let the service {service} carry WebSockets: its sidecar passes handshakes on as plain requests",
                f"write `{service}: {{websocket: true}}` under `services` in the mesh's file, or remove it",
            )  # fmt: skip
    check_shaping(config, number, identified="jwt" in first or "api_key" in first, faults=[at for at, policy in used if policy.fault])


def _rewrite(route: Route, policy: Policy, at: Place, document: Document) -> None:
    rewrite = policy.rewrite
    assert rewrite is not None
    if rewrite.prefix is not None and route.match.prefix is None:
        document.report(
            at,
            "a rewrite of the prefix, but this route matches by `path`",
            "use `rewrite: {path: ...}`, or match by `prefix`",
        )
    missing = [name for name in parameters(rewrite.path or "") if name not in route.match.parameters]
    if missing:
        has = ", ".join(route.match.parameters) or "none"
        shown = "" if document.spot((*at, "rewrite", "path")).resolved else f" {{{missing[0]}}}"
        document.report(
            at, f"the rewritten path uses a parameter{shown} that the route's match does not have", f"it has: {has}"
        )


def _websocket(route: Route, place: Place, document: Document, *, by_origin: bool) -> None:
    at = (*place, "websocket")
    if route.match.methods is not None and "GET" not in route.match.methods:
        document.report(
            at, "WebSockets, but a handshake is a GET, which this route does not take", "add GET to `methods`, or remove it"
        )
    if not by_origin and "origin" not in route.match.headers:
        document.warn(
            at,
            "any web page may open this WebSocket in its visitor's name: nothing looks at Origin",
            "add a cors policy with your `origins` (it refuses handshakes of others), or match `headers: {origin: ...}`",
        )
    if route.mirror is not None:
        document.warn(at, "WebSocket handshakes are not mirrored", "nothing needs to be done if that is meant")


def _reachable(config: Config, route: Route, place: Place, document: Document) -> None:
    names = route.listeners or tuple(config.listeners)
    targets = [config.listeners[name].limits.target for name in names if name in config.listeners]
    key = "path" if route.match.path is not None else "prefix"
    if targets and len(route.match.path or route.match.prefix or "") > max(targets):
        document.warn(
            (*place, "match", key),
            "unreachable: the path is longer than the listener's limit of the target",
            "raise `limits: {target: ...}`",
        )


def _unused(config: Config, document: Document) -> None:
    policies = {use.use for route in config.routes for use in route.policies if use.use is not None}
    for name, policy in config.policies.items():
        if name not in policies:
            document.warn(
                ("policies", name),
                f"policy '{name}' is used by no route",
                f"use it, or remove it (a {policy.kind} policy)",
                key=True,
            )
    upstreams = {name for route in config.routes for name in route.upstreams}
    upstreams |= config.tcp_upstreams
    upstreams |= {route.mirror.upstream for route in config.routes if route.mirror is not None}
    for name, upstream in config.upstreams.items():
        if name not in upstreams and not upstream.is_part:
            document.warn(
                ("upstreams", name),
                f"upstream '{name}' is used by no route" + (" and no listener" if config.tcp_upstreams else ""),
                "use it, or remove it",
                key=True,
            )
    if not any(route.listeners is None for route in config.routes):
        offered = {name for route in config.routes for name in route.listeners or ()}
        for name in config.http_listeners if config.routes else ():
            if name not in offered:
                document.warn(
                    ("listeners", name),
                    f"listener '{name}' offers no route: it answers 404 to everything",
                    "name it in a route's `listeners`, or remove it",
                    key=True,
                )
