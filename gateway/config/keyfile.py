"""Key files that a configuration names: lists of API keys, and JWKS files (RFC 7517).

Strategy: structure only, with the standard library: whether a file can serve its policy at all is known before a
worker starts; the cryptographic work is the policy's. A list of API keys is read like the configuration, so its
mistakes have places.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationInfo

from gateway.config.source import Document
from gateway.config.values import fault, parse_path

MAX_JWKS = 1 << 20  # bytes; a large bank's set is below 64 KiB
_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}
_COORDINATE = {"P-256": 32, "P-384": 48, "P-521": 66}  # bytes, RFC 7518 6.2.1.2
_EDWARDS = {"Ed25519": 32, "Ed448": 57}  # bytes, RFC 8037 and RFC 8032


def read_api_keys(raw: str, info: ValidationInfo) -> Any:
    """Return the list in a file of API keys; its problems join those of the configuration."""
    document = Document(parse_path(raw, info))
    document.read()
    if info.context is not None:
        info.context["documents"].append(document)
    if document.problems:
        first = document.problems[0]
        raise fault(
            "the file of API keys cannot be used", "its own problems are listed too" if first.line else first.message
        )
    if not isinstance(document.data, list):
        raise fault("the file of API keys is no list", 'its items are {client: NAME, hash: "sha256:HEX", scopes: []}')
    return document.data


def _number(key: dict[str, Any], name: str) -> bytes:
    text = key.get(name)
    if not isinstance(text, str) or not text:
        raise ValueError(f"has no {name}")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name} is not base64url") from None


def key_algorithms(key: Any) -> frozenset[str]:
    """Return the algorithms that a JWK can verify; none for a kind that no policy uses.

    Raises ValueError, with the rest of a sentence about the key, for one that cannot be used.
    """
    if not isinstance(key, dict) or not isinstance(key.get("kty"), str):
        raise ValueError("has no kty")  # noqa: TRY004 - a value of the file, not an argument
    kty, curve = key["kty"], key.get("crv")
    usable: frozenset[str] = frozenset()
    if kty == "RSA":
        bits = int.from_bytes(_number(key, "n")).bit_length()
        if bits < 2048:  # RFC 7518 3.3
            raise ValueError(f"is an RSA key of {bits} bits; at least 2048 are needed")
        exponent = int.from_bytes(_number(key, "e"))
        if exponent < 3 or exponent % 2 == 0:
            raise ValueError("has a public exponent that is no odd number from 3 on")
        usable = frozenset(f"{family}{size}" for family in ("RS", "PS") for size in (256, 384, 512))
    elif kty == "EC" and curve in _COORDINATE:
        if any(len(_number(key, name)) != _COORDINATE[curve] for name in ("x", "y")):
            raise ValueError("has a coordinate of the wrong length")
        usable = frozenset(name for name, wanted in _CURVES.items() if wanted == curve)
    elif kty == "OKP" and curve in _EDWARDS:
        if len(_number(key, "x")) != _EDWARDS[curve]:
            raise ValueError("has a public key of the wrong length")
        usable = frozenset(("EdDSA",))
    if key.get("use", "sig") != "sig":
        return frozenset()
    pinned = key.get("alg")
    return usable & {pinned} if isinstance(pinned, str) else usable


def check_jwks(content: bytes, algorithms: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return (errors, warnings) about a JWKS for a policy that accepts `algorithms`; none shows key material."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return ["is not JSON"], []
    keys = data.get("keys") if isinstance(data, dict) else None
    if not isinstance(keys, list) or not keys:
        return ['is no JWKS: it needs {"keys": [...]} with at least one key'], []
    errors: list[str] = []
    warnings: list[str] = []
    usable: set[str] = set()
    seen: set[str] = set()
    for number, key in enumerate(keys):
        name = f"key {number}"
        try:
            found = key_algorithms(key)
        except ValueError as error:
            errors.append(f"{name} {error}")
            continue
        kid = key.get("kid")
        if kid is not None and not isinstance(kid, str):
            errors.append(f"{name} has a kid that is no text")
        elif kid is not None and kid in seen:
            errors.append(f"{name} has the kid of an earlier key")
        elif kid is not None:
            seen.add(kid)
        if "d" in key or key["kty"] == "oct":
            warnings.append(f"{name} holds private key material; publish the public half only")
        usable |= found
    wanted = {name for name in algorithms if not name.startswith("HS")}
    if not errors and not usable & wanted:
        errors.append(f"has no key for {', '.join(sorted(wanted))}")
    return errors, warnings


def read_file(path: Path, most: int) -> bytes:
    """Return a file's bytes, at most `most` of them; raise OSError as `open` does."""
    with open(path, "rb") as stream:
        return stream.read(most + 1)[:most]
