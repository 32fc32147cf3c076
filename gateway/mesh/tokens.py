"""Tokens by which an instance joins: for one service, used once, for ten minutes.

Strategy: a token names itself (to be found) and holds a secret (to be believed); the store keeps the secret's hash only, compared in constant
time. It is spent by one statement that changes one row or none, so two that present it at once do not both get in.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass

from gateway.mesh.store import Store

LIFE = 600.0  # seconds
KEPT = 7 * 86400  # seconds that a spent or expired token is remembered for the record
MOST = 4096  # characters


class BadToken(Exception):
    """A token that lets nobody in; the text is told to whoever presented it."""


@dataclass(frozen=True)
class Presented:
    """What a token says of itself, not yet believed."""

    service: str
    id: str
    secret: str


async def make(store: Store, service: str, root_digest: str, life: float = LIFE) -> str:
    """Return a new token as one line."""
    name, secret, now = secrets.token_hex(8), secrets.token_urlsafe(32), int(time.time())
    expires = now + int(life)
    await store.run("DELETE FROM tokens WHERE expires < ?", now - KEPT)
    await store.run(
        "INSERT INTO tokens (id, hash, service, expires, made) VALUES (?, ?, ?, ?, ?)", name, _hash(secret), service, expires, now
    )
    said = {"service": service, "secret": f"{name}.{secret}", "control_ca": root_digest, "expires": expires}
    return base64.urlsafe_b64encode(json.dumps(said).encode()).rstrip(b"=").decode("ascii")


def read(text: object) -> Presented:
    """Parse a token. Raises BadToken."""
    if isinstance(text, str) and len(text) <= MOST:
        try:
            line = text.strip()
            said = json.loads(base64.b64decode(line + "=" * (-len(line) % 4), altchars=b"-_", validate=True))
            name, dot, secret = said["secret"].partition(".")
            if dot and name.isalnum() and isinstance(said["service"], str):
                return Presented(said["service"], name, secret)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
    raise BadToken("this is no token of `crossway mesh token`")


async def check(store: Store, presented: Presented) -> None:
    """Raise BadToken unless the token would let in now."""
    found = await store.rows("SELECT hash, service, expires, used FROM tokens WHERE id = ?", presented.id)
    # An unknown name costs the same comparison as a wrong secret, and is told the same.
    known = found[0]["hash"] if found else _hash("")
    right = hmac.compare_digest(known, _hash(presented.secret))
    if not found or not right or found[0]["service"] != presented.service:
        raise BadToken("the token is not known here")
    if found[0]["used"] is not None:
        raise BadToken("the token has been used: make a new one with `crossway mesh token`")
    if found[0]["expires"] < time.time():
        raise BadToken("the token has expired: make a new one with `crossway mesh token`")


async def spend(store: Store, presented: Presented, instance: str) -> None:
    """Use up a token that was checked. Raises BadToken when somebody else was faster."""
    now = int(time.time())
    changed = await store.run(
        "UPDATE tokens SET used = ?, instance = ? WHERE id = ? AND hash = ? AND used IS NULL AND expires >= ?",
        now, instance, presented.id, _hash(presented.secret), now,
    )  # fmt: skip
    if changed != 1:
        raise BadToken("the token has been used: make a new one with `crossway mesh token`")


def _hash(secret: str) -> str:
    # 256 random bits: a fast hash is enough, there is nothing to guess.
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()
