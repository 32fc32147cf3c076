"""What Python sees of _speedups/pool.pyx."""

from collections.abc import Iterable

class Endpoint:
    active: int
    retired: bool
    def __init__(self, address: str, weight: int = 1) -> None: ...
    @property
    def address(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def host_field(self) -> bytes: ...
    @property
    def weight(self) -> int: ...
    @property
    def numeric(self) -> bool: ...
    @property
    def idle_connections(self) -> int: ...
    def set_addresses(self, hosts: Iterable[str]) -> int: ...

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
        retry_connect: bool = True,
        host: str = "preserve",
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def endpoints(self) -> list[Endpoint]: ...
