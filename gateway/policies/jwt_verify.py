"""Verify one signed token (JWS compact, RFC 7515; JWT, RFC 7519; best practice, RFC 8725) and say whom it speaks for.

Strategy: bounds first, then the header, then the key, then the signature, and only then the claims are even parsed. PyJWT's
algorithm objects check signatures; everything around them is checked here, because the library accepts padded base64url,
UTF-16 headers, string dates, `zip` and more. The algorithm is the key's: the token's must be equal to it. There is one way
out besides a Principal: TokenError, whatever the failure was. Nothing is fetched for a token but the issuer's own key set,
once and rate limited, when the token names an unknown key.
"""

import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from gateway._speedups.token_cache import Principal
from gateway.policies.jwt_claims import principal_of
from gateway.policies.jwt_json import StrictError, decode_base64url, parse_object
from gateway.policies.jwt_keys import KEY_TYPES, KeySet, VerificationKey, secret_keys
from gateway.policies.jwt_settings import JwtSettings, TokenError, UnknownKey
from gateway.policies.jwt_source import KeySource

__all__ = ["JwtSettings", "TokenError", "UnknownKey", "Verifier"]

# crit (RFC 7515 4.1.11): we understand no extension. b64 (RFC 7797), zip: change what is signed. The others bring a key
# along, or say where to get one: the oldest forgery there is (CVE-2018-0114).
_REFUSED = frozenset({"crit", "b64", "zip", "jwk", "jku", "x5u", "x5c"})
_KID = re.compile(r"[\x20-\x7e]{1,256}")
# Without a demanded typ: plain tokens only. Others (dpop+jwt, logout+jwt, secevent+jwt) are not credentials.
_PLAIN_TYPES = frozenset({"jwt", "jose", "at+jwt"})


class Verifier:
    """Verifies tokens by `settings` with the keys of a source, or a fixed set; None when only the secret is used.

    Raises ValueError when an algorithm has no keys it could use. `clock` gives unix seconds.
    """

    def __init__(
        self, settings: JwtSettings, keys: KeySource | KeySet | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.settings = settings
        self.source = keys if isinstance(keys, KeySource) else None
        self.verified = 0                           # for metrics, as the next
        self.unexpected = 0                         # refusals by an exception that nobody foresaw
        self._fixed = keys if isinstance(keys, KeySet) else KeySet()
        self._secret = KeySet() if settings.secret is None else secret_keys(settings.secret, settings.algorithms)
        self._typ = None if settings.typ is None else _short_type(settings.typ)
        self._clock = clock
        if keys is None and any(KEY_TYPES[name] != "oct" for name in settings.algorithms):
            raise ValueError("algorithms with public keys need `keys`: a JWK set in a file or at an https URL")

    def check(self, token: bytes) -> Principal | Awaitable[Principal]:
        """Verify now; or, when the key is unknown and the issuer may be asked, give an awaitable that does and retries.

        Raises TokenError, at once or when awaited.
        """
        try:
            return self.verify(token, self._clock())
        except UnknownKey:
            if self.source is None or not self.source.may_refetch():
                if self.source is not None:
                    self.source.suppressed += 1
                raise
            return self._check_again(token, self.source)

    async def _check_again(self, token: bytes, source: KeySource) -> Principal:
        await source.refetch()
        return self.verify(token, self._clock())

    def verify(self, token: bytes, now: float) -> Principal:
        """The principal of `token` at `now` (unix seconds). Raises TokenError, and nothing else."""
        try:
            principal = self._verify(token, now)
        except TokenError:
            raise
        except StrictError:
            raise TokenError("token-malformed", "the token is not well-formed") from None
        except Exception:  # noqa: BLE001 - RecursionError, TypeError, ...: no token may cause a 500
            self.unexpected += 1
            raise TokenError("token-malformed", "the token cannot be verified") from None
        self.verified += 1
        return principal

    def _verify(self, token: bytes, now: float) -> Principal:
        if type(token) is bytes and len(token) > self.settings.token_size:
            raise TokenError("token-too-large", "the token is longer than is accepted here")
        if type(token) is not bytes or token.count(b".") != 2:
            raise TokenError("token-malformed", "the token is not a signed token of three parts")
        message, _, tail = token.rpartition(b".")
        head, _, body = message.partition(b".")
        header = parse_object(decode_base64url(head))
        algorithm = self._algorithm(header)
        keys = self._keys(_kid(header), algorithm)
        signature = decode_base64url(tail)
        if not any(key.verify(algorithm, message, signature) for key in keys):
            raise TokenError("token-signature", "the signature of the token is wrong")
        return principal_of(parse_object(decode_base64url(body)), self.settings, now)

    def _algorithm(self, header: dict[str, Any]) -> str:
        """Check the header's other members; its alg, which is one of the configured ones."""
        if not _REFUSED.isdisjoint(header):
            raise TokenError("token-header", "the token's header has a member that is not accepted")
        typ = header.get("typ")
        if "typ" in header and type(typ) is not str:
            raise TokenError("token-type", "the token's typ is not a string")
        short = None if typ is None else _short_type(typ)
        if short != self._typ if self._typ is not None else short is not None and short not in _PLAIN_TYPES:
            raise TokenError("token-type", "the token is of another type")
        algorithm = header.get("alg")
        if type(algorithm) is not str or algorithm not in self.settings.algorithms:
            raise TokenError("token-algorithm", "the token's algorithm is not accepted here")
        return algorithm

    def _keys(self, kid: str | None, algorithm: str) -> tuple[VerificationKey, ...]:
        """The keys whose own algorithms include `algorithm`; secrets and public keys never meet."""
        if KEY_TYPES[algorithm] == "oct":
            return self._secret.candidates(None, algorithm)
        keys = self._fixed if self.source is None else self.source.keys
        candidates = keys.candidates(kid, algorithm)
        if candidates:
            return candidates
        if not keys.keys or (kid is not None and not keys.knows(kid)):
            raise UnknownKey
        raise TokenError("token-key", "the token names no key that verifies its algorithm")


def _short_type(typ: str) -> str:
    """A media type without `application/`, in lower case (RFC 7515 4.1.9); one that is not ASCII equals nothing."""
    short = typ.lower() if typ.isascii() else ""
    return short.removeprefix("application/")


def _kid(header: dict[str, Any]) -> str | None:
    if "kid" not in header:
        return None
    kid = header["kid"]
    if type(kid) is not str or not _KID.fullmatch(kid):
        raise TokenError("token-header", "the token's kid is not a string of 1 to 256 printable characters")
    return kid
