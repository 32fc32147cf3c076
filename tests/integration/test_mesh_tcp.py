"""Services that speak tcp, and rules by port: bytes between two sidecars, who may connect, what is counted, and how connections end."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.control_kit import ControlProcess
from tests.integration.faults import PATTERN, ScriptedOrigin, Stream, connect
from tests.integration.mesh_kit import Control, Sidecar, free_port
from tests.integration.net_kit import APP, Host, Net, networks
from tests.integration.processes import PATIENCE, Origin, eventually
from tests.integration.test_mesh_member import call, endpoint, secured
from tests.integration.test_tcp_streams import echo

PAYMENTS = "spiffe://bank.test/service/payments"


class Pair:
    """A database behind its sidecar, and payments' sidecar with a port for it."""

    def __init__(self, control: Control, *more: str) -> None:
        self.control = control
        self.heard = bytearray()  # by the app, of whomever; a sidecar that looks whether it is there says nothing

        def script(origin: ScriptedOrigin, stream: Stream) -> None:
            while piece := stream.sock.recv(1 << 16):
                self.heard += piece
                stream.sock.sendall(piece)

        self.origin = ScriptedOrigin(script)
        self.port = free_port()
        self.db = Sidecar(control, "db", self.origin.port, "--app-protocol", "tcp", *more)
        control.services["db"] = {"protocol": "tcp", "endpoints": [endpoint(self.db)]}
        self.payments = Sidecar(control, "payments", self.origin.port, "--local", f"db=127.0.0.1:{self.port}")

    def client(self) -> Stream:
        return connect(self.port)

    def echoes(self, client: Stream, piece: bytes = b"hello") -> bool:
        client.send(piece)
        return client.exactly(len(piece)) == piece


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    made = Control(tmp_path)
    made.rules = [{"name": "payments-to-db", "from": ["payments"], "to": "db"}]
    made.own["db"] = {"protocol": "tcp"}
    yield made
    made.stop()


@pytest.fixture
def pair(control: Control) -> Iterator[Pair]:
    made = Pair(control)
    with made.db, made.payments:
        yield made
        for sidecar in (made.db, made.payments):
            assert sidecar.process.poll() in (None, 0), sidecar.errors.read_text()
    made.origin.close()


def ended(client: Stream) -> bool:
    """Wait for the connection's end, whichever it is."""
    with contextlib.suppress(ConnectionError):
        return client.sock.recv(1) == b""
    return True


def refused(port: int) -> bool:
    """Whether a connection to a port ends before a word of the app; it may be reset before it is known to stand."""
    with contextlib.suppress(ConnectionError), connect(port) as client:
        client.send(b"hello")
        return client.sock.recv(1) == b""
    return True


def heard_by(sidecar: Sidecar, pair: Path | None, control: Control) -> bool:
    """Whether the app behind a sidecar hears one who connects straight to it, showing `pair`."""
    with contextlib.suppress(OSError), secured(sidecar, pair, control.ca) as secure:
        secure.sendall(b"hello")
        return secure.recv(1) == b"h"
    return False


def lines(sidecar: Sidecar, reason: str) -> list[dict[str, Any]]:
    return [line for event in ("a TCP connection ended", "a TCP connection was refused", "a TCP connection found no upstream")
            for line in sidecar.logged(event) if line["reason"] == reason]  # fmt: skip


def test_bytes_cross_two_sidecars_and_are_counted_at_both(pair: Pair) -> None:
    with pair.client() as client:
        for piece in (b"a", b"\x00\xff" * 1000, PATTERN):
            assert pair.echoes(client, piece)
        client.half_close()
        assert client.closed(), "an end passes on as an end, through both"
    many = len(PATTERN) + 2001
    for sidecar, reporter in ((pair.payments, "source"), (pair.db, "destination")):
        labels = f'{{reporter="{reporter}",source_workload="payments"'
        eventually(lambda s=sidecar, at=labels: s.metric(f"istio_tcp_connections_closed_total{at}") == 1, "the end of it")  # type: ignore[misc]
        assert sidecar.metric(f"istio_tcp_connections_opened_total{labels}") == 1
        assert sidecar.metric(f"istio_tcp_sent_bytes_total{labels}") == sidecar.metric(f"istio_tcp_received_bytes_total{labels}") == many
        (line,) = [each for each in sidecar.page("/metrics").splitlines() if each.startswith(f"istio_tcp_connections_opened_total{labels}")]
        for text in (f'source_principal="{PAYMENTS}"', 'destination_principal="spiffe://bank.test/service/db"', 'request_protocol="tcp"'):
            assert text in line
        assert 'grpc_response_status' not in line and 'response_code' not in line
    (line,) = lines(pair.db, "closed")  # type: ignore[assignment]
    assert line["uris"] == [PAYMENTS] and line["bytes_in"] == many  # type: ignore[index]


def test_who_is_not_allowed_is_closed_told_and_counted(control: Control, pair: Pair) -> None:
    port = free_port()
    with Sidecar(control, "accounts", pair.origin.port, "--local", f"db=127.0.0.1:{port}"):
        assert refused(port)
    eventually(lambda: pair.db.metric('crossway_mesh_denied_total{caller="spiffe://bank.test/service/accounts",rule="none",policy="1"}') == 1, "the count")
    (line,) = eventually(lambda: pair.db.logged("a connection was denied"), "the line")
    assert line["caller"] == "spiffe://bank.test/service/accounts" and line["considered"] == [] and "method" not in line
    assert lines(pair.db, "denied")[0]["uris"] == ["spiffe://bank.test/service/accounts"]
    assert pair.db.metric("istio_tcp_connections_opened_total") == 0 and not pair.heard
    with pair.client() as client:
        assert pair.echoes(client)


def test_a_rule_that_looks_into_requests_lets_nobody_connect(control: Control, pair: Pair) -> None:
    control.rules = [{"name": "only-gets", "from": ["payments"], "to": "db", "methods": ["GET"]}]
    control.change()
    control.settled()
    assert refused(pair.port)
    assert eventually(lambda: pair.db.logged("a connection was denied"), "the line")[0]["considered"] == ["only-gets"]


def test_a_policy_that_is_narrowed_ends_open_connections(control: Control, pair: Pair) -> None:
    with pair.client() as client:
        assert pair.echoes(client)
        control.rules = [{"name": "payments-to-db", "from": ["payments"], "to": "db", "ports": [1]}]
        control.change()
        assert ended(client)
    assert eventually(lambda: pair.db.logged("connections that the policy no longer allows are closed"), "the line")[0]["connections"] == 1
    control.default = "audit"
    control.change()
    control.settled()
    with pair.client() as client:
        assert pair.echoes(client), "in audit mode it passes"
    eventually(lambda: pair.db.metric(f'crossway_mesh_would_deny_total{{caller="{PAYMENTS}"') == 1, "the record")
    assert pair.db.logged("a connection would be denied")


@pytest.mark.parametrize("whom", ["payments", "db"])
def test_revocation_cuts_connections_at_either_side(control: Control, pair: Pair, whom: str) -> None:
    with pair.client() as client:
        assert pair.echoes(client)
        control.revoked["identities"] = [f"spiffe://bank.test/service/{whom}"]
        control.change()
        assert ended(client)
        assert refused(pair.port)
    cutter = pair.db if whom == "payments" else pair.payments
    eventually(lambda: cutter.metric("crossway_mesh_revoked_connections_closed_total") == 1 or cutter.metric("istio_tcp_connections_closed_total") == 1, "the cut")


def test_nobody_gets_in_who_is_no_member_or_speaks_in_clear_text(control: Control, pair: Pair, tmp_path: Path) -> None:
    with connect(pair.db.inbound) as client:
        client.send(b"hello, in clear text\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"hello" not in client.sock.recv(100)
    assert not heard_by(pair.db, None, control)
    assert not heard_by(pair.db, control.ca.pair(tmp_path, "stranger", "spiffe://elsewhere.test/service/payments"), control)
    assert not pair.heard


def test_a_service_under_another_name_is_not_connected(control: Control, pair: Pair) -> None:
    with Sidecar(control, "accounts", pair.origin.port, "--app-protocol", "tcp") as accounts:
        control.rules.append({"name": "also", "from": ["payments"], "to": "accounts"})
        control.services["db"]["endpoints"] = [endpoint(accounts)]
        control.change()
        control.settled()
        assert refused(pair.port)
        assert not pair.heard, "nothing was said before it was known who is there"
        assert eventually(lambda: lines(pair.payments, "unreachable"), "the line")


def test_idle_time_and_places_are_the_files(control: Control, pair: Pair) -> None:
    for said in (control.services["db"], control.own["db"]):
        said["connections"] = 1
    control.change()
    control.settled()
    with pair.client() as first:
        assert pair.echoes(first)
        assert refused(pair.port)
        assert eventually(lambda: lines(pair.payments, "full"), "the refusal")
        assert not heard_by(pair.db, control.ca.pair(control.folder, "direct", PAYMENTS), control)
        assert eventually(lambda: lines(pair.db, "full"), "the refusal at the callee's side"), "whoever the caller is"
        assert pair.echoes(first)
    control.services["db"]["idle"] = 0.3
    control.change()
    control.settled()
    with pair.client() as client:
        assert pair.echoes(client) and ended(client)
    eventually(lambda: lines(pair.payments, "idle"), "the end of a silent connection")


def test_drain_waits_for_connections_and_takes_no_more(pair: Pair) -> None:
    with pair.client() as client:
        assert pair.echoes(client)
        pair.db.process.send_signal(signal.SIGTERM)
        eventually(lambda: pair.db.logged("inbound closed"), "the end of inbound")
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", pair.db.inbound), 1).close()
        assert pair.echoes(client), "who is there is served to the end"
        pair.origin.close()
        client.half_close()
        assert ended(client)
    assert pair.db.process.wait(PATIENCE) == 0
    assert pair.db.logged("stopped")[0]["forced"] is False


def test_a_service_that_becomes_tcp_under_a_running_sidecar(control: Control, pair: Pair, origin: Origin) -> None:
    with Sidecar(control, "ledger", origin.port) as ledger:
        control.services["ledger"] = {"protocol": "http", "endpoints": [endpoint(ledger)]}
        control.rules.append({"name": "payments-to-ledger", "from": ["payments"], "to": "ledger"})
        control.own["ledger"] = {"protocol": "tcp"}
        control.change()
        control.settled()
        assert call(pair.payments.outbound)[0] == 200, "http beside tcp"
        assert call(pair.payments.outbound, host="db")[0] == 404, "no request names a service that has none"
        told = eventually(lambda: ledger.logged("the mesh's file and --app-protocol do not mean the same: calls will fail"), "the contradiction")
        assert told[0]["file"] == "tcp" and told[0]["app_protocol"] == "http1"


@networks
def test_an_intercepted_app_reaches_it_where_it_always_did(tmp_path: Path) -> None:
    net = Net()
    control = Control(tmp_path, host=net.address)
    control.rules = [{"name": "payments-to-ledger", "from": ["payments"], "to": "ledger", "ports": [APP]}]
    hosts: list[Host] = []
    try:
        for service in ("ledger", "payments", "accounts"):
            hosts.append(Host(net, control, service, *(["--app-protocol", "tcp"] if service == "ledger" else [])))
        ledger, payments, accounts = hosts
        control.services = {"ledger": {"protocol": "tcp", "endpoints": [ledger.endpoint()]}}
        control.change()
        control.settled()
        for host in hosts:
            host.up()
        status, text = payments.ask(ledger.address)
        assert status == 200 and json.loads(text)["caller"] is None, "its bytes, not a request that a sidecar has touched"
        opened = 'istio_tcp_connections_opened_total{reporter="destination",source_workload="payments"'
        assert ledger.sidecar.metric(opened) == 1 and ledger.sidecar.metric("istio_requests_total") == 0
        assert accounts.ask(ledger.address)[0] == 0
        eventually(lambda: ledger.sidecar.metric('crossway_mesh_denied_total{caller="spiffe://bank.test/service/accounts"') == 1, "the denial")
    finally:
        for host in hosts:
            host.close()
        control.stop()
        net.close()


# -- rules by port


def test_a_rule_holds_for_the_ports_that_it_names(control: Control, origin: Origin) -> None:
    control.rules = [{"name": "by-port", "from": ["payments"], "to": "ledger", "ports": [origin.port]}]
    with Sidecar(control, "ledger", origin.port) as ledger, Sidecar(control, "payments", origin.port) as payments:
        control.services["ledger"] = {"protocol": "http", "endpoints": [endpoint(ledger)]}
        control.change()
        control.settled()
        assert call(payments.outbound)[0] == 200
        control.rules[0]["ports"] = [1, 2]
        control.change()
        control.settled()
        status, headers, _ = call(payments.outbound)
        assert status == 403 and 'considered="by-port"' in headers["crossway-denied"]


FILE = """\
version: 1
trust_domain: bank.test
control: {{bind: "127.0.0.1:0", admin: "127.0.0.1:0"}}
services:
  payments: {{}}
  db: {{protocol: tcp, idle: 10m, connections: 50}}
authorization:
  rules:
    - {{name: payments-to-db, from: [payments], to: db, ports: [{port}]}}
"""


def test_with_a_real_control_plane_and_can_explains(tmp_path: Path) -> None:
    origin = ScriptedOrigin(echo)
    (tmp_path / "mesh.yaml").write_text(FILE.format(port=origin.port))
    port = free_port()
    with (
        ControlProcess(tmp_path) as control,
        Sidecar(control, "db", origin.port, "--app-protocol", "tcp") as db,  # type: ignore[arg-type]
        Sidecar(control, "payments", origin.port, "--local", f"db=127.0.0.1:{port}") as payments,  # type: ignore[arg-type]
    ):
        eventually(lambda: connects(port), "a connection")
        allowed = control.command("can", "payments", "db")
        assert allowed.returncode == 0 and f"ALLOWED: payments -> db (tcp, port {origin.port})" in allowed.stdout
        other = control.command("can", "payments", "db", "--port", "1")
        assert other.returncode == 1 and f"rule payments-to-db: the app's port 1 is not one of {origin.port}" in other.stdout
        asked = control.command("can", "payments", "db", "GET", "/")
        assert asked.returncode == 2 and "speaks tcp" in asked.stderr
        with connect(port) as client:
            client.send(b"x")
            assert client.exactly(1) == b"x"
            control.edit(f"ports: [{origin.port}]", "ports: [1]")
            assert ended(client)
        assert control.command("can", "payments", "db").returncode == 1
        assert not connects(port) and payments.process.poll() is None and db.process.poll() is None
    origin.close()


def connects(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.settimeout(PATIENCE)
        sock.sendall(b"x")
        return sock.recv(1) == b"x"
    return False
