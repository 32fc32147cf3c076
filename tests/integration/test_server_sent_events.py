"""Server-sent events pass as they are said: none waits for the next, and only silence that the route does not allow ends them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.bank import WatchedGateway
from tests.integration.faults import ScriptedOrigin, Stream, connect, get
from tests.integration.processes import PATIENCE

CONFIG = """
version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
listeners: {{public: {{bind: 127.0.0.1:0}}}}
upstreams: {{origin: {{targets: [127.0.0.1:{port}]}}}}
routes:
  - {{name: events, match: {{prefix: /events}}, upstream: origin, timeouts: {{idle: 20s, total: 1h}}}}
  - {{name: hasty, match: {{prefix: /hasty}}, upstream: origin, timeouts: {{idle: 300ms, total: 1h}}}}
"""
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store\r\n"


class Events:
    """An origin that says an event whenever the test lets it, and never before."""

    def __init__(self) -> None:
        self.chunked = True
        self.turns = threading.Semaphore(0)
        self.over = threading.Event()
        self.origin = ScriptedOrigin(self.script)

    def script(self, origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        stream.send(HEAD, b"transfer-encoding: chunked\r\n\r\n" if self.chunked else b"connection: close\r\n\r\n")
        number = 0
        while not self.over.is_set():
            if self.turns.acquire(timeout=0.05):
                number += 1
                event = b"id: %d\ndata: payment %d settled\n\n" % (number, number)
                stream.send(b"%x\r\n%b\r\n" % (len(event), event) if self.chunked else event)


@pytest.fixture
def events() -> Iterator[Events]:
    made = Events()
    yield made
    made.over.set()
    made.origin.close()


@pytest.fixture
def gateway(events: Events, tmp_path: Path) -> Iterator[WatchedGateway]:
    path = tmp_path / "edge.yaml"
    path.write_text(CONFIG.format(port=events.origin.port))
    with WatchedGateway(path) as running:
        yield running


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "until-close"])
def test_an_event_arrives_before_the_next_one_is_sent(events: Events, gateway: WatchedGateway, chunked: bool) -> None:
    events.chunked = chunked
    url = f"http://127.0.0.1:{gateway.port()}/events"
    with httpx.Client(timeout=PATIENCE, trust_env=False) as client, client.stream("GET", url) as answer:
        assert answer.headers["content-type"] == "text/event-stream"        # the head alone is passed on already
        lines = answer.iter_lines()
        for number in range(1, 6):
            events.turns.release()                                    # only now is it said, and it is waited for
            assert [next(lines), next(lines), next(lines)] == [f"id: {number}", f"data: payment {number} settled", ""]
    events.over.set()                                                       # a client's FIN alone may be a half-close
    gateway.calm()


def test_silence_ends_the_stream_when_the_route_says_so_and_never_cleanly(events: Events, gateway: WatchedGateway) -> None:
    events.chunked = True
    with connect(gateway.port()) as client:
        client.send(get("/hasty"))
        events.turns.release()
        assert b"payment 1 settled" in client.until(b"settled") + b"settled"
        rest, _ = client.rest()
        assert not rest.endswith(b"0\r\n\r\n")
    gateway.calm()
