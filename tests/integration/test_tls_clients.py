"""Client certificates: who is let in, and what policies, audit records and the upstream learn of it."""

from __future__ import annotations

import base64
import hashlib
import json
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.integration.faults import Cut, get
from tests.integration.processes import eventually
from tests.integration.vault import TlsStream, Vault

V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
BAD = ["expired", "early", "revoked", "stranger", "server"]


def ask(vault: Vault, listener: str, request: bytes, show: str | None, version: ssl.TLSVersion = V13) -> bytes:
    """The answer's body. A refused certificate is an error of the handshake, or, in TLS 1.3, of the first read."""
    with vault.connect(listener, show=show, version=version) as stream:
        answer = stream.ask(request)
        assert answer.status == 200
        return answer.body


@pytest.mark.parametrize("version", [V12, V13])
@pytest.mark.parametrize("listener", ["mutual", "asking"])
def test_a_valid_certificate_is_let_in(vault: Vault, listener: str, version: ssl.TLSVersion) -> None:
    said = json.loads(ask(vault, listener, get("/who"), "good", version))
    issued = vault.shown["good"].certificate
    assert said["subject"] == "CN=TPP Ürich\\, Ltd"
    assert said["issuer"] == "CN=Clients Issuing"
    assert int(said["serial"], 16) == issued.serial_number
    assert said["dns"] == ["tpp.test"]
    assert said["uris"] == ["spiffe://bank.test/ns/pay/sa/tpp"]
    digest = hashlib.sha256(issued.public_bytes(Encoding.DER)).digest()
    assert said["thumbprint"] == base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    chain = x509.load_pem_x509_certificates(said["pem"].encode())
    assert chain == [issued, vault.clients.certificate]


@pytest.mark.parametrize("version", [V12, V13])
@pytest.mark.parametrize("show", [*BAD[:2], *BAD[3:]])
@pytest.mark.parametrize("listener", ["mutual", "asking"])
def test_an_invalid_one_is_not(vault: Vault, listener: str, show: str, version: ssl.TLSVersion) -> None:
    before = vault.counter('tls_handshake_failures_total{cause="failed"}')
    with pytest.raises((ssl.SSLError, Cut, ConnectionError)):
        ask(vault, listener, get("/who"), show, version)
    eventually(lambda: vault.counter('tls_handshake_failures_total{cause="failed"}') == before + 1, "the count")


@pytest.mark.parametrize("version", [V12, V13])
def test_a_revoked_one_is_not_where_there_is_a_list(vault: Vault, version: ssl.TLSVersion) -> None:
    with pytest.raises((ssl.SSLError, Cut, ConnectionError)):
        ask(vault, "mutual", get("/who"), "revoked", version)
    assert json.loads(ask(vault, "asking", get("/who"), "revoked", version))["subject"] == "CN=tpp.test"


@pytest.mark.parametrize("version", [V12, V13])
def test_none_at_all(vault: Vault, version: ssl.TLSVersion) -> None:
    with pytest.raises((ssl.SSLError, Cut, ConnectionError)):
        ask(vault, "mutual", get("/who"), None, version)
    assert json.loads(ask(vault, "asking", get("/who"), None, version)) is None


def test_a_listener_that_does_not_ask_learns_nothing(vault: Vault) -> None:
    assert json.loads(ask(vault, "public", get("/who"), "good")) is None


def test_openssl_s_client_shows_its_certificate(vault: Vault) -> None:
    files = ["-cert", str(vault.folder / "good.crt"), "-key", str(vault.folder / "good.key"), "-cert_chain", str(vault.folder / "good.crt")]
    request = "GET /x?body=let-in HTTP/1.1\r\nhost: bank.test\r\nconnection: close\r\n\r\n"
    assert "let-in" in vault.openssl("-ign_eof", *files, name="mutual", said=request)


def test_the_upstream_is_told_as_in_rfc_9440(vault: Vault) -> None:
    fields = told(ask(vault, "mutual", get("/x"), "good"))
    leaf = vault.shown["good"].certificate.public_bytes(Encoding.DER)
    issuer = vault.clients.certificate.public_bytes(Encoding.DER)
    assert fields["client-cert"] == [f":{base64.b64encode(leaf).decode()}:"]
    assert fields["client-cert-chain"] == [f":{base64.b64encode(issuer).decode()}:"]


SPOOFED = ["Client-Cert: :AAAA:", "client_cert: :AAAA:", "CLIENT-CERT-CHAIN: :AAAA:", "client.cert_chain: :AAAA:", "X-Client-Cert: x"]


@pytest.mark.parametrize(("listener", "show"), [("mutual", "good"), ("asking", None), ("asking", "good"), ("public", None)])
def test_nobody_else_can_tell_it(vault: Vault, listener: str, show: str | None) -> None:
    fields = told(ask(vault, listener, get("/x", *SPOOFED), show))
    assert ":AAAA:" not in str(fields)
    assert ("client-cert" in fields) == (listener == "mutual")
    assert not [name for name in fields if "client" in name and name not in ("client-cert", "client-cert-chain")]


def test_the_audit_record_names_it(vault: Vault) -> None:
    ask(vault, "mutual", get("/x?audit-of=mutual"), "good")
    ask(vault, "asking", get("/y-without"), None)

    def records() -> dict[str, dict[str, str]]:
        lines = (vault.folder / "audit.jsonl").read_text().splitlines(keepends=True)
        return {record["path"]: record for record in (json.loads(line) for line in lines if line.endswith("\n"))}

    eventually(lambda: {"/x", "/y-without"} <= records().keys(), "the records")
    found = records()
    assert found["/x"]["certificate"] == "CN=TPP Ürich\\, Ltd"
    assert len(found["/x"]["thumbprint"]) == 43
    assert "certificate" not in found["/y-without"]


def test_one_certificate_per_connection_over_many_requests(vault: Vault) -> None:
    with vault.connect("mutual", show="good") as stream:
        for _ in range(5):
            assert json.loads(stream.ask(get("/who")).body)["dns"] == ["tpp.test"]


def test_names_with_a_nul_are_no_names(vault: Vault) -> None:
    """CVE-2026-47778: the C world would read the first half."""
    name = x509.OtherName(x509.ObjectIdentifier("1.2.3"), b"\x05\x00")
    evil = vault.clients.issue(subject="evil", number=20, raw_names=[name, raw_dns(b"bank.test\0.evil.test")]).write(vault.folder, "nul")
    assert evil
    with pytest.raises((ssl.SSLError, Cut, ConnectionError)):
        ask(vault, "asking", get("/who"), "nul")


def raw_dns(value: bytes) -> x509.GeneralName:
    made = x509.DNSName("placeholder")
    made._value = value.decode("ascii")
    return made


def told(body: bytes) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in json.loads(body)["fields"]:
        found.setdefault(name.lower(), []).append(value)
    return found


def test_a_chain_that_is_too_long_is_refused(vault: Vault) -> None:
    from tests.integration.pki import Authority

    above = vault.clients
    for depth in range(12):
        above = Authority(f"Depth {depth}", above, number=30 + depth)
    above.issue("deep.test", number=50).write(vault.folder, "deep")
    with pytest.raises((ssl.SSLError, Cut, ConnectionError)):
        ask(vault, "asking", get("/who"), "deep")
    assert isinstance(vault.connect("asking"), TlsStream)
