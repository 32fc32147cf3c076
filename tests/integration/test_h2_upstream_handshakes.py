"""WebSocket handshakes to upstreams of HTTP/2: what they are told, when they are asked, and what becomes of it when they do not say yes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from websockets import Subprotocol
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.frames import Opcode

from tests.integration.echo import token
from tests.integration.faults import Cut, Message, ScriptedOrigin, Stream, connect, get
from tests.integration.h2_kit import (
    ACK,
    CANCEL,
    EXTENDED_CONNECT,
    HEADERS,
    PREFACE,
    SETTINGS,
    frame,
    goaway,
    headers,
    settings,
)
from tests.integration.h2_origin import Call, TwoLink
from tests.integration.h2_tunnels import H2Stream
from tests.integration.processes import PATIENCE, eventually
from tests.integration.websocket_h2_kit import NOTHING, OFFERS, Behind, behind, messages, parrot, problem, refuses
from tests.integration.websocket_kit import handshake

SIDES = [(name, path) for name in ("public", "secure") for path in ("/two", "/tls")]
OFFERED = [Subprotocol("pay.v1"), Subprotocol("pay.v2")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    with behind(tmp_path_factory.mktemp("handshakes")) as made:
        yield made


@pytest.fixture
def edge(opened: Behind) -> Iterator[Behind]:
    """Nothing is held after the test, and no worker died."""
    yield opened
    opened.twin.reset()
    opened.raw.reset()
    opened.twin.first = dict(OFFERS)
    opened.serve(parrot)
    opened.gateway.calm()
    eventually(lambda: opened.number("tunnels_open") == 0, "no open tunnel")


def ask(edge: Behind, path: str, *lines: str) -> Message:
    """A handshake over HTTP/1.1 and the answer that is none."""
    with connect(edge.gateway.port()) as client:
        return client.ask(handshake(path, *lines))


def h2_ask(edge: Behind, path: str, *fields: tuple[str, str]) -> tuple[H2Stream, bytes]:
    """The same over HTTP/2."""
    with edge.client() as client:
        stream = client.headed(client.connect(path, *fields))
        body, whole = stream.rest()
        assert whole, stream.reset
        return stream, body


# -- messages


@pytest.mark.parametrize(("name", "path"), SIDES)
def test_messages_pings_and_both_kinds_of_close(edge: Behind, name: str, path: str) -> None:
    """The library's client, over HTTP/1.1."""
    edge.serve(messages)
    options: dict[str, Any] = {"max_size": None, "ping_interval": None, "proxy": None, "open_timeout": PATIENCE}
    if name == "secure":
        options["ssl"] = edge.trust()

    async def talk() -> None:
        async with connect_websocket(edge.url(path, name), subprotocols=OFFERED, **options) as client:
            assert client.subprotocol == "pay.v2"
            for message in ("hello", b"\0\xff" * 1000, "", "é" * 70_000):
                await client.send(message)
                assert await client.recv() == message
            await (await client.ping(b"are you there"))
            await client.close(4001, "done")
            assert (client.close_code, client.close_reason) == (4001, "done")
        async with connect_websocket(edge.url(path, name), **options) as client:
            assert client.subprotocol is None
            await client.send("close 4002")
            with pytest.raises(ConnectionClosedError) as told:
                await client.recv()
            assert told.value.rcvd is not None
            assert (told.value.rcvd.code, told.value.rcvd.reason) == (4002, "as asked")
        with pytest.raises(InvalidStatus) as refused:
            await connect_websocket(edge.url("/nowhere", name), **options)
        assert refused.value.response.status_code == 404

    asyncio.run(asyncio.wait_for(talk(), PATIENCE * 2))
    assert len(edge.twin.links) == 1                            # both went over one connection


@pytest.mark.parametrize(("name", "path"), SIDES)
def test_messages_of_a_client_of_http_2(edge: Behind, name: str, path: str) -> None:
    edge.serve(messages)
    with edge.client(name) as client:
        one = client.tunnel(path, ("sec-websocket-protocol", "pay.v1, pay.v2"))
        assert one.fields["sec-websocket-protocol"] == "pay.v2"
        assert not {"connection", "upgrade", "sec-websocket-accept", "transfer-encoding"} & set(one.fields)
        for message in ("hello", b"\0\xff" * 1000, "", "é" * 70_000):
            one.say(message)
            assert one.heard() == message
        one.ping(b"are you there")
        heard = one.hear()
        assert (heard.opcode, bytes(heard.data)) == (Opcode.PONG, b"are you there")
        one.close(4001, "done")
        assert one.hear().opcode is Opcode.CLOSE
        one.write(b"", end=True)
        assert one.rest() == (b"", True)
        assert client.get("/two/bytes/100")[0] == 200


# -- what the upstream is told


@pytest.mark.parametrize("version", ["one", "two"])
@pytest.mark.parametrize("path", ["/two", "/tls"])
def test_the_upstream_sees_an_extended_connect(edge: Behind, version: str, path: str) -> None:
    told: list[tuple[Call, bool]] = []

    async def script(call: Call) -> None:
        told.append((call, call.complete))
        await parrot(call)

    edge.serve(script)
    more = {"origin": "https://bank.test", "sec-websocket-extensions": "permessage-deflate", "sec-websocket-protocol": "pay.v1", "x-mine": "yes"}
    if version == "one":
        with edge.open(f"{path}/seen?a=b", *(f"{name}: {value}" for name, value in more.items()), "content-length: 0") as client:
            client.send(b"bytes")
            assert client.exactly(5) == b"bytes"
    else:
        with edge.client() as made:
            tunnel = made.tunnel(f"{path}/seen?a=b", *more.items())
            tunnel.write(b"bytes")
            assert tunnel.exactly(5) == b"bytes"
    ((call, complete),) = told
    assert (call.method, call.protocol, call.path, call.authority) == ("CONNECT", "websocket", f"{path}/seen?a=b", "bank.test")
    assert call.scheme == ("https" if path == "/tls" else "http")
    assert not complete                                         # the stream is open
    fields = dict(call.fields)
    assert {name: fields[name] for name in more} == more
    assert [value for name, value in call.fields if name == "sec-websocket-version"] == ["13"]
    forbidden = {"sec-websocket-key", "sec-websocket-accept", "connection", "upgrade", "content-length", "transfer-encoding", "host"}
    assert not forbidden & set(fields)


def test_clients_of_http_1_get_the_proof_for_their_key(edge: Behind) -> None:
    """The one of RFC 6455 1.3. What the server says of its own accept is not passed on."""

    async def script(call: Call) -> None:
        await call.head(200, [("sec-websocket-accept", "nonsense"), ("x-served-by", "two"), ("content-length", "0")])
        await call.write(b"first")
        await call.finish()

    edge.serve(script)
    lines = ["GET /two HTTP/1.1", "host: b", "connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13"]
    with connect(edge.gateway.port()) as client:
        client.send("\r\n".join([*lines, "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==", "", ""]).encode())
        head = client.head()
        assert (head.status, head.fields["sec-websocket-accept"]) == (101, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
        assert (head.fields["connection"], head.fields["upgrade"], head.fields["x-served-by"]) == ("upgrade", "websocket", "two")
        assert not {"content-length", "transfer-encoding"} & set(head.fields)
        assert client.rest() == (b"first", True)                # a length of a tunnel means nothing


def test_bytes_behind_the_handshake_wait_for_the_answer(edge: Behind) -> None:
    early: list[int] = []

    async def script(call: Call) -> None:
        call.link.origin.seen.release()
        await call.released()
        early.append(call.received)
        await parrot(call)

    edge.serve(script)
    with connect(edge.gateway.port()) as client:
        client.send(handshake("/two/early"), b"early bytes")
        edge.twin.saw()
        edge.twin.release()
        assert client.head().status == 101
        assert client.exactly(11) == b"early bytes"
    assert early == [0]


def test_policies_see_the_handshake_and_its_answer(edge: Behind) -> None:
    assert ask(edge, "/bank").status == 401
    assert h2_ask(edge, "/bank")[0].status == 401
    assert edge.tunnels() == []
    with edge.open("/bank", f"authorization: Bearer {token()}") as client:
        client.send(b"bytes")
        assert client.exactly(5) == b"bytes"
    with connect(edge.gateway.port()) as client:
        client.send(handshake("/nosy/yes"))
        head = client.head()
        assert (head.status, head.fields["x-seen"]) == (101, "101")
        client.send(b"through")
        assert client.exactly(7) == b"through"
    refused = ask(edge, "/nosy/no")
    assert (refused.status, problem(refused.body)) == (403, "not-this-one")
    (call,) = [call for call in edge.tunnels() if call.path == "/nosy/no"]
    eventually(lambda: call.code == CANCEL, "the end at the service")
    assert edge.record("/nosy/no")["status"] == 403


def test_routes_that_allow_none_and_other_protocols(edge: Behind) -> None:
    with edge.client() as client:
        for path, protocol in (("/plain", "websocket"), ("/two", "connect-udp"), ("/two", None)):
            refused = client.headed(client.connect(path, protocol=protocol))
            refused.rest()
            assert refused.status == 501
    assert ask(edge, "/plain").status == 200                   # stripped: an ordinary request
    assert edge.tunnels() == []


# -- what is not offered


@pytest.mark.parametrize("path", ["/two", "/tls"])
def test_an_upstream_that_does_not_offer_it_is_not_asked(edge: Behind, path: str) -> None:
    """And no handshake takes it away from other requests, or their connection."""
    edge.twin.first = dict(NOTHING)
    for number in range(10):
        refused = ask(edge, f"{path}/{number}")
        assert (refused.status, problem(refused.body), refused.fields["connection"]) == (502, "upstream-no-websocket", "close")
        assert b"SETTINGS_ENABLE_CONNECT_PROTOCOL" in refused.body and b"was not asked for" in refused.body
        stream, body = h2_ask(edge, f"{path}/{number}")
        assert (stream.status, problem(body)) == (502, "upstream-no-websocket")
    with edge.client() as client:
        assert client.get("/two/bytes/100")[0] == 200
    assert edge.tunnels() == []
    assert len(edge.twin.links) == (1 if path == "/two" else 2)
    assert all(not link.goaways for link in edge.twin.links if isinstance(link, TwoLink))


def test_an_upstream_may_offer_it_later(edge: Behind) -> None:
    edge.twin.first = dict(NOTHING)
    assert ask(edge, "/two").status == 502
    (link,) = edge.twin.open("two")
    edge.twin.run(link.send(settings((EXTENDED_CONNECT, 1))))

    def opens() -> bool:
        with connect(edge.gateway.port()) as client:
            client.send(handshake("/two/now"))
            return client.head().status == 101

    eventually(opens, "an offer that is believed")


def test_an_offer_that_is_taken_back_is_an_error_of_the_connection(edge: Behind) -> None:
    """RFC 8441 3."""
    with edge.open("/two/kept") as client:
        (link,) = edge.twin.open("two")
        edge.twin.run(link.send(settings((EXTENDED_CONNECT, 0))))
        assert not client.rest()[1]
        assert isinstance(link, TwoLink)
        eventually(lambda: [each.error_code for each in link.goaways] == [1], "a GOAWAY for the protocol's breach")
    with edge.open("/two/again") as client:
        client.send(b"x")
        assert client.exactly(1) == b"x"


# -- SETTINGS that do not come


def frames(stream: Stream) -> Iterator[tuple[int, int, int, bytes]]:
    """What the gateway sends behind its preface: kind, flags, stream and payload."""
    assert stream.exactly(len(PREFACE)) == PREFACE
    while True:
        start = stream.exactly(9)
        yield start[3], start[4], int.from_bytes(start[5:9], "big"), stream.exactly(int.from_bytes(start[:3], "big"))


def silent_at_first(heads: list[int], then: Callable[[Stream], None]) -> Callable[[ScriptedOrigin, Stream], None]:
    """A server that says nothing before the test's `go`."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        def watch() -> None:
            with contextlib.suppress(Cut, OSError):
                for kind, _, number, _ in frames(stream):
                    if kind == HEADERS:
                        heads.append(number)
                        origin.seen.release()
                    if kind == SETTINGS and number == 0:
                        settled.set()

        settled = threading.Event()
        reader = threading.Thread(target=watch)
        reader.start()
        assert settled.wait(PATIENCE)
        origin.go.wait(PATIENCE)
        then(stream)
        reader.join(PATIENCE)

    return script


def test_nothing_is_sent_before_the_upstream_has_said_what_it_offers(edge: Behind) -> None:
    heads: list[int] = []

    def then(stream: Stream) -> None:
        before = list(heads)
        stream.send(settings((EXTENDED_CONNECT, 1)), frame(SETTINGS, ACK))
        edge.raw.saw()
        assert (before, heads) == ([], [1])
        stream.send(headers(1, [(":status", "200")], end=False))
        stream.send(frame(0, 1, 1, b"welcome"))

    edge.raw.script = silent_at_first(heads, then)
    with connect(edge.gateway.port()) as client:
        client.send(handshake("/raw/waits"))
        eventually(lambda: edge.raw.accepted == 1, "the connection")
        with edge.client() as other:                            # others need not wait for SETTINGS, and do not
            other.open([(":method", "GET"), (":scheme", "http"), (":authority", "b"), (":path", "/two/bytes/1")], end=True)
        edge.raw.go.set()
        assert client.head().status == 101
        assert client.exactly(7) == b"welcome"


def test_a_client_that_leaves_before_the_settings_come_is_forgotten(edge: Behind) -> None:
    heads: list[int] = []

    def then(stream: Stream) -> None:
        stream.send(settings((EXTENDED_CONNECT, 1)), frame(SETTINGS, ACK))

    edge.raw.script = silent_at_first(heads, then)
    clients = [connect(edge.gateway.port()) for _ in range(5)]
    for client in clients:
        client.send(handshake("/raw/leaves"))
    eventually(lambda: edge.number("exchanges") == 5, "the handshakes")
    for client in clients[1:]:
        client.reset()
    eventually(lambda: len(edge.records("/raw/leaves")) == 4, "the ends of those who left")
    edge.raw.go.set()
    edge.raw.saw()                                              # one of five
    eventually(lambda: edge.number('exchanges') == 1, "one exchange")
    assert (heads, edge.raw.accepted) == ([1], 1)
    clients[0].close()


def test_settings_that_never_come(tmp_path: Any) -> None:
    """Not sent, and said so; and nobody waits for this connection again."""
    with behind(tmp_path, connect="300ms") as edge:
        heads: list[int] = []
        edge.raw.script = silent_at_first(heads, lambda stream: None)
        for turn in range(2):
            refused = ask(edge, f"/raw/{turn}")
            assert (refused.status, problem(refused.body)) == (504, "upstream-connect-timeout")
            assert b"was not sent" in refused.body
        assert heads == []
        assert edge.raw.accepted == 4                           # one more attempt each, on a connection of its own
        edge.raw.go.set()


def test_a_connection_that_ends_before_its_settings(edge: Behind) -> None:
    def leaves(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.exactly(len(PREFACE))

    edge.raw.script = leaves
    refused = ask(edge, "/raw/gone")
    assert (refused.status, problem(refused.body)) == (503, "upstream-unreachable")
    assert b"was not sent" in refused.body
    assert edge.raw.accepted == 2                               # the one further attempt of the configuration, and no endless ones


# -- other answers


@pytest.mark.parametrize("status", [403, 201, 302, 503])
def test_what_is_not_200_is_an_ordinary_answer(edge: Behind, status: int) -> None:
    edge.serve(refuses(status, b"a body" * 100, [("x-why", "me"), ("location", "/there")]))
    for turn in range(2):
        refused = ask(edge, f"/two/no/{status}/{turn}")
        assert (refused.status, refused.body, refused.fields["x-why"], refused.fields["connection"]) == (status, b"a body" * 100, "me", "close")
        stream, body = h2_ask(edge, f"/two/no/{status}/{turn}")
        assert (stream.status, body, stream.fields["x-why"]) == (status, b"a body" * 100, "me")
    calls = edge.tunnels()
    assert len(calls) == 4                                      # and none of them twice
    eventually(lambda: all(call.complete for call in calls), "the end of each request")
    assert [call.code for call in calls] == [None] * 4          # their streams ended in peace
    assert len(edge.twin.links) == 1
    assert all(each["status"] == status for each in edge.records(f"/two/no/{status}/0"))


def test_an_answer_with_trailers_and_an_interim_one(edge: Behind) -> None:
    async def script(call: Call) -> None:
        await call.inform(103, [(b"link", b"</a>")])
        await call.answer(b"no", 403, trailers=[(b"x-late", b"yes")])

    edge.serve(script)
    with connect(edge.gateway.port()) as client:
        client.send(handshake("/two/informed"))
        assert client.head().status == 103
        answer = client.answer()
        assert (answer.status, answer.body) == (403, b"no")


def once(first: Callable[[Call], Any]) -> tuple[list[Call], Callable[[Call], Any]]:
    """The first WebSocket meets `first`, the others the parrot."""
    calls: list[Call] = []

    async def script(call: Call) -> None:
        calls.append(call)
        await (first(call) if len(calls) == 1 else parrot(call))

    return calls, script


@pytest.mark.parametrize("warm", [False, True], ids=["new", "reused"])
@pytest.mark.parametrize("how", ["reset", "vanish"])
def test_a_handshake_that_was_sent_is_never_sent_again(edge: Behind, how: str, warm: bool) -> None:
    """Though the upstream is configured to be asked again after resets, and though it is a GET of the client's."""

    async def breaks(call: Call) -> None:
        if how == "reset":
            await call.reset()
        else:
            call.link.abort()

    if warm:
        with edge.client() as client:
            assert client.get("/two/bytes/1")[0] == 200
    calls, script = once(breaks)
    edge.serve(script)
    refused = ask(edge, "/two/once")
    assert (refused.status, problem(refused.body)) == (502, "upstream-closed")
    assert b"may have been executed" in refused.body
    assert len(calls) == 1


def test_a_stream_that_is_refused_unread_goes_elsewhere(edge: Behind) -> None:
    """RFC 9113 8.7: the server promises that it has not acted on it. The same for a GOAWAY that leaves it out."""

    async def refused(call: Call) -> None:
        await call.reset(7)

    async def leaves(call: Call) -> None:
        await call.link.send(goaway(call.stream - 2 if call.stream > 1 else 0))

    for first in (refused, leaves):
        calls, script = once(first)
        edge.serve(script)
        with edge.open("/two/elsewhere") as client:
            client.send(b"x")
            assert client.exactly(1) == b"x"
        assert len(calls) == 2


def test_a_server_that_answers_nothing(tmp_path: Any) -> None:
    with behind(tmp_path) as edge:
        async def script(call: Call) -> None:
            await call.gone.wait()

        edge.serve(script)
        text = (edge.folder / "edge.yaml").read_text()
        (edge.folder / "edge.yaml").write_text(text.replace("protocol: http2, retries", "protocol: http2, timeouts: {head: 300ms}, retries"))
        assert edge.gateway.command("reload").returncode == 0
        refused = ask(edge, "/two/never")
        assert (refused.status, problem(refused.body)) == (504, "upstream-head-timeout")
        (call,) = edge.tunnels()
        eventually(lambda: call.code == CANCEL, "the end at the service")
        with connect(edge.gateway.port()) as client:
            assert client.ask(get("/two/bytes/10")).status == 200
        assert len(edge.twin.links) == 1


@pytest.mark.parametrize("version", ["one", "two"])
def test_a_client_that_leaves_before_the_answer_cancels_the_handshake(edge: Behind, version: str) -> None:
    async def script(call: Call) -> None:
        call.link.origin.seen.release()
        await call.gone.wait()

    edge.serve(script)
    path = f"/two/leaves/{version}"
    if version == "one":
        client = connect(edge.gateway.port())
        client.send(handshake(path))
        edge.twin.saw()
        client.reset()
        eventually(lambda: edge.tunnels()[0].code == CANCEL, "the end at the service")
    else:
        with edge.client() as made:
            tunnel = made.connect(path)
            edge.twin.saw()
            tunnel.cancel()
            eventually(lambda: edge.tunnels()[0].code == CANCEL, "the end at the service")
            assert made.get("/two/bytes/1")[0] == 200
    eventually(lambda: edge.records(path), "the record")
    assert edge.records(path)[-1]["outcome"] == "aborted"
    assert len(edge.twin.links) == 1                            # RST_STREAM, and the connection goes on
