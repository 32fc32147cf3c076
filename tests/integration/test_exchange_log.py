"""The gateway's own log says what became of a request that was not simply answered, under the id that its client was told."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.bank import Ports
from tests.integration.echo import Echo, config, exchange, fields_of, metric
from tests.integration.processes import PATIENCE, Gateway, eventually

LISTENERS = "listeners: {public: {bind: 127.0.0.1:0}, behind: {bind: 127.0.0.1:0, proxy_protocol: required}}\n"
RULES = """
policies:
  allowed: {ip: {allow: 192.0.2.0/24}}
routes:
  - {name: all, match: {prefix: /all}, upstream: origin}
  - {name: others, match: {prefix: /others}, policies: [allowed], upstream: origin}
  - {name: held, match: {prefix: /held}, upstream: origin}
  - {name: dead, match: {prefix: /dead}, upstream: dead}
  - {name: half, match: {prefix: /half}, upstream: half}
"""
HALF = "half: {targets: [127.0.0.1:%d, 127.0.0.1:%d], balance: round_robin, timeouts: {connect: 200ms}}, "
FLOOD = 300


@pytest.fixture(scope="module")
def gateway(echo: Echo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("log")
    with contextlib.closing(Ports()) as ports:
        more = f"upstreams: {{dead: {{targets: [127.0.0.1:{ports.gone}]}}, " + HALF % (ports.full, echo.port)
        (folder / "edge.yaml").write_text(config(RULES, echo, listeners=LISTENERS).replace("upstreams: {", more))
        with Gateway(folder / "edge.yaml") as running:
            yield running
            assert "Traceback" not in running.errors.read_text()


def ask(gateway: Gateway, target: str, head: bytes = b"") -> bytes:
    return exchange(gateway, b"GET " + target.encode() + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + head + b"\r\n")


def lines(gateway: Gateway) -> list[dict[str, Any]]:
    return [line for line in gateway.log() if line.get("logger") == "crossway.exchange" and "request_id" in line]


def line_of(gateway: Gateway, answer: bytes) -> dict[str, Any]:
    """Return the one line with the id that the answer names."""
    (name,) = fields_of(answer, "x-request-id")
    found = eventually(lambda: [line for line in lines(gateway) if line["request_id"] == name], f"a line about {name}")
    assert len(found) == 1
    line: dict[str, Any] = found[0]
    return line


def test_a_refusal_is_found_by_the_id_that_the_client_was_told(gateway: Gateway) -> None:
    line = line_of(gateway, ask(gateway, "/others/x?secret=s3cr3t", b"Authorization: Bearer s3cr3t\r\n"))
    assert (line["level"], line["event"]) == ("info", "a request was refused")
    assert (line["status"], line["reason"], line["route"]) == (403, "address-not-allowed", "others")
    assert (line["method"], line["path"], line["client"], line["listener"]) == ("GET", "/others/x", "127.0.0.1", "public")
    assert line["duration_us"] >= 0
    assert "s3cr3t" not in gateway.errors.read_text()


def test_what_reaches_no_route_and_what_is_no_http_have_a_line_as_well(gateway: Gateway) -> None:
    line = line_of(gateway, ask(gateway, "/nowhere"))
    assert (line["status"], line["reason"], line["path"]) == (404, "no-route", "/nowhere")
    assert "route" not in line
    line = line_of(gateway, exchange(gateway, b"GET / HTTP/1.1\r\nHost: a\r\nX : \x01s3cr3t\r\n\r\n"))
    assert (line["status"], line["client"]) == (400, "127.0.0.1")
    assert line["detail"] and "path" not in line


def test_a_failing_upstream_is_a_warning_with_its_address(gateway: Gateway) -> None:
    line = line_of(gateway, ask(gateway, "/dead/x"))
    assert (line["level"], line["event"]) == ("warning", "an exchange failed")
    assert (line["status"], line["reason"], line["route"]) == (503, "upstream-unreachable", "dead")
    assert "sent" not in line                   # nothing was executed


def test_a_client_that_leaves_has_a_line_that_says_whether_its_request_was_sent(gateway: Gateway, echo: Echo) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port()), PATIENCE) as client:
        client.sendall(b"GET /held/gone HTTP/1.1\r\nHost: a\r\n\r\n")
        assert echo.held.acquire(timeout=PATIENCE)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))     # a clean end may be a half-close
    found = eventually(lambda: [line for line in lines(gateway) if line.get("path") == "/held/gone"])
    assert (found[0]["event"], found[0]["status"]) == ("a client left before its answer was complete", 499)
    assert found[0]["sent"] is True
    echo.release.set()


def test_a_connection_without_its_proxy_header_has_a_line(gateway: Gateway) -> None:
    assert exchange(gateway, b"GET /all HTTP/1.1\r\nHost: a\r\n\r\n", "behind") == b""
    found = eventually(lambda: [line for line in gateway.log() if "PROXY" in line["event"]], "a line about it")
    assert (found[0]["level"], found[0]["listener"], found[0]["client"]) == ("info", "behind", "127.0.0.1")


def test_what_is_answered_has_no_line(gateway: Gateway) -> None:
    answer = ask(gateway, "/all/fine")
    assert answer.startswith(b"HTTP/1.1 200 ")
    line_of(gateway, ask(gateway, "/nowhere/after"))        # later, and there
    assert not [line for line in lines(gateway) if line.get("path") == "/all/fine"]


def test_what_is_answered_at_a_second_attempt_has_no_line(gateway: Gateway) -> None:
    """The first endpoint accepts no connection in time: that is told of the endpoint, not of the request."""
    for number in range(4):
        assert ask(gateway, f"/half/{number}").startswith(b"HTTP/1.1 200 ")
    assert metric(gateway, "crossway_retries_total") >= 1
    line_of(gateway, ask(gateway, "/nowhere/then"))
    assert not [line for line in lines(gateway) if line.get("path", "").startswith("/half")]


def test_a_flood_leaves_few_lines_and_the_number_of_the_others(gateway: Gateway) -> None:
    def flood() -> list[dict[str, Any]]:
        return [line for line in lines(gateway) if line.get("path") == "/flood"]

    began = time.monotonic()
    request = b"GET /flood HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = exchange(gateway, request * (FLOOD - 1) + request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert answer.count(b"HTTP/1.1 404 ") == FLOOD
    seconds = int(time.monotonic() - began) + 2             # that it touched, at most
    eventually(lambda: ask(gateway, "/flood") and "unsaid" in flood()[-1], "a line in the next second")
    told = flood()
    assert sum(1 + line.get("unsaid", 0) for line in told) >= FLOOD
    assert len([line for line in told if "unsaid" not in line]) <= 20 * (seconds + 1)
    # Refusals, however many, do not hide a failure.
    answer = exchange(gateway, request * 50 + b"GET /dead/flood HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 404 ") == 50
    eventually(lambda: [line for line in lines(gateway) if line.get("path") == "/dead/flood"])
