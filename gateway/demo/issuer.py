"""The bank's token issuer: one RSA and one P-256 key, their public halves as a JWKS, and tokens signed with them.

Strategy: keys are made when the issuer starts and live only in its process, a uvicorn of its own. Tokens follow RFC 9068 (`typ`
at+jwt, client_id, scope), which is what the gateway's `jwt` policy reads.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

ISSUER = "https://auth.bank.test"
AUDIENCE = "payments"


class Issuer:
    """Signs access tokens; `jwks()` is what verifies them."""

    def __init__(self) -> None:
        self._rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._p256 = ec.generate_private_key(ec.SECP256R1())

    def jwks(self) -> dict[str, Any]:
        """Return the public keys as a JWK Set (RFC 7517 section 5)."""
        rs256: dict[str, Any] = RSAAlgorithm.to_jwk(self._rsa.public_key(), as_dict=True)
        es256: dict[str, Any] = ECAlgorithm.to_jwk(self._p256.public_key(), as_dict=True)
        rs256.pop("key_ops", None)
        es256.pop("key_ops", None)
        return {
            "keys": [
                {**rs256, "kid": "bank-rs256", "alg": "RS256", "use": "sig"},
                {**es256, "kid": "bank-es256", "alg": "ES256", "use": "sig"},
            ]
        }

    def token(self, client: str, scopes: list[str], algorithm: str = "RS256", lifetime: int = 3600) -> str:
        """Return a signed access token that ends `lifetime` seconds from now; a negative lifetime has already ended."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": client,
            "client_id": client,
            "scope": " ".join(scopes),
            "iat": min(now, now + lifetime - 60),
            "exp": now + lifetime,
            "jti": str(uuid.uuid4()),
        }
        key = self._rsa if algorithm == "RS256" else self._p256
        return jwt.encode(claims, key, algorithm, headers={"kid": f"bank-{algorithm.lower()}", "typ": "at+jwt"})


def auth() -> Starlette:
    """Return the issuer's service: its keys, and a token for whoever asks."""
    issuer = Issuer()

    async def keys(_request: Request) -> Response:
        return JSONResponse(issuer.jwks())

    async def token(request: Request) -> Response:
        return JSONResponse({"access_token": issuer.token(**await request.json()), "token_type": "Bearer"})

    return Starlette(routes=[Route("/.well-known/jwks.json", keys), Route("/token", token, methods=["POST"])])
