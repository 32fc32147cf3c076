"""Raw TCP through a listener: bytes, ends and resets pass as they are, within bounds, and every connection leaves its line."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.bank import Peak, WatchedGateway
from tests.integration.faults import PATTERN, Cut, ScriptedOrigin, Stream, connect
from tests.integration.processes import PATIENCE, Gateway, eventually

CONFIG = """
version: 1
workers: {workers}
admin: {{bind: 127.0.0.1:0}}
drain: {{deadline: {drain}}}
listeners:
  raw: {{bind: 127.0.0.1:0, tcp: {{upstream: raw}}}}
  brief: {{bind: 127.0.0.1:0, tcp: {{upstream: raw, idle: 500ms}}}}
  few: {{bind: 127.0.0.1:0, tcp: {{upstream: raw, connections: 2}}}}
  lone: {{bind: 127.0.0.1:0, tcp: {{upstream: lone}}}}
  dead: {{bind: 127.0.0.1:0, tcp: {{upstream: dead}}}}
  half: {{bind: 127.0.0.1:0, tcp: {{upstream: half}}}}
  closed: {{bind: 127.0.0.1:0, tcp: {{upstream: raw, allow: [10.0.0.0/8]}}}}
  behind: {{bind: 127.0.0.1:0, proxy_protocol: required, tcp: {{upstream: raw, allow: [10.0.0.0/8], hello: 500ms}}}}
  told: {{bind: 127.0.0.1:0, proxy_protocol: optional, tcp: {{upstream: raw, proxy_protocol: v2}}}}
upstreams:
  raw: {{targets: [127.0.0.1:{origin}]}}
  lone: {{targets: [127.0.0.1:{origin}], limits: {{connections: 1}}}}
  dead: {{targets: [127.0.0.1:1], retries: 0}}
  half: {{targets: [127.0.0.1:1, 127.0.0.1:{origin}], balance: round_robin, retries: 3}}
"""


def echo(origin: ScriptedOrigin, stream: Stream) -> None:
    while piece := stream.sock.recv(1 << 16):
        stream.sock.sendall(piece)


def write(folder: Path, origin: int, *, workers: int = 1, drain: str = "30s") -> Path:
    path = folder / "edge.yaml"
    path.write_text(CONFIG.format(origin=origin, workers=workers, drain=drain))
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WatchedGateway, ScriptedOrigin]]:
    origin = ScriptedOrigin(echo)
    with WatchedGateway(write(tmp_path_factory.mktemp("tcp"), origin.port)) as gateway:
        yield gateway, origin
    origin.close()


@pytest.fixture
def origin(shared: tuple[WatchedGateway, ScriptedOrigin]) -> Iterator[ScriptedOrigin]:
    shared[1].script = echo
    yield shared[1]
    shared[1].reset()


@pytest.fixture
def gateway(shared: tuple[WatchedGateway, ScriptedOrigin], origin: ScriptedOrigin) -> Iterator[WatchedGateway]:
    yield shared[0]
    shared[0].calm()


def lines(gateway: Gateway, listener: str) -> list[dict[str, Any]]:
    return [line for line in gateway.log() if line.get("logger") == "crossway.tcp" and line["listener"] == listener]


def knock(gateway: Gateway, listener: str, *pieces: bytes) -> tuple[bytes, int]:
    """What a client hears until its connection is over, and its port. It may be reset before it knows that it was connected."""
    with socket.socket() as sock:
        sock.settimeout(PATIENCE)
        sock.bind(("127.0.0.1", 0))
        heard = b""
        with contextlib.suppress(ConnectionError):
            sock.connect(("127.0.0.1", gateway.port(listener)))
            sock.sendall(b"".join(pieces))
            while piece := sock.recv(1 << 16):
                heard += piece
        return heard, sock.getsockname()[1]


def reason(gateway: Gateway, stream: Stream | int, listener: str) -> str:
    """Why the connection of this client (or of this port) ended, once the log says so."""
    port = stream if isinstance(stream, int) else stream.sock.getsockname()[1]
    found = eventually(lambda: [line for line in lines(gateway, listener) if line["client_port"] == port], "the line of the connection")
    assert len(found) == 1
    return str(found[0]["reason"])


def test_bytes_pass_as_they_come_and_leave_one_line(gateway: WatchedGateway) -> None:
    with connect(gateway.port("raw")) as client:
        port = client.sock.getsockname()[1]
        for piece in (b"a", b"\x00\xff" * 100, PATTERN):
            client.send(piece)
            assert client.exactly(len(piece)) == piece
        client.half_close()
        assert client.rest() == (b"", True)
    line = eventually(lambda: [each for each in lines(gateway, "raw") if each["client_port"] == port])[0]
    sent = 201 + len(PATTERN)
    assert (line["client"], line["upstream"], line["reason"]) == ("127.0.0.1", "raw", "closed")
    assert (line["bytes_in"], line["bytes_out"]) == (sent, sent) and line["duration_us"] > 0
    assert line["endpoint"].startswith("127.0.0.1:")


def test_a_server_that_speaks_first(gateway: WatchedGateway, origin: ScriptedOrigin) -> None:
    def greet(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.send(b"220 ready\r\n")
        assert stream.until(b"\r\n") == b"QUIT"
        stream.send(b"221 bye\r\n")

    origin.script = greet
    with connect(gateway.port("raw")) as client:
        assert client.until(b"\r\n") == b"220 ready"
        client.send(b"QUIT\r\n")
        assert client.rest() == (b"221 bye\r\n", True)


@pytest.mark.parametrize("first", ["client", "server"])
def test_an_end_of_one_side_passes_while_the_other_goes_on(gateway: WatchedGateway, origin: ScriptedOrigin, first: str) -> None:
    def last(origin: ScriptedOrigin, stream: Stream) -> None:
        if first == "server":
            stream.half_close()
        got, clean = stream.rest()
        assert (got, clean) == (PATTERN, True)
        if first == "client":
            stream.send(b"got ", str(len(got)).encode())

    origin.script = last
    with connect(gateway.port("raw")) as client:
        if first == "server":
            assert client.rest() == (b"", True)
        client.send(PATTERN)
        client.half_close()
        if first == "client":
            assert client.rest() == (b"got %d" % len(PATTERN), True)
        assert reason(gateway, client, "raw") == "closed"


def test_a_reset_of_the_client_reaches_the_server_as_one(gateway: WatchedGateway, origin: ScriptedOrigin) -> None:
    ended: list[bool] = []

    def watch(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.exactly(2)
        origin.seen.release()
        ended.append(stream.rest()[1])
        origin.seen.release()

    origin.script = watch
    client = connect(gateway.port("raw"))
    port = client.sock.getsockname()[1]
    client.send(b"hi")
    origin.saw()
    client.reset()
    origin.saw()
    assert ended == [False]
    assert reason(gateway, port, "raw") == "client-reset"


def test_a_reset_of_the_server_reaches_the_client_as_one(gateway: WatchedGateway, origin: ScriptedOrigin) -> None:
    def leave(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.exactly(2)
        stream.reset()

    origin.script = leave
    with connect(gateway.port("raw")) as client:
        client.send(b"hi")
        assert client.rest() == (b"", False)
        assert reason(gateway, client, "raw") == "upstream-reset"


@pytest.mark.parametrize("slow", ["client", "server"])
def test_a_side_that_does_not_read_costs_bounded_memory(gateway: WatchedGateway, origin: ScriptedOrigin, slow: str) -> None:
    size = 64 << 20

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        if slow == "client":
            stream.exactly(1)  # unread bytes would make its close a reset
            stream.send(PATTERN * (size >> 20))
        else:
            origin.go.wait(PATIENCE)
            got = 0
            while piece := stream.sock.recv(1 << 20):
                got += len(piece)
            assert got == size
            stream.send(b"all")

    origin.script = script
    with connect(gateway.port("raw"), receive=4096) as client, Peak(gateway.pids[0]) as peak:
        if slow == "client":
            client.send(b"x")
            eventually(lambda: gateway.metrics().get('crossway_tcp_bytes_total{direction="out",listener="raw",upstream="raw"}', 0) > 0)
            got = 0
            while got < size:
                got += len(client.sock.recv(1 << 20))
        else:
            client.sock.settimeout(2)
            sent = 0
            with pytest.raises(TimeoutError):
                while True:
                    sent += client.sock.send(PATTERN)
            assert sent < size
            client.sock.settimeout(PATIENCE)
            origin.go.set()
            while sent < size:
                start = sent % len(PATTERN)
                sent += client.sock.send(PATTERN[start : start + size - sent])
            client.half_close()
            assert client.rest() == (b"all", True)
    assert peak.growth < 8 << 20, f"{peak.growth >> 10} KiB"


def test_silence_ends_it(gateway: WatchedGateway) -> None:
    with connect(gateway.port("brief")) as client:
        client.send(b"hi")
        assert client.exactly(2) == b"hi"
        assert client.rest() == (b"", True)
        assert reason(gateway, client, "brief") == "idle"


def test_more_than_there_may_be_are_refused(gateway: WatchedGateway) -> None:
    held = [connect(gateway.port("few")) for _ in range(2)]
    for stream in held:
        stream.send(b"x")
        assert stream.exactly(1) == b"x"
    heard, port = knock(gateway, "few")
    assert heard == b"" and reason(gateway, port, "few") == "full"
    opened = 'crossway_tcp_connections_open{listener="few",upstream="raw"}'
    assert gateway.metrics()[opened] == 2
    held.pop().close()
    eventually(lambda: gateway.metrics()[opened] == 1)
    with connect(gateway.port("few")) as again:
        again.send(b"y")
        assert again.exactly(1) == b"y"
    held.pop().close()


def test_the_limit_of_the_upstream_counts(gateway: WatchedGateway) -> None:
    with connect(gateway.port("lone")) as first:
        first.send(b"x")
        assert first.exactly(1) == b"x"
        heard, port = knock(gateway, "lone")
        assert heard == b"" and reason(gateway, port, "lone") == "full"


def test_nobody_there(gateway: WatchedGateway) -> None:
    heard, port = knock(gateway, "dead")
    assert heard == b"" and reason(gateway, port, "dead") == "unreachable"


def test_another_endpoint_takes_over_before_anything_was_sent(gateway: WatchedGateway) -> None:
    for number in range(8):
        with connect(gateway.port("half")) as client:
            client.send(b"%d" % number)
            assert client.exactly(1) == b"%d" % number
    assert gateway.metrics()['crossway_tcp_connect_failures_total{listener="half",upstream="half"}'] >= 1
    rows = gateway.admin("/upstreams")[1]["upstreams"]
    half = next(row for row in rows if row["name"] == "half")
    bad = next(each for each in half["endpoints"] if each["address"] == "127.0.0.1:1")
    assert bad["counters"]["connect"] >= 1
    eventually(lambda: next(row for row in gateway.admin("/upstreams")[1]["upstreams"] if row["name"] == "half")["in_flight"] == 0)


def test_who_may_not_come_is_refused_by_the_address_that_counts(gateway: WatchedGateway, origin: ScriptedOrigin) -> None:
    before = origin.accepted
    heard, port = knock(gateway, "closed")
    assert heard == b"" and reason(gateway, port, "closed") == "forbidden"
    for header, passes in [
        (b"PROXY TCP4 10.1.2.3 10.0.0.1 4711 5432\r\n", True),
        (b"PROXY TCP4 11.1.2.3 10.0.0.1 4712 5432\r\n", False),
        (b"PROXY UNKNOWN\r\n", False),
        (b"no header at all\r\n", False),
        (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x0a\1\2\3\x0a\0\0\1\x12\x68\x15\x38", True),
    ]:
        with connect(gateway.port("behind")) as client:
            with contextlib.nullcontext() if passes else contextlib.suppress(OSError):  # refused, it may be gone before we end
                client.send(header, b"hello")
                client.half_close()
            assert client.rest()[0] == (b"hello" if passes else b"")
    assert origin.accepted == before + 2
    found = eventually(lambda: [line for line in lines(gateway, "behind") if line["client"].startswith("10.")])
    assert (found[0]["client"], found[0]["client_port"]) == ("10.1.2.3", 4711)


def test_who_never_sends_its_header_is_dropped(gateway: WatchedGateway) -> None:
    with connect(gateway.port("behind")) as client:
        client.send(b"PROXY TCP4 ")
        assert client.rest()[0] == b""
        assert reason(gateway, client, "behind") == "handshake"


def test_the_upstream_is_told_who_the_client_is(gateway: WatchedGateway, origin: ScriptedOrigin) -> None:
    heads: list[bytes] = []

    def take(origin: ScriptedOrigin, stream: Stream) -> None:
        head = stream.exactly(16)
        heads.append(head + stream.exactly(struct.unpack(">H", head[14:])[0]))
        stream.send(stream.exactly(2))

    origin.script = take
    with connect(gateway.port("told")) as client:
        client.send(b"hi")
        assert client.exactly(2) == b"hi"
        own = client.sock.getsockname()[1]
    with connect(gateway.port("told")) as client:
        client.send(b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 5432\r\nhi")
        assert client.exactly(2) == b"hi"
    signature = b"\r\n\r\n\0\r\nQUIT\n"
    here = socket.inet_aton("127.0.0.1")
    port = struct.pack(">H", gateway.port("told"))
    assert heads[0] == signature + b"\x21\x11\0\x0c" + here + here + struct.pack(">H", own) + port
    assert heads[1] == (
        signature + b"\x21\x21\0\x24" + socket.inet_pton(socket.AF_INET6, "2001:db8::7") + bytes(10) + b"\xff\xff" + here
        + struct.pack(">H", 4711) + port
    )  # fmt: skip


def test_strangers_cannot_flood_the_log(gateway: WatchedGateway) -> None:
    before = len(lines(gateway, "closed"))
    metric = 'crossway_tcp_connections_ended_total{listener="closed",reason="forbidden",upstream=""}'
    counted = gateway.metrics().get(metric, 0)
    for _ in range(300):
        knock(gateway, "closed")
    eventually(lambda: gateway.metrics()[metric] == counted + 300)
    seconds = {line["ts"][:19] for line in lines(gateway, "closed")[before:]}
    assert len(lines(gateway, "closed")) - before <= 20 * (len(seconds) + 1)


# -- the life of the processes


def test_a_drain_lets_connections_go_on_until_its_deadline_then_cuts_them(tmp_path: Path) -> None:
    origin = ScriptedOrigin(echo)
    with Gateway(write(tmp_path, origin.port, drain="2s")) as gateway:
        client = connect(gateway.port("raw"))
        client.send(b"x")
        assert client.exactly(1) == b"x"
        silent = connect(gateway.port("behind"))
        gateway.signal(signal.SIGTERM)
        eventually(lambda: silent.rest()[0] == b"", "the end of who had said nothing")
        client.send(b"still here")
        assert client.exactly(10) == b"still here"
        assert client.rest() == (b"", False)
        assert gateway.wait() == 0
        assert [line["reason"] for line in lines(gateway, "raw")] == ["cut"]
        cut = [line["exchange"] for line in gateway.log() if line["event"] == "exchange cut off at the end of the drain"]
        assert [each["listener"] for each in cut] == ["raw"]
    origin.close()


def test_a_drain_ends_with_the_last_connection(tmp_path: Path) -> None:
    origin = ScriptedOrigin(echo)
    with Gateway(write(tmp_path, origin.port, drain="1h")) as gateway:
        client = connect(gateway.port("raw"))
        client.send(b"x")
        assert client.exactly(1) == b"x"
        gateway.signal(signal.SIGTERM)
        client.send(b"y")
        assert client.exactly(1) == b"y"
        client.close()
        assert gateway.wait() == 0
        assert [line["reason"] for line in lines(gateway, "raw")] == ["closed"]
    origin.close()


def test_a_reload_leaves_connections_alone(tmp_path: Path) -> None:
    origin, other = ScriptedOrigin(echo), ScriptedOrigin(lambda _, stream: stream.send(b"other"))
    path = write(tmp_path, origin.port, workers=2)
    with Gateway(path) as gateway:
        client = connect(gateway.port("raw"))
        client.send(b"x")
        assert client.exactly(1) == b"x"
        write(tmp_path, other.port, workers=2)
        assert gateway.command("reload").returncode == 0
        client.send(b"y")
        assert client.exactly(1) == b"y"
        with connect(gateway.port("raw")) as fresh:
            assert fresh.rest()[0] == b"other"
        client.close()
        shown = gateway.command("status").stdout
        assert f"listener   raw on 127.0.0.1:{gateway.port('raw')} (raw TCP)" in shown
    origin.close()
    other.close()


def test_a_killed_worker_costs_its_own_connections_and_gives_back_their_places(tmp_path: Path) -> None:
    origin = ScriptedOrigin(echo)
    with WatchedGateway(write(tmp_path, origin.port, workers=1)) as gateway:
        held = [connect(gateway.port("few")) for _ in range(2)]
        for stream in held:
            stream.send(b"x")
            assert stream.exactly(1) == b"x"
        os.kill(gateway.pids[0], signal.SIGKILL)
        for stream in held:
            assert stream.rest()[0] == b""

        def served() -> bool:
            try:
                with connect(gateway.port("few")) as stream:
                    stream.send(b"x")
                    return stream.exactly(1) == b"x"
            except (Cut, OSError):
                return False

        eventually(served, "a place")
        name = 'crossway_tcp_connections_opened_total{listener="few",upstream="raw"}'
        eventually(lambda: gateway.metrics()[name] >= 3, "the counts of both lives")
    origin.close()
