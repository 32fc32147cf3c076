"""Members of a mesh, as processes: joining, calling, being denied, renewing, losing the control plane, being revoked, leaving."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from cryptography import x509

from tests.integration.mesh_kit import Ca, Control, Sidecar, free_port
from tests.integration.processes import PATIENCE, Origin, eventually, request

RULE = {"name": "payments-to-ledger", "from": ["payments"], "to": "ledger", "methods": ["GET", "POST"], "prefix": "/v1"}


def call(port: int, path: str = "/v1/x", host: str = "ledger", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One request to a sidecar's outbound listener."""
    return request(port, path, method, {"host": host, **{name.replace("_", "-"): value for name, value in headers.items()}})


def endpoint(sidecar: Sidecar) -> dict[str, Any]:
    return {"address": f"127.0.0.1:{sidecar.inbound}", "weight": 1, "zone": None, "labels": {}}


def direct(sidecar: Sidecar, pair: Path | None, ca: Ca, path: str = "/v1/x") -> tuple[int, dict[str, str]]:
    """A request straight to an inbound listener, showing `pair`."""
    with secured(sidecar, pair, ca) as secure:
        secure.sendall(f"GET {path} HTTP/1.1\r\nhost: ledger\r\nconnection: close\r\n\r\n".encode())
        answer = http.client.HTTPResponse(secure)
        answer.begin()
        answer.read()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}


@contextlib.contextmanager
def secured(sidecar: Sidecar, pair: Path | None, ca: Ca) -> Iterator[ssl.SSLSocket]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=ca.bundle)
    if pair is not None:
        context.load_cert_chain(pair)
    with socket.create_connection(("127.0.0.1", sidecar.inbound), PATIENCE) as raw, context.wrap_socket(raw) as secure:
        yield secure


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    made = Control(tmp_path)
    made.rules = [dict(RULE)]
    yield made
    made.stop()


@pytest.fixture
def ledger(control: Control, origin: Origin) -> Iterator[Sidecar]:
    with Sidecar(control, "ledger", origin.port) as made:
        control.services["ledger"] = {"protocol": "http", "timeout": "5s", "endpoints": [endpoint(made)]}
        yield made


@pytest.fixture
def payments(control: Control, ledger: Sidecar, origin: Origin) -> Iterator[Sidecar]:
    with Sidecar(control, "payments", origin.port) as made:
        yield made


def test_a_call_crosses_two_sidecars_and_names_its_caller(payments: Sidecar, ledger: Sidecar, control: Control) -> None:
    status, _, body = call(payments.outbound)
    assert (status, json.loads(body)) == (200, {"from": "origin"})
    assert call(payments.outbound, host="ledger.bank.test")[0] == 200
    said = control.joined[0]
    assert said["inbound"] == f"127.0.0.1:{ledger.inbound}" and said["instance"].startswith("ledger-")
    eventually(lambda: control.of("payments", "ack") and control.of("ledger", "heartbeat")[-1:], "acknowledgement and heartbeat")
    eventually(lambda: control.of("ledger", "heartbeat")[-1]["healthy"], "a healthy heartbeat")


def test_each_hop_is_counted_by_source_and_destination(payments: Sidecar, ledger: Sidecar) -> None:
    assert [call(payments.outbound)[0] for _ in range(3)] == [200] * 3
    call(payments.outbound, "/elsewhere")
    inbound = 'istio_requests_total{reporter="destination",source_workload="payments"'
    outbound = 'istio_requests_total{reporter="source",source_workload="payments"'
    eventually(lambda: ledger.metric(inbound) == 4 and payments.metric(outbound) == 4, "the counts")
    lines = ledger.page("/metrics").splitlines()
    (good,) = [line for line in lines if line.startswith(inbound) and 'response_code="200"' in line]
    assert 'source_principal="spiffe://bank.test/service/payments"' in good
    assert 'destination_principal="spiffe://bank.test/service/ledger"' in good and 'connection_security_policy="mutual_tls"' in good
    assert good.endswith(" 3")
    assert any(line.startswith("istio_request_duration_milliseconds_bucket{") and 'le="+Inf"' in line for line in lines)


def test_the_trace_continues_through_both_hops(control: Control, ledger: Sidecar, payments: Sidecar) -> None:
    with Listening() as app:
        ledger.stop(signal.SIGKILL)
        with Sidecar(control, "ledger", app.port) as again:
            control.services["ledger"]["endpoints"] = [endpoint(again)]
            control.change()
            control.settled()
            trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            assert call(payments.outbound, traceparent=trace, x_crossway_caller="spiffe://bank.test/service/edge")[0] == 200
            head = app.heads[0].lower()
            assert b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-" in head and b"-b7ad6b7169203331-" not in head
            assert head.count(b"x-crossway-caller:") == 1 and b"x-crossway-caller: spiffe://bank.test/service/payments\r\n" in head
            assert b"host: ledger\r\n" in head


class Listening:
    """An app that answers 200 and keeps the heads that it got."""

    def __init__(self, port: int = 0) -> None:
        self.heads: list[bytes] = []
        self.sock = socket.create_server(("127.0.0.1", port))
        self.port = self.sock.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.sock.accept()
                with connection:
                    head = b""
                    while b"\r\n\r\n" not in head and (data := connection.recv(65536)):
                        head += data
                    if head:
                        self.heads.append(head)
                        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.sock.close()


def test_the_registry_hears_at_once_that_the_app_is_gone_and_back(control: Control) -> None:
    app = Listening()
    with Sidecar(control, "ledger", app.port) as ledger:
        eventually(lambda: control.of("ledger", "heartbeat") and control.of("ledger", "heartbeat")[-1]["healthy"], "a healthy heartbeat")
        app.sock.shutdown(socket.SHUT_RDWR)
        app.sock.close()
        eventually(lambda: not control.of("ledger", "heartbeat")[-1]["healthy"], "the word that it is gone")
        assert not ledger.status()["ready"] and ledger.metric("crossway_mesh_app_up") == 0
        with Listening(app.port):
            eventually(lambda: control.of("ledger", "heartbeat")[-1]["healthy"], "the word that it is back")


# -- authorization


@pytest.mark.parametrize(("method", "path"), [("DELETE", "/v1/x"), ("GET", "/v2/x"), ("GET", "/v1x"), ("GET", "/v1/../v2"), ("GET", "/")])
def test_what_no_rule_allows_is_denied_and_explained(payments: Sidecar, ledger: Sidecar, method: str, path: str) -> None:
    status, headers, _ = call(payments.outbound, path, method=method)
    assert status == 403
    assert headers["crossway-denied"] == 'caller="spiffe://bank.test/service/payments", rule=none, considered="payments-to-ledger", policy=1'
    line = eventually(lambda: ledger.logged("a call was denied"), "the log line")[0]
    assert (line["caller"], line["policy"], line["rule"]) == ("spiffe://bank.test/service/payments", 1, None)
    assert ledger.metric('crossway_mesh_denied_total{caller="spiffe://bank.test/service/payments",rule="none",policy="1"}') == 1


def test_a_caller_that_no_rule_names_is_denied(control: Control, ledger: Sidecar, origin: Origin) -> None:
    with Sidecar(control, "accounts", origin.port) as accounts:
        status, headers, _ = call(accounts.outbound)
        assert status == 403 and 'caller="spiffe://bank.test/service/accounts", rule=none, considered="", ' in headers["crossway-denied"]
        counted = 'istio_requests_total{reporter="destination",source_workload="accounts"'
        eventually(lambda: ledger.metric(counted) == 1, "the count of the denial by its source")


def test_rules_by_header_and_a_change_of_policy(control: Control, payments: Sidecar, ledger: Sidecar) -> None:
    control.rules[0] |= {"headers": {"x-purpose": {"prefix": "book"}}}
    control.change()
    control.settled()
    assert call(payments.outbound)[0] == 403
    assert call(payments.outbound, x_purpose="booking")[0] == 200
    assert "policy=2" in call(payments.outbound, x_purpose="look")[1]["crossway-denied"]


def test_rules_by_a_whole_path(control: Control, payments: Sidecar, ledger: Sidecar) -> None:
    control.rules[0] = {key: value for key, value in RULE.items() if key != "prefix"} | {"path": "/v1/accounts/{id}/balance"}
    control.change()
    control.settled()
    assert call(payments.outbound, "/v1/accounts/7/balance?of=today")[0] == 200
    assert call(payments.outbound, "/v1/accounts/%37/balance")[0] == 200, "the same path, written otherwise"
    for path in ("/v1/accounts/7/balance/", "/v1/accounts/7/balance/x", "/v1/accounts//balance", "/v1/accounts/7/8/balance", "/v1/accounts/7/balances",
                 "/v1/accounts/7", "/v1/accounts/7%2F8/balance/..", "/v1/accounts", "/", "/v1/accounts/7/Balance"):  # fmt: skip
        status, headers, _ = call(payments.outbound, path)
        assert status in (400, 403), path
        assert status == 400 or "crossway-denied" in headers


def test_a_header_that_comes_twice_is_allowed_by_neither_alone(control: Control, payments: Sidecar, ledger: Sidecar) -> None:
    """An app reads the first, the last, or both joined: whichever it is, it is one that the rule allows."""
    control.rules[0] |= {"headers": {"x-purpose": {"prefix": "book"}}}
    control.change()
    control.settled()
    for values, status in ((("booking", "booked"), 200), (("booking", "payout"), 403), (("payout", "booking"), 403), (("booking, payout",), 200)):
        lines = "".join(f"X-Purpose: {value}\r\n" for value in values)
        with socket.create_connection(("127.0.0.1", payments.outbound), PATIENCE) as raw:
            raw.sendall(f"GET /v1/x HTTP/1.1\r\nHost: ledger\r\n{lines}Connection: close\r\n\r\n".encode())
            assert int(raw.makefile("rb").readline().split()[1]) == status, values


def test_audit_mode_lets_pass_and_records(control: Control, payments: Sidecar, ledger: Sidecar) -> None:
    control.default = "audit"
    control.change()
    control.settled()
    status, headers, _ = call(payments.outbound, "/v2/x")
    assert status == 200 and "considered=\"payments-to-ledger\", policy=2" in headers["crossway-would-deny"]
    assert ledger.metric("crossway_mesh_would_deny_total{") == 1 and ledger.metric("crossway_mesh_denied_total{") == 0
    assert "crossway-would-deny" not in call(payments.outbound)[1]
    assert eventually(lambda: ledger.logged("a call would be denied"), "the log line")[0]["path"] == "/v2/x"


def test_a_rule_that_is_not_understood_refuses_the_whole_assignment(control: Control, payments: Sidecar, ledger: Sidecar) -> None:
    control.rules[0] |= {"moon": "full"}
    control.change()
    reason = eventually(lambda: control.of("ledger", "nack"), "the refusal")[0]
    assert reason["version"] == 2 and "moon" in reason["reason"]
    assert call(payments.outbound)[0] == 200 and ledger.status()["assignment"]["version"] == 1


# -- who is let in


@pytest.mark.parametrize(
    ("uris", "options"),
    [
        (["spiffe://other.test/service/payments"], {}),
        (["spiffe://bank.test/service/payments", "spiffe://bank.test/service/edge"], {}),
        (["spiffe://bank.test"], {}),
        (["spiffe://bank.test/workload/payments"], {}),
        ([], {}),
        (["https://bank.test/service/payments"], {}),
        (["spiffe://bank.test/service/payments"], {"usage": False}),
        (["spiffe://bank.test/service/payments"], {"life": -30}),
        (["spiffe://bank.test/service/payments"], {"begin": 600}),
        (["spiffe://bank.test/service/payments"], {"extended": (x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH,)}),
    ],
)
def test_what_is_no_identity_of_the_mesh_is_refused_at_the_handshake(
    control: Control, ledger: Sidecar, tmp_path: Path, uris: list[str], options: dict[str, Any]
) -> None:
    pair = control.ca.pair(tmp_path, "stranger", *uris, **options)
    with pytest.raises((ssl.SSLError, OSError)):
        direct(ledger, pair, control.ca)
    good = control.ca.pair(tmp_path, "good", "spiffe://bank.test/service/payments")
    assert direct(ledger, good, control.ca)[0] == 200


def test_nobody_gets_in_without_a_certificate_or_with_anothers(control: Control, ledger: Sidecar, tmp_path: Path) -> None:
    other = Ca()
    for pair in (None, other.pair(tmp_path, "self-made", "spiffe://bank.test/service/payments")):
        with pytest.raises((ssl.SSLError, OSError)):
            direct(ledger, pair, control.ca)
    with socket.create_connection(("127.0.0.1", ledger.inbound), PATIENCE) as plain:
        plain.sendall(b"GET /v1/x HTTP/1.1\r\nhost: ledger\r\n\r\n")
        assert plain.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_a_service_under_another_name_is_not_called(control: Control, payments: Sidecar, ledger: Sidecar, origin: Origin) -> None:
    with Sidecar(control, "accounts", origin.port) as accounts:
        control.services["ledger"]["endpoints"] = [endpoint(accounts)]
        control.change()
        control.settled()
        status, _, body = call(payments.outbound)
        assert status == 503 and b"not sent" in body
        assert accounts.metric("istio_requests_total{reporter=\"destination\"") == 0


def test_a_revoked_identity_is_out_within_seconds(control: Control, ledger: Sidecar, tmp_path: Path) -> None:
    pair = control.ca.pair(tmp_path, "payments", "spiffe://bank.test/service/payments")
    with secured(ledger, pair, control.ca) as open_one:
        open_one.sendall(b"GET /v1/x HTTP/1.1\r\nhost: ledger\r\n\r\n")
        answer = http.client.HTTPResponse(open_one)
        answer.begin()
        answer.read()
        assert answer.status == 200
        control.revoked["identities"] = ["spiffe://bank.test/service/payments"]
        control.change()
        with contextlib.suppress(OSError):
            assert open_one.recv(1) == b""
    with pytest.raises((ssl.SSLError, OSError)):
        direct(ledger, pair, control.ca)
    assert ledger.metric("crossway_mesh_revoked_connections_closed_total") == 1


def test_who_is_revoked_while_he_shakes_hands_does_not_get_in(control: Control, ledger: Sidecar, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=control.ca.bundle)
    context.load_cert_chain(control.ca.pair(tmp_path, "payments", "spiffe://bank.test/service/payments"))
    control.change()
    control.settled()
    with socket.create_connection(("127.0.0.1", ledger.inbound), PATIENCE) as raw:
        arrived, leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(arrived, leaving)
        while True:
            try:
                client.do_handshake()
                break  # his certificate and his proof are in `leaving`, and nobody has seen them
            except ssl.SSLWantReadError:
                raw.sendall(leaving.read())
                arrived.write(raw.recv(1 << 16))
        control.revoked["identities"] = ["spiffe://bank.test/service/payments"]
        control.change()
        control.settled()
        client.write(b"GET /v1/x HTTP/1.1\r\nhost: ledger\r\n\r\n")
        raw.sendall(leaving.read())
        with contextlib.suppress(ConnectionError):
            assert raw.recv(1 << 16) == b""
    assert ledger.metric("istio_requests_total") == 0


@pytest.mark.parametrize("protocol", ["http", "http2"])
def test_a_server_that_is_revoked_while_it_shakes_hands_is_told_nothing(control: Control, origin: Origin, tmp_path: Path, protocol: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.load_cert_chain(control.ca.pair(tmp_path, "ledger", "spiffe://bank.test/service/ledger"))
    context.load_verify_locations(cadata=control.ca.bundle)
    with socket.create_server(("127.0.0.1", 0)) as server, Sidecar(control, "payments", origin.port) as payments:
        server.settimeout(PATIENCE)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        control.services["ledger"] = {"protocol": protocol, "retries": 0, "endpoints": [{"address": address, "weight": 1, "zone": None, "labels": {}}]}
        heard: list[bytes] = []
        said: list[int] = []

        def attempt() -> bool:
            """The time for connecting is 2 s, in which the sidecar has to have heard of it."""
            for identities in ([], ["spiffe://bank.test/service/ledger"]):
                control.revoked["identities"] = identities
                control.change()
                control.settled()
                if not identities:
                    caller = threading.Thread(target=lambda: said.append(call(payments.outbound)[0]))
                    caller.start()
                    raw, _ = server.accept()
                    raw.settimeout(PATIENCE)
            with raw, contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as secure:
                heard.append(secure.recv(1 << 16))
            caller.join(PATIENCE)
            assert said[-1] in (503, 504) and b"".join(heard) == b""
            return said[-1] == 503

        eventually(attempt, "a handshake that ends in time")


def test_a_revoked_serial_is_one_certificate_alone(control: Control, ledger: Sidecar, tmp_path: Path) -> None:
    one = control.ca.pair(tmp_path, "one", "spiffe://bank.test/service/payments")
    two = control.ca.pair(tmp_path, "two", "spiffe://bank.test/service/payments")
    serial = x509.load_pem_x509_certificate(one.read_bytes()).serial_number
    control.revoked["serials"] = [f"{serial:x}"]
    control.change()
    control.settled()
    with pytest.raises((ssl.SSLError, OSError)):
        direct(ledger, one, control.ca)
    assert direct(ledger, two, control.ca)[0] == 200


# -- joining


def test_the_state_is_its_owners_alone_and_joins_once(control: Control, ledger: Sidecar, origin: Origin) -> None:
    assert stat.S_IMODE(os.stat(ledger.state).st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in ledger.state.iterdir())
    ledger.stop(signal.SIGKILL)
    with Sidecar(control, "ledger", origin.port) as again:
        assert again.status()["ready"] and len(control.joined) == 1


def failing(control: Control, service: str, app: int, *more: str, token: Path | None = None, state: str | None = None) -> str:
    """Start a sidecar that must not start; what it says."""
    with Sidecar(control, service, app, *more, token=token, state=state, wait=False) as sidecar:
        assert sidecar.process.wait(PATIENCE) == 1
        return sidecar.errors.read_text()


def test_tokens_that_are_not_taken(control: Control, ledger: Sidecar, origin: Origin, tmp_path: Path) -> None:
    spent = control.token("payments")
    with Sidecar(control, "payments", origin.port, token=spent) as payments:
        payments.stop(signal.SIGKILL)
    assert "spent or unknown" in failing(control, "payments", origin.port, token=spent, state="second.state")
    assert "is for ledger, not payments" in failing(control, "payments", origin.port, token=control.token("ledger"), state="third.state")
    assert "has expired" in failing(control, "payments", origin.port, token=control.token("payments", life=-1), state="fourth.state")
    wrong = control.token("payments", root="0" * 64)
    assert "does not hold the root" in failing(control, "payments", origin.port, token=wrong, state="fifth.state")
    assert json.loads(base64.urlsafe_b64decode(wrong.read_text() + "==="))["secret"] not in str(control.joined)


def test_it_joins_when_the_control_plane_comes(control: Control, origin: Origin) -> None:
    control.stop()
    with Sidecar(control, "ledger", origin.port, wait=False) as ledger:
        eventually(lambda: ledger.errors.exists() and ledger.logged("joining the mesh failed"), "a failed attempt")
        assert ledger.status()["detail"] == "no assignment yet" and ledger.page("/readyz").startswith('{"status": "not ready"')
        control.start()
        ledger.ready()


def test_a_change_of_one_service_leaves_the_others_connections_alone(control: Control, payments: Sidecar, ledger: Sidecar) -> None:
    assert call(payments.outbound)[0] == 200
    before = ledger.status()["live"]["tls"]
    assert before == 1
    control.services["fraud"] = {"protocol": "http", "endpoints": []}
    control.change()
    control.settled()
    for _ in range(3):
        assert call(payments.outbound)[0] == 200
    assert ledger.status()["live"]["tls"] == before


def test_a_service_cannot_play_the_control_plane(control: Control, ledger: Sidecar, origin: Origin) -> None:
    control.stop()
    control.ca.pair = lambda folder, name, *uris, pair=control.ca.pair: pair(folder, name, "spiffe://bank.test/service/ledger")  # type: ignore[method-assign]
    control.start()
    said = failing(control, "payments", origin.port, token=control.token("payments"), state="fooled.state")
    assert "who answers at the control plane's address is spiffe://bank.test/service/ledger" in said
    assert [each["instance"] for each in control.joined if each["instance"].startswith("payments")] == []


def test_a_state_that_others_can_read_is_not_used(control: Control, ledger: Sidecar, origin: Origin) -> None:
    ledger.stop(signal.SIGKILL)
    (ledger.state / "svid.pem").chmod(0o644)
    assert "others may read it" in failing(control, "ledger", origin.port)


def test_one_folder_is_one_members(control: Control, ledger: Sidecar, origin: Origin) -> None:
    assert "another process uses it" in failing(control, "ledger", origin.port)


# -- renewing


def test_certificates_are_renewed_with_new_keys_under_load_and_nothing_fails(tmp_path: Path, origin: Origin) -> None:
    control = Control(tmp_path, life=6)
    control.rules = [dict(RULE)]
    try:
        with Sidecar(control, "ledger", origin.port) as ledger:
            control.services["ledger"] = {"protocol": "http", "endpoints": [endpoint(ledger)]}
            with Sidecar(control, "payments", origin.port) as payments:
                control.change()
                connection = http.client.HTTPConnection("127.0.0.1", payments.outbound, timeout=PATIENCE)
                first = (payments.state / "svid.pem").read_bytes()
                end = time.monotonic() + PATIENCE * 3
                while payments.status()["certificate"]["renewals"] < 3 or ledger.status()["certificate"]["renewals"] < 3:
                    connection.request("GET", "/v1/x", headers={"host": "ledger"})
                    answer = connection.getresponse()
                    assert (answer.status, answer.read()) == (200, b'{"from": "origin"}')
                    assert time.monotonic() < end, payments.errors.read_text() + ledger.errors.read_text()
                connection.close()
                last = (payments.state / "svid.pem").read_bytes()
                assert first.partition(b"-----BEGIN PRIVATE KEY")[2] != last.partition(b"-----BEGIN PRIVATE KEY")[2]
                keys = {each.public_key().public_numbers().x for each in control.issued}  # type: ignore[union-attr]
                assert len(keys) == len(control.issued) >= 8
    finally:
        control.stop()


def test_a_renewal_that_fails_is_told_and_tried_again(tmp_path: Path, origin: Origin) -> None:
    control = Control(tmp_path, life=30)
    try:
        with Sidecar(control, "ledger", origin.port) as ledger:
            control.stop()
            end = time.monotonic() + 60
            while ledger.metric("crossway_mesh_certificate_alarm") < 2:
                assert time.monotonic() < end
                time.sleep(0.1)
            levels = [line["level"] for line in ledger.logged("the certificate is not renewed yet")]
            assert levels == ["warning", "error"]
            assert ledger.metric("crossway_mesh_certificate_failures_total") >= 1
            control.start()
            eventually(lambda: ledger.metric("crossway_mesh_certificate_renewals_total") >= 1, "the renewal")
            assert ledger.metric("crossway_mesh_certificate_alarm") == 0
    finally:
        control.stop()


def test_another_root_arrives_without_a_restart(control: Control, payments: Sidecar, ledger: Sidecar) -> None:
    old, new = control.ca, Ca()

    class Both(Ca):
        """Issues by the new root, and hands out both."""

        def __init__(self) -> None:
            self.__dict__ |= new.__dict__

        @property
        def bundle(self) -> str:
            return old.bundle + new.bundle

    overlap = Both()
    overlap.seal = old.seal  # type: ignore[method-assign]
    control.ca = overlap
    control.change()
    control.settled()
    assert call(payments.outbound)[0] == 200
    overlap.seal = new.seal  # type: ignore[method-assign]
    control.change()
    control.settled()
    assert (ledger.state / "bundle.pem").read_text() == old.bundle + new.bundle
    pair = new.pair(control.folder, "later", "spiffe://bank.test/service/payments")
    assert direct(ledger, pair, old)[0] == 200


# -- the stream


def test_endpoints_come_and_go_by_deltas(control: Control, payments: Sidecar, ledger: Sidecar, origin: Origin) -> None:
    control.services["ledger"]["endpoints"] = []
    control.change()
    control.settled()
    assert call(payments.outbound)[0] == 503
    control.services["ledger"]["endpoints"] = [endpoint(ledger)]
    control.services["fraud"] = {"protocol": "http", "endpoints": []}
    control.change()
    control.settled()
    assert call(payments.outbound)[0] == 200 and call(payments.outbound, host="fraud")[0] == 503
    del control.services["fraud"]
    control.change()
    control.settled()
    assert call(payments.outbound, host="fraud")[0] == 404


def test_what_is_not_signed_by_the_control_plane_changes_nothing(control: Control, payments: Sidecar, ledger: Sidecar) -> None:
    good = control.ca.seal
    for number, seal in enumerate((Ca().seal, lambda body: good({**body, "fresh": 1}), lambda body: "..", lambda body: good(body)[:-8] + "AAAAAAAA")):
        control.ca.seal = seal  # type: ignore[method-assign]
        control.services["ledger"]["endpoints"] = []
        control.change()
        eventually(lambda count=number: len(control.of("payments", "nack")) == count + 1, "the refusal")
        assert call(payments.outbound)[0] == 200
    assert "signature" in control.of("payments", "nack")[0]["reason"]


def test_an_assignment_for_somebody_else_is_refused(control: Control, payments: Sidecar) -> None:
    control.deltas = False
    body = control.body
    control.body = lambda service: {**body(service), "service": "edge"}  # type: ignore[method-assign]
    control.change()
    assert "it is for edge" in eventually(lambda: control.of("payments", "nack"), "the refusal")[0]["reason"]


def test_a_delta_on_another_version_asks_for_the_whole(control: Control, payments: Sidecar, ledger: Sidecar) -> None:
    control.alter = lambda message: {**message, "base": 77} if message["type"] == "delta" else message
    control.services["ledger"]["endpoints"] = []
    control.change()
    eventually(lambda: ("payments", "0") in control.asked[2:] and call(payments.outbound)[0] == 503, "the whole assignment")


# -- without the control plane


def test_it_serves_and_starts_while_the_control_plane_is_down(control: Control, payments: Sidecar, ledger: Sidecar) -> None:
    eventually(lambda: control.acked("payments") == 1 and control.acked("ledger") == 1, "the acknowledgements")
    control.stop()
    assert call(payments.outbound)[0] == 200
    for sidecar in (payments, ledger):
        sidecar.stop(signal.SIGKILL)
        sidecar.start()
        sidecar.ready()
    assert call(payments.outbound)[0] == 200
    assert not payments.status()["control"]["connected"]
    assert payments.logged("serving from the assignment on disk")
    control.start()
    eventually(lambda: payments.status()["control"]["connected"], "the stream")
    assert control.asked[-1][1] in ("0", "1") and call(payments.outbound)[0] == 200


def test_a_snapshot_that_was_changed_on_disk_is_not_believed(control: Control, payments: Sidecar, ledger: Sidecar) -> None:
    eventually(lambda: (ledger.state / "assignment.json").exists(), "the file")
    ledger.stop(signal.SIGKILL)
    control.stop()
    path = ledger.state / "assignment.json"
    kept = json.loads(path.read_text())
    kept["assignment"]["authorization"]["default"] = "audit"
    path.write_text(json.dumps(kept))
    ledger.start()
    eventually(lambda: ledger.logged("the assignment on disk is not used"), "the refusal")
    assert not ledger.status()["ready"]
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", ledger.inbound), 1).close()
    control.start()
    ledger.ready()
    assert call(payments.outbound)[0] == 200


def test_how_old_the_assignment_is_can_be_seen(control: Control, ledger: Sidecar) -> None:
    control.fresh = 0
    control.change()
    control.settled()
    assert ledger.metric("crossway_mesh_assignment_overdue_seconds") == 0
    control.stop()
    eventually(lambda: ledger.metric("crossway_mesh_assignment_overdue_seconds") > 0, "the age")


# -- leaving


def test_it_leaves_the_registry_then_closes_inbound_and_keeps_outbound_until_the_app_is_gone(
    control: Control, ledger: Sidecar, origin: Origin, tmp_path: Path
) -> None:
    control.rules.append({"name": "back", "from": ["payments"], "to": "payments"})
    app = Origin()
    with Sidecar(control, "payments", app.port, "--drain-delay", "5", "--drain-deadline", "60") as payments:
        slow: list[int] = []
        pair = control.ca.pair(tmp_path, "self", "spiffe://bank.test/service/payments")
        threading.Thread(target=lambda: slow.append(direct(payments, pair, control.ca, "/held")[0]), daemon=True).start()
        assert app.held.acquire(timeout=PATIENCE)
        payments.process.send_signal(signal.SIGTERM)
        eventually(lambda: control.of("payments", "heartbeat")[-1]["draining"], "the word to the control plane")
        assert direct(payments, pair, control.ca)[0] == 200, "inbound is open during the delay"
        eventually(lambda: payments.logged("inbound closed"), "the end of inbound")
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", payments.inbound), 1).close()
        assert call(payments.outbound)[0] == 200, "outbound serves the app's last calls"
        app.release.set()
        eventually(lambda: slow == [200], "the exchange that was under way")
        assert payments.process.poll() is None and call(payments.outbound)[0] == 200
        app.close()
        assert payments.process.wait(PATIENCE) == 0
        assert payments.logged("stopped")[0]["forced"] is False


def test_a_port_that_somebody_else_took_in_the_meantime_ends_it(control: Control, origin: Origin) -> None:
    control.stop()
    with Sidecar(control, "payments", origin.port, wait=False) as payments:
        eventually(lambda: payments.logged("joining the mesh failed"), "an attempt to join, with its ports bound")
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", payments.outbound))
            other.listen()
            control.start()
            assert payments.process.wait(PATIENCE * 2) == 1
        assert f"cannot listen for outbound at 127.0.0.1:{payments.outbound}" in payments.errors.read_text()


def test_a_second_signal_ends_it_at_once(control: Control, ledger: Sidecar) -> None:
    ledger.process.send_signal(signal.SIGTERM)
    eventually(lambda: ledger.logged("stopping"), "the drain")
    ledger.process.send_signal(signal.SIGTERM)
    assert ledger.process.wait(PATIENCE) == 0


def test_http2_between_members_and_apps_that_speak_http1(control: Control, payments: Sidecar, ledger: Sidecar, tmp_path: Path) -> None:
    control.services["ledger"]["protocol"] = "http2"
    control.change()
    control.settled()
    assert [call(payments.outbound)[0] for _ in range(5)] == [200] * 5
    assert ledger.metric("crossway_http2_connections_total") == 1
    assert call(payments.outbound, "/v2/x")[1]["crossway-denied"].startswith('caller="spiffe://bank.test/service/payments"')
    control.revoked["identities"] = ["spiffe://bank.test/service/payments"]
    control.change()
    # The caller hears of it as well, and may part with the link before it is cut.
    eventually(lambda: ledger.metric("crossway_mesh_revoked_connections_closed_total") == 1 or ledger.metric("crossway_connections") == 0, "its end")
    assert call(payments.outbound)[0] in (502, 503)


def test_http2_links_are_drained_with_inbound(control: Control, payments: Sidecar, ledger: Sidecar) -> None:
    control.services["ledger"]["protocol"] = "http2"
    control.change()
    control.settled()
    assert call(payments.outbound)[0] == 200
    ledger.process.send_signal(signal.SIGTERM)
    eventually(lambda: ledger.logged("inbound closed"), "the end of inbound")
    eventually(lambda: ledger.status()["live"]["tls"] == 0, "the end of the link")


def test_a_port_of_its_own_for_a_service(control: Control, ledger: Sidecar, origin: Origin) -> None:
    port = free_port()
    with Sidecar(control, "payments", origin.port, "--local", f"ledger=127.0.0.1:{port}") as payments:
        assert call(port, host="whatever.example")[0] == 200
        assert call(payments.outbound, host="whatever.example")[0] == 404
