"""Calls of all four kinds between clients and servers of grpcio, in clear text and TLS on both sides, as if nothing were between them."""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Iterator

import grpc
import pytest

from tests.integration.grpc_kit import OTHER, Calls, Client, code_of, framed, fresh, hear, request
from tests.integration.grpc_service import message
from tests.integration.h2_kit import INITIAL_WINDOW
from tests.integration.processes import PATIENCE

SIDES = [("bank.test", "public"), ("tls.test", "public"), ("bank.test", "secure"), ("tls.test", "secure")]
LARGE = 4 << 20


@pytest.fixture(params=SIDES, ids=["clear-to-clear", "clear-to-tls", "tls-to-clear", "tls-to-tls"])
def client(request: pytest.FixtureRequest, calls: Calls) -> Iterator[Client]:
    with calls.client(*request.param) as made:
        yield made


# -- the four kinds


def test_a_unary_call(calls: Calls, client: Client) -> None:
    name = fresh()
    assert client.book(b"100 EUR", x_id=name) == b"booked 100 EUR"
    assert client.book(b"") == b"booked "
    assert calls.service.ended(name)["ended"] == "done"


def test_a_stream_of_the_client(client: Client) -> None:
    pieces = [b"%d" % number * number for number in range(200)]
    digest = hashlib.sha256(b"".join(pieces)).hexdigest()
    assert client.collect(pieces) == {"messages": 200, "bytes": sum(map(len, pieces)), "sha256": digest}
    assert client.collect([])["messages"] == 0


def test_a_stream_of_the_server(client: Client) -> None:
    assert list(client.list(x_count="300", x_size="100")) == [message(number, 100) for number in range(1, 301)]
    assert list(client.list(x_count="0")) == []


def test_a_stream_of_both_goes_back_and_forth(client: Client) -> None:
    """Each message is sent only when the answer to the one before has come: nothing waits for more in between."""
    told: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    told.put(b"first")
    heard = []
    for answer in client.talk(iter(told.get, None)):
        heard.append(answer)
        told.put(b"again" if len(heard) < 20 else None)
    assert heard == [b"1:first", *(b"%d:again" % number for number in range(2, 21))]


def test_many_calls_at_once_on_one_connection(client: Client) -> None:
    """More than either side takes streams: the others wait, at the client and in further connections to the service."""
    under_way = [client.booking(b"%d" % number) for number in range(300)]
    assert [each.result(PATIENCE) for each in under_way] == [b"booked %d" % number for number in range(300)]


# -- metadata and status


def test_metadata_passes_both_ways_and_binary_values_are_intact(calls: Calls, client: Client) -> None:
    name, raw = fresh(), bytes(range(256))
    call = client.channel.unary_unary(client.path("Book")).with_call
    sent = (("x-id", name), ("x-say-hello", "you"), ("x-say-raw-bin", raw), ("x-say-empty-bin", b""), ("x-end-bye", "now"), ("x-end-raw-bin", raw))
    _, done = call(b"1", metadata=sent, timeout=PATIENCE)
    head, trailers = dict(done.initial_metadata()), dict(done.trailing_metadata())
    assert (head["x-say-hello"], head["x-say-raw-bin"], head["x-say-empty-bin"]) == ("you", raw, b"")
    assert (trailers["x-end-bye"], trailers["x-end-raw-bin"]) == ("now", raw)
    told = calls.service.told(name)
    assert told["x-say-raw-bin"] == raw
    assert told["user-agent"].startswith("grpc-python/")


@pytest.mark.parametrize("code", ["NOT_FOUND", "UNAVAILABLE", "UNAUTHENTICATED"])
def test_a_refusal_of_the_service_before_any_message(client: Client, code: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        client.book(x_code=code, x_end_raw_bin=b"\xff\x00")
    assert (code_of(refused), refused.value.details()) == (code, "as told: 100 % & é")
    assert dict(refused.value.trailing_metadata())["x-end-raw-bin"] == b"\xff\x00"


def test_a_refusal_behind_messages(client: Client) -> None:
    stream = client.list(x_count="5", x_after="3", x_code="DATA_LOSS", x_end_why="disk")
    assert hear(stream) == ([message(number, 16) for number in (1, 2, 3)], "DATA_LOSS")
    assert stream.details() == "as told: 100 % & é"
    assert dict(stream.trailing_metadata())["x-end-why"] == "disk"


def test_a_service_that_ends_a_stream_of_the_client_early(client: Client) -> None:
    """Its status arrives although the client would say much more."""
    with pytest.raises(grpc.RpcError) as refused:
        client.collect((bytes(1000) for _ in range(10_000)), x_after="3", x_code="RESOURCE_EXHAUSTED")
    assert code_of(refused) == "RESOURCE_EXHAUSTED"


def test_trailers_only_is_one_head_on_the_wire(calls: Calls) -> None:
    with calls.raw() as client:
        stream = client.open(request("bank.test", "Book", ("x-code", "NOT_FOUND")), end=False)
        client.data(stream, framed(b"1"))
        answer = client.answer(stream)
    assert (answer.status, answer.get("grpc-status"), answer.get("content-type")) == (200, "5", "application/grpc")
    assert (bytes(answer.body), answer.trailers, answer.reset) == (b"", [], None)


def test_the_status_of_an_answer_stands_in_its_trailers_alone(calls: Calls) -> None:
    with calls.raw() as client:
        stream = client.open(request("bank.test", "Book", ("x-end-a", "b")), end=False)
        client.data(stream, framed(b"1"))
        answer = client.answer(stream)
    assert (answer.status, answer.get("grpc-status")) == (200, "")
    assert dict(answer.trailers)["grpc-status"] == "0" and dict(answer.trailers)["x-end-a"] == "b"
    assert bytes(answer.body) == framed(b"booked 1")


# -- size


@pytest.mark.parametrize(("host", "listener"), [*SIDES, ("narrow.test", "narrow")])
def test_messages_of_4_mib_both_ways(calls: Calls, host: str, listener: str) -> None:
    """The last one has windows of 64 KiB everywhere."""
    large = message(7, LARGE)
    with calls.client(host, listener) as client:
        assert client.book(large) == b"booked " + large
        assert [len(each) for each in client.list(x_count="2", x_size=str(LARGE))] == [LARGE, LARGE]
        assert client.collect([large, large])["bytes"] == 2 * LARGE
        assert list(client.talk([large])) == [b"1:" + large]


def test_a_client_with_a_window_of_64_kib_gets_4_mib(calls: Calls) -> None:
    with calls.raw("narrow", offer={INITIAL_WINDOW: 65535}) as client:
        stream = client.open(request("narrow.test", "Book"), end=False)
        client.data(stream, framed(bytes(LARGE)))
        answer = client.answer(stream)
    assert bytes(answer.body) == framed(b"booked " + bytes(LARGE))
    assert dict(answer.trailers)["grpc-status"] == "0"


def test_compressed_messages_pass_untouched(calls: Calls, client: Client) -> None:
    name = fresh()
    call = client.channel.unary_unary(client.path("Book"))
    assert call(b"a" * 100_000, compression=grpc.Compression.Gzip, metadata=(("x-id", name),), timeout=PATIENCE) == b"booked " + b"a" * 100_000
    assert calls.service.ended(name)["ended"] == "done"


# -- routes


def test_routes_by_service_and_method(calls: Calls) -> None:
    with calls.client(service=OTHER) as client:
        assert client.book(b"1") == b"other 1"
        with pytest.raises(grpc.RpcError) as refused:
            client.book(method="Cancel")                # no route has it
    assert code_of(refused) == "UNIMPLEMENTED"
    with calls.client("one.test") as client:
        assert len(list(client.list(x_count="2"))) == 2


def test_what_is_no_call_does_not_match_a_route_of_calls(calls: Calls) -> None:
    def changed(name: str, value: str) -> list[tuple[str, str]]:
        return [(key, value if key == name else old) for key, old in request()]

    with calls.raw() as client:
        assert client.ask(changed("content-type", "application/json"), b"{}").status == 404
        answer = client.ask(changed(":method", "GET"))
    assert (answer.status, answer.get("grpc-status"), answer.get("allow")) == (200, "12", "POST")
