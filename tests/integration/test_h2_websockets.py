"""WebSockets over HTTP/2 (RFC 8441): clients on the h2 library, services on the websockets library or on bytes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.frames import Opcode

from tests.integration.echo import token
from tests.integration.faults import PATTERN, Cut, ScriptedOrigin, Stream, serve
from tests.integration.h2_kit import H2Client, connect_h2, head
from tests.integration.h2_tunnels import TunnelClient
from tests.integration.processes import PATIENCE, eventually
from tests.integration.test_websocket_tunnels import parrot
from tests.integration.websocket_kit import Tunnels, echo, switch, tunnels_at

SIDES = [("public", "/lib"), ("secure", "/lib"), ("public", "/tls"), ("secure", "/tls")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnels]:
    with tunnels_at(tmp_path_factory.mktemp("tunnels"), workers=1) as made:
        yield made


@pytest.fixture
def tunnels(opened: Tunnels) -> Iterator[Tunnels]:
    """Nothing is held after the test, and no worker died."""
    opened.origin.script = parrot
    yield opened
    opened.origin.reset()
    opened.servers.handler = echo
    opened.servers.seen.clear()
    opened.gateway.calm()
    eventually(lambda: opened.number("tunnels_open") == 0, "no open tunnel")


def client(tunnels: Tunnels, name: str = "public") -> TunnelClient:
    if name == "public":
        return TunnelClient(tunnels.gateway.port())
    context = tunnels.trust()
    context.set_alpn_protocols(["h2"])
    return TunnelClient(tunnels.gateway.port("secure"), tls=context)


# -- messages


@pytest.mark.parametrize(("name", "path"), SIDES)
def test_messages_pings_and_both_kinds_of_close(tunnels: Tunnels, name: str, path: str) -> None:
    with client(tunnels, name) as made:
        assert made.offers_tunnels()
        one = made.tunnel(path, ("sec-websocket-protocol", "pay.v1, pay.v2"))
        assert one.fields["sec-websocket-protocol"] == "pay.v2"
        assert not {"connection", "upgrade", "sec-websocket-accept", "transfer-encoding"} & set(one.fields)
        for message in ("hello", b"\0\xff" * 1000, "", "é" * 70_000):
            one.say(message)
            assert one.heard() == message
        one.ping(b"are you there")
        frame = one.hear()
        assert (frame.opcode, bytes(frame.data)) == (Opcode.PONG, b"are you there")
        one.close(4001, "done")
        assert one.hear().opcode is Opcode.CLOSE
        one.write(b"", end=True)
        assert one.rest() == (b"", True)
        two = made.tunnel(path)
        two.say("close 4002")
        frame = two.hear()
        assert (frame.opcode, bytes(frame.data)) == (Opcode.CLOSE, b"\x0f\xa2as asked")
        two.write(b"", end=True)
        assert two.rest() == (b"", True)


@pytest.mark.parametrize(("name", "path"), [("public", "/lib"), ("secure", "/tls")])
def test_large_messages_pass_both_ways_through_small_windows(tunnels: Tunnels, name: str, path: str) -> None:
    """The client's windows are 65,535 bytes, as the RFC has them when nobody says otherwise."""
    large = PATTERN * 6
    with client(tunnels, name) as made:
        tunnel = made.tunnel(path)
        for _ in range(2):
            tunnel.say(large)
            assert tunnel.heard() == large


def test_several_tunnels_and_ordinary_requests_on_one_connection(tunnels: Tunnels) -> None:
    with client(tunnels) as made:
        open_now = [made.tunnel(f"/lib/{number}") for number in range(20)]
        tunnels.origin.script = serve
        for turn in range(5):
            for number, each in enumerate(open_now):
                each.say(f"{number} {turn}")
            assert made.get("/plain/between")[0] == 200
            for number, each in enumerate(open_now):
                assert each.heard() == f"{number} {turn}"
        for each in open_now[:10]:
            each.cancel()
        for each in open_now[10:]:
            each.say("still here")
            assert each.heard() == "still here"


def test_a_tunnel_that_is_not_read_holds_back_nobody_else(tunnels: Tunnels) -> None:
    """Its window is used up, and not that of the connection."""
    with client(tunnels) as made:
        made.machine.increment_flow_control_window(1 << 20)                   # the connection's own
        made.flush()
        full, other = made.tunnel("/raw/full"), made.tunnel("/lib")
        full.write(PATTERN[:200_000])
        eventually(lambda: made.get("/nowhere") and len(full.inbox) == 65535, "a full window")
        other.say("and me?")
        assert other.heard() == "and me?"
        assert full.exactly(200_000) == PATTERN[:200_000]


# -- the handshake


def test_what_the_service_sees_is_a_handshake_of_http_1(tunnels: Tunnels) -> None:
    heads: list[Any] = []

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        heads.append(stream.head())
        stream.send(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\nx-why: me\r\n\r\nno")

    tunnels.origin.script = script
    with client(tunnels) as made:
        refused = made.headed(made.connect("/raw/seen?a=b", ("origin", "https://bank.test"), ("sec-websocket-extensions", "permessage-deflate")))
        assert (refused.status, refused.rest(), refused.fields["x-why"]) == (403, (b"no", True), "me")
    (told,) = heads
    fields = told.fields
    assert told.start == "GET /raw/seen?a=b HTTP/1.1"
    assert (fields["upgrade"], fields["connection"].lower(), fields["host"]) == ("websocket", "upgrade", "bank.test")
    assert (fields["sec-websocket-version"], fields["sec-websocket-extensions"]) == ("13", "permessage-deflate")
    assert len(fields["sec-websocket-key"]) == 24
    assert not any(name.startswith(":") for name in fields)


def test_policies_see_the_handshake(tunnels: Tunnels) -> None:
    with client(tunnels) as made:
        for path, more, status in (
            ("/bank", (), 401), ("/bank", (("authorization", "Bearer e30.e30.e30"),), 401), ("/nowhere", (), 404), ("/nosy/no", (), 403),
        ):  # fmt: skip
            refused = made.headed(made.connect(path, *more))
            body, whole = refused.rest()
            assert (refused.status, whole) == (status, True), path
            assert b"urn:crossway:problem:" in body
        allowed = made.tunnel("/bank", ("authorization", f"Bearer {token()}"))
        allowed.write(b"bytes")
        assert allowed.exactly(5) == b"bytes"
        seen = made.tunnel("/nosy/yes")
        assert seen.fields["x-seen"] == "101"


@pytest.mark.parametrize(
    ("path", "protocol"),
    [("/raw", "connect-udp"), ("/raw", "WebSocket2"), ("/raw", "webtransport"), ("/plain", "websocket"), ("/raw", None), ("/plain", None)],
)
def test_other_tunnels_are_not_offered(tunnels: Tunnels, path: str, protocol: str | None) -> None:
    """A protocol that nobody knows, a route without `websocket`, and CONNECT as RFC 9113 has it."""
    with client(tunnels) as made:
        refused = made.headed(made.connect(path, protocol=protocol))
        refused.rest()
        assert refused.status == 501
        assert made.get("/nowhere")[0] == 404
    assert tunnels.origin.seen.acquire(blocking=False) is False


@pytest.mark.parametrize(("version", "status"), [(None, 400), ("8", 426), ("13, 8", 426)])
def test_versions_of_websocket(tunnels: Tunnels, version: str | None, status: int) -> None:
    with client(tunnels) as made:
        refused = made.headed(made.connect("/raw", version=version))
        refused.rest()
        assert refused.status == status
        assert not {"connection", "upgrade"} & set(refused.fields)


def test_a_service_that_switches_to_something_else(tunnels: Tunnels) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.head()
        stream.send(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: AAAA\r\n\r\n")

    tunnels.origin.script = script
    with client(tunnels) as made:
        refused = made.headed(made.connect("/raw"))
        refused.rest()
        assert refused.status == 502


def test_bytes_behind_the_handshake_wait_for_the_answer(tunnels: Tunnels) -> None:
    with client(tunnels) as made:
        tunnel = made.connect("/raw/early")
        tunnel.write(b"early bytes")
        assert made.headed(tunnel).status == 200
        assert tunnel.exactly(11) == b"early bytes"


def test_the_cap_of_a_route(tunnels: Tunnels) -> None:
    with client(tunnels) as made:
        five = [made.tunnel("/few") for _ in range(5)]
        refused = made.headed(made.connect("/few"))
        body, _ = refused.rest()
        assert (refused.status, b"too-many-tunnels" in body) == (503, True)
        five[0].cancel()
        eventually(lambda: tunnels.number('route_tunnels_open{http_route="few"}') == 4, "a free place")
        assert made.headed(made.connect("/few")).status == 200


# -- ends


def late(told: list[tuple[bytes, bool]]) -> Callable[[ScriptedOrigin, Stream], None]:
    """Reads to the client's end, then speaks, then ends itself."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        switch(stream)
        told.append(stream.rest())
        stream.send(b"after your end")
        stream.half_close()

    return script


def test_half_closes_are_passed_on_and_what_follows_still_arrives(tunnels: Tunnels) -> None:
    told: list[tuple[bytes, bool]] = []
    tunnels.origin.script = late(told)
    with client(tunnels) as made:
        tunnel = made.tunnel("/raw/half")
        tunnel.write(b"last words", end=True)
        assert tunnel.rest() == (b"after your end", True)
        assert told == [(b"last words", True)]
    record = tunnels.record("/raw/half")
    assert (record["outcome"], record["bytes_in"], record["bytes_out"]) == ("answered", 10, 14)


def test_the_end_of_the_service_is_passed_on(tunnels: Tunnels) -> None:
    told: list[tuple[bytes, bool]] = []

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        switch(stream)
        stream.send(b"first word and last")
        stream.half_close()
        told.append(stream.rest())

    tunnels.origin.script = script
    with client(tunnels) as made:
        tunnel = made.tunnel("/raw/ends")
        assert tunnel.rest() == (b"first word and last", True)
        tunnel.write(b"I heard", end=True)
        eventually(lambda: told, "the client's answer")
    assert told == [(b"I heard", True)]


@pytest.mark.parametrize("how", ["reset", "vanish"])
def test_a_client_that_breaks_off_cuts_the_service(tunnels: Tunnels, how: str) -> None:
    told: list[bool] = []

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        switch(stream)
        try:
            told.append(stream.rest()[1])
        except Cut:
            told.append(False)

    tunnels.origin.script = script
    with client(tunnels) as made:
        path = f"/raw/{how}"
        tunnel = made.tunnel(path)
        tunnel.write(b"x")
        if how == "reset":
            tunnel.cancel()
            assert made.get("/nowhere")[0] == 404
        else:
            made.sock.close()
        eventually(lambda: told, "the end at the service")
    assert told == [False], "a broken tunnel looked like an ended one"
    assert tunnels.record(path)["outcome"] == "aborted"


def test_a_service_that_breaks_off_resets_the_client(tunnels: Tunnels) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        switch(stream)
        stream.exactly(1)
        stream.reset()

    tunnels.origin.script = script
    with client(tunnels) as made:
        tunnel = made.tunnel("/raw/broken")
        tunnel.write(b"x")
        assert tunnel.rest() == (b"", False)
        assert tunnel.reset is not None
        assert made.get("/nowhere")[0] == 404                               # the connection goes on
    record = tunnels.record("/raw/broken")
    assert record["outcome"] == "failed"


@pytest.mark.parametrize("how", ["reset", "vanish"])
@pytest.mark.parametrize("ended", [True, False], ids=["behind-its-end", "in-the-middle"])
def test_a_client_that_reads_nothing_and_breaks_off(tunnels: Tunnels, how: str, ended: bool) -> None:
    """Bytes wait for it, and bytes of its wait for the service: neither may hide that it is gone."""
    told: list[bool] = []

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        switch(stream)
        with contextlib.suppress(Cut):
            stream.send(PATTERN[:150_000])
            if not ended:
                origin.go.wait(PATIENCE)                                    # and reads nothing
            stream.rest()
        told.append(True)

    tunnels.origin.script = script
    with client(tunnels) as made:
        made.machine.increment_flow_control_window(1 << 20)                 # the connection's own: others go on
        path = f"/raw/deaf-{how}-{ended}"
        tunnel = made.tunnel(path)
        made.until(lambda: len(tunnel.inbox) == 65535, "a full window")
        tunnel.write(b"y" * 60_000, end=ended)
        assert made.get("/nowhere")[0] == 404                               # all of it was read
        if how == "reset":
            tunnel.cancel()
        else:
            made.sock.close()
        assert tunnels.record(path)["outcome"] == "aborted"
    tunnels.origin.go.set()
    eventually(lambda: told, "the end at the service")


def test_silence_ends_a_tunnel_and_talk_does_not(tunnels: Tunnels) -> None:
    with client(tunnels) as made:
        tunnel = made.tunnel("/idle/quiet")
        end = time.monotonic() + 1.2                                        # longer than twice `idle`
        while time.monotonic() < end:
            tunnel.write(b"x")
            assert tunnel.exactly(1) == b"x"
            time.sleep(0.05)
        tunnel.rest()
    record = tunnels.record("/idle/quiet")
    assert record["reason"] == "tunnel-idle"


def test_a_tunnel_ends_with_its_token(tunnels: Tunnels) -> None:
    with client(tunnels) as made:
        soon = token(exp=int(time.time()) + 3)
        tunnel = made.tunnel("/bank/token", ("authorization", f"Bearer {soon}"))
        lax = made.tunnel("/lax/token", ("authorization", f"Bearer {soon}"))
        tunnel.rest()
        lax.write(b"still")
        assert lax.exactly(5) == b"still"
    assert tunnels.record("/bank/token")["reason"] == "tunnel-expired"


# -- counts, reload, drain


def test_one_record_and_counters_tell_what_passed(tunnels: Tunnels) -> None:
    before = tunnels.number("tunnels_total")
    with client(tunnels) as made:
        tunnel = made.tunnel("/raw/told")
        tunnel.write(b"a" * 1000)
        assert tunnel.exactly(1000) == b"a" * 1000
        eventually(lambda: tunnels.number("tunnels_open") == 1, "the gauge")
        assert tunnels.records("/raw/told") == []
        tunnel.write(b"b", end=True)
        assert tunnel.rest() == (b"b", True)
    record = tunnels.record("/raw/told")
    assert (record["status"], record["outcome"], record["reason"]) == (101, "answered", None)
    assert (record["bytes_in"], record["bytes_out"], record["route"]) == (1001, 1001, "raw")
    assert tunnels.number("tunnels_total") == before + 1


def test_a_reload_keeps_tunnels(tmp_path: Path) -> None:
    with tunnels_at(tmp_path, workers=1) as tunnels, client(tunnels) as made:
        tunnels.origin.script = parrot
        tunnel = made.tunnel("/raw/kept")
        tunnels.configure(workers=1, websocket="false")
        events = len(tunnels.gateway.events())
        tunnels.gateway.signal(signal.SIGHUP)
        eventually(lambda: len(tunnels.gateway.events()) > events, "the reload")
        eventually(lambda: made.headed(made.connect("/raw/new")).status == 501, "the new rules")
        tunnel.write(b"as before")
        assert tunnel.exactly(9) == b"as before"


def frames_of_a_tunnel(tunnels: Tunnels, path: str) -> tuple[H2Client, int]:
    """A tunnel of a client that goes on after GOAWAY, which the h2 library does not."""
    made = connect_h2(tunnels.gateway.port())
    fields = [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", path), (":authority", "bank.test")]
    stream = made.open([*fields, ("sec-websocket-version", "13")], end=False)
    assert made.headed(stream).status == 200
    return made, stream


def test_a_drain_lets_tunnels_end_by_themselves(tmp_path: Path) -> None:
    with tunnels_at(tmp_path, workers=1) as tunnels:
        tunnels.origin.script = parrot
        made, stream = frames_of_a_tunnel(tunnels, "/raw/kept")
        with made:
            os.kill(tunnels.gateway.pid, signal.SIGTERM)
            made.until(lambda: len(made.gone) == 2, "both GOAWAYs")
            assert [each.last_stream_id for each in made.gone] == [(1 << 31) - 1, stream]
            made.data(stream, b"as before", end=False)
            made.until(lambda: bytes(made.answer_of(stream).body) == b"as before", "the echo")
            made.data(stream, b"", end=True)
            assert made.answer(stream).ended
            assert tunnels.gateway.wait() == 0


def holds(origin: ScriptedOrigin, stream: Stream) -> None:
    """What is no handshake is never answered."""
    try:
        parrot(origin, stream)
    except KeyError:
        origin.seen.release()
        stream.rest()


def test_a_drain_cuts_at_its_deadline_what_has_not_ended(tmp_path: Path) -> None:
    """And the records say that it was the gateway, not the client."""
    with tunnels_at(tmp_path, workers=1, drain="1s") as tunnels:
        tunnels.origin.script = holds
        made, stream = frames_of_a_tunnel(tunnels, "/raw/cut")
        with made:
            made.open(head("/plain/cut"))
            tunnels.origin.saw()
            os.kill(tunnels.gateway.pid, signal.SIGTERM)
            made.ended()
            assert not made.answer_of(stream).ended
            tunnels.gateway.wait()
            assert tunnels.record("/raw/cut")["reason"] == "tunnel-cut"
            assert tunnels.record("/plain/cut")["outcome"] == "failed"
