"""A mesh over several hosts and what operations do to it: the root changed under load, hosts that restart while nobody is there to ask.

Strategy: the real control plane on the bridge's own side, an edge, payments and ledger each in a network namespace of its own; payments calls ledger for
every request, so each one crosses the whole picture: edge -> payments' sidecar -> payments -> its sidecar -> ledger's sidecar -> ledger.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.control_kit import ControlProcess
from tests.integration.mesh_kit import Sidecar, free_port
from tests.integration.net_kit import Net, networks
from tests.integration.processes import PATIENCE, Callers, Gateway, Origin, alive, eventually
from tests.integration.test_mesh_whole import call

FILE = """\
version: 1
trust_domain: bank.test
control: {{bind: "{host}:{port}", admin: "127.0.0.1:0"}}
certificates: {{lifetime: {lifetime}}}
services: {{edge: {{}}, payments: {{}}, ledger: {{}}, accounts: {{}}}}
authorization:
  rules:
    - {{name: edge-to-payments, from: [edge], to: payments}}
    - {{name: payments-to-ledger, from: [payments], to: ledger}}
"""
EDGE = """version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
mesh: {{service: edge, control: "{control}", token: {token}, state: edge.state}}
listeners: {{public: {{bind: "{host}:{port}"}}}}
upstreams:
  payments: {{service: payments}}
routes:
  - {{name: pay, match: {{prefix: /}}, upstream: payments}}
"""
# Port, and the port of the sidecar by which it calls ledger for each request; 0: it is the ledger.
APP = """
import http.client, http.server, json, sys
port, outbound = int(sys.argv[1]), int(sys.argv[2])
class App(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        said, status = {"callers": [self.headers.get("x-crossway-caller")]}, 200
        if outbound:
            connection = http.client.HTTPConnection("127.0.0.1", outbound, timeout=15)
            try:
                connection.request("GET", self.path, headers={"host": "ledger"})
                answer = connection.getresponse()
                body, status = answer.read(), answer.status
                said["callers"] += json.loads(body)["callers"] if status == 200 else [body.decode()]
            except OSError as error:
                status, said = 502, {"error": repr(error)}
            finally:
                connection.close()
        body = json.dumps(said).encode()
        self.send_response(status); self.send_header("content-length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), App)
server.daemon_threads = True
print("up", flush=True)
server.serve_forever()
"""
PORT = 9001
LONG = 100.0  # seconds; a certificate lives for 60
CALLERS = ["spiffe://bank.test/service/edge", "spiffe://bank.test/service/payments"]


def until(condition: Any, what: str, limit: float = LONG) -> Any:
    """As eventually(), for what waits for a part of a certificate's life."""
    end = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} never came"
        time.sleep(0.2)
    return value


class Site:
    """The whole mesh, a host each."""

    def __init__(self, folder: Path, net: Net, lifetime: str) -> None:
        self.folder, self.net = folder, net
        (folder / "mesh.yaml").write_text(FILE.format(host=net.address, port=free_port(), lifetime=lifetime))
        self.control = ControlProcess(folder)
        self.hosts = {name: net.host() for name in ("edge", "payments", "ledger")}
        self.apps: dict[str, subprocess.Popen[str]] = {}
        self.sidecars: dict[str, Sidecar] = {}
        for name in ("ledger", "payments"):
            self.sidecars[name] = Sidecar(self.control, name, PORT, wrapper=self.inside(name), host=self.hosts[name][1], wait=False)  # type: ignore[arg-type]
            self.start_app(name)
        for each in self.sidecars.values():
            each.ready()
        self.edge_file = folder / "edge.yaml"
        self.edge_at = (self.hosts["edge"][1], free_port())
        self.edge_file.write_text(EDGE.format(control=self.control.url, token=self.control.token("edge"), host=self.edge_at[0], port=self.edge_at[1]))
        self.start_edge()

    def inside(self, name: str) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.hosts[name][0])

    def start_app(self, name: str) -> None:
        outbound = self.sidecars["payments"].outbound if name == "payments" else 0
        words = [*self.inside(name), sys.executable, "-c", APP, str(PORT), str(outbound)]
        self.apps[name] = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        out = self.apps[name].stdout
        assert out is not None and out.readline() == "up\n"

    def start_edge(self) -> None:
        self.edge = Gateway(self.edge_file, wrapper=self.inside("edge"))

    def ask(self, connection: http.client.HTTPConnection | None = None) -> tuple[int, bytes]:
        """One request from outside; over a connection of its own when none is given."""
        own = connection or http.client.HTTPConnection(*self.edge_at, timeout=PATIENCE)
        try:
            own.request("GET", "/v1/x")
            answer = own.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error).encode()
        finally:
            if connection is None:
                own.close()

    def serves(self) -> bool:
        status, body = self.ask()
        return status == 200 and json.loads(body)["callers"] == CALLERS

    def rotate(self, step: str, *more: str) -> subprocess.CompletedProcess[str]:
        return self.control.command("rotate-root", step, *more)

    def reboot(self, name: str) -> None:
        """The host's power fails and comes back: every process of it, its network and its rules are gone; its disk is not."""
        namespace, address = self.hosts[name]
        if name == "edge":
            everybody = [self.edge.pid, *self.edge.children()]
            for pid in everybody:
                os.kill(pid, signal.SIGKILL)
            self.edge.__exit__()
            eventually(lambda: not any(map(alive, everybody)), "the end of the edge's processes")
        else:
            for process in (self.sidecars[name].process, self.apps[name]):
                process.kill()
                process.wait(PATIENCE)
                assert process.stdout is not None
                process.stdout.close()
        self.net.down(namespace)
        self.net.again(namespace, address)
        if name == "edge":
            self.start_edge()
        else:
            self.start_app(name)
            self.sidecars[name].start()
            self.sidecars[name].ready()

    def close(self) -> None:
        if hasattr(self, "edge"):
            self.edge.__exit__()
        for process in [*self.apps.values(), *(each.process for each in self.sidecars.values())]:
            process.kill()
            process.wait(PATIENCE)
            if process.stdout is not None:
                process.stdout.close()
        self.control.kill()


class Traffic(Callers):
    """Clients that ask all the time, half of them over connections that they keep; `wrong` is what was not the answer that it should be."""

    def __init__(self, site: Site, clients: int = 4) -> None:
        super().__init__(clients)
        self.site = site
        self.good, self.wrong = 0, []  # type: int, list[tuple[float, int, bytes]]
        self.lock = threading.Lock()

    def call(self, number: int) -> None:
        connection = http.client.HTTPConnection(*self.site.edge_at, timeout=PATIENCE) if number % 2 else None
        while not self.over.wait(0.02):
            status, body = self.site.ask(connection)
            with self.lock:
                if status == 200 and json.loads(body)["callers"] == CALLERS:
                    self.good += 1
                else:
                    self.wrong.append((time.time(), status, body))
            if connection is not None and not status:
                connection.close()
        if connection is not None:
            connection.close()


@pytest.fixture
def site(tmp_path: Path, net: Net) -> Iterator[Site]:
    made = Site(tmp_path, net, "1m")
    try:
        eventually(made.serves, "a request through the whole mesh")
        yield made
    finally:
        made.close()


@networks
@pytest.mark.timeout(240)
def test_the_root_is_changed_under_load_and_no_request_fails(site: Site, net: Net) -> None:
    """From `prepare` to `retire`, with a member that was away from before the first to after the second step."""
    control = site.control
    old = (site.folder / "ca/1/root.crt").read_text().strip()
    away_at = net.host()
    inside = ("ip", "netns", "exec", away_at[0])
    with Traffic(site) as traffic, Sidecar(control, "accounts", PORT, wrapper=inside, host=away_at[1], wait=False) as away:  # type: ignore[arg-type]
        eventually(lambda: [row for row in control.status()["instances"] if row["service"] == "accounts" and row["applied"]], "the fourth member")
        away.stop(signal.SIGKILL)
        assert away.process.stdout is not None
        away.process.stdout.close()
        assert site.rotate("prepare").returncode == 0
        until(lambda: site.rotate("activate").returncode == 0, "everybody's acknowledgement")
        assert "not over yet" in site.rotate("retire").stderr
        away.start()
        until(lambda: [row for row in control.status()["instances"] if row["service"] == "accounts" and row["state"] != "gone"], "its return")
        until(lambda: site.rotate("retire").returncode == 0, "the end of all certificates of the old root")
        # Nobody has the old root any more: neither members nor the control plane.
        folders = [*(each.state for each in site.sidecars.values()), site.folder / "edge.state", away.state]
        until(lambda: all((folder / "bundle.pem").read_text().count("BEGIN CERTIFICATE") == 1 for folder in folders), "bundles of one root")
        assert all(old not in (folder / "bundle.pem").read_text() for folder in folders)
        before = traffic.good
        until(lambda: traffic.good > before + 50, "requests by the new root alone")
        until(lambda: control.command("status", "--check", "edge", "payments", "ledger").returncode == 0, "all well")
    assert traffic.good > 100 and not traffic.wrong, (traffic.good, traffic.wrong[:3])
    assert not any(each.process.poll() for each in site.sidecars.values())


def test_who_was_away_for_the_whole_change_of_the_root_is_told_how_to_join_again(tmp_path: Path, origin: Origin) -> None:
    with (
        ControlProcess(tmp_path) as control,
        Sidecar(control, "payments", origin.port) as payments,  # type: ignore[arg-type]
        Sidecar(control, "ledger", origin.port) as ledger,  # type: ignore[arg-type]
    ):
        eventually(lambda: call(payments, "ledger")[0] == 200, "the call")

        def start(*more: str) -> None:
            assert payments.process.stdout is not None
            payments.process.stdout.close()
            payments.arguments += more
            payments.start()

        payments.stop(signal.SIGKILL)
        assert control.command("rotate-root", "prepare").returncode == 0
        eventually(lambda: control.command("rotate-root", "activate").returncode == 0, "the acknowledgement")
        # A certificate of the old root is somewhere: the old root goes only by force.
        assert control.command("rotate-root", "retire").returncode == 1
        assert control.command("rotate-root", "retire", "--force").returncode == 0
        # Whoever had no time to renew is out as well, at once, and told.
        line = eventually(lambda: ledger.logged("the control plane cannot be reached"), "the line")[-1]
        assert "leads to no root of this mesh" in line["error"] and "svid.pem" in line["error"] and "crossway mesh token" in line["error"]
        assert any("leads to no root of this mesh" in line["reason"] for line in control.logged("a stream is refused"))
        start()
        line = eventually(lambda: payments.logged("the control plane cannot be reached"), "the line")[-1]
        assert "its root is not in this member's bundle" in line["error"] and "svid.pem" in line["error"] and "crossway mesh token" in line["error"]
        # As it was told.
        payments.stop(signal.SIGKILL)
        (payments.state / "svid.pem").unlink()
        start("--token", str(control.token("payments")))
        ledger.stop(signal.SIGKILL)
        (ledger.state / "svid.pem").unlink()
        assert ledger.process.stdout is not None
        ledger.process.stdout.close()
        ledger.arguments += ["--token", str(control.token("ledger"))]
        ledger.start()
        for each in (payments, ledger):
            each.ready()
        eventually(lambda: call(payments, "ledger")[0] == 200, "the call")


@networks
@pytest.mark.timeout(240)
def test_hosts_that_restart_without_a_control_plane_serve_from_their_disks_and_renew_when_it_is_back(site: Site) -> None:
    control = site.control
    held = {name: each.status()["certificate"]["serial"] for name, each in site.sidecars.items()}
    control.kill()
    for name in ("ledger", "payments", "edge"):
        site.reboot(name)
    eventually(site.serves, "a request through hosts that know only their disks")
    for name, each in site.sidecars.items():
        said = each.status()
        assert said["certificate"]["serial"] == held[name] and not said["control"]["connected"] and said["control"]["connects"] == 0
        assert each.logged("serving from the assignment on disk")
    control.start()
    with Traffic(site, 2) as traffic:
        for name, each in site.sidecars.items():
            until(lambda each=each: each.status()["control"]["connected"], f"the stream of {name}")
            until(lambda each=each: each.status()["certificate"]["renewals"] >= 1, f"the renewal of {name}")
        until(lambda: [row for row in control.status()["instances"] if row["service"] == "edge" and row["state"] == "healthy"], "the edge")
        until(lambda: control.command("status", "--check").returncode == 0, "all well")
    assert traffic.good > 20 and not traffic.wrong, traffic.wrong[:3]
