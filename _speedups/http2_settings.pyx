"""What a listener or an upstream allows on its HTTP/2 connections; see http2_settings.pxd.

Strategy: bounds are enforced here a second time, because the engine does arithmetic with these numbers and trusts them.
Python is called from here: while a snapshot is built.
"""

from libc.stdint cimport int64_t, uint32_t


cdef uint32_t bounded(str name, int64_t value, int64_t least, int64_t most) except? 0:
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}: it must be {least} to {most}")
    return <uint32_t>value


cdef class Http2:
    """Limits of one HTTP/2 connection: windows in bytes, bursts in streams and frames, times in seconds.

    The defaults are a listener's; what an upstream gets by default, the configuration says. Raises ValueError when a number is
    out of its bounds.
    """

    def __init__(self, *, int64_t streams=100, int64_t window=262144, int64_t connection_window=1048576, int64_t resets=100,
                 int64_t frames=1000, bint clear=False, double ping=0, double ping_timeout=10):
        self.streams = bounded("streams", streams, 1, STREAMS_MAX)
        self.window = bounded("window", window, WINDOW_MIN, WINDOW_MAX)
        self.connection_window = bounded("connection_window", connection_window, WINDOW_DEFAULT, WINDOW_MAX)
        self.resets = bounded("resets", resets, 1, BURST_MAX)
        self.frames = bounded("frames", frames, 1, BURST_MAX)
        self.clear = clear
        self.ping_us = <int64_t>bounded("ping (ms)", round(ping * 1000), PING_LEAST_MS, PING_MOST_MS) * 1000 if ping else 0
        self.ping_timeout_us = <int64_t>bounded("ping_timeout (ms)", round(ping_timeout * 1000), PING_TIMEOUT_LEAST_MS, PING_MOST_MS) * 1000

    def __repr__(self) -> str:
        return (f"Http2(streams={self.streams}, window={self.window}, connection_window={self.connection_window}, "
                f"resets={self.resets}, frames={self.frames}, clear={bool(self.clear)}, ping={self.ping_us / 1e6:g}, "
                f"ping_timeout={self.ping_timeout_us / 1e6:g})")

    def __eq__(self, other) -> bool:
        if not isinstance(other, Http2):
            return NotImplemented
        return repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))
