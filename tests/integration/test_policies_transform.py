"""headers, rewrite, cors, ip and what the gateway says of each client, through a real gateway and an origin that reports it."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator

import httpx
import pytest

from tests.integration.echo import ISSUER, Echo, Told, bearer, client, config, exchange, fields_of, jwks, problem, token
from tests.integration.processes import Gateway, eventually

APP = "https://app.bank.test"
LISTENERS = """
listeners:
  public: {bind: 127.0.0.1:0}
  behind: {bind: 127.0.0.1:0, trusted_proxies: [127.0.0.0/8, 10.0.0.0/8, "fd00::/8"]}
"""
RULES = f"""
policies:
  bank: {{jwt: {{issuer: {ISSUER}, audience: payments, keys: jwks.json, algorithms: [RS256]}}}}
  browser: {{cors: {{origins: ["{APP}", "http://localhost:3000"], methods: [GET, POST, DELETE], headers: [authorization, x-step],
                     expose: [x-total], credentials: true, max_age: 5m}}}}
  anybody: {{cors: {{origins: "*"}}}}
routes:
  - name: edited
    match: {{prefix: /edited}}
    policies:
      - headers:
          request: {{set: {{x-zone: inner, user-agent: bank, x-forwarded-proto: https}}, add: {{x-tag: two}}, remove: [x-secret, cookie]}}
          response: {{set: {{server: bank, x-frame-options: DENY}}, add: {{x-tag: three}}, remove: [x-powered-by]}}
    upstream: origin
  - name: replaced
    match: {{prefix: /replaced}}
    policies: [bank, {{headers: {{request: {{set: {{x-auth-subject: nobody, x-forwarded-for: unknown}}, remove: [via, forwarded]}}}}}}]
    upstream: origin
  - {{name: prefix, match: {{prefix: /old/api}}, policies: [{{rewrite: {{prefix: /new}}}}], upstream: origin}}
  - {{name: stripped, match: {{prefix: /strip}}, policies: [{{rewrite: {{prefix: /}}}}], upstream: origin}}
  - {{name: template, match: {{path: "/u/{{user}}/p/{{payment}}"}}, policies: [{{rewrite: {{path: "/p/{{payment}}/of/{{user}}"}}}}], upstream: origin}}
  - {{name: host, match: {{prefix: /host}}, policies: [{{rewrite: {{host: ledger.bank.test}}}}], upstream: origin}}
  - {{name: grown, match: {{host: grown.test, prefix: /}}, policies: [{{rewrite: {{prefix: /below}}}}], upstream: origin}}
  - {{name: app, match: {{prefix: /app}}, policies: [browser, bank, {{scopes: [pay]}}], upstream: origin}}
  - {{name: app-post, match: {{path: /post, methods: [POST]}}, policies: [browser], upstream: origin}}
  - {{name: api-post, match: {{host: api.test, path: /pay, methods: [POST]}}, policies: [browser], upstream: origin}}
  - {{name: api-rest, match: {{host: api.test, prefix: /}}, upstream: origin}}
  - {{name: app-all, match: {{prefix: /all}}, policies: [anybody], upstream: origin}}
  - {{name: office, match: {{prefix: /office}}, policies: [{{ip: {{allow: [198.51.100.0/24, "2001:db8::/32"], deny: [198.51.100.7]}}}}], upstream: origin}}
  - {{name: local, match: {{prefix: /local}}, policies: [{{ip: {{allow: [127.0.0.1]}}}}], upstream: origin}}
  - {{name: not-local, match: {{prefix: /not-local}}, policies: [{{ip: {{deny: [127.0.0.0/8]}}}}], upstream: origin}}
  - {{name: plain, match: {{prefix: /plain}}, upstream: origin}}
  - {{name: near, match: {{prefix: /old/apis}}, upstream: origin}}
  - {{name: other, match: {{prefix: /x}}, upstream: origin}}
"""


@pytest.fixture(scope="module")
def gateway(echo: Echo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("transform")
    (folder / "jwks.json").write_text(jwks(("RS256", "rs")))
    (folder / "edge.yaml").write_text(config(RULES, echo, listeners=LISTENERS))
    with Gateway(folder / "edge.yaml") as running:
        yield running
        assert "Traceback" not in running.errors.read_text()


@pytest.fixture(scope="module")
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with client(gateway) as made:
        yield made


@pytest.fixture(scope="module")
def behind(gateway: Gateway) -> Iterator[httpx.Client]:
    """A client that is a trusted proxy."""
    with client(gateway, "behind") as made:
        yield made


# -- headers


def test_request_headers_are_set_added_and_removed(http: httpx.Client) -> None:
    sent = [("X-Zone", "a"), ("x-zone", "b"), ("X-Tag", "one"), ("X-Secret", "s"), ("Cookie", "c=1"), ("User-Agent", "curl"), ("X-Keep", "k")]
    told = Told(http.get("/edited", headers=sent))
    assert told.all("x-zone") == ["inner"]
    assert told.all("x-tag") == ["one", "two"]
    assert told.one("user-agent") == "bank"
    assert told.one("x-keep") == "k"
    assert not {"x-secret", "cookie"} & told.names()


def test_a_header_that_the_gateway_writes_can_be_replaced(http: httpx.Client) -> None:
    assert Told(http.get("/edited")).all("x-forwarded-proto") == ["https"]
    told = Told(http.get("/replaced", headers=bearer(token())))
    assert told.all("x-auth-subject") == ["nobody"]
    assert told.all("x-forwarded-for") == ["unknown"]
    assert not {"via", "forwarded"} & told.names()
    assert len(told.all("x-request-id")) == len(told.all("traceparent")) == 1


def test_response_headers_are_set_added_and_removed(http: httpx.Client) -> None:
    answer = http.get("/edited?set=Server:origin&set=X-Powered-By:php&set=X-Tag:one&set=X-Keep:k")
    assert answer.headers.get_list("server") == ["bank"]
    assert answer.headers.get_list("x-tag") == ["one", "three"]
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["x-keep"] == "k"
    assert "x-powered-by" not in answer.headers


# -- rewrite


@pytest.mark.parametrize(("asked", "told"), [
    ("/old/api", "/new"),
    ("/old/api/", "/new/"),
    ("/old/api/a/b?q=1&q=%2F", "/new/a/b?q=1&q=%2F"),
    ("/old/api/%C3%A4%20b", "/new/%C3%A4%20b"),
    ("/strip", "/"),
    ("/strip/", "/"),
    ("/strip/a?b", "/a?b"),
    ("/u/alice/p/7?x=1", "/p/7/of/alice?x=1"),
    ("/u/a%20b/p/%C3%A4", "/p/%C3%A4/of/a%20b"),
    ("/u/../u/bob/p/7", "/p/7/of/bob"),
    ("/old/apis", "/old/apis"),
])
def test_paths_are_rewritten(gateway: Gateway, asked: str, told: str) -> None:
    answer = exchange(gateway, f"GET {asked} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["target"] == told


def test_a_prefix_can_grow(http: httpx.Client) -> None:
    assert Told(http.get("/", headers={"Host": "grown.test"})).target == "/below/"
    assert Told(http.get("/x/y", headers={"Host": "grown.test"})).target == "/below/x/y"


def test_the_host_is_rewritten_and_the_asked_one_still_told(http: httpx.Client) -> None:
    told = Told(http.get("/host", headers={"Host": "pay.bank.test"}))
    assert told.one("host") == "ledger.bank.test"
    assert told.one("x-forwarded-host") == "pay.bank.test"


# -- cors


PREFLIGHT = {"Origin": APP, "Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "authorization"}


@pytest.mark.parametrize("path", ["/app", "/app/x"])
def test_a_preflight_is_answered_without_token_and_upstream(http: httpx.Client, echo: Echo, path: str) -> None:
    before = len(echo.seen)
    answer = http.options(path, headers=PREFLIGHT)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == APP
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert answer.headers["access-control-allow-methods"] == "GET, POST, DELETE"
    assert answer.headers["access-control-allow-headers"] == "authorization, x-step"
    assert answer.headers["access-control-max-age"] == "300"
    assert answer.headers["vary"] == "origin"
    assert echo.seen[before:] == []


def test_a_preflight_for_a_route_without_options_is_answered(http: httpx.Client) -> None:
    answer = http.options("/post", headers={**PREFLIGHT, "Access-Control-Request-Method": "POST"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (204, APP)
    answer = http.options("/post", headers={**PREFLIGHT, "Access-Control-Request-Method": "POST", "Origin": "https://evil.test"})
    problem(answer, 403, "origin-not-allowed")


def test_a_preflight_asks_for_the_route_of_the_method_to_come(http: httpx.Client) -> None:
    """Although another route would take the OPTIONS itself."""
    answer = http.options("/pay", headers={**PREFLIGHT, "Host": "api.test", "Access-Control-Request-Method": "POST"})
    assert (answer.status_code, answer.headers.get("access-control-allow-origin")) == (204, APP)
    for more in ({"Access-Control-Request-Method": "PUT"}, {"Origin": ""}):
        asked = {**PREFLIGHT, "Host": "api.test", "Access-Control-Request-Method": "POST", **more}
        told = Told(http.options("/pay", headers={name: value for name, value in asked.items() if value}))
        assert (told.method, told.target) == ("OPTIONS", "/pay")


def test_a_request_for_a_preflight_without_an_origin_is_none(http: httpx.Client) -> None:
    answer = http.options("/post", headers={"Access-Control-Request-Method": "POST"})
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"


def test_strangers_get_no_preflight_and_no_word_of_permission(http: httpx.Client) -> None:
    for origin in ("https://evil.test", "null", APP + ".evil.test", "http://app.bank.test", APP + ":8443"):
        answer = http.options("/app", headers={**PREFLIGHT, "Origin": origin})
        problem(answer, 403, "origin-not-allowed")
        assert answer.headers["vary"] == "origin"
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_answers_are_marked_for_allowed_origins(http: httpx.Client) -> None:
    good = bearer(token(scope="pay"))
    for origin in (APP, "http://localhost:3000"):
        answer = http.get("/app", headers={**good, "Origin": origin})
        assert answer.status_code == 200
        assert answer.headers.get_list("access-control-allow-origin") == [origin]
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert answer.headers["access-control-expose-headers"] == "x-total"
        assert answer.headers["vary"] == "origin"
    for extra in ({}, {"Origin": "https://evil.test"}):
        answer = http.get("/app", headers={**good, **extra})
        assert answer.status_code == 200
        assert answer.headers["vary"] == "origin"               # a cache must tell them apart
        assert "access-control-allow-origin" not in answer.headers


def test_refusals_are_readable_by_the_browser_too(http: httpx.Client) -> None:
    for headers, status in (({}, 401), (bearer("x"), 401), (bearer(token(scope="look")), 403)):
        answer = http.get("/app", headers={**headers, "Origin": APP})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == APP


def test_the_policy_alone_says_who_may_read(http: httpx.Client) -> None:
    own = "set=Access-Control-Allow-Origin:*&set=Access-Control-Allow-Credentials:true"
    good = bearer(token(scope="pay"))
    answer = http.get(f"/app?{own}", headers={**good, "Origin": APP})
    assert answer.headers.get_list("access-control-allow-origin") == [APP]
    answer = http.get(f"/app?{own}", headers={**good, "Origin": "https://evil.test"})
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert http.get(f"/plain?{own}", headers={"Origin": "https://evil.test"}).headers["access-control-allow-origin"] == "*"


def test_every_origin_may_be_allowed(http: httpx.Client) -> None:
    answer = http.get("/all", headers={"Origin": "https://whoever.test"})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers
    assert "vary" not in answer.headers
    assert http.options("/all", headers={**PREFLIGHT, "Origin": "https://whoever.test"}).status_code == 204


def test_options_that_is_no_preflight_goes_on(http: httpx.Client) -> None:
    assert Told(http.options("/all", headers={"Origin": APP})).method == "OPTIONS"


# -- who the client is


def test_strangers_cannot_say_where_they_come_from(http: httpx.Client) -> None:
    lies = {
        "X-Forwarded-For": "198.51.100.1", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "admin.bank.test",
        "Forwarded": "for=198.51.100.1", "X-Real-IP": "198.51.100.1", "X_Forwarded_For": "198.51.100.1",
        "X-Forwarded-Client-Cert": "By=root", "X-Client-Cert": "root", "X-Original-URL": "/admin",
        "tracestate": "evil=1", "baggage": "user=root",
    }
    told = Told(http.get("/x", headers={**lies, "Host": "pay.bank.test"}))
    assert told.all("x-forwarded-for") == ["127.0.0.1"]
    assert told.all("x-forwarded-proto") == ["http"]
    assert told.all("x-forwarded-host") == ["pay.bank.test"]
    assert told.all("forwarded") == ['for=127.0.0.1;host="pay.bank.test";proto=http']
    gone = {"x-real-ip", "x_forwarded_for", "x-forwarded-client-cert", "x-client-cert", "x-original-url", "tracestate", "baggage"}
    assert not gone & told.names()
    problem(http.get("/office", headers=lies), 403, "address-not-allowed")
    assert http.get("/local", headers=lies).status_code == 200
    problem(http.get("/not-local", headers=lies), 403, "address-not-allowed")


def test_a_trusted_proxy_is_believed_and_extended(behind: httpx.Client) -> None:
    told = Told(behind.get("/x", headers={
        "X-Forwarded-For": "203.0.113.9, 198.51.100.1", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "pay.bank.test",
        "Forwarded": "for=198.51.100.1", "baggage": "user=alice",
    }))
    assert told.one("x-forwarded-for") == "203.0.113.9, 198.51.100.1, 127.0.0.1"
    assert told.one("x-forwarded-proto") == "https"
    assert told.one("x-forwarded-host") == "pay.bank.test"
    assert told.one("forwarded").startswith("for=198.51.100.1, for=127.0.0.1;")
    assert told.one("baggage") == "user=alice"


@pytest.mark.parametrize(("chain", "status"), [
    ("198.51.100.1", 200),
    ("198.51.100.7", 403),                                  # denied, though within an allowed network
    ("198.51.100.200, 10.0.0.1", 200),                      # through two of our own
    ("198.51.100.1, 203.0.113.9", 403),                     # what stands left of a stranger is hearsay
    ("203.0.113.9, 198.51.100.1", 200),
    ("2001:db8::1", 200),
    ("2001:db9::1", 403),
    ("2001:db8::1, fd00::1", 200),
    ("::ffff:198.51.100.1", 200),
    ("198.51.100.1, not-an-address", 403),
    ("198.51.100.1,", 403),
    ("10.0.0.1", 403),
    ("", 403),
])
def test_addresses_are_judged_from_the_right(behind: httpx.Client, chain: str, status: int) -> None:
    assert behind.get("/office", headers={"X-Forwarded-For": chain}).status_code == status


@pytest.mark.parametrize(("said", "client"), [
    ("0.0.0.0", "0.0.0.0"), ("9.10.99.100", "9.10.99.100"), ("101.200.255.1", "101.200.255.1"), ("255.255.255.255", "255.255.255.255"),
    ("::ffff:198.51.100.7", "198.51.100.7"), ("2001:DB9:0::1", "2001:db9::1"),
])
def test_the_log_names_the_address_that_was_judged(gateway: Gateway, behind: httpx.Client, said: str, client: str) -> None:
    names = set()

    def lines() -> list[tuple[int, str]]:
        names.add(behind.get("/office", headers={"X-Forwarded-For": said}).headers["x-request-id"])  # of many refusals not each has a line
        return [(line["status"], line["client"]) for line in gateway.log() if line.get("request_id") in names]

    assert set(eventually(lines, "a refusal's line")) == {(403, client)}


def test_a_chain_over_several_fields_is_one(gateway: Gateway) -> None:
    request = "GET /office HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 203.0.113.9\r\nX-Forwarded-For: 198.51.100.1\r\nConnection: close\r\n\r\n"
    assert exchange(gateway, request.encode(), "behind").startswith(b"HTTP/1.1 200 ")
    turned = request.replace("203.0.113.9", "198.51.100.2").replace("198.51.100.1", "203.0.113.9")
    assert exchange(gateway, turned.encode(), "behind").startswith(b"HTTP/1.1 403 ")


# -- request id and trace


def test_a_request_id_is_kept_or_made(http: httpx.Client) -> None:
    given = str(uuid.uuid4())
    answer = http.get("/x", headers={"X-Request-Id": given})
    assert Told(answer).all("x-request-id") == [given] == answer.headers.get_list("x-request-id")
    for bad in ("", "1", given + "0", given.replace("-", "+"), "x" * 36, "../../../../../../../../../../etc/pa"):
        answer = http.get("/x", headers={"X-Request-Id": bad})
        made = Told(answer).one("x-request-id")
        assert uuid.UUID(made).version == 7
        assert uuid.UUID(made).variant == uuid.RFC_4122
        assert answer.headers.get_list("x-request-id") == [made]
    answer = http.get("/x?set=X-Request-Id:of-the-origin", headers={"X-Request-Id": given})
    assert answer.headers.get_list("x-request-id") == [given]


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


def test_a_trace_is_continued_for_the_trusted_only(http: httpx.Client, behind: httpx.Client) -> None:
    told = Told(behind.get("/x", headers={"traceparent": PARENT, "tracestate": "a=1"}))
    version, trace, span, flags = told.one("traceparent").split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert span != "00f067aa0ba902b7"
    assert re.fullmatch("[0-9a-f]{16}", span)
    assert told.one("tracestate") == "a=1"
    told = Told(http.get("/x", headers={"traceparent": PARENT, "tracestate": "a=1"}))
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]", told.one("traceparent"))
    assert TRACE not in told.one("traceparent")
    assert told.all("tracestate") == []


@pytest.mark.parametrize("value", [
    "", "00", PARENT[:-1], PARENT + "0", PARENT.upper(), f"ff-{TRACE}-00f067aa0ba902b7-01", f"00-{'0' * 32}-00f067aa0ba902b7-01",
    f"00-{TRACE}-{'0' * 16}-01", PARENT.replace("-", "_"), f"00-{TRACE[:-1]}g-00f067aa0ba902b7-01",
])
def test_a_trace_that_is_none_is_started_anew(behind: httpx.Client, value: str) -> None:
    told = Told(behind.get("/x", headers={"traceparent": value, "tracestate": "a=1"}))
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]", told.one("traceparent"))
    assert told.one("traceparent")[:52] != value[:52]
    assert told.all("tracestate") == []                         # it belongs to the trace that was not understood


def test_a_refusal_has_the_same_id_as_the_request(gateway: Gateway) -> None:
    given = str(uuid.uuid4())
    answer = exchange(gateway, f"GET /office HTTP/1.1\r\nHost: a\r\nX-Request-Id: {given}\r\nConnection: close\r\n\r\n".encode())
    assert fields_of(answer, "x-request-id") == [given]
    assert given.encode() in answer.partition(b"\r\n\r\n")[2]
