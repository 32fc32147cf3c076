"""Who may call the admin endpoint."""

import asyncio
from typing import Any

import pytest

from gateway.config.web import Bind
from gateway.server.admin import readiness
from gateway.server.guard import Guard

LOCAL = Bind("127.0.0.1", 9900)
PUBLIC = Bind("0.0.0.0", 9900)


async def page(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"inside"})


def call(
    bind: Bind, headers: dict[str, str] | list[tuple[str, str]], *, token: str | None = None, path: str = "/status"
) -> tuple[int, dict[bytes, bytes]]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    pairs = headers.items() if isinstance(headers, dict) else headers
    scope = {
        "type": "http",
        "path": path,
        "headers": [(name.lower().encode(), value.encode()) for name, value in pairs],
    }
    asyncio.run(Guard(page, bind, token)(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize("host", ["127.0.0.1:9900", "localhost:9900", "LOCALHOST", "[::1]:9900", "127.1.2.3"])
def test_this_machine_may_call(host: str) -> None:
    assert call(LOCAL, {"Host": host})[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.test", "evil.test:9900", "127.0.0.1.evil.test", "localhost.evil.test", "", "[::1", "a:b:c"]
)
def test_a_name_that_was_rebound_to_loopback_is_refused(host: str) -> None:
    assert call(LOCAL, {"Host": host})[0] == 421


def test_a_request_without_or_with_two_hosts_is_refused() -> None:
    assert call(LOCAL, {})[0] == 421
    assert call(LOCAL, [("Host", "localhost"), ("Host", "localhost")])[0] == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.test"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://localhost:1"},
    ],
)
def test_another_origin_is_refused(headers: dict[str, str]) -> None:
    assert call(LOCAL, {"Host": "localhost:9900", **headers})[0] == 403


def test_our_own_origin_is_not() -> None:
    own = {"Host": "localhost:9900", "Origin": "http://localhost:9900", "Sec-Fetch-Site": "same-origin"}
    assert call(LOCAL, own)[0] == 200


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer s3cret", 200),
        ("bearer s3cret", 200),
        ("Bearer s3cre", 401),
        ("Basic s3cret", 401),
        ("Bearer", 401),
        ("", 401),
    ],
)
def test_a_token_is_demanded_when_there_is_one(authorization: str, status: int) -> None:
    answer, headers = call(PUBLIC, {"Host": "gateway.test", "Authorization": authorization}, token="s3cret")
    assert answer == status
    assert (b"www-authenticate" in headers) == (status == 401)


def test_two_authorizations_are_none() -> None:
    twice = [("Authorization", "Bearer s3cret"), ("Authorization", "Bearer s3cret")]
    assert call(PUBLIC, twice, token="s3cret")[0] == 401


def test_probes_need_no_token() -> None:
    assert call(PUBLIC, {"Host": "gateway.test"}, token="s3cret", path="/readyz")[0] == 200
    assert call(PUBLIC, {"Host": "gateway.test"}, token="s3cret", path="/metrics")[0] == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": "20000"},
        {"Content-Length": "x"},
        {"Transfer-Encoding": "chunked"},
        {"Content-Length": "9" * 30},
    ],
)
def test_a_big_or_unsized_body_is_refused(headers: dict[str, str]) -> None:
    assert call(LOCAL, {"Host": "localhost", **headers})[0] == 413


def test_every_answer_has_the_security_headers() -> None:
    for headers in ({"Host": "localhost"}, {"Host": "evil.test"}):
        found = call(LOCAL, headers)[1]
        assert found[b"x-content-type-options"] == b"nosniff"
        assert b"frame-ancestors 'none'" in found[b"content-security-policy"]
        assert found[b"cache-control"] == b"no-store"


@pytest.mark.parametrize(
    ("phase", "states", "ready"),
    [
        ("running", ["ready", "dead"], True),
        ("running", ["dead", "starting"], False),
        ("starting", ["ready"], False),
        ("draining", ["ready"], False),
    ],
)
def test_readiness(phase: str, states: list[str], ready: bool) -> None:
    assert readiness({"phase": phase, "workers": [{"state": state} for state in states]})[0] is ready
