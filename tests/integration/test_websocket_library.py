"""Clients and servers of the `websockets` library understand each other through the gateway, in clear text and TLS on either side."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from websockets import Subprotocol
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK, InvalidStatus

from tests.integration.bank import Peak
from tests.integration.faults import PATTERN
from tests.integration.processes import PATIENCE
from tests.integration.websocket_kit import Tunnels, echo, tunnels_at

MANY = 200
OFFERED = [Subprotocol("pay.v1"), Subprotocol("pay.v2")]
SIDES = [("public", "/lib"), ("secure", "/lib"), ("public", "/tls"), ("secure", "/tls")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnels]:
    with tunnels_at(tmp_path_factory.mktemp("library")) as made:
        yield made


@pytest.fixture
def tunnels(opened: Tunnels) -> Iterator[Tunnels]:
    """Nothing is held after the test, and no worker died."""
    yield opened
    opened.servers.handler = echo
    opened.servers.seen.clear()
    opened.gateway.calm()


def run(what: Any) -> Any:
    return asyncio.run(asyncio.wait_for(what, PATIENCE * 2))


@pytest.mark.parametrize(("name", "path"), SIDES)
def test_messages_pings_and_both_kinds_of_close(tunnels: Tunnels, name: str, path: str) -> None:
    async def talk() -> None:
        async with connect(tunnels.url(path, name), subprotocols=OFFERED, **tunnels.options(name)) as client:
            assert client.subprotocol == "pay.v2"
            for message in ("hello", b"\0\xff" * 1000, "", "é" * 70_000):
                await client.send(message)
                assert await client.recv() == message
            await (await client.ping(b"are you there"))
            (server,) = tunnels.servers.seen
            await asyncio.wrap_future(tunnels.servers.do(pinged(server)))
            await client.close(4001, "done")
            await asyncio.wrap_future(tunnels.servers.do(server.wait_closed()))
        assert (server.close_code, server.close_reason) == (4001, "done")
        async with connect(tunnels.url(path, name), **tunnels.options(name)) as client:
            await client.send("close 4002")
            with pytest.raises(ConnectionClosedError) as told:
                await client.recv()
            assert told.value.rcvd is not None
            assert (told.value.rcvd.code, told.value.rcvd.reason) == (4002, "as asked")
        async with connect(tunnels.url(path, name), **tunnels.options(name)) as client:
            await client.send("close 1000")
            with pytest.raises(ConnectionClosedOK):
                await client.recv()

    async def pinged(server: ServerConnection) -> None:
        await (await server.ping(b"and you"))

    run(talk())


@pytest.mark.parametrize(("name", "path"), SIDES)
def test_a_message_of_64_mib_both_ways_in_bounded_memory(tunnels: Tunnels, name: str, path: str) -> None:
    large = PATTERN * 64

    async def talk() -> None:
        async with connect(tunnels.url(path, name), compression=None, **tunnels.options(name)) as client:
            await client.send(large)
            assert await client.recv() == large

    with Peak(tunnels.gateway.pids[0]) as one, Peak(tunnels.gateway.pids[1]) as other:
        run(talk())
    assert one.growth + other.growth < 32 << 20


def test_two_hundred_at_once_and_none_takes_a_request_s_place(tunnels: Tunnels) -> None:
    """The upstream allows two requests in flight: a tunnel is none."""
    before = tunnels.number("tunnels_total")

    async def one(number: int, everybody: asyncio.Barrier) -> ClientConnection:
        # As long as a handshake is under way it is a request; the upstream's queue holds the others.
        name = "secure" if number % 2 else "public"
        client = await connect(tunnels.url(f"/lib/{number}", name), **tunnels.options(name))
        async with everybody:
            if number == 0:
                shown = await asyncio.to_thread(tunnels.gateway.metrics)
                open_now = [shown['crossway_route_tunnels_open{http_route="lib"}']]
                while shown["crossway_tunnels_open"] != MANY:       # the workers say so ten times a second
                    await asyncio.sleep(0.02)
                    shown = await asyncio.to_thread(tunnels.gateway.metrics)
                assert open_now == [MANY]
        async with everybody:
            pass
        for turn in range(20):
            await client.send(f"{number} {turn}")
            assert await client.recv() == f"{number} {turn}"
        await client.close()
        return client

    async def all_of_them() -> None:
        everybody = asyncio.Barrier(MANY)
        await asyncio.gather(*(one(number, everybody) for number in range(MANY)))

    run(all_of_them())
    assert tunnels.number("tunnels_total") == before + MANY


def test_a_server_that_vanishes_and_a_client_that_vanishes(tunnels: Tunnels) -> None:
    gone: list[BaseException] = []
    said = asyncio.Event()

    async def listen(connection: ServerConnection) -> None:
        try:
            await connection.recv()
            await connection.recv()
        except ConnectionClosedError as error:
            gone.append(error)
            said.set()

    async def talk() -> None:
        async with connect(tunnels.url("/lib/vanish"), **tunnels.options("public")) as client:
            await client.send("x")
            assert await client.recv() == "x"
            (server,) = tunnels.servers.seen
            tunnels.servers.loop.call_soon_threadsafe(server.transport.abort)
            with pytest.raises(ConnectionClosedError) as told:
                await client.recv()
            assert told.value.rcvd is None                       # 1006: no close frame was made up
        tunnels.servers.handler = listen
        client = await connect(tunnels.url("/lib/leave"), **tunnels.options("public"))
        await client.send("x")
        client.transport.abort()
        await asyncio.wrap_future(tunnels.servers.do(asyncio.wait_for(said.wait(), PATIENCE)))
        assert len(gone) == 1

    run(talk())


def test_what_is_refused_is_an_ordinary_answer(tunnels: Tunnels) -> None:
    async def talk() -> None:
        with pytest.raises(InvalidStatus) as told:
            await connect(tunnels.url("/nowhere"), **tunnels.options("public"))
        assert told.value.response.status_code == 404

    run(talk())
