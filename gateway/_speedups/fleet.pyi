"""A balancer and its candidates as a Python object, for tests, simulations and benchmarks only."""

from collections.abc import Iterable
from typing import final

SAMPLES: tuple[str, ...]

def hash_key(key: bytes) -> int: ...
@final
class Fleet:
    def __init__(
        self,
        algorithm: int,
        weights: Iterable[int],
        *,
        names: Iterable[str] | None = None,
        slow_start_us: int = 0,
        load_percent: int = 125,
        seed: int = 1,
    ) -> None: ...
    def join(self, members: Iterable[int]) -> None: ...
    def choose(self, now: int, key: int = 0, avoid: int = -1, safe: bool = True) -> int: ...
    def count(self, choices: int, now: int, step: int = 0) -> list[int]: ...
    def start(self, index: int, now: int = 0) -> None: ...
    def finish(self, index: int, now: int, rtt_us: int, sample: str = "good", retry_after_us: int = 0) -> None: ...
    def set(
        self,
        index: int,
        *,
        usable: bool | None = None,
        local: bool | None = None,
        weight: int | None = None,
        born: int | None = None,
        elsewhere: int | None = None,
        tell: bool = True,
    ) -> None: ...
    def expected_us(self, index: int, now: int) -> float: ...
    def in_flight(self, index: int) -> int: ...
    @property
    def typical_us(self) -> float: ...
    @property
    def places(self) -> list[int]: ...
