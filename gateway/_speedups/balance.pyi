"""What Python sees of _speedups/balance.pyx."""

from typing import Final, final

ALGORITHMS: Final[tuple[str, ...]]

@final
class Balancer:
    def __init__(self, algorithm: int, *, slow_start_us: int = 0, load_percent: int = 125, seed: int = 0) -> None: ...
    @property
    def algorithm(self) -> int: ...
    @property
    def count(self) -> int: ...
    def reseed(self, seed: int = 0) -> None: ...
