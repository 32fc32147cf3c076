"""What Python sees of _speedups/pool.pyx."""

from collections.abc import Iterable
from typing import Any

from gateway._speedups.http2_settings import Http2
from gateway._speedups.tls import TlsUpstream
from gateway._speedups.upstream_table import UpstreamTable

def private_table() -> UpstreamTable: ...

SHARED_WINDOW: int

class Endpoint:
    retired: bool
    def __init__(self, address: str, weight: int = 1, *, target: str | None = None, zone: str | None = None) -> None: ...
    @property
    def address(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def host_field(self) -> bytes: ...
    @property
    def weight(self) -> int: ...
    @property
    def zone(self) -> str | None: ...
    @property
    def idle_connections(self) -> int: ...

class Upstream:
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
        host: str = "preserve",
        requests: int = 1024,
        endpoint_requests: int = 0,
        connections: int = 0,
        pending: int = 256,
        queue: float = 1,
        adaptive: dict[str, Any] | None = None,
        balance: str = "p2c_ewma",
        key: str = "",
        load: int = 125,
        slow_start: float = 0,
        zone: str | None = None,
        attempts: int = 1,
        retry_on: Iterable[str] = ("connect-failure",),
        per_try: float = 0,
        backoff: float = 0.025,
        backoff_max: float = 0.25,
        replay: int = 65536,
        honours_key: bool = False,
        budget: float = 0.2,
        reserve: int = 10,
        hedge: float = 0,
        finish_abandoned: bool = True,
        eject: dict[str, Any] | None = None,
        panic: bool = False,
        table: UpstreamTable | None = None,
        worker: int = 0,
        tls: TlsUpstream | None = None,
        protocol: str = "http1",
        http2: Http2 | None = None,
        foreign: bool = False,
    ) -> None: ...
    @property
    def tls(self) -> TlsUpstream | None: ...
    @property
    def protocol_name(self) -> str: ...
    @property
    def http2(self) -> Http2 | None: ...
    def equivalent(self, other: Upstream) -> bool: ...
    @property
    def name(self) -> str: ...
    @property
    def endpoints(self) -> list[Endpoint]: ...
    @property
    def unresolved(self) -> set[str]: ...
    @property
    def zone(self) -> str | None: ...
    def replace(self, endpoints: list[Endpoint]) -> tuple[list[Endpoint], list[Endpoint]]: ...
    def adopt(self, old: Upstream) -> None: ...
    def abandon(self) -> None: ...
