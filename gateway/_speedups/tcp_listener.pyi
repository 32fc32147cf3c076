"""What Python sees of _speedups/tcp_listener.pyx."""

from collections.abc import Iterable

from gateway._speedups.authorization import Authorization
from gateway._speedups.pool import Upstream

class TcpTarget:
    def __init__(self, upstream: Upstream, metric: int) -> None: ...
    @property
    def upstream(self) -> Upstream: ...
    @property
    def metric(self) -> int: ...

class TcpListener:
    def __init__(
        self,
        metric: int,
        *,
        default: TcpTarget | None = None,
        sni: dict[str, TcpTarget] | None = None,
        idle: float = 3600,
        hello: float = 10,
        connections: int = 1024,
        allow: Iterable[str] | None = None,
        announce: bool = False,
        postgres: bool = False,
        policy: Authorization | None = None,
    ) -> None: ...
    @property
    def metric(self) -> int: ...
    @property
    def policy(self) -> Authorization | None: ...
