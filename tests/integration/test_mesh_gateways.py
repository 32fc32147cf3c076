"""Two networks that reach each other through a mesh gateway: what is told, what passes, and what does not."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gateway.cli import main
from tests.integration.control_kit import ControlProcess, Member, metric
from tests.integration.faults import ScriptedOrigin, connect
from tests.integration.mesh_kit import Ca, Sidecar, free_port
from tests.integration.net_kit import SERVER, Net, networks
from tests.integration.processes import PATIENCE, Callers, Gateway, environment, eventually, request
from tests.integration.spire_kit import Agent
from tests.integration.test_mesh_kubernetes import ISSUER, Cluster, pod_options
from tests.integration.test_mesh_tcp import connects
from tests.integration.test_tcp_streams import echo

FILE = """\
version: 1
trust_domain: bank.test
control: {{bind: "{host}:0", admin: "127.0.0.1:0", heartbeat: 5s}}
networks: {{west: {{gateway: gateway}}, east: {{gateway: gateway}}}}
services:
  edge: {{}}
  payments: {{}}
  ledger: {{protocol: {protocol}, retries: {{attempts: 2, on: [connect-failure]}}}}
  db: {{protocol: tcp}}
  accounts: {{}}
  gateway: {{}}
authorization:
  rules:
    - {{name: payments-to-ledger, from: [payments, edge], to: ledger, prefix: /v1}}
    - {{name: payments-to-db, from: [payments], to: db}}
    - {{name: ledger-to-accounts, from: [ledger], to: accounts}}
"""


class Passage(Sidecar):
    """A `crossway mesh gateway` process."""

    def __init__(
        self, control: ControlProcess, network: str, *more: str, number: int = 1, wrapper: tuple[str, ...] = (), host: str = "127.0.0.1", wait: bool = True
    ) -> None:
        self.service = "gateway"
        self.state = control.folder / f"gateway-{network}-{number}.state"
        self.inbound, self.admin = free_port(), free_port()
        self.errors = control.folder / f"gateway-{network}-{number}.log"
        self.arguments = [
            *wrapper, sys.executable, "-m", "gateway", "mesh", "gateway", "--network", network, "--bind", f"{host}:{self.inbound}",
            "--admin", f"127.0.0.1:{self.admin}", "--control", control.url, "--state", str(self.state),
            *(() if {"--join-kubernetes", "--spire"}.intersection(more) else ("--token", str(control.token("gateway")))), *more,
        ]  # fmt: skip
        self.start()
        if wait:
            self.ready()


def plane(folder: Path, protocol: str = "http", host: str = "127.0.0.1", control: str = "heartbeat: 5s") -> ControlProcess:
    (folder / "mesh.yaml").write_text(FILE.format(protocol=protocol, host=host).replace("heartbeat: 5s", control))
    return ControlProcess(folder)


def member(control: ControlProcess, service: str, app: int, network: str, *more: str, **options: Any) -> Sidecar:
    return Sidecar(control, service, app, "--network", network, *more, **options)  # type: ignore[arg-type]


def call(sidecar: Sidecar, path: str = "/v1/x", service: str = "ledger") -> tuple[int, dict[str, Any]]:
    try:
        status, _, body = request(sidecar.outbound, path, headers={"host": service})
    except (ConnectionError, http.client.HTTPException):
        return 0, {}
    return status, json.loads(body) if status == 200 else {}


class App:
    """Says which one it is, and who called."""

    pause = 0.0  # seconds that an answer takes

    def __init__(self, name: str) -> None:
        pause = self.pause

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                time.sleep(pause)
                body = json.dumps({"name": name, "caller": self.headers.get("x-crossway-caller")}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def apps() -> Iterator[tuple[App, App]]:
    made = App("west"), App("east")
    yield made
    for each in made:
        each.close()


def told(control: ControlProcess, sidecar: Sidecar, service: str) -> list[dict[str, Any]]:
    """The endpoints of a service, as a member was told and wrote down."""
    path = sidecar.state / "assignment.json"
    said = json.loads(path.read_text())["assignment"] if path.exists() else {"services": {}}
    return list(said["services"].get(service, {}).get("endpoints", []))


@pytest.mark.parametrize("protocol", ["http", "http2"])
def test_a_call_crosses_the_gateway_and_is_proved_from_end_to_end(tmp_path: Path, apps: tuple[App, App], protocol: str) -> None:
    with (
        plane(tmp_path, protocol) as control,
        Passage(control, "west") as passage,
        member(control, "ledger", apps[0].port, "west") as ledger,
        member(control, "payments", apps[1].port, "east") as payments,
    ):
        eventually(lambda: call(payments)[0] == 200, "the call")
        assert call(payments)[1] == {"name": "west", "caller": "spiffe://bank.test/service/payments"}
        assert call(payments, "/v2/x")[0] == 403, "the callee's own sidecar decides"
        (seen,) = told(control, payments, "ledger")
        assert seen["address"] == f"127.0.0.1:{passage.inbound}" and seen["network"] == "west"
        assert str(ledger.inbound) not in json.dumps(told(control, payments, "ledger")), "no address of another network is told"
        assert passage.metric('crossway_mesh_gateway_connections_opened_total{service="ledger"}') >= 1
        assert passage.metric('crossway_mesh_gateway_bytes_total{service="ledger",direction="in"}') > 0
        # It has seen nothing of what passed: neither header nor path stands in its log.
        assert "/v1/x" not in passage.errors.read_text()
        # When it is gone, what is behind it is not offered.
        passage.process.kill()
        eventually(lambda: not told(control, payments, "ledger"), "the word that there is no way")
        assert call(payments)[0] == 503
    assert passage.process.wait(PATIENCE) == -signal.SIGKILL


def test_a_tcp_service_is_reached_through_it(tmp_path: Path, apps: tuple[App, App]) -> None:
    origin, port = ScriptedOrigin(echo), free_port()
    with (
        plane(tmp_path) as control,
        Passage(control, "west") as passage,
        member(control, "db", origin.port, "west", "--app-protocol", "tcp") as db,
        member(control, "payments", apps[1].port, "east", "--local", f"db=127.0.0.1:{port}"),
    ):
        eventually(lambda: connects(port), "a connection")
        with connect(port) as client:
            client.send(b"through two sidecars and a gateway")
            assert client.exactly(10) == b"through tw"
            assert passage.metric('crossway_mesh_gateway_connections_opened_total{service="db"}') >= 1
            assert db.metric('istio_tcp_connections_opened_total{reporter="destination",source_workload="payments"') >= 1
            # Leaving: it takes no more, and waits for those that pass.
            passage.process.send_signal(signal.SIGTERM)
            eventually(lambda: passage.logged("inbound closed"), "the end of its port")
            client.send(b"x")
            client.exactly(1)
            client.half_close()
        assert passage.process.wait(PATIENCE) == 0 and passage.logged("stopped")[0]["forced"] is False
    origin.close()


def test_the_own_network_goes_first_and_the_other_takes_over(tmp_path: Path, apps: tuple[App, App]) -> None:
    with (
        plane(tmp_path) as control,
        Passage(control, "west"),
        member(control, "ledger", apps[0].port, "west", state="far.state"),
        member(control, "ledger", apps[1].port, "east", state="near.state") as near,
        member(control, "payments", apps[1].port, "east") as payments,
    ):
        eventually(lambda: len(told(control, payments, "ledger")) == 2, "both")
        assert {call(payments)[1]["name"] for _ in range(20)} == {"east"}
        near.process.kill()
        eventually(lambda: call(payments)[1].get("name") == "west", "the other network")


def test_what_nobody_elsewhere_may_call_is_unknown_to_it(tmp_path: Path, apps: tuple[App, App]) -> None:
    with (
        plane(tmp_path) as control,
        Passage(control, "west") as passage,
        member(control, "ledger", apps[0].port, "west") as ledger,
        member(control, "accounts", apps[0].port, "west"),
        member(control, "payments", apps[1].port, "east") as payments,
    ):
        eventually(lambda: call(payments)[0] == 200, "the call")
        eventually(lambda: told(control, ledger, "accounts"), "accounts, as its own network sees it")
        # ledger may call accounts, and is in the same network: no business of the gateway's.
        for name in ("accounts.bank.test", "ledger.other.test", "ledger"):
            assert alert(passage.inbound, name) == "UNRECOGNIZED_NAME", name
        assert alert(passage.inbound, "LEDGER.bank.test") != "UNRECOGNIZED_NAME", "its sidecar answers, and wants a certificate"
        assert refused_plain(passage.inbound)
        assert passage.metric('crossway_mesh_gateway_refused_total{service="",reason="unknown-name"}') == 3
        # A rule changes, and so does what passes, without a restart.
        control.edit("from: [payments, edge], to: ledger", "from: [edge], to: ledger")
        eventually(lambda: alert(passage.inbound, "ledger.bank.test") == "UNRECOGNIZED_NAME", "its end")


def alert(port: int, name: str) -> str:
    """Why a TLS handshake that asks for a name ends; empty when it does not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as raw, context.wrap_socket(raw, server_hostname=name) as secure:
            secure.recv(1)
    except ssl.SSLError as error:
        return "UNRECOGNIZED_NAME" if "unrecognized" in str(error).lower().replace("_", " ") else str(error.reason)
    except OSError as error:
        return str(error)
    return ""


def refused_plain(port: int) -> bool:
    with contextlib.suppress(ConnectionError), connect(port) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: ledger\r\n\r\n")
        return b"HTTP" not in client.sock.recv(100)
    return True


def test_several_gateways_and_one_that_the_file_does_not_name(tmp_path: Path, apps: tuple[App, App]) -> None:
    with (
        plane(tmp_path) as control,
        Passage(control, "west") as one,
        Passage(control, "west", number=2) as two,
        Passage(control, "north", wait=False) as lost,
        member(control, "ledger", apps[0].port, "west"),
        member(control, "payments", apps[1].port, "east") as payments,
    ):
        eventually(lambda: len(told(control, payments, "ledger")) == 2, "both ways")
        opened = 'crossway_mesh_gateway_connections_opened_total{service="ledger"}'
        eventually(lambda: call(payments)[0] == 200 and one.metric(opened) >= 1 and two.metric(opened) >= 1, "the use of both")
        for each in (one, two):
            each.process.kill()
            each.process.wait(PATIENCE)
            if each is one:
                assert [call(payments)[0] for _ in range(10)] == [200] * 10, "what cannot be connected is tried by the other way"
        eventually(lambda: lost.logged("an assignment is refused, the old one goes on"), "the refusal")
        assert "does not name gateway as the gateway of the network north" in lost.logged("an assignment is refused, the old one goes on")[0]["reason"]


JOIN = "control: {{join: {{kubernetes: {{issuer: " + ISSUER + ", keys: jwks.json, services: {{gateway: mesh/gateway}}}}}}, bind"


def test_a_gateway_joins_as_a_pod_and_is_asked_by_its_kubelet(tmp_path: Path, apps: tuple[App, App]) -> None:
    cluster, probes = Cluster(tmp_path), free_port()
    cluster.publish()
    (tmp_path / "mesh.yaml").write_text(FILE.replace("control: {{bind", JOIN).format(protocol="http", host="127.0.0.1"))
    token = cluster.file("mesh/gateway", pod="gateway-5c-1", uid="eeeeeeee-0000-4000-8000-000000000005")
    with ControlProcess(tmp_path) as control:
        options = (*pod_options(control, token), "--probes", f"127.0.0.1:{probes}", "--drain-delay", "60")
        with (
            Passage(control, "west", *options) as passage,
            member(control, "ledger", apps[0].port, "west"),
            member(control, "payments", apps[1].port, "east") as payments,
        ):
            eventually(lambda: call(payments)[0] == 200, "the call through it")
            assert "gateway-5c-1-eeeeeeee" in {each["instance"] for each in control.status()["instances"]}
            for page in ("/livez", "/startz", "/readyz"):
                assert asked(probes, page)[0] == 200
            assert "crossway_mesh_gateway_connections_opened_total" in asked(probes, "/metrics")[1]
            assert asked(probes, "/status")[0] == 404, "that is the operator's, on loopback"
            # It leaves as a pod does: first by its preStop, then by the signal; a second one means now.
            words = ["mesh", "leave", "--state", str(passage.state)]
            assert subprocess.run([sys.executable, "-m", "gateway", *words], env=environment(), check=False, timeout=PATIENCE).returncode == 0
            eventually(lambda: asked(probes, "/readyz")[0] == 503, "that it is not ready")
            eventually(lambda: not told(control, payments, "ledger"), "the word that there is no way")
            passage.process.send_signal(signal.SIGTERM)
            eventually(lambda: passage.logged("stopping"), "the beginning of its end")
            passage.process.send_signal(signal.SIGTERM)
            assert passage.process.wait(PATIENCE) == 0


def asked(port: int, path: str) -> tuple[int, str]:
    status, _, body = request(port, path)
    return status, body.decode()


def test_a_gateway_is_a_member_by_spire(tmp_path: Path, apps: tuple[App, App]) -> None:
    authority = Ca()
    agents = {name: Agent(tmp_path, name, f"spiffe://bank.test/{path}", ca=authority) for name, path in (
        ("control", "control"), ("gateway", "service/gateway"), ("ledger", "service/ledger"), ("payments", "service/payments"))}  # fmt: skip
    here = FILE.replace("control: {{bind", f"control: {{{{spire: {agents['control'].address}, bind")
    (tmp_path / "mesh.yaml").write_text(here.format(protocol="http", host="127.0.0.1"))
    try:
        with (
            ControlProcess(tmp_path) as control,
            Passage(control, "west", "--spire", agents["gateway"].address) as passage,
            member(control, "ledger", apps[0].port, "west", "--spire", agents["ledger"].address),
            member(control, "payments", apps[1].port, "east", "--spire", agents["payments"].address) as payments,
        ):
            eventually(lambda: call(payments)[0] == 200, "the call through it")
            before = passage.status()["certificate"]["serial"]
            agents["gateway"].rotate()
            eventually(lambda: passage.status()["certificate"]["serial"] != before, "the agent's new certificate")
            assert call(payments)[0] == 200
    finally:
        for each in agents.values():
            each.stop()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--join-kubernetes", "x"], "--control-ca belongs to"),
        (["--spire", "unix:/a", "--token", "y"], "one way to join is enough"),
        (["--spire", "/a"], "is not the address of a SPIFFE agent"),
        (["--connections", "0"], "--connections is a number"),
    ],
)
def test_mistakes_of_the_command_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    line = "mesh gateway --network west --bind 127.0.0.1:1 --control https://127.0.0.1:4 --state s"
    monkeypatch.setattr("sys.argv", ["crossway", *line.split(), *options])
    assert main() == 2 and said in capsys.readouterr().err


def test_who_moves_to_another_network_is_told_what_is_there(tmp_path: Path) -> None:
    with plane(tmp_path, control="heartbeat: 10m") as control:  # members made by hand speak once
        ledger, door, payments = (Member(control, name, number) for number, name in enumerate(("ledger", "gateway", "payments"), 1))
        for each, network in ((ledger, "west"), (door, "west"), (payments, "east")):
            assert each.join(labels={"network": network})[0] == 200
            each.open()
        payments.has(lambda body: payments.endpoints("ledger") == [door.inbound], "the way through the gateway")
        door.has(lambda body: door.endpoints("ledger") == [ledger.inbound], "what is behind it")
        assert door.held["own"]["gateway"] == "west" and set(door.held["services"]) == {"ledger", "db"}
        before = payments.held["version"]
        payments.beat(inbound=payments.inbound, labels={"network": "west"}, zone=None)
        assert payments.closed.wait(PATIENCE), "its stream ends, and it comes again"
        payments.open(before)
        payments.has(lambda body: payments.endpoints("ledger") == [ledger.inbound], "the ledger itself")
        assert payments.held["version"] > before
        door.has(lambda body: not body["services"], "nobody elsewhere who calls")
        shown = control.command("status")
        assert "network" in shown.stdout and shown.stdout.count("west") == 3
        for each in (ledger, door, payments):
            each.close()


def test_the_control_plane_looks_at_gateways_and_not_behind_them(tmp_path: Path) -> None:
    # Members made by hand speak once, and a control plane keeps the heartbeat that it started with.
    settings = "heartbeat: 10m, health: {interval: 300ms, timeout: 300ms, failures: 2}"
    with plane(tmp_path, control=settings) as control, Passage(control, "west") as one, Passage(control, "west", number=2) as two:
        # Two ledgers behind the gateway, where nobody listens that the control plane could reach; one such in its own network.
        members = [Member(control, name, number) for number, name in enumerate(("ledger", "ledger", "payments", "payments"), 1)]
        for each, network in zip(members, ("west", "west", "default", "default"), strict=True):
            each.inbound = f"127.0.0.1:{free_port()}"
            assert each.join(labels={"network": network})[0] == 200
            each.open()
        payments = members[2]
        ways = sorted(f"127.0.0.1:{each.inbound}" for each in (one, two))
        payments.has(lambda body: sorted(payments.endpoints("ledger")) == ways, "both gateways")
        eventually(lambda: metric(control, 'crossway_control_probes_total{outcome="reached"}') >= 4, "looks at both")
        two.process.send_signal(signal.SIGSTOP)
        payments.has(lambda body: payments.endpoints("ledger") == [f"127.0.0.1:{one.inbound}"], "the one that answers")
        rows = control.status()["instances"]
        assert [row["state"] for row in rows if row["service"] == "ledger"] == ["healthy", "healthy"], "nobody looks behind a gateway"
        two.process.send_signal(signal.SIGCONT)
        payments.has(lambda body: sorted(payments.endpoints("ledger")) == ways, "its return")
        assert not one.logged("a client's TLS handshake failed"), "a look is no mistake"
        # Its own name leads members nowhere.
        pair = members[0].pair
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(pair)
        with (
            contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", one.inbound), PATIENCE) as raw,
            context.wrap_socket(raw, server_hostname="gateway.bank.test") as secure,
        ):  # fmt: skip
            secure.sendall(b"GET / HTTP/1.1\r\nhost: gateway\r\n\r\n")
            assert secure.recv(1) == b""
        assert "nobody calls a mesh gateway" in eventually(lambda: one.logged("a client's TLS handshake failed"), "the refusal")[0]["reason"]
        for each in members:
            each.close()


EDGE = """version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
mesh: {{service: edge, control: "{control}", token: {token}, state: edge.state, network: east}}
listeners: {{public: {{bind: 127.0.0.1:0}}}}
upstreams:
  ledger: {{service: ledger}}
routes:
  - {{name: all, match: {{prefix: /}}, upstream: ledger}}
"""


def test_an_edge_reaches_another_network(tmp_path: Path, apps: tuple[App, App]) -> None:
    with plane(tmp_path) as control, Passage(control, "west"), member(control, "ledger", apps[0].port, "west"):
        path = tmp_path / "edge.yaml"
        path.write_text(EDGE.format(control=control.url, token=control.token("edge")))
        with Gateway(path) as gateway:
            eventually(lambda: gateway.get("/v1/x")[0] == 200, "a call through edge and gateway")
            assert json.loads(gateway.get("/v1/x")[1]) == {"name": "west", "caller": "spiffe://bank.test/service/edge"}
            # An instance in its own network: from then on nothing crosses.
            with member(control, "ledger", apps[1].port, "east", state="near.state"):
                eventually(lambda: json.loads(gateway.get("/v1/x")[1])["name"] == "east", "the nearer one")
                assert {json.loads(gateway.get("/v1/x")[1])["name"] for _ in range(10)} == {"east"}


# -- as networks


@contextlib.contextmanager
def app_inside(inside: tuple[str, ...]) -> Iterator[None]:
    """An app at port 9001 of a host's own network."""
    with subprocess.Popen([*inside, sys.executable, "-c", SERVER, "9001", "1001"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "up\n"
            yield
        finally:
            process.kill()


@networks
def test_only_the_gateways_port_is_open_between_two_networks(tmp_path: Path) -> None:
    net = Net()
    try:
        (west, west_at), (east, east_at), (door, door_at) = net.host(), net.host(), net.host()
        inside = {name: ("ip", "netns", "exec", name) for name in (west, east, door)}
        with (
            plane(tmp_path, host=net.address) as control,
            app_inside(inside[west]), app_inside(inside[east]),
            Passage(control, "west", wrapper=inside[door], host=door_at) as passage,
            member(control, "ledger", 9001, "west", wrapper=inside[west], host=west_at),
            member(control, "payments", 9001, "east", wrapper=inside[east], host=east_at) as payments,
        ):  # fmt: skip
            # From the east nothing leads into the west but the gateway's one port.
            border = f"table ip border {{ chain out {{ type filter hook output priority 0; ip daddr {west_at} drop\n"
            border += f"ip daddr {door_at} tcp dport != {passage.inbound} drop\n}}\n}}\n"
            subprocess.run([*inside[east], "nft", "-f", "-"], input=border, text=True, check=True)

            def ask(path: str) -> tuple[int, str]:
                url = f"http://127.0.0.1:{payments.outbound}{path}"
                words = [*inside[east], "curl", "-s", "-m", "15", "-w", "\n%{http_code}", "-H", "host: ledger", url]
                done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE * 2)
                body, _, status = done.stdout.rpartition("\n")
                return int(status), body

            straight = [*inside[east], "curl", "-s", "-m", "1", f"http://{west_at}:9001/"]
            assert subprocess.run(straight, capture_output=True, check=False).returncode == 28, "it is not answered: the border holds"
            eventually(lambda: ask("/v1/x")[0] == 200, "the call")
            assert json.loads(ask("/v1/x")[1])["caller"] == "spiffe://bank.test/service/payments"
            assert ask("/v2/x")[0] == 403
            assert told(control, payments, "ledger")[0]["address"] == f"{door_at}:{passage.inbound}"
    finally:
        net.close()


# -- one of two gateways dies under load


class Load(Callers):
    """Callers of a member, each over a connection of its own; when each of them was answered, and how."""

    def __init__(self, sidecar: Sidecar, callers: int) -> None:
        super().__init__(callers)
        self.sidecar = sidecar
        self.answers: list[tuple[float, int]] = []  # (when the request began, status)

    def call(self, number: int) -> None:
        while not self.over.is_set():
            began = time.monotonic()
            self.answers.append((began, call(self.sidecar, "/v1/slow")[0]))

    def failed(self) -> list[tuple[float, int]]:
        return [each for each in list(self.answers) if each[1] != 200]

    def good_since(self, when: float) -> int:
        return len([each for each in list(self.answers) if each[0] > when and each[1] == 200])


class SlowApp(App):
    """Takes its time, so that requests are under way at every moment."""

    pause = 0.05


@pytest.mark.parametrize(("retried", "repeats"), [("connect-failure", False), ("connect-failure, reset", True)])
@pytest.mark.parametrize("protocol", ["http", "http2"])
def test_a_gateway_that_is_killed_under_load_costs_what_the_retries_say(tmp_path: Path, protocol: str, retried: str, repeats: bool) -> None:
    """With the default, requests that were under way through it and nothing else; with `reset` none, since GET may be repeated."""
    app, callers = SlowApp("west"), 8
    with (
        plane(tmp_path, protocol) as control,
        Passage(control, "west") as one,
        Passage(control, "west", number=2) as two,
        member(control, "ledger", app.port, "west"),
        member(control, "payments", app.port, "east") as payments,
    ):
        control.edit("on: [connect-failure]}", f"on: [{retried}], budget: 100%}}")
        eventually(lambda: len(told(control, payments, "ledger")) == 2 and "budget" in (payments.state / "assignment.json").read_text(), "both ways, and the rule")
        opened = 'crossway_mesh_gateway_connections_opened_total{service="ledger"}'
        passed = 'crossway_mesh_gateway_bytes_total{service="ledger",direction="in"}'
        with Load(payments, callers) as load:
            eventually(lambda: one.metric(opened) >= 1 and two.metric(opened) >= 1, "the use of both")
            moved = one.metric(passed)
            eventually(lambda: one.metric(passed) > moved, "requests through the one that will die")
            killed = time.monotonic()
            one.process.kill()
            one.process.wait(PATIENCE)
            gone = time.monotonic()
            eventually(lambda: load.good_since(gone) > 200, "requests by the other one")
            eventually(lambda: len(told(control, payments, "ledger")) == 1, "the word that it is gone")
            heard = time.monotonic()
            eventually(lambda: load.good_since(heard) > 100, "requests by the one that is told")
        failed = load.failed()
        assert all(status in (502, 503) for _, status in failed), failed
        if repeats:
            assert not failed, failed
        else:
            # Each caller has one request under way: no more than that, and none once it is known.
            assert len(failed) <= callers and all(began < heard for began, _ in failed), (killed, gone, failed)
    app.close()


def test_a_gateway_does_not_call_itself(tmp_path: Path) -> None:
    """An instance that says the gateway's address, by mistake or not, would take all of its connections with the first one."""
    with plane(tmp_path) as control, Passage(control, "west", "--advertise", "127.0.0.2:1", host="0.0.0.0") as passage:
        ledger, payments = Member(control, "ledger"), Member(control, "payments", 2)
        try:
            ledger.inbound = f"127.0.0.1:{passage.inbound}"
            assert ledger.join(labels={"network": "west"})[0] == 200 and payments.join(labels={"network": "east"})[0] == 200
            ledger.open()
            payments.open()
            eventually(lambda: passage.logged("an endpoint is left out: it is this gateway"), "the mistake in the log")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.load_cert_chain(payments.pair)
            with socket.create_connection(("127.0.0.1", passage.inbound), PATIENCE) as raw, pytest.raises(OSError):
                context.wrap_socket(raw, server_hostname="ledger.bank.test")
            assert passage.metric('crossway_mesh_gateway_refused_total{service="ledger",reason="unreachable"}') == 1
            assert passage.metric("crossway_mesh_gateway_connections_opened_total") == 0
        finally:
            ledger.close()
            payments.close()
