"""What the gateway itself cuts at the end of a drain is seen as cut: an answer without a length must not end cleanly."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.wire.gateway_process import GatewayProcess


def test_stopping_at_once_resets_an_answer_that_only_the_end_would_delimit(tmp_path: Path) -> None:
    gateway = GatewayProcess("default", tmp_path)
    world = gateway.world
    client = world.clients[1] = world.connect("public", "client")
    client.outgoing += b"GET /1 HTTP/1.0\r\nHost: gw.test\r\n\r\n"
    world.wait_for("the request", lambda: bool(world.accepted) and b"\r\n\r\n" in world.accepted[0].incoming)
    world.accepted[0].outgoing += b"HTTP/1.1 200 OK\r\n\r\nhalf of it"
    world.wait_for("the first half", lambda: client.incoming.endswith(b"half of it"))
    gateway.process.send_signal(signal.SIGTERM)
    gateway.await_line('"stopping"')  # signals that come together count once
    gateway.process.send_signal(signal.SIGTERM)
    try:
        world.wait_for("the end", lambda: client.ended)
        assert not client.clean
    finally:
        gateway.stop()
