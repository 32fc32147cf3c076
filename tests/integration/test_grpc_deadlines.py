"""Deadlines and cancelled calls: who keeps the time, and whether the service learns that nobody waits any more."""

from __future__ import annotations

import time
from typing import Any

import grpc
import pytest

from tests.integration.grpc_kit import Calls, code_of, framed, fresh, request
from tests.integration.h2_kit import CANCEL, NO_ERROR, Answer, H2Client, rst
from tests.integration.processes import eventually


def begin(client: H2Client, method: str, *more: tuple[str, str], host: str = "bank.test", end: bool = True) -> int:
    stream = client.open(request(host, method, *more), end=False)
    client.data(stream, framed(b"1"), end=end)
    return stream


def status(answer: Answer) -> str:
    return answer.get("grpc-status") or dict(answer.trailers).get("grpc-status", "")


# -- deadlines


def test_a_deadline_that_is_over_never_reaches_the_service(calls: Calls) -> None:
    name = fresh()
    with calls.raw() as client:
        for short in ("1n", "999n", "0S", "0m"):
            answer = client.answer(begin(client, "Book", ("x-id", name), ("grpc-timeout", short)))
            assert (answer.status, status(answer)) == (200, "4"), short
    assert calls.service.seen(name) == []


def test_the_longest_deadline_there_is(calls: Calls) -> None:
    """It is longer than the route's, which holds then."""
    name = fresh()
    with calls.raw() as client:
        answer = client.answer(begin(client, "Book", ("x-id", name), ("grpc-timeout", "99999999H")))
    assert status(answer) == "0"
    assert 0 < calls.service.call(name)["remaining"] <= 60


@pytest.mark.parametrize("wrong", ["1x", "S", "1", "123456789S", "-1S", "+1S", "1 S", "1.5S", "1s", "1SS", "0x1S", "1h"])
def test_a_malformed_deadline_is_refused(calls: Calls, wrong: str) -> None:
    name = fresh()
    with calls.raw() as client:
        answer = client.answer(begin(client, "Book", ("x-id", name), ("grpc-timeout", wrong)))
        assert (answer.status, status(answer)) == (200, "3")
        assert "grpc-timeout" in answer.get("grpc-message")
    assert calls.service.seen(name) == []


def test_two_deadlines_are_no_deadline(calls: Calls) -> None:
    """The service would see ours alone, so whichever of the two were meant, a later one is never told."""
    name = fresh()
    with calls.raw() as client:
        answer = client.answer(begin(client, "Book", ("x-id", name), ("grpc-timeout", "5S"), ("grpc-timeout", "9S")))
    assert status(answer) == "3" or calls.service.call(name)["remaining"] <= 5


@pytest.mark.parametrize(("said", "seconds"), [("7S", 7), ("7000m", 7), ("7000000u", 7), ("1M", 60), ("40S", 40)])
def test_the_service_is_told_what_is_left(calls: Calls, said: str, seconds: float) -> None:
    name = fresh()
    with calls.raw() as client:
        assert status(client.answer(begin(client, "Book", ("x-id", name), ("grpc-timeout", said)))) == "0"
    assert 0 < calls.service.call(name)["remaining"] <= seconds


def test_the_route_s_total_is_a_deadline_for_all_calls(calls: Calls) -> None:
    with calls.client("brief.test") as client:
        name = fresh()
        with pytest.raises(grpc.RpcError) as refused:
            client.book(x_id=name, x_hold="0")                          # the client itself would wait longer
        assert code_of(refused) == "DEADLINE_EXCEEDED"
        assert calls.service.ended(name)["ended"] == "cancelled"
        assert calls.service.call(name)["remaining"] <= 1


@pytest.mark.parametrize("method", ["Book", "Collect", "List", "Talk"])
@pytest.mark.parametrize("complete", [True, False], ids=["request-complete", "request-under-way"])
def test_a_deadline_ends_a_call_of_any_kind(calls: Calls, method: str, complete: bool) -> None:
    """Gateway and service keep it both, and whoever is first says so. (For a service that ignores it see the tests of upstreams.)"""
    name = fresh()
    with calls.raw() as client:
        stream = begin(client, method, ("x-id", name), ("x-hold", "0"), ("grpc-timeout", "400m"), end=complete)
        answer = client.answer(stream)
        assert (answer.status, status(answer), bytes(answer.body)) == (200, "4", b"")
        assert answer.reset in (None, NO_ERROR) and answer.ended
    if calls.service.seen(name):
        assert calls.service.ended(name)["ended"] == "cancelled"


@pytest.mark.parametrize(("method", "complete"), [("List", True), ("Talk", False)])
def test_a_deadline_in_the_middle_of_a_stream(calls: Calls, method: str, complete: bool) -> None:
    """What came before it was delivered; the end says that it is none."""
    name = fresh()
    with calls.raw() as client:
        stream = begin(client, method, ("x-id", name), ("x-hold", "1"), ("grpc-timeout", "1S"), end=complete)
        answer = client.answer(stream)
    first = framed(b"1.1.1.1.1.1.1.1." if method == "List" else b"1:1")
    assert bytes(answer.body) == first
    assert dict(answer.trailers)["grpc-status"] == "4"
    assert calls.service.ended(name)["ended"] == "cancelled"


def test_a_deadline_while_a_policy_thinks(calls: Calls) -> None:
    name = fresh()
    with calls.raw() as client:
        answer = client.answer(begin(client, "Book", ("x-id", name), ("grpc-timeout", "300m"), host="waits.test"))
    assert (answer.status, status(answer)) == (200, "4")
    assert "not sent" in answer.get("grpc-message")
    assert calls.service.seen(name) == []


def test_a_deadline_and_a_cancel_while_the_upstream_is_full(calls: Calls) -> None:
    """Calls that wait for a place keep their deadlines, and those that are given up are not sent when it is free."""
    held, late, left, last = (fresh() for _ in range(4))
    with calls.raw() as client:
        first = begin(client, "Book", ("x-id", held), ("x-hold", "0"), host="full.test")
        holding(calls, held)
        second = begin(client, "Book", ("x-id", late), ("grpc-timeout", "300m"), host="full.test")
        third = begin(client, "Book", ("x-id", left), host="full.test")
        fourth = begin(client, "Book", ("x-id", last), host="full.test")
        answer = client.answer(second)
        assert (answer.status, status(answer)) == (200, "4")
        client.send(rst(third), rst(first))
        assert status(client.answer(fourth)) == "0"
    assert (calls.service.seen(late), calls.service.seen(left)) == ([], [])
    assert calls.service.ended(held)["ended"] == "cancelled"


# -- calls that are cancelled


def told(calls: Calls, name: str, since: float, what: str) -> None:
    assert calls.service.ended(name)["ended"] == "cancelled"
    print(f"{what}: the service knew {1000 * (calls.service.call(name)['ended_at'] - since):.1f} ms after the client")


def holding(calls: Calls, name: str) -> Any:
    return eventually(lambda: [each for each in calls.service.seen(name) if each.get("holding")], f"{name} in the service")


@pytest.mark.parametrize("kind", ["unary", "client", "server", "both"])
@pytest.mark.parametrize("host", ["bank.test", "tls.test"])
def test_a_cancelled_call_is_cancelled_at_the_service(calls: Calls, kind: str, host: str) -> None:
    name = fresh()
    with calls.client(host) as client:
        if kind == "unary":
            call: Any = client.booking(x_id=name, x_hold="0")
        elif kind == "client":
            call = client.collecting([b"1"], x_id=name, x_hold="1")
        elif kind == "server":
            call = client.list(x_id=name, x_hold="1")
            next(call)
        else:
            call = client.talk([b"1"], x_id=name, x_hold="1")
            next(call)
        holding(calls, name)
        since = time.monotonic()
        call.cancel()
        told(calls, name, since, f"a cancelled {kind} call, {host}")


def test_the_deadline_of_the_client_cancels_at_the_service(calls: Calls) -> None:
    name = fresh()
    with calls.client() as client, pytest.raises(grpc.RpcError) as refused:
        client.book(x_id=name, x_hold="0", timeout=1)
    assert code_of(refused) == "DEADLINE_EXCEEDED"
    assert calls.service.ended(name)["ended"] == "cancelled"


def test_a_client_that_vanishes_cancels_its_calls(calls: Calls) -> None:
    names = [fresh() for _ in range(3)]
    client = calls.raw()
    for name, method in zip(names, ("Book", "List", "Talk"), strict=True):
        begin(client, method, ("x-id", name), ("x-hold", "0"), end=method != "Talk")
        holding(calls, name)
    since = time.monotonic()
    client.abort()
    for name in names:
        told(calls, name, since, "a client that vanished")


def test_a_reset_leaves_the_other_calls_of_the_connection_alone(calls: Calls) -> None:
    name = fresh()
    with calls.raw() as client:
        stream = begin(client, "Talk", ("x-id", name), ("x-hold", "1"), end=False)
        holding(calls, name)
        client.send(rst(stream, CANCEL))
        assert status(client.answer(begin(client, "Book"))) == "0"
    assert calls.service.ended(name)["ended"] == "cancelled"


def test_what_the_configuration_says_to_finish_is_finished(calls: Calls) -> None:
    """A payment that was sent completely: `abandoned: finish` holds for calls as well, when it is asked for."""
    name, witness = fresh(), fresh()
    with calls.client("finished.test") as client:
        call = client.booking(x_id=name, x_hold="0")
        holding(calls, name)
        call.cancel()
        client.book(x_id=witness)                                       # the reset is certainly read by now
        assert calls.service.call(name)["ended"] is None
    calls.service.control("Go", "go")
    try:
        assert calls.service.ended(name)["ended"] == "done"
    finally:
        calls.service.control("Go", "stop")


# -- silence


def test_silence_before_the_service_has_said_anything(calls: Calls) -> None:
    """Nobody can tell who waits for whom: the listener's `timeouts: {body}` bounds it, and says so as a deadline."""
    name = fresh()
    with calls.raw("brief") as client:
        answer = client.answer(begin(client, "Talk", ("x-id", name), ("x-hold", "0"), end=False))
    assert (answer.status, status(answer)) == (200, "4")
    assert calls.service.ended(name)["ended"] == "cancelled"


def test_a_client_that_only_listens_is_not_slow(calls: Calls) -> None:
    """The listener's `timeouts: {body}` is for a request that is wanted: a stream of both that says nothing for longer goes on."""
    name = fresh()
    with calls.raw("brief") as client:
        stream = begin(client, "Talk", ("x-id", name), end=False)
        answer = client.answer_of(stream)
        client.until(lambda: len(answer.body) >= len(framed(b"1:1")) or answer.over, "the first answer")
        end = time.monotonic() + 1.2
        while time.monotonic() < end:                                   # three times as long as `body`
            client.barrier()
            time.sleep(0.1)
        assert not answer.over, answer
        client.data(stream, framed(b"2"))
        client.answer(stream)
    assert bytes(answer.body) == framed(b"1:1") + framed(b"2:2")
    assert status(answer) == "0"
