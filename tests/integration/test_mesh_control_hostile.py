"""The control plane and who means it ill, or has bad luck: requests that no member sends, members that want too much, files and states that fail."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.control_kit import ControlProcess, Member, post, serial_of
from tests.integration.processes import PATIENCE


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
