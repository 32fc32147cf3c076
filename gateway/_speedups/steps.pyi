"""The built-in policies as compiled steps."""

from collections.abc import Iterable
from typing import Any

from gateway._speedups.exchange import Step
from gateway._speedups.journal import Journal
from gateway._speedups.token_bucket import RateLimit
from gateway._speedups.token_cache import TokenCache

AUDIT_FIELDS: tuple[str, ...]

class JwtStep(Step):
    def __init__(self, name: str, verifier: Any, cache: TokenCache, realm: str = "crossway") -> None: ...

class ApiKeyStep(Step):
    def __init__(self, name: str, header: str, keys: Any, cache: TokenCache) -> None: ...

class ScopesStep(Step):
    def __init__(self, name: str, required: Iterable[str]) -> None: ...

class ClaimsStep(Step):
    def __init__(self, name: str, required: Any) -> None: ...

class IpStep(Step):
    def __init__(self, name: str, allow: Iterable[object] = (), deny: Iterable[object] = ()) -> None: ...

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
