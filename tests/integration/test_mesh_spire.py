"""A mesh whose certificates come from SPIRE: a real control plane, real sidecars and an edge, and an agent of the SPIFFE Workload API each."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from ruamel.yaml import YAML

from gateway.mesh.inject import Injection
from tests.integration.control_kit import FILE, ControlProcess
from tests.integration.faults import ScriptedOrigin, connect
from tests.integration.mesh_kit import Ca, Sidecar, free_port
from tests.integration.processes import PATIENCE, Gateway, Origin, environment, eventually
from tests.integration.spire_kit import Agent, wait_for_call
from tests.integration.test_mesh_tcp import connects
from tests.integration.test_mesh_whole import call
from tests.integration.test_tcp_streams import echo

ID = "spiffe://bank.test/service/"
EDGE = """version: 1
workers: 1
admin: {{bind: 127.0.0.1:0}}
mesh: {{service: edge, control: "{control}", spire: "{agent}", state: edge.state}}
listeners: {{public: {{bind: 127.0.0.1:0}}}}
upstreams:
  payments: {{service: payments}}
routes:
  - {{name: pay, match: {{prefix: /}}, upstream: payments}}
"""


def mesh_file(agent: Agent) -> str:
    return FILE.format(state="mesh.db", lifetime="1h", control=f"  spire: {agent.address}\n").replace("  ca: ca\n", "")


class Estate:
    """One trust domain: its authority, and an agent for each workload, as SPIRE's one agent tells them apart."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ca = folder, Ca()
        self.agents: dict[str, Agent] = {}
        self.agent("control", "spiffe://bank.test/control")
        (folder / "mesh.yaml").write_text(mesh_file(self.agents["control"]))
        self.control = ControlProcess(folder)
        self.app = Origin()
        self.sidecars: list[Sidecar] = []

    def agent(self, name: str, *identities: str, **options: Any) -> Agent:
        self.agents[name] = Agent(self.folder, name, *(identities or (ID + name,)), ca=options.pop("ca", self.ca), **options)
        return self.agents[name]

    def sidecar(self, service: str, *more: str, agent: Agent | None = None, wait: bool = True) -> Sidecar:
        agent = agent or self.agent(service)
        self.sidecars.append(sidecar := Sidecar(self.control, service, self.app.port, "--spire", agent.address, *more, wait=wait))  # type: ignore[arg-type]
        return sidecar

    def rotate(self, **changes: Any) -> None:
        for each in self.agents.values():
            each.rotate(**changes)

    def close(self) -> None:
        for each in self.sidecars:
            each.__exit__()
        self.control.kill()
        for agent in self.agents.values():
            agent.stop()
        self.app.close()


@pytest.fixture
def estate(tmp_path: Path) -> Iterator[Estate]:
    made = Estate(tmp_path)
    yield made
    made.close()


def test_members_with_spires_certificates_call_each_other_without_a_token(estate: Estate) -> None:
    estate.sidecar("ledger")
    # This workload has two identities; the one that is its service's is taken.
    payments = estate.sidecar("payments", agent=estate.agent("payments", "spiffe://bank.test/ns/x/batch", ID + "payments"))
    eventually(lambda: call(payments, "ledger")[0] == 200, "the call")
    assert payments.status()["identity"] == ID + "payments"
    assert int(payments.status()["certificate"]["serial"], 16) in estate.agents["payments"].serials
    eventually(lambda: all(row["applied"] for row in estate.control.status()["instances"]), "everybody's acknowledgement")
    assert not (estate.folder / "ca").exists(), "no authority of its own"
    assert (payments.state / "svid.pem").stat().st_mode & 0o077 == 0
    assert "crossway_control_authority_not_after_timestamp_seconds" in estate.control.page("/metrics")[1]
    assert estate.control.page("/crl")[0] == 404
    # The rules hold as ever, and so does revocation.
    assert call(payments, "ledger", "/v1/x")[0] == 200 and call(payments, "accounts")[0] == 404
    assert estate.control.command("revoke", "payments").returncode == 0
    eventually(lambda: call(payments, "ledger")[0] != 200, "the end of it")


def test_what_needs_an_authority_of_its_own_says_so(estate: Estate) -> None:
    done = estate.control.command("rotate-root", "prepare")
    assert done.returncode == 2 and "SPIRE" in done.stderr
    done = estate.control.command("token", "payments")
    assert done.returncode == 2 and "registration entry" in done.stderr


def test_certificates_and_roots_change_under_load_and_nothing_fails(estate: Estate) -> None:
    ledger, payments = estate.sidecar("ledger"), estate.sidecar("payments")
    eventually(lambda: call(payments, "ledger")[0] == 200, "the call")
    failed: list[int] = []
    over = threading.Event()

    def load() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", payments.outbound, timeout=PATIENCE)
        while not over.is_set():
            connection.request("GET", "/v1/x", headers={"host": "ledger"})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                failed.append(answer.status)
        connection.close()

    thread = threading.Thread(target=load)
    thread.start()
    try:
        serials = {payments.status()["certificate"]["serial"], ledger.status()["certificate"]["serial"]}
        # A new root joins the bundles, then it issues, then the old one leaves: the order that SPIRE has.
        fresh, old = Ca(), estate.ca
        for step, changes in enumerate(({"extra": [fresh]}, {"ca": fresh, "extra": [old]}, {"extra": []}), 1):
            estate.rotate(**changes)
            for sidecar in (ledger, payments):
                eventually(lambda sidecar=sidecar, step=step: sidecar.status()["certificate"]["renewals"] >= step, "the agent's certificate")
                eventually(lambda sidecar=sidecar, step=step: (sidecar.state / "bundle.pem").read_text().count("BEGIN") == 1 + (step < 3), "the agent's bundle")
            # What is told now is signed by a key that leads to the roots of now, and gets there.
            policy = estate.control.status()["policy"]
            estate.control.edit(f"prefix: /v1/payments{'x' * (step - 1)}}}", f"prefix: /v1/payments{'x' * step}}}")
            eventually(lambda policy=policy: estate.control.status()["policy"] > policy, "the new policy")
            eventually(lambda: all(row["applied"] == row["sent"] and row["refused"] != row["sent"] for row in estate.control.status()["instances"]), "all well")
        assert (payments.state / "bundle.pem").read_text() == fresh.bundle
    finally:
        over.set()
        thread.join(PATIENCE)
    assert not failed
    assert serials.isdisjoint({payments.status()["certificate"]["serial"], ledger.status()["certificate"]["serial"]})
    assert payments.metric("crossway_mesh_certificate_renewals_total") >= 3


def test_it_serves_and_starts_while_agent_and_control_plane_are_away(estate: Estate) -> None:
    estate.sidecar("ledger")
    payments = estate.sidecar("payments")
    eventually(lambda: call(payments, "ledger")[0] == 200, "the call")
    estate.agents["payments"].stop()
    eventually(lambda: payments.logged("the SPIFFE agent gives nothing"), "the warning")
    # What it was told last is signed by a certificate that is over in seconds.
    before = payments.status()["assignment"]["version"]
    estate.agents["control"].rotate(life=6)
    over = time.time() + 6
    eventually(lambda: payments.status()["assignment"]["version"] > before, "an assignment that is signed anew")
    estate.control.kill()
    assert call(payments, "ledger")[0] == 200
    payments.stop(signal.SIGKILL)
    eventually(lambda: time.time() > over + 1, "the end of the signer's certificate")
    payments.start()
    payments.ready()
    assert call(payments, "ledger")[0] == 200
    before = payments.status()["certificate"]["serial"]
    estate.agents["payments"].start()
    eventually(lambda: payments.status()["certificate"]["serial"] != before, "a certificate of the agent's return")
    assert call(payments, "ledger")[0] == 200


def test_it_joins_when_the_agent_comes_to_know_it(estate: Estate) -> None:
    agent = estate.agent("payments")
    agent.status = grpc.StatusCode.PERMISSION_DENIED
    payments = estate.sidecar("payments", agent=agent, wait=False)
    eventually(lambda: payments.logged("the SPIFFE agent gives nothing"), "the reason in the log")
    said = payments.logged("the SPIFFE agent gives nothing")[0]["error"]
    assert "registration entry" in said and "no identity issued" in said
    wait_for_call(agent, agent.calls)
    agent.status = None
    payments.ready()


def test_an_identity_of_another_service_is_not_taken(estate: Estate) -> None:
    payments = estate.sidecar("payments", agent=estate.agent("payments", ID + "ledger"), wait=False)
    eventually(lambda: payments.logged("the SPIFFE agent gives nothing"), "the reason in the log")
    assert f"{ID}ledger, not spiffe://TRUST_DOMAIN/service/payments" in payments.logged("the SPIFFE agent gives nothing")[0]["error"]
    assert not (payments.state / "svid.pem").exists()


def test_another_trust_domain_is_refused_on_every_side(estate: Estate, tmp_path: Path) -> None:
    ledger = estate.sidecar("ledger")
    foreign = Ca("evil.test")
    # By its own roots it does not believe this control plane, so nothing is said to it.
    stranger = estate.sidecar("payments", agent=estate.agent("stranger", "spiffe://evil.test/service/payments", ca=foreign), wait=False)
    eventually(lambda: stranger.logged("the control plane cannot be reached"), "the refusal")
    assert "certificate" in stranger.logged("the control plane cannot be reached")[0]["error"].lower()
    # The right roots with a name of another domain: the control plane refuses.
    mixed = estate.sidecar("accounts", agent=estate.agent("mixed", "spiffe://evil.test/service/accounts"), wait=False)
    eventually(lambda: mixed.logged("the control plane cannot be reached"), "the refusal")
    assert estate.control.status()["instances"][0]["service"] == "ledger" and len(estate.control.status()["instances"]) == 1
    assert ledger.status()["ready"]


def test_keys_that_the_mesh_cannot_use_are_told(estate: Estate) -> None:
    agent = estate.agent("payments")
    agent.kind = rsa.RSAPrivateKey
    payments = estate.sidecar("payments", agent=agent, wait=False)
    assert payments.process.wait(PATIENCE) == 1
    assert "workload_x509_svid_key_type" in payments.errors.read_text()


def test_who_is_no_control_plane_is_not_taken_for_one(estate: Estate) -> None:
    """Any workload of the trust domain has a certificate under the same roots, and most are no services."""
    payments = estate.sidecar("payments")
    estate.agents["control"].rotate(identities=("spiffe://bank.test/control-not",))
    eventually(lambda: estate.control.logged("the SPIFFE agent gives nothing"), "the refusal of the name")
    assert "not spiffe://bank.test/control" in estate.control.logged("the SPIFFE agent gives nothing")[0]["error"]
    assert payments.status()["ready"]
    (other := estate.folder / "other").mkdir()
    (other / "mesh.yaml").write_text(mesh_file(estate.agents["control"]))
    with pytest.raises(RuntimeError, match="its registration entry needs that id"):
        ControlProcess(other)


def test_an_edge_is_a_member_by_spire(estate: Estate, tmp_path: Path) -> None:
    estate.control.edit("prefix: /v1/payments}", "prefix: /}")
    payments = estate.sidecar("payments")
    agent = estate.agent("edge")
    (tmp_path / "edge.yaml").write_text(EDGE.format(control=estate.control.url, agent=agent.address))
    with Gateway(tmp_path / "edge.yaml") as edge:
        eventually(lambda: edge.get("/v1/x")[0] == 200, "a call through the edge")
        before = (tmp_path / "edge.state" / "svid.pem").read_bytes()
        agent.rotate()
        eventually(lambda: (tmp_path / "edge.state" / "svid.pem").read_bytes() != before, "the agent's certificate")
        assert edge.get("/v1/x")[0] == 200
        assert payments.metric('istio_requests_total{reporter="destination",source_workload="edge"') >= 2
    # With the agent away it starts by what it holds.
    agent.stop()
    with Gateway(tmp_path / "edge.yaml") as edge:
        eventually(lambda: edge.get("/v1/x")[0] == 200, "a call through the edge")


BATCH = """apiVersion: batch/v1
kind: Job
metadata: {name: payments}
spec:
  template:
    metadata:
      annotations:
        crossway.dev/mode: explicit
        crossway.dev/app-port: none
        crossway.dev/spire: %s
        crossway.dev/local: "db=%d"
        crossway.dev/inbound-port: "%d"
        crossway.dev/outbound-port: "%d"
        crossway.dev/admin-port: "%d"
        crossway.dev/probes-port: "%d"
    spec:
      restartPolicy: Never
      containers: [{name: run, image: batch}]
"""


def test_an_injected_job_joins_by_the_agent_and_reaches_a_service_that_speaks_tcp(estate: Estate, tmp_path: Path) -> None:
    """The sidecar of an injected manifest, with its own words; only the places of its files are others."""
    estate.control.edit("  accounts: {}", "  accounts: {}\n  db: {protocol: tcp}")
    estate.control.edit("  rules:\n", "  rules:\n    - {name: payments-to-db, from: [payments], to: db}\n")
    origin, agent, local = ScriptedOrigin(echo), estate.agent("payments"), free_port()
    database = Sidecar(estate.control, "db", origin.port, "--spire", estate.agent("db").address, "--app-protocol", "tcp")  # type: ignore[arg-type]
    estate.sidecars.append(database)
    made = Injection("job.yaml", {"control": estate.control.url}).run(BATCH % (agent.socket, local, *(free_port() for _ in range(4))))
    (job,) = YAML(typ="safe").load_all(made)
    (side,) = job["spec"]["template"]["spec"]["initContainers"]
    places = {"/run/crossway-agent": str(agent.socket.parent), "/var/run/crossway/member": str(tmp_path / "run/member"), "[$(POD_IP)]": "127.0.0.1"}
    words = [reduce(lambda word, place: word.replace(*place), places.items(), each) for each in side["args"]]
    (tmp_path / "run").mkdir()
    with (tmp_path / "side.log").open("wb") as errors, subprocess.Popen(
        [sys.executable, "-m", "gateway", *words], env=environment(), stdout=subprocess.DEVNULL, stderr=errors
    ) as process:  # fmt: skip
        try:
            eventually(lambda: connects(local), "a connection to db")
            with connect(local) as client:
                client.send(b"by a local port")
                assert client.exactly(15) == b"by a local port"
            assert database.metric('istio_tcp_connections_opened_total{reporter="destination",source_workload="payments"') >= 1
        finally:
            process.kill()
    origin.close()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--spire", "/run/agent.sock"], "is not the address of a SPIFFE agent"),
        (["--spire"], "SPIFFE_ENDPOINT_SOCKET is not set"),
        (["--spire", "unix:/a", "--token", "t"], "one way to join is enough"),
    ],
)
def test_mistakes_of_the_command_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gateway.cli import main

    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)
    line = "mesh sidecar --service a --app 127.0.0.1:1 --inbound 127.0.0.1:2 --outbound 127.0.0.1:3 --control https://127.0.0.1:4 --state s"
    monkeypatch.setattr("sys.argv", ["crossway", *line.split(), *words])
    try:
        code = main()
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2 and said in capsys.readouterr().err


def test_the_agents_address_comes_from_the_environment_too(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = estate.agent("payments")
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", f"unix://{agent.socket}")
    sidecar = Sidecar(estate.control, "payments", estate.app.port, "--spire")  # type: ignore[arg-type]
    estate.sidecars.append(sidecar)
    assert sidecar.status()["identity"] == ID + "payments"
