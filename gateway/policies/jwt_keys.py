"""Verification keys: JWK sets parsed strictly, each key bound to the algorithms it may be used with.

Strategy: what a key may verify is decided when it is loaded, from the key's own `alg` or from its type and the configured
list, never from a token (RFC 8725 3.1). A key that must not be used is left out with a note; a document that is no key set
raises KeysError, and the caller keeps the set it has. A KeySet is immutable and carries a generation number. Keys are not
secret, but their text is never put into a message.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import Algorithm, get_default_algorithms
from jwt.exceptions import PyJWTError

from gateway.policies.jwt_json import StrictError, decode_base64url, parse_object

MAX_DOCUMENT = 1 << 20          # bytes of a JWK set
MAX_KEYS = 256                  # in one set; large issuers publish fewer than 20
MAX_WITHOUT_KID = 4             # keys tried for a token that names none: bounds the work per token
MIN_RSA_BITS = 2048             # RFC 7518 3.3
MAX_RSA_BITS = 8192             # a verification of 16,384 bits costs milliseconds
MAX_KID = 256

KEY_TYPES: Mapping[str, str] = MappingProxyType({
    "RS256": "RSA", "RS384": "RSA", "RS512": "RSA",
    "PS256": "RSA", "PS384": "RSA", "PS512": "RSA",
    "ES256": "P-256", "ES384": "P-384", "ES512": "P-521",
    "EdDSA": "OKP",
    "HS256": "oct", "HS384": "oct", "HS512": "oct",
})
SECRET_BYTES: Mapping[str, int] = MappingProxyType({"HS256": 32, "HS384": 48, "HS512": 64})     # RFC 7518 3.2
_CURVES: Mapping[str, tuple[type[ec.EllipticCurve], int]] = MappingProxyType({
    "P-256": (ec.SECP256R1, 32), "P-384": (ec.SECP384R1, 48), "P-521": (ec.SECP521R1, 66),
})
_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_VERIFIERS: Mapping[str, Algorithm] = MappingProxyType({
    name: algorithm for name, algorithm in get_default_algorithms().items() if name in KEY_TYPES
})
# CVE-2017-15361 (ROCA): moduli of the broken generator are powers of 65537 modulo each of these primes.
_ROCA = tuple(
    (prime, frozenset(pow(65537, power, prime) for power in range(prime)))
    for prime in (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)
)


class KeysError(ValueError):
    """A document, file or secret that gives no keys; the message says why, for an operator."""


class _Unusable(Exception):
    """One key that is left out; the message is its note."""


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """One public key or secret, and the only algorithms it verifies."""

    kid: str | None
    algorithms: frozenset[str]
    type: str                                       # a value of KEY_TYPES
    material: bytes = field(repr=False)             # SubjectPublicKeyInfo, or b"" for a secret: identity of the key
    signature_bytes: int                            # exact length of a signature; 0: that of the digest
    prepared: Any = field(repr=False, compare=False)

    def verify(self, algorithm: str, message: bytes, signature: bytes) -> bool:
        """Whether `signature` is this key's over `message`. `algorithm` must be one of `algorithms`."""
        if algorithm not in self.algorithms:
            return False
        expected = self.signature_bytes or SECRET_BYTES[algorithm]
        return len(signature) == expected and bool(_VERIFIERS[algorithm].verify(message, self.prepared, signature))


class KeySet:
    """An immutable set of keys; `generation` tells two successive sets of one source apart."""

    __slots__ = ("_by_alg", "_by_kid", "_kids", "generation", "keys", "notes")

    def __init__(self, keys: Iterable[VerificationKey] = (), generation: int = 0, notes: Sequence[str] = ()) -> None:
        self.keys = tuple(keys)
        self.generation = generation
        self.notes = tuple(notes)                   # why keys of the document were left out
        self._kids = frozenset(key.kid for key in self.keys)
        by_kid: dict[tuple[str | None, str], tuple[VerificationKey, ...]] = {}
        by_alg: dict[str, tuple[VerificationKey, ...]] = {}
        for key in self.keys:
            for name in key.algorithms:
                by_kid[key.kid, name] = (*by_kid.get((key.kid, name), ()), key)
                by_alg[name] = (*by_alg.get(name, ()), key)
        self._by_kid = by_kid
        self._by_alg = by_alg

    def candidates(self, kid: str | None, algorithm: str) -> tuple[VerificationKey, ...]:
        """The keys that may verify a token which names `kid` (or none) and `algorithm`.

        Without a kid all keys of the algorithm qualify, but only while they are few.
        """
        if kid is not None:
            return self._by_kid.get((kid, algorithm), ())
        keys = self._by_alg.get(algorithm, ())
        return keys if len(keys) <= MAX_WITHOUT_KID else ()

    def knows(self, kid: str) -> bool:
        """Whether some key has this kid, whatever its algorithms."""
        return kid in self._kids

    def same_keys(self, other: "KeySet") -> bool:
        """Whether both sets verify exactly the same tokens."""
        return frozenset(self.keys) == frozenset(other.keys)

    def with_generation(self, generation: int) -> "KeySet":
        return KeySet(self.keys, generation, self.notes)


def parse_key_set(document: bytes, algorithms: Sequence[str]) -> KeySet:
    """Parse a JWK set (RFC 7517 5) for use with `algorithms`. Raises KeysError when no key of it can be used."""
    if len(document) > MAX_DOCUMENT:
        raise KeysError(f"the JWK set has more than {MAX_DOCUMENT} bytes")
    try:
        entries = parse_object(document).get("keys")
    except StrictError as error:
        raise KeysError(f"the JWK set is {error}") from None
    if not isinstance(entries, list):
        raise KeysError('the JWK set has no "keys" array')
    if len(entries) > MAX_KEYS:
        raise KeysError(f"the JWK set has more than {MAX_KEYS} keys")
    keys: list[VerificationKey] = []
    notes: list[str] = []
    for position, entry in enumerate(entries):
        try:
            keys.append(_parse_key(entry, algorithms))
        except _Unusable as reason:
            notes.append(f"key {position}: {reason}")
    keys = _without_ambiguity(keys, notes)
    if not keys:
        raise KeysError("the JWK set has no usable key" + (": " + "; ".join(notes[:8]) if notes else ""))
    return KeySet(keys, notes=notes)


def secret_keys(secret: bytes, algorithms: Sequence[str]) -> KeySet:
    """The key set of a shared secret for the HS algorithms in `algorithms`.

    Raises KeysError when the secret is too short for one of them (RFC 7518 3.2), monotonous, or a public key in disguise.
    """
    wanted = [name for name in algorithms if KEY_TYPES.get(name) == "oct"]
    needed = max((SECRET_BYTES[name] for name in wanted), default=0)
    if len(secret) < needed:
        raise KeysError(f"the secret has {len(secret)} bytes, {'/'.join(wanted)} needs at least {needed}")
    if len(set(secret)) < 8:
        raise KeysError("the secret has fewer than 8 different bytes: use random ones")
    try:
        prepared = _VERIFIERS["HS256"].prepare_key(secret)
    except PyJWTError:
        raise KeysError("the secret is a public key, a certificate or a JWK, which others know") from None
    key = VerificationKey(None, frozenset(wanted), "oct", b"", 0, prepared)
    return KeySet([key] if wanted else [])


def _without_ambiguity(keys: list[VerificationKey], notes: list[str]) -> list[VerificationKey]:
    """Keep one of several equal keys; leave out all keys of a kid that stands for different ones, in any order."""
    by_kid: dict[str, set[VerificationKey]] = {}
    for key in keys:
        if key.kid is not None:
            by_kid.setdefault(key.kid, set()).add(key)
    ambiguous = {kid for kid, same in by_kid.items() if len(same) > 1}
    if ambiguous:
        notes.append(f"{len(ambiguous)} kid(s) stand for different keys: none of those is used")
    return [key for key in dict.fromkeys(keys) if key.kid not in ambiguous]


def _parse_key(entry: Any, algorithms: Sequence[str]) -> VerificationKey:
    if not isinstance(entry, dict):
        raise _Unusable("not an object")
    kid = entry.get("kid")
    if kid is not None and not (isinstance(kid, str) and 0 < len(kid) <= MAX_KID):
        raise _Unusable(f"its kid is not a string of 1 to {MAX_KID} characters")
    if "use" in entry and entry["use"] != "sig":
        raise _Unusable("its use is not sig")
    operations = entry.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        raise _Unusable("its key_ops do not allow to verify")
    kty = entry.get("kty")
    if kty not in ("RSA", "EC", "OKP"):
        raise _Unusable("its kty is not RSA, EC or OKP")
    if not _PRIVATE.isdisjoint(entry):
        raise _Unusable("it holds private members, so others may know them")
    try:
        kind, public, signature_bytes = _LOADERS[kty](entry)
        material = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, TypeError, OverflowError, UnsupportedAlgorithm):
        raise _Unusable(f"its {kty} parameters are invalid") from None
    allowed = _allowed(entry, kind, algorithms)
    return VerificationKey(kid, allowed, kind, material, signature_bytes, public)


def _allowed(entry: Mapping[str, Any], kind: str, algorithms: Sequence[str]) -> frozenset[str]:
    possible = frozenset(name for name in algorithms if KEY_TYPES.get(name) == kind)
    if "alg" in entry:
        alg = entry["alg"]
        possible = possible & {alg} if isinstance(alg, str) else frozenset()
    if not possible:
        raise _Unusable("none of the configured algorithms fits its type and alg")
    return possible


def _bytes(entry: Mapping[str, Any], name: str) -> bytes:
    value = entry.get(name)
    if not isinstance(value, str):
        raise _Unusable(f"its {name} is not a string")
    try:
        return decode_base64url(value.encode("ascii"))
    except (UnicodeError, StrictError):
        raise _Unusable(f"its {name} is not canonical base64url") from None


def _load_rsa(entry: Mapping[str, Any]) -> tuple[str, rsa.RSAPublicKey, int]:
    n = int.from_bytes(_bytes(entry, "n"), "big")
    e = int.from_bytes(_bytes(entry, "e"), "big")
    bits = n.bit_length()
    if not MIN_RSA_BITS <= bits <= MAX_RSA_BITS:
        raise _Unusable(f"its RSA modulus has {bits} bits, not {MIN_RSA_BITS} to {MAX_RSA_BITS}")
    if e < 3 or e % 2 == 0 or e.bit_length() > 256:
        raise _Unusable("its RSA exponent is even, below 3 or above 256 bits")
    if all(n % prime in powers for prime, powers in _ROCA):
        raise _Unusable("its RSA modulus comes from a broken generator (CVE-2017-15361)")
    return "RSA", rsa.RSAPublicNumbers(e, n).public_key(), (bits + 7) // 8


def _load_ec(entry: Mapping[str, Any]) -> tuple[str, ec.EllipticCurvePublicKey, int]:
    name = entry.get("crv")
    if not isinstance(name, str) or name not in _CURVES:
        raise _Unusable("its crv is not P-256, P-384 or P-521")
    curve, size = _CURVES[name]
    x, y = _bytes(entry, "x"), _bytes(entry, "y")
    if len(x) != size or len(y) != size:
        raise _Unusable("its coordinates do not have the length of its curve")
    numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), curve())
    return name, numbers.public_key(), 2 * size     # public_key() refuses a point off the curve


def _load_okp(entry: Mapping[str, Any]) -> tuple[str, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey, int]:
    match entry.get("crv"):
        case "Ed25519":
            return "OKP", ed25519.Ed25519PublicKey.from_public_bytes(_bytes(entry, "x")), 64
        case "Ed448":
            return "OKP", ed448.Ed448PublicKey.from_public_bytes(_bytes(entry, "x")), 114
    raise _Unusable("its crv is not Ed25519 or Ed448")


_LOADERS: Mapping[str, Any] = MappingProxyType({"RSA": _load_rsa, "EC": _load_ec, "OKP": _load_okp})
