"""What Python sees of _speedups/user_context.pyx."""

from collections.abc import Callable

from gateway._speedups.exchange import Step
from gateway._speedups.token_cache import Principal, TokenCache

class UserStep(Step):
    def __init__(self, name: str, check: Callable[[bytes], Principal], cache: TokenCache, *, from_caller: bool) -> None: ...

class TellUserStep(Step):
    def __init__(self, name: str, make: Callable[[Principal], tuple[bytes, int] | None]) -> None: ...
