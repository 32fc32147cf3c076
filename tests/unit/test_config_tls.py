"""TLS in the configuration: what is accepted, what is an error at its place, what is a warning."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from gateway._speedups.certificates import TlsError, parse_certificates, parse_key, parse_revocations
from gateway.config import load
from gateway.config.check_tls import file_versions
from gateway.config.unusable import unreadable
from gateway.errors import Problem
from gateway.server.tickets import interval
from gateway.server.watch import REMIND, Watch
from tests.integration.pki import DAY, Authority, Issued, make_key
from tests.unit.checked import problems

ROOT = Path(__file__).parents[2]
LISTENER = "certificates: [{cert: bank.crt, key: bank.key}]"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("Root", number=90)


@pytest.fixture
def folder(tmp_path: Path, authority: Authority) -> Path:
    for name in ("bank", "edge"):
        authority.issue(f"{name}.test").write(tmp_path, name)
    for name in ("tpp-ca", "internal-ca", "ca"):
        (tmp_path / f"{name}.crt").write_bytes(authority.pem)
    (tmp_path / "ca.crl").write_bytes(authority.revocations())
    return tmp_path


def write(folder: Path, listener: str = LISTENER, upstream: str = "") -> Path:
    path = folder / "edge.yaml"
    path.write_text(
        "version: 1\nworkers: 1\nlisteners:\n  public:\n    bind: 127.0.0.1:8443\n"
        f"    tls: {{{listener}}}\nupstreams:\n  origin: {{targets: [127.0.0.1:9001]{upstream}}}\n"
        "routes:\n  - {name: all, match: {prefix: /}, upstream: origin}\n"
    )
    return path


def only(path: Path, severity: str, message: str) -> Problem:
    found = problems(path)
    assert [problem.severity for problem in found] == [severity], [problem.render() for problem in found]
    assert message in found[0].message, found[0].render()
    return found[0]


# -- the contract


def test_the_contract_file_is_good(folder: Path) -> None:
    shutil.copy(ROOT / "tests/data/contract/tls.yaml", folder)
    assert problems(folder / "tls.yaml") == []
    config = load(folder / "tls.yaml")
    assert config.listeners["public"].tls is not None
    assert [each.owner for each in config.certificates] == ["listener public", "upstream payments"]
    assert set(config.watched) == {str(folder / name) for name in ("bank.crt", "bank.key", "tpp-ca.crt", "internal-ca.crt", "edge.crt", "edge.key")}


def test_defaults(folder: Path) -> None:
    tls = load(write(folder, upstream=", tls: true")).listeners["public"].tls
    assert tls is not None
    assert (tls.min_version, tls.client_auth, tls.alpn, tls.handshake, tls.ktls) == ("1.2", "off", ("h2", "http/1.1"), 10, False)
    assert tls.tickets.enabled and tls.tickets.rotate == 8 * 3600
    upstream = load(write(folder, upstream=", tls: true")).upstreams["origin"].tls
    assert upstream is not None
    assert (upstream.ca, upstream.insecure, upstream.min_version) == (None, False, "1.2")
    assert load(write(folder, upstream=", tls: false")).upstreams["origin"].tls is None
    assert load(write(folder, upstream=", tls: {ca: system}")).upstreams["origin"].tls == upstream


def test_a_version_without_quotes(folder: Path) -> None:
    tls = load(write(folder, LISTENER + ", min_version: 1.3")).listeners["public"].tls
    assert tls is not None and tls.min_version == "1.3"


# -- errors


@pytest.mark.parametrize(
    ("listener", "message"),
    [
        ("client_auth: required, " + LISTENER, "client certificates without a `client_ca`"),
        ("client_ca: ca.crt, " + LISTENER, "`client_ca` without `client_auth` is never used"),
        ("crl: ca.crl, " + LISTENER, "`crl` without `client_auth` is never used"),
        ("forward_client_certificate: true, " + LISTENER, "nothing to forward"),
        ("min_version: 1.1, " + LISTENER, "min_version"),
        ("alpn: [], " + LISTENER, "alpn"),
        ("alpn: [h3], " + LISTENER, "alpn"),
        ("certificates: []", "certificates"),
        ("certificates: [{cert: bank.crt}]", "key"),
        ("certificates: [{cert: missing.crt, key: bank.key}]", "cannot read the certificate: No such file"),
        ("certificates: [{cert: bank.crt, key: missing.key}]", "cannot read the key: No such file"),
        ("certificates: [{cert: bank.key, key: bank.key}]", "the certificate cannot be used: no certificate in it"),
        ("certificates: [{cert: bank.crt, key: bank.crt}]", "the key cannot be used: no private key in it"),
        ("certificates: [{cert: bank.crt, key: other.key}]", "this key does not belong to the certificate"),
        ("certificates: [{cert: bank.crt, key: locked.key}]", "the key is encrypted"),
        ("certificates: [{cert: bank.crt, key: bank.key, ocsp: bank.crt}]", "not an OCSP response"),
        ("certificates: [{cert: bank.crt, key: bank.key, ocsp: edge.ocsp}]", "about another certificate"),
        ("client_auth: optional, client_ca: missing.crt, " + LISTENER, "cannot read the certificates of authorities"),
        ("client_auth: optional, client_ca: ca.crt, crl: ca.crt, " + LISTENER, "no revocation list in it"),
        ("handshakes: 0, " + LISTENER, "handshakes"),
    ],
)
def test_a_listener_that_cannot_work(folder: Path, authority: Authority, listener: str, message: str) -> None:
    (folder / "other.key").write_bytes(Issued(authority.certificate, make_key("ec", 91)).key_pem)
    (folder / "locked.key").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
    (folder / "edge.ocsp").write_bytes(authority.staple(authority.issue("edge.test")))
    found = [problem for problem in problems(write(folder, listener)) if problem.severity == "error"]
    assert found and message in found[0].message, [problem.render() for problem in found]
    assert found[0].line == 6


@pytest.mark.parametrize(
    ("upstream", "message"),
    [
        (", tls: {ca: missing.crt}", "cannot read the certificates of authorities"),
        (", tls: {ca: bank.key}", "no certificate in it"),
        (", tls: {certificate: {cert: edge.crt, key: bank.key}}", "does not belong"),
        (", tls: {server_name: '*.bank.test'}", "expected a host name"),
        (", tls: {insecure: true, ca: ca.crt}", "`insecure` verifies nothing"),
        (", tls: {insecure: true, sans: x}", "`insecure` verifies nothing"),
    ],
)
def test_an_upstream_that_cannot_work(folder: Path, authority: Authority, upstream: str, message: str) -> None:
    authority.issue("edge.test", number=92).write(folder, "edge")
    only(write(folder, upstream=upstream), "error", message)


def test_without_authorities_on_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "none.pem"))
    only(write(folder, upstream=", tls: true"), "error", "this machine has no certificates of authorities")


def test_a_weak_key_is_an_error(folder: Path, authority: Authority) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    weak = authority.issue("weak.test")
    key = rsa.generate_private_key(65537, 1024)
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    builder = x509.CertificateBuilder(
        weak.certificate.issuer, weak.certificate.subject, key.public_key(), weak.certificate.serial_number,
        weak.certificate.not_valid_before_utc, weak.certificate.not_valid_after_utc,
        [x509.Extension(x509.SubjectAlternativeName.oid, False, x509.SubjectAlternativeName([x509.DNSName("weak.test")]))],
    )  # fmt: skip
    Issued(builder.sign(authority.key, hashes.SHA256()), key).write(folder, "bank")
    found = problems(write(folder))
    assert any(problem.severity == "error" and "too small" in problem.message for problem in found), found


# -- warnings


def test_insecure_is_a_warning(folder: Path) -> None:
    only(write(folder, upstream=", tls: {insecure: true}"), "warning", "is not verified")


@pytest.mark.parametrize(
    ("begin", "end", "message"),
    [(-9, -1, "expired on"), (-9, 5, "expires soon"), (1, 90, "not valid before")],
)
def test_dates_are_warnings(folder: Path, authority: Authority, begin: int, end: int, message: str) -> None:
    authority.issue("bank.test", begin=begin * DAY, end=end * DAY).write(folder, "bank")
    only(write(folder), "warning", message)


def test_a_list_out_of_date_is_a_warning(folder: Path, authority: Authority) -> None:
    (folder / "ca.crl").write_bytes(authority.revocations(begin=-9 * DAY, end=-DAY))
    only(write(folder, "client_auth: required, client_ca: ca.crt, crl: ca.crl, " + LISTENER), "warning", "is out of date")


def test_a_staple_out_of_date_is_a_warning(folder: Path, authority: Authority) -> None:
    issued = authority.issue("bank.test").write(folder, "bank")
    (folder / "bank.ocsp").write_bytes(authority.staple(issued, begin=-9 * DAY, end=-DAY))
    only(write(folder, "certificates: [{cert: bank.crt, key: bank.key, ocsp: bank.ocsp}]"), "warning", "is out of date")


def test_a_chain_out_of_order_is_a_warning(folder: Path, authority: Authority) -> None:
    stranger, upper = Authority("Stranger", number=93), Authority("Upper", number=94)
    own = (folder / "bank.crt").read_bytes()
    (folder / "bank.crt").write_bytes(own + stranger.pem)
    only(write(folder), "warning", "the chain is broken: CN=Root should follow CN=bank.test, and CN=Stranger does")
    lower = Authority("Lower", upper, number=95)
    lower.issue("bank.test").write(folder, "bank")
    own = lower.issue("bank.test").certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "bank.crt").write_bytes(own + upper.pem + lower.pem)
    only(write(folder), "warning", "the chain is out of order: CN=Lower should follow CN=bank.test, and CN=Upper does")


def test_a_chain_that_begins_with_the_authority_is_told_by_whose_key_it_is(folder: Path) -> None:
    """The one mistake, and not also a key that is not the certificate's, or the authority's lack of names."""
    lower = Authority("Lower", Authority("Upper", number=94), number=95)
    own = lower.issue("bank.test").write(folder, "bank").certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "bank.crt").write_bytes(lower.pem + own)
    found = only(write(folder), "error", "the chain is out of order: CN=bank.test, whose key this is, is certificate 2 of 2 in it")
    assert "put it first" in found.hint and str(folder / "bank.crt") in found.hint


def test_an_authority_without_a_list_is_a_warning(folder: Path, authority: Authority) -> None:
    """With a `crl` nobody gets in by an authority of which it has no list: this is silent until the first client comes."""
    other = Authority("Other", number=93)
    (folder / "ca.crl").write_bytes(other.revocations())
    listener = "client_auth: required, client_ca: ca.crt, crl: ca.crl, " + LISTENER
    found = only(write(folder, listener), "warning", "no list of CN=Root is in it; there are: CN=Other")
    assert "no certificate that leads to it is accepted" in found.hint
    only(write(folder, upstream=", tls: {ca: ca.crt, crl: ca.crl}"), "warning", "no list of CN=Root")
    (folder / "ca.crl").write_bytes(other.revocations() + authority.revocations())
    assert problems(write(folder, listener)) == []


def test_certificates_of_the_same_names_and_kind_of_key_are_a_warning(folder: Path, authority: Authority) -> None:
    authority.issue("bank.test", kind="rsa").write(folder, "rsa")
    authority.issue("bank.test", number=96).write(folder, "next")
    pair = "{{cert: {0}.crt, key: {0}.key}}".format
    assert problems(write(folder, f"certificates: [{pair('bank')}, {pair('rsa')}, {pair('edge')}]")) == []
    only(write(folder, f"certificates: [{pair('bank')}, {pair('rsa')}, {pair('next')}]"), "warning", "the same names and kind of key as certificates[0]")


@pytest.mark.parametrize(
    ("content", "where", "hint"),
    [
        ("crt", "key", "it holds a certificate: are `cert` and `key` exchanged?"), ("key", "cert", "it holds a private key: are `cert` and `key` exchanged?"),
        ("der", "cert", "openssl x509 -inform der -in"), ("der", "key", "openssl pkey -inform der -in"), ("der", "crl", "openssl crl -inform der -in"),
        ("locked", "key", "openssl pkey -in"), ("empty", "cert", "the file is empty"), ("folder", "cert", "this is a folder, name the file in it"),
        ("missing", "key", "put it there"), ("crl", "client_ca", "it holds a revocation list"), ("key", "client_ca", "it holds a private key"), ("noise", "cert", "the file is"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_says_what_to_do_about_it(folder: Path, authority: Authority, content: str, where: str, hint: str) -> None:
    issued = authority.issue("bank.test")
    made = {
        "crt": issued.pem, "key": issued.key_pem, "der": issued.certificate.public_bytes(serialization.Encoding.DER), "empty": b"\n", "noise": b"hello",
        "crl": authority.revocations(), "locked": b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
    }  # fmt: skip
    if content == "folder":
        (folder / "it").mkdir()
    elif content != "missing":
        (folder / "it").write_bytes(made[content])
    files = {"cert": "bank.crt", "key": "bank.key", "client_ca": "ca.crt", "crl": "ca.crl", where: "it"}
    text = "client_auth: required, client_ca: {client_ca}, crl: {crl}, certificates: [{{cert: {cert}, key: {key}}}]"
    found = only(write(folder, text.format(**files)), "error", "cannot")
    assert hint in found.hint and str(folder / "it") in found.hint


def test_a_file_that_this_user_may_not_read_names_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    assert unreadable(PermissionError(13, "Permission denied"), "/etc/bank.key") == "let the user 4000000 read it, as whom this runs: /etc/bank.key"


def test_no_name_and_no_authority_are_warnings(folder: Path, authority: Authority) -> None:
    authority.issue(subject="nameless").write(folder, "bank")
    only(write(folder), "warning", "no subjectAltName")
    authority.issue("bank.test").write(folder, "bank")
    leaf = "client_auth: required, client_ca: bank.crt, " + LISTENER
    only(write(folder, leaf), "warning", "no authority's certificate")


# -- the digest, the keys, the watch


def test_the_digest_covers_every_file_and_holds_no_key(folder: Path, authority: Authority) -> None:
    path = write(folder)
    before = load(path)
    assert load(path).digest == before.digest
    key = (folder / "bank.key").read_bytes()
    assert key not in before.document.files.values()
    authority.issue("bank.test", number=94).write(folder, "bank")
    assert load(path).digest != before.digest


def test_key_material_is_in_no_message(folder: Path) -> None:
    secret = (folder / "bank.key").read_text().splitlines()[1]
    (folder / "bank.key").write_text(f"-----BEGIN PRIVATE KEY-----\n{secret[:-4]}\n-----END PRIVATE KEY-----\n")
    found = problems(write(folder))
    assert found and not any(secret[:12] in problem.render() for problem in found)


def test_parsing_refuses_what_is_broken(authority: Authority) -> None:
    broken = authority.pem.replace(b"M", b"N", 3)
    for parse in (parse_certificates, parse_key, parse_revocations):
        for content in (b"", b"\0" * 100, broken, authority.pem[:-40], b"x" * (2 << 20)):
            with pytest.raises(TlsError):
                parse(content)
    with pytest.raises(TlsError):
        parse_certificates(authority.pem + broken)


def test_the_fastest_rotation_counts(folder: Path) -> None:
    assert interval(load(write(folder))) == 8 * 3600
    assert interval(load(write(folder, LISTENER + ", tickets: {rotate: 10m}"))) == 600
    assert interval(load(write(folder, LISTENER + ", tickets: {enabled: false, rotate: 10m}"))) == 8 * 3600


def test_the_watch_asks_once_the_files_rest(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path in paths:
        Path(path).write_text("one")
    asked: list[int] = []
    loaded = file_versions(paths)
    watch = Watch(dict, lambda: asked.append(1))
    watch.compare(loaded, file_versions(paths))
    watch.compare(loaded, file_versions(paths))
    assert not asked
    Path(paths[0]).write_text("three")
    watch.compare(loaded, file_versions(paths))
    assert not asked  # it may not be all
    Path(paths[1]).unlink()
    watch.compare(loaded, file_versions(paths))
    assert not asked
    watch.compare(loaded, file_versions(paths))
    watch.compare(loaded, file_versions(paths))
    assert asked == [1]  # once, whatever came of it
    os.symlink(paths[0], paths[1])
    watch.compare(loaded, file_versions(paths))
    watch.compare(loaded, file_versions(paths))
    assert asked == [1, 1]


def test_reminders_come_once_a_day(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(dict, lambda: None)
    each = {"owner": "listener public", "file": "x", "subject": "CN=x", "not_after": 10 * 86400}
    with caplog.at_level("WARNING", "crossway"):
        for now in (0.0, 10.0, REMIND - 1, REMIND, REMIND + 5, 11 * 86400.0):
            watch.remind([each], now + 86400)
    assert [record.message for record in caplog.records] == ["a certificate expires soon"] * 2 + ["a certificate has expired"]
