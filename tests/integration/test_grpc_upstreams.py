"""What becomes of calls when their service fails, refuses, grows old or dies, and when the gateway reloads or stops."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.integration.bank import WatchedGateway
from tests.integration.grpc_kit import (
    Client,
    GrpcProcess,
    Load,
    client_of,
    code_of,
    framed,
    fresh,
    hear,
    request,
    write_files,
)
from tests.integration.grpc_service import HEALTH, SERVICE, message
from tests.integration.h2_kit import CANCEL, NO_ERROR, REFUSED_STREAM, all_over, connect_h2
from tests.integration.h2_origin import Call, TwinOrigin
from tests.integration.processes import PATIENCE, Gateway, eventually

EJECT = "eject: {failures: 3, base: 60s, max: 60s}"
CONFIG = """
version: 1
workers: {workers}
admin: {{bind: 127.0.0.1:0}}
drain: {{deadline: 20s}}
listeners: {{public: {{bind: 127.0.0.1:0, http2: {{clear: true}}}}}}
upstreams:
  again: {{targets: [127.0.0.1:{one}], protocol: grpc, retries: {{attempts: 2, on: [connect-failure, reset, 503], idempotency_key: true, backoff: {{base: 1ms, max: 5ms}}}}}}
  pair: {{targets: [127.0.0.1:{one}, 127.0.0.1:{two}], protocol: grpc, balance: round_robin, health: {{{eject}}}}}
  checked: {{targets: [127.0.0.1:{one}, 127.0.0.1:{two}], protocol: grpc, health: {{check: {{grpc: {{}}, interval: 100ms, timeout: 10s}}}}}}
  sealed: {{targets: [127.0.0.1:{one_tls}, 127.0.0.1:{two_tls}], protocol: grpc, tls: {{ca: root.crt, server_name: bank.test}}, health: {{check: {{grpc: {{service: {service}}}, interval: 100ms, timeout: 10s}}}}}}
  aged: {{targets: [127.0.0.1:{aged}], protocol: grpc}}
  scripted: {{targets: [127.0.0.1:{scripted}], protocol: grpc}}
  hasty: {{targets: [127.0.0.1:{scripted}], protocol: grpc, health: {{eject: {{failures: 3, share: 100%, base: 60s, max: 60s}}}}}}
policies: {{trail: {{audit: {{file: audit.jsonl}}}}}}
routes:
  - {{name: again, match: {{grpc: {{service: {service}}}, host: again.test}}, upstream: again, policies: [trail]}}
  - {{name: pair, match: {{grpc: {{service: {service}}}, host: pair.test}}, upstream: pair}}
  - {{name: checked, match: {{grpc: {{service: {service}}}, host: checked.test}}, upstream: checked}}
  - {{name: sealed, match: {{grpc: {{service: {service}}}, host: sealed.test}}, upstream: sealed}}
  - {{name: aged, match: {{grpc: {{service: {service}}}, host: aged.test}}, upstream: aged}}
  - {{name: scripted, match: {{grpc: {{service: {service}}}, host: scripted.test}}, upstream: scripted, policies: [trail]}}
  - {{name: hasty, match: {{grpc: {{service: {service}}}, host: hasty.test}}, upstream: hasty}}
  - {{name: health, match: {{grpc: {{service: {health}}}}}, upstream: aged}}
"""


@dataclass
class Bank:
    """Two services, one that ends connections when they are 300 ms old, an origin that does as a test says, and the gateway."""

    folder: Path
    one: GrpcProcess
    two: GrpcProcess
    aged: GrpcProcess
    origin: TwinOrigin
    gateway: WatchedGateway

    def client(self, host: str) -> Client:
        return client_of(self.gateway, host)

    def endpoints(self, name: str) -> dict[int, dict[str, Any]]:
        """By port."""
        rows = self.gateway.admin("/upstreams")[1]["upstreams"]
        (row,) = [row for row in rows if row["name"] == name]
        return {int(each["address"].rpartition(":")[2]): each for each in row["endpoints"]}

    def state(self, name: str, port: int) -> str:
        return str(self.endpoints(name)[port]["state"])


def write(folder: Path, one: GrpcProcess, two: GrpcProcess, aged: GrpcProcess, scripted: int, *, workers: int = 1) -> Path:
    path = folder / "edge.yaml"
    path.write_text(CONFIG.format(
        workers=workers, service=SERVICE, health=HEALTH, eject=EJECT, one=one.clear, two=two.clear, one_tls=one.secure,
        two_tls=two.secure, aged=aged.clear, scripted=scripted,
    ))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bank]:
    folder = tmp_path_factory.mktemp("services")
    write_files(folder)
    old = "grpc.max_connection_age_ms=300", "grpc.max_connection_age_grace_ms=20000"
    with contextlib.ExitStack() as stack:
        made = [GrpcProcess(folder), GrpcProcess(folder), GrpcProcess(folder, *old)]
        one, two, aged = [stack.enter_context(each) for each in made]
        origin = stack.enter_context(TwinOrigin())
        gateway = stack.enter_context(WatchedGateway(write(folder, one, two, aged, origin.two)))
        yield Bank(folder, one, two, aged, origin, gateway)


@pytest.fixture
def bank(opened: Bank) -> Iterator[Bank]:
    yield opened
    for process in (opened.one, opened.two):
        process.control("Fail")
        process.control("Health", "well")
    opened.origin.reset()
    opened.gateway.calm()


# -- further attempts


def test_unavailable_is_tried_again_only_as_the_money_rules_allow(bank: Bank) -> None:
    with bank.client("again.test") as client:
        name = fresh()
        with pytest.raises(grpc.RpcError) as refused:
            client.book(x_id=name, x_code="UNAVAILABLE", x_times="1")           # a POST without a key
        assert code_of(refused) == "UNAVAILABLE"
        assert len(bank.one.seen(name)) == 1
        name = fresh()
        assert client.book(b"5", x_id=name, x_code="UNAVAILABLE", x_times="1", idempotency_key=name) == b"booked 5"
        assert len(bank.one.seen(name)) == 2
        name = fresh()
        with pytest.raises(grpc.RpcError) as refused:
            client.book(x_id=name, x_code="UNAVAILABLE", idempotency_key=name)
        assert code_of(refused) == "UNAVAILABLE"
        assert len(bank.one.seen(name)) == 3                                    # the first and `attempts` more


@pytest.mark.parametrize("code", ["NOT_FOUND", "FAILED_PRECONDITION", "ABORTED", "INTERNAL", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"])
def test_what_is_not_configured_is_not_tried_again(bank: Bank, code: str) -> None:
    name = fresh()
    with bank.client("again.test") as client, pytest.raises(grpc.RpcError) as refused:
        client.book(x_id=name, x_code=code, idempotency_key=name)
    assert code_of(refused) == code
    assert len(bank.one.seen(name)) == 1


def test_what_has_been_answered_is_never_tried_again(bank: Bank) -> None:
    with bank.client("again.test") as client:
        name = fresh()
        stream = client.list(x_id=name, x_count="3", x_after="1", x_code="UNAVAILABLE", idempotency_key=name)
        assert hear(stream) == ([message(1, 16)], "UNAVAILABLE")
        assert len(bank.one.seen(name)) == 1
        name = fresh()
        with pytest.raises(grpc.RpcError) as refused:                           # the head alone was sent
            client.book(x_id=name, x_say_hello="you", x_code="UNAVAILABLE", idempotency_key=name)
        assert code_of(refused) == "UNAVAILABLE"
        assert len(bank.one.seen(name)) == 1


def test_a_message_that_is_not_kept_is_sent_once(bank: Bank) -> None:
    name = fresh()
    with bank.client("again.test") as client, pytest.raises(grpc.RpcError) as refused:
        client.book(bytes(200_000), x_id=name, x_code="UNAVAILABLE", idempotency_key=name)
    assert code_of(refused) == "UNAVAILABLE"
    assert len(bank.one.seen(name)) == 1


async def answer(call: Call) -> None:
    await call.body()
    await call.head(200, [("content-type", "application/grpc")])
    await call.write(framed(b"answered"))
    await call.finish([("grpc-status", "0")])


def refusing(how: str) -> Callable[[Call], Awaitable[None]]:
    """Refuses the first call unread, then answers."""
    refused: list[Call] = []

    async def script(call: Call) -> None:
        if refused:
            await answer(call)
            return
        refused.append(call)
        if how == "REFUSED_STREAM":
            await call.reset(REFUSED_STREAM)
        else:
            call.done = True
            await call.link.goaway(0)                                           # type: ignore[attr-defined]

    return script


@pytest.mark.parametrize("how", ["REFUSED_STREAM", "GOAWAY"])
@pytest.mark.parametrize("kind", ["unary", "streaming"])
def test_what_was_certainly_not_executed_is_sent_again(bank: Bank, how: str, kind: str) -> None:
    """Without a key, and without `retries`: nothing was executed."""
    bank.origin.script = refusing(how)
    with bank.client("scripted.test") as client:
        got = [client.book(b"1")] if kind == "unary" else list(client.list())
    assert got == [b"answered"]
    assert len(bank.origin.calls) == 2


# -- ends that are none


async def breaks(call: Call) -> None:
    call.link.abort()


async def resets(call: Call) -> None:
    await call.reset(2)


async def ends(call: Call) -> None:
    await call.finish()


async def leaves(call: Call) -> None:
    call.link.writer.close()


@pytest.mark.parametrize("kind", ["unary", "server", "both"])
@pytest.mark.parametrize("how", [breaks, resets, ends, leaves])
def test_a_service_that_dies_in_the_middle_never_looks_like_success(bank: Bank, how: Callable[[Call], Awaitable[None]], kind: str) -> None:
    async def script(call: Call) -> None:
        while b"1" not in (await call.read() or b"1"):
            pass
        await call.head(200, [("content-type", "application/grpc")])
        if kind != "unary":
            await call.write(framed(b"one"))
        await how(call)

    bank.origin.script = script
    with bank.client("scripted.test") as client:
        if kind == "unary":
            with pytest.raises(grpc.RpcError) as refused:
                client.book(b"1")
            heard, code = [b"one"], code_of(refused)
        else:
            heard, code = hear(client.list() if kind == "server" else client.talk([b"1"]))
    assert heard in ([b"one"], [])          # grpcio may drop what it has received when it learns that the call has failed
    assert code in (("UNKNOWN", "INTERNAL") if how is ends else ("UNAVAILABLE",))     # what clients make of an end without a status


@pytest.mark.parametrize("how", [breaks, resets, leaves])
def test_a_service_that_dies_before_it_answers(bank: Bank, how: Callable[[Call], Awaitable[None]]) -> None:
    bank.origin.script = how
    with bank.client("scripted.test") as client, pytest.raises(grpc.RpcError) as refused:
        client.book()
    assert code_of(refused) == "UNAVAILABLE"
    assert "may have been executed" in refused.value.details()
    assert len(bank.origin.calls) == 1


def test_a_status_of_http_becomes_one_of_grpc(bank: Bank) -> None:
    """A load balancer in front of the service, for example: grpcio reads the HTTP status."""
    async def script(call: Call) -> None:
        await call.body()
        await call.answer(b"no", int(dict(call.fields)["x-status"]), [("content-type", "text/plain")])

    bank.origin.script = script
    with bank.client("scripted.test") as client:
        for status, code in ((503, "UNAVAILABLE"), (502, "UNAVAILABLE"), (429, "UNAVAILABLE"), (401, "UNAUTHENTICATED"), (403, "PERMISSION_DENIED"), (404, "UNIMPLEMENTED")):
            with pytest.raises(grpc.RpcError) as refused:
                client.book(x_status=str(status))
            assert code_of(refused) == code, status


async def ignores(call: Call) -> None:
    call.link.origin.seen.release()
    await call.released()


@pytest.mark.parametrize("method", ["Book", "Talk"])
def test_a_service_that_ignores_deadlines(bank: Bank, method: str) -> None:
    """The gateway ends the call itself, with a status, and resets it at the service."""
    bank.origin.script = ignores
    with connect_h2(bank.gateway.port()) as client:
        stream = client.open(request("scripted.test", method, ("grpc-timeout", "500m")), end=False)
        client.data(stream, framed(b"1"), end=method == "Book")
        got = client.answer(stream)
    assert (got.status, got.get("grpc-status"), got.ended) == (200, "4", True)
    (call,) = bank.origin.calls
    eventually(call.gone.is_set, "the reset")
    told = dict(call.fields)["grpc-timeout"]
    assert told.endswith("m") and 0 < int(told[:-1]) <= 500


@pytest.mark.parametrize("ended", [True, False])
def test_a_service_that_ignores_deadlines_in_the_middle_of_a_stream(bank: Bank, ended: bool) -> None:
    async def script(call: Call) -> None:
        await call.head(200, [("content-type", "application/grpc")])
        await call.write(framed(b"one"))
        await ignores(call)

    bank.origin.script = script
    records = len(bank.folder.joinpath("audit.jsonl").read_text().splitlines())
    with connect_h2(bank.gateway.port()) as client:
        stream = client.open(request("scripted.test", "Talk", ("grpc-timeout", "500m")), end=False)
        client.data(stream, framed(b"1"), end=ended)
        got = client.answer(stream)
        assert bytes(got.body) == framed(b"one")
        assert dict(got.trailers)["grpc-status"] == "4" and got.ended
        assert got.reset in (None, NO_ERROR)
    eventually(bank.origin.calls[0].gone.is_set, "the reset")
    record = eventually(lambda: bank.folder.joinpath("audit.jsonl").read_text().splitlines()[records:], "a record")[0]
    assert '"outcome":"failed"' in record


# -- health


@pytest.mark.parametrize(("code", "after"), [("UNAVAILABLE", 1), ("INTERNAL", 0)], ids=["in-trailers", "in-its-head"])
def test_a_service_that_fails_is_taken_out(tmp_path: Path, bank: Bank, code: str, after: int) -> None:
    """By a gateway of its own, whose endpoints have no past."""
    bank.one.control("Fail", code)
    with Gateway(write(tmp_path_of(bank, tmp_path), bank.one, bank.two, bank.aged, bank.origin.two)) as gateway, client_of(gateway, "pair.test") as client:
        def ejected() -> bool:
            with contextlib.suppress(grpc.RpcError):
                list(client.list(x_count="1", x_after=str(after)))
            rows = gateway.admin("/upstreams")[1]["upstreams"]
            (row,) = [row for row in rows if row["name"] == "pair"]
            return any(each["state"] == "ejected" and each["address"].endswith(f":{bank.one.clear}") for each in row["endpoints"])

        eventually(ejected, "the ejection")
        for _ in range(10):
            assert len(list(client.list(x_count="1"))) == 1


def tmp_path_of(bank: Bank, path: Path) -> Path:
    """A folder with the keys of the bank's."""
    for name in ("root.crt", "edge.crt", "edge.key"):
        (path / name).write_bytes((bank.folder / name).read_bytes())
    return path


@pytest.mark.parametrize("code", ["NOT_FOUND", "PERMISSION_DENIED", "INVALID_ARGUMENT", "UNAUTHENTICATED", "ABORTED", "RESOURCE_EXHAUSTED", "CANCELLED"])
def test_what_the_caller_is_to_blame_for_takes_nobody_out(bank: Bank, code: str) -> None:
    before = bank.endpoints("pair")[bank.one.clear]
    bank.one.control("Fail", code)
    with bank.client("pair.test") as client:
        for number in range(30):
            with contextlib.suppress(grpc.RpcError):
                list(client.list(x_count="1", x_after=str(number % 2)))
    after = bank.endpoints("pair")[bank.one.clear]
    assert after["state"] == before["state"] == "up", after


async def gives_up(call: Call) -> None:
    """As grpc's servers do: a reset at the deadline that they were told."""
    await call.body()
    await asyncio.sleep(int(dict(call.fields)["grpc-timeout"][:-1]) / 1000)
    await call.reset(CANCEL)


@pytest.mark.parametrize("how", [ignores, gives_up])
def test_deadlines_of_a_client_in_a_hurry_take_nobody_out(bank: Bank, how: Callable[[Call], Awaitable[None]]) -> None:
    """One of them could take a service away from all others."""
    bank.origin.script = how
    with connect_h2(bank.gateway.port()) as client:
        streams = []
        for _ in range(10):
            streams.append(client.open(request("hasty.test", "Book", ("grpc-timeout", "150m")), end=False))
            client.data(streams[-1], framed(b"1"))
        for answer_ in all_over(client, streams):
            assert (answer_.status, answer_.get("grpc-status"), answer_.reset) == (200, "4", None), answer_
    assert bank.state("hasty", bank.origin.two) == "up"
    if how is gives_up:
        assert len(bank.origin.calls) == 10


@pytest.mark.parametrize("name", ["checked", "sealed"])
def test_active_checks_ask_the_health_service(bank: Bank, name: str) -> None:
    ports = {"checked": (bank.one.clear, bank.two.clear), "sealed": (bank.one.secure, bank.two.secure)}[name]
    eventually(lambda: all(bank.state(name, port) == "up" for port in ports), "two healthy endpoints")
    bank.one.control("Health", "sick")
    eventually(lambda: bank.state(name, ports[0]) != "up", "the verdict")
    with bank.client(f"{name}.test") as client:
        names = [fresh() for _ in range(6)]
        for each in names:
            assert client.book(x_id=each) == b"booked 1"
        assert all(bank.one.seen(each) == [] for each in names)
        bank.one.control("Health", "well")
        eventually(lambda: bank.state(name, ports[0]) == "up", "its return")


def test_a_connection_that_fell_silent_gets_no_further_calls(bank: Bank) -> None:
    """As one that a firewall has forgotten: it takes all that is sent and says nothing, and a new one works."""
    silent: list[Any] = []

    async def script(call: Call) -> None:
        if not silent:
            silent.append(call.link)
        elif call.link is silent[0]:
            await call.gone.wait()
            return
        await answer(call)

    bank.origin.script = script
    with connect_h2(bank.gateway.port()) as client:
        said = []
        for _ in range(3):
            stream = client.open(request("scripted.test", "Book", ("grpc-timeout", "1500m")), end=False)
            client.data(stream, framed(b"1"))
            got = client.answer(stream)
            said.append(got.get("grpc-status") or dict(got.trailers)["grpc-status"])
    assert said == ["0", "4", "0"]


# -- connections that end in peace


def test_connections_that_grow_old_lose_no_call(bank: Bank) -> None:
    """The service says GOAWAY whenever a connection is 300 ms old."""
    before = bank.gateway.counter("upstream_http2_connections")
    with Load([bank.client("aged.test") for _ in range(6)]) as load:
        eventually(lambda: bank.gateway.counter("upstream_http2_connections") - before >= 6 or load.failures, "further connections")
        load.more(20)
    assert load.failures == []
    print(f"{load.done} calls over {bank.gateway.counter('upstream_http2_connections') - before:.0f} connections")


def test_a_stream_outlives_the_age_of_its_connection(bank: Bank) -> None:
    name, before = fresh(), bank.gateway.counter("upstream_http2_connections")
    with bank.client("aged.test") as client:
        stream = client.list(x_id=name, x_count="3", x_hold="1")
        assert next(stream) == message(1, 16)
        eventually(lambda: client.book() and bank.gateway.counter("upstream_http2_connections") - before >= 3, "further connections")
        bank.aged.control("Go", "go")
        assert list(stream) == [message(2, 16), message(3, 16)]
        bank.aged.control("Go", "stop")


def test_reloads_lose_no_call(bank: Bank) -> None:
    with bank.client("aged.test") as slow, Load([bank.client(f"{host}.test") for host in ("pair", "aged", "again") for _ in range(2)]) as load:
        stream = slow.list(x_count="3", x_hold="1")
        next(stream)
        for _ in range(3):
            events = len(bank.gateway.events())
            bank.gateway.signal(signal.SIGHUP)
            eventually(lambda events=events: len(bank.gateway.events()) > events, "the reload")
            load.more(30)
        bank.aged.control("Go", "go")
        assert len(list(stream)) == 2
        bank.aged.control("Go", "stop")
    assert load.failures == []


def test_a_drain_loses_no_call(tmp_path: Path, bank: Bank) -> None:
    """What has begun is finished; clients are told to go elsewhere, and what they have not begun fails as certainly not sent."""
    with Gateway(write(tmp_path_of(bank, tmp_path), bank.one, bank.two, bank.aged, bank.origin.two, workers=2)) as gateway:
        clients = [client_of(gateway, "pair.test") for _ in range(4)]
        names = [fresh() for _ in clients]
        calls = [client.booking(b"%d" % number, x_id=name, x_hold="0") for number, (client, name) in enumerate(zip(clients, names, strict=True))]
        streams = [client.list(x_count="3", x_hold="1") for client in clients]
        for stream in streams:
            assert next(stream) == message(1, 16)
        for name in names:
            eventually(lambda name=name: bank.one.seen(name) or bank.two.seen(name), "the call")
        gateway.signal(signal.SIGTERM)
        eventually(lambda: "stopping" in gateway.events(), "the drain")
        for process in (bank.one, bank.two):
            process.control("Go", "go")
        assert [call.result(PATIENCE) for call in calls] == [b"booked %d" % number for number in range(len(calls))]
        for stream in streams:
            assert list(stream) == [message(2, 16), message(3, 16)]
        for process in (bank.one, bank.two):
            process.control("Go", "stop")
        for client in clients:
            client.channel.close()
        assert gateway.wait() == 0


def test_a_service_that_is_killed(bank: Bank) -> None:
    """The last test of this file: it is the end of one of the services."""
    with bank.client("aged.test") as client:
        stream = client.list(x_count="3", x_hold="1")
        next(stream)
        call = client.booking(x_hold="0")
        eventually(lambda: any(each.get("holding") and each["method"] == "Book" for each in bank.aged.seen()), "the call")
        bank.aged.signal(signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as refused:
            list(stream)
        assert code_of(refused) == "UNAVAILABLE"
        with pytest.raises(grpc.RpcError) as refused:
            call.result(PATIENCE)
        assert code_of(refused) == "UNAVAILABLE"
        bank.aged.process.wait(PATIENCE)
        with pytest.raises(grpc.RpcError) as refused:
            client.book()
        assert code_of(refused) == "UNAVAILABLE"
        assert "not sent" in refused.value.details()
