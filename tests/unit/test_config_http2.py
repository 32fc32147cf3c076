"""HTTP/2 and gRPC in the configuration: what is accepted, what is refused and where, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway import snapshot
from gateway._speedups.exchange import Snapshot
from gateway._speedups.http2_settings import Http2
from gateway.config import Config, load
from gateway.snapshot.matching import build_trie
from tests.integration.pki import Authority
from tests.unit.checked import problems

UPSTREAM_DEFAULT = Http2(streams=100, window=1 << 18, connection_window=100 << 18, ping=10)
ALL = "{name: all, match: {prefix: /}, upstream: origin}"
GRPC = [(b"content-type", b"application/grpc+proto")]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("Root", number=94)


@pytest.fixture
def folder(tmp_path: Path, authority: Authority) -> Path:
    authority.issue("bank.test").write(tmp_path, "bank")
    (tmp_path / "ca.crt").write_bytes(authority.pem)
    return tmp_path


TLS = ", tls: {certificates: [{cert: bank.crt, key: bank.key}]}"


def write(folder: Path, *, listener: str = "", upstream: str = "", routes: str = ALL, more: str = "") -> Path:
    path = folder / "edge.yaml"
    if "grpc:" in routes and not listener:
        listener = ", http2: {clear: true}"
    path.write_text(
        f"version: 1\nworkers: 1\nlisteners:\n  public: {{bind: 127.0.0.1:8080{listener}}}\n"
        f"upstreams:\n  origin: {{targets: [127.0.0.1:9001]{upstream}}}\n{more}"
        "routes:\n" + "".join(f"  - {route}\n" for route in routes.splitlines())
    )
    return path


def only(path: Path, severity: str, message: str, line: int, hint: str = "") -> None:
    found = problems(path)
    assert [problem.severity for problem in found] == [severity], [problem.render() for problem in found]
    assert message in found[0].message and hint in found[0].hint, found[0].render()
    assert found[0].line == line, found[0].render()


class _Names:
    def add(self, name: str) -> int:
        return 0


def built(path: Path) -> Snapshot:
    assert problems(path) == []
    return snapshot.build(load(path), names=_Names(), seed=1, version=1)


# -- listeners


@pytest.mark.parametrize(
    ("listener", "spoken"),
    [
        ("", None),
        (", http2: false", None),
        (", http2: {clear: true}", Http2(clear=True)),
        (TLS, Http2()),
        (TLS + ", http2: true", Http2()),
        (TLS + ", http2: false", None),
        (
            TLS + ", http2: {streams: 7, window: 64KiB, connection_window: 128KiB, resets: 5, frames: 6}",
            Http2(streams=7, window=65536, connection_window=131072, resets=5, frames=6),
        ),
        (TLS.replace("]}", "], alpn: h2}"), Http2()),
        (TLS.replace("]}", "], alpn: http/1.1}"), None),
        (TLS.replace("]}", "], alpn: http/1.1}") + ", http2: false", None),
    ],
)
def test_what_a_listener_speaks(folder: Path, listener: str, spoken: Http2 | None) -> None:
    assert built(write(folder, listener=listener)).listeners["public"].http2 == spoken


@pytest.mark.parametrize(
    ("listener", "alpn"),
    [
        (TLS, ("h2", "http/1.1")),
        (TLS + ", http2: false", ("http/1.1",)),
        (TLS.replace("]}", "], alpn: [http/1.1, h2]}"), ("http/1.1", "h2")),
        ("", ()),
    ],
)
def test_what_a_listener_offers_above_tls(folder: Path, listener: str, alpn: tuple[str, ...]) -> None:
    assert load(write(folder, listener=listener)).listeners["public"].alpn == alpn


@pytest.mark.parametrize(
    ("listener", "severity", "message", "hint"),
    [
        (TLS.replace("]}", "], alpn: [h2]}") + ", http2: false", "error", "`h2` is offered on a listener with `http2: false`", "remove"),
        (TLS.replace("]}", "], alpn: http/1.1}") + ", http2: {streams: 5}", "warning", "`alpn` does not offer it", "add h2"),
        (TLS + ", http2: {clear: true}", "warning", "choose HTTP/2 by ALPN", "remove it"),
        (", http2: true", "warning", "no client can speak HTTP/2 here", "clear: true"),
        (", http2: {streams: 5}", "warning", "no client can speak HTTP/2 here", "`tls`"),
        (TLS + ", http2: {window: 2MiB}", "warning", "one stream may have 2097152 bytes under way", "connection_window"),
        (TLS + ", http2: {connection_window: 64KiB}", "warning", "all of the connection together 65536", "window"),
        (", http2: {clear: true, window: 16383}", "error", "a stream's window is 16KiB to 2147483647 bytes", "256KiB"),
        (", http2: {clear: true, window: 2GiB}", "error", "a stream's window", ""),
        (", http2: {clear: true, connection_window: 65534}", "error", "a connection's window is 65535 to", "cannot take"),
        (", http2: {clear: true, connection_window: 2147483648}", "error", "a connection's window is", ""),
        (", http2: {clear: true, streams: 0}", "error", "1", ""),
        (", http2: {clear: true, resets: 0}", "error", "1", ""),
        (", http2: {clear: true, frames: 1000001}", "error", "1000000", ""),
        (", http2: {clear: true, window_size: 1MiB}", "error", "window_size", ""),
        (", http2: maybe", "error", "", ""),
        (", http2: {clear: true, ping: 10s}", "error", "ping", ""),
    ],
)
def test_a_listener_that_cannot_be_meant(folder: Path, listener: str, severity: str, message: str, hint: str) -> None:
    only(write(folder, listener=listener), severity, message, 4, hint)


# -- upstreams


@pytest.mark.parametrize(
    ("upstream", "protocol", "spoken"),
    [
        ("", "http1", None),
        (", protocol: http1", "http1", None),
        (", protocol: http2", "http2", UPSTREAM_DEFAULT),
        (", protocol: grpc", "grpc", UPSTREAM_DEFAULT),
        (
            ", protocol: grpc, http2: {streams: 3, window: 16KiB, connection_window: 65535}",
            "grpc",
            Http2(streams=3, window=16384, connection_window=65535, ping=10),
        ),
        (", protocol: http2, http2: {streams: 3, window: 16KiB}", "http2", Http2(streams=3, window=16384, connection_window=65535, ping=10)),
        (
            ", protocol: http2, http2: {streams: 10000, window: 1GiB}",
            "http2",
            Http2(streams=10000, window=1 << 30, connection_window=2**31 - 1, ping=10),
        ),
        (", protocol: http2, http2: {ping: 1h, ping_timeout: 100ms}", "http2", Http2(connection_window=100 << 18, ping=3600, ping_timeout=0.1)),
        (", protocol: grpc, http2: {ping: 0s}", "grpc", Http2(connection_window=100 << 18)),
    ],
)
def test_what_is_spoken_with_an_upstream(folder: Path, upstream: str, protocol: str, spoken: Http2 | None) -> None:
    found = built(write(folder, upstream=upstream)).upstreams["origin"]
    assert (found.protocol_name, found.http2) == (protocol, spoken)


@pytest.mark.parametrize(("protocol", "alpn"), [("http1", "http/1.1"), ("http2", "h2"), ("grpc", "h2")])
def test_over_tls_the_upstream_is_offered_what_is_spoken(folder: Path, protocol: str, alpn: str) -> None:
    tls = built(write(folder, upstream=f", protocol: {protocol}, tls: {{ca: ca.crt}}")).upstreams["origin"].tls
    assert tls is not None and tls.alpn == (alpn,)


@pytest.mark.parametrize(
    ("upstream", "severity", "message", "hint"),
    [
        (", http2: {streams: 5}", "error", "settings of HTTP/2 for an upstream that is spoken to in HTTP/1.1", "add `protocol: http2`"),
        (", protocol: http2, http2: {window: 1KiB}", "error", "a stream's window is", ""),
        (", protocol: http2, http2: {window: 8MiB, connection_window: 1MiB}", "warning", "one stream may have 8388608 bytes under way", ""),
        (", protocol: http2, http2: {resets: 5}", "error", "resets", ""),
        (", protocol: http2, http2: {ping: 999ms}", "error", "a PING is sent after 1s to 1h of silence", "0s sends none"),
        (", protocol: grpc, http2: {ping: 2h}", "error", "a PING is sent after 1s to 1h of silence", "10s"),
        (", protocol: http2, http2: {ping: 10}", "error", "a duration without a unit", "10s"),
        (", protocol: http2, http2: {ping_timeout: 0s}", "error", "must be longer than 0", ""),
        (", protocol: http2, http2: {ping_timeout: 50ms}", "error", "waited for from 100ms to 1h", "10s"),
        (", http2: {ping: 5s}", "error", "settings of HTTP/2 for an upstream that is spoken to in HTTP/1.1", "add `protocol: http2`"),
        (", protocol: h2", "error", "", ""),
        (", protocol: grpc, health: {check: {http: {}}}", "warning", "a GET, which servers of gRPC seldom answer", "`grpc: {}`"),
    ],
)
def test_an_upstream_that_cannot_be_meant(folder: Path, upstream: str, severity: str, message: str, hint: str) -> None:
    only(write(folder, upstream=upstream), severity, message, 6, hint)


@pytest.mark.parametrize("more", ["health: {check: {grpc: {}}}", "health: {check: {tcp: {}}}", "hedge: {after: 50ms}", "retries: 2"])
def test_checks_retries_and_hedges_of_a_grpc_upstream(folder: Path, more: str) -> None:
    assert problems(write(folder, upstream=f", protocol: grpc, {more}")) == []


def test_connections_of_another_protocol_are_not_taken_over(folder: Path) -> None:
    one, two = (built(write(folder, upstream=f", protocol: {name}")).upstreams["origin"] for name in ("http2", "grpc"))
    same = built(write(folder, upstream=", protocol: grpc")).upstreams["origin"]
    other = built(write(folder, upstream=", protocol: grpc, http2: {window: 64KiB}")).upstreams["origin"]
    assert two.equivalent(same)
    assert not two.equivalent(one) and not two.equivalent(other)


# -- routes


def config_of(folder: Path, match: str, more: str = "", upstream: str = ", protocol: grpc") -> Config:
    path = write(folder, upstream=upstream, routes=f"{{name: calls, match: {{{match}}}, upstream: origin{more}}}")
    assert problems(path) == []
    return load(path)


def taken(config: Config, method: str, path: str, headers: list[tuple[bytes, bytes]]) -> bool:
    return build_trie(config.routes).find(method, "bank.test", path, headers, b"")[0] == "calls"


def test_a_service_is_matched_by_path_method_and_content_type(folder: Path) -> None:
    config = config_of(folder, "grpc: {service: bank.v1.Payments}")
    assert taken(config, "POST", "/bank.v1.Payments/Transfer", GRPC)
    assert taken(config, "POST", "/bank.v1.Payments/Cancel", [(b"content-type", b"application/grpc")])
    assert not taken(config, "GET", "/bank.v1.Payments/Transfer", GRPC)
    assert not taken(config, "POST", "/bank.v1.Payments", GRPC)
    assert not taken(config, "POST", "/bank.v1.Payments/Transfer/more", GRPC)
    assert not taken(config, "POST", "/bank.v1.payments/Transfer", GRPC)
    assert not taken(config, "POST", "/bank.v1.Payments/Transfer", [(b"content-type", b"application/json")])
    assert not taken(config, "POST", "/bank.v1.Payments/Transfer", [])


def test_a_method_is_matched_alone_and_before_its_service(folder: Path) -> None:
    routes = (
        "{name: service, match: {grpc: {service: bank.v1.Payments}}, upstream: origin}\n"
        "{name: calls, match: {grpc: {service: bank.v1.Payments, method: Transfer}}, upstream: origin}\n"
        "{name: rest, match: {prefix: /}, upstream: origin}"
    )
    path = write(folder, upstream=", protocol: grpc", routes=routes)
    assert problems(path) == []
    trie = build_trie(load(path).routes)
    found = [trie.find("POST", "a", f"/bank.v1.Payments/{name}", GRPC, b"")[0] for name in ("Transfer", "Cancel")]
    assert found == ["calls", "service"]
    assert trie.find("POST", "a", "/bank.v1.Payments/Transfer", [], b"")[0] == "rest"


def test_other_conditions_hold_as_well(folder: Path) -> None:
    config = config_of(folder, "host: bank.test, grpc: {service: bank.Payments}, headers: {x-env: blue}")
    assert taken(config, "POST", "/bank.Payments/T", [*GRPC, (b"x-env", b"blue")])
    assert not taken(config, "POST", "/bank.Payments/T", GRPC)


@pytest.mark.parametrize("where", ["in place", "by name"])
def test_a_route_for_browsers_takes_any_content_type(folder: Path, where: str) -> None:
    """Their preflights have none; who answers the call refuses what is not gRPC."""
    cors = "{cors: {origins: [https://app.test]}}"
    policies = f"policies: {{cross: {cors}}}\n" if where == "by name" else ""
    used = "cross" if where == "by name" else cors
    path = write(
        folder, upstream=", protocol: grpc", more=policies,
        routes=f"{{name: calls, match: {{grpc: {{service: bank.Payments}}}}, policies: [{used}], upstream: origin}}",
    )  # fmt: skip
    assert problems(path) == []
    assert taken(load(path), "POST", "/bank.Payments/T", [])
    assert not taken(load(path), "GET", "/bank.Payments/T", [])


@pytest.mark.parametrize(
    ("match", "message", "hint"),
    [
        ("grpc: {service: a.B}, path: /a", "both `grpc` and `path`", "keep `grpc` alone"),
        ("grpc: {service: a.B}, prefix: /a", "both `grpc` and `prefix`", "keep `grpc` alone"),
        ("grpc: {service: a.B}, methods: [POST]", "both `grpc` and `methods`", "keep `grpc` alone"),
        ("grpc: {service: a.B}, headers: {content-type: application/grpc}", "a condition on the content type", "remove it"),
        ("grpc: {service: /a.B}", "not the name of a gRPC service", "bank.v1.Payments"),
        ("grpc: {service: a..B}", "not the name of a gRPC service", "bank.v1.Payments"),
        ("grpc: {service: ''}", "not the name of a gRPC service", "bank.v1.Payments"),
        ("grpc: {service: a.B, method: B/C}", "not the name of a gRPC method", "Transfer"),
        ("grpc: {method: B}", "service", ""),
        ("grpc: a.B", "", ""),
        ("host: bank.test", "neither `path` nor `prefix` nor `grpc`", "`path: "),
    ],
)
def test_a_match_that_contradicts_itself(folder: Path, match: str, message: str, hint: str) -> None:
    only(write(folder, upstream=", protocol: grpc", routes=f"{{name: r, match: {{{match}}}, upstream: origin}}"), "error", message, 8, hint)


def test_two_routes_of_one_method_compete(folder: Path) -> None:
    routes = (
        "{name: one, match: {grpc: {service: a.B, method: C}}, upstream: origin}\n"
        "{name: two, match: {grpc: {service: a.B, method: C}}, upstream: origin}"
    )
    only(write(folder, upstream=", protocol: grpc", routes=routes), "error", "exactly the requests of route 'one'", 9)


WAYS = ["upstream: origin", "split: [{upstream: plain, weight: 1}, {upstream: origin, weight: 1}]"]


@pytest.mark.parametrize("protocol", ["http1", "http2", "grpc"])
@pytest.mark.parametrize("way", WAYS)
def test_websockets_reach_every_upstream_but_one_of_grpc(folder: Path, protocol: str, way: str) -> None:
    route = f"{{name: ws, match: {{prefix: /, headers: {{origin: 'https://a.test'}}}}, {way}, websocket: true}}"
    more = "  plain: {targets: [127.0.0.1:9002]}\n" if "split" in way else ""
    path = write(folder, upstream=f", protocol: {protocol}", routes=route, more=more)
    if protocol == "grpc":
        only(path, "error", "WebSockets to an upstream of gRPC: 'origin' has `protocol: grpc` (line 6)", 8 + bool(more), "`protocol: http2`")
    else:
        assert problems(path) == []


@pytest.mark.parametrize(
    ("protocol", "severity", "message", "hint"),
    [
        ("http1", "error", "gRPC needs HTTP/2 up to its server", "`protocol: grpc`"),
        ("http2", "warning", "calls that fail are not seen", "grpc-status counts"),
    ],
)
@pytest.mark.parametrize("way", ["upstream: origin", "upstream: good, canary: [{when: {headers: {x: y}}, upstream: origin}]"])
def test_calls_to_an_upstream_that_is_not_one_of_grpc(
    folder: Path, protocol: str, severity: str, message: str, hint: str, way: str
) -> None:
    more = "  good: {targets: [127.0.0.1:9002], protocol: grpc}\n" if "good" in way else ""
    path = write(
        folder, upstream=f", protocol: {protocol}", more=more,
        routes=f"{{name: calls, match: {{grpc: {{service: a.B}}}}, {way}}}",
    )  # fmt: skip
    only(path, severity, message, 8 + bool(more), hint)


def test_copies_are_sent_in_http1(folder: Path) -> None:
    path = write(
        folder, more="  copies: {targets: [127.0.0.1:9002], protocol: http2}\n",
        routes="{name: all, match: {prefix: /}, upstream: origin, mirror: {upstream: copies}}",
    )  # fmt: skip
    only(path, "error", "copies are sent in HTTP/1.1, and this upstream has `protocol: http2`", 9)
    path = write(
        folder, upstream=", protocol: grpc", more="  copies: {targets: [127.0.0.1:9002]}\n",
        routes="{name: calls, match: {grpc: {service: a.B}}, upstream: origin, mirror: {upstream: copies}}",
    )  # fmt: skip
    only(path, "error", "gRPC calls cannot be mirrored", 9)


def test_a_call_s_path_can_be_rewritten(folder: Path) -> None:
    config = config_of(folder, "grpc: {service: a.v1.B}", ", policies: [{rewrite: {path: '/a.v2.B/{method}'}}]")
    assert config.routes[0].match.parameters == ("method",)


# -- gRPC-Web


def web_route(match: str = "grpc: {service: a.B}", policies: str = "{grpc_web: {}}", more: str = "") -> str:
    return f"{{name: calls, match: {{{match}}}, policies: [{policies}], upstream: origin{more}}}"


@pytest.mark.parametrize(
    "route",
    [
        web_route(), web_route(policies="{grpc_web: true}"), web_route(policies="{grpc_web: {request: 4MiB}}, {cors: {origins: '*'}}"),
        web_route("prefix: /a.B"), web_route("prefix: /a.B, methods: [POST]", "{cors: {origins: '*'}}, {grpc_web: {}}"),
    ],
)  # fmt: skip
def test_grpc_web_that_is_well(folder: Path, route: str) -> None:
    built(write(folder, upstream=", protocol: grpc", routes=route))


@pytest.mark.parametrize(
    ("upstream", "route", "severity", "message", "hint"),
    [
        ("http1", web_route("prefix: /a.B"), "error", "'origin' is spoken to in HTTP/1.1 (line 6)", "`protocol: grpc`"),
        ("http1", web_route(), "error", "gRPC needs HTTP/2 up to its server", "`protocol: grpc`"),
        ("grpc", web_route("prefix: /a.B, methods: [GET]"), "error", "calls are POST requests", "add POST"),
        ("grpc", web_route(policies="{grpc_web: {}}, {grpc_web: {}}"), "error", "a second grpc_web policy", "line 8"),
        ("grpc", web_route(policies="{grpc_web: {}}, {cors: {origins: '*', methods: [GET]}}"), "warning", "allows no POST", "add POST"),
        ("grpc", web_route(policies="{grpc_web: {size: 1MiB}}"), "error", "size", ""),
        ("grpc", web_route(policies="{grpc_web: false}"), "error", "", ""),
    ],
)
def test_grpc_web_that_cannot_work(folder: Path, upstream: str, route: str, severity: str, message: str, hint: str) -> None:
    only(write(folder, upstream=f", protocol: {upstream}", routes=route), severity, message, 8, hint)


def test_grpc_web_is_not_mirrored(folder: Path) -> None:
    more = "  copies: {targets: [127.0.0.1:9002]}\n"
    for match in ("prefix: /a.B", "grpc: {service: a.B}"):
        path = write(folder, upstream=", protocol: grpc", more=more, routes=web_route(match, more=", mirror: {upstream: copies, methods: [GET]}"))
        only(path, "error", "gRPC calls cannot be mirrored", 9)


@pytest.mark.parametrize(
    ("listener", "policies", "heard"),
    [("", "", False), (", http2: true", "", False), (", http2: false" + TLS, "", False), (TLS, "", True), (", http2: {clear: true}", "", True), ("", ", policies: [{grpc_web: {}}]", True)],
)
def test_calls_that_no_listener_can_hear_are_told(folder: Path, listener: str, policies: str, heard: bool) -> None:
    """Browsers' calls alone come over HTTP/1.1."""
    path = write(folder, listener=listener or ", backlog: 100", upstream=", protocol: grpc", routes="{name: pay, match: {grpc: {service: a.B}}, upstream: origin" + policies + "}")
    found = [each for each in problems(path) if "nobody can make these calls" in each.message]
    assert len(found) == (not heard), [each.render() for each in problems(path)]
    for each in found:
        assert each.severity == "warning" and each.line == 8 and "(public)" in each.message and "http2: {clear: true}" in each.hint


def test_one_listener_of_several_that_hears_them_is_enough(folder: Path) -> None:
    path = write(folder, listener="}\n  inner: {bind: 127.0.0.1:8081, http2: {clear: true}", upstream=", protocol: grpc", routes="{name: pay, match: {grpc: {service: a.B}}, upstream: origin}")
    assert problems(path) == []
    path.write_text(path.read_text().replace("upstream: origin}", "upstream: origin, listeners: [public]}"))
    assert any("no listener of this route speaks it (public)" in each.message and each.line == 9 for each in problems(path))
