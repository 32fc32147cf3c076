"""Injected pods side by side: each manifest's own words run in a network of its own, as a pod has one, with the app, its probes and its callers.

The kubelet's part is played from the bridge: that is where a node is.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from gateway.mesh.inject import Injection
from tests.integration.control_kit import FILE, ControlProcess
from tests.integration.net_kit import APP, CLIENT, PAYMENTS, SERVER, Net, networks
from tests.integration.processes import PATIENCE, environment, eventually, request
from tests.integration.test_mesh_kubernetes import JOIN, Cluster

MANIFEST = """apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  serviceAccountName: %s
  securityContext: {runAsUser: %d}
  containers:
  - name: app
    image: app
    ports: [{containerPort: %d}]
    readinessProbe: {httpGet: {path: /health, port: %d}}
    livenessProbe: {tcpSocket: {port: %d}}
"""


class Pod:
    """What a kubelet makes of an injected manifest: the init container to its end, the sidecar until it has started, the app."""

    def __init__(self, net: Net, control: ControlProcess, cluster: Cluster, service: str, account: str) -> None:
        self.namespace, self.address = net.host()
        self.inside = ("ip", "netns", "exec", self.namespace)
        folder = control.folder / service
        folder.mkdir()
        (folder / "token").write_text(cluster.token(account, pod=f"{service}-0"))
        made = Injection("pod.yaml", {"control": control.url}).run(MANIFEST % (service, account.partition("/")[2], PAYMENTS, APP, APP, APP))
        (self.pod,) = YAML(typ="safe").load_all(made)
        redirecting, self.side = self.pod["spec"]["initContainers"]
        self.places = {
            "/var/run/secrets/crossway/root.crt": str(control.folder / "ca/1/root.crt"), "/var/run/secrets/crossway/token": str(folder / "token"),
            "/var/run/crossway": str(folder), "$(POD_IP)": self.address, "65101": "0",  # this machine's Python may be root's alone
        }  # fmt: skip
        self.errors = folder / "sidecar.log"
        done = subprocess.run(self.words(redirecting["args"]), env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with self.errors.open("wb") as errors:
            self.sidecar = subprocess.Popen(self.words(self.side["args"]), env=environment(), stdout=subprocess.DEVNULL, stderr=errors)
        eventually(lambda: self.probed(self.side["startupProbe"]), f"the sidecar of {service}")
        self.app = subprocess.Popen([*self.inside, sys.executable, "-c", SERVER, str(APP), str(PAYMENTS)], stdout=subprocess.PIPE, text=True)

    def words(self, args: list[str]) -> list[str]:
        made = []
        for word in args:
            for old, new in self.places.items():
                word = word.replace(old, new)
            made.append(word)
        return [*self.inside, sys.executable, "-m", "gateway", *made]

    def probed(self, probe: dict[str, Any]) -> bool:
        """As the kubelet asks: the pod's address, from the node."""
        assert self.sidecar.poll() is None, self.errors.read_text()
        return plain(self.address, probe["httpGet"]["port"], probe["httpGet"]["path"])[0] == 200

    def ask(self, address: str, *host: str) -> tuple[int, str]:
        """A call of the app's."""
        words = [*self.inside, sys.executable, "-c", CLIENT, str(PAYMENTS), address, str(APP), "/v1/x", *host]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE * 2)
        status, body = json.loads(done.stdout)
        return status, body

    def close(self) -> None:
        for process in (self.app, self.sidecar):
            process.kill()
            process.wait(PATIENCE)
        if self.app.stdout is not None:
            self.app.stdout.close()


def plain(address: str, port: int, path: str) -> tuple[int, str]:
    """A request in clear text from outside; 0 when there is no answer."""
    try:
        status, _, body = request(port, path, host=address)
    except (OSError, http.client.HTTPException):
        return 0, ""
    return status, body.decode("latin-1")


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[dict[str, Pod]]:
    net = Net()
    made: dict[str, Pod] = {}
    try:
        cluster = Cluster(tmp_path)
        cluster.publish()
        path = tmp_path / "mesh.yaml"
        path.write_text(FILE.format(state="mesh.db", lifetime="1h", control=JOIN).replace("bind: 127.0.0.1:0", f'bind: "{net.address}:0"', 1))
        with ControlProcess(tmp_path, path=path) as control:
            made["ledger"] = Pod(net, control, cluster, "ledger", "books/ledger")
            made["payments"] = Pod(net, control, cluster, "payments", "shop/payments")
            yield made
            for each in made.values():
                each.close()
            made.clear()
    finally:
        for each in made.values():
            each.close()
        net.close()


@networks
def test_injected_pods_call_each_other_and_nobody_passes_by(pods: dict[str, Pod]) -> None:
    payments, ledger = pods["payments"], pods["ledger"]
    for pod in pods.values():
        eventually(lambda pod=pod: pod.probed(pod.side["readinessProbe"]), "readiness")  # type: ignore[misc]
        # The app's own probes reach it, although its port takes members only.
        app = pod.pod["spec"]["containers"][0]
        assert pod.probed(app["readinessProbe"]) and pod.probed(app["livenessProbe"])
    # The app calls the other pod's address and port as if there were no mesh.
    eventually(lambda: payments.ask(ledger.address)[0] == 200, "the call")
    said = json.loads(payments.ask(ledger.address)[1])
    assert said["caller"] == "spiffe://bank.test/service/payments"
    assert ledger.ask(payments.address)[0] != 200  # no rule says so
    # From the node, and from anywhere else, in clear text: no answer of the app's.
    status, body = plain(ledger.address, APP, "/v1/x")
    assert status in (0, 400) and "caller" not in body
    # When the app is gone its probes say so.
    ledger.app.kill()
    ledger.app.wait(PATIENCE)
    eventually(lambda: not ledger.probed(ledger.pod["spec"]["containers"][0]["readinessProbe"]), "the app's end")
