"""Bodies of any size pass through in bounded memory, at the pace of the slower side."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.bank import Bank, Peak
from tests.integration.faults import PATTERN, PIECE, ScriptedOrigin, Stream, body_length, get, ok, post
from tests.integration.processes import PATIENCE, eventually

GIB = 1 << 30
GROWTH = 64 << 20  # bytes of resident memory; what issue 2 allows


def largest(which: str) -> int:
    """Bytes to which the kernel lets a socket's buffer grow by itself."""
    return int(Path(f"/proc/sys/net/ipv4/tcp_{which}").read_text().split()[2])


# Bytes that may be between a sender and a reader that sleeps: the socket buffers of four ends, which grow more the slower the
# machine is at the moment, and what the gateway holds.
KERNEL = 2 * (largest("rmem") + largest("wmem")) + (8 << 20)
assert KERNEL < GIB // 2


def pieces(total: int) -> Iterator[bytes]:
    for _ in range(total // PIECE):
        yield PATTERN


class Source:
    """An origin's script that sends a body of `total` bytes, and knows how far it came."""

    def __init__(self, total: int, *, chunked: bool) -> None:
        self.total = total
        self.chunked = chunked
        self.sent = 0

    def __call__(self, origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        framing = "transfer-encoding: chunked" if self.chunked else f"content-length: {self.total}"
        stream.send(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode())
        for piece in pieces(self.total):
            view = memoryview(b"%x\r\n%b\r\n" % (len(piece), piece) if self.chunked else piece)
            while view:
                n = stream.sock.send(view)
                self.sent += n
                view = view[n:]
        if self.chunked:
            stream.send(b"0\r\n\r\n")
        origin.go.wait(PATIENCE)


class Check:
    """Compares a body piece by piece with the repeated pattern."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, piece: bytes) -> None:
        at = self.bytes % PIECE
        assert piece == (PATTERN * 2)[at : at + len(piece)]
        self.bytes += len(piece)


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_gigabyte_down_to_a_reader_that_sleeps_and_dawdles(bank: Bank, chunked: bool) -> None:
    bank.origin.script = source = Source(GIB, chunked=chunked)
    check = Check()
    with bank.client("patient", receive=1 << 18) as client, Peak(bank.gateway.pids[0]) as peak:
        client.send(get("/slow"))
        head = client.head()
        body = client.pieces(body_length(head))
        while check.bytes < GIB // 4:
            check.take(next(body))
        stalled = settled(lambda: source.sent)
        assert stalled - check.bytes < KERNEL
        assert peak.look() < GROWTH
        client.dawdle = 1000
        while check.bytes < stalled + PIECE:
            check.take(next(body))
        client.dawdle = 0
        for piece in body:
            check.take(piece)
        assert check.bytes == GIB
    assert peak.growth < GROWTH


def settled(value: Callable[[], int]) -> int:
    """The value of a growing figure once it has stood still over several looks."""
    seen: list[int] = []

    def still() -> bool:
        seen.append(value())
        return len(seen) > 30 and len(set(seen[-30:])) == 1

    eventually(still, "the end of the growth")
    return seen[-1]


class Sink:
    """An origin's script that reads a request's body as far as it may, and answers with its length."""

    def __init__(self, until: int) -> None:
        self.until = until
        self.check = Check()

    def __call__(self, origin: ScriptedOrigin, stream: Stream) -> None:
        head = stream.head()
        for piece in stream.pieces(body_length(head)):
            self.check.take(piece)
            if self.check.bytes >= self.until:
                origin.seen.release()
                assert origin.go.wait(PATIENCE)
        stream.send(ok(str(self.check.bytes).encode()))


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_gigabyte_up_to_an_origin_that_sleeps(bank: Bank, chunked: bool) -> None:
    bank.origin.script = sink = Sink(GIB // 4)
    sent = 0

    def upload(client: Stream) -> None:
        nonlocal sent
        framing = "transfer-encoding: chunked" if chunked else f"content-length: {GIB}"
        client.send(get("/slow", framing, method="PUT"))
        for piece in pieces(GIB):
            client.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            sent += len(piece)
        if chunked:
            client.send(b"0\r\n\r\n")

    with bank.client("patient") as client, Peak(bank.gateway.pids[0]) as peak:
        thread = threading.Thread(target=upload, args=(client,))
        thread.start()
        bank.origin.saw()
        assert settled(lambda: sent) - sink.check.bytes < KERNEL
        assert peak.look() < GROWTH
        bank.origin.go.set()
        thread.join(PATIENCE)
        assert client.answer().body == str(GIB).encode()
    assert peak.growth < GROWTH


def test_a_reader_that_takes_nothing_is_cut_off_and_the_origin_let_go(bank: Bank) -> None:
    bank.origin.script = source = Source(256 << 20, chunked=False)
    cut_off = 'crossway_downstream_timeouts_total{phase="write"}'
    before = bank.gateway.metrics()[cut_off]
    with bank.client(receive=4096) as client:
        client.send(get())
        client.head()
        eventually(lambda: bank.gateway.metrics()[cut_off] == before + 1)
        body, clean = client.rest()
        assert not clean
        assert len(body) < source.total
    assert source.sent < source.total


def curl(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["curl", "-sS", *words], capture_output=True, timeout=PATIENCE, check=False)


def test_curl_uploads_after_100_continue(bank: Bank, tmp_path: Path) -> None:
    expected: list[str | None] = []

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        head = stream.head()
        expected.append(head.fields.get("expect"))
        assert not stream.buffer
        stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = b"".join(stream.pieces(body_length(head)))
        stream.send(ok(str(body == PATTERN * 4).encode()))

    bank.origin.script = script
    (tmp_path / "large").write_bytes(PATTERN * 4)
    url = f"http://127.0.0.1:{bank.gateway.port()}/slow"
    done = curl("-v", "-T", str(tmp_path / "large"), "--expect100-timeout", "20", url)
    assert (done.returncode, done.stdout) == (0, b"True")
    assert b"HTTP/1.1 100 Continue" in done.stderr
    assert expected == ["100-continue"]


def test_curl_learns_of_a_refusal_before_it_uploads(bank: Bank, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(PATTERN * 4)
    url = f"http://127.0.0.1:{bank.gateway.port()}/small"
    done = curl("-v", "-T", str(tmp_path / "large"), "--expect100-timeout", "20", "-w", "%{http_code} %{size_upload}", "-o", "/dev/null", url)
    assert done.stdout == b"413 0"
    assert b"100 Continue" not in done.stderr
    assert bank.origin.accepted == 0


@pytest.mark.parametrize("framing", ["transfer-encoding: chunked", "content-length: 4194304"])
def test_curl_downloads_with_http_10(bank: Bank, tmp_path: Path, framing: str) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        stream.send(b"HTTP/1.1 200 OK\r\n", framing.encode(), b"\r\n\r\n")
        for piece in pieces(4 * PIECE):
            stream.send(b"100000\r\n", piece, b"\r\n") if "chunked" in framing else stream.send(piece)
        stream.send(b"0\r\n\r\n" if "chunked" in framing else b"")
        origin.go.wait(PATIENCE)

    bank.origin.script = script
    url = f"http://127.0.0.1:{bank.gateway.port()}/slow"
    done = curl("-0", "-o", str(tmp_path / "got"), "-w", "%{http_version} %{http_code}", url)
    assert (done.returncode, done.stdout) in [(0, b"1.1 200"), (0, b"1.0 200")]
    assert (tmp_path / "got").read_bytes() == PATTERN * 4


def test_both_directions_at_once(bank: Bank) -> None:
    """An answer that streams while its request does: neither waits for the other's end."""

    def echo(origin: ScriptedOrigin, stream: Stream) -> None:
        head = stream.head()
        stream.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for piece in stream.pieces(body_length(head)):
            stream.send(b"%x\r\n" % len(piece), piece, b"\r\n")
        stream.send(b"0\r\n\r\n")

    bank.origin.script = echo
    with bank.client("patient") as client:
        client.send(get("/slow", "transfer-encoding: chunked", method="POST"))
        body = client.pieces(body_length(client.head()))
        for number in range(50):
            piece = b"%04d" % number
            client.send(b"4\r\n", piece, b"\r\n")
            assert next(body) == piece
        client.send(b"0\r\n\r\n")
        assert not list(body)


def test_a_small_request_after_a_large_one_on_the_same_connection(bank: Bank) -> None:
    with bank.client() as client:
        for size in (1, 5 << 20, 1, 0, 70_000):
            body = (PATTERN * 5)[:size]
            assert client.ask(post("/slow", body)).body == (body or b"POST /slow HTTP/1.1")
