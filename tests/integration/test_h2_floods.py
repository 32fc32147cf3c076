"""Floods over HTTP/2: each is sent by one connection at one worker, and ends that connection while others are served as before.

What each costs is printed: `python -m pytest -rP -k flood` shows the worker's CPU seconds and growth for each; only memory and outcome
are judged, since time depends on the machine.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.integration.bank import Peak
from tests.integration.h2_kit import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    HEADERS,
    INITIAL_WINDOW,
    MAX_FRAME,
    PADDED,
    TABLE_SIZE,
    H2Client,
    block,
    frame,
    goaway,
    head,
    headers,
    integer,
    literal,
    ping,
    priority,
    rst,
    settings,
    window_update,
)
from tests.integration.h2_origin import Call, by_path
from tests.integration.h2_subject import Subject
from tests.integration.processes import PATIENCE, eventually

GROWTH = 20 << 20                                       # bytes that a worker may grow by
Flood = Callable[[H2Client], Iterator[bytes]]
POST = block(head("/held", "POST"))


def odd(count: int) -> range:
    return range(1, 2 * count, 2)


def rapid_reset(client: H2Client) -> Iterator[bytes]:
    """CVE-2023-44487."""
    for stream in odd(10_000):
        yield headers(stream, head("/held")) + rst(stream)


def made_you_reset(client: H2Client, wrong: Callable[[int], bytes]) -> Iterator[bytes]:
    """CVE-2025-8671."""
    for stream in odd(5_000):
        yield frame(HEADERS, END_HEADERS, stream, POST) + wrong(stream)


def continuation(client: H2Client) -> Iterator[bytes]:
    """CVE-2024-27316."""
    yield frame(HEADERS, END_STREAM, 1, block(head()))
    for number in range(20_000):
        yield frame(CONTINUATION, 0, 1, literal(f"x-{number}", "y" * 100))


def empty_continuation(client: H2Client) -> Iterator[bytes]:
    yield frame(HEADERS, END_STREAM, 1, block(head()))
    for _ in range(100_000):
        yield frame(CONTINUATION, 0, 1)


def hpack_bomb(client: H2Client) -> Iterator[bytes]:
    """CVE-2016-6581: an entry of almost 4 KiB, named 16,000 times by a byte each; 64 MiB in a block of 16 KiB."""
    yield frame(HEADERS, END_STREAM | END_HEADERS, 1, block(head()) + literal("x", "y" * 4000, 0x40))
    for stream in range(3, 2_000, 2):
        yield frame(HEADERS, END_STREAM | END_HEADERS, stream, block(head()) + b"\xbe" * 16_000)


def cookies(client: H2Client) -> Iterator[bytes]:
    """CVE-2026-47774."""
    crumbs = block(head()) + b"".join(literal("cookie", f"a{number}=b") for number in range(900))
    for stream in odd(3_000):
        yield frame(HEADERS, END_STREAM | END_HEADERS, stream, crumbs[:16_384])


def nameless(client: H2Client) -> Iterator[bytes]:
    """CVE-2019-9516."""
    for stream in odd(10_000):
        yield frame(HEADERS, END_STREAM | END_HEADERS, stream, block(head()) + b"\x00\x00\x00" * 1000)


def refused_heads(client: H2Client) -> Iterator[bytes]:
    for stream in odd(20_000):
        yield headers(stream, [*head(), ("te", "gzip")])


def repeat(data: bytes, times: int) -> Flood:
    def flood(client: H2Client) -> Iterator[bytes]:
        for _ in range(times // 100):
            yield data * 100

    return flood


def on_a_stream(data: Callable[[int], bytes], times: int, path: str = "/held", method: str = "POST") -> Flood:
    """A request that stays open, and the flood on its stream."""

    def flood(client: H2Client) -> Iterator[bytes]:
        stream = client.open(head(path, method), end=method == "GET")
        for _ in range(times // 100):
            yield data(stream) * 100

    return flood


def idle_priorities(client: H2Client) -> Iterator[bytes]:
    """CVE-2019-9513, and 10,000 streams that are never opened."""
    for stream in odd(100_000):
        yield priority(stream, stream + 2 if stream % 4 == 1 else stream - 2, stream % 256)


def table_thrash(client: H2Client) -> Iterator[bytes]:
    for turn in range(50_000):
        yield settings((TABLE_SIZE, (turn % 2) * 4096))


def frame_size_thrash(client: H2Client) -> Iterator[bytes]:
    """CVE-2026-33814 is about wrong values; right ones in a flood are one as well."""
    for turn in range(50_000):
        yield settings((MAX_FRAME, 16384 + turn), (INITIAL_WINDOW, turn))


def table_updates(client: H2Client) -> Iterator[bytes]:
    """HPACK table size updates, 5,000 in a block."""
    for stream in odd(3_000):
        yield frame(HEADERS, END_STREAM | END_HEADERS, stream, b"\x20\x3f\xe1\x1f" * 1250 + block(head()))


FLOODS: dict[str, Flood] = {
    "rapid reset": rapid_reset,
    "made you reset: WINDOW_UPDATE of 0": lambda client: made_you_reset(client, lambda stream: window_update(stream, 0)),
    "made you reset: window overflow": lambda client: made_you_reset(client, lambda stream: window_update(stream, 2**31 - 1) * 2),
    "made you reset: wrong length": lambda client: made_you_reset(client, lambda stream: headers(stream, [(":x", "y")])),
    "made you reset: padding": lambda client: made_you_reset(client, lambda stream: frame(HEADERS, END_HEADERS, stream, block([("x", "y")]))),
    "refused heads": refused_heads,
    "CONTINUATION": continuation,
    "empty CONTINUATION": empty_continuation,
    "HPACK bomb": hpack_bomb,
    "cookie crumbs": cookies,
    "fields without a name": nameless,
    "table size updates": table_updates,
    "SETTINGS": repeat(settings(), 100_000),
    "SETTINGS with many values": repeat(settings(*[(0x99, 1)] * 1000), 10_000),
    "table size thrash": table_thrash,
    "frame size thrash": frame_size_thrash,
    "PING": repeat(ping(), 100_000),
    "PING ACK": repeat(ping(flags=1), 100_000),
    "SETTINGS ACK": repeat(frame(4, 1), 100_000),
    "unknown frames": repeat(frame(0x7F, 0, 0, b"x" * 10), 100_000),
    "large unknown frames": repeat(frame(0x7F, 0, 0, b"x" * 16_000), 10_000),
    "PRIORITY of idle streams": idle_priorities,
    "WINDOW_UPDATE of the connection": repeat(window_update(0, 1), 100_000),
    "GOAWAY": repeat(goaway(0), 100_000),
    "empty DATA": on_a_stream(lambda stream: frame(DATA, 0, stream), 100_000),
    "DATA of padding": on_a_stream(lambda stream: frame(DATA, PADDED, stream, b"\xff" + b"\0" * 255), 100_000),
    "PRIORITY of a stream": on_a_stream(lambda stream: priority(stream, 0), 100_000),
    "WINDOW_UPDATE of a stream": on_a_stream(lambda stream: window_update(stream, 1), 100_000),
    "RST_STREAM of a closed stream": lambda client: (headers(1, head("/bytes/0")) if at == 0 else rst(1) * 100 for at in range(1_000)),
}


def cpu(pid: int) -> float:
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Bystander:
    """Another client, who is served all the while."""

    def __init__(self, h2: Subject, listener: str = "two") -> None:
        self.h2, self.listener = h2, listener
        self.served = 0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            with self.h2.client(self.listener) as client:
                while not self._stop.wait(0.01):
                    assert client.ask(head("/bytes/1000")).status == 200
                    self.served += 1
        except BaseException as error:  # noqa: BLE001 - the test's verdict
            self.failure = error

    def __enter__(self) -> Self:
        self._thread.start()
        eventually(lambda: self.served or self.failure, "the bystander's first answer")
        return self

    def __exit__(self, *error: object) -> None:
        before = self.served
        eventually(lambda: self.served > before or self.failure, "another answer for the bystander")
        self._stop.set()
        self._thread.join(PATIENCE)
        assert self.failure is None, self.failure


def pour(client: H2Client, flood: Flood) -> int:
    """Send a flood until it is over or the connection is; returns the bytes."""
    sent, chunk = 0, bytearray()
    for piece in flood(client):
        chunk += piece
        if len(chunk) >= 16_384:
            client.send(bytes(chunk))
            sent += len(chunk)
            chunk.clear()
            if client.end or client.gone:
                return sent
    client.send(bytes(chunk))
    return sent + len(chunk)


@pytest.mark.parametrize("listener", ["two", "tight"])
@pytest.mark.parametrize("case", FLOODS)
def test_a_flood_ends_its_connection_and_nobody_elses(h2: Subject, case: str, listener: str) -> None:
    pid = h2.watched.pids[0]
    before = cpu(pid)
    with Bystander(h2, listener), Peak(pid) as peak:
        client = h2.client(listener, polite=False)
        sent = pour(client, FLOODS[case])
        client.ended()
        client.close()
    print(f"| {listener} | {case} | {sent >> 10} KiB sent | {cpu(pid) - before:.2f} s CPU | {peak.growth / 2**20:.1f} MiB |")
    assert peak.growth < GROWTH, f"{peak.growth >> 20} MiB"
    assert client.end
    codes = [each.error_code for each in client.gone]
    assert not codes or codes[-1] in (ENHANCE_YOUR_CALM, 1, 9), codes


def test_a_rapid_reset_starts_no_more_upstream_than_streams_are_allowed(h2: Subject) -> None:
    """A cancelled exchange counts as open until its upstream side has ended, and cancelled ones are few."""
    with h2.client() as client:
        pour(client, rapid_reset)
        client.ended()
    assert len(h2.origin.calls) <= 200                  # `resets` and `streams` are 100 each


def test_the_stream_that_was_one_too_many_ends_at_the_upstream_like_the_others(h2: Subject) -> None:
    """The connection ends in the middle of that stream's own end."""
    with h2.client("tight") as client:
        for _ in range(20):
            if client.gone or client.end:
                break
            stream = client.open(head("/two/held", "POST"), end=False)
            client.barrier()
            client.send(window_update(stream, 0))
            client.until(lambda stream=stream: client.answer_of(stream).over or client.end, "an end")
        client.ended()
        assert client.gone
    eventually(lambda: all(call.gone.is_set() for call in h2.origin.calls), "the cancels")
    eventually(lambda: not h2.watched.metrics()["crossway_exchanges"], "the end of the exchanges")


@pytest.mark.parametrize(
    ("flood", "counter"),
    [
        (rapid_reset, "http2_floods_total"),
        (rapid_reset, 'http2_resets_total{direction="in"}'),
        (refused_heads, 'http2_resets_total{direction="out"}'),
        (refused_heads, "http2_malformed_total"),
        (repeat(ping(), 100_000), "http2_floods_total"),
        (repeat(ping(), 100_000), "http2_empty_frames_total"),
        (repeat(ping(), 100_000), "http2_connection_errors_total"),
    ],
    ids=["rapid reset", "resets of clients", "resets of ours", "refused heads", "PING", "empty frames", "errors"],
)
def test_a_flood_is_counted(h2: Subject, flood: Flood, counter: str) -> None:
    before = h2.watched.metrics()[f"crossway_{counter}"]
    with h2.client() as client:
        pour(client, flood)
        client.ended()
    eventually(lambda: h2.watched.metrics()[f"crossway_{counter}"] > before, counter)


def test_a_continuation_flood_ends_before_64_kib(h2: Subject) -> None:
    """The server reads no more of it than one head may have."""
    with h2.client() as client:
        client.send(frame(HEADERS, END_STREAM, 1, block(head())))
        sent = 0
        while not client.gone and not client.end and sent < 1 << 20:
            client.send(frame(CONTINUATION, 0, 1, literal("x", "y" * 4000)))
            sent += 4000
            client.sock.settimeout(0.05)
            try:
                client._receive()
            except TimeoutError:
                pass
    assert sent < 80_000, sent


def test_a_reader_of_single_bytes_costs_little_and_is_given_up(h2: Subject) -> None:
    """CVE-2019-9511, 9517: 10 MiB asked for on many streams, taken by the byte."""
    with Bystander(h2), Peak(h2.watched.pids[0]) as peak, h2.client(offer={INITIAL_WINDOW: 1}, credit=False, polite=False) as client:
        streams = [client.open(head("/bytes/10485760")) for _ in range(20)]
        for stream in streams:
            client.headed(stream)
        while not client.end and not client.gone:
            for stream in streams:
                client.send(window_update(stream, 1))
        client.ended()
    print(f"| reading by the byte | 20 x 10 MiB | {peak.growth / 2**20:.1f} MiB |")
    assert peak.growth < GROWTH


@pytest.mark.parametrize("window", [0, 1], ids=["no window", "a byte of window"])
def test_who_takes_no_answer_is_given_up_after_the_write_timeout(h2: Subject, window: int) -> None:
    with Peak(h2.watched.pids[0]) as peak, h2.client("brief", offer={INITIAL_WINDOW: window}, credit=False) as client:
        streams = [client.open(head("/bytes/10485760")) for _ in range(20)]
        client.until(lambda: all(client.answer_of(stream).reset is not None for stream in streams) or client.gone, "the end of patience")
    assert peak.growth < GROWTH


def test_who_reads_nothing_from_the_socket_is_bounded_too(h2: Subject) -> None:
    """The windows are wide open and the socket is full: what waits stays within bounds until the write timeout."""
    with Peak(h2.watched.pids[0]) as peak:
        client = h2.client("brief", offer={INITIAL_WINDOW: 2**31 - 1}, receive=4096)
        client.send(window_update(0, 2**30), *[headers(stream, head("/bytes/10485760")) for stream in odd(20)])
        eventually(lambda: len(h2.origin.calls) >= 20, "the requests")
        eventually(lambda: not h2.watched.metrics()["crossway_exchanges"], "the end of patience")
        client.close()
    assert peak.growth < GROWTH, f"{peak.growth >> 20} MiB"


def test_pings_of_one_who_does_not_read_are_bounded(h2: Subject) -> None:
    """CVE-2019-9512: their answers pile up where nobody takes them."""
    with Bystander(h2), Peak(h2.watched.pids[0]) as peak:
        client = h2.client("brief", receive=4096)
        client.sock.setblocking(False)
        sent = 0
        while sent < 20 << 20:
            try:
                sent += client.sock.send(ping() * 1000)
            except BlockingIOError:
                eventually(lambda: h2.watched.metrics()["crossway_connections"] >= 0, "an answer of the admin")
                if not _writable(client):
                    break
            except OSError:
                break
        client.close()
    assert peak.growth < GROWTH


def test_heads_for_one_who_does_not_read_are_bounded(h2: Subject) -> None:
    """No window bounds heads. What waits is dropped above a limit and the connection cut, though a head was being written just then."""

    async def large(call: Call) -> None:
        if call.path == "/large":
            await call.head(204, [("x-large", "y" * 60_000)], end=True)
        else:
            await by_path(call)

    h2.origin.script = large
    before = h2.watched.metrics()["crossway_http2_floods_total"]
    with Bystander(h2), Peak(h2.watched.pids[0]) as peak, h2.client(receive=4096) as client:
        for stream in odd(400):
            try:
                client.sock.sendall(headers(stream, head("/large")))
            except OSError:
                break
            eventually(lambda stream=stream: len(h2.origin.calls) > stream // 2 - 50 or not _open(h2), "the requests before")
        eventually(lambda: not _open(h2), "the end of the connection")
    assert peak.growth < GROWTH
    assert h2.watched.metrics()["crossway_http2_floods_total"] > before


def _open(h2: Subject) -> bool:
    return bool(h2.watched.metrics()["crossway_connections"] > 1)


def _writable(client: H2Client) -> bool:
    return bool(select.select([], [client.sock], [], 2.0)[1])


def test_streams_after_a_goaway_of_the_client_are_no_way_around_the_limits(h2: Subject) -> None:
    with Bystander(h2), Peak(h2.watched.pids[0]) as peak, h2.client() as client:
        client.send(goaway(0))
        most = 300
        for stream in odd(most):
            client.send(headers(stream, head("/held")))
        client.until(lambda: client.end or client.gone or sum(1 for each in client.answers.values() if each.reset is not None) >= most - 100, "refusals")
        assert len(h2.origin.calls) <= 150              # 100 streams, and a GET that met a closed connection may be asked again
    assert peak.growth < GROWTH


def test_idle_streams_cost_nothing(h2: Subject) -> None:
    """The number of a stream says nothing about how many there are."""
    with Peak(h2.watched.pids[0]) as peak, h2.client() as client:
        client.send(headers(20_001, head()))
        assert client.answer(20_001).status == 200
        client.send(headers(2**31 - 1, head()))
        assert client.answer(2**31 - 1).status == 200
    assert peak.growth < GROWTH


def test_trailers_that_do_not_end_a_stream_do_not_hold_it(h2: Subject) -> None:
    """CVE-2026-73513."""
    with h2.client() as client:
        for _ in range(20):
            stream = client.open(head("/held", "POST"), end=False)
            client.send(frame(HEADERS, END_HEADERS, stream, block([("x", "y")])))
            answer = client.answer_of(stream)
            client.until(lambda answer=answer: answer.over or client.gone, "an error")


def test_large_padding_is_paid_from_the_window(h2: Subject) -> None:
    """Padding counts for flow control, and what it took comes back, or the connection would starve."""
    with h2.client() as client:
        for _ in range(20):
            stream = client.open(head("/echo", "POST"), end=False)
            client.send(frame(DATA, PADDED | END_STREAM, stream, b"\xff" + b"p" * 15_000 + b"\0" * 255))
            client.window -= 15_256
            assert len(client.answer(stream).body) == 15_000
        assert client.window > 50_000


def test_integers_without_an_end_are_an_error_at_once(h2: Subject) -> None:
    with h2.client() as client:
        client.send(frame(HEADERS, END_STREAM | END_HEADERS, 1, integer(2**62, 7, 0x80)))
        client.dies(9)


def test_many_connections_that_only_begin_are_bounded(h2: Subject) -> None:
    """Half a head, many times: each is given up after the head timeout."""
    with Bystander(h2), Peak(h2.watched.pids[0]) as peak:
        clients = [h2.client("brief") for _ in range(100)]
        for client in clients:
            client.send(frame(HEADERS, END_STREAM, 1, block(head()) + literal("x", "y" * 8000)))
        for client in clients:
            client.ended()
            client.close()
    assert peak.growth < GROWTH
