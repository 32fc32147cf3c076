"""Tunnels on streams of upstreams of HTTP/2: what passes, what is held back, how they end, and that they disturb no other stream."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from h2.settings import SettingCodes

from tests.integration.bank import Peak
from tests.integration.echo import token
from tests.integration.faults import PATTERN, PIECE, Stream, connect, get
from tests.integration.h2_kit import CANCEL, NO_ERROR, PROTOCOL_ERROR, connect_h2, goaway
from tests.integration.h2_origin import Call
from tests.integration.h2_tunnels import H2Stream, TunnelClient
from tests.integration.processes import PATIENCE, eventually
from tests.integration.test_streaming import KERNEL, settled
from tests.integration.websocket_h2_kit import OFFERS, Behind, behind, parrot
from tests.integration.websocket_kit import handshake

GROWTH = 16 << 20  # bytes of resident memory
TOTAL = 4 * (KERNEL // PIECE) * PIECE
WINDOW = 256 << 10  # of a stream towards the gateway


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    with behind(tmp_path_factory.mktemp("tunnels")) as made:
        yield made


@pytest.fixture
def edge(opened: Behind) -> Iterator[Behind]:
    """Nothing is held after the test, and no worker died."""
    yield opened
    opened.twin.reset()
    opened.serve(parrot)
    opened.gateway.calm()
    eventually(lambda: opened.number("tunnels_open") == 0, "no open tunnel")
    os.truncate(opened.folder / "audit.jsonl", 0)               # each test reads its own records


class Either:
    """A tunnel of a client of either version, byte by byte."""

    def __init__(self, edge: Behind, version: str, path: str, *, receive: int = 0) -> None:
        self.two: TunnelClient | None = None
        self.left = b""
        if version == "one":
            self.stream: Stream | H2Stream = edge.open(path, receive=receive)
        else:
            self.two = edge.client()
            self.stream = self.two.tunnel(path)

    def send(self, data: bytes, *, end: bool = False) -> None:
        if isinstance(self.stream, H2Stream):
            self.stream.write(data, end=end)
            return
        self.stream.send(data)
        if end:
            self.stream.half_close()

    def exactly(self, size: int) -> bytes:
        if isinstance(self.stream, Stream):
            return self.stream.exactly(size)
        while len(self.left) < size:
            self.left += read(self.stream)
        found, self.left = self.left[:size], self.left[size:]
        return found

    def rest(self) -> tuple[bytes, bool]:
        """All until the end, and whether that was a clean one."""
        found, clean = self.stream.rest()
        return self.left + found, clean

    def cut(self) -> None:
        """Break off."""
        if isinstance(self.stream, H2Stream):
            self.stream.cancel()
        else:
            self.stream.reset()

    def close(self) -> None:
        (self.two.sock if self.two is not None else self.stream).close()  # type: ignore[union-attr]


def read(stream: H2Stream) -> bytes:
    """What has come. Raises AssertionError at its end."""
    stream.client.until(lambda: stream.inbox or stream.over, "bytes")
    assert stream.inbox, f"over (reset {stream.reset})"
    return stream.take()


@pytest.fixture(params=["one", "two"])
def tunnel(request: pytest.FixtureRequest, edge: Behind) -> Iterator[Callable[..., Either]]:
    """Opens tunnels of clients of either version."""
    made: list[Either] = []

    def open_one(path: str, **options: int) -> Either:
        made.append(Either(edge, request.param, path, **options))
        return made[-1]

    yield open_one
    for each in made:
        each.close()


Open = Callable[..., Either]


# -- ends


def late(told: list[bytes]) -> Callable[[Call], object]:
    """Reads to the client's end, then speaks, then ends itself."""

    async def script(call: Call) -> None:
        await call.head()
        told.append(await call.body())
        await call.write(b"after your end")
        await call.finish()

    return script


def test_half_closes_are_passed_on_and_what_follows_still_arrives(edge: Behind, tunnel: Open) -> None:
    told: list[bytes] = []
    edge.serve(late(told))  # type: ignore[arg-type]
    made = tunnel("/two/half")
    made.send(b"last words", end=True)
    assert made.rest() == (b"after your end", True)
    assert told == [b"last words"]
    (call,) = edge.tunnels()
    assert call.code is None                                    # no reset: it ended in peace
    record = edge.record("/two/half")
    assert (record["status"], record["outcome"], record["reason"]) == (101, "answered", None)
    assert (record["bytes_in"], record["bytes_out"]) == (10, 14)


def test_the_end_of_the_service_is_passed_on(edge: Behind, tunnel: Open) -> None:
    told: list[bytes] = []

    async def script(call: Call) -> None:
        await call.head()
        await call.write(b"first word and last")
        await call.finish()
        told.append(await call.body())

    edge.serve(script)
    made = tunnel("/two/ends")
    assert made.exactly(19) == b"first word and last"
    if isinstance(made.stream, Stream):
        assert made.rest() == (b"", True)
    else:
        made.stream.client.until(lambda: made.stream.ended, "the end")  # type: ignore[union-attr]
    made.send(b"I heard", end=True)
    eventually(lambda: told == [b"I heard"], "the client's answer")
    assert edge.tunnels()[0].code is None


def test_a_service_that_says_all_and_wants_no_more(edge: Behind, tunnel: Open) -> None:
    """RFC 9113 8.1: its end, then RST_STREAM with NO_ERROR. What it has said arrives whole, however slow its client is."""

    async def script(call: Call) -> None:
        await call.head()
        await call.write(PATTERN[:200_000])
        await call.finish()
        await call.reset(NO_ERROR)

    edge.serve(script)
    made = tunnel("/two/all")
    assert made.exactly(200_000) == PATTERN[:200_000]
    made.send(b"nobody reads this")
    assert made.rest() == (b"", True)


def test_a_head_that_ends_its_stream_is_a_tunnel_that_says_nothing(edge: Behind, tunnel: Open) -> None:
    told: list[bytes] = []

    async def script(call: Call) -> None:
        await call.head(end=True)
        told.append(await call.body())

    edge.serve(script)
    made = tunnel("/two/mute")
    made.send(b"a word", end=True)
    assert made.rest() == (b"", True)
    eventually(lambda: told == [b"a word"], "the client's words")


def test_a_service_that_breaks_off_cuts_the_client(edge: Behind, tunnel: Open) -> None:
    async def script(call: Call) -> None:
        await call.head()
        await call.read()
        await call.reset()

    edge.serve(script)
    made = tunnel("/two/broken")
    made.send(b"x")
    assert not made.rest()[1]
    assert edge.record("/two/broken")["outcome"] == "failed"
    assert len(edge.twin.open("two")) == 1                      # the connection goes on
    if made.two is not None:
        assert made.two.get("/two/bytes/1")[0] == 200


def test_an_upstream_connection_that_is_lost_cuts_the_client(edge: Behind, tunnel: Open) -> None:
    several = [tunnel(f"/two/lost/{number}") for number in range(3)]
    for made in several:
        made.send(b"x")
        assert made.exactly(1) == b"x"
    (link,) = edge.twin.open("two")
    edge.twin.loop.call_soon_threadsafe(link.abort)
    for made in several:
        assert not made.rest()[1]
    assert [edge.record(f"/two/lost/{number}")["outcome"] for number in range(3)] == ["failed"] * 3


def test_a_client_that_breaks_off_cancels_the_stream(edge: Behind, tunnel: Open) -> None:
    made, other = tunnel("/two/leaves"), tunnel("/two/stays")
    made.send(b"x")
    assert made.exactly(1) == b"x"
    first, _ = edge.tunnels()
    made.cut()
    eventually(lambda: first.code == CANCEL, "the end at the service")
    assert edge.record("/two/leaves")["outcome"] == "aborted"
    other.send(b"still here")
    assert other.exactly(10) == b"still here"
    assert len(edge.twin.links) == 1


def test_trailers_are_no_end_of_a_tunnel(edge: Behind, tunnel: Open) -> None:
    """RFC 9113 8.5: of frames that make a message, a connected stream carries DATA alone."""

    async def script(call: Call) -> None:
        await call.head()
        await call.read()
        await call.finish([(b"x-late", b"yes")])
        await call.gone.wait()

    edge.serve(script)
    made = tunnel("/two/trailers")
    made.send(b"x")
    assert not made.rest()[1]
    (call,) = edge.tunnels()
    eventually(lambda: call.code == PROTOCOL_ERROR, "the error of the stream")
    assert len(edge.twin.open("two")) == 1


# -- what is held back


def test_a_side_that_does_not_read_stops_the_other_one(edge: Behind, tunnel: Open) -> None:
    """And nobody else: an ordinary request on the same upstream connection is served meanwhile. Then all of it passes."""
    said, sent = [0], [0]

    async def pour(call: Call) -> None:
        await call.head()

        async def speak() -> None:
            for _ in range(TOTAL // PIECE):
                for at in range(0, PIECE, 16384):
                    await call.write(PATTERN[at : at + 16384])
                    said[0] += 16384

        async def listen() -> None:
            await call.released()
            whole = 0
            left = bytearray()
            while (piece := await call.read()) is not None:
                left += piece
                while len(left) >= PIECE:
                    assert left[:PIECE] == PATTERN
                    del left[:PIECE]
                whole += len(piece)
            assert (whole, left) == (TOTAL, b"")

        await asyncio.gather(speak(), listen())
        await call.finish()

    def flood() -> None:
        for _ in range(TOTAL // PIECE):
            for at in range(0, PIECE, 16384):
                made.send(PATTERN[at : at + 16384])
                sent[0] += 16384

    edge.serve(pour)
    made = tunnel("/two/flood", receive=1 << 16)
    with Peak(edge.gateway.pids[0]) as peak:
        if isinstance(made.stream, Stream):
            writer = threading.Thread(target=flood)
            writer.start()
            assert settled(lambda: sent[0]) < KERNEL
        # The server has a window of the gateway's, what the gateway itself holds, and the client's kernel: not more.
        assert settled(lambda: said[0]) < KERNEL
        with connect(edge.gateway.port()) as other:
            answer = other.ask(get("/two/bytes/100000"))
            assert (answer.status, len(answer.body)) == (200, 100000)
        assert len(edge.twin.links) == 1
        edge.twin.release()
        if isinstance(made.stream, Stream):
            for _ in range(TOTAL // PIECE):
                assert made.exactly(PIECE) == PATTERN
            writer.join(PATIENCE)
            made.send(b"", end=True)
        else:
            for _ in range(TOTAL // PIECE):                     # by turns: this client has one thread
                made.send(PATTERN)
                assert made.exactly(PIECE) == PATTERN
            made.send(b"", end=True)
        assert made.rest() == (b"", True)
    assert peak.growth < GROWTH
    record = edge.record("/two/flood")
    assert (record["bytes_in"], record["bytes_out"], record["outcome"]) == (TOTAL, TOTAL, "answered")


def test_the_window_of_a_client_that_reads_nothing_is_all_that_is_held(edge: Behind) -> None:
    """Of HTTP/2, whose kernel takes all: the client's window, the gateway's piece, and the window of the stream behind it."""
    said = [0]

    async def pour(call: Call) -> None:
        await call.head()
        while said[0] < 16 << 20:
            await call.write(PATTERN[:4096])
            said[0] += 4096

    edge.serve(pour)
    with edge.client() as client:
        tunnel = client.tunnel("/two/window")
        client.until(lambda: len(tunnel.inbox) == 65535, "a full window")
        assert settled(lambda: said[0]) <= 65535 + (64 << 10) + WINDOW + 4096
        with edge.client() as another:
            status, body = another.get("/two/bytes/300000")
            assert (status, len(body)) == (200, 300_000)
        got = b""
        while len(got) < 1 << 20:
            got += read(tunnel)
        assert got == (PATTERN[:4096] * (len(got) // 4096 + 1))[: len(got)]


def test_a_client_that_reads_nothing_and_a_service_that_leaves(edge: Behind, tunnel: Open) -> None:
    """Bytes wait for the client, and bytes of its for the service: neither may hide that it is gone."""

    async def pour(call: Call) -> None:
        await call.head()
        try:
            for _ in range(KERNEL // 16384 * 2):
                await asyncio.wait_for(call.write(PATTERN[:16384]), 1)
        except TimeoutError:
            pass
        await call.reset()

    edge.serve(pour)
    made = tunnel("/two/deaf", receive=1 << 16)
    assert edge.record("/two/deaf")["outcome"] == "failed"     # though its client reads nothing
    assert not made.rest()[1]


# -- among other streams


def test_tunnels_and_requests_share_a_connection(edge: Behind, tunnel: Open) -> None:
    open_now = [tunnel(f"/two/{number}") for number in range(20)]
    with edge.client() as client:
        for turn in range(5):
            for number, each in enumerate(open_now):
                each.send(b"%04d%04d" % (number, turn))
            assert client.get("/two/bytes/1000")[0] == 200
            for number, each in enumerate(open_now):
                assert each.exactly(8) == b"%04d%04d" % (number, turn)
        for each in open_now[:10]:
            each.cut()
        for each in open_now[10:]:
            each.send(b"still here")
            assert each.exactly(10) == b"still here"
        assert client.get("/two/bytes/1000")[0] == 200
    assert len(edge.twin.links) == 1


@pytest.mark.parametrize("path", ["/pair", "/two"], ids=["ours", "theirs"])
def test_a_tunnel_is_one_of_the_streams_of_its_connection(edge: Behind, tunnel: Open, path: str) -> None:
    """With as many as may be, the next one goes out on another connection."""
    if path == "/two":
        edge.twin.first = {**OFFERS, SettingCodes.MAX_CONCURRENT_STREAMS: 2}
        edge.twin.offer = {int(SettingCodes.MAX_CONCURRENT_STREAMS): 2}
    try:
        made = [tunnel(f"{path}/{number}") for number in range(5)]
    finally:
        edge.twin.first = dict(OFFERS)
    for each in made:
        each.send(b"x")
        assert each.exactly(1) == b"x"
    assert [link.busiest for link in edge.twin.links] == [2, 2, 1]
    assert [link.refused for link in edge.twin.links] == [0, 0, 0]


def test_many_handshakes_at_once_on_a_connection_that_is_being_made(edge: Behind) -> None:
    """They wait for its SETTINGS together, and share what it allows."""
    clients = [connect(edge.gateway.port()) for _ in range(50)]
    for client in clients:
        client.send(handshake("/tls/rush"))
    for client in clients:
        assert client.head().status == 101
        client.send(b"x")
    for client in clients:
        assert client.exactly(1) == b"x"
        client.half_close()
        assert client.rest() == (b"", True)
        client.close()
    assert len(edge.tunnels()) == 50
    assert len(edge.twin.links) == 1                            # it allows 100


def test_a_goaway_lets_tunnels_go_on(edge: Behind, tunnel: Open) -> None:
    made = tunnel("/two/stays")
    (link,) = edge.twin.open("two")
    edge.twin.run(link.send(goaway(edge.tunnels()[0].stream)))
    with edge.client() as client:
        eventually(lambda: client.get("/two/bytes/1")[0] == 200 and len(edge.twin.links) == 2, "a new connection")
    made.send(b"still here", end=True)
    assert made.rest() == (b"still here", True)
    eventually(lambda: link.closed, "the end of the connection that was to end")


# -- ends of the gateway's making


def test_silence_ends_a_tunnel_and_talk_does_not(edge: Behind, tunnel: Open) -> None:
    made = tunnel("/idle/quiet")
    end = time.monotonic() + 1.2                                # longer than twice `idle`
    while time.monotonic() < end:
        made.send(b"x")
        assert made.exactly(1) == b"x"
        time.sleep(0.05)
    made.rest()
    (call,) = edge.tunnels()
    eventually(lambda: call.gone.is_set() or call.complete, "the end at the service")
    assert edge.record("/idle/quiet")["reason"] == "tunnel-idle"
    assert len(edge.twin.open("two")) == 1


def test_a_tunnel_ends_with_its_token(edge: Behind) -> None:
    soon = token(exp=int(time.time()) + 2)
    with edge.open("/bank/token", f"authorization: Bearer {soon}") as client:
        client.send(b"x")
        assert client.exactly(1) == b"x"
        client.rest()
    assert edge.record("/bank/token")["reason"] == "tunnel-expired"


def test_the_cap_of_a_route(edge: Behind, tunnel: Open) -> None:
    made = [tunnel("/few") for _ in range(3)]
    with connect(edge.gateway.port()) as client:
        answer = client.ask(handshake("/few"))
        assert (answer.status, b"too-many-tunnels" in answer.body) == (503, True)
    assert len(edge.tunnels()) == 3
    made[0].cut()
    eventually(lambda: edge.number('route_tunnels_open{http_route="few"}') == 2, "a free place")
    tunnel("/few")


def test_one_record_and_counters_tell_what_passed(edge: Behind, tunnel: Open) -> None:
    before = edge.gateway.metrics()
    made = tunnel("/two/told")
    made.send(b"a" * 1000)
    assert made.exactly(1000) == b"a" * 1000
    eventually(lambda: edge.number("tunnels_open") == 1, "the gauge")
    after = edge.gateway.metrics()
    for direction in ("in", "out"):
        name = f'crossway_tunnel_bytes_total{{direction="{direction}"}}'
        assert after[name] - before.get(name, 0) == 1000
    assert edge.records("/two/told") == []                      # at the end, and once
    made.send(b"b", end=True)
    assert made.rest() == (b"b", True)
    record = edge.record("/two/told")
    assert (record["status"], record["outcome"], record["bytes_in"], record["bytes_out"]) == (101, "answered", 1001, 1001)
    assert record["upstream"] == f"127.0.0.1:{edge.twin.two}"
    assert edge.number("tunnels_total") == before["crossway_tunnels_total"] + 1


@pytest.mark.parametrize("version", ["one", "two"])
def test_a_reload_keeps_tunnels(tmp_path: Path, version: str) -> None:
    with behind(tmp_path) as edge:
        made = Either(edge, version, "/two/kept")
        path = edge.configure(websocket="false")
        path.write_text(path.read_text().replace("protocol: http2, retries", "protocol: http2, http2: {streams: 7}, retries"))
        assert edge.gateway.command("reload").returncode == 0
        with connect(edge.gateway.port()) as other:             # on a connection of the new configuration, and no handshake any more
            assert other.ask(handshake("/two/new")).status == 200
        assert len(edge.twin.links) == 2
        made.send(PATTERN[:50_000])
        assert made.exactly(50_000) == PATTERN[:50_000]
        made.send(b"", end=True)
        assert made.rest() == (b"", True)
        made.close()
        edge.gateway.calm()


def test_a_drain_lets_tunnels_end_by_themselves(tmp_path: Path) -> None:
    with behind(tmp_path, drain="60s") as edge:
        with edge.open("/two/last") as client:
            edge.gateway.signal(signal.SIGTERM)
            eventually(lambda: "stopping" in edge.gateway.events(), "the drain")
            client.send(b"still here")
            assert client.exactly(10) == b"still here"
            client.half_close()
            assert client.rest() == (b"", True)
        assert edge.gateway.wait() == 0
        assert edge.record("/two/last")["outcome"] == "answered"


def test_a_drain_cuts_at_its_deadline_what_has_not_ended(tmp_path: Path) -> None:
    """And the records say that it was the gateway, neither client nor service."""
    with behind(tmp_path, drain="500ms") as edge:
        several = [edge.open(f"/two/cut/{number}") for number in range(3)]
        made = connect_h2(edge.gateway.port())                  # the h2 library takes nothing behind a GOAWAY
        fields = [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", "/two/cut/3"), (":authority", "b")]
        number = made.open([*fields, ("sec-websocket-version", "13")], end=False)
        assert made.headed(number).status == 200
        made.data(number, b"xyz", end=False)
        made.until(lambda: bytes(made.answer_of(number).body) == b"xyz", "the echo")
        for each in several:
            each.send(b"xyz")
            assert each.exactly(3) == b"xyz"
        os.kill(edge.gateway.pid, signal.SIGTERM)
        made.ended()
        assert not made.answer_of(number).ended
        made.sock.close()
        for each in several:
            assert not each.rest()[1]
            each.close()
        assert edge.gateway.wait() == 0
        for turn in range(4):
            record = edge.record(f"/two/cut/{turn}")
            assert (record["status"], record["outcome"], record["reason"]) == (101, "failed", "tunnel-cut")
            assert (record["bytes_in"], record["bytes_out"]) == (3, 3)
