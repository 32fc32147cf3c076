"""Builds a snapshot: upstreams, routes with their compiled steps, and a trie per set of routes.

Strategy: a pure function of the configuration, but for what policies open (key files, audit files). Everything a request could
have to look up is resolved here. Nothing runs until Snapshot.start(). What cannot be made is reported at its place in the file;
check() is the same build, thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gateway._speedups.certificates import PEM_MAX, Certificate, PrivateKey, parse_certificates, parse_key
from gateway._speedups.exchange import ListenerEntry, RouteEntry, Shape, Snapshot, Step, Tunnels
from gateway._speedups.http2_settings import Http2
from gateway._speedups.pool import Upstream
from gateway._speedups.route_trie import Route, RouteTrie
from gateway._speedups.tcp_listener import TcpListener, TcpTarget
from gateway._speedups.user_context import TellUserStep
from gateway.config import Config, schema
from gateway.config.hooks import folder_first
from gateway.config.keyfile import read_file
from gateway.config.policies import Policy
from gateway.config.tcp import Tcp
from gateway.errors import ConfigError, Problem
from gateway.policies import COMPILERS, RouteParts, Use, Workshop
from gateway.snapshot.faults import Faults, Place
from gateway.snapshot.matching import RouteSpec, spec_of
from gateway.snapshot.resolve import Endpoints
from gateway.snapshot.shaping import Way, edits, service_shape, shape_of
from gateway.snapshot.tls import listener_tls, member_tls, shut_out, upstream_tls
from gateway.workload.user import HEADER, Author

if TYPE_CHECKING:
    from gateway.telemetry.shared import SharedState

UNROUTED = 0                # metric id of the empty name: requests that reached no route


class Names(Protocol):
    """The shared table of metric names. add() gives a known name its number without writing."""

    def add(self, name: str) -> int: ...


def build(
    config: Config, *, names: Names, seed: int, version: int, worker: int = -1, memory: SharedState | None = None
) -> Snapshot:
    """Compile `config`. `seed` must be the same in every worker; `version` counts up with each reload.

    `worker` is the index that audit records name; -1 for a snapshot that is only tried out. `memory` is what the gateway's
    processes share; a snapshot that is only tried out needs none.

    Raises ConfigError for what cannot be opened or made, all of it, each at its place in the file.
    """
    workshop = Workshop(config.base, seed, worker, redis=config.redis, memory=memory)
    snapshot, problems = _build(config, names, version, workshop, None if memory is None else memory.upstreams)
    if snapshot is None:
        raise ConfigError(problem for problem in problems if problem.severity == "error")
    return snapshot


def check(config: Config) -> list[Problem]:
    """Build `config` as a worker does and throw it away; return what is wrong or doubtful. Starts and creates nothing."""
    with folder_first(config.base):
        return _build(config, _Numbers(), 0, Workshop(config.base, 0, check=True, redis=config.redis))[1]


class _Numbers:
    """Metric names of a build that nobody will measure."""

    def add(self, name: str) -> int:
        return UNROUTED


def _build(config: Config, names: Names, version: int, workshop: Workshop, table: Any = None) -> tuple[Snapshot | None, list[Problem]]:
    faults = Faults(config.document)
    upstreams: dict[str, Upstream] = {}
    for name, settings in config.upstreams.items():
        with faults.at(("upstreams", name), f"upstream '{name}' cannot be used"):
            upstreams[name] = _upstream(name, settings, config, workshop, table)
    routes = [
        _route(index, route, config, upstreams, names, workshop, faults)
        for index, route in enumerate(config.routes)
    ]
    listeners = _listeners(config, routes, upstreams, names, faults)
    for place, sentence in workshop.notes:
        faults.doubt(place, sentence)
    problems = faults.problems()
    if any(problem.severity == "error" for problem in problems):
        return None, problems
    whole = [route for route in routes if route is not None]
    snapshot = Snapshot(version, config.digest, listeners, upstreams, whole)
    snapshot.journals = list(workshop.journals.values())
    snapshot.sources = workshop.sources
    snapshot.identity_names = tuple(sorted(workshop.identity_names))
    snapshot.unrouted = UNROUTED
    if config.mesh is not None and any(each.service is not None for each in config.upstreams.values()):
        snapshot.condemned = shut_out(config.mesh)
    return snapshot, problems


def _upstream(name: str, settings: schema.Upstream, config: Config, workshop: Workshop, table: Any) -> Upstream:
    if settings.tls is None:
        tls = None
    else:
        mesh = config.mesh if settings.service is not None else None
        alpn = _alpn(settings, raw=name in config.tcp_upstreams)
        tls = upstream_tls(settings.tls, alpn) if mesh is None else member_tls(settings.tls, mesh, alpn)
    times, keep, limits, retries = settings.timeouts, settings.keepalive, settings.limits, settings.retries
    balance, eject, adaptive, http2 = settings.balance, settings.health.eject, limits.adaptive, settings.spoken_http2
    upstream = Upstream(
        name, [], connect=times.connect, head=times.head, idle=times.idle, total=times.total,
        keep_connections=keep.connections, keep_idle=keep.idle, keep_age=keep.age, host=settings.host,
        requests=limits.requests, endpoint_requests=limits.endpoint_requests or 0, connections=limits.connections or 0,
        pending=limits.pending, queue=limits.queue,
        adaptive=None if adaptive is None else {
            "lowest": min(adaptive.lowest, limits.requests), "samples": adaptive.samples, "buffer": adaptive.buffer,
            "update": adaptive.update, "measure": adaptive.measure,
        },
        balance=balance.algorithm, key=balance.maglev.key if balance.maglev else "",
        load=balance.maglev.load if balance.maglev else 125, slow_start=settings.slow_start, zone=config.zone,
        attempts=retries.attempts, retry_on=retries.on, per_try=retries.per_try or 0, backoff=retries.backoff.base,
        backoff_max=retries.backoff.max, replay=retries.body, honours_key=retries.idempotency_key, budget=retries.budget,
        reserve=retries.reserve, hedge=settings.hedge.after if settings.hedge else 0,
        finish_abandoned=(settings.abandoned or ("cancel" if settings.protocol == "grpc" else "finish")) == "finish",
        eject={"failures": eject.failures, "ratio": eject.ratio or 0, "minimum": eject.minimum, "base": eject.base,
               "maximum": eject.max, "share": eject.share},
        panic=settings.health.when_all_bad == "panic", table=table, worker=max(workshop.worker, 0),
        tls=tls,
        protocol=settings.protocol, http2=None if http2 is None else Http2(
            streams=http2.streams, window=http2.window, connection_window=http2.whole_window, ping=http2.ping, ping_timeout=http2.ping_timeout
        ),
    )
    endpoints = Endpoints(upstream, settings, loud=workshop.worker <= 0)
    if endpoints.moving:
        workshop.sources.append(endpoints)
    return upstream


def _alpn(settings: schema.Upstream, *, raw: bool) -> tuple[str, ...]:
    """Return the protocols that an upstream is offered above TLS: none where its clients' bytes pass unread."""
    return () if raw else ("http/1.1",) if settings.protocol == "http1" else ("h2",)


def _tcp(
    name: str, tcp: Tcp, upstreams: Mapping[str, Upstream], names: Names
) -> TcpListener | None:
    """Return where a listener's connections go, or None when one of the upstreams is at fault."""
    if any(each not in upstreams for each in tcp.upstreams):
        return None
    # A route's name holds no colon.
    targets = {each: TcpTarget(upstreams[each], names.add(f"tcp:{name}>{each}")) for each in tcp.upstreams}
    default = tcp.upstream or tcp.default
    return TcpListener(
        names.add(f"tcp:{name}"), default=None if default is None else targets[default],
        sni={pattern: targets[each] for pattern, each in tcp.sni.items()} or None, idle=tcp.idle, hello=tcp.hello,
        connections=tcp.connections, allow=None if tcp.allow is None else [str(network) for network in tcp.allow],
        announce=tcp.proxy_protocol == "v2", postgres=tcp.starttls == "postgres",
    )  # fmt: skip


def _listeners(
    config: Config, routes: Sequence[RouteEntry | None], upstreams: Mapping[str, Upstream], names: Names, faults: Faults
) -> dict[str, ListenerEntry]:
    """Listeners that offer the same routes share a trie."""
    tries: dict[tuple[int, ...], RouteTrie] = {}
    listeners = {}
    for name, settings in config.listeners.items():
        tcp = None if settings.tcp is None else _tcp(name, settings.tcp, upstreams, names)
        if settings.tcp is not None and tcp is None:
            continue                            # reported at the upstream
        offered = () if tcp is not None else tuple(
            i for i, route in enumerate(config.routes) if route.listeners is None or name in route.listeners
        )
        if offered not in tries:
            tries[offered] = _trie(config, routes, offered, faults)
        times, limits = settings.timeouts, settings.limits
        with faults.at(("listeners", name), f"listener '{name}' cannot be used"):
            listeners[name] = ListenerEntry(
                name, tries[offered], head_limit=limits.head, target_limit=limits.target, fields=limits.fields,
                body_limit=limits.body, head=times.head, body=times.body, keepalive=times.keepalive, write=times.write,
                requests=limits.requests, connections=limits.connections,
                trusted=[str(network) for network in settings.trusted_proxies], proxy_protocol=settings.proxy_protocol,
                tls=None if settings.tls is None else listener_tls(name, settings.tls, settings.alpn),
                http2=_http2(settings) if tcp is None else None, tcp=tcp,
            )
    return listeners


def _http2(settings: schema.Listener) -> Http2 | None:
    """Return the limits of HTTP/2 on a listener, or None when no client can come to speak it."""
    http2 = settings.spoken_http2
    if http2 is None:
        return None
    return Http2(
        streams=http2.streams, window=http2.window, connection_window=http2.connection_window, resets=http2.resets,
        frames=http2.frames, clear=http2.clear and settings.tls is None,
    )  # fmt: skip


def _trie(config: Config, routes: Sequence[RouteEntry | None], offered: Sequence[int], faults: Faults) -> RouteTrie:
    """Return the trie of the offered routes; when they cannot be built, one of none, and the fault at the route's match."""
    pairs = [(routes[i] or Route(config.routes[i].name, i), spec_of(config.routes[i].match)) for i in offered]
    try:
        return RouteTrie(pairs)
    except ValueError as error:
        number, reason = _first_that_fails(pairs, error)
        faults.note(("routes", offered[number], "match"), "it cannot be matched", reason)
        return RouteTrie([])


def _first_that_fails(pairs: Sequence[tuple[Route, RouteSpec]], error: ValueError) -> tuple[int, ValueError]:
    """Return the position of the first route with which the trie cannot be built, and why: by bisection."""
    good, bad = 0, len(pairs)
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            RouteTrie(pairs[:middle])
            good = middle
        except ValueError as found:
            bad, error = middle, found
    return bad - 1, error


def _uses(index: int, config: Config) -> Iterable[tuple[str, Policy, Place]]:
    """The policies of a route: the name that is the key of what is shared, the policy, and its place in the file."""
    route = config.routes[index]
    for number, ref in enumerate(route.policies):
        if ref.use is not None:
            policy = config.policies[ref.use]
            yield ref.use, policy, ("policies", ref.use, policy.kind)
        elif ref.inline is not None:
            kind = ref.inline.kind
            yield f"{route.name}#{number}:{kind}", ref.inline, ("routes", index, "policies", number, kind)


def _tell_services(route: schema.Route, config: Config, parts: RouteParts, workshop: Workshop) -> None:
    """Services of the mesh are told, signed with our identity, for which user a request is made."""
    mesh = config.mesh
    domain = None if mesh is None else mesh.joined
    if mesh is None or domain is None:
        return
    author = workshop.shared("mesh", "author", lambda: Author(*_read_svid(mesh.svid)))
    audiences = [f"spiffe://{domain}/service/{config.upstreams[name].service}" for name in route.upstreams if name in config.upstreams]
    parts.steps.append(TellUserStep("tell-user", lambda user: author.sign(user, audiences)))
    workshop.identity_names.add(HEADER)


def _read_svid(path: Path) -> tuple[list[Certificate], PrivateKey]:
    content = read_file(path, PEM_MAX + 1)
    return parse_certificates(content), parse_key(content)


def _route(
    index: int, route: schema.Route, config: Config, upstreams: Mapping[str, Upstream], names: Names, workshop: Workshop,
    faults: Faults,
) -> RouteEntry | None:
    """Return the compiled route, or None when one of its upstreams or a policy is at fault."""
    metric = names.add(route.name)
    uses = list(_uses(index, config))
    parts = RouteParts(grpc_web=any(policy.kind == "grpc_web" for _, policy, _ in uses))
    for name, policy, place in uses:
        use = Use(name, route.name, route.match.parameters, workshop, place)
        with faults.at(place, f"the {policy.kind} policy cannot be used", foreign=policy.kind == "python"):
            COMPILERS[policy.kind](policy.settings, use, parts)
    if config.mesh is not None and all(config.upstreams[name].service for name in route.upstreams if name in config.upstreams):
        _tell_services(route, config, parts, workshop)
    parts.steps.sort(key=_phase)                # stable: within a phase the order of the file
    wanted = [*route.upstreams, *([route.mirror.upstream] if route.mirror is not None else [])]
    divided = [config.upstreams[name].traffic for name in route.upstreams if name in config.upstreams]
    wanted += [part.name for traffic in divided if traffic is not None for part in traffic.parts]
    if any(name not in upstreams for name in wanted):
        return None
    total = route.timeouts.total or parts.total or 0
    allowed = route.websocket
    tunnels = None if allowed is None else Tunnels(metric, idle=allowed.idle, most=allowed.tunnels, expire=allowed.expiry == "close")

    def entry(way: Way, total: float = total, shape: Shape | None = None) -> RouteEntry:
        times = route.timeouts
        shape = shape or service_shape(route, way, config, upstreams, names.add, entry)
        return RouteEntry(
            route.name, index, upstream=way.upstream, metric=way.metric, steps=tuple(parts.steps),
            body_limit=_body_limit(route, parts), head=times.head or 0, idle=times.idle or 0, total=total,
            request_edits=way.request, response_edits=way.response,
            rewrite_prefix=parts.rewrite_prefix, rewrite_path=parts.rewrite_path, rewrite_host=parts.rewrite_host,
            audits=tuple(parts.audits), response_hooks=tuple(parts.response_hooks), end_hooks=tuple(parts.end_hooks),
            strip_authorization=parts.strip_authorization, cors=parts.cors, shape=shape, tunnels=tunnels,
            grpc_web=parts.grpc_web,
        )

    with faults.at(("routes", index), f"route '{route.name}' cannot be used"):
        shape = shape_of(route, config, upstreams, parts, workshop, names.add, entry)
        way = Way(
            upstreams[route.upstreams[0]], metric, edits(parts.request_remove, parts.request_add),
            edits(parts.response_remove, parts.response_add),
        )
        # Until the upstream is chosen, the longest time of any of them counts.
        return entry(way, total or max(config.upstreams[name].timeouts.total for name in route.upstreams), shape)
    return None


def _phase(step: Step) -> int:
    return step.phase


def _body_limit(route: schema.Route, parts: RouteParts) -> int:
    """Return the route's own limit, else its policy's, else -1: that of the listener it came by."""
    if route.limits.body is not None:
        return route.limits.body
    return -1 if parts.body_limit is None else parts.body_limit
