"""Limits that several machines count together: the parts that need Redis, put together.

Strategy: one store per worker and Redis, one table of leases per machine, one limiter per name that counts. A check, and the child that
compiles a configuration, make all of it and start nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import mmap
from collections.abc import Callable

from gateway._speedups.lease_table import LeaseTable
from gateway._speedups.leased_limit import LeasedLimitStep
from gateway._speedups.token_bucket import RateLimit as Bucket
from gateway.config.policies import Quota, RateLimit
from gateway.policies.base import RouteParts, SettingError, Use
from gateway.policies.leases import Figures, Limiter, QuotaFigures, RateFigures
from gateway.policies.store import Store, store_for

EXACT = 1 << 52             # Redis counts in doubles: a full bucket, in its smallest unit, stays below
WINDOWS = {"hour": 3600, "day": 86400, "month": 30 * 86400}     # seconds


def compile_rate(settings: RateLimit, use: Use, parts: RouteParts, name: str, whole: Bucket, window: int) -> None:
    period, unit = whole.interval
    if whole.burst * period >= EXACT:
        raise SettingError("an empty bucket would take too long to fill for Redis to count exactly; lower `burst`", ("burst",))
    rate, burst = settings.rate, settings.burst_size
    figures = RateFigures(period, unit, burst, RateFigures.largest(rate.count, rate.period, burst))

    def share(nodes: int) -> Bucket:
        return Bucket(name, rate.count, round(rate.period * 1e6) * nodes, max(1, burst // nodes))

    place = f"rate:{name}:{period}/{unit}/{burst}"
    _add(settings, use, parts, figures, share, place, quota=burst, window=window)


def compile_quota(settings: Quota, use: Use, parts: RouteParts, name: str) -> None:
    kind = "rolling" if settings.window == "rolling" else settings.per
    span = WINDOWS[settings.per] if settings.window == "rolling" else 0
    figures = QuotaFigures(settings.limit, kind, span * 1_000_000, QuotaFigures.largest(settings.limit))

    def share(nodes: int) -> Bucket:
        # The average pace, and an hour's of a day or a minute's of an hour at once: this machine does not know what is used up.
        pause = settings.seconds * 1_000_000 * nodes
        return Bucket(name, settings.limit, pause, max(1, settings.limit // (24 * nodes)))

    place = f"quota:{name}:{settings.limit}/{settings.window}-{settings.per}"
    _add(settings, use, parts, figures, share, place, quota=settings.limit, window=settings.seconds)


def _add(
    settings: RateLimit | Quota, use: Use, parts: RouteParts, figures: Figures, share: Callable[[int], Bucket], place: str, *,
    quota: int, window: int,
) -> None:
    source = use.workshop.shared("redis", "", lambda: _source(use))
    store = source.store
    table = use.workshop.shared("leases", "", lambda: _table(use))
    whole = f"{store.settings.prefix}:{place}"
    limiter = use.workshop.shared(
        "limiter", place, lambda: Limiter(table, figures, whole, exact=settings.exact, share=share, store=store)
    )
    step = LeasedLimitStep(
        use.name, share(store.nodes), settings.key, quota=quota, window=window, label=settings.name or use.name,
        limit_hash=int.from_bytes(hashlib.sha256(whole.encode()).digest()[:8], "little"), table=table, switch=store.switch,
        limiter=limiter, budget_us=round(store.command_time * 1e6), exact=settings.exact, on_failure=settings.on_failure,
    )
    limiter.steps.append(step)
    source.limiters.add(limiter)
    parts.steps.append(step)


class RunningStore:
    """A store and the limits of one snapshot, as that snapshot's background work."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.limiters: set[Limiter] = set()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.store.limits |= self.limiters
        for limiter in self.limiters:
            limiter.share(self.store.nodes)
        self.store.start(loop)

    def stop(self) -> None:
        self.store.limits -= self.limiters
        self.store.stop()

    async def settled(self) -> None:
        await self.store.settled()


def _source(use: Use) -> RunningStore:
    workshop = use.workshop
    if workshop.redis is None:
        raise SettingError("it needs `redis:` at the top level", ())
    # Two gateways are never the same to Redis, the workers of one always: the seed is theirs alone.
    machine = hashlib.sha256(b"gateway" + workshop.seed.to_bytes(8, "little")).hexdigest()[:12]
    if workshop.memory is None:
        return RunningStore(Store(workshop.redis, machine))
    source = RunningStore(store_for(workshop.redis, machine, workshop.memory.slot(workshop.worker)))
    workshop.sources.append(source)
    return source


def _table(use: Use) -> LeaseTable:
    memory = use.workshop.memory
    return LeaseTable(mmap.mmap(-1, LeaseTable.size_for(8)), 0, 8) if memory is None else memory.leases()
