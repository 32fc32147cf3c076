"""Who is no member, or not the one he should be, across hosts: each host a network namespace, connections of the apps intercepted.

The handshake's rules are tested one by one in test_mesh_member; here, that they hold where the caller is another machine and the app's own port is what
he is after.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.mesh_kit import Ca, Control
from tests.integration.net_kit import APP, Host, Net, networks
from tests.integration.processes import PATIENCE, eventually

# A caller of its own: mutual TLS with a pair of files, whoever the server is.
CALLER = """
import http.client, json, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
if sys.argv[3] != "-":
    context.load_cert_chain(sys.argv[3])
try:
    connection = http.client.HTTPSConnection(sys.argv[1], int(sys.argv[2]), timeout=15, context=context)
    connection.request("GET", "/v1/x", headers={"host": "ledger"})
    print(connection.getresponse().status)
except (OSError, http.client.HTTPException):
    print(0)
"""
ID = "spiffe://bank.test/service/payments"


def knock(at: Host, address: str, port: int, pair: Path | None) -> int:
    """Call by TLS from a host as its root, whom nobody intercepts; 0 when the connection ends without an answer."""
    words = [*at.inside, sys.executable, "-c", CALLER, address, str(port), "-" if pair is None else str(pair)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE * 2).stdout)


@networks
def test_strangers_from_another_host_reach_neither_sidecar_nor_app(hosts: tuple[Control, Host, Host], tmp_path: Path) -> None:
    control, payments, ledger = hosts
    ledger.up()
    good = control.ca.pair(tmp_path, "good", ID)
    strangers: dict[str, Path | None] = {
        "without a certificate": None,
        "of another trust domain": control.ca.pair(tmp_path, "domain", "spiffe://other.test/service/payments"),
        "expired": control.ca.pair(tmp_path, "expired", ID, life=-30),
        "from the future, as of a clock that is ahead": control.ca.pair(tmp_path, "future", ID, begin=600),
        "self-made": Ca().pair(tmp_path, "self-made", ID),
    }
    # By the sidecar's own port, and by the app's, which leads to the sidecar.
    for port in (ledger.sidecar.inbound, APP):
        assert knock(payments, ledger.address, port, good) == 200
        for what, pair in strangers.items():
            assert knock(payments, ledger.address, port, pair) == 0, f"{what} at port {port}"
    # Revoked: the same certificate as before.
    control.revoked = {"serials": [], "identities": [ID]}
    control.change()
    control.settled()
    for port in (ledger.sidecar.inbound, APP):
        assert knock(payments, ledger.address, port, good) == 0, "revoked"
    assert ledger.sidecar.metric('istio_requests_total{reporter="destination"') == 2


@networks
def test_an_address_that_another_service_has_taken_is_not_believed(hosts: tuple[Control, Host, Host]) -> None:
    """The registry, or whoever answers there, is wrong about an address: identity decides, and the request is not sent."""
    control, payments, ledger = hosts
    control.rules.append({"name": "anything", "from": ["payments"], "to": "accounts"})
    control.services["accounts"] = {"protocol": "http", "endpoints": [ledger.endpoint()]}
    control.services["ledger"]["endpoints"] = []
    control.change()
    control.settled()
    payments.up()
    status, text = payments.ask(ledger.address)
    assert status == 503 and "not sent" in text
    assert ledger.sidecar.metric('istio_requests_total{reporter="destination"') == 0


@networks
def test_hosts_go_on_without_the_control_plane_beyond_freshness_and_through_a_restart(hosts: tuple[Control, Host, Host]) -> None:
    control, payments, ledger = hosts
    for each in (payments, ledger):
        each.up()
    control.fresh = 1
    control.change()
    control.settled()
    assert payments.ask(ledger.address)[0] == 200
    control.stop()
    eventually(lambda: payments.sidecar.metric("crossway_mesh_assignment_overdue_seconds") > 1, "an assignment that is not fresh")
    assert payments.ask(ledger.address)[0] == 200 and payments.ask(ledger.address, "/v2")[0] == 403
    for each in (payments, ledger):
        each.sidecar.stop(signal.SIGKILL)
        assert each.sidecar.process.stdout is not None
        each.sidecar.process.stdout.close()
        each.sidecar.start()
        each.sidecar.ready()
    status, text = payments.ask(ledger.address)
    said: dict[str, Any] = json.loads(text)
    assert status == 200 and said["caller"] == ID
    assert payments.ask(ledger.address, "/v2")[0] == 403, "default deny holds without it too"


@networks
@pytest.mark.timeout(180)
def test_half_of_a_service_behind_a_partition_is_passed_over_and_comes_back(hosts: tuple[Control, Host, Host], net: Net) -> None:
    control, payments, ledger = hosts
    second = Host(net, control, "ledger", state="ledger-2.state")
    try:
        drop = f"table ip cut {{ chain input {{ type filter hook input priority 0; tcp dport {second.sidecar.inbound} counter drop\n}}\n}}\n"
        subprocess.run([*second.inside, "nft", "-f", "-"], input=drop, text=True, check=True)
        control.services["ledger"] = {"protocol": "http", "retries": {"attempts": 2, "on": ["connect-failure"]},
                                      "endpoints": [ledger.endpoint(), second.endpoint()]}  # fmt: skip
        control.change()
        control.settled()
        payments.up()
        assert [payments.ask(ledger.address)[0] for _ in range(6)] == [200] * 6
        assert ledger.sidecar.metric('istio_requests_total{reporter="destination"') == 6

        def met() -> bool:
            assert payments.ask(ledger.address)[0] == 200
            listed = subprocess.run([*second.inside, "nft", "list", "table", "ip", "cut"], capture_output=True, text=True, check=True).stdout
            return "packets 0" not in listed

        eventually(met, "a request that met the silent host")
        subprocess.run([*second.inside, "nft", "delete", "table", "ip", "cut"], check=True)

        def used() -> bool:
            assert payments.ask(ledger.address)[0] == 200
            return second.sidecar.metric('istio_requests_total{reporter="destination"') > 0

        eventually(used, "a request at the host that is back")
    finally:
        second.close()
