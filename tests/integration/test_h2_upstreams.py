"""Upstreams that speak HTTP/2: how many streams and connections they see, and what becomes of requests when they refuse, leave or lie."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.bank import Peak, WatchedGateway
from tests.integration.faults import ScriptedOrigin, Stream
from tests.integration.h2_kit import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW,
    MAX_STREAMS,
    PUSH_PROMISE,
    REFUSED_STREAM,
    SETTINGS,
    Answer,
    H2Client,
    block,
    connect_h2,
    frame,
    head,
    headers,
    literal,
    ping,
    rst,
    settings,
    window_update,
)
from tests.integration.h2_origin import Call, TwinOrigin, by_path
from tests.integration.h2_pairs import Pair, exchange
from tests.integration.h2_subject import Subject
from tests.integration.processes import PATIENCE, eventually

TWO = """
version: 1
workers: 1
admin: {bind: "127.0.0.1:0"}
listeners: {two: {bind: "127.0.0.1:0", http2: {clear: true}}}
"""


@contextlib.contextmanager
def configured(folder: Path, rest: str) -> Iterator[H2Client]:
    """A gateway of its own, with upstreams and routes as said, and a client of it; no endpoint may be blamed for anything at the end."""
    path = folder / "edge.yaml"
    path.write_text(TWO + rest)
    with WatchedGateway(path) as gateway, connect_h2(gateway.port("two")) as client:
        yield client
        found = gateway.metrics()
    assert {value for name, value in found.items() if "endpoint_attempts" in name and 'outcome="connect"' in name} == {0.0}


def problem(answer: Answer) -> tuple[int, str]:
    return answer.status, json.loads(bytes(answer.body))["type"].rpartition(":")[2]


# -- connections and streams


def test_what_finds_no_stream_on_as_many_connections_as_there_may_be_waits(tmp_path: Path) -> None:
    """It has its turn like whoever waits for a place, and no endpoint is to blame."""
    config = """
upstreams:
  bank: {targets: ["127.0.0.1:%d"], protocol: http2, http2: {streams: 2}, limits: {connections: 1, queue: 30s}}
routes: [{name: all, match: {prefix: /}, upstream: bank}]
"""
    with TwinOrigin() as origin:
        with configured(tmp_path, config % origin.two) as client:
            streams = [client.open(head("/held", "POST")) for _ in range(12)]
            origin.saw(2)
            client.barrier()
            origin.release()
            assert [client.answer(stream).status for stream in streams] == [200] * 12
        assert len(origin.links) == 1


def test_an_idle_connection_makes_room_for_one_to_another_endpoint(tmp_path: Path) -> None:
    config = """
upstreams:
  one: {targets: [%s], balance: round_robin, limits: {connections: 1}}
  two: {targets: [%s], balance: round_robin, protocol: http2, limits: {connections: 1}}
routes:
  - {name: one, match: {prefix: /one}, upstream: one}
  - {name: two, match: {prefix: /}, upstream: two}
"""
    with TwinOrigin() as a, TwinOrigin() as b:
        targets = tuple(", ".join(f"127.0.0.1:{port}" for port in ports) for ports in ((a.one, b.one), (a.two, b.two)))
        with configured(tmp_path, config % targets) as client:
            for way in ("/one", "/two"):
                for _ in range(20):
                    assert client.ask(head(way, "POST"), b"pay").status == 200
            assert {len(a.calls), len(b.calls)} == {20}


def test_streams_share_a_connection(h2: Subject) -> None:
    with h2.client() as client:
        streams = [client.open(head("/two/held")) for _ in range(20)]
        h2.origin.saw(20)
        assert [link.busiest for link in h2.origin.links] == [20]
        h2.origin.release()
        assert [client.answer(stream).status for stream in streams] == [200] * 20


def test_the_servers_limit_of_streams_is_kept(h2: Subject) -> None:
    h2.origin.offer = {MAX_STREAMS: 3}
    with h2.client() as client:
        assert client.ask(head("/two/bytes/1")).status == 200                   # the limit is known from here on
        streams = [client.open(head("/two/held")) for _ in range(10)]
        h2.origin.saw(10)
        assert max(link.busiest for link in h2.origin.links) == 3
        assert len(h2.origin.open("two")) == 4
        assert h2.origin.links[0].refused == 0                                  # its limit was known
        h2.origin.release()
        assert [client.answer(stream).status for stream in streams] == [200] * 10


def test_a_limit_that_is_not_known_yet_fails_nobody(h2: Subject) -> None:
    """Requests that were sent before the server's SETTINGS came are refused there, and go elsewhere."""
    h2.origin.offer = {MAX_STREAMS: 1}
    with h2.client() as client:
        streams = [client.open(head("/two/bytes/10")) for _ in range(8)]
        assert [client.answer(stream).status for stream in streams] == [200] * 8


def test_the_configured_limit_of_streams_is_kept(h2: Subject) -> None:
    with h2.client() as client:
        streams = [client.open(head("/few/held")) for _ in range(7)]
        h2.origin.saw(7)
        assert max(link.busiest for link in h2.origin.links) == 2
        assert len(h2.origin.open("two")) == 4
        h2.origin.release()
        assert [client.answer(stream).status for stream in streams] == [200] * 7


def test_a_finished_stream_makes_room_on_its_connection(h2: Subject) -> None:
    with h2.client() as client:
        for _ in range(30):
            assert client.ask(head("/few/bytes/10")).status == 200
        assert len(h2.origin.links) == 1


def test_a_limit_that_sinks_while_streams_are_open(h2: Subject) -> None:
    with h2.client() as client:
        streams = [client.open(head("/two/held")) for _ in range(6)]
        h2.origin.saw(6)
        for link in h2.origin.open("two"):
            h2.origin.run(link.send(settings((MAX_STREAMS, 1))))
        client.barrier()
        late = client.open(head("/two/held"))
        h2.origin.saw()
        h2.origin.release()
        assert [client.answer(stream).status for stream in [*streams, late]] == [200] * 7


def test_a_window_of_nothing_holds_a_body_until_it_opens(h2: Subject) -> None:
    h2.origin.offer = {INITIAL_WINDOW: 0}
    with h2.client() as client:
        assert client.ask(head("/two/bytes/5")).status == 200                   # so that the setting is known
        stream = client.open(head("/two/report", "POST"), end=False)
        client.data(stream, b"x" * 100)
        eventually(lambda: len(h2.origin.calls) == 2, "the request's head")
        client.barrier()
        assert h2.origin.calls[1].received == 0
        h2.origin.run(h2.origin.links[0].send(settings((INITIAL_WINDOW, 65535))))
        assert client.answer(stream).status == 200
        assert h2.origin.calls[1].received == 100


def test_many_streams_are_served_beside_a_large_one(h2: Subject) -> None:
    """Fairness: nobody waits until the large answer is through."""
    with h2.client(offer={INITIAL_WINDOW: 1 << 20}) as client:
        client.send(window_update(0, 1 << 24))
        large = client.open(head("/two/bytes/67108864"))
        client.until(lambda: len(client.answer_of(large).body) > 100_000, "some of the large answer")
        small = [client.open(head("/two/bytes/20000")) for _ in range(40)]
        assert [len(client.answer(stream).body) for stream in small] == [20_000] * 40
        assert not client.answer_of(large).over
        client.send(rst(large))
        client.barrier()


def test_clients_that_do_not_read_starve_nobody_who_shares_their_upstream_connection(h2: Subject) -> None:
    """Eight answers fill the upstream connection's window; another client's request has to find a way all the same."""
    with h2.client(offer={INITIAL_WINDOW: 0}, credit=False) as lazy, h2.client() as busy:
        streams = [lazy.open(head("/narrow/bytes/1000000")) for _ in range(8)]
        for stream in streams:
            lazy.headed(stream)
        for _ in range(5):
            assert len(busy.ask(head("/narrow/bytes/200000")).body) == 200_000
        for stream in streams:
            lazy.send(rst(stream))
        lazy.barrier()


def test_clients_that_do_not_read_do_not_hold_what_is_under_way_for_others(h2: Subject) -> None:
    """The others' answers began before, on the same connection, and end while the lazy ones are not taken."""
    go = threading.Event()
    chunk = b"x" * 400_000

    async def script(call: Call) -> None:
        while "patient" in call.path and not go.is_set():
            await asyncio.sleep(0.01)
        await call.answer(chunk)

    h2.origin.script = script
    with h2.client(offer={INITIAL_WINDOW: 0}, credit=False) as lazy, h2.client() as patient:
        waiting = [patient.open(head(f"/two/patient/{n}")) for n in range(4)]
        streams = [lazy.open(head(f"/two/lazy/{n}")) for n in range(40)]
        for stream in streams:
            lazy.headed(stream)
        assert len({id(call.link) for call in h2.origin.calls}) == 1
        go.set()
        for stream in waiting:
            assert len(patient.answer(stream).body) == len(chunk)
        for stream in streams:
            lazy.send(rst(stream))
        lazy.barrier()


# -- refused, gone


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_was_refused_is_sent_again_once(h2: Subject, method: str) -> None:
    """REFUSED_STREAM says that nothing was done (RFC 9113 8.7): even a payment may be sent again."""
    executed = []

    async def script(call: Call) -> None:
        body = await call.body()
        if len(h2.origin.calls) == 1:
            await call.reset(REFUSED_STREAM)
            return
        executed.append(body)
        await call.answer(b"done")

    h2.origin.script = script
    with h2.client() as client:
        answer = client.ask(head("/two/x", method), b"pay" if method == "POST" else None)
    assert (answer.status, bytes(answer.body)) == (200, b"done")
    assert executed == [b"pay" if method == "POST" else b""]
    assert len(h2.origin.calls) == 2


@pytest.mark.parametrize("body", [b"pay", b""])
def test_what_is_sent_again_ends_with_its_trailers(h2: Subject, body: bytes) -> None:
    async def script(call: Call) -> None:
        await call.body()
        if len(h2.origin.calls) == 1:
            await call.reset(REFUSED_STREAM)
        else:
            await call.answer(b"done")

    h2.origin.script = script
    with h2.client() as client:
        stream = client.open(head("/two/x", "POST", ("te", "trailers")), end=False)
        if body:
            client.data(stream, body, end=False)
        client.send(headers(stream, [("x-digest", "of the body")]))
        assert client.answer(stream).status == 200
    assert [call.trailers for call in h2.origin.calls] == [[("x-digest", "of the body")]] * 2


def test_who_always_refuses_is_not_asked_for_ever(h2: Subject) -> None:
    async def script(call: Call) -> None:
        await call.reset(REFUSED_STREAM)

    h2.origin.script = script
    with h2.client() as client:
        answer = client.ask(head("/two/x", "POST"), b"pay")
    assert answer.status in (502, 503)
    assert "may have been executed" not in json.loads(bytes(answer.body))["detail"]
    assert len(h2.origin.calls) <= 4


@pytest.mark.parametrize("read_before", [False, True])
def test_whether_it_may_have_been_executed_is_known_however_often_it_was_tried(tmp_path: Path, read_before: bool) -> None:
    """A refusal takes back what was sent by its own attempt, and no other one's."""
    config = """
version: 1
workers: 1
admin: {bind: "127.0.0.1:0"}
listeners: {two: {bind: "127.0.0.1:0", http2: {clear: true}}}
upstreams:
  bank:
    targets: [%s]
    protocol: http2
    retries: {attempts: 1, on: [connect-failure, reset], backoff: {base: 1ms, max: 1ms}}
    health: {eject: {failures: 0}}
routes: [{name: all, match: {prefix: /}, upstream: bank}]
"""

    async def script(call: Call) -> None:
        await call.body()
        if read_before and sum(each.path == call.path for each in origin.calls) == 1:
            await call.reset()
        else:
            await call.reset(REFUSED_STREAM)

    with TwinOrigin() as origin, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        origin.script = script
        targets = [origin.two] if read_before else [origin.two, nobody.getsockname()[1]]
        path = tmp_path / "edge.yaml"
        path.write_text(config % ", ".join(f"127.0.0.1:{port}" for port in targets))
        with WatchedGateway(path) as gateway, connect_h2(gateway.port("two")) as client:
            for number in range(20):
                answer = client.ask(head(f"/{number}", "PUT" if read_before else "POST"), b"pay")
                said = json.loads(bytes(answer.body))["detail"]
                assert (answer.status, "may have been executed" in said) == ((502, True) if read_before else (503, False)), said


def test_what_stands_above_the_last_id_of_a_goaway_goes_elsewhere(h2: Subject) -> None:
    executed = []

    async def script(call: Call) -> None:
        body = await call.body()
        if call.link is h2.origin.links[0]:
            await call.link.goaway(0)
            call.done = True
            return
        executed.append(body)
        await call.answer(b"done")

    h2.origin.script = script
    with h2.client() as client:
        answer = client.ask(head("/two/x", "POST"), b"pay")
    assert (answer.status, bytes(answer.body)) == (200, b"done")
    assert executed == [b"pay"]
    assert len(h2.origin.links) == 2


def test_what_a_goaway_promises_to_finish_is_waited_for(h2: Subject) -> None:
    async def script(call: Call) -> None:
        if call.path == "/two/first":
            await call.link.goaway(call.stream)
            h2.origin.seen.release()
            await call.released()
        await call.answer(call.path.encode())

    h2.origin.script = script
    with h2.client() as client:
        first = client.open(head("/two/first", "POST"))
        h2.origin.saw()
        client.barrier()
        assert bytes(client.ask(head("/two/second")).body) == b"/two/second"     # on a new connection
        h2.origin.release()
        assert bytes(client.answer(first).body) == b"/two/first"
        assert len(h2.origin.links) == 2
        eventually(lambda: h2.origin.links[0].closed, "the end of the connection that was given up")


def test_a_goaway_of_two_steps_loses_nothing(h2: Subject) -> None:
    """As servers drain: first the highest id there is, then the real one."""

    async def script(call: Call) -> None:
        if call.path == "/two/last":
            await call.link.goaway(2**31 - 1)
            await call.link.goaway(call.stream)
        await call.answer(call.path.encode())

    h2.origin.script = script
    with h2.client() as client:
        for turn in range(20):
            path = "/two/last" if turn % 3 == 2 else "/two/x"
            assert bytes(client.ask(head(path, "POST"), b"pay").body) == path.encode()
    assert len(h2.origin.calls) == 20


def test_an_idle_connection_that_was_closed_is_no_failure(h2: Subject) -> None:
    with h2.client() as client:
        for _ in range(5):
            assert client.ask(head("/two/report", "POST"), b"pay").status == 200
            h2.origin.loop.call_soon_threadsafe(h2.origin.links[-1].writer.close)
            eventually(lambda: not h2.origin.open("two"), "the end of the connection")
            eventually(lambda: not h2.watched.metrics()['crossway_upstream_connections{state="idle"}'], "the gateway's knowledge of it")


def test_a_connection_that_dies_fails_all_its_streams_and_no_post_is_sent_again(h2: Subject) -> None:
    async def script(call: Call) -> None:
        await call.body()
        h2.origin.seen.release()
        await call.released()
        call.link.abort()
        call.done = True

    h2.origin.script = script
    with h2.client() as client:
        streams = [client.open(head("/two/x", "POST")) for _ in range(10)]
        h2.origin.saw(10)
        h2.origin.release()
        assert {client.answer(stream).status for stream in streams} == {502}
        assert len(h2.origin.calls) == 10
        h2.origin.script = by_path
        assert client.ask(head("/two/bytes/5")).status == 200


def test_a_silent_upstream_is_a_timeout_of_its_stream_alone(h2: Subject) -> None:
    with h2.client() as client:
        good = client.open(head("/brief/echo", "POST"), end=False)
        client.data(good, b"a", end=False)
        client.until(lambda: client.answer_of(good).body, "the echo")
        silent = client.open(head("/brief/held", "POST"))
        stop = threading.Event()
        answer = client.answer_of(silent)
        while not answer.over and not stop.wait(0.02):
            client.data(good, b"a", end=False)                                  # the neighbour lives
            client.barrier()
        assert problem(answer) == (504, "upstream-head-timeout")
        client.data(good, b"end")
        assert client.answer(good).ended
        assert len(h2.origin.links) == 1
        eventually(lambda: h2.origin.calls[1].gone.is_set(), "the reset at the upstream")


# -- upstreams that lie: bytes

OK = [(":status", "200")]
Reply = Callable[[int], bytes]


def lying(reply: Reply, *, first: bytes | None = None) -> Callable[[ScriptedOrigin, Stream], None]:
    """A server that answers each request by these bytes."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        assert stream.exactly(24).startswith(b"PRI * HTTP/2.0")
        stream.send(settings() if first is None else first)
        while True:
            size = int.from_bytes(stream.exactly(3), "big")
            kind, flags, number = struct.unpack("!BBI", stream.exactly(6))
            stream.exactly(size)
            if kind == SETTINGS and not flags & ACK:
                stream.send(frame(SETTINGS, ACK))
            if flags & END_STREAM and kind in (HEADERS, DATA):
                stream.send(reply(number))

    return script


def answered(stream: int, fields: list[tuple[str, str]], body: bytes = b"") -> bytes:
    return headers(stream, fields, end=not body) + (frame(DATA, END_STREAM, stream, body) if body else b"")


BAD_ANSWERS: dict[str, Reply] = {
    "no :status": lambda s: answered(s, [("x", "y")]),
    "an empty :status": lambda s: answered(s, [(":status", "")]),
    ":status of two digits": lambda s: answered(s, [(":status", "20")]),
    ":status of four digits": lambda s: answered(s, [(":status", "2000")]),
    ":status with a reason": lambda s: answered(s, [(":status", "200 OK")]),
    ":status with a line end": lambda s: answered(s, [(":status", "200\r\nx: y")]),
    ":status 099": lambda s: answered(s, [(":status", "099")]),
    "two :status": lambda s: answered(s, [*OK, *OK]),
    ":status behind a field": lambda s: answered(s, [("x", "y"), *OK]),
    "a pseudo-header of requests": lambda s: answered(s, [*OK, (":path", "/")]),
    "101": lambda s: answered(s, [(":status", "101")]),
    "a name in upper case": lambda s: answered(s, [*OK, ("X-Upper", "y")]),
    "an empty name": lambda s: answered(s, [*OK, ("", "y")]),
    "a name with a space": lambda s: answered(s, [*OK, ("x y", "z")]),
    "a name with a colon": lambda s: answered(s, [*OK, ("x:y", "z")]),
    "a value with a line end": lambda s: answered(s, [*OK, ("x", "y\r\nset-cookie: a=b")]),
    "a value with a NUL": lambda s: answered(s, [*OK, ("x", "y\0z")]),
    "connection": lambda s: answered(s, [*OK, ("connection", "close")]),
    "transfer-encoding": lambda s: answered(s, [*OK, ("transfer-encoding", "chunked")], b"0\r\n\r\n"),
    "two lengths": lambda s: answered(s, [*OK, ("content-length", "1"), ("content-length", "2")], b"a"),
    "a length without a number": lambda s: answered(s, [*OK, ("content-length", "+1")], b"a"),
    "an interim answer that ends": lambda s: answered(s, [(":status", "103")]),
    "DATA before HEADERS": lambda s: frame(DATA, END_STREAM, s, b"x"),
    "DATA behind an interim answer": lambda s: headers(s, [(":status", "103")], end=False) + frame(DATA, END_STREAM, s, b"x"),
    "a header block that cannot be decoded": lambda s: frame(HEADERS, END_HEADERS | END_STREAM, s, b"\x80"),
    "HEADERS on another stream": lambda s: answered(s + 2, OK),
    "HEADERS on an even stream": lambda s: answered(2, OK),
    "PUSH_PROMISE": lambda s: frame(PUSH_PROMISE, END_HEADERS, s, struct.pack("!I", 2) + block(head())),
    "a frame too large": lambda s: frame(DATA, 0, s, b"x" * 16385),
    "DATA on stream 0": lambda s: frame(DATA, 0, 0, b"x"),
    "SETTINGS of 5 bytes": lambda s: frame(SETTINGS, 0, 0, b"12345"),
    "WINDOW_UPDATE of 0": lambda s: window_update(0, 0),
    "window overflow": lambda s: window_update(0, 2**31 - 1) * 2,
    "CONTINUATION without an end": lambda s: frame(HEADERS, END_STREAM, s, block(OK)) + frame(CONTINUATION, 0, s, literal("x", "y" * 10_000)) * 50,
    "endless interim answers": lambda s: headers(s, [(":status", "103")], end=False) * 1000,
    "RST_STREAM": lambda s: rst(s, 2),
    "HTTP/1.1": lambda s: b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_a_lying_upstream_is_a_502(h2: Subject, case: str) -> None:
    reply = BAD_ANSWERS[case]
    h2.raw.script = lying(reply)
    with h2.client() as client:
        answer = client.ask(head("/raw/x", "POST"))
        assert answer.status == 502, answer
        assert not answer.get("x-upper")
        h2.raw.script = lying(lambda number: answered(number, OK, b"fine"))
        for link in list(h2.raw._streams):
            with contextlib.suppress(OSError):
                link.sock.shutdown(2)
        assert client.ask(head("/two/bytes/5")).status == 200
        eventually(lambda: bytes(client.ask(head("/raw/x")).body) == b"fine", "an honest answer")


LATE: dict[str, Reply] = {
    "less than its length": lambda s: headers(s, [*OK, ("content-length", "10")], end=False) + frame(DATA, END_STREAM, s, b"x" * 9),
    "more than its length": lambda s: headers(s, [*OK, ("content-length", "10")], end=False) + frame(DATA, END_STREAM, s, b"x" * 11),
    "no DATA for its length": lambda s: headers(s, [*OK, ("content-length", "10")]),
    "trailers with a pseudo-header": lambda s: headers(s, OK, end=False) + frame(DATA, 0, s, b"x") + headers(s, OK),
    "trailers that do not end": lambda s: headers(s, OK, end=False) + frame(DATA, 0, s, b"x") + headers(s, [("x", "y")], end=False),
    "trailers with a line end": lambda s: headers(s, OK, end=False) + frame(DATA, 0, s, b"x") + headers(s, [("x", "y\r\nz: a")]),
    "a reset within the body": lambda s: headers(s, OK, end=False) + frame(DATA, 0, s, b"x") + rst(s, 8),
    "a reset without an error within the body": lambda s: headers(s, OK, end=False) + frame(DATA, 0, s, b"x") + rst(s, 0),
    "garbage within the body": lambda s: headers(s, OK, end=False) + frame(DATA, 0, s, b"x") + b"\xff" * 100,
}


@pytest.mark.parametrize("down", ["one", "two"])
@pytest.mark.parametrize("case", LATE)
def test_an_answer_that_breaks_its_word_has_no_clean_end(h2: Subject, case: str, down: str) -> None:
    h2.raw.script = lying(LATE[case])
    with Pair(h2, down, "raw").client() as client:
        answer = exchange(client, head("/raw/x"))
    assert answer.status == 502 or (not answer.ended and answer.reset is not None), answer


def test_an_answer_to_head_with_a_body_is_an_error(h2: Subject) -> None:
    h2.raw.script = lying(lambda s: answered(s, OK, b"body"))
    with h2.client() as client:
        answer = client.ask(head("/raw/x", "HEAD"))
        assert not answer.body
        assert client.ask(head("/two/bytes/5")).status == 200


def test_more_than_the_gateways_window_is_an_error(h2: Subject) -> None:
    """Nobody reads the answer here, so no window comes back."""
    done = threading.Event()

    def reply(stream: int) -> bytes:
        done.set()
        return headers(stream, OK, end=False) + frame(DATA, 0, stream, b"x" * 16384) * 2000

    def errors() -> float:
        found = h2.watched.metrics()
        return found['crossway_http2_resets_total{direction="out"}'] + found["crossway_http2_connection_errors_total"]

    h2.raw.script = lying(reply)
    before = errors()
    with Peak(h2.watched.pids[0]) as peak, h2.client(offer={INITIAL_WINDOW: 0}) as client:
        stream = client.open(head("/raw/x"))
        assert done.wait(PATIENCE)
        eventually(lambda: errors() > before, "an error")
        client.send(window_update(stream, 1 << 26), window_update(0, 1 << 26))
        answer = client.answer(stream)
        assert answer.status in (200, 502)
        assert answer.status == 502 or not answer.ended
    assert peak.growth < 20 << 20


@pytest.mark.parametrize("flood", [ping(), settings(), frame(0x77, 0, 0, b"x"), window_update(0, 1)], ids=["PING", "SETTINGS", "unknown", "WINDOW_UPDATE"])
def test_a_flood_of_an_upstream_hurts_only_its_connection(h2: Subject, flood: bytes) -> None:
    h2.raw.script = lying(lambda s: flood * 50_000 + answered(s, OK, b"fine"))
    with Peak(h2.watched.pids[0]) as peak, h2.client() as client:
        stream = client.open(head("/raw/x", "POST"))
        for _ in range(10):
            assert client.ask(head("/two/bytes/1000")).status == 200
        assert client.answer(stream).status in (200, 502)
    assert peak.growth < 20 << 20


def test_padding_and_continuation_of_an_upstream_are_read(h2: Subject) -> None:
    def reply(stream: int) -> bytes:
        raw = block([*OK, ("x-long", "y" * 9000)])
        return (
            frame(HEADERS, 0x8, stream, b"\x05" + raw[:100] + b"\0" * 5)
            + frame(CONTINUATION, END_HEADERS, stream, raw[100:])
            + frame(DATA, 0x8, stream, b"\x03abc\0\0\0") + frame(DATA, 0x8 | END_STREAM, stream, b"\xff" + b"\0" * 255)
        )

    h2.raw.script = lying(reply)
    with h2.client() as client:
        answer = client.ask(head("/raw/x"))
    assert (answer.status, bytes(answer.body), answer.get("x-long")) == (200, b"abc", "y" * 9000)
