"""The control plane and who means it ill, or has bad luck: requests that no member sends, members that want too much, files and states that fail."""

from __future__ import annotations

import base64
import contextlib
import datetime
import shutil
import socket
import sqlite3
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from websockets.exceptions import InvalidStatus

from tests.integration.control_kit import ControlProcess, Member, make_request, post, serial_of
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


def resident(control: ControlProcess) -> int:
    """MiB of memory that the process has."""
    text = Path(f"/proc/{control.process.pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) >> 10


NESTED = base64.urlsafe_b64encode(b"[" * 3000).decode()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (f'{{"instance": "a", "token": "{NESTED}"}}'.encode(), 403),
        (b'{"instance": "a", "token": "\\ud800"}', 403),
        (b'{"instance": "a", "token": "x", "time": 1' + b"0" * 400 + b"}", 403),
        (b'{"instance": "a", "token": "x", "time": ' + b"9" * 5000 + b"}", 400),
        (b"[" * 20_000, 400),
    ],
    ids=["nested token", "half a character", "a time beyond floats", "a number beyond bounds", "nested body"],
)
def test_what_no_member_sends_is_a_mistake_of_whoever_sends_it(control: ControlProcess, body: bytes, status: int) -> None:
    assert post(control, "/v1/join", body)[0] == status
    assert "Traceback" not in control.errors.read_text()


@pytest.mark.parametrize("rest", [b"GET /y HTTP/1.1\r\nho", b"\r\n", b"abc"], ids=["half a head", "an empty line", "a bit of its body"])
@pytest.mark.parametrize("where", ["control", "probes"])
def test_a_stranger_keeps_no_connection(tmp_path: Path, where: str, rest: bytes) -> None:
    """Those to the control plane are counted: who could keep them all would let nobody in, and nobody see that it lives."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with ControlProcess(tmp_path, control="  probes: 127.0.0.1:0\n") as control, contextlib.ExitStack() as stack:
        port = int(control.addresses[where].rpartition(":")[2])
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
        if where == "control":
            client = stack.enter_context(context.wrap_socket(client))
        client.sendall(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n\r\n" if rest == b"abc" else b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 4")
        with contextlib.suppress(ConnectionError):
            client.sendall(rest)
            while client.recv(4096):
                pass


def test_a_stranger_writes_no_error_into_the_log(control: ControlProcess) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", control.port), PATIENCE) as raw, context.wrap_socket(raw) as client:
        words = b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        client.sendall(b"GET /v1/stream?instance=a HTTP/1.1\r\nhost: x\r\n" + words)
        assert client.recv(4096).startswith(b"HTTP/1.1 401")
        while client.recv(4096):
            pass
    assert control.stop() == 0
    assert control.logged("a stream is refused") and '"level":"error"' not in control.errors.read_text()


def test_an_instance_has_not_any_number_of_certificates(control: ControlProcess, members: list[Member]) -> None:
    """All of them are on the deny list when it is revoked, and every member has to be told that."""
    greedy, other = joined(members, control, "payments"), joined(members, control, "payments", 2)
    answers = [greedy.renew() for _ in range(40)]
    assert [status for status, _ in answers[:10]] == [200] * 10, "who fails and tries again is served"
    assert answers[-1][0] == 429 and "too many certificates" in answers[-1][1]["error"]
    assert other.renew()[0] == 200
    assert control.command("revoke", serial_of(greedy)).returncode == 0
    other.open().has(lambda held: 10 < len(held["revoked"]["serials"]) < 40, "a short deny list")


def test_a_stolen_key_does_not_outlive_its_revocation_when_the_state_was_lost_before(control: ControlProcess, members: list[Member]) -> None:
    """Nobody knows whose the certificate was: what is renewed by it belongs to it all the same."""
    owner = joined(members, control, "ledger")
    stolen, thief = serial_of(owner), Member(control, "ledger", 2)
    thief.pair.write_bytes(owner.pair.read_bytes())
    control.stop()
    for path in control.folder.glob("mesh.db*"):
        path.unlink()
    control.start()
    assert thief.renew()[0] == 200 and thief.renew()[0] == 200
    thief.bundle = owner.bundle
    members.append(thief.open())
    assert "2 others of its instance" in control.command("revoke", stolen).stdout
    assert thief.closed.wait(PATIENCE)
    assert thief.renew()[0] == 403 and owner.renew()[0] == 403


def test_a_certificate_is_not_any_number_of_instances(control: ControlProcess, members: list[Member]) -> None:
    """One that nobody wrote down, as all are with SPIRE, may be of several; each is a row that is read at every change."""
    member, other = joined(members, control, "ledger"), joined(members, control, "payments", 2)
    control.stop()
    for path in control.folder.glob("mesh.db*"):
        path.unlink()
    control.start()
    opened = 0
    with pytest.raises(InvalidStatus) as refused:
        for opened in range(200):
            member.instance = f"ledger-{opened}"
            member.open().close()
    assert opened == 64 and refused.value.response.status_code == 403
    member.instance = "ledger-5"
    member.open()
    other.open().has(lambda held: held["version"], "what others are told")


def test_networks_that_a_member_invents_cost_no_memory(tmp_path: Path, members: list[Member]) -> None:
    many = "".join(f"  s{number}: {{timeout: 2s, retries: {{on: [connect-failure], budget: 20%}}}}\n" for number in range(2000))
    with ControlProcess(tmp_path) as control:
        control.edit("  accounts: {}\n", f"  accounts: {{}}\n{many}")
        control.edit("default: deny", "default: audit")
        member = joined(members, control, "payments").open()
        member.has(lambda held: len(held["services"]) > 2000, "all services")
        before = 0
        for number in range(25):
            member.beat(inbound=member.inbound, labels={"network": f"n{number}"}, zone=None)
            assert member.closed.wait(PATIENCE)
            member.open().has(lambda held: len(held["services"]) > 2000, "all services")
            before = before or resident(control)
        assert resident(control) < before + 30


def test_nobody_joins_as_an_instance_that_is_there(control: ControlProcess, members: list[Member]) -> None:
    """A token lets one more instance in. Under another's name that would be the other: its address, whether it drains, its stream."""
    ledger, payments = joined(members, control, "ledger").open(), joined(members, control, "payments", 2).open()
    payments.has(lambda held: payments.endpoints("ledger") == [ledger.inbound], "the ledger")
    other = Member(control, "ledger")
    other.pair = control.folder / "other.pem"
    token = control.token("ledger").read_text()
    status, answer = other.join(token, inbound="127.0.0.1:1")
    assert status == 409 and "is there" in answer["error"]
    joined(members, control, "accounts", 3).open()  # everybody is told something after that
    assert payments.endpoints("ledger") == [ledger.inbound] and not ledger.closed.is_set()
    other.instance = "ledger-7"
    assert other.join(token)[0] == 200, "the token is good for a name of its own"
    ledger.beat(draining=True)
    ledger.close()

    def back() -> bool:
        return ledger.join()[0] == 200

    eventually(back, "who is gone joins under his name again")


# -- bad luck with files and the state


def test_a_file_that_is_still_being_written_is_not_taken(control: ControlProcess) -> None:
    """Half of it may be a whole mesh, with fewer rules, or with nobody revoked."""
    text = control.path.read_text()
    half = text[: text.index("    - {name: payments-to-ledger")]

    def write() -> float:
        """Write half of the file in its place, then something every now and then, then the whole; return the longest pause."""
        longest, last = 0.0, time.monotonic()
        with control.path.open("w") as file:
            for piece in [half, *["# not yet\n"] * 60, text[len(half) :]]:
                file.write(piece)
                file.flush()
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
                time.sleep(0.02)
        return longest

    def rules() -> list[int]:
        """How many rules each file had that was taken."""
        return [each["rules"] for each in control.logged("the mesh's file is in force")]

    while True:
        before = len(rules())
        smooth = write() < 0.15
        eventually(lambda before=before: rules()[before:][-1:] == [2], "the file")  # type: ignore[misc]
        if smooth:
            break
    assert rules()[before:] == [2]


@pytest.mark.timeout(120)
def test_a_change_of_the_file_is_not_lost_while_the_state_is_away(control: ControlProcess, members: list[Member]) -> None:
    member = joined(members, control, "payments").open()
    member.has(lambda held: "ledger" in held["services"], "what it may call")
    other = sqlite3.connect(control.folder / "mesh.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        control.edit("to: ledger}", "to: accounts}")
        eventually(lambda: control.logged("the state or the authority cannot be used; streams go on"), "the error")
    finally:
        other.execute("ROLLBACK")
        other.close()
    member.has(lambda held: [*held["services"]] == ["accounts"] and held["authorization"]["version"] == 2, "the new rules, and their number")


def test_an_issuing_certificate_whose_key_comes_late_is_taken(control: ControlProcess, members: list[Member]) -> None:
    """The command writes two files; a slow disk, or a folder that is copied, may have one of them for a while."""
    member = joined(members, control, "payments")
    copy = control.folder / "copy"
    shutil.copytree(control.folder / "ca", copy)
    assert control.command("rotate-root", "issuing").returncode == 0
    for name in ("issuing.crt", "issuing.key"):
        (control.folder / "ca/1" / name).replace(copy / "1" / f"{name}.new")
        shutil.copy2(copy / "1" / name, control.folder / "ca/1" / name)
    control.stop()
    control.start()
    for name in ("issuing.crt", "issuing.key"):
        seen = len(control.logged("the authority has changed"))
        (copy / "1" / f"{name}.new").replace(control.folder / "ca/1" / name)
        eventually(lambda seen=seen: len(control.logged("the authority has changed")) > seen, name)  # type: ignore[misc]
    assert member.renew()[0] == 200
    fresh = x509.load_pem_x509_certificate((control.folder / "ca/1/issuing.crt").read_bytes())
    member.leaf.verify_directly_issued_by(fresh)


def test_an_authority_that_cannot_be_read_stops_nothing_else(control: ControlProcess, members: list[Member]) -> None:
    member, other = joined(members, control, "payments").open(), joined(members, control, "ledger", 2).open()
    member.has(lambda held: member.endpoints("ledger"), "the ledger")
    root = control.folder / "ca/1/root.crt"
    good, wrong = root.read_bytes(), (control.folder / "wrong.crt")
    _, key = make_request()
    builder = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(x509.Name([])).public_key(key.public_key())
    now = datetime.datetime.now(datetime.UTC)
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    wrong.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    wrong.replace(root)
    eventually(lambda: control.logged("the state or the authority cannot be used; streams go on"), "the error")
    assert control.command("revoke", "ledger").returncode == 0
    assert other.closed.wait(PATIENCE)
    member.has(lambda held: held["revoked"]["identities"] == ["spiffe://bank.test/service/ledger"], "the deny list")
    wrong.write_bytes(good)
    wrong.replace(root)
    eventually(lambda: control.logged("the state and the authority can be used again"), "the end of the error")
    assert len(control.logged("the state or the authority cannot be used; streams go on")) == 1, "told once"
