"""What Python sees of _speedups/steps.pyx."""

from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from gateway._speedups.exchange import Step
from gateway._speedups.journal import Journal
from gateway._speedups.token_bucket import RateLimit
from gateway._speedups.token_cache import Principal, TokenCache

AUDIT_FIELDS: Final[tuple[str, ...]]

class _Verifier(Protocol):
    # An awaitable while the issuer has to be asked, else the verdict itself.
    def check(self, token: bytes, /) -> object: ...

class JwtStep(Step):
    def __init__(self, name: str, verifier: _Verifier, cache: TokenCache, realm: str = "crossway") -> None: ...

class ApiKeyStep(Step):
    def __init__(self, name: str, header: str, keys: Iterable[tuple[bytes, Principal]], cache: TokenCache) -> None: ...

class ScopesStep(Step):
    def __init__(self, name: str, required: Iterable[str]) -> None: ...

class ClaimsStep(Step):
    def __init__(self, name: str, required: Mapping[str, Iterable[str | int | float | bool]]) -> None: ...

class IpStep(Step):
    def __init__(self, name: str, allow: Iterable[str] = (), deny: Iterable[str] = ()) -> None: ...

class HeadLimitsStep(Step):
    def __init__(self, name: str, *, head: int = 0, fields: int = 0) -> None: ...

class RateLimitStep(Step):
    def __init__(self, name: str, rate: RateLimit, key: str, *, window: int, label: str) -> None: ...

class CorsStep(Step):
    def __init__(
        self,
        name: str,
        origins: Iterable[str],
        methods: Iterable[str],
        headers: Iterable[str],
        expose: Iterable[str],
        credentials: bool,
        max_age: int,
    ) -> None: ...

class AuditStep(Step):
    def __init__(self, name: str, journal: Journal, fields: Iterable[str] | None = None) -> None: ...
