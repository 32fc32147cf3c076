"""The settings of HTTP/2 towards clients (`listeners.X.http2`) and towards upstreams (`upstreams.X.http2`).

Strategy: numbers that bound what one connection may cost, with defaults that suit payment traffic; the bounds are those of
RFC 9113 and of the engine. What goes together with TLS, routes and checks is looked at in `check_http2`.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from gateway.config.base import Model, setting
from gateway.config.values import Deadline, Duration, Flag, Int, Size, fault

# As in _speedups/http2_settings.pxd.
STREAMS_MAX = 10_000
WINDOW_MIN = 16_384
WINDOW_DEFAULT = 65_535
WINDOW_MAX = 2**31 - 1
BURST_MAX = 1_000_000
PING_LEAST, PING_TIMEOUT_LEAST, PING_MOST = 1.0, 0.1, 3600.0


class _Connection(Model):
    """What both sides have."""

    def _check(self, window: int, connection_window: int) -> None:
        if not WINDOW_MIN <= window <= WINDOW_MAX:
            raise fault("a stream's window is 16KiB to 2147483647 bytes", "256KiB suits most", at=("window",))
        if not WINDOW_DEFAULT <= connection_window <= WINDOW_MAX:
            raise fault(
                "a connection's window is 65535 to 2147483647 bytes", "HTTP/2 begins with 65535 and cannot take any of it back",
                at=("connection_window",),
            )


class ListenerHttp2(_Connection):
    """HTTP/2 towards clients. With TLS it is offered beside HTTP/1.1 (ALPN)."""

    clear: Flag = setting(False, "without TLS: let clients speak it from the first byte (prior knowledge, h2c)")
    streams: Int = Field(default=100, ge=1, le=STREAMS_MAX, description="requests that a connection may carry at once")
    window: Size = setting("256KiB", "bytes of a request's body that may arrive before they are taken; 16KiB to 2147483647")
    connection_window: Size = setting("1MiB", "the same for all requests of a connection together; from 65535")
    resets: Int = Field(
        default=100, ge=1, le=BURST_MAX,
        description="requests in a row that a client may cancel before it is sent away (GOAWAY); 10 each second come back",
    )
    frames: Int = Field(
        default=1000, ge=1, le=BURST_MAX,
        description="frames in a row that carry nothing (PING, SETTINGS, PRIORITY, empty DATA, and so on), likewise; 100 each second come back",
    )

    @model_validator(mode="after")
    def _windows(self) -> Self:
        self._check(self.window, self.whole_window)
        return self

    @property
    def whole_window(self) -> int:
        """Return the connection's window in bytes."""
        return self.connection_window


class UpstreamHttp2(_Connection):
    """HTTP/2 towards an upstream that speaks it."""

    streams: Int = Field(
        default=100, ge=1, le=STREAMS_MAX,
        description="requests that a connection carries at once; fewer when the server allows fewer",
    )
    window: Size = setting("256KiB", "bytes of an answer's body that may arrive before they are taken; 16KiB to 2147483647")
    connection_window: Size | None = setting(
        None, "the same for all answers of a connection together; from 65535; default: `streams` times `window`, so that no client waits for another"
    )
    ping: Duration = setting(
        "10s", "a connection that carries requests, or is to carry one, and has said nothing for so long is asked by a PING, at most twice until it sends "
        "payload; 1s to 1h, 0s: never"
    )
    ping_timeout: Deadline = setting("10s", "without an answer to it, after which the connection is given up; 100ms to 1h")

    @model_validator(mode="after")
    def _windows(self) -> Self:
        self._check(self.window, self.whole_window)
        return self

    @model_validator(mode="after")
    def _pings(self) -> Self:
        if self.ping and not PING_LEAST <= self.ping <= PING_MOST:
            raise fault("a PING is sent after 1s to 1h of silence", "10s suits most; 0s sends none", at=("ping",))
        if not PING_TIMEOUT_LEAST <= self.ping_timeout <= PING_MOST:
            raise fault("an answer to a PING is waited for from 100ms to 1h", "10s suits most", at=("ping_timeout",))
        return self

    @property
    def whole_window(self) -> int:
        """Return the connection's window in bytes, said or not."""
        if self.connection_window is not None:
            return self.connection_window
        return max(WINDOW_DEFAULT, min(self.streams * self.window, WINDOW_MAX))


def widen_http2(raw: Any) -> Any:
    """`true` stands for all defaults, `false` for none."""
    if isinstance(raw, bool):
        return {} if raw else None
    return raw
