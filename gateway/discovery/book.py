"""What a process knows about names: the last good answer to each question, kept current for as long as somebody needs it.

Strategy: one watch a question however many upstreams and snapshots ask it, so there is never more than one look-up of a name
on its way. An answer is used for its TTL, at least a second and at most what the upstreams allow, minus up to a tenth by
chance so that processes do not ask in step. When a look-up fails the last good answer stays, across reloads too; the failure is
counted, and logged when it begins, when its reason changes and when it ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Protocol

from gateway.discovery.dns import Missing, Unanswered
from gateway.discovery.dns_wire import Service
from gateway.discovery.names import Answer, Lookups, Wanted
from gateway.discovery.order import chosen

log = logging.getLogger("crossway.discovery")

LEAST = 1.0  # seconds that an answer is used, whatever its TTL
FIRST_RETRY = 0.5  # seconds after a failure, doubled up to the interval
JITTER = 0.1
MAX_IDLE = 1024  # answers kept that nobody needs now

Value = str | Service


class Source(Protocol):
    """Where answers come from: names.Lookups."""

    def ask(self, wanted: Wanted) -> Awaitable[Answer]: ...


class Watch:
    """One question and its last good answer."""

    def __init__(self, book: Book, wanted: Wanted) -> None:
        self.wanted = wanted
        self.values: tuple[Value, ...] = ()
        self.tried = False  # asked at least once, whatever came of it
        self.reason = ""  # why the last look-up failed; empty when it did not
        self.users: dict[Subscription, float] = {}  # each with the longest time that it allows
        self.task: asyncio.Task[None] | None = None
        self._book = book
        self._retry = FIRST_RETRY
        self._crowded = False

    @property
    def interval(self) -> float:
        return min(self.users.values(), default=60.0)

    async def run(self) -> None:
        """Ask again and again. Ended by cancellation."""
        while True:
            delay = await self._once()
            await asyncio.sleep(delay * random.uniform(1 - JITTER, 1))

    async def _once(self) -> float:
        """Ask once; return the seconds until the next time."""
        self._book.lookups += 1
        try:
            answer = await self._book.source.ask(self.wanted)
        except (Missing, Unanswered) as error:
            return self._failed(str(error))
        except Exception as error:  # noqa: BLE001 - a defect of ours must not end the look-ups
            return self._failed(repr(error))
        self._retry = FIRST_RETRY
        if self.reason:
            self._say(logging.INFO, "a name is found again", values=len(answer.values))
            self.reason = ""
        self._accept(answer)
        if answer.unknown:  # half an answer: the other half is asked for again soon
            return max(min(LEAST, self.interval), min(self.interval, 2 * LEAST))
        least = min(LEAST, self.interval)
        return self.interval if answer.ttl is None else max(least, min(answer.ttl, self.interval))

    def _accept(self, answer: Answer) -> None:
        kept = [value for value in self.values if isinstance(value, str) and (6 if ":" in value else 4) in answer.unknown]
        everything = [*answer.values, *kept]
        values = chosen(everything)
        crowded = len(values) < len(everything) and len(values) < len(set(everything))
        if crowded and not self._crowded:
            self._say(logging.WARNING, "a name has more endpoints than are used", found=len(everything), used=len(values))
        self._crowded = crowded
        first, self.tried = not self.tried, True
        if values != self.values or first:
            self.values = values
            self._tell()

    def _failed(self, reason: str) -> float:
        self._book.failures += 1
        if reason != self.reason:
            self._say(logging.WARNING, "a name cannot be resolved", reason=reason, kept=len(self.values))
        self.reason = reason
        if not self.tried:
            self.tried = True
            self._tell()
        delay, self._retry = min(self._retry, self.interval), min(self._retry * 2, 3600.0)
        return delay

    def _tell(self) -> None:
        for user in list(self.users):
            user.on_change()

    def _say(self, level: int, event: str, **more: object) -> None:
        kind = "SRV" if self.wanted.service else "host"
        log.log(level if self._book.loud else logging.DEBUG, event, extra={"host": self.wanted.name, "kind": kind, **more})


class Subscription:
    """One user's interest in the answer to a question."""

    def __init__(self, watch: Watch, on_change: Callable[[], object], release: Callable[[Subscription], None]) -> None:
        self.watch = watch
        self.on_change = on_change
        self._release = release

    @property
    def tried(self) -> bool:
        return self.watch.tried

    @property
    def values(self) -> tuple[Value, ...]:
        return self.watch.values

    def stop(self) -> None:
        self._release(self)


class Book:
    """All questions of one process. `loud` processes log; the others of a machine would only say the same."""

    def __init__(self, loop: asyncio.AbstractEventLoop, source: Source | None = None) -> None:
        self.loop = loop
        self.source: Source = source or Lookups()
        self.loud = True
        self.lookups = 0  # counters
        self.failures = 0
        self.rejected = 0  # versions of watched files that could not be used
        self._began = loop.time() - random.random()
        self._watches: dict[Wanted, Watch] = {}

    def until_look(self, period: float) -> float:
        """Seconds until everything of this process that is looked at once in `period` is looked at again; other processes have other moments."""
        ahead = period - (self.loop.time() - self._began) % period
        return ahead if ahead > period / 10 else ahead + period  # a timer may come a little early; that look has been taken

    def watch(self, wanted: Wanted, interval: float, on_change: Callable[[], object]) -> Subscription:
        """Begin to use a question; `on_change` is called when its values change, and when it was tried for the first time."""
        watch = self._watches.pop(wanted, None) or Watch(self, wanted)
        self._watches[wanted] = watch  # the last in order
        subscription = Subscription(watch, on_change, self._release)
        watch.users[subscription] = interval
        if watch.task is None or interval < min((each for user, each in watch.users.items() if user is not subscription), default=0):
            if watch.task is not None:
                watch.task.cancel()
            watch.task = self.loop.create_task(watch.run(), name=f"look-ups of {wanted.name}")
        return subscription

    def _release(self, subscription: Subscription) -> None:
        watch = subscription.watch
        watch.users.pop(subscription, None)
        if not watch.users and watch.task is not None:
            watch.task.cancel()
            watch.task = None
            idle = [wanted for wanted, each in self._watches.items() if each.task is None]
            for wanted in idle[: len(idle) - MAX_IDLE if len(idle) > MAX_IDLE else 0]:
                del self._watches[wanted]


_book: Book | None = None


def book_of(loop: asyncio.AbstractEventLoop) -> Book:
    """Return the book of this process, whose loop `loop` is."""
    global _book
    if _book is None or _book.loop is not loop:
        _book = Book(loop)
    return _book


def counts() -> dict[str, int]:
    """Return what this process has counted so far, by the names of the metric slots' counters."""
    book = _book
    return {
        "lookups": book.lookups if book else 0, "lookup_failures": book.failures if book else 0,
        "files_rejected": book.rejected if book else 0,
    }
