"""The certificates of the benchmark: an authority, and one certificate for each kind of key, all made anew for an invocation.

Strategy: they live in its temporary directory and are good for a day; nothing secret is committed. Both certificates are signed by
the same P-256 authority, so that what differs between two scenarios is the server's own key.
"""

import datetime
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

KINDS = ("rsa", "p256")
NAME = "origin.test"  # beside 127.0.0.1: HAProxy compares names only
# The first is what configurations ask for; BoringSSL (Envoy) has no such setting and takes what the client names first.
SUITES = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384")
DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Certificates:
    """Where the files are: `authority`, and of each kind KIND.crt, KIND.key and KIND.pem (both)."""

    directory: Path

    @property
    def authority(self) -> Path:
        """Whom the clients believe."""
        return self.directory / "authority.crt"

    def values(self, kind: str) -> dict[str, Path]:
        """Return what stands for the names in a configuration."""
        return {
            "AUTHORITY": self.authority,
            "CERTIFICATE": self.directory / f"{kind}.crt",
            "KEY": self.directory / f"{kind}.key",
            "BOTH": self.directory / f"{kind}.pem",
        }

    def client(self) -> ssl.SSLContext:
        """Return a client that believes the authority and nobody else."""
        return ssl.create_default_context(cafile=str(self.authority))


def make_certificates(directory: Path) -> Certificates:
    """Write everything and return where it is."""
    made = Certificates(directory)
    signer = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Benchmark authority")])
    root = _builder(issuer, issuer, signer.public_key()).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    made.authority.write_bytes(root.sign(signer, SHA256()).public_bytes(Encoding.PEM))
    for kind in KINDS:
        key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Benchmark {kind}")])
        names = x509.SubjectAlternativeName([x509.DNSName(NAME), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        leaf = _builder(subject, issuer, key.public_key()).add_extension(names, critical=False).sign(signer, SHA256())
        files = made.values(kind)
        files["CERTIFICATE"].write_bytes(leaf.public_bytes(Encoding.PEM))
        files["KEY"].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        files["BOTH"].write_bytes(files["CERTIFICATE"].read_bytes() + files["KEY"].read_bytes())
    return made


def _builder(subject: x509.Name, issuer: x509.Name, key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(now - DAY).not_valid_after(now + DAY)
