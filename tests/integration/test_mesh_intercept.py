"""Interception in networks of their own: what the app sends and what is sent to it goes through its sidecar, and nothing gets around it.

Two hosts, each a network namespace with a veth to a bridge; the control plane stands on the bridge's own side.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.mesh.intercept import InterceptError, Interception, removal, rules, table
from tests.integration.mesh_kit import Control, Sidecar
from tests.integration.net_kit import APP, OTHER, PAYMENTS, SERVER, Host, Net, networks
from tests.integration.processes import PATIENCE, environment, eventually


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
