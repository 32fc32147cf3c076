"""What a limit over several machines asks Redis for, and what it does with the answers.

Strategy: one call asks for what waiting requests spend at once and, in the same breath, for the next lease. A lease is sized by how
fast the last one went, given back when half its life passed without anybody spending of it, and never larger than `most`: that
bounds what may lie unspent. The arithmetic of sizes is a pure function; time is monotonic microseconds throughout.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gateway._speedups.lease_table import MAX_LEASE, LeaseTable
from gateway._speedups.leased_limit import LeasedLimitStep
from gateway._speedups.token_bucket import RateLimit as Bucket
from gateway.policies.scripts import QUOTA, RATE, Script
from gateway.policies.store import Call, Store

LIFE = 1_000_000            # us that a lease lives
IDLE = LIFE // 2            # after which what is left of it is given back
LOCK = LIFE * 3 // 2        # longer than a lease lives: what comes after it is dead
QUICK, SLOW = 100_000, 400_000      # a lease that went faster than this doubles the next, slower than that halves it
ADVANCE = 0.2               # seconds of the rate that a machine may hold, at most
PAUSE = 5_000               # us for which a machine that was refused does not ask again, when tokens come faster
REASK = 1_000_000           # us after which Redis is asked again, whatever it said: others may give back

Answer = tuple[bool, int, int]      # admitted, remaining, microseconds to wait


def next_size(size: int, granted_at: int, now: int, most: int) -> int:
    """How many tokens the next lease has; 0: none, because too little is known of the caller, or too little may be held.

    `size` is the last lease's, `granted_at` when it came (0: never), `most` the largest that is allowed.
    """
    if most < 2 or granted_at == 0 or now - granted_at >= LIFE:
        return 0
    if size < 2:
        return 2
    if now - granted_at < QUICK:
        size *= 2
    elif now - granted_at > SLOW:
        size //= 2
    return max(2, min(size, most))


class Figures(Protocol):
    """The numbers of one limit: what its script is given."""

    @property
    def script(self) -> Script: ...

    @property
    def most(self) -> int: ...

    def arguments(self, want: int, lease: str, seq: int, unspent: int, slice: int, ask: int, back: int) -> Sequence[int | str]: ...


@dataclass(frozen=True)
class RateFigures:
    """A token bucket: a token is `period` units, `unit` units come in each microsecond."""

    period: int
    unit: int
    burst: int
    most: int
    script: Script = RATE

    def arguments(self, want: int, lease: str, seq: int, unspent: int, slice: int, ask: int, back: int) -> Sequence[int | str]:
        return self.period, self.unit, self.burst, want, lease, seq, unspent, ask, 2, back, LIFE

    @staticmethod
    def largest(count: int, period: float, burst: int) -> int:
        """The largest lease: a quarter of the burst, or what the rate gives in 200 ms."""
        return max(1, min(burst // 4, math.floor(count / period * ADVANCE), MAX_LEASE))


@dataclass(frozen=True)
class QuotaFigures:
    """A quota: `limit` in a window of the calendar (hour, day, month), or in the last `span` microseconds (rolling)."""

    limit: int
    kind: str
    span: int
    most: int
    script: Script = QUOTA

    def arguments(self, want: int, lease: str, seq: int, unspent: int, slice: int, ask: int, back: int) -> Sequence[int | str]:
        return self.limit, self.kind, self.span, want, unspent, slice, ask, 8, back, LIFE

    @staticmethod
    def largest(limit: int) -> int:
        """The largest lease: a hundredth of the quota."""
        return max(1, min(limit // 100, MAX_LEASE))


def _monotonic_us() -> int:
    return time.monotonic_ns() // 1000


class Limiter:
    """One limit in one worker. `place` is what the keys of its callers begin with, `exact` leases nothing."""

    def __init__(
        self, table: LeaseTable, figures: Figures, place: str, *, store: Store, exact: bool, share: Callable[[int], Bucket],
        clock: Callable[[], int] = _monotonic_us,
    ) -> None:
        self.store = store
        self.table = table
        self.figures = figures
        self.place = place
        self.exact = exact
        self.clock = clock
        self.steps: list[LeasedLimitStep] = []
        self.leases: dict[int, tuple[int, str]] = {}        # slot -> key in it, key in Redis: of those fetched by this worker
        self._share = share
        self._calls: dict[int, Fetch] = {}                  # not sent yet

    def ask(self, key: int, identity: bytes, waited: float) -> asyncio.Future[Answer | None]:
        """Return a future of what Redis says about one request that has waited so many seconds for its other limits."""
        assert self.store.loop is not None
        future: asyncio.Future[Answer | None] = self.store.loop.create_future()
        call = self._fetch(key, identity)
        if call.over:                       # Redis went away since the request was parked
            _give_up(future)
        else:
            call.waiters.append(future)
            if waited > 0:
                self.store.loop.call_later(max(0.0, self.store.command_time - waited), _give_up, future)
        return future

    def prefetch(self, key: int, identity: bytes) -> None:
        """Fetch the next lease of a key while there are still tokens."""
        self._fetch(key, identity)

    def _fetch(self, key: int, identity: bytes) -> Fetch:
        call = self._calls.get(key)
        if call is None:
            # The caller's name is a hash: who calls is nobody's business who can list keys.
            name = f"{self.place}:{hashlib.sha256(identity).hexdigest()[:32]}"
            call = self._calls[key] = Fetch(self, key, name)
            self.store.submit(call)
        return call

    def sent(self, key: int) -> None:
        self._calls.pop(key, None)

    # -- what a store tells

    def share(self, nodes: int) -> None:
        """Redis knows of so many gateways: that much smaller is this one's share while Redis is away."""
        bucket = self._share(nodes)
        for step in self.steps:
            step.share(bucket)

    def sweep(self) -> bool:
        """Give back what nobody spends; True while there are leases to look after."""
        now = self.clock()
        for number, (key, name) in list(self.leases.items()):
            age = now - self.table.granted_at(number)
            if age >= IDLE:
                del self.leases[number]
                if age < LIFE:
                    self._empty(number, key, name, now)
        return bool(self.leases)

    def give_back(self) -> None:
        """Give back everything that this worker fetched."""
        now = self.clock()
        for number, (key, name) in self.leases.items():
            self._empty(number, key, name, now)
        self.leases = {}

    def _empty(self, number: int, key: int, name: str, now: int) -> None:
        claimed = self.table.begin(key, now, LOCK)
        if claimed is None:
            return                          # a lease is on its way: it is not idle
        if claimed[0] == number and (tokens := self.table.empty(number, key, now)):
            self.store.submit(GiveBack(self, number, name, tokens, claimed[2], now))
        else:
            self.table.end(claimed[0], now + LOCK)


def _give_up(future: asyncio.Future[Answer | None]) -> None:
    if not future.done():
        future.set_result(None)


class Fetch(Call):
    """Tokens for requests that wait, and the next lease."""

    def __init__(self, limiter: Limiter, key: int, name: str) -> None:
        self.limiter = limiter
        self.key = key
        self.name = name
        self.waiters: list[asyncio.Future[Answer | None]] = []
        self.slot: int | None = None
        self.began = 0

    def command(self) -> tuple[Script, str, Sequence[int | str]]:
        limiter, figures = self.limiter, self.limiter.figures
        limiter.sent(self.key)
        self.waiters = [future for future in self.waiters if not future.done()]
        self.began = now = limiter.clock()
        lease, unspent, slice, ask = "", 0, 0, 0
        claimed = None if limiter.exact else limiter.table.begin(self.key, now, LOCK)
        if claimed is not None:
            self.slot, unspent, slice, size = claimed
            ask = max(0, next_size(size, limiter.table.granted_at(self.slot), now, figures.most) - unspent)
            if ask or unspent:
                lease = f"{limiter.store.machine}.{self.slot:x}"
        return figures.script, self.name, figures.arguments(len(self.waiters), lease, now, unspent, slice, ask, 0)

    def finish(self, reply: Any) -> None:
        granted, leased, kept, left, retry, reset, life, slice = map(int, reply)
        if granted < 0:
            self.fail()
            return
        now = self.limiter.clock()
        for future in self.waiters:
            if not future.done():
                granted -= 1
                future.set_result((granted >= 0, left, reset if granted >= 0 else retry))
        if self.slot is not None:
            self._enter(now, leased, self.began + life, bool(kept), left, now + reset, slice)
        if not self.limiter.exact and not left and retry:
            pause = max(retry, PAUSE if self.limiter.figures.most > 1 else 0)
            self.limiter.table.refuse(self.key, now, now + min(pause, REASK), now + retry)

    def _enter(self, now: int, leased: int, ends: int, kept: bool, left: int, reset_at: int, slice: int) -> None:
        limiter, slot = self.limiter, self.slot
        assert slot is not None
        if limiter.table.enter(slot, self.key, now, leased, ends, kept, left, reset_at, slice) and leased:
            limiter.leases[slot] = self.key, self.name
            limiter.store.counts.add("limit_leases")
            limiter.store.counts.add("limit_leased", leased)
            limiter.store.look_after(limiter)
        limiter.table.end(slot, self.began + LOCK)

    def fail(self) -> None:
        self.limiter.sent(self.key)
        for future in self.waiters:
            _give_up(future)
        if self.slot is not None:
            self.limiter.table.end(self.slot, self.began + LOCK)


class GiveBack(Call):
    """Tokens of a lease that nobody spent; they were taken out of the table before."""

    def __init__(self, limiter: Limiter, slot: int, name: str, tokens: int, slice: int, began: int) -> None:
        self.limiter, self.slot, self.name, self.tokens, self.slice, self.began = limiter, slot, name, tokens, slice, began

    def command(self) -> tuple[Script, str, Sequence[int | str]]:
        lease = f"{self.limiter.store.machine}.{self.slot:x}"
        figures = self.limiter.figures
        return figures.script, self.name, figures.arguments(0, lease, self.began, 0, self.slice, 0, self.tokens)

    def finish(self, reply: Any) -> None:
        if reply[0] >= 0:
            self.limiter.store.counts.add("limit_returned", self.tokens)
        self.fail()

    def fail(self) -> None:
        self.limiter.table.end(self.slot, self.began + LOCK)
