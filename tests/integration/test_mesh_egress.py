"""The way out of the mesh: named hosts only, for whom a rule names, over TLS that is verified, with nothing of the mesh in it."""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.integration.control_kit import ControlProcess
from tests.integration.h2_origin import TwinOrigin
from tests.integration.mesh_kit import Control, Sidecar
from tests.integration.name_server import NameServer
from tests.integration.pki import Authority, Issued
from tests.integration.processes import Gateway, Origin, eventually, request
from tests.integration.test_mesh_edge import Heads, ask, authenticated, register, token_of

HOST = "api.cards.example"
ROOT = Authority("cards root")


class Partner:
    """A TLS server outside, which keeps the heads that it got and the names that it was asked for."""

    def __init__(self, folder: Path, issued: Issued | None = None, *, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, host: str = "127.0.0.1") -> None:
        (issued or ROOT.issue(HOST)).write(folder, "partner")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.maximum_version = version
        self.context.minimum_version = min(version, ssl.TLSVersion.TLSv1_2)
        if version < ssl.TLSVersion.TLSv1_2:
            self.context.set_ciphers("DEFAULT:@SECLEVEL=0")  # else it would refuse to speak it, not the sidecar
        self.context.load_cert_chain(folder / "partner.crt", folder / "partner.key")
        self.heads: list[bytes] = []
        self.names: list[str | None] = []
        self.answer = b""
        self.shown: list[Any] = []  # certificates of clients
        self.context.sni_callback = lambda sock, name, context: self.names.append(name)
        self.sock = socket.create_server((host, 0))
        self.port = int(self.sock.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self.sock.accept()[:1], daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with contextlib.suppress(OSError, ssl.SSLError), self.context.wrap_socket(raw, server_side=True) as secure:
            data = b""
            self.shown.append(secure.getpeercert())
            while chunk := secure.recv(65536):
                data += chunk
                while b"\r\n\r\n" in data:
                    head, _, data = data.partition(b"\r\n\r\n")
                    self.heads.append(head.lower())
                    secure.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n" + self.answer + b"\r\nok")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.sock.close()


def call(sidecar: Sidecar, path: str = "/v1/charges", host: str = HOST, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    return request(sidecar.outbound, path, method, {"host": host, **{name.replace("_", "-"): value for name, value in headers.items()}})


@pytest.fixture
def names() -> Iterator[NameServer]:
    with NameServer() as made:
        made.a(HOST, "127.0.0.1")
        yield made


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    made = Control(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def partner(tmp_path: Path) -> Iterator[Partner]:
    with Partner(tmp_path) as made:
        yield made


def cards(port: int, names: NameServer, **more: Any) -> dict[str, Any]:
    rule = {"name": "payments-to-cards", "from": ["payments"], "methods": ["GET", "POST"], "prefix": "/v1", "headers": {}, "claims": {}}
    return {
        "hosts": [HOST], "port": port, "protocol": "http", "ca": ROOT.pem.decode(), "resolver": names.address, "addresses": ["127.0.0.0/8"],
        "rules": [rule], "retries": 0, **more,
    }  # fmt: skip


def open_way(control: Control, said: dict[str, Any]) -> None:
    control.external["payments"] = {"cards": said}
    control.change()
    control.settled()


@pytest.fixture
def payments(control: Control, origin: Origin, partner: Partner, names: NameServer) -> Iterator[Sidecar]:
    control.external["payments"] = {"cards": cards(partner.port, names)}
    with Sidecar(control, "payments", origin.port, "--label", "version=p7") as made:
        eventually(lambda: call(made)[0] == 200, "the first look-up")
        yield made


def test_a_call_leaves_by_verified_tls_with_nothing_of_the_mesh_in_it(payments: Sidecar, partner: Partner) -> None:
    partner.heads.clear()
    status, _, body = call(
        payments, "/v1/charges?x=1", authorization="Bearer ours-to-them", x_crossway_caller="spiffe://bank.test/service/edge", X_Crossway_Caller="x",
        x_forwarded_for="10.1.2.3", forwarded="for=10.1.2.3", baggage="customer=7", tracestate="a=b", x_crossway_deadline_ms="4000",
        x_crossway_attempts_left="3", traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )  # fmt: skip
    assert (status, body) == (200, b"ok")
    (head,) = partner.heads
    lines = head.split(b"\r\n")
    assert lines[0] == b"get /v1/charges?x=1 http/1.1" and f"host: {HOST}:{partner.port}".encode() in lines
    assert b"authorization: bearer ours-to-them" in lines
    for word in (b"crossway-user", b"x-crossway", b"x_crossway", b"forwarded", b"10.1.2.3", b"baggage", b"tracestate", b"spiffe", b"deadline", b"attempts"):
        assert word not in head, head
    assert b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-" in head
    assert set(partner.names) == {HOST}


def test_words_of_the_mesh_are_not_believed_from_outside(payments: Sidecar, partner: Partner) -> None:
    partner.answer = b"crossway-denied: caller=\"x\"\r\ncrossway-websocket: off; x\r\nx-crossway-attempts-left: 0\r\nx-partner: yes\r\n"
    status, headers, _ = call(payments)
    assert status == 200 and headers["x-partner"] == "yes"
    assert "crossway-denied" not in headers and "crossway-websocket" not in headers and "x-crossway-attempts-left" not in headers


@pytest.mark.parametrize(("method", "path"), [("DELETE", "/v1/x"), ("GET", "/v2"), ("GET", "/v1/../v2"), ("GET", "/")])
def test_what_no_rule_allows_is_denied_at_the_caller(payments: Sidecar, partner: Partner, method: str, path: str) -> None:
    before = len(partner.heads)
    status, headers, _ = call(payments, path, method=method)
    assert status == 403 and len(partner.heads) == before
    assert headers["crossway-denied"] == 'caller="spiffe://bank.test/service/payments", rule=none, considered="payments-to-cards", policy=1'
    line = eventually(lambda: payments.logged("a call was denied"), "the log line")[0]
    assert (line["external"], line["caller"], line["method"]) == ("cards", "spiffe://bank.test/service/payments", method)
    assert payments.metric('crossway_mesh_denied_total{caller="spiffe://bank.test/service/payments",rule="none",policy="1"}') == 1


def test_other_hosts_and_callers_without_a_rule_have_no_way_out(control: Control, payments: Sidecar, partner: Partner, origin: Origin) -> None:
    before = len(partner.heads)
    for host in ("other.cards.example", "cards", f"x.{HOST}", "cards.example", "127.0.0.1"):
        assert call(payments, host=host)[0] == 404, host
    with Sidecar(control, "accounts", origin.port) as accounts:
        assert call(accounts)[0] == 404
    control.default = "audit"  # between services; the way out is not open by default
    control.change()
    control.settled()
    assert call(payments, "/v2")[0] == 403 and len(partner.heads) == before
    control.external["payments"] = {}
    control.change()
    control.settled()
    assert call(payments)[0] == 404 and len(partner.heads) == before


def test_it_is_counted_by_the_name_of_the_entry(payments: Sidecar) -> None:
    assert call(payments)[0] == 200
    lines = [line for line in payments.page("/metrics").splitlines() if line.startswith("istio_requests_total{") and 'destination_service="cards"' in line]
    assert len(lines) >= 1 and all('reporter="source"' in line and 'source_workload="payments"' in line for line in lines)
    assert all('destination_principal="unknown"' in line and 'source_version="p7"' in line for line in lines)
    assert payments.status()["assignment"]["external"] == ["cards"]


def test_our_certificate_is_shown_where_it_is_asked_for_and_every_call_is_recorded(
    control: Control, origin: Origin, names: NameServer, tmp_path: Path
) -> None:  # fmt: skip
    ours, record = Authority("issuer of ours", number=3), tmp_path / "egress.jsonl"
    held = tmp_path / "ours.pem"
    issued = ours.issue("payments.bank.test", number=1)
    held.write_bytes(issued.pem + issued.key_pem)
    with Partner(tmp_path) as partner:
        partner.context.load_verify_locations(cadata=ours.pem.decode())
        partner.context.verify_mode = ssl.CERT_REQUIRED
        control.external["payments"] = {"cards": cards(partner.port, names)}
        with Sidecar(control, "payments", origin.port, "--external-cert", f"cards={held}", "--egress-audit", str(record), "--drain-delay", "0", "--drain-deadline", "0.5") as payments:
            eventually(lambda: call(payments)[0] == 200, "the way out")
            shown = partner.shown[-1]
            assert ("commonName", "payments.bank.test") in shown["subject"][0]
            assert call(payments, "/v2", method="POST")[0] == 403
            # Another certificate, read on SIGHUP; one that cannot be read changes nothing.
            issued = ours.issue("next.bank.test", number=2)
            held.write_bytes(issued.pem + issued.key_pem)
            payments.process.send_signal(signal.SIGHUP)
            eventually(lambda: call(payments)[0] == 200 and ("commonName", "next.bank.test") in partner.shown[-1]["subject"][0], "the next certificate")
            held.write_bytes(b"nothing")
            payments.process.send_signal(signal.SIGHUP)
            eventually(lambda: payments.logged("the certificates towards external hosts cannot be used; the old ones go on"), "the log line")
            assert call(payments)[0] == 200
            assert payments.stop() == 0
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    denied = [line for line in lines if line["status"] == 403]
    assert [(line["method"], line["host"], line["path"], line["route"]) for line in denied] == [("POST", HOST, "/v2", "external>cards")]
    assert sum(line["status"] == 200 for line in lines) >= 3


def secret(folder: Path, version: str, issued: Issued) -> None:
    """A Secret of the type kubernetes.io/tls as a kubelet mounts it, and exchanges it: two links to a folder that is replaced at once."""
    made = folder / f"..{version}"
    made.mkdir(parents=True)
    (made / "cards.crt").write_bytes(issued.pem)
    (made / "cards.key").write_bytes(issued.key_pem)
    (folder / "..fresh").symlink_to(made.name)
    (folder / "..fresh").rename(folder / "..data")
    for name in ("cards.crt", "cards.key"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")


def test_certificate_and_key_of_a_secret_are_read_again_when_they_are_exchanged(control: Control, origin: Origin, names: NameServer, tmp_path: Path) -> None:
    ours, folder = Authority("issuer of ours", number=3), tmp_path / "secret"
    secret(folder, "1", ours.issue("payments.bank.test", number=1))
    with Partner(tmp_path) as partner:
        partner.context.load_verify_locations(cadata=ours.pem.decode())
        partner.context.verify_mode = ssl.CERT_REQUIRED
        control.external["payments"] = {"cards": cards(partner.port, names)}
        files = ("--external-cert", f"cards={folder}/cards.crt", "--external-key", f"cards={folder}/cards.key")
        with Sidecar(control, "payments", origin.port, *files) as payments:
            eventually(lambda: call(payments)[0] == 200, "the way out")
            assert ("commonName", "payments.bank.test") in partner.shown[-1]["subject"][0]
            secret(folder, "2", ours.issue("next.bank.test", number=2))
            eventually(lambda: call(payments)[0] == 200 and ("commonName", "next.bank.test") in partner.shown[-1]["subject"][0], "the next certificate")
            # A key that is another's changes nothing.
            wrong, other = ours.issue("wrong.bank.test", number=4), ours.issue("other.bank.test", number=5)
            secret(folder, "3", Issued(wrong.certificate, other.key))
            eventually(lambda: payments.logged("the certificates towards external hosts cannot be used; the old ones go on"), "the log line")
            assert call(payments)[0] == 200 and ("commonName", "next.bank.test") in partner.shown[-1]["subject"][0]


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1")
@pytest.mark.parametrize("fault", ["another name", "another authority", "expired", "an old version"])
def test_a_server_that_is_not_proved_gets_no_request(control: Control, payments: Sidecar, names: NameServer, tmp_path: Path, fault: str) -> None:

    issued = {
        "another name": ROOT.issue("api.other.example"),
        "another authority": Authority("stranger", number=7).issue(HOST),
        "expired": ROOT.issue(HOST, end=-datetime.timedelta(hours=1)),
        "an old version": ROOT.issue(HOST),
    }[fault]
    folder = tmp_path / "other"
    folder.mkdir()
    version = ssl.TLSVersion.TLSv1_1 if fault == "an old version" else ssl.TLSVersion.TLSv1_3
    with Partner(folder, issued, version=version) as other:
        open_way(control, cards(other.port, names))
        assert call(payments, method="POST")[0] in (502, 503)
        assert not other.heads
    with Partner(folder, version=ssl.TLSVersion.TLSv1_2) as good:
        open_way(control, cards(good.port, names))
        eventually(lambda: call(payments)[0] == 200, "TLS 1.2")


def test_the_session_of_one_name_proves_no_other_at_the_same_address(control: Control, payments: Sidecar, partner: Partner, names: NameServer) -> None:
    other = "refunds.cards.example"
    names.a(other, "127.0.0.1")
    assert call(payments)[0] == 200, "a session is kept, and would be resumed"
    open_way(control, cards(partner.port, names, hosts=[HOST, other]))
    found: list[int] = []
    eventually(lambda: found.append(call(payments, host=other)[0]) or other in partner.names, "a handshake for the other name")
    assert set(found) <= {502, 503}, "its certificate does not name it"
    assert call(payments)[0] == 200
    assert not [head for head in partner.heads if other.encode() in head]


def test_addresses_outside_of_the_policy_are_refused(control: Control, payments: Sidecar, partner: Partner, names: NameServer) -> None:
    before = len(partner.heads)
    open_way(control, cards(partner.port, names, addresses=None))
    assert call(payments)[0] == 503 and len(partner.heads) == before
    line = eventually(lambda: payments.logged("addresses of an external host are refused"), "the log line")[0]
    assert (line["external"], line["host"], line["addresses"], line["left"]) == ("cards", HOST, ["127.0.0.1"], 0)
    open_way(control, cards(partner.port, names, addresses=["127.0.0.1/32", "10.0.0.0/8"]))
    eventually(lambda: call(payments)[0] == 200, "the way out")
    # A name that moves to where it may not lead takes no request there.
    names.a(HOST, "127.0.0.9")
    eventually(lambda: call(payments)[0] == 503, "the new address, which is refused")
    names.a(HOST, "127.0.0.1")
    eventually(lambda: call(payments)[0] == 200, "its return")


def test_claims_of_the_user_count_and_stay_inside(control: Control, payments: Sidecar, partner: Partner, names: NameServer) -> None:
    said = cards(partner.port, names)
    said["rules"][0]["claims"] = {"scope": ["cards:charge"]}
    open_way(control, said)
    before = len(partner.heads)
    assert call(payments)[0] == 403
    assert call(payments, crossway_user="forged")[0] == 403
    assert len(partner.heads) == before


def test_what_is_not_understood_refuses_the_assignment(control: Control, payments: Sidecar, partner: Partner, names: NameServer) -> None:
    control.external["payments"] = {"cards": cards(partner.port, names, insecure=True)}
    control.change()
    refused = eventually(lambda: control.of("payments", "nack"), "the refusal")
    assert "insecure" in refused[-1]["reason"] and call(payments)[0] == 200


EXTERNAL = """external:
  cards:
    hosts: [{host}]
    port: {port}
    tls: {{ca: cards.pem}}
    addresses: [127.0.0.0/8]
    resolver: "{resolver}"
authorization:
"""


def test_the_control_plane_says_what_its_file_says(tmp_path: Path, origin: Origin, names: NameServer, partner: Partner) -> None:
    (tmp_path / "cards.pem").write_bytes(b"our partner's\n" + ROOT.pem)
    with ControlProcess(tmp_path) as control, Sidecar(control, "payments", origin.port, wait=False) as payments:  # type: ignore[arg-type]
        control.edit("authorization:\n", EXTERNAL.format(host=HOST, port=partner.port, resolver=names.address))
        assert control.command("can", "payments", "cards", "POST", "/v1/x").returncode == 1
        rule = "    - {name: payments-to-ledger, from: [payments], to: ledger}\n"
        control.edit(rule, rule + "    - {name: payments-to-cards, from: [payments], to: cards, methods: [POST], prefix: /v1}\n")

        def answered(method: str = "POST") -> int:
            with contextlib.suppress(OSError):
                return call(payments, method=method)[0]
            return 0

        eventually(lambda: answered() == 200, "the way out")
        assert answered("GET") == 403
        said = control.command("can", "payments", "cards", "POST", "/v1/x")
        assert said.returncode == 0 and "rule payments-to-cards allows it" in said.stdout, said.stderr
        said = control.command("can", "accounts", "cards", "POST", "/v1/x", "--json")
        assert said.returncode == 1 and json.loads(said.stdout)["reason"] == "no rule names accounts as a caller of cards"
        assert control.command("can", "cards", "payments").returncode == 2, "an external host calls nobody"
        control.edit("to: cards,", "to: ledger,")
        eventually(lambda: answered() == 404, "the end of the way out")


def test_the_context_of_a_user_opens_the_way_out_and_stays_inside(control: Control, partner: Partner, names: NameServer) -> None:
    control.rules = [{"name": "edge-to-payments", "from": ["edge"], "to": "payments"}]
    said = cards(partner.port, names)
    said["rules"][0]["claims"] = {"scope": ["payments:write"]}
    control.external["payments"] = {"cards": said}
    with Heads() as app, Sidecar(control, "payments", app.port) as payments:
        register(control, payments)
        with Gateway(authenticated(control)) as edge:
            assert ask(edge.addresses["public"], authorization=f"Bearer {token_of()}") == 200
            context = app.contexts[0]
            eventually(lambda: call(payments, crossway_user=context)[0] == 200, "the way out")
            assert call(payments)[0] == 403, "the service alone may not"
            for head in partner.heads:
                assert b"crossway-user" not in head and context.lower().encode() not in head


def test_a_partner_may_speak_http2(control: Control, origin: Origin, names: NameServer, tmp_path: Path) -> None:
    ROOT.issue(HOST).write(tmp_path, "edge")
    with TwinOrigin(tmp_path) as partner:
        control.external["payments"] = {"cards": cards(partner.secure, names, protocol="http2")}
        with Sidecar(control, "payments", origin.port) as payments:
            eventually(lambda: call(payments)[0] == 200, "the way out")
            said = json.loads(call(payments, "/v1/charges", x_crossway_caller="x", x_forwarded_for="10.1.2.3")[2])
    assert (said["version"], said["scheme"], said["authority"]) == ("two", "https", f"{HOST}:{partner.secure}")
    assert not [name for name, _ in said["fields"] if name.startswith(("x-crossway", "crossway", "x-forwarded", "forwarded"))]
