"""What Python sees of _speedups/leased_limit.pyx."""

from asyncio import Future
from typing import Protocol

from gateway._speedups.lease_table import LeaseTable
from gateway._speedups.steps import RateLimitStep
from gateway._speedups.token_bucket import RateLimit

class _Limiter(Protocol):
    def ask(self, key: int, identity: bytes, waited: float, /) -> Future[tuple[bool, int, int] | None]: ...
    def prefetch(self, key: int, identity: bytes, /) -> None: ...

class Switch:
    up: bool
    def __init__(self) -> None: ...

class LeasedLimitStep(RateLimitStep):
    def __init__(
        self,
        name: str,
        rate: RateLimit,
        key: str,
        *,
        quota: int,
        window: int,
        label: str,
        limit_hash: int,
        table: LeaseTable,
        switch: Switch,
        limiter: _Limiter,
        budget_us: int,
        exact: bool,
        on_failure: str,
    ) -> None: ...
    def share(self, rate: RateLimit) -> None: ...
