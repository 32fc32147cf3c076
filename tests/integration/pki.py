"""Certificates for tests: an authority, an intermediate, and whatever they sign, valid or not.

Strategy: made by `cryptography`, which is built on another OpenSSL than ours; keys are made once per process, since they cost
the time and their identity does not matter.
"""

from __future__ import annotations

import datetime
import functools
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)
Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@functools.cache
def make_key(kind: str, number: int = 0) -> Key:
    return rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP256R1())


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def general_name(text: str) -> x509.GeneralName:
    if "://" in text:
        return x509.UniformResourceIdentifier(text)
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


@dataclass(frozen=True)
class Issued:
    """A certificate with its key, and the chain up to (without) the root."""

    certificate: x509.Certificate
    key: Key
    chain: tuple[x509.Certificate, ...] = ()

    @property
    def pem(self) -> bytes:
        return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in (self.certificate, *self.chain))

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def write(self, folder: Path, name: str) -> Self:
        """Write NAME.crt (with the chain) and NAME.key."""
        (folder / f"{name}.crt").write_bytes(self.pem)
        (folder / f"{name}.key").write_bytes(self.key_pem)
        return self


class Authority:
    """Signs certificates and lists of revoked ones."""

    def __init__(self, name: str, parent: Authority | None = None, *, number: int = 0) -> None:
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.key = make_key("ec", number + 100)
        self.parent = parent
        signer = parent or self
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(signer.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() - 30 * DAY)
            .not_valid_after(now() + 365 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(signer.key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def chain(self) -> tuple[x509.Certificate, ...]:
        """What has to travel with a certificate of this authority: the intermediates."""
        return () if self.parent is None else (self.certificate, *self.parent.chain)

    def issue(
        self,
        *names: str,
        subject: str = "",
        kind: str = "ec",
        number: int = 0,
        begin: datetime.timedelta = -DAY,
        end: datetime.timedelta = 90 * DAY,
        usage: Sequence[x509.ObjectIdentifier] = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH),
        raw_names: Sequence[x509.GeneralName] = (),
    ) -> Issued:
        """A certificate for DNS names, addresses and URIs; the first is its common name too, unless `subject` says another."""
        key = make_key(kind, number)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject or names[0])]))
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() + begin)
            .not_valid_after(now() + end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(list(usage)), critical=False)
        )
        alternatives = [*map(general_name, names), *raw_names]
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return Issued(builder.sign(self.key, hashes.SHA256()), key, self.chain)

    def revocations(self, *revoked: Issued, begin: datetime.timedelta = -DAY, end: datetime.timedelta = 30 * DAY) -> bytes:
        """A revocation list, PEM."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.name).last_update(now() + begin).next_update(now() + end)
        for each in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(each.certificate.serial_number).revocation_date(now() - DAY)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def staple(self, issued: Issued, *, begin: datetime.timedelta = -DAY, end: datetime.timedelta = 7 * DAY) -> bytes:
        """An OCSP response that calls a certificate good, DER."""
        builder = (
            ocsp.OCSPResponseBuilder()
            .add_response(
                issued.certificate, self.certificate, hashes.SHA1(), ocsp.OCSPCertStatus.GOOD, now() + begin, now() + end, None, None
            )
            .responder_id(ocsp.OCSPResponderEncoding.HASH, self.certificate)
        )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
