"""What Python sees of _speedups/http2_settings.pyx."""

class Http2:
    def __init__(
        self,
        *,
        streams: int = 100,
        window: int = 262144,
        connection_window: int = 1048576,
        resets: int = 100,
        frames: int = 1000,
        clear: bool = False,
        ping: float = 0,
        ping_timeout: float = 10,
    ) -> None: ...
    @property
    def streams(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def connection_window(self) -> int: ...
    @property
    def resets(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def clear(self) -> bool: ...
    @property
    def ping_us(self) -> int: ...
    @property
    def ping_timeout_us(self) -> int: ...
