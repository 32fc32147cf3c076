"""What a `jwt` policy demands of a token, and how a refusal is told.

Strategy: settings are checked once, when they are made, so that the verifier meets no impossible combination. A refusal is a
reason (a slug, for logs and metrics) and a description that is safe in WWW-Authenticate: fixed text, printable ASCII
without quotes (RFC 6750 3), never a part of the token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from gateway.config.web import CLAIM_HEADER, NOT_FOR_CLAIMS
from gateway.policies.jwt_keys import KEY_TYPES, secret_keys

MAX_TOKEN = 8 << 10             # bytes; the request head is 32 KiB at most


class TokenError(Exception):
    """A token that is not accepted: 401 with `error="invalid_token"`.

    `reason` is a slug, `description` fixed printable ASCII without quotes and without any of the token.
    """

    def __init__(self, reason: str, description: str) -> None:
        super().__init__(description)
        self.reason = reason
        self.description = description


class UnknownKey(TokenError):
    """The token names a key that is not in the set (now): worth asking the issuer, once."""

    def __init__(self) -> None:
        super().__init__("token-key", "the token is signed with a key that the issuer does not publish")


@dataclass(frozen=True, slots=True)
class JwtSettings:
    """The demands of one `jwt` policy. Raises ValueError, saying what to change, for demands that make no sense."""

    issuers: tuple[str, ...] = ()                   # exact values of iss; none: any
    audiences: tuple[str, ...] = ()                 # one of them in aud; none: tokens without aud only (RFC 7519 4.1.3)
    algorithms: tuple[str, ...] = ("RS256", "PS256", "ES256", "EdDSA")
    secret: bytes | None = field(default=None, repr=False)      # for HS algorithms
    leeway: float = 30.0                            # seconds that clocks may differ
    typ: str | None = None                          # demanded header typ, such as at+jwt
    token_size: int = MAX_TOKEN                     # bytes
    require: tuple[str, ...] = ("exp",)             # claims that must be there
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({"x-auth-subject": "sub"}))
    seed: int = 0                                   # of Principal.key, the same in every worker
    max_lifetime: float | None = None               # seconds from iat (else from now) to exp
    accept_bound: bool = False                      # tokens with cnf, whose proof the gateway does not see

    def __post_init__(self) -> None:
        unknown = [name for name in self.algorithms if name not in KEY_TYPES]
        if unknown or not self.algorithms:
            raise ValueError(f"algorithms {unknown} are unknown; possible are {', '.join(KEY_TYPES)}")
        symmetric = [name for name in self.algorithms if KEY_TYPES[name] == "oct"]
        if symmetric and self.secret is None:
            raise ValueError(f"{', '.join(symmetric)} needs a secret; without one remove it from algorithms")
        if self.secret is not None:
            if not symmetric:
                raise ValueError("a secret serves HS256, HS384 and HS512 only: none of them is in algorithms")
            secret_keys(self.secret, self.algorithms)
        if not 0 <= self.leeway <= 600:
            raise ValueError("leeway must be 0 to 600 seconds")
        if not 64 <= self.token_size <= 64 << 10:
            raise ValueError("token_size must be 64 bytes to 64 KiB")
        for name in self.headers:
            if not CLAIM_HEADER.fullmatch(name) or name in NOT_FOR_CLAIMS:
                raise ValueError(f"a claim cannot be put into the header {name!r}: use a lower-case name like x-auth-subject")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError("seed must be a 64-bit number")
