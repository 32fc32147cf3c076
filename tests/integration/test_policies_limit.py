"""rate_limit and limits through a real gateway of two workers: what is admitted is exact, and who is refused is told when to return."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from tests.integration.echo import (
    ISSUER,
    Echo,
    Told,
    bearer,
    client,
    config,
    exchange,
    fields_of,
    jwks,
    metric,
    problem,
    token,
)
from tests.integration.processes import Gateway, eventually

LISTENERS = "listeners: {public: {bind: 127.0.0.1:0}, behind: {bind: 127.0.0.1:0, trusted_proxies: [127.0.0.1]}}\n"
RULES = f"""
policies:
  bank: {{jwt: {{issuer: {ISSUER}, audience: payments, keys: jwks.json, algorithms: [RS256]}}}}
  burst: {{rate_limit: {{key: route, rate: 1/h, burst: 60}}}}
  per-client: {{rate_limit: {{key: client, rate: 1/h, burst: 3}}}}
  per-ip: {{rate_limit: {{key: ip, rate: 1/h, burst: 3}}}}
  per-tenant: {{rate_limit: {{key: "header:X-Tenant", rate: 1/h, burst: 2}}}}
  per-route: {{rate_limit: {{key: route, rate: 2/h, burst: 2, name: shop}}}}
  quick: {{rate_limit: {{key: route, rate: 4/s, burst: 1}}}}
routes:
  - {{name: burst, match: {{prefix: /burst}}, policies: [burst], upstream: origin}}
  - {{name: client, match: {{prefix: /client}}, policies: [per-client, bank], upstream: origin}}
  - {{name: client-too, match: {{prefix: /client-too}}, policies: [per-client, bank], upstream: origin}}
  - {{name: ip, match: {{prefix: /ip}}, policies: [per-ip], upstream: origin}}
  - {{name: tenant, match: {{prefix: /tenant}}, policies: [per-tenant], upstream: origin}}
  - {{name: one, match: {{prefix: /one}}, policies: [per-route], upstream: origin}}
  - {{name: two, match: {{prefix: /two}}, policies: [per-route], upstream: origin}}
  - {{name: quick, match: {{prefix: /quick}}, policies: [quick], upstream: origin}}
  - {{name: inline, match: {{prefix: /inline}}, policies: [{{rate_limit: {{key: ip, rate: 1/h, burst: 2}}}}], upstream: origin}}
  - {{name: small, match: {{prefix: /small}}, policies: [{{limits: {{body: 1KiB}}}}], upstream: origin}}
  - {{name: head, match: {{prefix: /head}}, policies: [{{limits: {{head: 300}}}}], upstream: origin}}
  - {{name: fields, match: {{prefix: /fields}}, policies: [{{limits: {{fields: 4}}}}], upstream: origin}}
  - {{name: held, match: {{prefix: /held}}, policies: [{{limits: {{time: 300ms}}}}], upstream: origin}}
  - {{name: free, match: {{prefix: /free}}, upstream: origin}}
"""


@pytest.fixture(scope="module")
def gateway(echo: Echo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("limit")
    (folder / "jwks.json").write_text(jwks(("RS256", "rs")))
    (folder / "edge.yaml").write_text(config(RULES, echo, workers=2, listeners=LISTENERS))
    with Gateway(folder / "edge.yaml") as running:
        yield running
        assert "Traceback" not in running.errors.read_text()


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with client(gateway) as made:
        yield made


def statuses(gateway: Gateway, count: int, path: str, name: str = "public", **headers: str) -> Counter[int]:
    """Each request on a connection of its own, so that both workers get some."""
    found: Counter[int] = Counter()
    for _ in range(count):
        with client(gateway, name) as made:
            found[made.get(path, headers=headers).status_code] += 1
    return found


def storm(gateway: Gateway, path: str, threads: int, each: int) -> Counter[int]:
    """`threads` clients at once, each with `each` requests over several connections."""
    found: Counter[int] = Counter()

    def run() -> None:
        for _ in range(each // 10):
            with client(gateway) as made:
                found.update(made.get(path).status_code for _ in range(10))

    started = [threading.Thread(target=run) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return found


# -- rate_limit


def test_exactly_the_burst_is_admitted_over_two_workers(gateway: Gateway, echo: Echo) -> None:
    before = [row["requests"] for row in gateway.admin("/workers")[1]["workers"]]
    limited = metric(gateway, "crossway_rate_limited_total")
    assert storm(gateway, "/burst", threads=8, each=40) == {200: 60, 429: 260}
    assert len([target for target in echo.seen if target == "/burst"]) == 60
    after = [row["requests"] for row in gateway.admin("/workers")[1]["workers"]]
    assert all(new - old > 20 for old, new in zip(before, after, strict=True)), "one worker took all"
    assert metric(gateway, "crossway_rate_limited_total") == limited + 260


def test_neither_a_reload_nor_a_dead_worker_gives_more(gateway: Gateway) -> None:
    assert statuses(gateway, 4, "/inline") == {200: 2, 429: 2}
    assert gateway.admin("/reload", "POST")[0] == 200
    assert statuses(gateway, 4, "/inline") == {429: 4}
    old = gateway.workers()[0]
    os.kill(old, signal.SIGKILL)
    eventually(lambda: old not in gateway.workers() and len(gateway.workers()) == 2)
    assert statuses(gateway, 6, "/inline") == {429: 6}


def test_the_fields_say_what_is_left_and_when_to_return(http: httpx.Client) -> None:
    first, second, third = (http.get("/one") for _ in range(3))
    assert [answer.status_code for answer in (first, second, third)] == [200, 200, 429]
    for answer in (first, second, third):
        assert answer.headers["ratelimit-policy"] == '"shop";q=2;w=3600'
    for answer, left in ((first, 1), (second, 0), (third, 0)):
        match = re.fullmatch(r'"shop";r=(\d);t=(\d+)', answer.headers["ratelimit"])
        assert match
        assert int(match[1]) == left
        assert 0 < int(match[2]) <= 3600
    problem(third, 429, "rate-limited")
    assert third.headers["retry-after"] == third.headers["ratelimit"].rpartition("=")[2]
    assert 1790 <= int(third.headers["retry-after"]) <= 1800
    assert "retry-after" not in first.headers


def test_each_route_counts_for_itself_when_asked_to(gateway: Gateway) -> None:
    assert statuses(gateway, 4, "/two") == {200: 2, 429: 2}


def test_clients_count_by_identity_over_all_routes_of_the_policy(gateway: Gateway, http: httpx.Client) -> None:
    def get(path: str, **more: str) -> int:
        return http.get(path, headers=bearer(token(**more))).status_code

    # Another token of the same client is no other client; a different subject of it is not either.
    assert [get("/client", client_id="a", jti=str(n), sub=f"user-{n}") for n in range(2)] == [200, 200]
    assert [get("/client-too", client_id="a") for _ in range(2)] == [200, 429]
    assert [get("/client", client_id="b") for _ in range(4)] == [200, 200, 200, 429]
    # Who is not let in is not counted: the limit comes after the identity.
    assert {get("/client", client_id="c", aud="other") for _ in range(5)} == {401}
    assert get("/client", client_id="c") == 200


def test_addresses_count_by_the_effective_client(gateway: Gateway) -> None:
    def spread(address: str, count: int, name: str = "behind") -> Counter[int]:
        return statuses(gateway, count, "/ip", name, **{"X-Forwarded-For": address})

    assert spread("203.0.113.1", 5) == {200: 3, 429: 2}
    assert spread("203.0.113.2", 5) == {200: 3, 429: 2}
    assert spread("203.0.113.1, 203.0.113.3", 4) == {200: 3, 429: 1}        # the right one counts
    assert spread("2001:db8:1:1::1", 2) + spread("2001:db8:1:1:ffff::2", 2) == {200: 3, 429: 1}     # one customer's /64
    assert spread("2001:db8:1:2::1", 3) == {200: 3}
    # A stranger cannot choose: every lie counts against its own address.
    assert sum((spread(f"203.0.113.{n}", 1, "public") for n in range(10, 15)), Counter()) == {200: 3, 429: 2}


def test_a_header_counts_by_its_value_and_by_address_without_it(gateway: Gateway) -> None:
    assert statuses(gateway, 3, "/tenant", **{"X-Tenant": "a"}) == {200: 2, 429: 1}
    assert statuses(gateway, 3, "/tenant", **{"x-tenant": "b"}) == {200: 2, 429: 1}
    assert statuses(gateway, 3, "/tenant") == {200: 2, 429: 1}


def test_a_bucket_fills_again(http: httpx.Client) -> None:
    began = time.monotonic()
    answers = [http.get("/quick") for _ in range(3)]
    if time.monotonic() - began < 0.25:             # else the first token was back before the last request
        assert [answer.status_code for answer in answers] == [200, 429, 429]
        assert answers[1].headers["retry-after"] == "1"
    eventually(lambda: http.get("/quick").status_code == 200, "the next token")


def test_other_routes_are_not_limited(http: httpx.Client) -> None:
    answer = http.get("/free")
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("ratelimit")]


# -- limits


def test_a_body_at_the_limit_passes_and_above_it_never_arrives(http: httpx.Client, echo: Echo) -> None:
    assert Told(http.post("/small", content=b"x" * 1024)).body == "x" * 1024
    before = len(echo.seen)
    problem(http.post("/small/declared", content=b"x" * 1025), 413, "body-too-large")
    assert "/small/declared" not in echo.seen[before:]


def test_a_body_without_length_is_cut_at_the_limit(gateway: Gateway) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (400, b"x" * 400) for _ in range(3)) + b"0\r\n\r\n"
    answer = exchange(gateway, b"POST /small HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert fields_of(answer, "connection") == ["close"]


def head_of(path: str, size: int) -> bytes:
    """Return a request head of exactly `size` bytes."""
    empty = f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX: \r\n\r\n".encode()
    return empty.replace(b"X: ", b"X: " + b"x" * (size - len(empty)))


def test_a_head_at_the_routes_limit_passes_and_above_it_is_refused(gateway: Gateway, echo: Echo) -> None:
    assert exchange(gateway, head_of("/head/fits", 300)).startswith(b"HTTP/1.1 200 ")
    answer = exchange(gateway, head_of("/head/over", 301))
    assert answer.startswith(b"HTTP/1.1 431 ") and b":head-too-large" in answer
    assert fields_of(answer, "connection") == ["close"]
    assert exchange(gateway, head_of("/free", 301)).startswith(b"HTTP/1.1 200 ")
    assert "/head/fits" in echo.seen and "/head/over" not in echo.seen


def test_fields_above_the_routes_limit_are_refused(gateway: Gateway, echo: Echo) -> None:
    lines = b"Host: a\r\nConnection: close\r\nA: 1\r\n"
    assert exchange(gateway, b"GET /fields/4 HTTP/1.1\r\n" + lines + b"A: 2\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    answer = exchange(gateway, b"GET /fields/5 HTTP/1.1\r\n" + lines + b"A: 2\r\nB: 3\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ") and b":too-many-fields" in answer
    assert fields_of(answer, "connection") == ["close"]
    assert "/fields/4" in echo.seen and "/fields/5" not in echo.seen


def test_the_time_of_an_exchange_ends_it(http: httpx.Client, echo: Echo) -> None:
    said = problem(http.get("/held"), 504, "total-timeout")
    assert "may have been executed" in said["detail"]
    assert echo.held.acquire(timeout=20)
    echo.release.set()
    assert Told(http.get("/held")).target == "/held"
