"""Hosts in networks of their own: namespaces with a veth each to one bridge, and an app with its sidecar in them.

Strategy: where a machine cannot have them, `networks` says why and the tests that need them are left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.mesh.intercept import Interception, rules
from tests.integration.mesh_kit import Control, Sidecar
from tests.integration.processes import PATIENCE, environment

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
        self.hosts: list[str] = []
        # The kernel gives each name once, so no two tests that run side by side have one network.
        for self.octet in random.sample(range(1, 251), 250):
            self.bridge, self.address = f"cwb{self.octet}", f"10.211.{self.octet}.254"
            made = command("ip", "link", "add", self.bridge, "type", "bridge", check=False)
            if made.returncode == 0:
                break
            assert "exists" in made.stderr, made.stderr
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


@contextlib.contextmanager
def two_hosts(net: Net, folder: Path) -> Iterator[tuple[Control, Host, Host]]:
    """A control plane on the bridge's own side, payments, and ledger, which payments may call."""
    control = Control(folder, host=net.address)
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
