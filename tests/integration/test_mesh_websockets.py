"""WebSockets between members: the library `websockets` at both ends, and sidecars, an edge and a mesh gateway between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from websockets import Subprotocol
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from gateway._speedups.certificates import parse_certificates, parse_key
from gateway._speedups.token_cache import Principal
from gateway.workload.user import LIFE, Author
from tests.integration.control_kit import ControlProcess
from tests.integration.h2_origin import TwinOrigin
from tests.integration.h2_tunnels import TunnelClient
from tests.integration.mesh_kit import Control, Sidecar, free_port
from tests.integration.pki import Authority
from tests.integration.processes import PATIENCE, Gateway, environment, eventually
from tests.integration.test_mesh_edge import EDGE, SECRET, SIGNED, token_of
from tests.integration.test_mesh_gateways import Passage, member, plane
from tests.integration.test_mesh_intercept import APP, PAYMENTS, Host, Net, networks
from tests.integration.test_mesh_member import RULE, call, endpoint, secured
from tests.integration.websocket_h2_kit import NOTHING, OFFERS, messages, tunnelled
from tests.integration.websocket_kit import echo, handshake

CALLER = "spiffe://bank.test/service/payments"
LARGE = os.urandom(1 << 20)


class App:
    """A service on the library: echoes, and keeps the connections that it got."""

    def __init__(self) -> None:
        self.seen: list[ServerConnection] = []
        self.plain: list[dict[str, str]] = []  # heads of requests that were no handshake
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = asyncio.run_coroutine_threadsafe(self._open(), self.loop).result(PATIENCE)
        self.port = int(self.server.sockets[0].getsockname()[1])

    async def _open(self) -> Any:
        quiet = logging.getLogger("tests.quiet")  # a sidecar that looks whether it is there says nothing
        quiet.disabled = True
        return await serve(
            self._serve, "127.0.0.1", 0, max_size=None, ping_interval=None, process_request=self._first, logger=quiet,
            select_subprotocol=lambda _, offered: Subprotocol("pay.v2") if "pay.v2" in offered else None,
        )  # fmt: skip

    def _first(self, connection: ServerConnection, request: Any) -> Any:
        if "upgrade" not in request.headers:
            self.plain.append({name.lower(): value for name, value in request.headers.raw_items()})
            return connection.respond(426, "a WebSocket is spoken here\n")
        return None

    async def _serve(self, connection: ServerConnection) -> None:
        self.seen.append(connection)
        await echo(connection)

    def headers(self, number: int = -1) -> Any:
        request = self.seen[number].request
        assert request is not None
        return request.headers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        async def end() -> None:
            self.server.close()
            await self.server.wait_closed()

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(PATIENCE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PATIENCE)
        self.loop.close()


def dial(port: int, path: str = "/v1/quotes", host: str = "ledger", **more: Any) -> ClientConnection:
    """A WebSocket of an app through its own sidecar, which the Host tells where to."""
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
    sock.settimeout(None)
    return connect(f"ws://{host}{path}", sock=sock, proxy=None, max_size=None, ping_interval=None, open_timeout=PATIENCE, close_timeout=PATIENCE, **more)


def echoes(client: ClientConnection, message: str | bytes = "hello") -> bool:
    client.send(message)
    return client.recv(PATIENCE) == message


def cut(client: ClientConnection) -> bool:
    """Wait for an end that nobody said: 1006."""
    with pytest.raises(ConnectionClosedError) as told:
        client.recv(PATIENCE)
    return told.value.rcvd is None


def refused(port: int, path: str = "/v1/quotes", host: str = "ledger", **more: Any) -> Any:
    """The plain answer to a handshake."""
    with pytest.raises(InvalidStatus) as told:
        dial(port, path, host, **more)
    return told.value.response


class Pair:
    """The ledger behind its sidecar, and payments' sidecar with a port for it."""

    def __init__(self, control: Control, app: App, *more: str) -> None:
        self.control, self.app = control, app
        self.port = free_port()
        self.ledger = Sidecar(control, "ledger", app.port, *more)
        self.payments = Sidecar(control, "payments", app.port, "--local", f"ledger=127.0.0.1:{self.port}")
        self.say({})

    def say(self, websocket: dict[str, Any] | None, *, own: dict[str, Any] | None = None, **settings: Any) -> None:
        """What the mesh's file says of the ledger from now on; `own` is what its sidecar hears, when that is another thing."""
        said = {} if websocket is None else {"websocket": websocket}
        self.control.services["ledger"] = {"protocol": "http", "endpoints": [endpoint(self.ledger)], **said, **settings}
        self.control.own["ledger"] = {"protocol": "http", **(said if own is None else own)}
        self.control.change()
        self.control.settled()


@pytest.fixture
def app() -> Iterator[App]:
    with App() as made:
        yield made


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    made = Control(tmp_path)
    made.rules = [dict(RULE)]
    yield made
    made.stop()


@pytest.fixture
def pair(control: Control, app: App) -> Iterator[Pair]:
    made = Pair(control, app)
    with made.ledger, made.payments:
        yield made
        for sidecar in (made.ledger, made.payments):
            assert sidecar.process.poll() in (None, 0), sidecar.errors.read_text()


def open_now(sidecar: Sidecar) -> float:
    return sidecar.metric("crossway_route_tunnels_open{")


# -- from app to app


@pytest.mark.parametrize("way", ["host", "local"])
def test_messages_pings_and_both_kinds_of_close(pair: Pair, app: App, way: str) -> None:
    port = pair.port if way == "local" else pair.payments.outbound
    with dial(port, subprotocols=[Subprotocol("pay.v1"), Subprotocol("pay.v2")]) as client:
        assert client.subprotocol == "pay.v2"
        for message in ("hello", b"\0\xff" * 1000, "", LARGE):
            assert echoes(client, message)
        assert client.ping(b"are you there").wait(PATIENCE)
        assert app.headers()["x-crossway-caller"] == CALLER
        client.close(4001, "done")
    eventually(lambda: app.seen[-1].close_code == 4001, "the client's close at the app")
    with dial(port) as client:
        client.send("close 4002")
        with pytest.raises(ConnectionClosedError) as told:
            client.recv(PATIENCE)
        assert told.value.rcvd is not None and (told.value.rcvd.code, told.value.rcvd.reason) == (4002, "as asked")


def test_tunnels_are_counted_at_both_sidecars(pair: Pair) -> None:
    labels = f'reporter="%s",source_workload="payments",source_workload_namespace="bank.test",source_principal="{CALLER}"'
    with dial(pair.payments.outbound, compression=None) as client:
        for _ in range(3):
            assert echoes(client, b"x" * 1000)
        for sidecar, way in ((pair.payments, "outbound>ledger"), (pair.ledger, "inbound")):
            assert sidecar.metric(f'crossway_route_tunnels_open{{http_route="{way}"}}') == 1
            assert sidecar.metric("crossway_tunnels_total") == 1
            assert sidecar.metric('crossway_tunnel_bytes_total{direction="in"}') == 3 * 1008, "a client's frames carry a mask"
            assert sidecar.metric('crossway_tunnel_bytes_total{direction="out"}') == 3 * 1004
    for sidecar, reporter in ((pair.payments, "source"), (pair.ledger, "destination")):
        eventually(lambda s=sidecar: open_now(s) == 0, "its end")  # type: ignore[misc]
        counted = [line for line in sidecar.page("/metrics").splitlines() if line.startswith(f"istio_requests_total{{{labels % reporter}")]
        assert len(counted) == 1 and 'response_code="101"' in counted[0] and counted[0].endswith(" 1")
        assert sidecar.metric(f"istio_response_bytes_sum{{{labels % reporter}") >= 3 * 1004
        assert sidecar.metric("crossway_tunnels_ended_total") == 0


def test_a_client_over_http2_at_the_outbound_listener(pair: Pair, app: App) -> None:
    for port in (pair.payments.outbound, pair.port):
        with TunnelClient(port) as client:
            assert client.offers_tunnels()
            stream = client.headed(client.open([
                (":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", "/v1/quotes"), (":authority", "ledger"),
                ("sec-websocket-version", "13"),
            ]))  # fmt: skip
            assert stream.status == 200, stream.fields
            for message in ("hello", b"\1" * 70_000):
                stream.say(message)
                assert stream.heard() == message
            assert app.headers()["x-crossway-caller"] == CALLER
    eventually(lambda: open_now(pair.payments) == open_now(pair.ledger) == 0, "the end of both")


def test_an_ordinary_request_beside_it(pair: Pair, app: App) -> None:
    with dial(pair.payments.outbound) as client:
        status, headers, _ = call(pair.payments.outbound, "/v1/quotes")
        assert status == 426 and "crossway-websocket" not in headers, "no handshake, nothing to be told"
        assert app.plain[-1]["x-crossway-caller"] == CALLER
        assert echoes(client)


def test_parts_of_a_split_carry_them_and_share_the_places(control: Control, pair: Pair, app: App) -> None:
    with App() as other, Sidecar(control, "ledger", other.port, state="ledger-2.state") as second:
        rows = [{**endpoint(each), "labels": {"version": version}} for each, version in ((pair.ledger, "v1"), (second, "v2"))]
        canary = {"labels": {"version": "v2"}, "when": {"headers": [["x-canary", "exact", "yes"]], "cookies": []}}
        pair.say({"tunnels": 2}, split=[{"labels": {"version": "v1"}, "weight": 1}], canary=[canary], endpoints=rows)
        with dial(pair.payments.outbound) as one, dial(pair.payments.outbound, additional_headers={"x-canary": "yes"}) as two:
            assert echoes(one) and echoes(two)
            assert len(app.seen) == len(other.seen) == 1
            assert refused(pair.payments.outbound).status_code == 503


# -- who may


def test_a_handshake_is_judged_as_the_get_that_it_is(control: Control, pair: Pair, app: App) -> None:
    answer = refused(pair.payments.outbound, "/v2/quotes")
    assert answer.status_code == 403
    assert answer.headers["crossway-denied"].startswith(f'caller="{CALLER}", rule=none, considered="payments-to-ledger"')
    for said in ({"methods": ["POST"]}, {"headers": {"x-desk": "fx"}}, {"claims": {"scope": "payments:write"}}):
        control.rules[0] = {**{key: RULE[key] for key in ("name", "from", "to", "prefix")}, **said}
        control.change()
        control.settled()
        assert refused(pair.payments.outbound).status_code == 403, said
    assert app.seen == app.plain == [] and open_now(pair.ledger) == open_now(pair.payments) == 0
    control.rules[0] = {**RULE, "headers": {"x-desk": "fx"}}
    control.change()
    control.settled()
    with dial(pair.payments.outbound, additional_headers={"x-desk": "fx"}) as client:
        assert echoes(client)
    with Sidecar(control, "accounts", app.port) as accounts:
        assert refused(accounts.outbound).status_code == 403
    eventually(lambda: pair.ledger.metric("crossway_mesh_denied_total") == 5, "the denials")
    assert pair.ledger.logged("a call was denied")[0]["method"] == "GET"


def test_a_policy_that_is_narrowed_ends_open_tunnels(control: Control, pair: Pair) -> None:
    with dial(pair.payments.outbound) as quotes, dial(pair.payments.outbound, "/v1/orders") as orders:
        assert echoes(quotes) and echoes(orders)
        control.rules[0]["prefix"] = "/v1/orders"
        control.change()
        assert cut(quotes)
        assert echoes(orders), "what the policy still allows goes on"
        line = eventually(lambda: pair.ledger.logged("connections that the policy no longer allows are closed"), "the line")
        assert line[0]["connections"] == 1
        control.rules, control.default = [], "audit"
        control.change()
        control.settled()
        assert echoes(orders), "in audit mode it stays"
    assert pair.ledger.metric('crossway_tunnels_ended_total{cause="cut"}') == 1


@pytest.mark.parametrize("whom", ["payments", "ledger"])
@pytest.mark.parametrize("over", ["http1", "http2"])
def test_revocation_of_either_end_closes_its_tunnels(control: Control, pair: Pair, whom: str, over: str) -> None:
    cutter = pair.ledger if whom == "payments" else pair.payments
    with contextlib.ExitStack() as stack:
        if over == "http1":
            client = stack.enter_context(dial(pair.payments.outbound))
            assert echoes(client)
        else:
            http2 = stack.enter_context(TunnelClient(pair.port))
            stream = http2.tunnel("/v1/quotes")
            stream.say("hello")
            assert stream.heard() == "hello"
        control.revoked["identities"] = [f"spiffe://bank.test/service/{whom}"]
        control.change()
        if over == "http1":
            assert cut(client)
        else:
            http2.until(lambda: stream.over, "its end")
            assert stream.reset is not None, "not as if the service had ended it"
    eventually(lambda: cutter.metric("crossway_mesh_revoked_connections_closed_total") == 1, "the count")
    assert eventually(lambda: cutter.logged("connections of revoked members closed"), "the line")[0]["connections"] == 1
    eventually(lambda: open_now(pair.payments) == open_now(pair.ledger) == 0, "both ends")
    with pytest.raises((InvalidStatus, ConnectionClosed, OSError)):
        dial(pair.payments.outbound)


def test_a_serial_that_is_revoked_closes_the_tunnels_of_that_certificate_alone(control: Control, pair: Pair, app: App) -> None:
    mine = control.ca.pair(control.folder, "direct", CALLER)
    serial = _serial(mine)
    with dial(pair.payments.outbound) as other, secured(pair.ledger, mine, control.ca) as direct:
        assert echoes(other)
        direct.sendall(handshake("/v1/quotes"))
        assert direct.recv(4096).startswith(b"HTTP/1.1 101 ")
        control.revoked["serials"] = [serial]
        control.change()
        direct.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert direct.recv(100) == b""
        assert echoes(other)


def _serial(pair: Path) -> str:
    from cryptography import x509

    return f"{x509.load_pem_x509_certificates(pair.read_bytes())[0].serial_number:x}"


# -- who carries them


def test_a_service_that_does_not_say_it_gets_a_plain_request_and_the_answer_tells(pair: Pair, app: App) -> None:
    pair.say(None)
    answer = refused(pair.payments.outbound)
    assert answer.status_code == 426 and answer.body == b"a WebSocket is spoken here\n"
    assert answer.headers.get_all("crossway-websocket") == ["off; the mesh's file does not say websocket for the service ledger"]
    assert "upgrade" not in app.plain[-1]
    told = eventually(lambda: pair.payments.logged("a WebSocket handshake is passed on as a plain request"), "the line")
    assert told[0]["route"] == "outbound>ledger" and told[0]["reason"] == "the mesh's file does not say websocket for the service ledger"
    with TunnelClient(pair.port) as client:
        stream = client.headed(client.connect("/v1/quotes"))
        assert stream.status == 501 and stream.fields["crossway-websocket"].endswith("for the service ledger")
    pair.say({})
    with dial(pair.payments.outbound) as client_:
        assert echoes(client_)


def test_the_callees_sidecar_tells_as_well(control: Control, pair: Pair, app: App) -> None:
    """As long as it has not heard of it, or is of an earlier version, which knows no such word."""
    pair.say({}, own={})
    answer = refused(pair.payments.outbound)
    assert answer.status_code == 426
    assert answer.headers.get_all("crossway-websocket") == ["off; the mesh's file does not say websocket for the service ledger"]
    assert pair.ledger.logged("a WebSocket handshake is passed on as a plain request")[0]["route"] == "inbound"
    with TunnelClient(pair.port) as client:  # an answer that is no tunnel is an ordinary one there, too
        assert client.headed(client.connect("/v1/quotes")).status == 426


def test_other_upgrades_are_stripped_without_a_word(pair: Pair, app: App) -> None:
    pair.say(None)
    status, headers, _ = call(pair.payments.outbound, connection="upgrade, http2-settings", upgrade="h2c", http2_settings="AAMAAABkAAQAAP__")
    assert status == 426 and "crossway-websocket" not in headers and "upgrade" not in app.plain[-1]


def test_an_app_that_is_spoken_to_in_http2_is_asked_in_it(control: Control, app: App, tmp_path: Path) -> None:
    Authority("Behind", number=98).issue("127.0.0.1").write(tmp_path, "edge")
    with TwinOrigin(tmp_path) as twin:
        twin.first, twin.script = dict(OFFERS), tunnelled(messages)
        app.port = twin.two
        pair = Pair(control, app, "--app-protocol", "http2")
        with pair.ledger, pair.payments:
            with dial(pair.payments.outbound, subprotocols=[Subprotocol("pay.v2")]) as client:
                assert client.subprotocol == "pay.v2"
                for message in ("hello", b"\0\xff" * 1000, LARGE):
                    assert echoes(client, message)
            (asked,) = [each for each in twin.calls if each.method == "CONNECT"]
            assert asked.get("x-crossway-caller") == CALLER and asked.path == "/v1/quotes"
            # One that does not offer them is told apart from one that refuses.
            twin.reset()
            twin.first, twin.script = dict(NOTHING), tunnelled(messages)
            answer = refused(pair.payments.outbound)
            assert answer.status_code == 502 and b"upstream-no-websocket" in answer.body


def test_an_app_that_is_spoken_to_in_grpc_cannot_be_asked(control: Control, app: App) -> None:
    pair = Pair(control, app, "--app-protocol", "grpc")
    with pair.ledger, pair.payments:
        event = "the mesh's file lets WebSockets pass, and --app-protocol does not: their handshakes are passed on as plain requests"
        assert eventually(lambda: pair.ledger.logged(event), "the contradiction")[0]["app_protocol"] == "grpc"
        answer = refused(pair.payments.outbound)
        assert answer.headers["crossway-websocket"] == "off; the sidecar of ledger speaks grpc to its app, which knows no WebSockets"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"websocket": {"depth": 3}}, "websocket.depth is not known to this version"),
        ({"websocket": {"tunnels": 0}}, "websocket.tunnels is a number above 0, not 0"),
        ({"websocket": {"idle": "soon"}}, "'soon' is no duration"),
        ({"websocket": True}, "websocket is a mapping, not True"),
        ({"websocket": {}, "protocol": "http2"}, "websocket for a service that speaks http2"),
    ],
)
def test_what_is_not_understood_refuses_the_assignment_and_changes_nothing(control: Control, pair: Pair, said: dict[str, Any], reason: str) -> None:
    with dial(pair.payments.outbound) as client:
        control.services["ledger"] |= said
        control.change()
        told = eventually(lambda: control.of("payments", "nack"), "the refusal")
        assert told[0]["reason"] == f"it cannot be built: service ledger: {reason}"
        assert echoes(client)
        with dial(pair.payments.outbound) as another:
            assert echoes(another)


# -- bounds


def test_silence_ends_a_tunnel(pair: Pair) -> None:
    pair.say({"idle": 0.5}, own={"websocket": {}})
    with dial(pair.payments.outbound) as client:
        assert echoes(client) and cut(client)
    eventually(lambda: pair.payments.metric('crossway_tunnels_ended_total{cause="idle"}') == 1, "the caller's sidecar")
    pair.say({}, own={"websocket": {"idle": "500ms"}})
    with dial(pair.payments.outbound) as client:
        assert echoes(client) and cut(client)
    eventually(lambda: pair.ledger.metric('crossway_tunnels_ended_total{cause="idle"}') == 1, "the callee's sidecar")


def test_places_are_the_files_at_both_sides(control: Control, pair: Pair) -> None:
    pair.say({"tunnels": 2}, own={"websocket": {"tunnels": 3}})
    mine = control.ca.pair(control.folder, "direct", CALLER)
    with dial(pair.payments.outbound) as one, dial(pair.port) as two:
        answer = refused(pair.payments.outbound)
        assert answer.status_code == 503 and json.loads(answer.body)["type"].endswith("too-many-tunnels")
        assert pair.payments.metric("crossway_tunnels_refused_total") == 1
        assert call(pair.payments.outbound)[0] == 426, "requests have places of their own"
        with secured(pair.ledger, mine, control.ca) as third, secured(pair.ledger, mine, control.ca) as fourth:
            third.sendall(handshake("/v1/quotes"))
            assert third.recv(4096).startswith(b"HTTP/1.1 101 ")
            fourth.sendall(handshake("/v1/quotes"))
            assert fourth.recv(4096).startswith(b"HTTP/1.1 503 "), "whoever the caller is"
        assert echoes(one) and echoes(two)
    eventually(lambda: open_now(pair.payments) == 0, "free places")
    with dial(pair.payments.outbound) as client:
        assert echoes(client)


# -- the end of a sidecar


def test_a_drain_waits_for_tunnels_and_takes_no_more(pair: Pair) -> None:
    with dial(pair.payments.outbound) as client:
        assert echoes(client)
        pair.ledger.process.send_signal(signal.SIGTERM)
        eventually(lambda: pair.ledger.logged("inbound closed"), "the end of inbound")
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", pair.ledger.inbound), 1).close()
        assert echoes(client), "who is there is served to the end"
        pair.app.loop.call_soon_threadsafe(lambda: pair.app.server.close(close_connections=False))  # the app goes too
        client.close()
    assert pair.ledger.process.wait(PATIENCE) == 0
    assert pair.ledger.logged("stopped")[0]["forced"] is False
    assert not pair.ledger.logged("exchange cut off at the end of the drain")


def test_the_end_of_a_drain_cuts_and_tells(control: Control, app: App) -> None:
    pair = Pair(control, app, "--drain-delay", "0", "--drain-deadline", "1")
    with pair.ledger, pair.payments, dial(pair.payments.outbound) as client:
        assert echoes(client)
        pair.ledger.process.send_signal(signal.SIGTERM)
        assert cut(client)
        assert pair.ledger.process.wait(PATIENCE) == 0
        assert pair.ledger.logged("exchange cut off at the end of the drain")[0]["exchange"]["tunnel"] is True


# -- from the edge


def edge_file(control: Control, *, websocket: str = ", websocket: true", more: str = "", policies: str = "") -> Path:
    path = control.folder / "edge.yaml"
    text = EDGE.format(control=control.url, token=control.token("edge"))
    text = text.replace("public: {bind: 127.0.0.1:0}", "public: {bind: 127.0.0.1:0, http2: {clear: true}}")
    text = text.replace("upstream: payments}", f"upstream: payments, policies: [trail{policies}]{websocket}}}")
    path.write_text(text.replace("routes:", f"policies:\n  trail: {{audit: {{file: audit.jsonl}}}}\n{more}routes:"))
    return path


@pytest.fixture
def behind(control: Control, app: App) -> Iterator[Sidecar]:
    """The sidecar of payments, which an edge may call."""
    control.rules = [{"name": "edge-to-payments", "from": ["edge"], "to": "payments", "prefix": "/v1/payments"}]
    with Sidecar(control, "payments", app.port) as made:
        control.services["payments"] = {"protocol": "http", "websocket": {}, "endpoints": [endpoint(made)]}
        control.own["payments"] = {"protocol": "http", "websocket": {}}
        control.change()
        control.settled()
        yield made


def at_edge(edge: Gateway, path: str = "/v1/payments/live", **more: Any) -> ClientConnection:
    return dial(edge.port(), path, "api.bank.test", **more)


def records(control: Control) -> list[dict[str, Any]]:
    path = control.folder / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_client_reaches_a_service_through_an_edge(control: Control, app: App, behind: Sidecar) -> None:
    with Gateway(edge_file(control)) as edge:
        with at_edge(edge, compression=None) as client:
            for message in ("hello", LARGE):
                assert echoes(client, message)
            assert app.headers()["x-crossway-caller"] == "spiffe://bank.test/service/edge"
        (record,) = eventually(lambda: records(control), "the record")
        assert (record["status"], record["outcome"], record["route"]) == (101, "answered", "pay")
        assert record["bytes_in"] > record["bytes_out"] > len(LARGE), "a client's frames carry a mask"
        with TunnelClient(edge.port()) as http2:
            stream = http2.tunnel("/v1/payments/live")
            stream.say("hello")
            assert stream.heard() == "hello"
        assert eventually(lambda: behind.metric("crossway_tunnels_total") == 2, "both")


def test_an_edge_ends_its_tunnels_to_who_is_revoked(control: Control, behind: Sidecar) -> None:
    with Gateway(edge_file(control)) as edge:
        eventually(lambda: control.acked("edge") == control.version, "the stream of the admin process")
        with at_edge(edge) as client:
            assert echoes(client)
            control.revoked["identities"] = ["spiffe://bank.test/service/payments"]
            control.change()
            assert cut(client)
        assert eventually(lambda: [line for line in edge.log() if line["event"] == "connections to revoked members closed"], "the line")
        eventually(lambda: open_now(behind) == 0, "the other end")


def test_a_sidecar_ends_the_tunnels_of_an_edge_that_is_revoked(control: Control, behind: Sidecar) -> None:
    with Gateway(edge_file(control)) as edge, at_edge(edge) as client:
        assert echoes(client)
        control.revoked["identities"] = ["spiffe://bank.test/service/edge"]
        control.change()
        assert cut(client)
    assert behind.metric("crossway_mesh_revoked_connections_closed_total") == 1


def test_the_user_counts_at_the_handshake_and_his_token_ends_it(control: Control, app: App, behind: Sidecar) -> None:
    control.rules[0] |= {"claims": {"scope": "payments:write"}}
    control.change()
    control.settled()
    more = SIGNED.format(secret=SECRET).partition("\n")[2].replace("[HS256]", "[HS256], leeway: 0s")
    with Gateway(edge_file(control, more=more, policies=", token")) as edge:

        def bearer(**claims: object) -> dict[str, str]:
            return {"authorization": f"Bearer {token_of(**claims)}"}

        with pytest.raises(InvalidStatus) as told:
            at_edge(edge, additional_headers=bearer(scope="payments:read"))
        assert told.value.response.status_code == 403 and not app.seen
        with at_edge(edge, additional_headers=bearer()) as client:
            assert echoes(client)
        assert app.headers()["crossway-user"]
        eventually(lambda: open_now(behind) == 0, "its end")
        with at_edge(edge, additional_headers=bearer(exp=int(time.time()) + 3)) as client:
            assert echoes(client)
            assert cut(client)
        eventually(lambda: open_now(behind) == 0, "the end behind it")


def test_a_tunnel_outlives_the_context_that_opened_it(control: Control, pair: Pair) -> None:
    """A context is for a minute; who is the user behind a WebSocket that lasts is for the edge to say, which has his token."""
    control.rules = [{"name": "by-user", "from": ["edge"], "to": "ledger", "claims": {"scope": "payments:write"}}]
    control.change()
    control.settled()
    mine = control.ca.pair(control.folder, "edge", "spiffe://bank.test/service/edge")
    author = Author(parse_certificates(mine.read_bytes()), parse_key(mine.read_bytes()))
    issued = int(time.time()) - LIFE + 3
    alice = Principal("alice", "app", "https://auth.bank.test", {"payments:write"}, {}, issued + LIFE, 1)
    line, _ = author.sign(alice, ["spiffe://bank.test/service/ledger"], now=issued)
    with secured(pair.ledger, mine, control.ca) as client:
        client.sendall(handshake("/v1/quotes", line.decode().strip()))
        assert client.recv(4096).startswith(b"HTTP/1.1 101 ")
        ping = b"\x89\x80\0\0\0\0"
        while time.time() < issued + LIFE + 2:
            client.sendall(ping)
            assert client.recv(2) == b"\x8a\0", "a pong"
            time.sleep(0.1)


def test_an_edge_whose_service_does_not_carry_them_is_told_everywhere(control: Control, app: App, behind: Sidecar) -> None:
    del control.services["payments"]["websocket"], control.own["payments"]["websocket"]
    control.change()
    control.settled()
    path = edge_file(control)
    with Gateway(path) as edge:
        with pytest.raises(InvalidStatus) as told:
            at_edge(edge)
        answer = told.value.response
        assert answer.status_code == 426
        assert answer.headers["crossway-websocket"] == "off; the mesh's file does not say websocket for the service payments"
        done = subprocess.run(
            [sys.executable, "-m", "gateway", "check", "-c", str(path)], cwd=control.folder, env=environment(), capture_output=True, text=True, check=False
        )
        assert "the mesh does not let the service payments carry WebSockets" in done.stdout + done.stderr
        assert "edge.yaml:" in done.stdout + done.stderr and "write `payments: {websocket: true}`" in done.stdout + done.stderr
        control.services["payments"]["websocket"] = control.own["payments"]["websocket"] = {}
        control.change()
        control.settled()
        with at_edge(edge) as client:
            assert echoes(client)


# -- with a control plane of its own


FILE = """\
version: 1
trust_domain: bank.test
control: {bind: "127.0.0.1:0", admin: "127.0.0.1:0"}
services:
  payments: {}
  ledger: {websocket: {idle: 2m, tunnels: 7}}
authorization:
  rules:
    - {name: payments-to-ledger, from: [payments], to: ledger, prefix: /v1}
"""


def test_with_a_real_control_plane_and_can_explains(tmp_path: Path, app: App) -> None:
    (tmp_path / "mesh.yaml").write_text(FILE)
    with (
        ControlProcess(tmp_path) as control,
        Sidecar(control, "ledger", app.port) as ledger,  # type: ignore[arg-type]
        Sidecar(control, "payments", app.port) as payments,  # type: ignore[arg-type]
    ):
        eventually(lambda: call(payments.outbound)[0] == 426, "the service")
        with dial(payments.outbound) as client:
            assert echoes(client)
            assert control.command("can", "payments", "ledger", "GET", "/v1/quotes").returncode == 0
            assert control.command("can", "payments", "ledger", "GET", "/v2/quotes").returncode == 1
            said = json.loads((payments.state / "assignment.json").read_text())["assignment"]["services"]["ledger"]
            assert said["websocket"] == {"idle": 120, "tunnels": 7}
            control.edit("prefix: /v1}", "prefix: /v2}")
            assert cut(client)
        control.edit("prefix: /v2}", "prefix: /v1}")
        control.edit("{websocket: {idle: 2m, tunnels: 7}}", "{}")

        def plain() -> bool:
            with contextlib.suppress(InvalidStatus):
                dial(payments.outbound).close()
                return False
            return bool(app.plain) and refused(payments.outbound).headers.get("crossway-websocket") is not None

        eventually(plain, "the service without")
        for state in (payments.state, ledger.state):
            eventually(lambda at=state: "websocket" not in (at / "assignment.json").read_text(), "an assignment without the word")  # type: ignore[misc]
        assert [row["problems"] for row in control.status()["instances"]] == [[], []]


def test_they_cross_a_mesh_gateway(tmp_path: Path, app: App) -> None:
    with (
        plane(tmp_path, "http, websocket: {idle: 2h}") as control,
        Passage(control, "west") as passage,
        member(control, "ledger", app.port, "west") as ledger,
        member(control, "payments", app.port, "east") as payments,
    ):
        eventually(lambda: call(payments.outbound)[0] == 426, "the call")
        with dial(payments.outbound) as client:
            assert echoes(client, LARGE)
            assert app.headers()["x-crossway-caller"] == CALLER
            assert open_now(payments) == open_now(ledger) == 1
            assert passage.metric('crossway_mesh_gateway_connections_opened_total{service="ledger"') >= 1


# -- intercepted

SERVER = """
import asyncio, os, sys
from websockets.asyncio.server import serve
async def main():
    async def echo(connection):
        async for message in connection:
            await connection.send(message + " for " + connection.request.headers.get("x-crossway-caller", "nobody"))
    async with serve(echo, "", int(sys.argv[1])):
        os.setgroups([]); os.setuid(int(sys.argv[2]))
        print("up", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
CLIENT = """
import os, sys
import encodings.idna
from websockets.sync.client import connect
os.setgroups([]); os.setuid(int(sys.argv[1]))
with connect(sys.argv[2], proxy=None, open_timeout=15) as client:
    client.send("hello")
    print(client.recv(15))
"""


@networks
def test_an_intercepted_app_opens_one_as_ever(tmp_path: Path) -> None:
    net = Net()
    control = Control(tmp_path, host=net.address)
    control.rules = [{"name": "payments-to-ledger", "from": ["payments"], "to": "ledger", "prefix": "/v1"}]
    control.own["ledger"] = {"protocol": "http", "websocket": {}}
    hosts: list[Host] = []
    try:
        hosts.append(ledger := Host(net, control, "ledger"))
        hosts.append(payments := Host(net, control, "payments"))
        ledger.app.kill()
        ledger.app.wait(PATIENCE)
        assert ledger.app.stdout is not None
        ledger.app.stdout.close()
        ledger.app = subprocess.Popen([*ledger.inside, sys.executable, "-c", SERVER, str(APP), str(PAYMENTS)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert ledger.app.stdout is not None and ledger.app.stdout.readline() == "up\n"
        control.services = {"ledger": {"protocol": "http", "websocket": {}, "endpoints": [ledger.endpoint()]}}
        control.change()
        control.settled()
        for host in hosts:
            host.up()

        def opened(url: str) -> str:
            words = [*payments.inside, sys.executable, "-c", CLIENT, str(PAYMENTS), url]
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE * 2)
            return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

        eventually(lambda: f"hello for {CALLER}" == opened(f"ws://{ledger.address}:{APP}/v1/quotes"), "the echo")
        assert "403" in opened(f"ws://{ledger.address}:{APP}/v2/quotes")
        assert ledger.sidecar.metric("crossway_tunnels_total") >= 1
    finally:
        for host in hosts:
            host.close()
        control.stop()
        net.close()
