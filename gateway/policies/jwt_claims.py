"""From verified claims to a Principal: every claim that the gateway uses has the right type, time and alphabet.

Strategy: types are compared exactly (True is no number, a string no list: "pay" in "payments" is true in Python), names
are compared whole, and text that goes into a header or a log has no control characters, no bidirectional overrides and no
space at its ends. A claim the gateway does not use is passed on as it is. RFC 7519 4, RFC 9068 4, RFC 8725.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from gateway._speedups.token_cache import Principal
from gateway.policies.jwt_settings import JwtSettings, TokenError

LATEST = 253_402_300_799        # 9999-12-31: a date in milliseconds is beyond it
MAX_TEXT = 1024                 # characters of a claim that becomes a header or a name
UNLIMITED = 300                 # seconds for which a token without exp is remembered

# C0, DEL, C1, line and paragraph separators, bidirectional controls, byte order mark, surrogates.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")         # RFC 6749 3.3


def principal_of(claims: dict[str, Any], settings: JwtSettings, now: float) -> Principal:
    """The caller whom `claims` name at `now` (unix seconds). Raises TokenError."""
    for name in settings.require:
        if claims.get(name) in (None, "", []):
            raise TokenError("token-claim", "the token lacks a claim that is required here")
    issuer = _issuer(claims, settings)
    _audience(claims, settings)
    expires = _times(claims, settings, now)
    if "cnf" in claims and not settings.accept_bound:
        raise TokenError("token-bound", "the token is bound to a key whose proof is not checked here")
    client = _text(claims, "client_id") or _text(claims, "azp")
    subject = _text(claims, "sub") or client
    if not subject:
        raise TokenError("token-claim", "the token names neither a subject nor a client")
    return Principal(
        subject=subject,
        client=client or subject,
        issuer=issuer,
        scopes=_scopes(claims),
        claims=claims,
        expires=expires,
        seed=settings.seed,
        headers=_headers({**claims, "sub": subject}, settings.headers),
        audit_name=json.dumps(subject)[1:-1].encode("ascii"),
    )


def _text(claims: Mapping[str, Any], name: str) -> str:
    """The claim as text that is safe in a header and a log; "" when it is absent."""
    return _clean(claims[name]) if name in claims else ""


def _clean(value: Any) -> str:
    if type(value) is not str or not 0 < len(value) <= MAX_TEXT:
        raise TokenError("token-claim", f"a claim that names somebody is not a string of 1 to {MAX_TEXT} characters")
    if _CONTROL.search(value) or value[0] == " " or value[-1] == " ":
        raise TokenError("token-claim", "a claim that names somebody holds control characters or outer spaces")
    return value


def _issuer(claims: Mapping[str, Any], settings: JwtSettings) -> str:
    issuer = _text(claims, "iss")
    if settings.issuers and issuer not in settings.issuers:         # a tuple: whole strings are compared
        raise TokenError("token-issuer", "the token is from another issuer")
    return issuer


def _audience(claims: Mapping[str, Any], settings: JwtSettings) -> None:
    if "aud" not in claims and not settings.audiences:
        return
    audience = claims.get("aud")
    names = audience if type(audience) is list else [audience]
    if any(type(name) is not str for name in names) or not any(name in settings.audiences for name in names):
        raise TokenError("token-audience", "the token is for another audience")


def _date(claims: Mapping[str, Any], name: str) -> float | None:
    """A NumericDate (RFC 7519 2), None when absent."""
    if name not in claims:
        return None
    value = claims[name]
    if type(value) not in (int, float) or not 0 <= value <= LATEST:
        raise TokenError("token-claim", f"the token's {name} is not a date in seconds")
    return float(value)


def _times(claims: Mapping[str, Any], settings: JwtSettings, now: float) -> int:
    """Check exp, nbf and iat; the first unix second at which the token is not accepted any more."""
    exp, nbf, iat = _date(claims, "exp"), _date(claims, "nbf"), _date(claims, "iat")
    if exp is not None and now >= exp + settings.leeway:
        raise TokenError("token-expired", "the token has expired")
    if nbf is not None and now < nbf - settings.leeway:
        raise TokenError("token-early", "the token is not valid yet")
    if iat is not None and now < iat - settings.leeway:
        raise TokenError("token-early", "the token was issued in the future")
    begin = now if iat is None else iat
    if settings.max_lifetime is not None and (exp is None or exp - begin > settings.max_lifetime):
        raise TokenError("token-lifetime", "the token lives longer than is allowed here")
    return math.floor(now) + UNLIMITED if exp is None else math.floor(exp + settings.leeway)


def _scopes(claims: Mapping[str, Any]) -> frozenset[str]:
    """`scope` (RFC 8693 4.2), else `scp`: space-separated, or a list of single scopes."""
    value = claims.get("scope", claims.get("scp", ""))
    if type(value) is str:
        scopes = [scope for scope in value.split(" ") if scope]     # not split(): it takes every Unicode space
    elif type(value) is list and all(type(scope) is str for scope in value):
        scopes = value
    else:
        raise TokenError("token-claim", "the token's scope is neither a string nor a list of strings")
    if not all(_SCOPE.fullmatch(scope) for scope in scopes):
        raise TokenError("token-claim", "the token's scope holds characters that a scope cannot have")
    return frozenset(scopes)


def _headers(claims: Mapping[str, Any], headers: Mapping[str, str]) -> bytes:
    """The header lines for upstream; a claim that is absent or null gives none."""
    lines = [
        f"{name}: {_header_value(claims[claim])}\r\n"
        for name, claim in headers.items()
        if claims.get(claim) is not None
    ]
    return "".join(lines).encode("utf-8")


def _header_value(value: Any) -> str:
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is int:
        return str(value)
    if type(value) is list:
        items = [_clean(item) for item in value]
        text = ",".join(items)
        if len(text) > MAX_TEXT or any("," in item for item in items):
            raise TokenError("token-claim", "a list in the token cannot be put into a header without ambiguity")
        return text
    return _clean(value)
