"""What Python sees of _speedups/authorization.pyx."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from gateway._speedups.certificates import ClientCertificate
from gateway._speedups.exchange import Exchange, RouteEntry, Step
from gateway._speedups.tcp_listener import TcpTarget

Record: TypeAlias = Callable[[str, tuple[str, ...], str, str, str, bool, int], None]

class Rule:
    @property
    def name(self) -> str: ...
    def __init__(
        self,
        name: str,
        *,
        methods: Sequence[str] | None = None,
        path: str | None = None,
        prefix: str | None = None,
        headers: Iterable[tuple[str, str, str]] = (),
        claims: Iterable[tuple[str, Iterable[str | int | float]]] = (),
        elsewhere: bool = False,
    ) -> None: ...
    @property
    def elsewhere(self) -> bool: ...
    @property
    def layer7(self) -> bool: ...
    def user(self, x: Exchange) -> bool: ...

class Caller:
    @property
    def identity(self) -> str: ...
    @property
    def rules(self) -> tuple[Rule, ...]: ...
    @property
    def entry(self) -> RouteEntry | None: ...
    @property
    def target(self) -> TcpTarget | None: ...
    def __init__(
        self, identity: str, rules: Iterable[Rule] = (), entry: RouteEntry | None = None, target: TcpTarget | None = None
    ) -> None: ...

class Authorization:
    @property
    def version(self) -> int: ...
    @property
    def audit(self) -> bool: ...
    def __init__(
        self,
        version: int,
        record: Record,
        *,
        audit: bool = False,
        entry_of: Callable[[str], RouteEntry | None] | None = None,
        target_of: Callable[[str], TcpTarget | None] | None = None,
    ) -> None: ...
    def add(self, caller: Caller) -> None: ...
    def admits(self, certificate: ClientCertificate) -> bool: ...

class AuthorizationStep(Step):
    @property
    def policy(self) -> Authorization: ...
    def __init__(self, name: str, policy: Authorization, caller: Caller | None = None) -> None: ...
