"""What cannot be meant by the settings of HTTP/2 and gRPC, or cannot work: where listeners, upstreams, routes and checks meet.

Strategy: as in `check`, which calls this: errors refuse the configuration, warnings are for a person. A rule that a mapping can
break by itself lives in the schema.
"""

from __future__ import annotations

from collections.abc import Iterator

from gateway.config.http2 import ListenerHttp2, UpstreamHttp2
from gateway.config.schema import Config, Listener, Route, Upstream
from gateway.config.source import Document, Key

Place = tuple[Key, ...]


def check_http2(config: Config) -> None:
    """Report on every listener, upstream and route."""
    for name, listener in config.listeners.items():
        _listener(listener, ("listeners", name, "http2"), config.document)
    for name, upstream in config.upstreams.items():
        _upstream(upstream, ("upstreams", name), config.document)
    for number, route in enumerate(config.routes):
        _route(config, route, ("routes", number), config.document)
        _heard(config, route, ("routes", number), config.document)
        _grpc_web(config, number, route, config.document)


def _listener(listener: Listener, place: Place, document: Document) -> None:
    http2 = listener.http2
    if http2 is None or not document.has(place):
        return
    if listener.tls is not None and "h2" not in listener.alpn:
        document.warn(
            place, "HTTP/2 on a listener whose `alpn` does not offer it", "add h2 to `tls: {alpn: ...}`, or write `http2: false`"
        )
    elif listener.tls is not None and http2.clear:
        document.warn(
            (*place, "clear"), "this listener has TLS: its clients choose HTTP/2 by ALPN, and none comes in clear text", "remove it"
        )
    elif listener.tls is None and not http2.clear:
        document.warn(
            place,
            "no client can speak HTTP/2 here: without TLS it must know beforehand that this listener does",
            "add `clear: true` for clients that begin with HTTP/2 (prior knowledge), or give the listener `tls`",
        )
    _windows(http2, place, document)


def _windows(http2: ListenerHttp2 | UpstreamHttp2, place: Place, document: Document) -> None:
    if http2.window > http2.whole_window:
        document.warn(
            (*place, "window") if document.has((*place, "window")) else (*place, "connection_window"),
            f"one stream may have {http2.window} bytes under way, all of the connection together {http2.whole_window}",
            "raise `connection_window`, or lower `window`",
        )


def _upstream(upstream: Upstream, place: Place, document: Document) -> None:
    if upstream.protocol == "http1":
        return
    if upstream.http2 is not None:
        _windows(upstream.http2, (*place, "http2"), document)
    check = upstream.health.check
    if check is not None and check.http is not None and upstream.protocol == "grpc":
        document.warn(
            (*place, "health", "check", "http"),
            "this check is a GET, which servers of gRPC seldom answer",
            "use `grpc: {}`, which asks the gRPC health service, or `tcp: {}`",
        )


def _destinations(route: Route, place: Place) -> Iterator[tuple[str, Place]]:
    """Yield the upstreams of a route with the places that name them."""
    if route.upstream is not None:
        yield route.upstream, (*place, "upstream")
    for index, split in enumerate(route.split or ()):
        yield split.upstream, (*place, "split", index, "upstream")
    for index, canary in enumerate(route.canary):
        yield canary.upstream, (*place, "canary", index, "upstream")


def _route(config: Config, route: Route, place: Place, document: Document) -> None:
    for name, at in _destinations(route, place):
        upstream = config.upstreams.get(name)
        if upstream is None:
            continue
        shown = document.show(at, name)
        line = document.spot(("upstreams", name)).line
        if route.websocket is not None and upstream.protocol == "grpc":
            document.report(
                at,
                f"WebSockets to an upstream of gRPC: {shown} has `protocol: grpc` (line {line})",
                "write `protocol: http2` there (or http1), or give the WebSockets an upstream of their own",
            )
        if route.match.grpc is not None and upstream.protocol == "http1":
            document.report(
                at,
                f"gRPC needs HTTP/2 up to its server, and {shown} is spoken to in HTTP/1.1 (line {line})",
                "write `protocol: grpc` in that upstream",
            )
        elif route.match.grpc is not None and upstream.protocol == "http2":
            document.warn(
                at,
                f"calls that fail are not seen: {shown} has `protocol: http2` (line {line}), and a failed call is an HTTP status 200",
                "write `protocol: grpc` there: then grpc-status counts for health and retries",
            )
    _mirror(config, route, place, document)


def _heard(config: Config, route: Route, place: Place, document: Document) -> None:
    """Calls come over HTTP/2, but for those of browsers."""
    names = route.listeners or config.http_listeners
    if route.match.grpc is None or any(name in config.listeners and config.listeners[name].spoken_http2 is not None for name in names):
        return
    policies = [use.inline or config.policies.get(use.use or "") for use in route.policies]
    if any(policy is not None and policy.kind == "grpc_web" for policy in policies):
        return
    document.warn(
        (*place, "match", "grpc"),
        f"nobody can make these calls: they need HTTP/2, and no listener of this route speaks it ({', '.join(names)})",
        "give one `http2: {clear: true}`, for clients without TLS, or `tls`",
        key=True,
    )


def _mirror(config: Config, route: Route, place: Place, document: Document) -> None:
    mirrored = config.upstreams.get(route.mirror.upstream) if route.mirror is not None else None
    if mirrored is not None and mirrored.protocol != "http1":
        document.report(
            (*place, "mirror", "upstream"),
            f"copies are sent in HTTP/1.1, and this upstream has `protocol: {mirrored.protocol}`",
            "mirror to an upstream that speaks HTTP/1.1, or remove the mirror",
        )
    if route.mirror is not None and route.match.grpc is not None:
        document.report((*place, "mirror"), "gRPC calls cannot be mirrored: copies are sent in HTTP/1.1", "remove the mirror")


def _grpc_web(config: Config, number: int, route: Route, document: Document) -> None:
    """Report what a route with a grpc_web policy cannot do. Calls that `match: {grpc}` takes are looked at in _route()."""
    place: Place = ("routes", number)
    policies = [use.inline or config.policies.get(use.use or "") for use in route.policies]
    kinds = [None if policy is None else policy.kind for policy in policies]
    if "grpc_web" not in kinds:
        return
    at: Place = (*place, "policies", kinds.index("grpc_web"))
    if route.match.methods is not None and "POST" not in route.match.methods:
        document.report(at, "gRPC-Web, but its calls are POST requests, which this route does not take", "add POST to `methods`")
    for name, where in _destinations(route, place) if route.match.grpc is None else ():
        upstream = config.upstreams.get(name)
        if upstream is not None and upstream.protocol == "http1":
            line = document.spot(("upstreams", name)).line
            document.report(
                where,
                f"gRPC-Web becomes gRPC, which needs HTTP/2, and {document.show(where, name)} is spoken to in HTTP/1.1 (line {line})",
                "write `protocol: grpc` in that upstream",
            )
    if route.mirror is not None and route.match.grpc is None:
        document.report((*place, "mirror"), "gRPC calls cannot be mirrored: copies are sent in HTTP/1.1", "remove the mirror")
    cors = next((policy.cors for policy in policies if policy is not None and policy.cors is not None), None)
    if cors is not None and "POST" not in cors.methods:
        document.warn(at, "no browser of another origin can call: the cors policy of this route allows no POST", "add POST to its `methods`")
