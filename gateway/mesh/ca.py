"""The mesh's certificate authority: a folder of generations, each a root and an issuing certificate below it.

Strategy: the root's key is needed to make an issuing certificate and for nothing else, so it can be taken away. Every generation's root is in the
bundle; one generation is active and issues. A new root is also signed by the old one (cross certificate), so that whoever has only the
old bundle still believes it while both overlap. Whatever is asked for by a request, only its public key is taken from it.

    ca/active               the number of the generation that issues
    ca/1/root.crt  root.key  issuing.crt  issuing.key  [cross.crt]
    ca/retired-1/           what is no longer in the bundle
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway.mesh.keys import CaError, Key, Keys, key_pem
from gateway.mesh.spiffe import authority_id, control_id, service_id

DAY = 86400
ROOT_LIFE, ISSUING_LIFE = 3650 * DAY, 365 * DAY  # seconds
SKEW = 300  # seconds that a member's certificate begins in the past, and at most a tenth of its life: clocks differ (Kubernetes and Kerberos: 5 min)
# The same of authorities and the control plane's own: whoever's clock is wrong by hours still hears what is revoked, and that his clock is wrong.
CONTROL_SKEW = DAY
MOST_REQUEST = 16 << 10  # bytes of a certificate request
PEM = serialization.Encoding.PEM


class BadRequest(CaError):
    """A certificate request that gets no certificate."""


@dataclass(frozen=True)
class Issued:
    """A certificate as it goes out, with what the registry keeps of it."""

    chain: str  # PEM: leaf, issuing, cross
    serial: str  # hexadecimal, small, without leading zeros
    not_before: int
    not_after: int
    generation: int


@dataclass(frozen=True)
class Generation:
    """A root and what it has signed."""

    number: int
    root: x509.Certificate
    issuing: x509.Certificate
    key: Key
    cross: x509.Certificate | None
    offline: bool  # the root's key is not here

    @property
    def above(self) -> tuple[x509.Certificate, ...]:
        """What travels with a leaf."""
        return (self.issuing, *([self.cross] if self.cross else []))


class Ca:
    """The authority of one trust domain in `folder`. Raises CaError when the folder cannot be used."""

    def __init__(self, folder: Path, domain: str, keys: Keys | None = None) -> None:
        self.folder = folder
        self.keys = keys or Keys()
        self.domain = domain
        self.generations: dict[int, Generation] = {}
        self.active_number = 0

    # -- the folder

    def open(self, *, make: bool = True) -> Ca:
        """Read the folder, and make it the first time."""
        if make:
            _make_folder(self.folder)
            with self._locked():
                if not (self.folder / "active").exists():
                    self._make(1, None, None)
                    _write(self.folder / "active", b"1\n")
        self.load()
        return self

    def load(self) -> None:
        """Read what is there now."""
        try:
            if self.folder.stat().st_mode & 0o077:
                raise CaError(f"{self.folder}: others may enter it; chmod 0700 {self.folder}")
            number = int((self.folder / "active").read_text())
            found = {int(each.name): self._read(each) for each in self.folder.iterdir() if each.name.isdecimal()}
        except FileNotFoundError:
            raise CaError(f"{self.folder}: there is no authority; `crossway mesh control` makes it at its first start") from None
        except OSError as error:
            raise CaError(f"{error.filename}: {error.strerror}") from None
        except (ValueError, TypeError, x509.ExtensionNotFound) as error:  # TypeError: a key with a password
            raise CaError(f"{self.folder}: {error}") from None
        if number not in found:
            raise CaError(f"{self.folder}: generation {number} is active and not there")
        self.generations, self.active_number = dict(sorted(found.items())), number

    def fingerprint(self) -> str:
        """What changes when the folder's content does."""
        names = ("root.crt", "issuing.crt", "issuing.key", "cross.crt")  # the key's file is written last, and is the one that is read
        files = [self.folder / "active", *(each / name for each in sorted(self.folder.glob("[0-9]*")) for name in names)]
        seen = [(str(each), stat.st_mtime_ns, stat.st_ino) for each in files if (stat := _stat(each)) is not None]
        return hashlib.sha256(repr(seen).encode()).hexdigest()

    external = False  # whether another authority issues

    @property
    def root_offline(self) -> bool:
        return self.active.offline

    def ends(self) -> Iterator[tuple[int, str, float]]:
        """Yield (generation, which certificate, when it ends)."""
        for number, each in self.generations.items():
            yield number, "root", each.root.not_valid_after_utc.timestamp()
            yield number, "issuing", each.issuing.not_valid_after_utc.timestamp()

    async def follow(self) -> None:
        """Nothing comes by itself: the folder is looked at."""

    @property
    def active(self) -> Generation:
        return self.generations[self.active_number]

    @property
    def bundle(self) -> str:
        """The roots that members trust, PEM."""
        return "".join(_pem(each.root) for each in self.generations.values())

    @property
    def root_digest(self) -> str:
        """SHA-256 of the active root's DER: what a token pins."""
        return self.active.root.fingerprint(hashes.SHA256()).hex()

    # -- issuing

    def issue(self, request: str, service: str, lifetime: float, *, held: bytes | None = None) -> Issued:
        """Return a member's certificate. Raises BadRequest; `held` is the DER of the certificate that is renewed, whose key is spent."""
        public = read_request(request)
        if held is not None and _spki(public) == _spki(x509.load_der_x509_certificate(held).public_key()):
            raise BadRequest("the request repeats the key of the certificate that is renewed: make a new one")
        leaf = self._leaf(public, service_id(self.domain, service), lifetime)
        return Issued(
            "".join(map(_pem, (leaf, *self.active.above))), f"{leaf.serial_number:x}", _unix(leaf.not_valid_before_utc),
            _unix(leaf.not_valid_after_utc), self.active_number,
        )  # fmt: skip

    def control_pair(self, lifetime: float) -> tuple[Key, list[x509.Certificate]]:
        """Return a fresh key of the control plane's own and its chain: leaf, issuing, cross."""
        key = ec.generate_private_key(ec.SECP256R1())
        return key, [self._leaf(key.public_key(), control_id(self.domain), lifetime, CONTROL_SKEW), *self.active.above]

    def server_pem(self, lifetime: float) -> tuple[bytes, int]:
        """Return (chain and key, PEM; when it ends) for TLS: every root is in the chain, since whoever joins looks for the one he knows."""
        key, chain = self.control_pair(lifetime)
        roots = [self.active.root, *(each.root for number, each in self.generations.items() if number != self.active_number)]
        return "".join(map(_pem, (*chain, *roots))).encode() + key_pem(key), _unix(chain[0].not_valid_after_utc)

    def revocations(self, serials: Iterable[tuple[str, int]], life: float) -> str:
        """Return the CRL of the active generation, PEM, for (serial, unix time of revocation)."""
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateRevocationListBuilder().issuer_name(self.active.issuing.subject)
            .last_update(now - datetime.timedelta(seconds=SKEW)).next_update(now + datetime.timedelta(seconds=life))
            .add_extension(x509.CRLNumber(time.time_ns() // 1_000_000), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.active.key.public_key()), critical=False)
        )  # fmt: skip
        for serial, when in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(datetime.datetime.fromtimestamp(when, datetime.UTC))
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self.active.key, hashes.SHA256()).public_bytes(PEM).decode("ascii")

    def _leaf(self, public: ec.EllipticCurvePublicKey, identity: str, lifetime: float, skew: float = SKEW) -> x509.Certificate:
        by = self.active
        now = time.time()
        end = min(now + lifetime, by.issuing.not_valid_after_utc.timestamp())
        if end - now < 1:
            raise CaError("the issuing certificate has expired: `crossway mesh rotate-root issuing` makes a new one")
        return (
            _builder(x509.Name([]), by.issuing.subject, public, now - min(skew, lifetime / 10), end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(True, False, False, False, False, False, False, False, False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key()), critical=False)
            .sign(by.key, hashes.SHA256())
        )

    # -- rotation

    def prepare(self, root_key: Path | None = None) -> int:
        """Make the next generation and put its root into the bundle; it does not issue yet. Returns its number."""
        with self._locked():
            self.load()
            if max(self.generations) != self.active_number:
                raise CaError(f"generation {max(self.generations)} is prepared already: activate it")
            number = self.active_number + 1
            self._make(number, self.active, self._root_key(self.active, root_key))
        self.load()
        return number

    def activate(self) -> int:
        """Let the newest generation issue. Returns its number."""
        with self._locked():
            self.load()
            number = max(self.generations)
            if number == self.active_number:
                raise CaError("no generation is prepared")
            _write(self.folder / "active", f"{number}\n".encode())
        self.load()
        return number

    def retire(self) -> int:
        """Take the oldest generation's root out of the bundle. Returns its number."""
        with self._locked():
            self.load()
            number = min(self.generations)
            if number == self.active_number:
                raise CaError("the only generation that issues cannot be retired: prepare and activate another")
            os.rename(self.folder / str(number), self.folder / f"retired-{number}")
            (self.folder / str(self.active_number) / "cross.crt").unlink(missing_ok=True)
        self.load()
        return number

    def renew_issuing(self, root_key: Path | None = None) -> None:
        """Make a new issuing certificate below the active root, whose key has to be there."""
        with self._locked():
            self.load()
            by = self.active
            key = self._root_key(by, root_key)
            if key is None:
                raise CaError(f"{self.folder}/{by.number}/root.key is not there: name it with --root-key")
            self._make_issuing(self.folder / str(by.number), by.root, key)
        self.load()

    def issuing_left(self) -> float:
        """The part of the issuing certificate's life that is left."""
        begin, end = self.active.issuing.not_valid_before_utc.timestamp(), self.active.issuing.not_valid_after_utc.timestamp()
        return (end - time.time()) / (end - begin)

    def _root_key(self, of: Generation, path: Path | None) -> Key | None:
        named, path = path is not None, path or self.folder / str(of.number) / "root.key"
        if not path.exists():
            if named:
                raise CaError(f"{path}: there is no such file")
            return None
        key = self.keys.read(path)
        if _spki(key.public_key()) != _spki(of.root.public_key()):
            raise CaError(f"{path}: not the key of generation {of.number}'s root")
        return key

    def _make(self, number: int, before: Generation | None, before_key: Key | None) -> None:
        """Make a generation in a folder that appears as a whole."""
        fresh = self.folder / f".new-{number}"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        key, content = self.keys.make("root")
        name = _name(self.domain, f"root {number}")
        root = _authority(name, name, key.public_key(), key, self.domain, ROOT_LIFE, None)
        _write(fresh / "root.key", content)
        _write(fresh / "root.crt", _pem(root).encode())
        if before is not None and before_key is not None:
            life = before.root.not_valid_after_utc.timestamp() - time.time()
            cross = _authority(name, before.root.subject, key.public_key(), before_key, self.domain, life, 1)
            _write(fresh / "cross.crt", _pem(cross).encode())
        self._make_issuing(fresh, root, key)
        os.rename(fresh, self.folder / str(number))

    def _make_issuing(self, folder: Path, root: x509.Certificate, root_key: Key) -> None:
        """Key and certificate are one file, so that one rename changes both."""
        key, content = self.keys.make("issuing")
        name = _name(self.domain, f"issuing {time.time_ns() // 1_000_000_000:x}")
        life = min(ISSUING_LIFE, root.not_valid_after_utc.timestamp() - time.time())
        issuing = _authority(name, root.subject, key.public_key(), root_key, self.domain, life, 0)
        _write(folder / "issuing.crt", _pem(issuing).encode())
        _write(folder / "issuing.key", _pem(issuing).encode() + content)

    def _read(self, folder: Path) -> Generation:
        issuing = x509.load_pem_x509_certificate((folder / "issuing.key").read_bytes())
        cross = folder / "cross.crt"
        found = Generation(
            int(folder.name), x509.load_pem_x509_certificate((folder / "root.crt").read_bytes()), issuing, self.keys.read(folder / "issuing.key"),
            x509.load_pem_x509_certificate(cross.read_bytes()) if cross.exists() else None, not (folder / "root.key").exists(),
        )  # fmt: skip
        uris = found.root.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.UniformResourceIdentifier)
        if uris != [authority_id(self.domain)]:
            raise CaError(f"{folder}: the authority is that of {uris}, the file says {self.domain}")
        if _spki(found.key.public_key()) != _spki(issuing.public_key()):
            raise CaError(f"{folder}: the key is not the issuing certificate's")
        try:
            found.issuing.verify_directly_issued_by(found.root)
        except (ValueError, InvalidSignature):
            raise CaError(f"{folder}: the issuing certificate is not the root's") from None
        return found

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time: several control planes may have one folder."""
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def read_request(text: str) -> ec.EllipticCurvePublicKey:
    """Return the public key of a certificate request, which has to prove that its sender holds the private one. Raises BadRequest."""
    if len(text) > MOST_REQUEST:
        raise BadRequest("the certificate request is too long")
    try:
        request = x509.load_pem_x509_csr(text.encode("ascii"))
        public = request.public_key()
        good = request.is_signature_valid
    except Exception:  # noqa: BLE001 - whatever a parser makes of foreign bytes, it is no request
        raise BadRequest("the certificate request cannot be read: PEM of a PKCS #10 request is expected") from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise BadRequest("the certificate request is for another kind of key than ECDSA P-256")
    if not good:
        raise BadRequest("the certificate request's signature is wrong")
    return public


def _authority(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, signer: Key, domain: str, life: float, below: int | None
) -> x509.Certificate:
    now = time.time()
    return (
        _builder(subject, issuer, public, now - CONTROL_SKEW, now + life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=below), critical=True)
        .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(authority_id(domain))]), critical=False)
        .sign(signer, hashes.SHA256())
    )


def _builder(subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, begin: float, end: float) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public).serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime.fromtimestamp(int(begin), datetime.UTC))
        .not_valid_after(datetime.datetime.fromtimestamp(int(end), datetime.UTC))
    )  # fmt: skip


def _name(domain: str, what: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, domain[:64]), x509.NameAttribute(NameOID.COMMON_NAME, what)])


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(PEM).decode("ascii")


def _spki(public: object) -> bytes:
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _unix(when: datetime.datetime) -> int:
    return int(when.timestamp())


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise CaError(f"control.ca: {folder}: this is a file: name a folder, which is made when it is not there") from None
    except OSError as error:
        raise CaError(f"control.ca: {folder}: {error.strerror}") from None


def _write(path: Path, content: bytes) -> None:
    """Put a file in place as a whole, 0600, on the disk before it is there."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(fresh, path)
