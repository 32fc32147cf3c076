"""Clients that leave, dawdle, flood or lie cost nobody but themselves, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import uuid

import pytest

from tests.integration.bank import Bank
from tests.integration.faults import PATTERN, Cut, Message, ScriptedOrigin, Stream, get, ok, post
from tests.integration.processes import PATIENCE, eventually

PHASES = 'crossway_downstream_timeouts_total{{phase="{}"}}'


def hold(origin: ScriptedOrigin, stream: Stream) -> None:
    """Answers a request when the test lets it; one that is cut is marked in the ledger as not executed."""
    request = stream.request()
    origin.ledger.execute(request.path)
    origin.seen.release()
    assert origin.go.wait(PATIENCE)
    stream.send(ok())


# -- leaving


@pytest.mark.parametrize("leave", [Stream.reset, Stream.close], ids=["reset", "close"])
@pytest.mark.parametrize("sent", ["head", "some-body", "half-a-chunk", "nothing"])
def test_a_client_that_leaves_mid_request_never_executes(bank: Bank, sent: str, leave: object) -> None:
    complete: list[str] = []

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        try:
            complete.append(stream.request().path)
        finally:
            origin.seen.release()

    bank.origin.script = script
    request = {
        "nothing": b"",
        "head": b"POST /slow HTTP/1.1\r\nhost: b\r\ncontent-le",
        "some-body": post("/slow", b"x" * 1000)[:-1],
        "half-a-chunk": get("/slow", "transfer-encoding: chunked", method="POST") + b"5\r\nab",
    }[sent]
    client = bank.client()
    client.send(request)
    if "POST" in request.decode() and sent != "head":
        eventually(lambda: bank.origin.accepted, "the request's beginning at the origin")
    assert callable(leave)
    leave(client)
    if bank.origin.accepted:
        bank.origin.saw()
    assert not complete


@pytest.mark.parametrize("leave", [Stream.reset, Stream.close], ids=["reset", "close"])
def test_a_client_that_leaves_mid_answer_lets_the_origin_go(bank: Bank, leave: object) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        stream.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            while True:
                stream.send(b"100000\r\n", PATTERN, b"\r\n")
        origin.seen.release()

    bank.origin.script = script
    client = bank.client("patient")
    client.send(get("/slow"))
    client.exactly(100_000)
    assert callable(leave)
    leave(client)
    bank.origin.saw()


def test_a_client_that_half_closes_gets_its_answer(bank: Bank) -> None:
    bank.origin.script = hold
    with bank.client() as client:
        client.send(post("/slow", b"pay"))
        client.half_close()
        bank.origin.saw()
        bank.origin.go.set()
        assert client.answer().status == 200
        assert client.closed()


def test_half_close_behind_bytes_that_nobody_reads(bank: Bank) -> None:
    """What stands unread when the client ends must not turn the end into a reset: that would take the answer with it."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        stream.send(ok(PATTERN[:200_000]))

    bank.origin.script = script
    worker = bank.gateway.pids[0]
    with bank.client("patient", receive=4096) as client:
        before = bank.gateway.counter("sent_bytes")
        client.send(get("/slow", "connection: close"))
        client.head()
        eventually(lambda: bank.gateway.counter("sent_bytes") > before + 200_000, "the answer's way to the kernel")
        os.kill(worker, signal.SIGSTOP)
        try:
            client.send(get("/slow") * 100)
            client.half_close()  # bytes and end stand before the worker together
        finally:
            os.kill(worker, signal.SIGCONT)
        assert client.rest() == (PATTERN[:200_000], True)


def test_resets_by_the_hundred(bank: Bank) -> None:
    bank.origin.script = hold
    for _ in range(300):
        bank.client().reset()
    waiting = [bank.client() for _ in range(50)]
    for client in waiting:
        client.send(post("/slow", b"x"))
    for _ in waiting:
        bank.origin.saw()
    for client in waiting:
        client.reset()


def test_a_storm_of_connections_and_then_nothing(bank: Bank) -> None:
    before = bank.gateway.counter("connections_accepted")

    def storm() -> None:
        for _ in range(500):
            bank.client().close()

    threads = [threading.Thread(target=storm) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert [bank.ask(get()).status for _ in range(20)] == [200] * 20
    for thread in threads:
        thread.join(PATIENCE)
    eventually(lambda: bank.gateway.counter("connections_accepted") == before + 2020)
    bank.origin.reset()
    bank.gateway.calm()
    polls, events = bank.gateway.counter("loop_polls"), bank.gateway.counter("loop_events")
    assert bank.ask(get()).status == 200
    eventually(lambda: bank.gateway.counter("connections_closed") == before + 2021)
    # Idle means idle: what happened meanwhile is what one request needs, not a loop that spins.
    assert bank.gateway.counter("loop_events") - events < 20
    assert bank.gateway.counter("loop_polls") - polls < 20


# -- dawdling


def test_slow_heads_get_408_and_nobody_else_notices(bank: Bank) -> None:
    before = bank.gateway.metrics()[PHASES.format("head")]
    slow = [bank.client() for _ in range(200)]
    for client in slow:
        client.send(b"GET / HTTP/1.1\r\nhost: b\r\nx-a: ")
    with contextlib.suppress(OSError):
        for client in slow:  # a byte more buys no time
            client.send(b"y")
    assert [bank.ask(get()).status for _ in range(50)] == [200] * 50
    answers = [client.answer() for client in slow]
    assert {answer.status for answer in answers} == {408}
    assert all(answer.fields["connection"] == "close" and b"head-timeout" in answer.body for answer in answers)
    for client in slow:
        client.close()
    assert bank.gateway.metrics()[PHASES.format("head")] == before + 200


def test_a_head_that_never_begins_is_closed_without_a_word(bank: Bank) -> None:
    with bank.client() as client:
        assert client.closed()


def test_slow_bodies_get_408_and_are_never_executed(bank: Bank) -> None:
    complete: list[str] = []
    bank.origin.script = lambda origin, stream: complete.append(stream.request().path)
    before = bank.gateway.metrics()[PHASES.format("body")]
    slow = [bank.client() for _ in range(50)]
    for number, client in enumerate(slow):
        if number % 2:
            client.send(post("/slow", b"x" * 10)[:-5])
        else:
            client.send(get("/slow", "transfer-encoding: chunked", method="POST"), b"5\r\nab")
    answers = [client.answer() for client in slow]
    assert {answer.status for answer in answers} == {408}
    assert all(b"body-timeout" in answer.body for answer in answers)
    for client in slow:
        assert client.closed()
        client.close()
    assert bank.gateway.metrics()[PHASES.format("body")] == before + 50
    bank.origin.reset()
    assert not complete


def test_a_body_that_drips_ends_with_the_exchange_s_total(bank: Bank) -> None:
    """Every byte comes in time, the whole does not: the client's fault, and it is told so."""
    with bank.client() as client:
        client.send(post("/brief", b"x" * 10_000)[:-9_999])
        answered = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not answered.wait(0.05):
                    client.send(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            answer = client.answer()
        finally:
            answered.set()
            thread.join()
        assert answer.status == 408
        assert b"body-timeout" in answer.body


# -- flooding


def test_a_thousand_pipelined_requests_are_answered_in_order(bank: Bank) -> None:
    with bank.client() as client:
        requests = b"".join(get(f"/x/{number}") for number in range(1000))
        threading.Thread(target=client.send, args=(requests,), daemon=True).start()
        answers = [client.answer().body for _ in range(1000)]
        assert answers == [b"GET /x/%d HTTP/1.1" % number for number in range(1000)]


def test_a_flood_of_refusable_requests_leaves_others_their_turn(bank: Bank) -> None:
    """Requests that need no upstream never wait; a client that sends them without end must not keep the worker for itself."""
    worker = bank.gateway.pids[0]
    with bank.client("patient") as flood, bank.client("patient") as other:
        flood.ask(get("/unknown")), other.ask(get("/unknown"))
        flood.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        os.kill(worker, signal.SIGSTOP)
        try:
            flood.send(get("/unknown") * 8000)  # all of it stands before the worker when it wakes
            other.send(get("/unknown"))
        finally:
            os.kill(worker, signal.SIGCONT)
        answered = moment(other.answer())
        before = sum(moment(flood.answer()) < answered for _ in range(8000))
        assert before < 1000


def moment(answer: Message) -> int:
    """When the gateway read the request, in milliseconds: a UUIDv7 begins with it."""
    return uuid.UUID(answer.fields["x-request-id"]).int >> 80


def test_the_limit_of_connections_leaves_the_rest_in_the_queue(bank: Bank) -> None:
    inside = [bank.client("few") for _ in range(4)]
    for client in inside:
        assert client.ask(get()).status == 200
    outside = bank.client("few")
    outside.send(get("/x/late"))
    eventually(lambda: bank.gateway.metrics()["crossway_connections"] == 4)
    beat = 'crossway_worker_cpu_seconds{worker="0"}'
    before = bank.gateway.metrics()[beat]
    eventually(lambda: bank.gateway.metrics()[beat] != before, "a beat, which is several ticks")
    assert bank.gateway.metrics()["crossway_connections"] == 4
    for client in inside:
        assert client.ask(get()).status == 200
    inside.pop().close()
    assert outside.answer().body == b"GET /x/late HTTP/1.1"
    for client in [*inside, outside]:
        client.close()


# -- the PROXY protocol

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def v2(command: int, family: int, addresses: bytes) -> bytes:
    return SIGNATURE + bytes([command, family]) + struct.pack(">H", len(addresses)) + addresses


V4 = socket.inet_aton("203.0.113.7") + socket.inet_aton("192.0.2.1") + struct.pack(">HH", 40000, 443)
V6 = socket.inet_pton(socket.AF_INET6, "2001:db8::7") + socket.inet_pton(socket.AF_INET6, "2001:db8::1") + struct.pack(">HH", 1, 2)
TLVS = b"\x01\x00\x02h2" + b"\x04\x00\x00" + b"\xe0\x01\x00" + b"z" * 256
KNOWN = {
    "v1-tcp4": (b"PROXY TCP4 203.0.113.7 192.0.2.1 40000 443\r\n", "203.0.113.7"),
    "v1-tcp6": (b"PROXY TCP6 2001:db8::7 2001:db8::1 40000 443\r\n", "2001:db8::7"),
    "v1-unknown": (b"PROXY UNKNOWN\r\n", "127.0.0.1"),
    "v1-unknown-more": (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", "127.0.0.1"),
    "v2-inet": (v2(0x21, 0x11, V4), "203.0.113.7"),
    "v2-inet6": (v2(0x21, 0x21, V6), "2001:db8::7"),
    "v2-tlvs": (v2(0x21, 0x11, V4 + TLVS), "203.0.113.7"),
    "v2-local": (v2(0x20, 0x00, b""), "127.0.0.1"),
    "v2-local-more": (v2(0x20, 0x11, V4 + TLVS), "127.0.0.1"),
    "v2-unspecified": (v2(0x21, 0x00, b"abc"), "127.0.0.1"),
}
MALFORMED = {
    "v1-no-addresses": b"PROXY TCP4\r\n",
    "v1-one-address": b"PROXY TCP4 203.0.113.7\r\n",
    "v1-one-address-and-space": b"PROXY TCP4 203.0.113.7 \r\n",
    "v1-no-ports": b"PROXY TCP4 203.0.113.7 192.0.2.1\r\n",
    "v1-one-port": b"PROXY TCP4 203.0.113.7 192.0.2.1 40000\r\n",
    "v1-large-port": b"PROXY TCP4 203.0.113.7 192.0.2.1 40000 65536\r\n",
    "v1-port-not-a-number": b"PROXY TCP4 203.0.113.7 192.0.2.1 4x 443\r\n",
    "v1-other-family": b"PROXY TCP4 2001:db8::7 2001:db8::1 40000 443\r\n",
    "v1-other-family-6": b"PROXY TCP6 203.0.113.7 192.0.2.1 40000 443\r\n",
    "v1-too-much": b"PROXY TCP4 203.0.113.7 192.0.2.1 40000 443 5\r\n",
    "v1-unknown-family": b"PROXY UDP4 203.0.113.7 192.0.2.1 40000 443\r\n",
    "v1-lower-case": b"proxy TCP4 203.0.113.7 192.0.2.1 40000 443\r\n",
    "v1-bare-lf": b"PROXY TCP4 203.0.113.7 192.0.2.1 40000 443\n",
    "v1-without-end": b"PROXY TCP4 " + b"1" * 120,
    "v2-version-1": v2(0x11, 0x11, V4),
    "v2-command": v2(0x22, 0x11, V4),
    "v2-short-inet": v2(0x21, 0x11, V4[:11]),
    "v2-short-inet6": v2(0x21, 0x21, V6[:35]),
    "v2-huge": v2(0x21, 0x11, V4 + b"x" * 60_000),
    "absent": b"",
}


def seen_address(bank: Bank, client: Stream) -> str:
    found: list[str] = []

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        found.append(stream.request().fields["x-forwarded-for"])
        stream.send(ok())

    bank.origin.script = script
    assert client.ask(get("/x", "connection: close")).status == 200
    return found[0]


@pytest.mark.parametrize("name", ["proxied", "maybe"])
@pytest.mark.parametrize("kind", KNOWN)
def test_the_address_of_a_proxy_header_is_the_client_s(bank: Bank, kind: str, name: str) -> None:
    header, address = KNOWN[kind]
    with bank.client(name) as client:
        client.send(header)
        assert seen_address(bank, client) == address


@pytest.mark.parametrize("kind", ["v1-tcp4", "v2-tlvs"])
def test_a_proxy_header_byte_by_byte(bank: Bank, kind: str) -> None:
    header, address = KNOWN[kind]
    with bank.client("proxied") as client:
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in header:
            client.send(bytes([byte]))
        assert seen_address(bank, client) == address


@pytest.mark.parametrize("kind", MALFORMED)
def test_no_request_passes_behind_a_bad_proxy_header(bank: Bank, kind: str) -> None:
    with bank.client("proxied") as client:
        client.send(MALFORMED[kind], get())
        with contextlib.suppress(Cut):
            assert not client.answer().start, "it was answered"
    assert bank.origin.accepted == 0


@pytest.mark.parametrize("kind", [kind for kind in MALFORMED if kind not in ("absent", "v1-lower-case")])
def test_an_optional_proxy_header_is_still_checked(bank: Bank, kind: str) -> None:
    with bank.client("maybe") as client:
        client.send(MALFORMED[kind], get())
        with contextlib.suppress(Cut):
            assert client.answer().status == 400
    assert bank.origin.accepted == 0


def test_an_optional_proxy_header_may_be_absent(bank: Bank) -> None:
    with bank.client("maybe") as client:
        assert seen_address(bank, client) == "127.0.0.1"


def test_a_proxy_header_counts_once(bank: Bank) -> None:
    header = KNOWN["v1-tcp4"][0]
    with bank.client("proxied") as client:
        client.send(header, header, get())
        with contextlib.suppress(Cut):
            assert client.answer().status == 400
    assert bank.origin.accepted == 0


def test_half_a_proxy_header_waits_no_longer_than_a_head(bank: Bank) -> None:
    with bank.client("proxied") as client:
        client.send(b"PROXY TCP4 203.")
        assert client.closed()


