"""Upstreams that die, stall or lie: the client gets one clear answer that is its own, and nothing is executed twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading

import pytest

from tests.integration.bank import Bank
from tests.integration.faults import (
    PATTERN,
    Cut,
    Message,
    OriginProcess,
    Payers,
    ScriptedOrigin,
    Stream,
    body_length,
    get,
    ok,
    post,
    serve,
)
from tests.integration.processes import PATIENCE, eventually


def problem(answer: Message) -> tuple[int, str]:
    """Status and problem type."""
    return answer.status, json.loads(answer.body)["type"].rpartition(":")[2]


# -- stalling


def test_an_upstream_that_takes_no_more_of_a_request_is_told_apart_from_a_slow_client(bank: Bank) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.head()
        assert origin.go.wait(PATIENCE)

    bank.origin.script = script
    with bank.client() as client:
        # The client sends as fast as it may; its own deadline (400 ms) is as long as the upstream's.
        client.send(get("/x", f"content-length: {64 << 20}", method="PUT"))
        thread = threading.Thread(target=push, args=(client, 64))
        thread.start()
        answer = client.answer()
        thread.join(PATIENCE)
    assert problem(answer) == (504, "upstream-idle-timeout")


def push(client: Stream, pieces: int) -> None:
    with contextlib.suppress(OSError):
        for _ in range(pieces):
            client.send(PATTERN)


def test_a_slow_client_behind_an_upstream_that_caught_up_is_still_the_slow_one(bank: Bank) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        head = stream.head()
        assert origin.seen.acquire(timeout=PATIENCE)
        for _ in stream.pieces(body_length(head)):
            pass

    bank.origin.script = script
    with bank.client() as client:
        client.send(get("/x", f"content-length: {65 << 20}", method="PUT"))
        thread = threading.Thread(target=push, args=(client, 64))
        thread.start()
        eventually(lambda: bank.gateway.metrics()["crossway_buffers"] >= 2, "a buffer that waits for the upstream")
        bank.origin.seen.release()
        thread.join(PATIENCE)
        assert problem(client.answer()) == (408, "body-timeout")


def test_an_upstream_that_accepts_no_connection_in_time(bank: Bank) -> None:
    before = bank.gateway.counter("upstream_timeouts")
    answer = bank.ask(post("/full", b"pay"))
    assert problem(answer) == (504, "upstream-connect-timeout")
    assert "not sent" in json.loads(answer.body)["detail"]
    assert bank.gateway.counter("upstream_timeouts") > before


def test_an_upstream_that_refuses_connections(bank: Bank) -> None:
    for _ in range(3):
        answer = bank.ask(post("/gone", b"pay"))
        assert problem(answer) == (503, "upstream-unreachable")
        assert answer.fields["retry-after"] == "1"
        assert "not sent" in json.loads(answer.body)["detail"]


def test_many_at_once_behind_a_dead_upstream_do_not_hinder_others(bank: Bank) -> None:
    stuck = [bank.client() for _ in range(100)]
    for client in stuck:
        client.send(post("/full", b"pay"))
    assert [bank.ask(get()).status for _ in range(20)] == [200] * 20
    assert {client.answer().status for client in stuck} == {504}
    for client in stuck:
        client.close()


def test_a_stopped_upstream_is_a_timeout_that_names_its_phase(bank: Bank) -> None:
    with OriginProcess(bank.ports.process) as process, bank.client() as client:
        assert client.ask(post("/process", b"warm")).status == 200
        process.signal(signal.SIGSTOP)
        answer = client.ask(post("/process", b"pay"))
        assert problem(answer) == (504, "upstream-head-timeout")
        assert "may have been executed" in json.loads(answer.body)["detail"]
        assert problem(bank.ask(get("/process"))) == (504, "upstream-head-timeout")  # the kernel accepts for it
        process.signal(signal.SIGCONT)
        assert client.ask(post("/process", b"again")).status == 200


@pytest.mark.parametrize("framing", ["transfer-encoding: chunked", "content-length: 1000000"])
def test_a_body_that_stops_is_cut_not_ended(bank: Bank, framing: str) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        stream.send(b"HTTP/1.1 200 OK\r\n", framing.encode(), b"\r\n\r\n5\r\nabcde\r\n")
        assert stream.closed()
        origin.seen.release()

    bank.origin.script = script
    with bank.client() as client, pytest.raises(Cut):
        client.ask(get())
    bank.origin.saw()


def test_a_body_that_drips_lives_as_long_as_the_total(bank: Bank) -> None:
    """A byte now and then is progress; the exchange's total ends it all the same."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
        while not origin.go.wait(0.05):
            stream.send(b"x")

    bank.origin.script = script
    with bank.client() as client:
        client.send(get("/brief"))
        client.head()
        body, clean = client.rest()
        assert len(body) > 9  # far beyond the 400 ms that silence may last
        assert not clean


def test_bytes_for_a_reader_that_sleeps_do_not_prolong_its_deadline(bank: Bank) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
        stream.send(PATTERN * 3)
        while not origin.go.wait(0.05):
            stream.send(b"x")

    bank.origin.script = script
    cut_off = 'crossway_downstream_timeouts_total{phase="write"}'
    before = bank.gateway.metrics()[cut_off]
    with bank.client(receive=4096) as client:
        client.sock.setsockopt(6, 10, 1)  # TCP_WINDOW_CLAMP
        client.send(get())
        eventually(lambda: bank.gateway.metrics()["crossway_buffers"] >= 1, "an answer that waits for its client")
        eventually(lambda: bank.gateway.metrics()[cut_off] == before + 1, "the end of the patience")


# -- dying


def test_an_upstream_killed_before_it_read_a_request(bank: Bank) -> None:
    with OriginProcess(bank.ports.process) as process, bank.client() as client:
        assert client.ask(get("/process")).status == 200
        process.signal(signal.SIGSTOP)
        with bank.client() as other:
            client.send(post("/process", b"pay"))
            other.send(get("/process"))
            eventually(lambda: bank.gateway.metrics()['crossway_upstream_connections{state="active"}'] == 2)
            before = bank.gateway.counter("retries")
            process.signal(signal.SIGKILL)
            assert problem(client.answer()) == (502, "upstream-closed")
            assert other.answer().status in (502, 503)  # a GET may be tried once more; nobody is there
        assert bank.gateway.counter("retries") <= before + 1


def test_an_upstream_killed_while_it_worked(bank: Bank) -> None:
    with OriginProcess(bank.ports.process) as process, bank.client() as client:
        client.send(post("/process/never", b"pay"))
        assert process.read() == "POST /process/never HTTP/1.1"
        before = bank.gateway.counter("retries")
        process.signal(signal.SIGKILL)
        answer = client.answer()
        assert problem(answer) == (502, "upstream-closed")
        assert "may have been executed" in json.loads(answer.body)["detail"]
        assert bank.gateway.counter("retries") == before
        assert problem(client.ask(post("/process", b"pay"))) == (503, "upstream-unreachable")
        with OriginProcess(bank.ports.process):
            eventually(lambda: client.ask(post("/process", b"pay")).status == 200, "the recovery")


def test_an_upstream_killed_mid_answer(bank: Bank) -> None:
    with OriginProcess(bank.ports.process) as process, bank.client() as client:
        client.send(get("/process/half"))
        assert client.head().status == 200
        assert client.exactly(50) == b"x" * 50
        process.signal(signal.SIGKILL)
        assert client.rest() == (b"", False)


ENDS = {
    "length": b"content-length: 100\r\n\r\nabc",
    "chunked": b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "chunked-inside": b"transfer-encoding: chunked\r\n\r\n30\r\nabc",
    "chunked-no-last-line": b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
}


@pytest.mark.parametrize("end", [Stream.close, Stream.reset], ids=["fin", "rst"])
@pytest.mark.parametrize("kind", ENDS)
def test_a_cut_answer_never_ends_cleanly(bank: Bank, kind: str, end: object) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        stream.send(b"HTTP/1.1 200 OK\r\n", ENDS[kind])
        origin.seen.acquire(timeout=PATIENCE)
        assert callable(end)
        end(stream)

    bank.origin.script = script
    with bank.client() as client:
        client.send(get())
        head = client.head()
        body = client.pieces(body_length(head))
        assert next(body).startswith(b"abc")
        bank.origin.seen.release()
        with pytest.raises(Cut):
            list(body)


def test_an_answer_delimited_by_a_reset_is_cut(bank: Bank) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.request()
        stream.send(b"HTTP/1.1 200 OK\r\n\r\nabc")
        origin.seen.acquire(timeout=PATIENCE)
        stream.reset()

    bank.origin.script = script
    with bank.client() as client:
        client.send(get())
        body = client.pieces(body_length(client.head()))
        assert next(body) == b"abc"
        bank.origin.seen.release()
        with pytest.raises(Cut):
            list(body)


def test_an_early_answer_ends_the_upload_and_is_never_pooled(bank: Bank) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.head()
        stream.send(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno")
        stream.rest()
        origin.seen.release()

    bank.origin.script = script
    with bank.client() as client:
        client.send(get("/x", f"content-length: {64 << 20}", method="PUT"))
        thread = threading.Thread(target=push, args=(client, 64))
        thread.start()
        answer = client.answer()
        thread.join(PATIENCE)
        assert (answer.status, answer.body) == (403, b"no")
    bank.origin.saw()


# -- answers that belong to nobody


def test_a_late_answer_is_never_another_s(bank: Bank) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        request = stream.request()
        if request.path == "/x/late":
            origin.seen.release()
            origin.go.wait(PATIENCE)
            stream.send(ok(b"late"))
        else:
            stream.send(ok(request.body))
        serve(origin, stream)

    bank.origin.script = script
    with bank.client() as client:
        client.send(post("/x/late", b"1"))
        bank.origin.saw()
        assert problem(client.answer()) == (504, "upstream-head-timeout")
        bank.origin.go.set()
        for number in range(50):
            body = b"%d" % number
            assert client.ask(post("/x/next", body)).body == body


@pytest.mark.parametrize("unasked", [ok(b"nobody's"), b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n\r\n", b"x", b"\r\n"])
def test_bytes_on_an_idle_connection_end_it(bank: Bank, unasked: bytes) -> None:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        if origin.accepted > 1:
            return serve(origin, stream)
        stream.send(ok(stream.request().body))
        assert origin.go.wait(PATIENCE)
        stream.send(unasked)
        stream.rest()
        origin.seen.release()
        return None

    bank.origin.script = script
    with bank.client() as client:
        assert client.ask(post("/x", b"1")).body == b"1"
        bank.origin.go.set()
        bank.origin.saw()
        assert client.ask(post("/x", b"2")).body == b"2"
        assert bank.origin.accepted == 2


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_unasked_bytes_that_arrive_with_a_request(bank: Bank, method: str) -> None:
    """Both stand before the worker when it wakes, the request first: still nobody is told what was for nobody."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        if origin.accepted > 1:
            return serve(origin, stream)
        stream.request()
        stream.send(ok(b"first"))
        origin.seen.release()
        assert origin.go.wait(PATIENCE)
        stream.send(ok(b"nobody's"))
        origin.seen.release()
        stream.rest()
        return None

    bank.origin.script = script
    worker = bank.gateway.pids[0]
    with bank.client() as client:
        assert client.ask(get("/x/1")).body == b"first"
        bank.origin.saw()
        eventually(lambda: bank.gateway.metrics()['crossway_upstream_connections{state="idle"}'] == 1)
        os.kill(worker, signal.SIGSTOP)
        try:
            client.send(get("/x/2", "content-length: 0", method=method))
            bank.origin.go.set()
            bank.origin.saw()
        finally:
            os.kill(worker, signal.SIGCONT)
        assert client.answer().body == f"{method} /x/2 HTTP/1.1".encode()


def test_the_keep_alive_race(bank: Bank) -> None:
    """The upstream closes idle connections whenever it likes while payments arrive."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        chance = random.Random(origin.accepted)
        for _ in range(chance.randrange(1, 20)):
            request = stream.request()
            origin.ledger.execute(request.fields["idempotency-key"])
            stream.send(ok(request.body))
        origin.go.wait(chance.random() / 500)

    bank.origin.script = script
    ledger = bank.origin.ledger
    with Payers(bank.gateway.port(), 8) as payers:
        payers.paid(2000)
    payers.check(ledger)
    assert bank.origin.accepted > 100  # it did close many
    assert payers.failed().keys() <= {502}
    assert payers.count(502) <= bank.origin.accepted  # a closed connection costs one payment at most
    told = [payment for payment, status in payers.told.items() if status == 502]
    assert not any(ledger.executed[payment] for payment in told)  # it answers what it reads


def test_a_flapping_upstream_is_not_stormed(bank: Bank) -> None:
    """It dies in the middle of every third request: nothing that was sent is sent again."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        chance = random.Random(origin.accepted)
        while True:
            request = stream.request()
            origin.ledger.execute(request.fields["idempotency-key"])
            if chance.random() < 0.3:
                return
            stream.send(ok(request.body))

    bank.origin.script = script
    ledger = bank.origin.ledger
    with Payers(bank.gateway.port(), 4) as payers:
        payers.paid(300)
    payers.check(ledger)
    assert payers.failed().keys() == {502}
