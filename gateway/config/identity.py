"""The settings of the policies that say who calls: bearer tokens and API keys.

Strategy: what a mapping can contradict in itself is checked here (a secret too short for its algorithm, keys that no
algorithm uses); the key files' content is looked at in `check`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic.json_schema import WithJsonSchema

from gateway.config.base import Model, listed, needed, part, setting
from gateway.config.keyfile import read_api_keys
from gateway.config.values import Deadline, Duration, Flag, Secret, Size, Text, fault, parse_name
from gateway.config.web import ClaimHeader, FieldName, KeySource

ALGORITHMS = (
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "EdDSA",
    "HS256",
    "HS384",
    "HS512",
)
SECRET_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}  # RFC 7518 3.2: at least the size of the hash

Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "HS256", "HS384", "HS512"
]


class TokenCache(Model):
    """Verified tokens that need no second verification."""

    bytes: Size = setting("16MiB", "memory of the cache in each worker; 0 turns it off")


class Jwt(Model):
    """Verify a bearer token: signature, issuer, audience and times. Every failure is 401."""

    kind: ClassVar[str] = "jwt"

    issuer: Annotated[tuple[Text, ...], listed("text"), Field(min_length=1)] = needed(
        "who may have issued the token (`iss`)"
    )
    audience: Annotated[tuple[Text, ...], listed("text"), Field(min_length=1)] = needed(
        "whom it must be meant for (`aud`): one of these"
    )
    keys: KeySource | None = setting(
        None, "the issuer's public keys: a JWKS file, or an https URL (http for loopback only)"
    )
    algorithms: Annotated[tuple[Algorithm, ...], listed("algorithm"), Field(min_length=1)] = needed(
        "accepted signature algorithms"
    )
    secret: Secret | None = setting(None, "the shared secret of HS256, HS384 or HS512: at least 32, 48 or 64 bytes")
    leeway: Duration = setting("30s", "clock difference forgiven in exp, nbf and iat, at most 120s")
    typ: Text | None = setting(None, "required `typ` of the token's header, such as at+jwt")
    refresh: Deadline = setting("5m", "how often the keys are fetched again in the background")
    cooldown: Deadline = setting("30s", "least time between two fetches because of an unknown key id")
    token_size: Size = setting("8KiB", "longest token that is decoded at all")
    require: tuple[Text, ...] = setting(["exp"], "claims that must be present")
    headers: dict[ClaimHeader, Text] = setting({"x-auth-subject": "sub"}, "headers for the upstream, each from a claim")
    forward_token: Flag = setting(True, "forward the Authorization header to the upstream")
    cache: TokenCache = part(TokenCache, "the cache of verified tokens")
    realm: Text | None = setting(None, "realm named in WWW-Authenticate")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.leeway > 120:
            raise fault(
                "leeway is at most 120s", "repair the clocks instead: an expired token must die", at=("leeway",)
            )
        if not 256 <= self.token_size <= 65536:
            raise fault("token_size is between 256 and 64KiB", at=("token_size",))
        shared = [name for name in self.algorithms if name.startswith("HS")]
        if shared and self.secret is None:
            raise fault(
                "HS algorithms need a secret",
                "add `secret: ${env:NAME}`, or remove them from `algorithms`",
                at=("algorithms",),
            )
        if shared and self.secret is not None:
            least = max(SECRET_BYTES[name] for name in shared)
            if len(self.secret.get_secret_value().encode()) < least:
                raise fault(
                    f"a secret for these algorithms needs at least {least} bytes",
                    "make one: openssl rand -hex 64",
                    at=("secret",),
                )
        if self.secret is not None and not shared:
            raise fault(
                "a secret without an HS algorithm is never used",
                "remove it, or list HS256 in `algorithms`",
                at=("secret",),
            )
        if self.keys is None and len(shared) < len(self.algorithms):
            raise fault(
                "missing key 'keys' for these algorithms", "add `keys: jwks.json` or an https URL", at=("algorithms",)
            )
        if self.keys is not None and len(shared) == len(self.algorithms):
            raise fault(
                "keys that no listed algorithm uses", "remove `keys`, or list an algorithm such as RS256", at=("keys",)
            )
        if self.realm is not None and ('"' in self.realm or "\\" in self.realm or not self.realm.isascii()):
            raise fault("a realm is ASCII without quotes and backslashes", at=("realm",))
        return self

    @property
    def keys_url(self) -> str | None:
        """Return the URL of the keys, if they are fetched."""
        return self.keys if self.keys is not None and "://" in self.keys else None

    @property
    def keys_file(self) -> Path | None:
        """Return the absolute path of the keys, if they are a file."""
        return Path(self.keys) if self.keys is not None and "://" not in self.keys else None


def _scope(raw: Any) -> str:
    # RFC 6749 3.3: a scope token has no space, quote or backslash.
    if not isinstance(raw, str) or not raw or not all("!" <= char <= "~" and char not in '"\\' for char in raw):
        raise fault("not a scope", "a scope is one word such as payments:write")
    return raw


Scope = Annotated[str, BeforeValidator(_scope), WithJsonSchema({"type": "string", "x-is": "scope"})]


def _key_hash(raw: Any) -> str:
    hint = "write sha256: and 64 hex digits; printf %s KEY | sha256sum makes them"
    digits = raw.removeprefix("sha256:") if isinstance(raw, str) else ""
    if (
        not isinstance(raw, str)
        or not raw.startswith("sha256:")
        or len(digits) != 64
        or set(digits.lower()) - set("0123456789abcdef")
    ):
        raise fault("not the hash of a key", hint)
    return f"sha256:{digits.lower()}"


class ApiKeyEntry(Model):
    """One client's key, stored as its hash."""

    client: Annotated[str, BeforeValidator(parse_name), WithJsonSchema({"type": "string", "x-is": "name"})] = needed(
        "who it belongs to"
    )
    hash: Annotated[str, BeforeValidator(_key_hash), WithJsonSchema({"type": "string", "x-is": "sha256:HEX"})] = needed(
        "sha256: and the hex digest of the key"
    )
    scopes: tuple[Scope, ...] = setting([], "scopes that the key grants")

    @property
    def digest(self) -> bytes:
        """Return the 32 bytes of the key's SHA-256."""
        return bytes.fromhex(self.hash.removeprefix("sha256:"))


def _api_keys(raw: Any, info: ValidationInfo) -> Any:
    return read_api_keys(raw, info) if isinstance(raw, str) else raw


class ApiKey(Model):
    """Identify a client by a key in a header; keys are kept as hashes."""

    kind: ClassVar[str] = "api_key"

    header: FieldName = setting("x-api-key", "the header that holds the key")
    keys: Annotated[
        tuple[ApiKeyEntry, ...], BeforeValidator(_api_keys), Field(min_length=1, json_schema_extra={"x-also": "file"})
    ] = needed("the keys, or the path of a YAML or JSON file with this list")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        seen: set[str] = set()
        for number, entry in enumerate(self.keys):
            if entry.hash in seen:
                raise fault("the same key twice", "each key belongs to one client", at=("keys", number, "hash"))
            seen.add(entry.hash)
        return self
