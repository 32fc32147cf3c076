"""Tunnels as such: what passes, what is held back, how they end, what is counted and recorded, and what a reload or a drain does to them."""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.bank import Peak, WatchedGateway
from tests.integration.echo import token
from tests.integration.faults import PATTERN, PIECE, Cut, Script, ScriptedOrigin, Stream, connect, get, serve
from tests.integration.processes import PATIENCE, eventually
from tests.integration.test_streaming import KERNEL, settled
from tests.integration.websocket_kit import Tunnels, handshake, prepared, switch, tunnels_at

GROWTH = 16 << 20  # bytes of resident memory


def parrot(origin: ScriptedOrigin, stream: Stream) -> None:
    """Sends back every byte, and its end after the client's."""
    switch(stream)
    with contextlib.suppress(Exception):
        while True:
            stream._more()
            piece, stream.buffer = stream.buffer, b""
            stream.send(piece)
    stream.half_close()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnels]:
    with tunnels_at(tmp_path_factory.mktemp("tunnels")) as made:
        yield made


@pytest.fixture
def tunnels(opened: Tunnels) -> Iterator[Tunnels]:
    """Nothing is held after the test, and no worker died."""
    opened.origin.script = parrot
    yield opened
    opened.origin.reset()
    opened.gateway.calm()
    assert opened.number('route_tunnels_open{http_route="raw"}') == 0


def ends(stream: Stream) -> bool:
    """Wait for the end; whether it was a clean one."""
    return stream.rest()[1]


# -- bytes


def test_one_record_and_counters_tell_what_passed(tunnels: Tunnels) -> None:
    before = tunnels.gateway.metrics()
    with tunnels.open("/raw/told") as client:
        client.send(b"a" * 1000)
        assert client.exactly(1000) == b"a" * 1000
        eventually(lambda: tunnels.number("tunnels_open") == 1, "the gauge")
        after = tunnels.gateway.metrics()
        assert after['crossway_tunnel_bytes_total{direction="in"}'] - before['crossway_tunnel_bytes_total{direction="in"}'] == 1000
        assert after['crossway_tunnel_bytes_total{direction="out"}'] - before['crossway_tunnel_bytes_total{direction="out"}'] == 1000
        assert after['crossway_route_tunnels_open{http_route="raw"}'] == 1
        assert tunnels.records("/raw/told") == []               # at the end, and once
        client.send(b"b")
        client.half_close()
        assert client.rest() == (b"b", True)
    record = tunnels.record("/raw/told")
    assert (record["status"], record["outcome"], record["reason"]) == (101, "answered", None)
    assert (record["bytes_in"], record["bytes_out"], record["route"]) == (1001, 1001, "raw")
    assert record["upstream"] == f"127.0.0.1:{tunnels.origin.port}"
    after = tunnels.gateway.metrics()
    assert after["crossway_tunnels_total"] == before["crossway_tunnels_total"] + 1
    series = 'http_server_request_duration_seconds_count{http_request_method="GET",http_response_status_code="101",http_route="raw"}'
    assert after[series] == before.get(series, 0) + 1


def late(told: list[tuple[bytes, bool]]) -> Script:
    """An origin that speaks only after the client's end."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        switch(stream)
        told.append(stream.rest())
        stream.send(b"after your end")

    return script


def test_half_closes_are_passed_on_and_what_follows_still_arrives(tunnels: Tunnels) -> None:
    told: list[tuple[bytes, bool]] = []
    tunnels.origin.script = late(told)
    with tunnels.open("/raw/half") as client:
        client.send(b"all I have to say")
        client.half_close()
        assert client.rest() == (b"after your end", True)
    assert told == [(b"all I have to say", True)]
    assert tunnels.record("/raw/half")["outcome"] == "answered"


def test_close_notify_is_a_half_close(tunnels: Tunnels) -> None:
    told: list[tuple[bytes, bool]] = []
    tunnels.origin.script = late(told)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = tunnels.trust().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with connect(tunnels.gateway.port("secure")) as client:

        def turn(step: Callable[[], Any]) -> Any:
            while True:
                try:
                    done = step()
                    client.send(outgoing.read())
                    return done
                except ssl.SSLWantReadError:
                    client.send(outgoing.read())
                incoming.write(client.sock.recv(1 << 16))

        turn(tls.do_handshake)
        turn(lambda: tls.write(handshake("/raw/notify")))
        assert b" 101 " in turn(lambda: tls.read(1 << 16))
        turn(lambda: tls.write(b"all I have to say"))
        with pytest.raises(ssl.SSLWantReadError):
            tls.unwrap()
        client.send(outgoing.read())                            # the other direction stays as it is
        records, clean = client.rest()
        assert clean and len(records) > len(b"after your end")
    assert told == [(b"all I have to say", True)]
    record = tunnels.record("/raw/notify")
    assert (record["outcome"], record["bytes_out"]) == ("answered", len(b"after your end"))


def test_a_side_that_does_not_read_stops_the_other_one(tunnels: Tunnels) -> None:
    sent = [0, 0]

    def flood(stream: Stream, which: int, total: int) -> None:
        for _ in range(total // PIECE):
            view = memoryview(PATTERN)
            while view:
                n = stream.sock.send(view)
                sent[which] += n
                view = view[n:]

    def pour(origin: ScriptedOrigin, stream: Stream) -> None:
        switch(stream)
        writer = threading.Thread(target=flood, args=(stream, 0, total))
        writer.start()
        assert origin.go.wait(PATIENCE)
        check(stream, total)
        writer.join(PATIENCE)
        stream.half_close()

    def check(stream: Stream, length: int) -> None:
        for _ in range(length // PIECE):
            assert stream.exactly(PIECE) == PATTERN

    total = 4 * (KERNEL // PIECE) * PIECE
    tunnels.origin.script = pour
    with tunnels.open("/raw/flood", receive=1 << 16) as client, Peak(tunnels.gateway.pids[0]) as one, Peak(tunnels.gateway.pids[1]) as two:
        writer = threading.Thread(target=flood, args=(client, 1, total))
        writer.start()
        assert settled(lambda: sent[0]) < KERNEL
        assert settled(lambda: sent[1]) < KERNEL
        tunnels.origin.go.set()
        check(client, total)
        writer.join(PATIENCE)
        client.half_close()
        assert client.rest() == (b"", True)
    assert one.growth < GROWTH and two.growth < GROWTH
    record = tunnels.record("/raw/flood")
    assert (record["bytes_in"], record["bytes_out"]) == (total, total)


# -- ends


def test_an_upstream_that_breaks_off_cuts_the_client(tunnels: Tunnels) -> None:
    def breaks(origin: ScriptedOrigin, stream: Stream) -> None:
        switch(stream)
        stream.exactly(1)
        stream.reset()

    tunnels.origin.script = breaks
    with tunnels.open("/raw/breaks") as client:
        client.send(b"x")
        assert not ends(client)
    record = tunnels.record("/raw/breaks")
    assert (record["status"], record["outcome"]) == (101, "failed")
    assert "an exchange failed" in tunnels.gateway.events()


def test_a_client_that_breaks_off_cuts_the_upstream(tunnels: Tunnels) -> None:
    cut: list[bool] = []

    def listens(origin: ScriptedOrigin, stream: Stream) -> None:
        switch(stream)
        cut.append(not stream.rest()[1])
        origin.seen.release()

    tunnels.origin.script = listens
    tunnels.open("/raw/leaves").reset()
    tunnels.origin.saw()
    assert cut == [True]
    record = tunnels.record("/raw/leaves")
    assert (record["status"], record["outcome"]) == (101, "aborted")


def test_silence_ends_a_tunnel_and_talk_does_not(tunnels: Tunnels) -> None:
    before = tunnels.number('tunnels_ended_total{cause="idle"}')
    with tunnels.open("/idle/talk") as client:
        pause = threading.Event()
        for _ in range(10):                                     # a second and a half: three times the idle time
            client.send(b"x")
            assert client.exactly(1) == b"x"
            pause.wait(0.15)
        assert ends(client)
    record = tunnels.record("/idle/talk")
    assert (record["outcome"], record["reason"], record["bytes_in"]) == ("answered", "tunnel-idle", 10)
    assert record["duration_us"] > 1_500_000
    assert tunnels.number('tunnels_ended_total{cause="idle"}') == before + 1


def test_a_tunnel_ends_with_its_token(tunnels: Tunnels) -> None:
    assert connect(tunnels.gateway.port()).ask(handshake("/bank/nobody")).status == 401
    before = tunnels.number('tunnels_ended_total{cause="expired"}')
    expires = int(time.time()) + 5
    short = f"authorization: Bearer {token(exp=expires)}"
    with tunnels.open("/bank/short", short) as client, tunnels.open("/lax/short", short) as other:
        try:
            while True:                                         # talk does not keep it
                client.send(b"x")
                client.exactly(1)
                time.sleep(0.05)
        except (Cut, ConnectionError):
            pass
        assert time.time() >= expires
        other.send(b"still here")
        assert other.exactly(10) == b"still here"
    record = tunnels.record("/bank/short")
    assert (record["outcome"], record["reason"], record["subject"]) == ("answered", "tunnel-expired", "alice")
    assert tunnels.number('tunnels_ended_total{cause="expired"}') == before + 1


# -- places


def test_the_cap_holds_over_all_workers_and_a_killed_worker_gives_its_places_back(tmp_path: Path) -> None:
    with tunnels_at(tmp_path, workers=3) as tunnels:
        tunnels.origin.script = parrot
        open_ones: list[Stream] = [tunnels.open("/few") for _ in range(5)]
        refused = tunnels.number("tunnels_refused_total")
        for _ in range(12):                                     # whichever worker gets it
            with connect(tunnels.gateway.port()) as client:
                answer = client.ask(handshake("/few"))
                assert (answer.status, answer.fields["connection"], answer.fields["retry-after"]) == (503, "close", "5")
                assert b"urn:crossway:problem:too-many-tunnels" in answer.body
        assert tunnels.number("tunnels_refused_total") == refused + 12
        assert tunnels.origin.accepted == 5                     # nobody was asked
        open_ones.pop().close()
        eventually(lambda: tunnels.number('route_tunnels_open{http_route="few"}') == 4, "a free place")
        open_ones.append(tunnels.open("/few"))
        # Kill the worker that holds the first one.
        for pid in tunnels.gateway.workers():
            os.kill(pid, signal.SIGKILL)
        for stream in open_ones:
            stream.rest()
            stream.close()
        eventually(lambda: len(tunnels.gateway.workers()) == 3 and not set(tunnels.gateway.workers()) & set(tunnels.gateway.pids), "successors")
        again = [tunnels.open("/few") for _ in range(5)]
        for stream in again:
            stream.send(b"x")
            assert stream.exactly(1) == b"x"
            stream.close()
        tunnels.gateway.calm(same=False)


def test_an_idle_connection_makes_room_for_a_handshake(tmp_path: Path) -> None:
    """The upstream allows one connection, and a request has left it in the pool."""
    with tunnels_at(tmp_path, workers=1) as tunnels:
        with connect(tunnels.gateway.port()) as client:
            assert client.ask(get("/lone/before")).status == 200
        tunnels.origin.script = parrot
        with tunnels.open("/lone/tunnel") as client:
            client.send(b"x")
            assert client.exactly(1) == b"x"
            assert tunnels.origin.accepted == 2
        eventually(lambda: tunnels.records("/lone/tunnel"), "the end of the tunnel")
        tunnels.origin.script = serve
        with connect(tunnels.gateway.port()) as client:
            assert client.ask(get("/lone/after")).status == 200
        tunnels.gateway.calm()


# -- policies


def test_a_response_policy_sees_the_101_and_may_refuse_it(tunnels: Tunnels) -> None:
    with connect(tunnels.gateway.port()) as client:
        client.send(handshake("/nosy/yes"))
        head = client.head()
        assert (head.status, head.fields["x-seen"]) == (101, "101")
        client.send(b"through")
        assert client.exactly(7) == b"through"
    with connect(tunnels.gateway.port()) as client:
        client.send(handshake("/nosy/no"), b"early")
        answer = client.answer()
        assert (answer.status, answer.fields["connection"]) == (403, "close")
        assert b"not-this-one" in answer.body
        assert client.closed()
    assert tunnels.record("/nosy/no")["status"] == 403


# -- reload and drain


def test_a_reload_keeps_tunnels_and_changes_what_comes_after(tmp_path: Path) -> None:
    with tunnels_at(tmp_path) as tunnels:
        tunnels.origin.script = parrot
        with tunnels.open("/raw/old") as client:
            tunnels.configure(websocket="false")
            assert tunnels.gateway.command("reload").returncode == 0
            with connect(tunnels.gateway.port()) as other:      # the origin answers 101 to what is no handshake any more
                other.send(handshake("/raw/new"))
                assert other.answer().status == 502
            client.send(PATTERN)
            assert client.exactly(PIECE) == PATTERN
            client.half_close()
            assert ends(client)
        assert tunnels.record("/raw/old")["bytes_out"] == PIECE
        tunnels.gateway.calm()


def test_a_drain_lets_tunnels_end_by_themselves(tmp_path: Path) -> None:
    with tunnels_at(tmp_path, drain="60s") as tunnels:
        tunnels.origin.script = parrot
        with tunnels.open("/raw/last") as client:
            tunnels.gateway.signal(signal.SIGTERM)
            eventually(lambda: "stopping" in tunnels.gateway.events(), "the drain")
            client.send(b"still here")
            assert client.exactly(10) == b"still here"
            client.half_close()
            assert ends(client)
        assert tunnels.gateway.wait() == 0
        assert tunnels.record("/raw/last")["outcome"] == "answered"
        assert "exchange cut off at the end of the drain" not in tunnels.gateway.events()


def test_a_drain_cuts_at_its_deadline_what_has_not_ended_and_says_so(tmp_path: Path) -> None:
    with prepared(tmp_path) as tunnels:
        tunnels.origin.script = parrot
        with WatchedGateway(tunnels.configure(drain="500ms")) as tunnels.gateway:
            with tunnels.open("/raw/cut") as client:
                client.send(b"xyz")
                assert client.exactly(3) == b"xyz"
                tunnels.gateway.signal(signal.SIGTERM)
                assert not ends(client)
            assert tunnels.gateway.wait() == 0
            record = tunnels.record("/raw/cut")
            assert (record["status"], record["outcome"], record["reason"]) == (101, "failed", "tunnel-cut")
            assert (record["bytes_in"], record["bytes_out"]) == (3, 3)
            (line,) = [line for line in tunnels.gateway.log() if line["event"] == "exchange cut off at the end of the drain"]
            assert line["exchange"]["tunnel"] is True
            assert line["exchange"]["route"] == "raw"
