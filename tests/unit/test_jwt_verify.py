"""Tokens: one good one per algorithm, and everything known that is nearly one.

Each refusal is one mutation of a token that is accepted, and must come from a check that was meant for it: the verifier's
count of unforeseen exceptions stays zero.
"""

import base64
import hashlib
import hmac
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway._speedups.token_cache import Principal
from gateway.policies.jwt_keys import KeySet, parse_key_set
from gateway.policies.jwt_verify import JwtSettings, TokenError, UnknownKey, Verifier

NOW = 1_800_000_000
SECRET = hashlib.sha512(b"a secret of the tests").digest()
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
CLAIMS: dict[str, Any] = {
    "iss": "https://auth.bank.test", "sub": "alice", "aud": "payments", "exp": NOW + 300, "nbf": NOW - 10, "iat": NOW - 10,
    "client_id": "app", "scope": "payments:read payments:write",
}


def b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big")).decode()


def sign(alg: str, key: Any, message: bytes) -> bytes:
    digest = getattr(hashes, f"SHA{alg[2:]}", hashes.SHA256)()
    match alg[:2]:
        case "RS":
            return key.sign(message, padding.PKCS1v15(), digest)
        case "PS":
            return key.sign(message, padding.PSS(padding.MGF1(digest), digest.digest_size), digest)
        case "ES":
            r, s = decode_dss_signature(key.sign(message, ec.ECDSA(digest)))
            size = (key.curve.key_size + 7) // 8
            return r.to_bytes(size, "big") + s.to_bytes(size, "big")
        case "HS":
            return hmac.digest(key, message, f"sha{alg[2:]}")
        case _:
            return key.sign(message)


def token(header: Any, claims: Any, key: Any, alg: str = "RS256") -> bytes:
    """A token; header and claims may be bytes, which are taken as they are."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    message = b64(head) + b"." + b64(body)
    return message + b"." + b64(sign(alg, key, message))


class Keys:
    """The issuer's keys, made once."""

    def __init__(self) -> None:
        self.rsa = rsa.generate_private_key(65537, 2048)
        self.stranger = rsa.generate_private_key(65537, 2048)
        self.private: dict[str, Any] = {
            "rsa": self.rsa,
            "p256": ec.generate_private_key(ec.SECP256R1()),
            "p384": ec.generate_private_key(ec.SECP384R1()),
            "p521": ec.generate_private_key(ec.SECP521R1()),
            "ed25519": ed25519.Ed25519PrivateKey.generate(),
            "ed448": ed448.Ed448PrivateKey.generate(),
        }
        self.private["rs-only"] = self.rsa
        self.jwks = json.dumps({"keys": [self.jwk(kid) for kid in self.private]}).encode()
        self.set = parse_key_set(self.jwks, ALGORITHMS)

    def jwk(self, kid: str) -> dict[str, Any]:
        public = self.private[kid].public_key()
        if isinstance(public, rsa.RSAPublicKey):
            numbers = public.public_numbers()
            pinned = {"alg": "RS256"} if kid == "rs-only" else {}
            return {"kty": "RSA", "kid": kid, "n": number(numbers.n), "e": number(numbers.e), **pinned}
        if isinstance(public, ec.EllipticCurvePublicKey):
            size = (public.curve.key_size + 7) // 8
            point = public.public_numbers()
            x, y = (b64(value.to_bytes(size, "big")).decode() for value in (point.x, point.y))
            return {"kty": "EC", "kid": kid, "crv": f"P-{public.curve.key_size}", "x": x, "y": y}
        crv = "Ed25519" if isinstance(public, ed25519.Ed25519PublicKey) else "Ed448"
        return {"kty": "OKP", "kid": kid, "crv": crv, "x": b64(public.public_bytes_raw()).decode()}

    def good(self, header: dict[str, Any] | None = None, claims: dict[str, Any] | None = None, without: str = "") -> bytes:
        """A good RS256 token, with the given members instead."""
        merged = CLAIMS | (claims or {})
        merged.pop(without, None)
        return token({"alg": "RS256", "kid": "rsa"} | (header or {}), merged, self.rsa)

    def raw(self, header: bytes | None = None, claims: bytes | None = None) -> bytes:
        """A well-signed RS256 token of these very bytes."""
        return token(header or b'{"alg":"RS256","kid":"rsa"}', claims or json.dumps(CLAIMS).encode(), self.rsa)


@pytest.fixture(scope="session")
def keys() -> Keys:
    return Keys()


def verifier(keys: Keys | KeySet | None, **more: Any) -> Verifier:
    demands: dict[str, Any] = {
        "issuers": ("https://auth.bank.test",), "audiences": ("payments",), "algorithms": ALGORITHMS, "seed": 7,
    } | more
    return Verifier(JwtSettings(**demands), keys.set if isinstance(keys, Keys) else keys)


def refused(subject: Verifier, value: Any, now: float = NOW) -> TokenError:
    with pytest.raises(TokenError) as caught:
        subject.verify(value, now)
    assert subject.unexpected == 0
    text = caught.value.description
    assert text.isascii() and text.isprintable() and '"' not in text and "\\" not in text
    return caught.value


# -- accepted --------------------------------------------------------------------------------------------------------

GOOD_KEYS = {
    "RS256": "rsa", "RS384": "rsa", "RS512": "rsa", "PS256": "rsa", "PS384": "rsa", "PS512": "rsa", "ES256": "p256",
    "ES384": "p384", "ES512": "p521", "EdDSA": "ed25519",
}


@pytest.mark.parametrize(("alg", "kid"), [*GOOD_KEYS.items(), ("EdDSA", "ed448"), ("RS256", "rs-only")])
@pytest.mark.parametrize("named", [True, False], ids=["kid", "no kid"])
def test_accepts_every_algorithm(keys: Keys, alg: str, kid: str, named: bool) -> None:
    header = {"alg": alg, "kid": kid} if named else {"alg": alg}
    it = verifier(keys).verify(token(header, CLAIMS, keys.private[kid], alg), NOW)
    assert (it.subject, it.client, it.issuer) == ("alice", "app", "https://auth.bank.test")
    assert it.scopes == {"payments:read", "payments:write"}
    assert it.headers == b"x-auth-subject: alice\r\n"
    assert it.audit_name == b"alice"
    assert it.claims["aud"] == "payments"
    assert it.expires == NOW + 330
    assert it.key == Principal("x", "app", "https://auth.bank.test", [], {}, 0, 7).key


@pytest.mark.parametrize("alg", ["HS256", "HS384", "HS512"])
def test_accepts_a_secret_of_enough_length(alg: str) -> None:
    subject = verifier(None, algorithms=(alg,), secret=SECRET)
    assert subject.verify(token({"alg": alg, "kid": "whatever"}, CLAIMS, SECRET, alg), NOW).subject == "alice"
    refused(subject, token({"alg": alg}, CLAIMS, SECRET + b"x", alg))


ACCEPTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "typ JWT": ({"typ": "JWT"}, {}),
    "typ at+jwt": ({"typ": "application/AT+JWT"}, {}),
    "x5t is only a name": ({"x5t": "abc"}, {}),
    "aud list": ({}, {"aud": ["other", "payments"]}),
    "fractional dates": ({}, {"exp": NOW + 0.5, "iat": NOW - 0.25}),
    "exp within the leeway": ({}, {"exp": NOW - 29}),
    "nbf within the leeway": ({}, {"nbf": NOW + 29, "iat": NOW + 29}),
    "scope list": ({}, {"scope": ["payments:read", "payments:write"]}),
    "both scope and scp": ({}, {"scp": "x"}),
    "other scripts": ({}, {"sub": "Zoë Ωmega 李"}),
    "unknown claims": ({}, {"x": {"y": [1, None, 2.5]}, "jti": "1"}),
}


@pytest.mark.parametrize("case", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepts_what_is_legal(keys: Keys, case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert isinstance(verifier(keys).verify(keys.good(*case), NOW), Principal)


def test_a_high_s_signature_verifies(keys: Keys) -> None:
    """ECDSA is malleable: two raw tokens can be one credential, which is why nothing denies by raw token."""
    good = token({"alg": "ES256", "kid": "p256"}, CLAIMS, keys.private["p256"], "ES256")
    message, _, tail = good.rpartition(b".")
    raw = base64.urlsafe_b64decode(tail + b"==")
    other = raw[:32] + (P256_ORDER - int.from_bytes(raw[32:], "big")).to_bytes(32, "big")
    assert verifier(keys).verify(message + b"." + b64(other), NOW).subject == "alice"


# -- refused: header and algorithm -----------------------------------------------------------------------------------

P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

HEADERS: dict[str, dict[str, Any]] = {
    **{f"alg {alg}": {"alg": alg} for alg in ("none", "None", "NONE", "nOnE", "none ", " none", "", "n\0ne", "rs256", "RS256 ",
                                              "RS1", "HS256", "ES256K", "RSA-OAEP", "dir", "PBES2-HS512+A256KW")},
    **{f"alg {value!r}": {"alg": value} for value in (None, [], ["RS256"], {}, {"RS256": 1}, 1, True, 0.5)},
    **{f"crit {value!r}": {"crit": value} for value in (["x"], ["exp"], [], "exp", None, ["b64"], 1)},
    "b64 false": {"b64": False, "crit": ["b64"]}, "b64 alone": {"b64": False}, "b64 true": {"b64": True},
    "zip": {"zip": "DEF"}, "zip null": {"zip": None},
    "jku": {"jku": "https://evil.test/jwks.json"}, "jku file": {"jku": "file:///etc/passwd"},
    "x5u": {"x5u": "https://evil.test/cert.pem"}, "x5c": {"x5c": ["MIIB"]},
    **{f"kid {value!r}": {"kid": value} for value in (1, None, ["rsa"], {}, True, "", "rsa\0", "rsa\n", "k" * 257, "k" * 4096, "rsé")},
    **{f"typ {value!r}": {"typ": value} for value in (1, None, ["JWT"], "", "dpop+jwt", "logout+jwt", "secevent+jwt", "JWE",
                                                      "ＪＷＴ", "JWT\0", "text/jwt", "application/application/jwt")},
    "wrong key of the set": {"kid": "rs-only", "alg": "PS256"},
}
UNKNOWN_KIDS = ("../../../../dev/null", "/dev/null", "' OR '1'='1", "rsa; ls", "$(id)", "https://evil.test/k", "RSA", " rsa", "rsa ",
                "rsa/", "k" * 256)


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_refuses_headers(keys: Keys, header: dict[str, Any]) -> None:
    error = refused(verifier(keys), keys.good(header))
    assert error.reason in {"token-algorithm", "token-header", "token-type", "token-signature", "token-key"}


@pytest.mark.parametrize("kid", UNKNOWN_KIDS)
def test_an_unknown_kid_is_told_apart(keys: Keys, kid: str) -> None:
    assert isinstance(refused(verifier(keys), keys.good({"kid": kid})), UnknownKey)


@pytest.mark.parametrize("signed", ["", "c2ln", "good"])
@pytest.mark.parametrize("alg", ["none", "NONE", "None", "nOnE", "none ", "\tnone", "", "NoNe"])
def test_refuses_none_with_and_without_signature(keys: Keys, alg: str, signed: str) -> None:
    message = b64(json.dumps({"alg": alg}).encode()) + b"." + b64(json.dumps(CLAIMS).encode())
    tail = b64(sign("RS256", keys.rsa, message)) if signed == "good" else signed.encode()
    assert refused(verifier(keys), message + b"." + tail).reason == "token-algorithm"


RAW_HEADERS = {
    "escaped none": b'{"alg":"n\\u006fne","kid":"rsa"}',
    "no alg": b'{"kid":"rsa"}',
    "duplicate alg": b'{"alg":"none","alg":"RS256","kid":"rsa"}',
    "duplicate alg, escaped": b'{"\\u0061lg":"RS256","alg":"RS256","kid":"rsa"}',
    "duplicate kid": b'{"alg":"RS256","kid":"rs-only","kid":"rsa"}',
    "UTF-16": '{"alg":"RS256","kid":"rsa"}'.encode("utf-16"),
    "UTF-16 LE": '{"alg":"RS256","kid":"rsa"}'.encode("utf-16-le"),
    "UTF-8 with BOM": b'\xef\xbb\xbf{"alg":"RS256","kid":"rsa"}',
    "array": b'[{"alg":"RS256"}]', "string": b'"RS256"', "null": b"null", "number": b"1", "not JSON": b"alg=RS256",
    "trailing data": b'{"alg":"RS256","kid":"rsa"} x',
    "comment": b'{"alg":"RS256"/**/,"kid":"rsa"}',
    "deep": b'{"alg":"RS256","kid":"rsa","x":' + b"[" * 1500 + b"]" * 1500 + b"}",
    "5000 digits": b'{"alg":"RS256","kid":"rsa","x":' + b"1" * 5000 + b"}",
    "lone surrogate": b'{"alg":"RS256","kid":"rsa","x":"\\ud800"}',
}


@pytest.mark.parametrize("header", RAW_HEADERS.values(), ids=RAW_HEADERS.keys())
def test_refuses_header_bytes(keys: Keys, header: bytes) -> None:
    refused(verifier(keys), keys.raw(header))


def test_an_embedded_or_linked_key_is_not_used_and_nothing_is_fetched(keys: Keys) -> None:
    numbers = keys.stranger.public_key().public_numbers()
    jwk = {"kty": "RSA", "n": number(numbers.n), "e": number(numbers.e)}
    with socket.create_server(("127.0.0.1", 0)) as trap:
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/jwks.json"
        for more in ({"jwk": jwk}, {"jku": url}, {"x5u": url}, {"x5t": url}, {"jku": url, "kid": url}):
            refused(verifier(keys), token({"alg": "RS256", "kid": "rsa"} | more, CLAIMS | {"iss": url}, keys.stranger))
        refused(verifier(keys), token({"alg": "RS256", "kid": "rsa"}, CLAIMS | {"iss": url}, keys.rsa))
        trap.setblocking(False)
        with pytest.raises(BlockingIOError):
            trap.accept()


def public_key_spellings(keys: Keys) -> dict[str, bytes]:
    spellings: dict[str, bytes] = {}
    for kid in ("rsa", "p256", "ed25519"):
        public = keys.private[kid].public_key()
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        spellings |= {
            f"{kid} PEM": pem, f"{kid} PEM stripped": pem.strip(), f"{kid} PEM CRLF": b"\n" + pem.replace(b"\n", b"\r\n"),
            f"{kid} DER": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            f"{kid} SSH": public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
            f"{kid} JWK": json.dumps(keys.jwk(kid)).encode(),
        }
    spellings["PKCS#1"] = keys.rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.PKCS1)
    spellings["modulus"] = keys.rsa.public_key().public_numbers().n.to_bytes(256, "big")
    spellings |= {"JWKS": keys.jwks, "empty": b"", "NUL": b"\0", "NULs": bytes(32), "dictionary": b"secret"}
    return spellings


def test_hs_with_a_public_key_as_secret_is_refused(keys: Keys) -> None:
    both = verifier(keys, algorithms=(*ALGORITHMS, "HS256"), secret=SECRET)
    assert both.verify(token({"alg": "HS256", "kid": "rsa"}, CLAIMS, SECRET, "HS256"), NOW).subject == "alice"
    for name, secret in public_key_spellings(keys).items():
        for kid in ({}, {"kid": "rsa"}, {"kid": "p256"}):
            forged = token({"alg": "HS256", **kid}, CLAIMS, secret, "HS256")
            assert refused(verifier(keys), forged).reason == "token-algorithm", name
            assert refused(both, forged).reason == "token-signature", name


def test_a_public_key_or_weak_secret_cannot_be_configured(keys: Keys) -> None:
    allowed = {"modulus"}                               # bytes like any others: nothing tells them from a secret
    for name, secret in public_key_spellings(keys).items():
        if name not in allowed:
            with pytest.raises(ValueError, match="secret"):
                JwtSettings(algorithms=("HS256",), secret=secret)


@pytest.mark.parametrize(("alg", "size"), [("HS256", 32), ("HS384", 48), ("HS512", 64)])
def test_a_secret_has_at_least_the_digest_length(alg: str, size: int) -> None:
    JwtSettings(algorithms=(alg,), secret=SECRET[:size])
    with pytest.raises(ValueError, match="bytes"):
        JwtSettings(algorithms=(alg,), secret=SECRET[: size - 1])


@pytest.mark.parametrize("wrong", [
    {"algorithms": ("none",)}, {"algorithms": ()}, {"algorithms": ("HS256",)}, {"secret": SECRET}, {"leeway": -1},
    {"headers": {"Host": "sub"}}, {"headers": {"authorization": "sub"}}, {"headers": {"x auth": "sub"}},
    {"headers": {"content-length": "sub"}}, {"headers": {"x_auth_subject": "sub"}}, {"headers": {"": "sub"}}, {"token_size": 0},
    {"seed": -1},
])
def test_settings_without_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        JwtSettings(**wrong)


def test_algorithms_with_public_keys_need_keys() -> None:
    with pytest.raises(ValueError, match="keys"):
        Verifier(JwtSettings())


# -- refused: signature ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kid", "alg", "claimed"), [
    ("rs-only", "RS512", "RS512"), ("rs-only", "PS256", "PS256"), ("rsa", "RS256", "PS256"), ("rsa", "RS256", "RS384"),
    ("rsa", "RS256", "ES256"), ("p256", "ES256", "RS256"), ("p384", "ES384", "ES256"), ("p256", "ES256", "ES384"),
    ("ed25519", "EdDSA", "ES256"), ("p256", "ES256", "EdDSA"),
])
def test_a_key_verifies_its_own_algorithms_only(keys: Keys, kid: str, alg: str, claimed: str) -> None:
    refused(verifier(keys), token({"alg": claimed, "kid": kid}, CLAIMS, keys.private[kid], alg))


def test_a_key_itself_refuses_an_algorithm_that_is_not_its_own(keys: Keys) -> None:
    (key,) = keys.set.candidates("rs-only", "RS256")
    assert key.verify("RS256", b"message", sign("RS256", keys.rsa, b"message"))
    for alg in ("RS512", "PS256"):
        assert not key.verify(alg, b"message", sign(alg, keys.rsa, b"message"))


def test_es256_with_the_kid_of_an_rsa_key(keys: Keys) -> None:
    refused(verifier(keys), token({"alg": "ES256", "kid": "rsa"}, CLAIMS, keys.private["p256"], "ES256"))


def test_an_algorithm_that_is_not_configured(keys: Keys) -> None:
    subject = verifier(keys, algorithms=("ES256",))
    assert refused(subject, keys.good()).reason == "token-algorithm"


def test_the_signature_of_a_stranger(keys: Keys) -> None:
    forged = token({"alg": "RS256", "kid": "rsa"}, CLAIMS, keys.stranger)
    assert refused(verifier(keys), forged).reason == "token-signature"


SIGNATURES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "RSA empty": ("rsa", lambda s: b""), "RSA zero": ("rsa", lambda s: bytes(256)), "RSA short": ("rsa", lambda s: s[:-1]),
    "RSA long": ("rsa", lambda s: s + b"\0"), "RSA led by zero": ("rsa", lambda s: b"\0" + s), "RSA ones": ("rsa", lambda s: b"\xff" * 256),
    "RSA one": ("rsa", lambda s: bytes(255) + b"\1"), "RSA bit": ("rsa", lambda s: s[:-1] + bytes([s[-1] ^ 1])),
    "EC empty": ("p256", lambda s: b""), "EC r and s 0": ("p256", lambda s: bytes(64)),
    "EC r 0": ("p256", lambda s: bytes(32) + s[32:]), "EC s 0": ("p256", lambda s: s[:32] + bytes(32)),
    "EC s n": ("p256", lambda s: s[:32] + P256_ORDER.to_bytes(32, "big")), "EC r n": ("p256", lambda s: P256_ORDER.to_bytes(32, "big") + s[32:]),
    "EC both n": ("p256", lambda s: P256_ORDER.to_bytes(32, "big") * 2), "EC 63": ("p256", lambda s: s[:63]), "EC 65": ("p256", lambda s: s + b"\0"),
    "EC r+n wide": ("p256", lambda s: (int.from_bytes(s[:32], "big") + P256_ORDER).to_bytes(33, "big") + s[32:]),
    "EC ones": ("p256", lambda s: b"\xff" * 64), "EC swapped": ("p256", lambda s: s[32:] + s[:32]),
    "EC one": ("p256", lambda s: (bytes(31) + b"\1") * 2),
    "Ed empty": ("ed25519", lambda s: b""), "Ed zero": ("ed25519", lambda s: bytes(64)), "Ed short": ("ed25519", lambda s: s[:63]),
    "Ed long": ("ed25519", lambda s: s + b"\0"),
    "Ed S+L": ("ed25519", lambda s: s[:32] + (
        int.from_bytes(s[32:], "little") + 2**252 + 27742317777372353535851937790883648493
    ).to_bytes(32, "little")),
}


@pytest.mark.parametrize("case", SIGNATURES.values(), ids=SIGNATURES.keys())
def test_refuses_signatures(keys: Keys, case: tuple[str, Callable[[bytes], bytes]]) -> None:
    kid, change = case
    alg = {"rsa": "RS256", "p256": "ES256", "ed25519": "EdDSA"}[kid]
    good = token({"alg": alg, "kid": kid}, CLAIMS, keys.private[kid], alg)
    verifier(keys).verify(good, NOW)
    message, _, tail = good.rpartition(b".")
    changed = change(base64.urlsafe_b64decode(tail + b"=="))
    assert refused(verifier(keys), message + b"." + b64(changed)).reason == "token-signature"


def test_a_der_signature(keys: Keys) -> None:
    message = b64(b'{"alg":"ES256","kid":"p256"}') + b"." + b64(json.dumps(CLAIMS).encode())
    der = keys.private["p256"].sign(message, ec.ECDSA(hashes.SHA256()))
    refused(verifier(keys), message + b"." + b64(der))


# -- refused: encoding -----------------------------------------------------------------------------------------------

ENCODINGS: dict[str, Callable[[bytes, bytes, bytes], bytes]] = {
    "padded header": lambda h, b, s: h + b"=." + b + b"." + s,
    "padded body": lambda h, b, s: h + b"." + b + b"==." + s,
    "padded signature": lambda h, b, s: h + b"." + b + b"." + s + b"==",
    "other alphabet": lambda h, b, s: h + b"." + b + b"." + s.replace(b"-", b"+").replace(b"_", b"/") + b"+/",
    "space before": lambda h, b, s: b" " + h + b"." + b + b"." + s,
    "space after": lambda h, b, s: h + b"." + b + b"." + s + b" ",
    "newline": lambda h, b, s: h + b"." + b + b"." + s + b"\n",
    "newline inside": lambda h, b, s: h + b"." + b + b"." + s[:9] + b"\r\n" + s[9:],
    "tab": lambda h, b, s: h + b"\t." + b + b"." + s,
    "NUL": lambda h, b, s: h + b"." + b + b"." + s + b"\0",
    "NUL inside": lambda h, b, s: h + b"." + b + b"." + s[:9] + b"\0" + s[9:],
    "junk": lambda h, b, s: h + b"." + b + b"." + s[:9] + b"!" + s[9:],
    "junk in header": lambda h, b, s: h[:4] + b"*" + h[4:] + b"." + b + b"." + s,
    "%2E": lambda h, b, s: h + b"%2E" + b + b"%2E" + s,
    "ideographic stop": lambda h, b, s: "。".encode().join([h, b, s]),
    "2 parts": lambda h, b, s: h + b"." + b,
    "4 parts": lambda h, b, s: h + b"." + b + b"." + s + b".",
    "5 parts": lambda h, b, s: b".".join([h, b, s, b, s]),
    "dots only": lambda h, b, s: b"..",
    "empty header": lambda h, b, s: b"." + b + b"." + s,
    "empty body": lambda h, b, s: h + b".." + s,
    "empty signature": lambda h, b, s: h + b"." + b + b".",
    "empty": lambda h, b, s: b"",
    "JSON serialisation": lambda h, b, s: json.dumps({"protected": h.decode(), "payload": b.decode(), "signature": s.decode()}).encode(),
    "JSON with dots": lambda h, b, s: b'{"a":"' + h + b"." + b + b"." + s + b'"}',
    "detached": lambda h, b, s: h + b".." + s,
    "lower case": lambda h, b, s: h.lower() + b"." + b + b"." + s,
}


@pytest.mark.parametrize("change", ENCODINGS.values(), ids=ENCODINGS.keys())
def test_refuses_encodings(keys: Keys, change: Callable[[bytes, bytes, bytes], bytes]) -> None:
    refused(verifier(keys), change(*keys.good().split(b".")))


def test_refuses_tail_bits_in_every_part(keys: Keys) -> None:
    """Parts whose last character has unused bits: with these bits set, lenient decoders still give the same bytes."""
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    tried = 0
    for pad in range(3):
        parts = keys.good({"x": "y" * pad}, {"x": "y" * pad}).split(b".")
        for position, part in enumerate(parts):
            if len(part) % 4:
                last = bytes([alphabet[alphabet.index(part[-1:]) | 1]])
                changed = [*parts[:position], part[:-1] + last, *parts[position + 1:]]
                assert refused(verifier(keys), b".".join(changed)).reason in {"token-malformed", "token-signature"}
                tried += 1
    assert tried >= 6


@pytest.mark.parametrize("value", [None, "a.b.c", 1, [], bytearray(b"a.b.c"), memoryview(b"a.b.c")])
def test_refuses_what_is_no_bytes(keys: Keys, value: Any) -> None:
    assert refused(verifier(keys), value).reason == "token-malformed"


@pytest.mark.parametrize("value", [b"." * 100_000, b"A" * (1 << 20), b"e30." + b"A" * 9000 + b".AA"], ids=["dots", "1 MiB", "9 kB"])
def test_size_comes_before_decoding(keys: Keys, value: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> bytes:
        raise AssertionError("decoded")

    monkeypatch.setattr("gateway.policies.jwt_verify.decode_base64url", never)
    assert refused(verifier(keys), value).reason == "token-too-large"


def test_size_at_the_limit(keys: Keys) -> None:
    good = keys.good(claims={"x": "y" * 2000})
    verifier(keys, token_size=len(good)).verify(good, NOW)
    assert refused(verifier(keys, token_size=len(good) - 1), good).reason == "token-too-large"


def test_claims_are_not_parsed_before_the_signature_is_right(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    real = parse_key_set.__globals__["parse_object"]
    monkeypatch.setattr("gateway.policies.jwt_verify.parse_object", lambda text: parsed.append(text) or real(text))
    refused(verifier(keys), token({"alg": "RS256", "kid": "rsa"}, CLAIMS, keys.stranger))
    assert len(parsed) == 1


# -- refused: JSON and claims ----------------------------------------------------------------------------------------

BODY = json.dumps(CLAIMS).encode()
BODIES = {
    "duplicate sub": BODY[:-1] + b',"sub":"root"}',
    "duplicate exp, escaped": BODY[:-1] + b',"\\u0065xp":9999999999}',
    "NaN": BODY[:-1] + b',"x":NaN}', "Infinity exp": BODY.replace(b'"exp": %d' % (NOW + 300), b'"exp": Infinity'),
    "1e999": BODY[:-1] + b',"x":1e999}', "deep": BODY[:-1] + b',"x":' + b"[" * 2000 + b"]" * 2000 + b"}",
    "5000 digits": BODY[:-1] + b',"x":' + b"7" * 5000 + b"}", "comment": BODY[:-1] + b"/**/}", "trailing": BODY + b"{}",
    "lone surrogate": BODY[:-1] + b',"x":"\\udc00"}', "surrogate in sub": BODY.replace(b"alice", b"\\ud800"),
    "UTF-16": BODY.decode().encode("utf-16"), "array": b"[" + BODY + b"]", "null": b"null", "empty object": b"{}",
    "CRLF raw": BODY.replace(b"alice", b"a\r\nx: y"), "exp 1e308": BODY.replace(b'"exp": %d' % (NOW + 300), b'"exp": 1e308'),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_refuses_bodies(keys: Keys, body: bytes) -> None:
    refused(verifier(keys), keys.raw(claims=body))


BAD_DATES = (str(NOW + 300), True, False, None, [NOW + 300], {"a": 1}, -1, (NOW + 300) * 1000, 1 << 53, "", 2**63, 9e15, -0.5)
BAD_CLAIMS: dict[str, dict[str, Any]] = {
    **{f"{name} {value!r}": {name: value} for name in ("exp", "nbf", "iat") for value in BAD_DATES},
    "expired": {"exp": NOW - 30}, "expired long ago": {"exp": 0}, "nbf later": {"nbf": NOW + 31}, "iat later": {"iat": NOW + 31},
    **{f"iss {value!r}": {"iss": value} for value in (
        ["https://auth.bank.test"], "https://auth.bank.test/", "https://auth.bank.tes", "https://auth.bank", "", None, 1, {},
        "HTTPS://auth.bank.test", "https://auth.bank.test\0", "https://auth.bank.test ", "https://auth.bank.test.evil.test",
        "https://auth.bаnk.test", "https://auth.bank.test\n",
    )},
    **{f"aud {value!r}": {"aud": value} for value in (
        [], {}, {"payments": 1}, [["payments"]], ["pay"], "pay", "payments2", "PAYMENTS", "", None, 1, True, ["payments", 1],
        ["payments", None], "payments ", "payments accounts", "a,payments", ["payments", ["x"]],
    )},
    **{f"sub {value!r}": {"sub": value} for value in (
        "a\r\nx-auth-subject: root", "a\0b", "a\nb", "a\x7f", "a\x85b", "a\u2028b", "a\u202eb", "\ufeffa", " a", "a ", "", 1, None,
        ["a"], {"a": 1}, True, "x" * 1025, "\t", "a\tb",
    )},
    **{f"client_id {value!r}": {"client_id": value} for value in (1, [], "a\r\n", "", None, "a\0")},
    **{f"scope {value!r}": {"scope": value} for value in (1, None, {"a": 1}, [1], [["a"]], ["a b"], "a\tb", "a\nb", 'a"b', "a\u00a0b", [""], True)},
    "cnf": {"cnf": {"x5t#S256": "abc"}}, "cnf null": {"cnf": None},
}


@pytest.mark.parametrize("claims", BAD_CLAIMS.values(), ids=BAD_CLAIMS.keys())
def test_refuses_claims(keys: Keys, claims: dict[str, Any]) -> None:
    refused(verifier(keys), keys.good(claims=claims))


@pytest.mark.parametrize("name", ["exp", "iss", "aud"])
def test_refuses_a_token_without(keys: Keys, name: str) -> None:
    refused(verifier(keys), keys.good(without=name))


def test_required_claims(keys: Keys) -> None:
    assert refused(verifier(keys, require=("exp", "jti")), keys.good()).reason == "token-claim"
    for empty in ("", None, []):
        refused(verifier(keys, require=("exp", "jti")), keys.good(claims={"jti": empty}))
    verifier(keys, require=("exp", "jti")).verify(keys.good(claims={"jti": "1"}), NOW)


def test_exp_may_be_optional_but_the_answer_is_not_kept_for_ever(keys: Keys) -> None:
    it = verifier(keys, require=()).verify(keys.good(without="exp"), NOW)
    assert NOW < it.expires <= NOW + 300


def test_leeway_ends_to_the_second(keys: Keys) -> None:
    subject, good = verifier(keys, leeway=5), keys.good(claims={"exp": NOW + 100})
    it = subject.verify(good, NOW + 104.99)
    assert it.expires == NOW + 105
    assert refused(subject, good, NOW + 105).reason == "token-expired"


def test_an_audience_that_nobody_configured(keys: Keys) -> None:
    subject = verifier(keys, audiences=())
    assert refused(subject, keys.good()).reason == "token-audience"
    subject.verify(keys.good(without="aud"), NOW)


def test_lifetime(keys: Keys) -> None:
    subject = verifier(keys, max_lifetime=600)
    subject.verify(keys.good(), NOW)
    assert refused(subject, keys.good(claims={"exp": NOW + 700})).reason == "token-lifetime"
    assert refused(subject, keys.good(claims={"exp": NOW + 700}, without="iat")).reason == "token-lifetime"


@pytest.mark.parametrize(("typ", "good"), [
    ("at+jwt", True), ("AT+JWT", True), ("application/at+jwt", True), ("Application/At+Jwt", True), ("JWT", False), (None, False),
    ("at+jwt ", False), ("at", False), ("jwt", False), ("ID+JWT", False), ("at+\u212a", False),
])
def test_a_demanded_typ(keys: Keys, typ: str | None, good: bool) -> None:
    subject = verifier(keys, typ="at+jwt")
    value = keys.good({} if typ is None else {"typ": typ})
    if good:
        subject.verify(value, NOW)
    else:
        assert refused(subject, value).reason == "token-type"


def test_bound_tokens_only_when_allowed(keys: Keys) -> None:
    bound = keys.good(claims={"cnf": {"jkt": "abc"}})
    assert refused(verifier(keys), bound).reason == "token-bound"
    verifier(keys, accept_bound=True).verify(bound, NOW)


@pytest.mark.parametrize(("claims", "subject", "client"), [
    ({"azp": "web"}, "alice", "app"), ({}, "alice", "app"), ({"sub": "bob"}, "bob", "app"),
])
def test_who_it_is(keys: Keys, claims: dict[str, Any], subject: str, client: str) -> None:
    it = verifier(keys).verify(keys.good(claims=claims), NOW)
    assert (it.subject, it.client) == (subject, client)


def test_who_it_is_when_names_are_missing(keys: Keys) -> None:
    it = verifier(keys).verify(keys.good(claims={"azp": "web"}, without="client_id"), NOW)
    assert (it.subject, it.client) == ("alice", "web")
    it = verifier(keys).verify(keys.good(without="client_id"), NOW)
    assert it.client == "alice"
    it = verifier(keys).verify(keys.good(without="sub"), NOW)
    assert (it.subject, it.headers) == ("app", b"x-auth-subject: app\r\n")
    nobody = {name: value for name, value in CLAIMS.items() if name not in ("sub", "client_id")}
    assert refused(verifier(keys), token({"alg": "RS256", "kid": "rsa"}, nobody, keys.rsa)).reason == "token-claim"


def test_scopes_are_whole_words(keys: Keys) -> None:
    subject = verifier(keys)
    assert subject.verify(keys.good(claims={"scope": "payments:write2  x"}), NOW).scopes == {"payments:write2", "x"}
    assert subject.verify(keys.good(claims={"scope": ""}), NOW).scopes == frozenset()
    assert subject.verify(keys.good(claims={"scp": ["a"]}, without="scope"), NOW).scopes == {"a"}
    assert subject.verify(keys.good(without="scope"), NOW).scopes == frozenset()


HEADER_VALUES = {
    "text": ("Zoë", "Zoë".encode()), "number": (7, b"7"), "true": (True, b"true"), "list": (["a", "b c"], b"a,b c"), "absent": (None, None),
}


@pytest.mark.parametrize("case", HEADER_VALUES.values(), ids=HEADER_VALUES.keys())
def test_claims_as_headers(keys: Keys, case: tuple[Any, bytes | None]) -> None:
    value, expected = case
    it = verifier(keys, headers={"x-role": "role"}).verify(keys.good(claims={"role": value}), NOW)
    assert it.headers == (b"" if expected is None else b"x-role: " + expected + b"\r\n")


@pytest.mark.parametrize("value", ["a\r\nx: y", "a\0", {"a": 1}, 1.5, ["a", 1], ["a\n"], ["a,b"], ["x" * 600, "y" * 600], "", " a", [["a"]]])
def test_claims_that_cannot_be_headers(keys: Keys, value: Any) -> None:
    subject = verifier(keys, headers={"x-role": "role"})
    assert refused(subject, keys.good(claims={"role": value})).reason == "token-claim"


def test_an_exception_that_nobody_foresaw_is_a_refusal(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RecursionError, TypeError, KeyError, MemoryError, UnicodeError):
        def fail(*_: object, error: type[Exception] = error) -> None:
            raise error("the token is eyJ...")

        monkeypatch.setattr("gateway.policies.jwt_verify.principal_of", fail)
        subject = verifier(keys)
        with pytest.raises(TokenError) as caught:
            subject.verify(keys.good(), NOW)
        assert caught.value.reason == "token-malformed" and "eyJ" not in str(caught.value)
        assert subject.unexpected == 1


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_mutation_of_a_good_token_is_accepted(keys: Keys, data: st.DataObject) -> None:
    good = GOOD.setdefault("token", keys.good())
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 8)))
    changed = good[:start] + data.draw(st.binary(max_size=8)) + good[end:]
    if changed != good:
        refused(verifier(keys), changed)


GOOD: dict[str, bytes] = {}
