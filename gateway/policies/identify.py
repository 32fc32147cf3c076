"""jwt and api_key: who calls?

Strategy: one verifier and one token cache per named policy. Keys outlive a reload: a new snapshot's source takes over what
the one before it had fetched from the same place, so that no request waits for the issuer because of a reload.
"""

from __future__ import annotations

import asyncio
from typing import Any

from gateway._speedups.steps import ApiKeyStep, JwtStep
from gateway._speedups.token_cache import Principal, TokenCache
from gateway.config.policies import ApiKey, Jwt
from gateway.policies.base import RouteParts, SettingError, Use
from gateway.policies.jwt_keys import KeysError
from gateway.policies.jwt_settings import JwtSettings
from gateway.policies.jwt_source import KeySource, open_source
from gateway.policies.jwt_verify import Verifier

NEVER = 2**62               # an API key has no end of its own

_sources: dict[tuple[str, tuple[str, ...]], KeySource] = {}         # the newest of each place, in this process


class RunningSource:
    """A key source as a snapshot's background work."""

    def __init__(self, source: KeySource) -> None:
        self.source = source

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.source.start()

    def stop(self) -> None:
        self.source.stop()

    async def settled(self) -> None:
        """Return when there are keys, or the first attempt to get some has ended."""
        if not self.source.keys.keys:
            await self.source.refetch()         # joins the attempt that start() began


def compile_jwt(settings: Jwt, use: Use, parts: RouteParts) -> None:
    verifier, cache = use.workshop.shared("jwt", use.name, lambda: _verifier(settings, use))
    parts.steps.append(JwtStep(use.name, verifier, cache, settings.realm or "crossway"))
    parts.strip_authorization = parts.strip_authorization or not settings.forward_token
    use.workshop.identity_names.update(name.lower().encode("ascii") for name in settings.headers)


def _verifier(settings: Jwt, use: Use) -> tuple[Verifier, TokenCache]:
    cache = TokenCache(settings.cache.bytes)
    source: KeySource | None = None
    if settings.keys is not None:
        public = tuple(name for name in settings.algorithms if not name.startswith("HS"))
        try:
            source = open_source(
                settings.keys, public, base=use.workshop.base, refresh=settings.refresh, cooldown=settings.cooldown,
                on_change=cache.invalidate,
            )
        except ValueError as error:
            raise SettingError(str(error), at=("keys",)) from None
        previous = _sources.get((settings.keys, public))
        if not (previous is not None and settings.keys_url and source.adopt(previous)):
            _load(source, use)
        _sources[(settings.keys, public)] = source
        use.workshop.sources.append(RunningSource(source))
    demands = JwtSettings(
        issuers=settings.issuer,
        audiences=settings.audience,
        algorithms=settings.algorithms,
        secret=None if settings.secret is None else settings.secret.get_secret_value().encode(),
        leeway=settings.leeway,
        typ=settings.typ,
        token_size=settings.token_size,
        require=settings.require,
        headers=settings.headers,
        seed=use.workshop.seed,
    )
    return Verifier(demands, source), cache


def _load(source: KeySource, use: Use) -> None:
    """Read what needs no network; keys that are left out are worth a note, a set without any is an error."""
    try:
        source.load()
    except KeysError as error:
        raise SettingError(str(error), at=("keys",)) from None
    use.workshop.notes += [((*use.place, "keys"), f"the key set: {note}; it is not used") for note in source.keys.notes]


def compile_api_key(settings: ApiKey, use: Use, parts: RouteParts) -> None:
    keys, cache = use.workshop.shared("api_key", use.name, lambda: _keys(settings, use))
    parts.steps.append(ApiKeyStep(use.name, settings.header, keys, cache))
    use.workshop.identity_names.add(b"x-auth-subject")


def _keys(settings: ApiKey, use: Use) -> tuple[list[tuple[bytes, Any]], TokenCache]:
    keys = [
        (
            entry.digest,
            Principal(
                subject=entry.client, client=entry.client, issuer=f"api_key:{use.name}", scopes=entry.scopes, claims={},
                expires=NEVER, seed=use.workshop.seed, headers=f"x-auth-subject: {entry.client}\r\n".encode("ascii"),
            ),
        )
        for entry in settings.keys
    ]
    return keys, TokenCache(1 << 20)
