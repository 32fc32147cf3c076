"""The control plane as a process: joining, renewing, streams, deltas, reload, revocation, rotation, restart."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import signal
import socket
import sqlite3
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.integration.control_kit import SOON, ControlProcess, Member, make_request, metric, post, serial_of
from tests.integration.pki import Authority
from tests.integration.processes import PATIENCE, eventually


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlProcess]:
    with ControlProcess(tmp_path) as process:
        yield process


@pytest.fixture
def members() -> Iterator[list[Member]]:
    found: list[Member] = []
    yield found
    for member in found:
        member.close()


def joined(members: list[Member], control: ControlProcess, service: str, number: int = 1) -> Member:
    member = Member(control, service, number)
    status, answer = member.join()
    assert status == 200, answer
    members.append(member)
    return member


# -- identities


def test_the_first_start_makes_keys_that_only_the_owner_reads(control: ControlProcess) -> None:
    assert stat.S_IMODE((control.folder / "ca").stat().st_mode) == 0o700
    keys = [*control.folder.glob("ca/1/*.key"), control.folder / "mesh.db"]
    assert len(keys) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}


def test_a_certificate_is_an_x509_svid(control: ControlProcess, members: list[Member]) -> None:
    leaf = joined(members, control, "payments").leaf
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical and names.value.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://bank.test/service/payments"]
    assert len(list(names.value)) == 1
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.digital_signature and not usage.value.key_cert_sign and not usage.value.crl_sign
    assert set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert 3500 < leaf.not_valid_after_utc.timestamp() - time.time() <= 3600


def test_the_root_that_the_token_names_is_in_the_chain(control: ControlProcess) -> None:
    token = json.loads(base64.urlsafe_b64decode(control.token("payments").read_text().strip() + "=="))
    root = x509.load_pem_x509_certificate((control.folder / "ca/1/root.crt").read_bytes())
    from cryptography.hazmat.primitives import hashes

    assert token["control_ca"] == root.fingerprint(hashes.SHA256()).hex()
    assert token["service"] == "payments" and 500 < token["expires"] - time.time() <= 600


def test_a_token_is_good_once(control: ControlProcess) -> None:
    token = control.token("payments").read_text()
    assert Member(control, "payments").join(token)[0] == 200
    status, answer = Member(control, "payments", 2).join(token)
    assert status == 403 and "has been used" in answer["error"]


def test_a_request_that_cannot_be_used_does_not_spend_the_token(control: ControlProcess) -> None:
    token = control.token("payments").read_text()
    assert Member(control, "payments").join(token, csr="nonsense")[0] == 400
    assert Member(control, "payments").join(token, inbound="0.0.0.0:1")[0] == 400
    assert Member(control, "payments").join(token)[0] == 200


@pytest.mark.parametrize("how", ["secret", "service", "garbage"])
def test_a_token_that_was_changed_lets_nobody_in(control: ControlProcess, how: str) -> None:
    said = json.loads(base64.urlsafe_b64decode(control.token("payments").read_text().strip() + "=="))
    if how == "secret":
        said["secret"] = said["secret"][:-1] + ("A" if said["secret"][-1] != "A" else "B")
    elif how == "service":
        said["service"] = "ledger"
    text = "garbage" if how == "garbage" else base64.urlsafe_b64encode(json.dumps(said).encode()).decode()
    assert Member(control, "ledger").join(text)[0] == 403


def test_a_token_expires(control: ControlProcess) -> None:
    token = control.token("payments", "--life", "1s").read_text()
    expires = json.loads(base64.urlsafe_b64decode(token.strip() + "=="))["expires"]
    eventually(lambda: time.time() > expires + 1, "the end of the token")
    status, answer = Member(control, "payments").join(token)
    assert status == 403 and "expired" in answer["error"]


def test_neither_state_nor_log_holds_a_secret(control: ControlProcess) -> None:
    token = control.token("payments").read_text().strip()
    secret = json.loads(base64.urlsafe_b64decode(token + "=="))["secret"].partition(".")[2].encode()
    assert Member(control, "payments").join(token)[0] == 200
    for path in [*control.folder.glob("mesh.db*"), control.errors]:
        content = path.read_bytes()
        assert secret not in content and token.encode() not in content


def test_other_kinds_of_keys_are_refused(control: ControlProcess) -> None:
    key = rsa.generate_private_key(65537, 2048)
    request, _ = make_request(key)  # type: ignore[arg-type]
    assert Member(control, "payments").join(csr=request)[0] == 400


def test_renewal_needs_the_certificate_and_a_new_key(control: ControlProcess, members: list[Member]) -> None:
    member = joined(members, control, "payments")
    before = serial_of(member)
    assert post(control, "/v1/renew", {"csr": make_request()[0]})[0] == 401
    key = _key_of(member)
    status, answer = member.renew(key)
    assert status == 400 and "new one" in answer["error"]
    status, answer = member.renew()
    assert status == 200 and serial_of(member) != before
    # The old one stays good until it ends: nothing that uses it fails.
    assert member.open().socket is not None


def _key_of(member: Member) -> Any:
    from cryptography.hazmat.primitives import serialization

    return serialization.load_pem_private_key(member.pair.read_bytes(), None)


def test_strangers_get_nothing(control: ControlProcess, tmp_path: Path) -> None:
    for path in ("/v1/crl", "/v1/stream?instance=x&version=0"):
        assert post(control, path, None, method="GET")[0] in (401, 404, 403)
    stranger = Authority("another").issue("spiffe://bank.test/service/payments").write(tmp_path, "stranger")
    pair = tmp_path / "stranger.pem"
    pair.write_bytes(stranger.pem + stranger.key_pem)
    with pytest.raises((ssl.SSLError, OSError, http.client.HTTPException)):
        post(control, "/v1/renew", {"csr": make_request()[0]}, pair)


def test_only_tls_1_3_is_spoken(control: ControlProcess) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", control.port), PATIENCE) as raw, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(raw)


def test_large_bodies_and_heads_are_cut_off(control: ControlProcess) -> None:
    assert post(control, "/v1/join", b"x" * 25_000)[0] == 413
    assert post(control, "/v1/join", b"[" * 20_000)[0] == 400
    with contextlib.suppress(OSError, http.client.HTTPException):  # refused before it is read: the client may hear so, or only that it is cut off
        assert post(control, "/v1/join", b"x" * 1_000_000)[0] == 413
    assert post(control, "/v1/join", b"[]")[0] == 400


def test_guessing_tokens_is_limited(control: ControlProcess) -> None:
    codes = [Member(control, "payments").join("guess")[0] for _ in range(60)]
    assert codes[0] == 403 and 429 in codes


def test_certificates_are_issued_at_a_limited_rate(tmp_path: Path) -> None:
    with ControlProcess(tmp_path, control="  requests: 2/h\n") as control:
        tokens = [control.token("payments").read_text() for _ in range(3)]
        codes = [Member(control, "payments", number).join(token)[0] for number, token in enumerate(tokens)]
        assert codes == [200, 200, 429]
        assert metric(control, 'crossway_control_requests_refused_total{reason="limit"}') == 1


def test_joining_by_a_certificate_of_the_banks_pki(tmp_path: Path) -> None:
    bank = Authority("bank")
    (tmp_path / "bank.pem").write_bytes(bank.pem)
    more = "  join: {ca: bank.pem, services: {payments: [\"*.payments.bank.internal\"]}}\n"
    with ControlProcess(tmp_path, control=more) as control:
        good = bank.issue("app1.payments.bank.internal")
        other = bank.issue("app1.ledger.bank.internal", number=1)
        for issued, service, expected in ((good, "payments", 200), (good, "ledger", 403), (other, "payments", 403), (None, "payments", 401)):
            pair = None
            if issued is not None:
                pair = tmp_path / "bank-client.pem"
                pair.write_bytes(issued.pem + issued.key_pem)
            said = {"service": service, "csr": make_request()[0], "instance": "app1", "inbound": "127.0.0.1:9001"}
            status, answer = post(control, "/v1/join", said, pair)
            assert status == expected, answer
        # It opens the door, and nothing else.
        pair = tmp_path / "bank-client.pem"
        pair.write_bytes(good.pem + good.key_pem)
        assert post(control, "/v1/renew", {"csr": make_request()[0]}, pair)[0] == 403


# -- streams


def test_an_assignment_holds_what_concerns_the_service(control: ControlProcess, members: list[Member]) -> None:
    ledger = joined(members, control, "ledger").open()
    payments = joined(members, control, "payments", 2).open()
    payments.has(lambda held: held["services"].get("ledger", {}).get("endpoints"), "ledger's endpoint")
    assert set(payments.held["services"]) == {"ledger"}
    assert payments.endpoints("ledger") == ["127.0.0.1:9001"]
    said = payments.held["services"]["ledger"]
    assert said["timeout"] == "2000ms" and said["retries"] == {"on": ["connect-failure"], "budget": 0.2}
    assert [rule["name"] for rule in payments.held["authorization"]["rules"]] == ["edge-to-payments"]
    assert payments.held["authorization"]["rules"][0]["from"] == ["edge"]
    assert payments.held["trust_domain"] == "bank.test" and payments.held["bundle"] == payments.bundle
    ledger.has(lambda held: held["authorization"]["rules"], "its rules")
    assert ledger.held["services"] == {}


def test_endpoints_come_and_go_as_deltas(control: ControlProcess, members: list[Member]) -> None:
    payments = joined(members, control, "payments").open()
    payments.has(lambda held: "ledger" in held["services"], "ledger")
    one = joined(members, control, "ledger", 2).open()
    two = joined(members, control, "ledger", 3).open()
    payments.has(lambda held: payments.endpoints("ledger") == ["127.0.0.1:9002", "127.0.0.1:9003"], "two endpoints")
    two.beat(healthy=False)
    payments.has(lambda held: payments.endpoints("ledger") == ["127.0.0.1:9002"], "one endpoint")
    two.beat(healthy=True)
    payments.has(lambda held: len(payments.endpoints("ledger")) == 2, "two endpoints again")
    one.beat(draining=True)
    payments.has(lambda held: payments.endpoints("ledger") == ["127.0.0.1:9003"], "the one that stays")
    kinds = [message["type"] for message in payments.messages]
    assert kinds[0] == "assignment" and "delta" in kinds
    versions = [message["version"] for message in payments.messages]
    assert versions == sorted(set(versions))


def test_an_instance_can_move(control: ControlProcess, members: list[Member]) -> None:
    payments = joined(members, control, "payments").open()
    ledger = joined(members, control, "ledger", 2).open()
    payments.has(lambda held: payments.endpoints("ledger") == ["127.0.0.1:9002"], "the endpoint")
    ledger.beat(inbound="127.0.0.1:9777", labels={"version": "2"}, zone="b")
    payments.has(lambda held: payments.endpoints("ledger") == ["127.0.0.1:9777"], "the endpoint's new place")
    assert payments.held["services"]["ledger"]["endpoints"][0] == {"address": "127.0.0.1:9777", "weight": 1, "zone": "b", "labels": {"version": "2"}}


def test_who_is_silent_is_out_of_the_registry(tmp_path: Path, members: list[Member]) -> None:
    with ControlProcess(tmp_path, control="  heartbeat: 2s\n") as control:
        payments, ledger = joined(members, control, "payments"), joined(members, control, "ledger", 2)
        payments.open()
        ledger.open()

        def there() -> bool:
            payments.beat()
            ledger.beat()
            return payments.endpoints("ledger") == ["127.0.0.1:9002"]

        def gone() -> bool:
            payments.beat()
            return payments.endpoints("ledger") == []

        eventually(there, "the endpoint")
        eventually(gone, "the end of the silent one")
        assert ledger.closed.wait(PATIENCE)


def test_members_that_nobody_heard_have_time_to_come_back(tmp_path: Path, members: list[Member]) -> None:
    """A machine that was paused, or moved: its members' silence is its own. None of them may be taken from its callers for that."""
    with ControlProcess(tmp_path, control="  heartbeat: 2s\n") as control:
        payments, ledger = joined(members, control, "payments", 1), joined(members, control, "ledger", 2)
        stopped, over = threading.Event(), threading.Event()

        def beat() -> None:
            while not over.wait(0.3):
                payments.beat()
                with contextlib.suppress(ConnectionClosed):
                    if not stopped.is_set():
                        ledger.beat()

        payments.open()
        ledger.open()
        beating = threading.Thread(target=beat, daemon=True)
        beating.start()
        payments.has(lambda held: payments.endpoints("ledger") == [ledger.inbound], "the endpoint")
        heard = len(payments.messages)
        control.process.send_signal(signal.SIGSTOP)
        stopped.set()
        threading.Thread(target=ledger.close, daemon=True).start()
        time.sleep(6)
        control.process.send_signal(signal.SIGCONT)
        eventually(lambda: control.logged("the control plane stood still; members have time to come back"), "the line in its log")
        time.sleep(3)  # longer than silence lasts otherwise
        again = Member(control, "ledger", 2)
        again.svid, again.bundle = ledger.svid, ledger.bundle
        members.append(again.open())
        eventually(lambda: [row["state"] for row in control.status()["instances"]] == ["healthy", "healthy"], "its return")
        over.set()
        beating.join(PATIENCE)
        empty = [message for message in payments.messages[heard:] if message.get("changes", message.get("assignment"))["services"].get("ledger", {}).get("endpoints") == []]
        assert empty == []


def test_a_refusal_is_shown_and_not_repeated(control: ControlProcess, members: list[Member]) -> None:
    member = joined(members, control, "payments").open()
    member.has(lambda held: held["version"], "an assignment")
    applied = member.held["version"]
    member.refuse = "no such protocol"
    control.edit("timeout: 2s", "timeout: 3s")
    eventually(lambda: len(member.messages) > 1, "the change")
    row = eventually(lambda: next((row for row in control.status()["instances"] if row["refused"]), None), "the refusal")
    assert row["reason"] == "no such protocol" and row["applied"] == applied and row["refused"] > applied
    shown = control.command("status")
    assert f"REFUSED {row['refused']}: no such protocol" in shown.stdout
    assert control.command("status", "--check").returncode == 1
    time.sleep(SOON)
    assert len(member.messages) == 2
    member.refuse = ""
    control.edit("timeout: 3s", "timeout: 4s")
    member.has(lambda held: held["services"]["ledger"]["timeout"] == "4000ms", "the next change")
    eventually(lambda: control.command("status", "--check").returncode == 0, "all well")


def test_a_member_that_comes_back_is_told_the_difference_only(control: ControlProcess, members: list[Member]) -> None:
    member = joined(members, control, "payments").open()
    member.has(lambda held: held["version"], "an assignment")
    version = member.held["version"]
    member.close()
    assert member.closed.wait(PATIENCE)
    control.edit("timeout: 2s", "timeout: 5s")
    eventually(lambda: control.logged("the mesh's file is in force"), "the reload")
    member.open(version)
    member.has(lambda held: held["services"]["ledger"]["timeout"] == "5000ms", "the change")
    member.close()
    assert member.closed.wait(PATIENCE)
    member.messages.clear()
    member.open(member.held["version"])
    eventually(lambda: member.instance in [row["instance"] for row in control.status()["instances"] if row["state"] == "healthy"], "its return")
    time.sleep(SOON)
    assert member.messages == []


def test_what_a_member_brings_with_it_needs_no_other_acknowledgement(control: ControlProcess, members: list[Member]) -> None:
    first = joined(members, control, "payments").open()
    first.has(lambda held: held["version"], "an assignment")
    second = joined(members, control, "payments", 2).open(first.held["version"])  # its own word was lost with the connection before

    def applied() -> object:
        return next(row["applied"] for row in control.status()["instances"] if row["instance"] == second.instance)

    eventually(lambda: applied() == first.held["version"], "the version that it said")
    assert second.messages == []


def test_a_broken_file_changes_nothing_and_says_where(control: ControlProcess, members: list[Member]) -> None:
    member = joined(members, control, "payments").open()
    member.has(lambda held: held["version"], "an assignment")
    control.edit("from: [payments]", "from: [paiments]")
    line = eventually(lambda: control.logged("the mesh's file is refused, the old one goes on"), "the refusal")[0]
    assert "unknown service 'paiments'" in line["problems"][0]["message"] and line["problems"][0]["line"] > 1
    eventually(lambda: metric(control, "crossway_control_file_valid") == 0, "the metric")
    assert "file_error" in json.loads(control.page("/status")[1])
    control.edit("from: [paiments]", "from: [payments, accounts]")
    eventually(lambda: control.logged("the mesh's file is in force"), "the repair")
    ledger = joined(members, control, "ledger", 2).open()
    ledger.has(lambda held: held["authorization"]["rules"][0]["from"] == ["payments", "accounts"], "the rule")
    assert ledger.held["authorization"]["version"] == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"type": 3}', '{"type": "heartbeat"}', '{"type": "heartbeat", "healthy": true, "draining": false, "inbound": "x"}'])
def test_what_is_no_message_ends_the_stream(control: ControlProcess, members: list[Member], text: str) -> None:
    member = joined(members, control, "payments").open()
    member.has(lambda held: held["version"], "an assignment")
    member.socket.send(text)
    if text != '{"type": 3}':
        assert member.closed.wait(PATIENCE)
    else:  # of a later version of the protocol
        time.sleep(SOON)
        assert not member.closed.is_set()


def test_an_instance_that_changes_its_mind_all_the_time_is_ended(control: ControlProcess, members: list[Member]) -> None:
    member = joined(members, control, "ledger").open()
    member.has(lambda held: held["version"], "an assignment")
    with contextlib.suppress(ConnectionClosed):
        for number in range(100):
            member.beat(healthy=number % 2 == 0)
    assert member.closed.wait(PATIENCE)


def test_connections_without_a_request_are_ended(control: ControlProcess) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", control.port), PATIENCE) as raw, context.wrap_socket(raw) as secure:
        assert secure.recv(1) == b""


def test_a_second_stream_of_an_instance_replaces_the_first(control: ControlProcess, members: list[Member]) -> None:
    member = joined(members, control, "payments").open()
    first = member.closed
    member.has(lambda held: held["version"], "an assignment")
    again = Member(control, "payments")
    again.svid, again.bundle = member.svid, member.bundle
    members.append(again.open())
    assert first.wait(PATIENCE)
    again.has(lambda held: held["version"], "an assignment")


def raw_stream(control: ControlProcess, member: Member, *, instance: str = "", version: int = 0) -> ssl.SSLSocket:
    """A member's stream by hand; what answers the handshake has been read, and says whether it is one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(member.pair)
    secure = context.wrap_socket(socket.create_connection(("127.0.0.1", control.port), PATIENCE))
    head = f"GET /v1/stream?instance={instance or member.instance}&version={version} HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
    secure.sendall(head.encode() + b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n")
    answer = b""
    while not answer.endswith(b"\r\n\r\n") and (byte := secure.recv(1)):
        answer += byte
    if b" 101 " not in answer:
        secure.close()
        raise PermissionError(answer.partition(b"\r\n")[0].decode())
    return secure


def frame(code: int, data: bytes, final: bool = True) -> bytes:
    """A masked frame of at most 125 bytes."""
    return bytes(((0x80 if final else 0) | code, 0x80 | len(data))) + bytes(4) + data


BEAT = frame(1, b'{"type":"heartbeat","healthy":true,"draining":false}')


def resident(control: ControlProcess) -> int:
    """MiB of memory that the process has."""
    text = Path(f"/proc/{control.process.pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) >> 10


def test_one_instance_does_not_speak_for_another(control: ControlProcess, members: list[Member]) -> None:
    """Each of a service's instances has the same identity; its certificate says which of them it is."""
    victim, other = joined(members, control, "ledger", 1).open(), joined(members, control, "ledger", 2)
    victim.has(lambda held: held["version"], "an assignment")
    with pytest.raises(PermissionError, match="403"):
        raw_stream(control, other, instance=victim.instance)
    refused = eventually(lambda: control.logged("a stream is refused"), "the reason")
    assert "issued to the instance ledger-2" in refused[0]["reason"]
    assert not victim.closed.is_set()


def test_a_certificate_is_one_instance_at_a_time(control: ControlProcess, members: list[Member]) -> None:
    """Names could be invented without end otherwise, and each would be remembered for days."""
    member = joined(members, control, "ledger", 1)
    for number in range(5):
        raw_stream(control, member, instance=f"renamed-{number}").close()
        eventually(lambda: [row["state"] for row in control.status()["instances"]] in (["gone"], ["unhealthy"]), "one instance")
        control.kill()  # of a control plane that is gone nobody is there
        with contextlib.closing(sqlite3.connect(control.folder / "mesh.db")) as state:
            assert [row[0] for row in state.execute("SELECT instance FROM instances")] == [f"renamed-{number}"]
            state.execute("UPDATE instances SET connected = 0")
            state.commit()
        control.start()


def test_a_version_that_nobody_drew_costs_the_others_nothing(control: ControlProcess, members: list[Member]) -> None:
    quiet, loud = joined(members, control, "ledger", 1).open(), joined(members, control, "ledger", 2)
    quiet.has(lambda held: held["version"], "an assignment")
    for _ in range(10):
        raw_stream(control, loud, version=1 << 53).close()
    payments = joined(members, control, "payments", 1).open()
    payments.has(lambda held: held["version"], "an assignment")
    assert payments.held["version"] <= quiet.held["version"] + 2, "no versions were drawn for it"
    assert len(quiet.messages) == 1
    loud.open(version=1 << 53)
    loud.has(lambda held: held["version"] < 100, "the whole assignment, as it is")


def test_a_state_that_has_lost_its_last_versions_keeps_nothing_from_members(control: ControlProcess, members: list[Member]) -> None:
    """A database may come back a moment older than it was; a version that was used must not be used again for something else."""
    payments = joined(members, control, "payments", 1).open()
    payments.has(lambda held: held["version"], "an assignment")
    for number in (2, 3, 4):
        joined(members, control, "ledger", number).open()
        payments.has(lambda held, n=number: len(payments.endpoints("ledger")) == n - 1, "the endpoints")
        with contextlib.closing(sqlite3.connect(control.folder / "mesh.db", timeout=PATIENCE)) as state:
            state.execute("UPDATE counters SET value = 0 WHERE name = 'version'")
            state.commit()
    versions = [message["version"] for message in payments.messages]
    assert versions == sorted(set(versions))


def test_a_member_that_reads_nothing_costs_no_memory(control: ControlProcess, members: list[Member]) -> None:
    member = joined(members, control, "payments")
    secure = raw_stream(control, member)
    before, pings = resident(control), frame(9, b"x" * 125) * 1000
    for _ in range(400):
        secure.sendall(pings)
    secure.sendall(BEAT)
    eventually(lambda: [row["state"] for row in control.status()["instances"]] == ["healthy"], "all of it read")
    assert resident(control) < before + 24
    secure.close()


def test_a_message_has_not_any_number_of_fragments(control: ControlProcess, members: list[Member]) -> None:
    secure = raw_stream(control, joined(members, control, "payments"))
    with contextlib.suppress(OSError):
        secure.sendall(frame(1, b"{", False) + frame(0, b"", False) * 1000)
    with contextlib.suppress(ConnectionResetError, ssl.SSLError):
        while secure.recv(4096):
            pass
    secure.close()
    assert not control.logged("a member is silent"), "it ended for that"


# -- revocation


def test_a_revoked_service_is_cut_and_gets_no_certificate(control: ControlProcess, members: list[Member]) -> None:
    payments = joined(members, control, "payments").open()
    ledger = joined(members, control, "ledger", 2).open()
    payments.has(lambda held: payments.endpoints("ledger"), "the endpoint")
    done = control.command("revoke", "ledger", "--reason", "stolen laptop")
    assert done.returncode == 0, done.stderr
    assert ledger.closed.wait(PATIENCE)
    payments.has(lambda held: held["revoked"]["identities"] == ["spiffe://bank.test/service/ledger"], "the deny list")
    payments.has(lambda held: payments.endpoints("ledger") == [], "no endpoint")
    assert ledger.renew()[0] == 403
    with pytest.raises((InvalidStatus, OSError)):
        ledger.open()
    assert Member(control, "ledger", 3).join()[0] == 403
    status, crl = post(control, "/v1/crl", None, payments.pair, "GET")
    assert status == 200
    listed = {f"{each.serial_number:x}" for each in x509.load_pem_x509_crl(crl["text"].encode())}
    assert listed == {serial_of(ledger)}
    assert "stolen laptop" in control.command("status").stdout
    assert control.command("can", "payments", "ledger").returncode == 1
    assert control.command("revoke", "ledger", "--undo").returncode == 0
    payments.has(lambda held: held["revoked"]["identities"] == [], "the empty deny list")
    assert ledger.renew()[0] == 200


def test_one_certificate_can_be_revoked(control: ControlProcess, members: list[Member]) -> None:
    one, two = joined(members, control, "ledger", 1).open(), joined(members, control, "ledger", 2).open()
    payments = joined(members, control, "payments", 3).open()
    payments.has(lambda held: len(payments.endpoints("ledger")) == 2, "two endpoints")
    assert control.command("revoke", serial_of(one)).returncode == 0
    assert one.closed.wait(PATIENCE)
    payments.has(lambda held: held["revoked"]["serials"] == [serial_of(one)], "the deny list")
    payments.has(lambda held: payments.endpoints("ledger") == [two.inbound], "the other one")
    assert not two.closed.is_set() and one.renew()[0] == 403
    assert control.command("revoke", "no-such").returncode == 2


def test_a_stolen_key_does_not_outlive_its_revocation_by_renewing(control: ControlProcess, members: list[Member]) -> None:
    """Whoever has the key of one certificate may have renewed before anybody noticed: its serial shuts out what came of it too."""
    owner, other = joined(members, control, "ledger", 1), joined(members, control, "ledger", 2).open()
    stolen, thief = serial_of(owner), Member(control, "ledger", 1)
    thief.pair = control.folder / "stolen.pem"
    thief.pair.write_bytes(owner.pair.read_bytes())
    assert thief.renew()[0] == 200 and thief.renew()[0] == 200
    owner.renew()
    thief.open()
    done = control.command("revoke", stolen)
    assert done.returncode == 0 and "3 others of its instance" in done.stdout
    assert thief.closed.wait(PATIENCE)
    other.has(lambda held: {stolen, serial_of(thief), serial_of(owner)} <= set(held["revoked"]["serials"]), "the deny list")
    assert thief.renew()[0] == 403 and owner.renew()[0] == 403 and other.renew()[0] == 200
    assert owner.join()[0] == 200 and owner.renew()[0] == 200, "who joins anew is in again, under the same name"
    assert control.command("revoke", stolen, "--undo").returncode == 0
    other.has(lambda held: held["revoked"]["serials"] == [], "the empty deny list")
    assert thief.renew()[0] == 200


# -- the root


def test_the_root_changes_without_a_restart(control: ControlProcess, members: list[Member]) -> None:
    member = joined(members, control, "payments").open()
    member.has(lambda held: held["version"], "an assignment")
    old_bundle, early = member.bundle, control.token("ledger").read_text()
    assert control.command("rotate-root", "activate").returncode == 1
    assert control.command("rotate-root", "prepare").returncode == 0
    member.has(lambda held: held["bundle"].count("BEGIN CERTIFICATE") == 2, "both roots")
    eventually(lambda: control.command("status", "--check").returncode == 0, "the acknowledgement")
    assert control.command("rotate-root", "activate").returncode == 0
    eventually(lambda: control.logged("the authority has changed")[-1:] and control.logged("the authority has changed")[-1]["generation"] == 2, "the new one")
    # Somebody who was away knows the old root only, and still finds the control plane and believes what it says.
    away = joined(members, control, "payments", 2)
    away.bundle = old_bundle
    away.open().has(lambda held: held["bundle"].count("BEGIN CERTIFICATE") == 2, "both roots")
    late = Member(control, "ledger", 3)
    assert late.join(early)[0] == 200  # a token from before names the old root
    assert "cannot" not in control.command("rotate-root", "show").stdout
    refused = control.command("rotate-root", "retire")
    assert refused.returncode == 1 and "not over yet" in refused.stderr
    assert member.renew()[0] == 200
    member.close()
    member.open(member.held["version"])  # members use a new certificate at once
    assert control.command("rotate-root", "retire").returncode == 0
    member.has(lambda held: held["bundle"].count("BEGIN CERTIFICATE") == 1 and held["bundle"] != old_bundle, "the new root alone")
    assert away.renew()[0] == 200
    assert control.process.poll() is None


def test_the_roots_key_can_be_away(tmp_path: Path, members: list[Member]) -> None:
    with ControlProcess(tmp_path) as control:
        key = tmp_path / "vault.key"
        (tmp_path / "ca/1/root.key").rename(key)
        joined(members, control, "payments")
        assert control.command("rotate-root", "issuing").returncode == 1
        assert control.command("rotate-root", "issuing", "--root-key", str(key)).returncode == 0
        eventually(lambda: control.logged("the authority has changed"), "the new issuing certificate")
        joined(members, control, "payments", 2).open().has(lambda held: held["version"], "an assignment")
        assert control.stop() == 0
    with ControlProcess(tmp_path) as control:
        assert control.logged("the control plane is ready to serve")[0]["root_offline"] is True


# -- its own life


def test_a_restart_takes_no_endpoint_away(tmp_path: Path, members: list[Member]) -> None:
    with ControlProcess(tmp_path) as control:
        payments = joined(members, control, "payments").open()
        ledger = joined(members, control, "ledger", 2).open()
        payments.has(lambda held: payments.endpoints("ledger") == ["127.0.0.1:9002"], "the endpoint")
        policy = payments.held["authorization"]["version"]
    assert payments.closed.wait(PATIENCE) and ledger.closed.wait(PATIENCE)
    with ControlProcess(tmp_path) as control:
        payments.control = ledger.control = control
        before = len(payments.messages)
        payments.open(payments.held["version"])
        ledger_again = ledger.open(ledger.held["version"])
        eventually(lambda: len([row for row in control.status()["instances"] if row["state"] == "healthy"]) == 2, "both")
        assert payments.endpoints("ledger") == ["127.0.0.1:9002"]
        told = [message for message in payments.messages[before:] if "services" in message.get("changes", {}) or "assignment" in message]
        assert all((message.get("assignment") or message["changes"])["services"]["ledger"]["endpoints"] for message in told)
        assert payments.held["authorization"]["version"] == policy
        assert ledger_again.renew()[0] == 200


def test_it_ends_in_good_order(control: ControlProcess, members: list[Member]) -> None:
    member = joined(members, control, "payments").open()
    member.has(lambda held: held["version"], "an assignment")
    assert control.stop() == 0
    assert member.closed.wait(PATIENCE)
    assert member.socket.close_code in (1001, 1012)


def test_what_was_made_for_streams_long_gone_is_made_anew(control: ControlProcess, members: list[Member]) -> None:
    payments = joined(members, control, "payments").open()
    payments.has(lambda held: held["version"], "an assignment")
    payments.close()
    assert payments.closed.wait(PATIENCE)
    ledger = joined(members, control, "ledger", 2).open()
    ledger.has(lambda held: held["version"], "an assignment")
    eventually(lambda: metric(control, 'crossway_control_instances{service="ledger",state="healthy"}') == 1, "the instance")
    payments.messages.clear()
    payments.open(payments.held["version"])
    payments.has(lambda held: payments.endpoints("ledger") == ["127.0.0.1:9002"], "the endpoint")
    eventually(lambda: payments.messages, "the message that brought it")
    assert "127.0.0.1:9002" in json.dumps(payments.messages[0])  # at once, not after what was


def test_pages_for_the_admin(control: ControlProcess, members: list[Member]) -> None:
    member = joined(members, control, "payments").open()
    member.has(lambda held: held["version"], "an assignment")
    assert control.page("/livez")[0] == 200 and control.page("/readyz")[0] == 200
    eventually(lambda: metric(control, 'crossway_control_instances{service="payments",state="healthy"}') == 1, "the instance")
    assert metric(control, "crossway_control_streams ") == 1
    assert metric(control, 'crossway_control_certificates_issued_total{how="token",service="payments"}') == 1
    assert metric(control, 'crossway_control_answers_total{answer="ack"}') >= 1
    assert json.loads(control.page("/status")[1])["instances"][0]["service"] == "payments"
    assert control.page("/crl")[1].startswith("-----BEGIN X509 CRL-----")


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (("version: 1", "version: 2"), 2, "mesh.yaml:1:"),
        (("state: mesh.db", "state: nowhere/mesh.db"), 1, "nowhere/mesh.db"),
        (("bind: 127.0.0.1:0", "bind: 192.0.2.1:9700"), 1, "192.0.2.1:9700"),
        (("state: mesh.db", "state: postgresql://somebody:hunter2@127.0.0.1:1/mesh"), 1, "127.0.0.1:1/mesh"),
    ],
)
def test_what_stops_it_from_starting_is_said(tmp_path: Path, change: tuple[str, str], code: int, said: str) -> None:
    from tests.integration.control_kit import FILE

    path = tmp_path / "mesh.yaml"
    path.write_text(FILE.format(state="mesh.db", lifetime="1h", control="").replace(*change))
    import subprocess
    import sys

    from tests.integration.processes import environment

    done = subprocess.run(
        [sys.executable, "-m", "gateway", "mesh", "control", "-c", str(path)], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr and "hunter2" not in done.stderr
