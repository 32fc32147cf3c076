"""What Python sees of _speedups/pool.pyx."""

from collections.abc import Iterable

class Endpoint:
    active: int
    retired: bool
    def __init__(self, address: str, weight: int = 1, *, target: str | None = None, zone: str | None = None) -> None: ...
    @property
    def address(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def host_field(self) -> bytes: ...
    @property
    def weight(self) -> int: ...
    @property
    def zone(self) -> str | None: ...
    @property
    def idle_connections(self) -> int: ...

class Upstream:
    active: int
    def __init__(
        self,
        name: str,
        endpoints: list[Endpoint],
        *,
        connect: float = 2,
        head: float = 15,
        idle: float = 30,
        total: float = 60,
        keep_connections: int = 64,
        keep_idle: float = 55,
        keep_age: float = 3600,
        requests: int = 1024,
        host: str = "preserve",
        attempts: int = 1,
        retry_on: Iterable[str] = ("connect-failure",),
        per_try: float = 0,
        backoff: float = 0.025,
        backoff_max: float = 0.25,
        replay: int = 65536,
        honours_key: bool = False,
        hedge: float = 0,
        finish_abandoned: bool = True,
        pending: int = 256,
        queue: float = 1,
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def endpoints(self) -> list[Endpoint]: ...
    @property
    def unresolved(self) -> set[str]: ...
    def replace(self, endpoints: list[Endpoint]) -> tuple[list[Endpoint], list[Endpoint]]: ...
    def adopt(self, old: Upstream) -> None: ...
    def abandon(self) -> None: ...
