"""What strangers do to a TLS port: clear text, garbage, handshakes that never end, and bodies that stop in the middle."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable

import pytest

from tests.integration.bank import Peak
from tests.integration.faults import PATTERN, Cut, ScriptedOrigin, Stream, get, post
from tests.integration.processes import PATIENCE, eventually
from tests.integration.vault import TlsStream, Vault, client_hello, half_hello


def plain(vault: Vault, name: str = "public") -> Stream:
    return Stream(socket.create_connection(("127.0.0.1", vault.gateway.port(name)), PATIENCE))


def beneath(stream: TlsStream) -> socket.socket:
    """The TCP socket under a TLS connection."""
    sock = socket.socket(fileno=os.dup(stream.sock.fileno()))
    sock.settimeout(PATIENCE)
    return sock


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "PUT"])
def test_http_in_clear_text_is_told_so(vault: Vault, method: str) -> None:
    with plain(vault) as stream:
        stream.send(get(method=method))
        answer, clean = stream.rest()
    assert clean
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"this port speaks TLS" in answer


def test_it_is_logged_and_a_flood_is_not_a_flood_of_lines(vault: Vault) -> None:
    before = len(vault.gateway.log())
    began = time.monotonic()

    def logged() -> int:
        for _ in range(50):
            with plain(vault) as stream:
                stream.send(get())
                stream.rest()
        return len([line for line in vault.gateway.log()[before:] if "handshake failed" in line["event"]])

    lines = eventually(logged, "a line")
    assert lines <= 2 * (time.monotonic() - began + 2)  # one a second from each of two workers


GARBAGE = [
    b"\0" * 100,
    b"DELETE /x HTTP/1.1\r\nhost: bank.test\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"\x16\x03\x01\x00\x05hello",
    b"\x16\x03\x01\xff\xff" + b"\1" * 70_000,
    b"\x15\x03\x03\x00\x02\x02\x28",
    b"\x17\x03\x03\x00\x10" + b"x" * 16,
    b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10" + b"\0" * 40,  # SSLv2
]


@pytest.mark.parametrize("bytes_", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_ends_the_connection(vault: Vault, bytes_: bytes) -> None:
    with plain(vault) as stream:
        with contextlib.suppress(OSError):
            stream.send(bytes_)
        stream.rest()  # an alert at most; the end comes, whether clean or not


def test_mutilated_hellos(vault: Vault) -> None:
    """Every one of them ends, and the gateway lives on."""
    source = random.Random(20)
    hello = client_hello("bank.test")
    for _ in range(150):
        spoiled = bytearray(hello)
        for _ in range(source.randrange(1, 5)):
            spoiled[source.randrange(5, len(spoiled))] = source.randrange(256)
        with plain(vault) as stream:
            stream.send(bytes(spoiled))
            stream.half_close()
            stream.rest()
    with vault.connect() as good:
        assert good.ask(get()).status == 200


@pytest.mark.parametrize("begun", [0, 1, 50, 10_000])
def test_a_handshake_that_stalls_ends_by_its_deadline(vault: Vault, begun: int) -> None:
    before = vault.counter('tls_handshake_failures_total{cause="timeout"}')
    with plain(vault, "hasty") as stream:
        stream.send(client_hello("bank.test")[:begun])
        stream.rest()
    eventually(lambda: vault.counter('tls_handshake_failures_total{cause="timeout"}') > before, "the count")


def test_the_oldest_handshake_makes_room(vault: Vault) -> None:
    """Sixty half-open handshakes on a listener that allows four in each worker keep nobody out."""
    half = [half_hello(vault.gateway.port("capped")) for _ in range(60)]
    eventually(lambda: vault.counter('tls_handshake_failures_total{cause="evicted"}') >= 52, "the evictions")
    assert vault.counter("tls_handshakes_in_flight") <= 8
    for _ in range(8):
        with vault.connect("capped") as stream:
            assert stream.ask(get()).status == 200
    for sock in half:
        sock.close()
    eventually(lambda: vault.counter("tls_handshakes_in_flight") == 0, "the end of all handshakes")


def test_slow_handshakes_delay_nobody(vault: Vault) -> None:
    half = [half_hello(vault.gateway.port()) for _ in range(200)]
    with vault.connect() as stream:
        for _ in range(50):
            assert stream.ask(get()).status == 200
    for sock in half:
        sock.close()


def test_clients_that_leave_in_a_handshake(vault: Vault) -> None:
    hello = client_hello("bank.test")
    for n in range(100):
        stream = plain(vault)
        stream.send(hello[: n * len(hello) // 100])
        if n % 2:
            stream.reset()
        else:
            stream.close()
    eventually(lambda: vault.counter("tls_handshakes_in_flight") == 0, "the end of all handshakes")


def test_a_request_body_that_is_cut_is_not_a_request(vault: Vault) -> None:
    """The client's TCP ends without close_notify in the middle of a body: the upstream never gets the whole of it."""
    whole: list[bool] = []

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        try:
            stream.request()
            whole.append(True)
        except Cut:
            whole.append(False)
        origin.seen.release()

    vault.origin.script = script
    stream = vault.connect()
    stream.send(get("/scripted/x", "content-length: 1000", method="POST"), b"x" * 500)
    beneath(stream).shutdown(socket.SHUT_WR)
    vault.origin.saw()
    stream.close()
    assert whole == [False]


def test_a_client_that_stays_after_its_answer_costs_nothing(vault: Vault) -> None:
    """The gateway's side has ended; until the client's ends too, or the wait is over, nothing happens."""
    with vault.connect() as stream:
        stream.send(get("/x", "connection: close"))
        assert stream.rest()[1]
        events, ended = vault.counter("loop_events_total"), vault.counter("connections_closed_total")
        eventually(lambda: vault.counter("connections_closed_total") > ended, "the end of the wait")
        assert vault.counter("loop_events_total") - events < 50


def test_bytes_changed_on_the_way_end_the_connection(vault: Vault) -> None:
    stream = vault.connect()
    with Stream(beneath(stream)) as raw:
        raw.send(b"\x17\x03\x03\x00\x20" + b"z" * 32)
        raw.rest()
    stream.close()


def test_memory_is_bounded_when_the_client_does_not_read(vault: Vault) -> None:
    size = 160 << 20

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.head()
        stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(size >> 20):
            stream.send(PATTERN)

    vault.origin.script = script
    with contextlib.ExitStack() as stack:
        peaks = [stack.enter_context(Peak(pid)) for pid in vault.gateway.pids]
        stream = stack.enter_context(vault.connect())
        stream.send(get("/scripted/x"))
        stream.head()
        time.sleep(0.5)  # time in which it could read ahead
        total = 0
        for piece in stream.pieces(size):
            total += len(piece)
        assert total == size
    assert max(peak.growth for peak in peaks) < 24 << 20


def test_memory_is_bounded_when_the_upstream_does_not_read(vault: Vault) -> None:
    size = 160 << 20

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        request = stream.head()
        assert origin.go.wait(PATIENCE)
        total = sum(len(piece) for piece in stream.pieces(int(request.fields["content-length"])))
        stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n%09d" % total)

    vault.origin.script = script
    with contextlib.ExitStack() as stack:
        peaks = [stack.enter_context(Peak(pid)) for pid in vault.gateway.pids]
        stream = stack.enter_context(vault.connect())
        stream.send(get("/scripted/x", f"content-length: {size}", method="POST"))
        sending = threading.Thread(target=lambda: [stream.send(PATTERN) for _ in range(size >> 20)])
        sending.start()
        time.sleep(0.5)
        vault.origin.go.set()
        sending.join(PATIENCE * 2)
        assert stream.answer().body == b"%09d" % size
    assert max(peak.growth for peak in peaks) < 24 << 20


def test_a_thousand_connections_leave_nothing(vault: Vault) -> None:
    for _ in range(300):
        with vault.connect() as stream:
            assert stream.ask(get()).status == 200
    vault.gateway.calm()
    files = vault.gateway.files()
    for _ in range(100):
        with vault.connect() as stream:
            stream.ask(get())
    vault.gateway.calm()
    assert vault.gateway.files() <= files + 4


def test_records_that_pause_anywhere_are_read_whole(vault: Vault) -> None:
    """Buffers are given back while a connection rests; a record of which a part is here does not rest (CVE-2024-4741)."""
    records = Records(vault)
    body = PATTERN[:3000]
    try:
        for cut in (0, 1, 4, 5, 6, 40, 2000):
            sent = records.sealed(get("/x") if cut < 40 else post("/x", body))
            records.sock.sendall(sent[:cut])
            time.sleep(0.35)  # three ticks of the worker, which looks for what rests at each
            records.sock.sendall(sent[cut:])
            assert records.answer().startswith(b"HTTP/1.1 200 "), cut
    finally:
        records.sock.close()


def test_more_connections_than_keep_their_buffers_are_served(vault: Vault) -> None:
    bodies = [PATTERN[number : number + 1 + number * 61 % 40_000] for number in range(300)]
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(vault.connect()) for _ in bodies]
        for turn in range(3):
            for stream, body in zip(streams[::-1] if turn == 1 else streams, bodies, strict=True):
                stream.send(post("/x", body))
            assert {stream.answer().status for stream in streams} == {200}


class Records:
    """A client whose records can be cut."""

    def __init__(self, vault: Vault) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = vault.context().wrap_bio(self.incoming, self.outgoing, server_hostname="bank.test")
        self.sock = socket.create_connection(("127.0.0.1", vault.gateway.port()), PATIENCE)
        self._until(self.client.do_handshake)
        self.sock.sendall(self.outgoing.read())

    def _until(self, step: Callable[[], object]) -> object:
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                return step()
            self.sock.sendall(self.outgoing.read())
            self.incoming.write(self.sock.recv(1 << 16) or self.lost())

    def lost(self) -> bytes:
        raise ConnectionError("the gateway ended the connection")

    def sealed(self, data: bytes) -> bytes:
        self.client.write(data)
        return self.outgoing.read()

    def answer(self) -> bytes:
        got = b""
        while not (head := re.search(rb"(?is)^.*?content-length: (\d+).*?\r\n\r\n", got)) or len(got) < head.end() + int(head[1]):
            got += bytes(self._until(self.client.read))  # type: ignore[call-overload]
        return got
