"""What cannot be meant by a raw TCP listener: settings of HTTP beside it, routes that name it, upstreams that speak HTTP.

Strategy: as in `check`, which calls this: errors refuse the configuration, warnings are for a person.
"""

from __future__ import annotations

from gateway.config.schema import Config, Listener
from gateway.config.source import Document, Key

Place = tuple[Key, ...]

_OF_HTTP = ("timeouts", "trusted_proxies", "http2")
_LIMITS_OF_HTTP = ("head", "fields", "target", "body", "requests")


def check_tcp(config: Config) -> None:
    """Report on every listener with `tcp`, and on what else in the file contradicts it."""
    document = config.document
    used: dict[str, str] = {}  # upstream -> the first listener that sends connections there
    for name, listener in config.listeners.items():
        if listener.tcp is not None:
            _listener(listener, ("listeners", name), document)
            for upstream in listener.tcp.upstreams:
                used.setdefault(upstream, name)
    for upstream, listener_name in used.items():
        if upstream in config.upstreams:
            _upstream(config, upstream, listener_name)
    for number, route in enumerate(config.routes):
        for index, name in enumerate(route.listeners or ()):
            if name in config.listeners and config.listeners[name].tcp is not None:
                place: Place = ("routes", number, "listeners", index)
                document.report(
                    place if document.has(place) else place[:-1],
                    f"listener {document.show(place, name)} passes raw TCP: it knows no requests that a route could take",
                    "remove it here, or remove its `tcp`",
                )
    if not config.routes and any(listener.tcp is None for listener in config.listeners.values()):
        name = next(name for name, listener in config.listeners.items() if listener.tcp is None)
        document.report(
            ("listeners", name), "there are no routes, so this listener answers 404 to everything",
            "add `routes`, or `tcp: {upstream: NAME}` here", key=True,
        )  # fmt: skip


def _listener(listener: Listener, place: Place, document: Document) -> None:
    tcp = listener.tcp
    assert tcp is not None
    for name in _OF_HTTP:
        if document.has((*place, name)):
            document.report((*place, name), f"`{name}` is of HTTP, and this listener passes raw TCP", "remove it, or remove `tcp`")
    for name in _LIMITS_OF_HTTP:
        if document.has((*place, "limits", name)):
            document.report(
                (*place, "limits", name), f"a limit of requests (`{name}`), and this listener passes raw TCP",
                "remove it; `tcp: {connections: N}` bounds what is open",
            )  # fmt: skip
    if tcp.sni and listener.tls is not None:
        document.report(
            (*place, "tcp", "sni"), "`sni` passes TLS on undecrypted, but `tls` ends it here",
            "keep one: `tls` with `tcp: {upstream: NAME}`, or `sni` without `tls`",
        )  # fmt: skip
    if listener.tls is not None:
        for name in ("alpn", "forward_client_certificate"):
            if document.has((*place, "tls", name)):
                document.report(
                    (*place, "tls", name), f"`{name}` is of HTTP, and this listener passes raw TCP", "remove it"
                )
    if tcp.starttls != "off" and listener.tls is None and not tcp.sni:
        document.report(
            (*place, "tcp", "starttls"), "there is no TLS here to ask for: without `tls` and `sni` what clients ask passes to the upstream as it comes",
            "remove it, or add `tls` or `sni`",
        )  # fmt: skip
    if listener.tls is not None and document.has((*place, "tcp", "hello")):
        document.warn((*place, "tcp", "hello"), "with `tls`, its `handshake` is the deadline", "write `tls: {handshake: ...}`")
    if tcp.allow is not None and listener.bind.unix and listener.proxy_protocol == "off":
        document.warn((*place, "tcp", "allow"), "clients of a Unix socket have no address", "use the mode of its folder")
    if tcp.sni and not tcp.default:
        names = set(tcp.sni)
        for name in sorted(names):
            if name.startswith("*.") and name[2:].count(".") == 0:
                document.warn(
                    (*place, "tcp", "sni", name), "a star before a top-level domain", "name the domain that is yours: *.bank.test"
                )


def _upstream(config: Config, name: str, listener: str) -> None:
    document, upstream, place = config.document, config.upstreams[name], ("upstreams", name)
    tcp = config.listeners[listener].tcp
    assert tcp is not None
    where = f"listener {document.show(('listeners', listener), listener)} passes raw TCP to this upstream"
    if upstream.protocol != "http1":
        document.report((*place, "protocol"), f"{where}, which has no protocol for it", "remove `protocol`")
    if upstream.tls is not None and tcp.sni:
        document.report(
            (*place, "tls"), f"{where} the TLS of its clients, which would be encrypted a second time", "remove `tls` here"
        )
    if upstream.hedge is not None:
        document.report((*place, "hedge"), f"{where}: a connection cannot be asked twice", "remove `hedge`")
    if upstream.limits.adaptive is not None:
        document.report(
            (*place, "limits", "adaptive"), f"{where}, and an adaptive limit learns from answers to requests",
            "remove it; `limits: {requests: N}` bounds the connections",
        )  # fmt: skip
    key = upstream.balance.maglev.key if upstream.balance.maglev is not None else ""
    if key.partition(":")[0] in ("header", "cookie"):
        document.report(
            (*place, "balance", "maglev", "key"), f"{where}, and a connection has neither header nor cookie", "use `key: source`"
        )
    for number, route in enumerate(config.routes):
        if name in route.upstreams or (route.mirror is not None and route.mirror.upstream == name):
            document.report(
                ("routes", number, "name"),
                f"this route sends HTTP to upstream {document.show(place, name)}, and listener"
                f" {document.show(('listeners', listener), listener)} raw TCP",
                "give each an upstream of its own: their limits and health are different things",
            )
            break
