"""JWK sets: which keys are used, for which algorithms, and which documents are refused."""

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.jwt_keys import MAX_DOCUMENT, KeysError, KeySet, parse_key_set

ALGORITHMS = ("RS256", "PS256", "ES256", "ES384", "ES512", "EdDSA")


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def point(key: ec.EllipticCurvePrivateKey, crv: str) -> dict[str, Any]:
    size = (key.curve.key_size + 7) // 8
    numbers = key.public_key().public_numbers()
    return {"kty": "EC", "crv": crv, "x": b64(numbers.x.to_bytes(size, "big")), "y": b64(numbers.y.to_bytes(size, "big"))}


def okp(crv: str = "Ed25519") -> dict[str, Any]:
    private = ed25519.Ed25519PrivateKey if crv == "Ed25519" else ed448.Ed448PrivateKey
    return {"kty": "OKP", "crv": crv, "x": b64(private.generate().public_key().public_bytes_raw())}


N = rsa.generate_private_key(65537, 2048).public_key().public_numbers().n
RSA = {"kty": "RSA", "n": number(N), "e": "AQAB"}
P256 = point(ec.generate_private_key(ec.SECP256R1()), "P-256")
P384 = point(ec.generate_private_key(ec.SECP384R1()), "P-384")
P521 = point(ec.generate_private_key(ec.SECP521R1()), "P-521")
ED = okp()


def document(*keys: Any) -> bytes:
    return json.dumps({"keys": list(keys)}).encode()


def parsed(*keys: Any, algorithms: tuple[str, ...] = ALGORITHMS) -> KeySet:
    return parse_key_set(document(*keys), algorithms)


@pytest.mark.parametrize(("jwk", "expected"), [
    (RSA, {"RS256", "PS256"}), (RSA | {"alg": "PS256"}, {"PS256"}), (P256, {"ES256"}), (P384, {"ES384"}), (P521, {"ES512"}),
    (ED, {"EdDSA"}), (okp("Ed448"), {"EdDSA"}), (P256 | {"use": "sig", "key_ops": ["verify"], "alg": "ES256", "x5t": "x"}, {"ES256"}),
])
def test_algorithms_come_from_the_key(jwk: dict[str, Any], expected: set[str]) -> None:
    assert parsed(jwk).keys[0].algorithms == expected


def roca_modulus() -> int:
    """A modulus with the fingerprint of CVE-2017-15361: a power of 65537 modulo many small primes."""
    product = 1
    for prime in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109,
                  113, 127, 131, 137, 139, 149, 151, 157, 163, 167):
        product *= prime
    start = next(n for n in (pow(65537, power, product) for power in range(4711, 9999)) if n % 2)
    return start + (product << (2048 - product.bit_length()))


UNUSABLE: dict[str, Any] = {
    "use enc": RSA | {"use": "enc"}, "use null": RSA | {"use": None}, "use list": RSA | {"use": ["sig"]},
    "key_ops sign": RSA | {"key_ops": ["sign"]}, "key_ops text": RSA | {"key_ops": "verify"}, "key_ops encrypt": RSA | {"key_ops": ["encrypt"]},
    "oct": {"kty": "oct", "k": b64(b"s" * 64), "alg": "HS256"}, "unknown kty": {"kty": "AKP"}, "no kty": {"n": number(N), "e": "AQAB"},
    "kty list": RSA | {"kty": ["RSA"]}, "kty case": RSA | {"kty": "rsa"},
    "private RSA": RSA | {"d": "AQAB"}, "private EC": P256 | {"d": "AQAB"},
    "alg of another type": RSA | {"alg": "ES256"}, "alg not configured": RSA | {"alg": "RS512"}, "alg none": RSA | {"alg": "none"},
    "alg HS256": RSA | {"alg": "HS256"}, "alg number": RSA | {"alg": 1}, "alg list": RSA | {"alg": ["RS256"]}, "alg null": RSA | {"alg": None},
    "RSA 1024": RSA | {"n": number(N >> 1024 | 1)}, "RSA 2047": RSA | {"n": number(N >> 1 | 1)}, "RSA 16384": RSA | {"n": number((1 << 16383) + 1)},
    "e 1": RSA | {"e": "AQ"}, "e 0": RSA | {"e": "AA"}, "e even": RSA | {"e": number(65536)}, "e huge": RSA | {"e": number((1 << 257) + 1)},
    "e empty": RSA | {"e": ""}, "n empty": RSA | {"n": ""}, "n number": RSA | {"n": N % 1000}, "n padded": RSA | {"n": RSA["n"] + "=="},
    "n other alphabet": RSA | {"n": "+/" + RSA["n"]}, "n not ASCII": RSA | {"n": "é"}, "no n": {"kty": "RSA", "e": "AQAB"},
    "ROCA": RSA | {"n": number(roca_modulus())},
    "off the curve": P256 | {"y": P256["x"]}, "infinity": P256 | {"x": b64(bytes(32)), "y": b64(bytes(32))},
    "short coordinate": P256 | {"x": b64(b"\1" * 31)}, "long coordinate": P256 | {"x": b64(b"\0" + base64.urlsafe_b64decode(P256["x"] + "="))},
    "curve of another size": P256 | {"crv": "P-384"}, "secp256k1": P256 | {"crv": "secp256k1"}, "crv list": P256 | {"crv": ["P-256"]},
    "crv and alg differ": P256 | {"alg": "ES384"}, "ES512 on P-256": P256 | {"alg": "ES512"},
    "X25519": {"kty": "OKP", "crv": "X25519", "x": ED["x"]}, "Ed25519 short": ED | {"x": b64(bytes(31))}, "Ed25519 long": ED | {"x": b64(bytes(33))},
    "kid number": RSA | {"kid": 1}, "kid empty": RSA | {"kid": ""}, "kid long": RSA | {"kid": "k" * 257},
    "no object": "RSA", "null": None,
}


@pytest.mark.parametrize("jwk", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_leaves_out_what_must_not_verify(jwk: Any) -> None:
    keys = parsed(jwk, ED | {"kid": "good"})
    assert [key.kid for key in keys.keys] == ["good"]
    assert len(keys.notes) == 1
    with pytest.raises(KeysError, match="no usable key"):
        parsed(jwk)


def test_the_roca_sample_is_otherwise_fine() -> None:
    parsed(RSA | {"n": number(roca_modulus() + 2)})


@pytest.mark.parametrize("order", [1, -1])
def test_a_kid_for_different_keys_stands_for_none(order: int) -> None:
    for other in (P256, okp(), RSA | {"alg": "RS256"}):
        keys = parsed(*[RSA | {"kid": "a"}, other | {"kid": "a"}, ED | {"kid": "b"}][::order])
        assert [key.kid for key in keys.keys] == ["b"]
        assert keys.candidates("a", "RS256") == () and not keys.knows("a")


def test_the_same_key_twice_is_one_key() -> None:
    assert len(parsed(RSA | {"kid": "a"}, RSA | {"kid": "a", "x5t": "x"}, ED).keys) == 2


def test_an_encryption_key_does_not_shadow_the_signing_key_of_its_kid() -> None:
    assert parsed(P256 | {"kid": "a", "use": "enc"}, RSA | {"kid": "a"}).candidates("a", "RS256")


def test_candidates() -> None:
    keys = parsed(RSA | {"kid": "r"}, P256 | {"kid": "e"}, ED)
    assert [key.type for key in keys.candidates("r", "RS256")] == ["RSA"]
    assert keys.candidates("r", "ES256") == () and keys.candidates("x", "RS256") == ()
    assert [key.kid for key in keys.candidates(None, "ES256")] == ["e"]
    assert keys.candidates("", "EdDSA") == ()
    assert len(parsed(*[okp() for _ in range(4)]).candidates(None, "EdDSA")) == 4
    assert parsed(*[okp() for _ in range(5)]).candidates(None, "EdDSA") == ()       # too many to try


def test_same_keys_in_another_order_are_no_change() -> None:
    first = parsed(RSA | {"kid": "a"}, ED)
    assert first.same_keys(parsed(ED, RSA | {"kid": "a", "x": 1}))
    assert not first.same_keys(parsed(RSA | {"kid": "b"}, ED))
    assert not first.same_keys(parsed(RSA | {"kid": "a", "alg": "RS256"}, ED))
    assert not first.same_keys(parsed(ED))


DOCUMENTS = {
    "HTML": b"<!doctype html><html></html>", "empty": b"", "array": b"[]", "no keys": b"{}", "keys object": b'{"keys":{}}',
    "keys empty": b'{"keys":[]}', "keys null": b'{"keys":null}', "duplicate member": b'{"keys":[],"keys":[]}',
    "a single JWK": json.dumps(RSA).encode(), "UTF-16": document(RSA).decode().encode("utf-16"), "truncated": document(RSA)[:-1],
    "deep": b'{"keys":' + b"[" * 5000 + b"]" * 5000 + b"}", "too large": document(RSA) + b" " * MAX_DOCUMENT,
    "too many": document(*[ED] * 257), "NaN": b'{"keys":[NaN]}', "latin-1": b'{"keys":["\xe9"]}',
}


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_refuses_documents(text: bytes) -> None:
    with pytest.raises(KeysError, match="JWK set"):
        parse_key_set(text, ALGORITHMS)


def test_messages_hold_nothing_of_the_document() -> None:
    with pytest.raises(KeysError) as caught:
        parsed({"kty": "oct", "k": "c2VjcmV0"}, RSA | {"d": "c2VjcmV0", "kid": "c2VjcmV0"}, {"kty": "c2VjcmV0"})
    assert "c2VjcmV0" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["RSA", "EC", "OKP", "P-256", "sig", "AQAB", "", "é", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kty", "n", "e", "crv", "x", "y", "use", "kid"]), inner),
)


@given(st.lists(json_values, max_size=4))
def test_no_other_exception_escapes(entries: list[Any]) -> None:
    try:
        parse_key_set(document(*entries), ALGORITHMS)
    except KeysError:
        pass
