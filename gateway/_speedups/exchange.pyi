"""What Python sees of _speedups/exchange.pyx."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from gateway._speedups.certificates import ClientCertificate
from gateway._speedups.http2_settings import Http2
from gateway._speedups.journal import Journal
from gateway._speedups.pool import Upstream
from gateway._speedups.route_trie import Route, RouteTrie
from gateway._speedups.tls import TlsListener

def return_free_memory() -> None: ...

class Networks:
    def __init__(self, networks: Iterable[str] = ()) -> None: ...
    def __contains__(self, address: str) -> bool: ...

class Step:
    body_limit: int
    timeout: float
    @property
    def phase(self) -> int: ...
    @property
    def name(self) -> str: ...

class Edits:
    def __init__(self, remove: Iterable[bytes] = (), add: bytes = b"") -> None: ...
    @property
    def remove(self) -> tuple[bytes, ...]: ...
    @property
    def add(self) -> bytes: ...

class Shape: ...
class Tap: ...

class Tunnels:
    def __init__(self, metric: int, *, idle: float = 300, most: int = 1024, expire: bool = True) -> None: ...
    @property
    def metric(self) -> int: ...

class RouteEntry(Route):
    def __init__(
        self,
        name: str,
        index: int,
        *,
        upstream: Upstream,
        metric: int,
        steps: tuple[Step, ...] = (),
        body_limit: int = -1,
        head: float = 0,
        idle: float = 0,
        total: float = 0,
        request_edits: Edits | None = None,
        response_edits: Edits | None = None,
        rewrite_prefix: bytes | None = None,
        rewrite_path: tuple[bytes | int, ...] | None = None,
        rewrite_host: bytes | None = None,
        audits: tuple[Step, ...] = (),
        response_hooks: tuple[Step, ...] = (),
        end_hooks: tuple[Step, ...] = (),
        strip_authorization: bool = False,
        cors: Step | None = None,
        shape: Shape | None = None,
        tunnels: Tunnels | None = None,
        unswitched: bytes | None = None,
        grpc_web: bool = False,
    ) -> None: ...
    @property
    def upstream(self) -> Upstream: ...
    @property
    def metric(self) -> int: ...
    @property
    def label(self) -> bytes: ...
    @property
    def step_names(self) -> list[str]: ...

class ListenerEntry:
    def __init__(
        self,
        name: str,
        trie: RouteTrie,
        *,
        head_limit: int = 32768,
        target_limit: int = 8192,
        fields: int = 100,
        body_limit: int = 1048576,
        head: float = 10,
        body: float = 30,
        keepalive: float = 75,
        write: float = 30,
        requests: int = 10000,
        connections: int = 10000,
        trusted: Iterable[str] = (),
        proxy_protocol: str = "off",
        tls: TlsListener | None = None,
        http2: Http2 | None = None,
        tcp: Any = None,
        originals: dict[tuple[str, int], str] | None = None,
    ) -> None: ...
    leaving: bool
    @property
    def name(self) -> str: ...
    @property
    def tls(self) -> TlsListener | None: ...
    @property
    def originals(self) -> dict[tuple[str, int], str] | None: ...
    @property
    def http2(self) -> Http2 | None: ...
    @property
    def tcp(self) -> Any: ...

class Snapshot:
    journals: list[Journal]
    sources: list[Any]
    condemned: Callable[[ClientCertificate], bool] | None
    identity_names: tuple[bytes, ...]
    unrouted: int
    def __init__(
        self,
        version: int,
        digest: str,
        listeners: dict[str, ListenerEntry],
        upstreams: dict[str, Upstream],
        routes: list[RouteEntry],
    ) -> None: ...
    @property
    def version(self) -> int: ...
    @property
    def digest(self) -> str: ...
    @property
    def listeners(self) -> dict[str, ListenerEntry]: ...
    @property
    def upstreams(self) -> dict[str, Upstream]: ...
    @property
    def routes(self) -> list[RouteEntry]: ...
    def adopt(self, old: Snapshot) -> list[Any]: ...
    def start(self, loop: asyncio.AbstractEventLoop) -> None: ...
    def stop(self) -> None: ...

class Exchange:
    generation: int
