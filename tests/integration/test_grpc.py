"""gRPC through a gateway, between a client and a service of grpcio."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.integration.bank import WatchedGateway
from tests.integration.grpc_bank import CODES, SERVICE, GrpcBank
from tests.integration.pki import Authority
from tests.integration.processes import PATIENCE, eventually


class Edge:
    """A gateway before a bank."""

    def __init__(self, gateway: WatchedGateway, bank: GrpcBank, folder: Path) -> None:
        self.gateway = gateway
        self.bank = bank
        self.folder = folder

    def channel(self, name: str = "public", *options: tuple[str, Any]) -> grpc.Channel:
        target = f"127.0.0.1:{self.gateway.port(name)}"
        if name == "secure":
            credentials = grpc.ssl_channel_credentials((self.folder / "root.crt").read_bytes())
            return grpc.secure_channel(target, credentials, (("grpc.ssl_target_name_override", "bank.test"), *options))
        return grpc.insecure_channel(target, options)


POLICIES = """
policies:
  nobody: {ip: {deny: 127.0.0.1/32}}
  token: {jwt: {issuer: i, audience: a, algorithms: HS256, secret: a-secret-of-32-bytes-for-the-tests-here}}
  rare: {rate_limit: {key: ip, rate: 1/h}}
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    folder = tmp_path_factory.mktemp("grpc")
    authority = Authority("Root", number=210)
    (folder / "root.crt").write_bytes(authority.pem)
    authority.issue("bank.test").write(folder, "bank")
    bank = GrpcBank()
    match = f"grpc: {{service: {SERVICE}"
    (folder / "edge.yaml").write_text(
        "version: 1\nworkers: 1\nadmin: {bind: 127.0.0.1:0}\nlisteners:\n"
        "  public: {bind: 127.0.0.1:0, http2: {clear: true}}\n"
        "  secure: {bind: 127.0.0.1:0, tls: {certificates: [{cert: bank.crt, key: bank.key}]}}\n"
        f"upstreams:\n  bank: {{targets: ['127.0.0.1:{bank.port}'], protocol: grpc, health: {{eject: {{failures: 1000, ratio: 100%}}}}}}\n"
        f"  gone: {{targets: ['127.0.0.1:1'], protocol: grpc}}\n{POLICIES}"
        f"routes:\n  - {{name: payments, match: {{{match}}}}}, upstream: bank, limits: {{body: 64MiB}}}}\n"
        f"  - {{name: denied, match: {{{match}, method: Denied}}}}, upstream: bank, policies: [nobody]}}\n"
        f"  - {{name: unknown, match: {{{match}, method: Unknown}}}}, upstream: bank, policies: [token]}}\n"
        f"  - {{name: rare, match: {{{match}, method: Rare}}}}, upstream: bank, policies: [rare]}}\n"
        f"  - {{name: small, match: {{{match}, method: Small}}}}, upstream: bank, limits: {{body: 100B}}}}\n"
        f"  - {{name: gone, match: {{{match}, method: Gone}}}}, upstream: gone}}\n"
    )
    try:
        with WatchedGateway(folder / "edge.yaml") as gateway:
            yield Edge(gateway, bank, folder)
    finally:
        bank.close()


@pytest.fixture
def edge(shared: Edge) -> Iterator[Edge]:
    shared.bank.go_on.clear()
    shared.bank.cancelled.clear()
    yield shared
    shared.bank.go_on.set()
    shared.gateway.calm()


listeners = pytest.mark.parametrize("name", ["public", "secure"])


def failed(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code(), error.value.details()


# -- calls


@listeners
def test_a_unary_call_with_metadata_in_both_directions(edge: Edge, name: str) -> None:
    with edge.channel(name) as channel:
        answer, call = channel.unary_unary(f"/{SERVICE}/Transfer").with_call(
            b"100 EUR", timeout=PATIENCE, metadata=(("x-purpose", "rent"), ("x-raw-bin", b"\x00\xfe"))
        )
    assert answer == b"paid 100 EUR"
    assert dict(call.initial_metadata())["x-begin"] == "yes"
    assert dict(call.trailing_metadata()) == {"x-end": "done", "x-raw-bin": b"\x00\xff"}
    assert edge.bank.metadata["x-purpose"] == "rent" and edge.bank.metadata["x-raw-bin"] == b"\x00\xfe"


@listeners
def test_a_stream_of_the_server_comes_as_it_is_sent(edge: Edge, name: str) -> None:
    with edge.channel(name) as channel:
        call = channel.unary_stream(f"/{SERVICE}/Watch")(b"4", timeout=PATIENCE)
        assert next(call) == b"0"                   # the service waits
        edge.bank.go_on.set()
        assert list(call) == [b"%d" % number * (1 + number * 7) for number in (1, 2, 3)]
        assert call.code() == grpc.StatusCode.OK


@listeners
def test_a_stream_of_the_client(edge: Edge, name: str) -> None:
    """More than the windows of both connections hold."""
    with edge.channel(name) as channel:
        answer = channel.stream_unary(f"/{SERVICE}/Sum")(iter([b"x" * 100_000] * 60), timeout=PATIENCE)
    assert answer == b"6000000"


@listeners
def test_both_sides_speak_in_turn(edge: Edge, name: str) -> None:
    said = threading.Semaphore(1)

    def words() -> Iterator[bytes]:
        for number in range(50):
            assert said.acquire(timeout=PATIENCE)
            yield b"%d" % number

    with edge.channel(name) as channel:
        for number, heard in enumerate(channel.stream_stream(f"/{SERVICE}/Chat")(words(), timeout=PATIENCE)):
            assert heard == b"heard %d" % number
            said.release()
    assert number == 49


@listeners
def test_a_message_of_four_megabytes(edge: Edge, name: str) -> None:
    payload = bytes(range(256)) * 16_000
    limits = (("grpc.max_receive_message_length", 1 << 24),)
    with edge.channel(name, *limits) as channel:
        assert channel.unary_unary(f"/{SERVICE}/Transfer")(payload, timeout=PATIENCE) == b"paid " + payload


def test_many_calls_at_once_share_connections(edge: Edge) -> None:
    before = edge.gateway.metrics()["crossway_upstream_http2_connections_total"]
    with edge.channel() as channel:
        transfer = channel.unary_unary(f"/{SERVICE}/Transfer")
        calls = [transfer.future(b"%d" % number, timeout=PATIENCE) for number in range(300)]
        assert [call.result() for call in calls] == [b"paid %d" % number for number in range(300)]
    assert edge.gateway.metrics()["crossway_upstream_http2_connections_total"] - before <= 3


# -- what the service says


@pytest.mark.parametrize("code", range(1, 17))
@pytest.mark.parametrize("late", [False, True], ids=["in the head", "in trailers"])
def test_the_status_of_a_service_arrives(edge: Edge, code: int, late: bool) -> None:
    with edge.channel() as channel:
        call = channel.unary_unary(f"/{SERVICE}/Code")
        found = failed(lambda: call(b"-%d" % code if late else b"%d" % code, timeout=PATIENCE))
    assert found == (CODES[code], "as you wish")


def test_a_message_that_is_not_ascii(edge: Edge) -> None:
    with edge.channel() as channel:
        found = failed(lambda: channel.unary_unary(f"/{SERVICE}/Refuse")(b"1", timeout=PATIENCE))
    assert found == (grpc.StatusCode.FAILED_PRECONDITION, "not 100 % covered: é")


def test_a_service_that_answers_before_it_has_read(edge: Edge) -> None:
    with edge.channel() as channel:
        call = channel.stream_unary(f"/{SERVICE}/Late")
        found = failed(lambda: call(iter([b"x" * 50_000] * 200), timeout=PATIENCE))
    assert found == (grpc.StatusCode.RESOURCE_EXHAUSTED, "enough")


def test_a_method_that_the_service_does_not_have(edge: Edge) -> None:
    with edge.channel() as channel:
        assert failed(lambda: channel.unary_unary(f"/{SERVICE}/Missing")(b"1", timeout=PATIENCE))[0] == grpc.StatusCode.UNIMPLEMENTED


# -- what the gateway says


@listeners
@pytest.mark.parametrize(
    ("method", "payload", "code"),
    [
        ("Denied", b"1", grpc.StatusCode.PERMISSION_DENIED),
        ("Unknown", b"1", grpc.StatusCode.UNAUTHENTICATED),
        ("Small", b"1" * 200, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("Gone", b"1", grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_refusals(edge: Edge, name: str, method: str, payload: bytes, code: grpc.StatusCode) -> None:
    calls = edge.bank.calls
    with edge.channel(name) as channel:
        found, details = failed(lambda: channel.unary_unary(f"/{SERVICE}/{method}")(payload, timeout=PATIENCE))
    assert found == code and details
    assert edge.bank.calls == calls


def test_a_rate_limit(edge: Edge) -> None:
    with edge.channel() as channel:
        codes = [failed(lambda: channel.unary_unary(f"/{SERVICE}/Rare")(b"1", timeout=PATIENCE))[0] for _ in range(3)]
    assert codes[0] == grpc.StatusCode.UNIMPLEMENTED                # the service has no such method
    assert codes[1:] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2


def test_a_service_that_no_route_takes(edge: Edge) -> None:
    with edge.channel() as channel:
        assert failed(lambda: channel.unary_unary("/other.Service/Transfer")(b"1", timeout=PATIENCE))[0] == grpc.StatusCode.UNIMPLEMENTED


# -- deadlines and cancelling


def test_the_deadline_reaches_the_service_and_ends_the_call(edge: Edge) -> None:
    with edge.channel() as channel:
        channel.unary_unary(f"/{SERVICE}/Transfer")(b"1", timeout=9)
        assert edge.bank.remaining is not None and 1 < edge.bank.remaining < 10             # grpcio rounds it up
        found = failed(lambda: channel.unary_unary(f"/{SERVICE}/Wait")(b"1", timeout=0.3))
    assert found[0] == grpc.StatusCode.DEADLINE_EXCEEDED
    assert edge.bank.cancelled.wait(PATIENCE)


def test_a_cancelled_call_is_cancelled_at_the_service(edge: Edge) -> None:
    with edge.channel() as channel:
        calls = edge.bank.calls
        call = channel.unary_stream(f"/{SERVICE}/Watch")(b"2", timeout=PATIENCE)
        assert next(call) == b"0"
        waiting = channel.stream_stream(f"/{SERVICE}/Chat")(iter(()), timeout=PATIENCE)
        assert list(waiting) == []
        call.cancel()
        assert call.code() == grpc.StatusCode.CANCELLED
        eventually(lambda: edge.bank.calls == calls + 2, "both calls")


# -- health


def test_failed_calls_take_an_endpoint_out(tmp_path: Path) -> None:
    """UNAVAILABLE is a failure of the endpoint; INVALID_ARGUMENT is the caller's own."""
    bank = GrpcBank()
    (tmp_path / "edge.yaml").write_text(
        "version: 1\nworkers: 1\nadmin: {bind: 127.0.0.1:0}\nlisteners: {public: {bind: 127.0.0.1:0, http2: {clear: true}}}\n"
        f"upstreams: {{bank: {{targets: ['127.0.0.1:{bank.port}'], protocol: grpc, health: {{eject: {{failures: 3, base: 1h, max: 1h, share: 100%}}}}}}}}\n"
        f"routes: [{{name: payments, match: {{grpc: {{service: {SERVICE}}}}}, upstream: bank}}]\n"
    )
    try:
        with WatchedGateway(tmp_path / "edge.yaml") as gateway, Edge(gateway, bank, tmp_path).channel() as channel:
            call = channel.unary_unary(f"/{SERVICE}/Code")
            for _ in range(10):
                assert failed(lambda: call(b"3", timeout=PATIENCE))[0] == grpc.StatusCode.INVALID_ARGUMENT
            assert bank.calls == 10
            for number in range(3):
                words = b"-14" if number else b"14"
                assert failed(lambda words=words: call(words, timeout=PATIENCE)) == (grpc.StatusCode.UNAVAILABLE, "as you wish")
            assert failed(lambda: call(b"3", timeout=PATIENCE))[0] == grpc.StatusCode.UNAVAILABLE
            assert bank.calls == 13
    finally:
        bank.close()
