"""The token issuer of the benchmark: an RSA key, its JWKS for Crossway, its PEM for HAProxy, and tokens good and bad.

Strategy: keys are made anew for every invocation and live in its temporary directory; nothing secret is committed.
"""

import json
import time
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import RSAAlgorithm

ISSUER = "https://auth.bank.test"
AUDIENCE = "payments"
SCOPE = "payments:write"
LIFETIME = 6 * 3600  # seconds; longer than any benchmark
KEY_ID = "bench-1"


class Issuer:
    """Signs RS256 tokens with a key of 2048 bits."""

    def __init__(self) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def publish(self, directory: Path) -> None:
        """Write jwks.json and issuer.pem, the two spellings of the public key."""
        public = self.key.public_key()
        words = RSAAlgorithm.to_jwk(public, as_dict=True)
        keys = {"keys": [{**words, "kid": KEY_ID, "use": "sig", "alg": "RS256", "key_ops": ["verify"]}]}
        (directory / "jwks.json").write_text(json.dumps(keys))
        (directory / "issuer.pem").write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    def token(self, *, forged: bool = False, **claims: object) -> str:
        """Return a token that is valid unless `forged` (signed with a stranger's key) or changed by `claims`."""
        now = int(time.time())
        payload: dict[str, object] = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "corporate-client-7",
            "client_id": "corporate-client-7",
            "scope": f"payments:read {SCOPE}",
            "iat": now,
            "nbf": now,
            "exp": now + LIFETIME,
            "jti": "0192f3a4-7c1e-7b53-9d10-4f6a2c8e1b07",
        }
        key = self.stranger if forged else self.key
        return jwt.encode(payload | claims, key, algorithm="RS256", headers={"kid": KEY_ID})

    def refused(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return tokens that must not pass, as (what is wrong, token, statuses that are a refusal of it).

        Envoy calls a token for somebody else forbidden, the others unauthenticated: either refuses it.
        """
        past = int(time.time()) - 3600
        return [
            ("no token", "", (401,)),
            ("a forged token", self.token(forged=True), (401,)),
            ("an expired token", self.token(exp=past, iat=past - 60, nbf=past - 60), (401,)),
            ("another audience", self.token(aud="accounts"), (401, 403)),
            ("another issuer", self.token(iss="https://elsewhere.test"), (401,)),
            ("a missing scope", self.token(scope="payments:read"), (403,)),
        ]
