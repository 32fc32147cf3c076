"""Clients that leave: a payment that was sent is finished and audited, unless the configuration says to cancel it.

Strategy: the origin answers when the test lets it, so that the client has certainly left before.
"""

from __future__ import annotations

import json
import select
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.bank import WatchedGateway
from tests.integration.faults import Cut, ScriptedOrigin, Stream, body_length, connect, get, ok, post
from tests.integration.processes import eventually

CONFIG = """\
version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
drain: {{deadline: 30s}}
listeners: {{public: {{bind: 127.0.0.1:0}}}}
upstreams:
  finished: {{targets: ["127.0.0.1:{port}"]}}
  cancelled: {{targets: ["127.0.0.1:{port}"], abandoned: cancel}}
policies: {{trail: {{audit: {{file: audit.jsonl}}}}}}
routes:
  - {{name: finished, match: {{prefix: /finished}}, upstream: finished, policies: [trail]}}
  - {{name: cancelled, match: {{prefix: /cancelled}}, upstream: cancelled, policies: [trail]}}
"""


def there(stream: Stream) -> bool:
    """Whether the other side has neither ended nor broken the connection."""
    return not select.select([stream.sock], [], [], 0)[0]


class Held:
    """A script that answers 201 when it may, and notes whether anybody was still there to be told."""

    def __init__(self) -> None:
        self.told: list[bool] = []

    def __call__(self, origin: ScriptedOrigin, stream: Stream) -> None:
        while True:
            message = stream.head()
            for _ in stream.pieces(body_length(message)):
                pass
            origin.seen.release()
            assert origin.go.wait(30)
            self.told.append(there(stream))
            if not self.told[-1]:
                raise Cut
            stream.send(ok(b"paid").replace(b"200 OK", b"201 Created"))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("request_", "finished"),
    [
        (post("/finished", b"5 EUR"), True),
        (get("/finished"), False),
        (post("/cancelled", b"5 EUR"), False),
    ],
    ids=["payment", "read", "cancelled"],
)
def test_what_becomes_of_a_request_whose_client_left(tmp_path: Path, request_: bytes, finished: bool) -> None:
    held = Held()
    origin = ScriptedOrigin(held)
    path = tmp_path / "edge.yaml"
    path.write_text(CONFIG.format(port=origin.port))
    try:
        with WatchedGateway(path) as gateway:
            stream = connect(gateway.port())
            stream.send(request_)
            origin.saw()
            stream.reset()
            eventually(lambda: gateway.counter("client_aborts") == 1, "the gateway's notice")
            if not finished:
                eventually(lambda: (tmp_path / "audit.jsonl").stat().st_size, "the record of what was cancelled")
            origin.go.set()
            eventually(lambda: (tmp_path / "audit.jsonl").stat().st_size, "the record")
            (record,) = records(tmp_path / "audit.jsonl")
            assert (record["outcome"], record["status"]) == ("aborted", 201 if finished else 499), record
            assert record["upstream"] == f"127.0.0.1:{origin.port}"
            eventually(lambda: held.told, "the origin's answer")
            assert held.told == [finished]
            assert gateway.counter("orphaned_exchanges") == finished
            gateway.calm()
    finally:
        origin.close()


def test_a_drain_waits_for_a_payment_whose_client_left(tmp_path: Path) -> None:
    held = Held()
    origin = ScriptedOrigin(held)
    path = tmp_path / "edge.yaml"
    path.write_text(CONFIG.format(port=origin.port))
    try:
        with WatchedGateway(path) as gateway:
            stream = connect(gateway.port())
            stream.send(post("/finished", b"5 EUR"))
            origin.saw()
            stream.reset()
            eventually(lambda: gateway.counter("client_aborts") == 1, "the gateway's notice")
            gateway.signal(signal.SIGTERM)
            eventually(lambda: gateway.admin("/readyz")[0] == 503, "the drain")
            origin.go.set()
            assert gateway.wait() == 0
            assert held.told == [True]
            (record,) = records(tmp_path / "audit.jsonl")
            assert (record["outcome"], record["status"]) == ("aborted", 201)
    finally:
        origin.close()
