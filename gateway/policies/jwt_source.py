"""Where verification keys come from and how they stay current: a JWK set in a file or at a URL.

Strategy: `keys` is replaced by one assignment, only by a set that parsed, so whatever the issuer or the file does the last
good keys stay. One attempt is in flight at a time; everybody who needs one waits for it. A token with an unknown kid may
ask for an attempt, but only one per cool-down, so a storm of invented kids costs the issuer nothing. Failures back off
exponentially, with jitter so that workers do not ask in step. When the keys really changed, `on_change` is called; the
verified-token cache is emptied there.
"""

import asyncio
import logging
import os
import random
import ssl
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gateway.policies.jwt_fetch import FetchError, Origin, fetch
from gateway.policies.jwt_keys import MAX_DOCUMENT, KeysError, KeySet, parse_key_set

log = logging.getLogger(__name__)

FILE_REFRESH = 10.0             # seconds between two looks at a file's time: one stat()
URL_REFRESH = 300.0             # seconds; issuers publish new keys hours before they sign with them
COOLDOWN = 30.0                 # seconds between attempts that unknown kids may cause
FETCH_TIMEOUT = 5.0             # seconds, for one whole attempt
JITTER = 0.1                    # of the delay, in both directions


class KeySource:
    """Keys that may change. Subclasses say how a document is read.

    `location` names it in messages. Times are in seconds of `clock`, which is monotonic.
    """

    def __init__(
        self,
        location: str,
        algorithms: Sequence[str],
        *,
        refresh: float,
        cooldown: float = COOLDOWN,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[], object] | None = None,
    ) -> None:
        self.location = location
        self.algorithms = tuple(algorithms)
        self.refresh = refresh
        self.cooldown = cooldown
        self.on_change = on_change
        self.keys = KeySet()
        self.error: str | None = None               # why the last attempt failed
        self.fetches = 0                            # attempts, for metrics as the next three
        self.failures = 0
        self.changes = 0
        self.suppressed = 0                         # refetches that the cool-down refused
        self._clock = clock
        self._last: float | None = None             # when the last attempt began
        self._streak = 0                            # failures since the last success
        self._flight: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def _read(self) -> bytes | None:
        """The document, or None when it is certainly unchanged. Raises FetchError, KeysError or OSError."""
        raise KeysError(f"{self.location}: a bare KeySource reads nothing")

    def load(self) -> None:
        """Read now if that needs no network. Raises KeysError, naming the location."""

    def start(self) -> None:
        """Begin to keep the keys current, on the running loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name=f"keys of {self.location}")

    def stop(self) -> None:
        """End the background work; the keys stay."""
        for task in (self._task, self._flight):
            if task is not None:
                task.cancel()
        self._task = self._flight = None

    def adopt(self, previous: "KeySource") -> bool:
        """Begin with the keys of a former source of the same place, so that a reload needs no issuer."""
        if (previous.location, previous.algorithms) != (self.location, self.algorithms) or not previous.keys.keys:
            return False
        self.keys = previous.keys
        return True

    def may_refetch(self) -> bool:
        """Whether refetch() would wait for an attempt rather than return at once."""
        return self._flight is not None or self._last is None or self._clock() - self._last >= self.cooldown

    async def refetch(self) -> bool:
        """Wait for an attempt, one's own or that of somebody before; whether the keys changed. Never raises.

        Returns at once within the cool-down of the last attempt.
        """
        if not self.may_refetch():
            self.suppressed += 1
            return False
        before = self.keys.generation
        attempt = self._attempt()
        try:
            await asyncio.shield(attempt)           # who waits may be cancelled; the attempt goes on
        except asyncio.CancelledError:
            if not attempt.cancelled():             # else stop() ended it, and the waiter goes on without
                raise
        return self.keys.generation != before

    def delay(self) -> float:
        """Seconds until the next background attempt."""
        base = self.refresh if not self._streak else min(self.refresh, 2.0 ** min(self._streak - 1, 16))
        return base * random.uniform(1 - JITTER, 1 + JITTER)

    async def _run(self) -> None:
        while True:
            if self.keys.keys:
                await asyncio.sleep(self.delay())
                await asyncio.shield(self._attempt())
            else:                                   # nothing yet: ask first, then wait
                await asyncio.shield(self._attempt())
                await asyncio.sleep(self.delay())

    def _attempt(self) -> "asyncio.Task[None]":
        if self._flight is None:
            self._last = self._clock()
            self._flight = asyncio.get_running_loop().create_task(self._fetch(), name=f"fetch of {self.location}")
        return self._flight

    async def _fetch(self) -> None:
        self.fetches += 1
        try:
            document = await self._read()
            if document is not None:
                self._accept(document)
            self._succeeded()
        except (FetchError, KeysError, OSError) as error:
            self._failed(str(error))
        except Exception as error:  # noqa: BLE001 - keys that cannot be read must not end the worker
            self._failed(type(error).__name__)
        finally:
            if self._flight is asyncio.current_task():
                self._flight = None

    def _accept(self, document: bytes) -> None:
        keys = parse_key_set(document, self.algorithms)
        if keys.same_keys(self.keys):
            return
        self.keys = keys.with_generation(self.keys.generation + 1)
        self.changes += 1
        for note in keys.notes[:8]:
            log.warning("keys of %s: %s", self.location, note)
        if self.on_change is not None:
            self.on_change()

    def _succeeded(self) -> None:
        if self._streak:
            log.info("keys of %s: readable again after %d failures", self.location, self._streak)
        self._streak = 0
        self.error = None

    def _failed(self, reason: str) -> None:
        if not self._streak:                        # once per outage, not once per attempt
            log.warning("keys of %s: %s; %d known keys stay in use", self.location, reason, len(self.keys.keys))
        self.failures += 1
        self._streak += 1
        self.error = reason


class FileSource(KeySource):
    """A JWK set in a regular file, read again when its time, size or inode changes."""

    def __init__(self, path: Path, algorithms: Sequence[str], *, refresh: float = FILE_REFRESH,
                 cooldown: float = COOLDOWN, clock: Callable[[], float] = time.monotonic,
                 on_change: Callable[[], object] | None = None) -> None:
        super().__init__(str(path), algorithms, refresh=refresh, cooldown=cooldown, clock=clock, on_change=on_change)
        self._seen: tuple[int, int, int] | None = None

    def load(self) -> None:
        try:
            document = self._changed()
            if document is not None:
                self._accept(document)
        except OSError as error:
            raise KeysError(f"{self.location}: {error.strerror or type(error).__name__}") from None
        except KeysError as error:
            raise KeysError(f"{self.location}: {error}") from None

    def _accept(self, document: bytes) -> None:
        try:
            super()._accept(document)
        except KeysError:
            self._seen = None                       # perhaps half written: look again, whatever its time says
            raise

    async def _read(self) -> bytes | None:
        return self._changed()                      # at most 1 MiB from a local disk: cheaper than a thread

    def _changed(self) -> bytes | None:
        # Not blocking: a FIFO without a writer must not stop the worker.
        with open(os.open(self.location, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise KeysError("not a regular file")
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
            if seen == self._seen:
                return None
            document = file.read(MAX_DOCUMENT + 1)
        self._seen = seen
        return document


class UrlSource(KeySource):
    """A JWK set at an https URL, or at a http URL of this machine. Raises ValueError for any other."""

    def __init__(self, url: str, algorithms: Sequence[str], *, refresh: float = URL_REFRESH,
                 cooldown: float = COOLDOWN, clock: Callable[[], float] = time.monotonic,
                 on_change: Callable[[], object] | None = None, timeout: float = FETCH_TIMEOUT,
                 tls: ssl.SSLContext | None = None) -> None:
        super().__init__(url, algorithms, refresh=refresh, cooldown=cooldown, clock=clock, on_change=on_change)
        self._origin = Origin.parse(url)
        self._timeout = timeout
        self._tls = tls

    async def _read(self) -> bytes | None:
        return await fetch(self._origin, timeout=self._timeout, limit=MAX_DOCUMENT, tls=self._tls)


def open_source(location: str, algorithms: Sequence[str], *, base: Path = Path(), refresh: float | None = None,
                cooldown: float = COOLDOWN, on_change: Callable[[], object] | None = None) -> KeySource:
    """The source for `keys:` of a configuration: a URL, or a path relative to `base`. Reads nothing yet.

    Raises ValueError for a URL that keys must not come from.
    """
    if "://" in location:
        return UrlSource(location, algorithms, refresh=refresh or URL_REFRESH, cooldown=cooldown, on_change=on_change)
    return FileSource(base / location, algorithms, refresh=refresh or FILE_REFRESH, cooldown=cooldown,
                      on_change=on_change)
