"""The shared memory of all processes: metric slots, route names, the rate-limit table, the table of upstreams, and leases.

Strategy: one anonymous MAP_SHARED mapping, made by the supervisor before it forks and laid out once; every process uses the
same object afterwards, inherited by fork. Pages are given by the kernel when they are first touched (the mapping reserves
nothing), so a slot costs what it uses. A dead worker's slot is folded into the retired one: counters never go back.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from gateway._speedups.histogram import NAMES_BYTES, SLOT_BYTES, FoldGuard, NameTable, WorkerSlot
from gateway._speedups.token_bucket import BucketTable
from gateway._speedups.upstream_table import CHECKER, UpstreamTable

if TYPE_CHECKING:
    from gateway._speedups.lease_table import LeaseTable

DEFAULT_BUCKET_SLOTS = 65_536       # 1 MiB; see token_bucket.pyx for sizing
UPSTREAMS, ENDPOINTS = 512, 4096    # places; what is not used costs address space only
LEASE_SLOTS = 65_536                # 4 MiB of addresses; nothing is touched unless limits of several machines are used
LEASE_SLOT_BYTES = 64
FOLD_PATIENCE = 1.0                 # seconds; a fold takes about a millisecond


T = TypeVar("T")


def choice_name(route: str, upstream: str) -> str:
    """The metric name of what a route sent to one of its several upstreams; names of routes hold no >."""
    return f"{route}>{upstream}"


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in the mapping, each at a page of its own so that workers share no cache line."""

    workers: int
    bucket_slots: int = DEFAULT_BUCKET_SLOTS

    @property
    def names(self) -> int:
        return mmap.PAGESIZE

    @property
    def buckets(self) -> int:
        return self.names + _pages(NAMES_BYTES)

    def slot(self, index: int) -> int:
        """Where worker `index`'s slot starts; index == workers is the retired one."""
        return self.buckets + _pages(BucketTable.size_for(self.bucket_slots)) + index * _pages(SLOT_BYTES)

    @property
    def upstreams(self) -> int:
        return self.slot(self.workers + 1)

    @property
    def leases(self) -> int:
        return self.upstreams + _pages(UpstreamTable.size_for(self.workers, UPSTREAMS, ENDPOINTS))

    @property
    def size(self) -> int:
        return self.leases + LEASE_SLOTS * LEASE_SLOT_BYTES


class SharedState:
    """What all processes share. Made by the supervisor before the first fork.

    Raises ValueError for a bad number of workers or bucket slots, OSError when the mapping cannot be made.
    """

    def __init__(self, workers: int, bucket_slots: int = DEFAULT_BUCKET_SLOTS) -> None:
        if not 1 <= workers <= 1024:
            raise ValueError(f"the number of workers must be from 1 to 1024, not {workers}")
        self.layout = Layout(workers, bucket_slots)
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self.memory = mmap.mmap(-1, self.layout.size, flags=flags)
        self._guard = FoldGuard(self.memory, 0)
        self.names = NameTable(self.memory, self.layout.names)
        self.buckets = BucketTable(self.memory, self.layout.buckets, bucket_slots)
        self.upstreams = UpstreamTable(self.memory, self.layout.upstreams, workers, UPSTREAMS, ENDPOINTS)
        self._slots = tuple(WorkerSlot(self.memory, self.layout.slot(index)) for index in range(workers + 1))
        for slot in self._slots[:workers]:
            slot.join(self.layout.slot(0), self.layout.slot(1) - self.layout.slot(0), workers)

    @property
    def workers(self) -> int:
        return self.layout.workers

    def leases(self) -> LeaseTable:
        """The table of leases from Redis. Its module is loaded here, for those who use one."""
        from gateway._speedups.lease_table import LeaseTable

        return LeaseTable(self.memory, self.layout.leases, LEASE_SLOTS)

    def slot(self, index: int) -> WorkerSlot:
        """Worker `index`'s slot, from 0."""
        if not 0 <= index < self.workers:
            raise IndexError(f"there is no worker {index}")
        return self._slots[index]

    @property
    def retired(self) -> WorkerSlot:
        """The sum of all workers that have ended; written by the supervisor only."""
        return self._slots[self.workers]

    def fold(self, index: int) -> None:
        """Move a reaped worker's counts into the retired slot and clear its own; its gauges and places are dropped.

        Only the supervisor may call it, after waitpid() has returned the worker.
        """
        slot = self.slot(index)
        with self._guard:
            self.retired.absorb(slot)
            slot.clear()
            self.upstreams.bury(index)

    def fold_checker(self) -> None:
        """The same for the process that checks endpoints actively, which has no slot."""
        with self._guard:
            self.upstreams.bury(CHECKER)

    def total(self) -> WorkerSlot:
        """All slots and the retired one added up, in private memory that lives as long as the result."""
        return self._settled(self._total)

    def _total(self) -> WorkerSlot:
        total = WorkerSlot(mmap.mmap(-1, SLOT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        for slot in self._slots:
            total.absorb(slot)
        return total

    def upstream_rows(self, now: float | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """All upstreams and all endpoints that are in use; `now` is the monotonic clock's time in seconds."""
        now_us = int((time.monotonic() if now is None else now) * 1e6)
        return self._settled(lambda: (self.upstreams.upstreams(now_us), self.upstreams.endpoints(now_us)))

    def _settled(self, read: Callable[[], T]) -> T:
        """What `read` returns, read again if a fold happens meanwhile: so nothing is counted twice or missed."""
        give_up = time.monotonic() + FOLD_PATIENCE
        while True:
            before = self._guard.read()
            patient = time.monotonic() < give_up
            if before % 2 and patient:
                time.sleep(0.0005)
                continue
            found = read()
            if self._guard.read() == before or not patient:
                return found

    def alive(self) -> list[int]:
        """Indexes of the slots whose worker runs (its pid gauge is set)."""
        return [index for index in range(self.workers) if self._slots[index].gauge("pid")]

    def route_name(self, number: int) -> str:
        """A route's name for a label; an id that does not exist (overflow) is shown as such."""
        try:
            return self.names.name(number)
        except IndexError:
            return ""
