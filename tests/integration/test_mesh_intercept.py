"""Interception in networks of their own: what the app sends and what is sent to it goes through its sidecar, and nothing gets around it.

Two hosts, each a network namespace with a veth to a bridge; the control plane stands on the bridge's own side.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.mesh.intercept import InterceptError, Interception, removal, rules, table
from tests.integration.mesh_kit import Control, Sidecar
from tests.integration.processes import PATIENCE, environment, eventually

APP = 9001  # the apps' port on both hosts
PAYMENTS, OTHER = 1001, 1002  # user ids

# An app: answers with what it was asked; as a user of its own once Python is loaded.
SERVER = """
import http.server, json, os, sys
class App(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        said = json.dumps({"path": self.path, "host": self.headers["host"], "caller": self.headers.get("x-crossway-caller")}).encode()
        self.send_response(200); self.send_header("content-length", str(len(said))); self.end_headers(); self.wfile.write(said)
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("", int(sys.argv[1])), App)
os.setgroups([]); os.setuid(int(sys.argv[2]))
print("up", flush=True)
server.serve_forever()
"""
CLIENT = """
import http.client, json, os, sys
import encodings.idna
os.setgroups([]); os.setuid(int(sys.argv[1]))
try:
    connection = http.client.HTTPConnection(sys.argv[2], int(sys.argv[3]), timeout=15)
    connection.request("GET", sys.argv[4], headers={"host": sys.argv[5]} if len(sys.argv) > 5 else {})
    answer = connection.getresponse()
    print(json.dumps([answer.status, answer.read().decode()]))
except OSError as error:
    print(json.dumps([0, str(error)]))
"""


def command(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=check, capture_output=True, text=True)


def missing() -> str:
    """Why this machine cannot run these tests; empty when it can."""
    if os.geteuid() != 0:
        return "making network namespaces and nftables rules needs root; the rules themselves are tested as text without it"
    for program in ("ip", "nft", "curl"):
        if shutil.which(program) is None:
            return f"{program} is missing, which makes the namespaces in which connections are intercepted; script/setup --test installs it for root"
    name = f"cwt{secrets.token_hex(3)}"
    if command("ip", "netns", "add", name, check=False).returncode:
        return "the kernel does not allow network namespaces here (a container without CAP_SYS_ADMIN)"
    try:
        script = rules(Interception("probe", PAYMENTS, 0, 9102, 9101, APP))
        done = subprocess.run(["ip", "netns", "exec", name, "nft", "-f", "-"], input=script, text=True, capture_output=True, check=False)
        return f"the kernel refuses nftables' NAT rules here: {done.stderr.strip()[:100]}" if done.returncode else ""
    finally:
        command("ip", "netns", "del", name)


REASON = missing()
networks = pytest.mark.skipif(bool(REASON), reason=REASON)


class Net:
    """A bridge with an address of ours, and hosts on it."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(3)
        self.octet = 1 + int(self.id, 16) % 250
        self.bridge, self.address = f"cwb{self.id}", f"10.211.{self.octet}.254"
        self.hosts: list[str] = []
        command("ip", "link", "add", self.bridge, "type", "bridge")
        command("ip", "addr", "add", f"{self.address}/24", "dev", self.bridge)
        command("ip", "link", "set", self.bridge, "up")

    def host(self) -> tuple[str, str]:
        """A new host: (namespace, address)."""
        number = len(self.hosts) + 1
        name, address = f"cwn{self.id}{number}", f"10.211.{self.octet}.{number}"
        self.hosts.append(name)
        self.again(name, address)
        return name, address

    def again(self, name: str, address: str) -> None:
        """Give a host its network, as at its start."""
        near, far = f"cwv{name.removeprefix('cwn')}", "eth0"
        command("ip", "netns", "add", name)
        # The same hardware as before: its neighbours may have it in their tables.
        hardware = "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))
        command("ip", "link", "add", near, "type", "veth", "peer", "name", far, "address", hardware, "netns", name)
        command("ip", "link", "set", near, "master", self.bridge, "up")
        for words in (["addr", "add", f"{address}/24", "dev", far], ["link", "set", far, "up"], ["link", "set", "lo", "up"]):
            command("ip", "-n", name, *words)

    def down(self, name: str) -> None:
        """Take a host's network away with all that was in it. The link first: the kernel clears a namespace in its own time."""
        command("ip", "link", "del", f"cwv{name.removeprefix('cwn')}", check=False)
        command("ip", "netns", "del", name)

    def close(self) -> None:
        for name in self.hosts:
            command("ip", "netns", "del", name, check=False)
        command("ip", "link", "del", self.bridge, check=False)


class Host:
    """One host with an app, its sidecar, and the interception of both directions."""

    def __init__(self, net: Net, control: Control, service: str, *more: str, state: str | None = None) -> None:
        self.namespace, self.address = net.host()
        self.service = service
        self.inside = ("ip", "netns", "exec", self.namespace)
        self.app = subprocess.Popen([*self.inside, sys.executable, "-c", SERVER, str(APP), str(PAYMENTS)], stdout=subprocess.PIPE, text=True)
        assert self.app.stdout is not None and self.app.stdout.readline() == "up\n"
        self.sidecar = Sidecar(control, service, APP, "--intercept", *more, wrapper=self.inside, host=self.address, state=state)

    def endpoint(self) -> dict[str, Any]:
        return {"address": f"{self.address}:{self.sidecar.inbound}", "weight": 1, "zone": None, "labels": {"app-port": str(APP)}}

    def intercept(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.inside, sys.executable, "-m", "gateway", "mesh", "intercept", *words, "--service", self.service],
            env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip

    def up(self, *more: str) -> None:
        done = self.intercept(
            "up", "--app-uid", str(PAYMENTS), "--sidecar-uid", "0", "--outbound-port", str(self.sidecar.outbound),
            "--inbound-port", str(self.sidecar.inbound), "--app-port", str(APP), *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def ask(self, address: str, path: str = "/v1/x", *, uid: int = PAYMENTS, port: int = APP, host: str | None = None) -> tuple[int, str]:
        """A request of a user on this host, by plain HTTP."""
        words = [*self.inside, sys.executable, "-c", CLIENT, str(uid), address, str(port), path, *([host] if host else [])]
        status, text = json.loads(subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE * 2).stdout)
        return status, text

    def close(self) -> None:
        for process in (self.sidecar.process, self.app):
            process.kill()
            process.wait(PATIENCE)
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def net() -> Iterator[Net]:
    made = Net()
    yield made
    made.close()


@pytest.fixture
def hosts(net: Net, tmp_path: Path) -> Iterator[tuple[Control, Host, Host]]:
    control = Control(tmp_path, host=net.address)
    control.rules = [{"name": "payments-to-ledger", "from": ["payments"], "to": "ledger", "prefix": "/v1"}]
    opened: list[Host] = []
    try:
        opened.append(ledger := Host(net, control, "ledger"))
        opened.append(payments := Host(net, control, "payments"))
        control.services = {each.service: {"protocol": "http", "endpoints": [each.endpoint()]} for each in opened}
        control.change()
        control.settled()
        yield control, payments, ledger
    finally:
        for each in opened:
            each.close()
        control.stop()


@networks
def test_an_app_that_knows_nothing_calls_through_both_sidecars(hosts: tuple[Control, Host, Host]) -> None:
    _, payments, ledger = hosts
    assert json.loads(payments.ask(ledger.address)[1])["caller"] is None, "before: straight to the app"
    payments.up()
    ledger.up()
    status, text = payments.ask(ledger.address)
    assert status == 200 and json.loads(text) == {
        "path": "/v1/x", "host": f"{ledger.address}:{APP}", "caller": "spiffe://bank.test/service/payments",
    }  # fmt: skip
    assert payments.ask(ledger.address, "/v2")[0] == 403
    assert payments.sidecar.metric('istio_requests_total{reporter="source",source_workload="payments"') == 2
    assert ledger.sidecar.metric('istio_requests_total{reporter="destination",source_workload="payments"') == 2


@networks
def test_nobody_gets_around_the_sidecar(hosts: tuple[Control, Host, Host], net: Net) -> None:
    _, payments, ledger = hosts
    ledger.up()
    # From another host, in clear text: to the app's port, by whatever user, intercepted there or not.
    status, text = payments.ask(ledger.address, uid=OTHER)
    assert status == 400 and "this port speaks TLS" in text
    # From the same host, by its own address and by loopback, as a user that is neither app nor sidecar.
    for address in (ledger.address, "127.0.0.1"):
        assert ledger.ask(address, uid=OTHER)[0] == 0, "the kernel sends it to the inbound port of loopback, where nobody listens"
    # The app itself and its sidecar reach it.
    assert ledger.ask("127.0.0.1", uid=PAYMENTS)[0] == 200
    assert ledger.ask("127.0.0.1", uid=0)[0] == 200


@networks
def test_other_users_and_what_is_excluded_are_left_alone(hosts: tuple[Control, Host, Host], net: Net) -> None:
    _, payments, ledger = hosts
    database = subprocess.Popen([*ledger.inside, sys.executable, "-c", SERVER, "5432", str(OTHER)], stdout=subprocess.PIPE, text=True)
    assert database.stdout is not None and database.stdout.readline() == "up\n"
    try:
        payments.up("--exclude-port", "5432")
        assert payments.ask(ledger.address, uid=OTHER)[0] == 200
        assert payments.ask(ledger.address, port=5432)[0] == 200
        payments.up()
        status, text = payments.ask(ledger.address, port=5432)
        assert status == 404 and "no-route" in text, "what the mesh does not know is not let out"
        assert payments.ask(ledger.address, port=5432, host="ledger")[0] == 200, "unless it names a service"
        payments.up("--exclude", f"{ledger.address}/32")
        assert payments.ask(ledger.address, port=5432)[0] == 200
    finally:
        database.kill()
        database.wait(PATIENCE)
        database.stdout.close()


@networks
def test_its_rules_come_and_go_and_nobody_elses_do(hosts: tuple[Control, Host, Host]) -> None:
    _, payments, ledger = hosts
    other = "table ip theirs { chain output { type nat hook output priority -100; policy accept; tcp dport 7777 redirect to :7778\n}\n}\n"
    subprocess.run([*payments.inside, "nft", "-f", "-"], input=other, text=True, check=True)
    before = subprocess.run([*payments.inside, "nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    payments.up()
    payments.up()
    listed = subprocess.run([*payments.inside, "nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    assert listed.count("table inet crossway_mesh_payments") == 1 and "table ip theirs" in listed
    for _ in range(2):
        assert payments.intercept("down").returncode == 0
    assert subprocess.run([*payments.inside, "nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout == before
    assert json.loads(payments.ask(ledger.address)[1])["caller"] is None


@networks
def test_two_services_on_one_host_by_user(hosts: tuple[Control, Host, Host], tmp_path: Path) -> None:
    control, payments, ledger = hosts
    payments.up()
    ledger.up()
    with Sidecar(control, "accounts", APP, "--intercept", wrapper=payments.inside, host=payments.address) as accounts:
        done = subprocess.run(
            [*payments.inside, sys.executable, "-m", "gateway", "mesh", "intercept", "up", "--service", "accounts", "--app-uid", str(OTHER),
             "--sidecar-uid", "0", "--outbound-port", str(accounts.outbound)],
            env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert payments.ask(ledger.address)[0] == 200
        assert payments.ask(ledger.address, uid=OTHER)[0] == 403
        eventually(lambda: ledger.sidecar.metric('crossway_mesh_denied_total{caller="spiffe://bank.test/service/accounts"') == 1, "the denial")


@networks
def test_two_services_on_one_host_call_each_other_whichever_came_first(net: Net, tmp_path: Path) -> None:
    control = Control(tmp_path, host=net.address)
    control.rules = [{"name": "there", "from": ["payments"], "to": "ledger"}, {"name": "back", "from": ["ledger"], "to": "payments"}]
    opened: list[Host] = []
    app = None
    try:
        opened.append(payments := Host(net, control, "payments"))
        app = subprocess.Popen([*payments.inside, sys.executable, "-c", SERVER, "9002", str(OTHER)], stdout=subprocess.PIPE, text=True)
        assert app.stdout is not None and app.stdout.readline() == "up\n"
        with Sidecar(control, "ledger", 9002, "--intercept", wrapper=payments.inside, host=payments.address) as ledger:
            there = {"address": f"{payments.address}:{ledger.inbound}", "weight": 1, "zone": None, "labels": {"app-port": "9002"}}
            control.services = {name: {"protocol": "http", "endpoints": [each]} for name, each in (("payments", payments.endpoint()), ("ledger", there))}
            control.change()
            control.settled()

            def ledger_up() -> None:
                done = subprocess.run(
                    [*payments.inside, sys.executable, "-m", "gateway", "mesh", "intercept", "up", "--service", "ledger", "--app-uid", str(OTHER), "--sidecar-uid", "0",
                     "--outbound-port", str(ledger.outbound), "--inbound-port", str(ledger.inbound), "--app-port", "9002"],
                    env=environment(), capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert done.returncode == 0, done.stderr

            payments.up()
            ledger_up()
            for again in (payments.up, ledger_up, lambda: None):
                status, text = payments.ask(payments.address, uid=PAYMENTS, port=9002)
                assert status == 200 and json.loads(text)["caller"] == "spiffe://bank.test/service/payments"
                status, text = payments.ask(payments.address, uid=OTHER, port=APP)
                assert status == 200 and json.loads(text)["caller"] == "spiffe://bank.test/service/ledger"
                assert payments.ask("127.0.0.1", uid=PAYMENTS, port=9002)[0] == 0, "nobody gets around it"
                again()
    finally:
        for each in opened:
            each.close()
        if app is not None:
            app.kill()
            app.wait(PATIENCE)
            assert app.stdout is not None
            app.stdout.close()
        control.stop()


@networks
def test_half_of_the_endpoints_behind_a_partition(hosts: tuple[Control, Host, Host], net: Net) -> None:
    control, payments, ledger = hosts
    second = Host(net, control, "ledger2")
    try:
        # The same service on a second host, under the same name: its certificate decides, and this one's is ledger2.
        control.rules.append({"name": "also", "from": ["payments"], "to": "ledger2"})
        control.services["ledger"] = {"protocol": "http", "retries": {"attempts": 2, "on": ["connect-failure"]},
                                      "endpoints": [ledger.endpoint(), second.endpoint()]}  # fmt: skip
        control.change()
        control.settled()
        payments.up()
        drop = f"table ip cut {{ chain input {{ type filter hook input priority 0; tcp dport {second.sidecar.inbound} drop\n}}\n}}\n"
        for cut in ("", drop):
            if cut:
                subprocess.run([*second.inside, "nft", "-f", "-"], input=cut, text=True, check=True)
            found = [payments.ask(ledger.address) for _ in range(6)]
            assert [status for status, _ in found] == [200] * 6, "the wrong identity, then the silent host, is passed over"
            assert second.sidecar.metric('istio_requests_total{reporter="destination"') == 0
    finally:
        second.close()


# -- without networks


def test_the_rules_are_one_table_replaced_as_a_whole() -> None:
    script = rules(Interception("payments", 1001, 900, 9102, 9101, 9001, (5432,), ("10.0.0.0/8", "fd00::/8")))
    lines = [line.strip() for line in script.splitlines()]
    assert lines[:3] == ["table inet crossway_mesh_payments", "delete table inet crossway_mesh_payments", "table inet crossway_mesh_payments {"]
    assert "flush" not in script and "ip6 daddr fd00::/8 return" in lines and "ip daddr 10.0.0.0/8 return" in lines
    assert lines.index("meta skuid 900 return") < lines.index("meta l4proto tcp redirect to :9102")
    assert removal("payments").splitlines() == lines[:2]


@pytest.mark.parametrize(
    "wanted",
    [Interception("a", 5, 5, 1), Interception("a", 5, 6, 1, inbound=2), Interception("a", 5, 6, 1, app=2), Interception("a", 5, 6, 1, 2, 2), Interception("a; flush ruleset", 5, 6, 1)],
)
def test_what_makes_no_sense_is_refused(wanted: Interception) -> None:
    with pytest.raises(InterceptError):
        rules(wanted)


def test_two_services_never_share_a_table() -> None:
    names = ["a-b", "a.b", "a_b", "ab", "a-2d-b", "a_2d_b"]
    assert len({table(name) for name in names}) == len(names)
