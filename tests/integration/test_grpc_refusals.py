"""What the gateway itself refuses, as a client of gRPC is told: HTTP 200, grpc-status in the head, and nothing behind it.

Every refusal is provoked twice: by grpcio, which must understand it, and by frames, which show what is on the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from tests.integration.echo import token
from tests.integration.faults import connect, get, post
from tests.integration.grpc_kit import SERVICE, Calls, code_of, framed, fresh, hear, request
from tests.integration.h2_kit import NO_ERROR
from tests.integration.processes import eventually

Told = dict[str, str]
GOOD = "0123456789abcdef"

# host, metadata, method, the status that the client sees, and HTTP's for records
REFUSALS: list[tuple[str, Callable[[], Told], str, str, int]] = [
    ("keyed.test", dict, "Book", "UNAUTHENTICATED", 401),
    ("keyed.test", lambda: {"x-api-key": GOOD}, "Book", "UNAUTHENTICATED", 401),
    ("jwt.test", dict, "Book", "UNAUTHENTICATED", 401),
    ("jwt.test", lambda: {"authorization": "Bearer e30.e30.e30"}, "Book", "UNAUTHENTICATED", 401),
    ("scopes.test", lambda: {"authorization": f"Bearer {token(scope='payments:read')}"}, "Book", "PERMISSION_DENIED", 403),
    ("nosy.test", lambda: {"x-closed": "yes"}, "Book", "PERMISSION_DENIED", 403),
    ("nosy.test", lambda: {"x-teapot": "yes"}, "Book", "UNKNOWN", 418),
    ("bank.test", dict, "Nowhere", "UNIMPLEMENTED", 404),
    ("gone.test", dict, "Book", "UNAVAILABLE", 503),
]
NUMBERS = {"UNAUTHENTICATED": "16", "PERMISSION_DENIED": "7", "UNKNOWN": "2", "UNIMPLEMENTED": "12", "UNAVAILABLE": "14", "RESOURCE_EXHAUSTED": "8"}
each = pytest.mark.parametrize(("host", "told", "method", "code", "http"), REFUSALS, ids=[f"{row[0]}-{row[3]}-{row[4]}" for row in REFUSALS])


def unseen(calls: Calls, name: str) -> None:
    assert calls.service.seen(name) == []


@each
def test_grpcio_understands(calls: Calls, host: str, told: Callable[[], Told], method: str, code: str, http: int) -> None:
    name = fresh()
    with calls.client(host, service="bank.v1.Unknown" if method == "Nowhere" else SERVICE) as client:
        with pytest.raises(grpc.RpcError) as refused:
            client.channel.unary_unary(client.path(method))(b"1", metadata=[("x-id", name), *told().items()], timeout=20)
        assert code_of(refused) == code
        assert refused.value.details()
        assert dict(refused.value.initial_metadata() or ()).get("x-request-id") or dict(refused.value.trailing_metadata())["x-request-id"]
    unseen(calls, name)


@each
@pytest.mark.parametrize("complete", [True, False], ids=["request-complete", "request-under-way"])
def test_on_the_wire(
    calls: Calls, host: str, told: Callable[[], Told], method: str, code: str, http: int, complete: bool
) -> None:
    with calls.raw() as client:
        fields = request(host, method, *told().items(), service="bank.v1.Unknown" if method == "Nowhere" else SERVICE)
        stream = client.open(fields, end=False)
        if complete:
            client.data(stream, framed(b"1"))
        answer = client.answer(stream)
        assert (answer.status, answer.get("grpc-status"), answer.get("content-type")) == (200, NUMBERS[code], "application/grpc")
        assert answer.get("grpc-message") and answer.get("x-request-id")
        assert (bytes(answer.body), answer.trailers, answer.ended) == (b"", [], True)
        assert answer.reset in (None, NO_ERROR)
        assert answer.get("content-length") == ""
        client.ask(request(), framed(b"1"))                     # the connection goes on


def test_a_message_of_a_policy_is_encoded(calls: Calls) -> None:
    with calls.client("nosy.test") as client, pytest.raises(grpc.RpcError) as refused:
        client.book(x_teapot="yes")
    assert refused.value.details() == "only 100 % tea"


def test_what_passes_the_same_policies(calls: Calls) -> None:
    with calls.client("scopes.test") as client:
        assert client.book(authorization=f"Bearer {token(scope='payments:write')}") == b"booked 1"
    with calls.client("nosy.test") as client:
        call = client.channel.unary_unary(client.path("Book")).with_call
        answer, done = call(b"1", timeout=20)
        assert answer == b"booked 1"
        assert dict(done.initial_metadata())["x-seen"] == "200"


def test_a_rate_limit(calls: Calls) -> None:
    name = fresh()
    with calls.client("slow.test") as client:
        assert client.book() == b"booked 1"
        with pytest.raises(grpc.RpcError) as refused:
            client.book(x_id=name)
        assert code_of(refused) == "RESOURCE_EXHAUSTED"
        said = {**dict(refused.value.initial_metadata() or ()), **dict(refused.value.trailing_metadata())}
        assert int(said["retry-after"]) > 0
    unseen(calls, name)


def test_a_body_above_the_limit(calls: Calls) -> None:
    """A unary call has no content-length: its size is known when it has come."""
    with calls.client("small.test") as client:
        assert client.book(bytes(60_000)).startswith(b"booked")
        for size in (70_000, 1 << 20):
            with pytest.raises(grpc.RpcError) as refused:
                client.book(bytes(size))
            assert code_of(refused) == "RESOURCE_EXHAUSTED"
        with pytest.raises(grpc.RpcError) as refused:
            client.collect([bytes(10_000)] * 10)
        assert code_of(refused) == "RESOURCE_EXHAUSTED"
        assert client.book() == b"booked 1"


def test_a_body_above_the_limit_behind_answers(calls: Calls) -> None:
    """A stream of both that has been answered already fails at its end, behind what was delivered."""
    records = len(calls.records("small"))
    heard: list[bytes] = []
    with calls.client("small.test") as client:
        assert hear(client.talk(conversation(heard, bytes(10_000))), heard)[1] == "RESOURCE_EXHAUSTED"
    assert heard == [b"%d:" % number + bytes(10_000) for number in range(1, len(heard) + 1)]
    assert 1 <= len(heard) <= 6                                 # of 10,005 bytes each, within 64 KiB
    # Records of the calls before may be written now only.
    (record,) = eventually(lambda: [each for each in calls.records("small")[records:] if each["path"].endswith("/Talk")], "the record")
    assert (record["outcome"], record["reason"]) == ("refused", "body-too-large")


def conversation(heard: list[bytes], message: bytes) -> Iterator[bytes]:
    """Says the next word when the last one was answered."""
    for number in range(20):
        eventually(lambda number=number: len(heard) >= number, "the answer")
        yield message


def test_a_policy_that_reads_the_body(calls: Calls) -> None:
    """It sees a call's messages as they are sent, and refuses what is larger than it allows."""
    with calls.client("reads.test") as client:
        name = fresh()
        assert client.book(b"100 EUR", x_id=name) == b"booked 100 EUR"
        assert calls.service.told(name)["x-length"] == str(len(framed(b"100 EUR")))
        with pytest.raises(grpc.RpcError) as refused:
            client.book(b"much")
        assert code_of(refused) == "PERMISSION_DENIED"
        with pytest.raises(grpc.RpcError) as refused:
            client.book(bytes(100_000))
        assert code_of(refused) == "RESOURCE_EXHAUSTED"


def test_a_head_above_the_limits(calls: Calls) -> None:
    with calls.raw() as client:
        stream = client.open(request("bank.test", "Book", *[(f"x-{number}", "v" * 4000) for number in range(10)]), end=False)
        client.data(stream, framed(b"1"))
        answer = client.answer(stream)
        assert (answer.status, answer.get("grpc-status")) == (200, "3")
    with calls.client() as client_of_grpcio, pytest.raises(grpc.RpcError) as refused:
        client_of_grpcio.book(**{f"x_{number}": "v" * 4000 for number in range(10)})
    assert code_of(refused) == "INVALID_ARGUMENT"


def test_what_is_no_call_gets_problem_details(calls: Calls) -> None:
    with calls.raw() as client:
        fields = [(name, "application/json" if name == "content-type" else value) for name, value in request("keyed.test")]
        answer = client.ask(fields, b"{}")
    assert (answer.status, answer.get("content-type")) == (404, "application/problem+json")


def test_a_call_over_http_1(calls: Calls) -> None:
    """Its status would be lost with the trailers: a payment that the service refused would look like one that was made."""
    name, body = fresh(), framed(b"1")
    with connect(calls.gateway.port()) as stream:
        said = stream.ask(post(f"/{SERVICE}/Book", body, "content-type: application/grpc", "te: trailers", f"x-id: {name}"))
        assert (said.status, b"grpc-over-http1" in said.body) == (505, True)
        assert stream.ask(get("/")).status == 404                               # the connection goes on
    unseen(calls, name)


# -- what remains of it


@pytest.mark.parametrize(
    ("route", "host", "told", "status", "slug"),
    [("keyed", "keyed.test", {}, 401, "key-missing"), ("gone", "gone.test", {}, 503, "upstream-unreachable"), ("nosy", "nosy.test", {"x_closed": "1"}, 403, "closed")],
)
def test_records_and_metrics_carry_the_http_status(calls: Calls, route: str, host: str, told: dict[str, Any], status: int, slug: str) -> None:
    def count() -> float:
        found = calls.gateway.metrics()
        return sum(value for name, value in found.items() if name.startswith("http_server_request_duration_seconds_count")
                   and f'http_route="{route}"' in name and f'http_response_status_code="{status}"' in name)  # fmt: skip

    before, records = count(), len(calls.records(route))
    with calls.client(host) as client, pytest.raises(grpc.RpcError):
        client.book(**told)
    eventually(lambda: count() == before + 1, "the metric")
    record = eventually(lambda: calls.records(route)[records:], "a record")[0]
    assert (record["status"], record["reason"], record["path"]) == (status, slug, f"/{SERVICE}/Book")


def test_the_record_of_a_call_that_was_answered(calls: Calls) -> None:
    records = len(calls.records("ledger"))
    with calls.client() as client:
        client.book(b"12345")
    record = eventually(lambda: calls.records("ledger")[records:], "a record")[0]
    assert (record["status"], record["outcome"], record["method"]) == (200, "answered", "POST")
    assert (record["bytes_in"], record["bytes_out"]) == (len(framed(b"12345")), len(framed(b"booked 12345")))
