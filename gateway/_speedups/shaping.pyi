"""What Python sees of _speedups/shaping.pyx."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from gateway._speedups.exchange import RouteEntry, Shape, Step, Tap
from gateway._speedups.pool import Upstream

class Conditions:
    def __init__(
        self, headers: Iterable[tuple[str, str, str]] = (), cookies: Iterable[tuple[str, str, str]] = ()
    ) -> None: ...
    @property
    def count(self) -> int: ...

class Dice:
    def __init__(self, seed: int | None = None) -> None: ...

class Chooser:
    def __init__(
        self,
        canaries: Iterable[Conditions],
        splits: Sequence[tuple[str, int]],
        sticky: str | None = None,
        seed: int | None = None,
    ) -> None: ...
    @property
    def sticky(self) -> int: ...
    def of_key(self, key: bytes) -> int: ...
    def explain(
        self, fields: list[tuple[bytes, bytes]], client: str | None = None, source: str | None = None
    ) -> tuple[Literal["canary", "sticky", "weight"], int]: ...
    def draw(self) -> int: ...

class Shaper(Shape):
    def __init__(
        self, chooser: Chooser | None, entries: tuple[RouteEntry, ...], mirror: Mirror | None = None, *, spare: bool = False
    ) -> None: ...
    @property
    def chooser(self) -> Chooser | None: ...
    @property
    def entries(self) -> tuple[RouteEntry, ...]: ...
    @property
    def mirror(self) -> Mirror | None: ...
    @property
    def spare(self) -> bool: ...

class Mirror:
    def __init__(
        self,
        upstream: Upstream,
        *,
        send: Callable[[Copy], None],
        methods: Iterable[str],
        percent: float = 100.0,
        body: int = 65536,
        in_flight: int = 64,
        seed: int | None = None,
    ) -> None: ...
    @property
    def upstream(self) -> Upstream: ...
    @property
    def send(self) -> Callable[[Copy], None]: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def host(self) -> str | None: ...

class Copy(Tap):
    @property
    def mirror(self) -> Mirror: ...
    @property
    def head(self) -> bytes: ...
    @property
    def body(self) -> bytearray: ...
    @property
    def host(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def bodiless(self) -> bool: ...
    def finish(self, status: int) -> None: ...

class FaultStep(Step):
    def __init__(
        self,
        name: str,
        *,
        delay: float = 0.0,
        abort: int = 0,
        percent: float = 100.0,
        when: Conditions | None = None,
        seed: int | None = None,
    ) -> None: ...
    @property
    def delay(self) -> float: ...
    @property
    def abort(self) -> int: ...
