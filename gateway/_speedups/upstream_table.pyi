"""What Python sees of _speedups/upstream_table.pyx."""

from typing import Any, Final, final

from typing_extensions import Buffer

from gateway._speedups.upstream_state import EndpointState, UpstreamState

CHECKER: Final[int]
LOCK_PATIENCE: Final[float]

@final
class UpstreamTable:
    workers: int
    upstreams_max: int
    endpoints_max: int
    remembered_us: int
    def __init__(self, buffer: Buffer, offset: int, workers: int, upstreams: int, endpoints: int) -> None: ...
    @staticmethod
    def size_for(workers: int, upstreams: int, endpoints: int) -> int: ...
    @property
    def full_count(self) -> int: ...
    def upstream(self, worker: int, name: str) -> UpstreamState: ...
    def endpoint(
        self,
        worker: int,
        upstream: str,
        address: str,
        *,
        target: str | None = None,
        zone: str | None = None,
        weight: int = 1,
        now_us: int = 0,
    ) -> EndpointState: ...
    def bury(self, worker: int) -> None: ...
    def upstreams(self, now_us: int) -> list[dict[str, Any]]: ...
    def endpoints(self, now_us: int) -> list[dict[str, Any]]: ...
