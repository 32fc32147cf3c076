"""A table of upstreams in memory of its own, and processes that share it.

Strategy: the workers of a table are processes or just several states in one process (each worker index has its own cells), so
most of what is shared is tested without forking; what needs real races and real deaths forks.
"""

from __future__ import annotations

import mmap

from gateway._speedups.upstream_state import EVENT_NAMES, OUTCOME_NAMES, EndpointState, UpstreamState
from gateway._speedups.upstream_table import UpstreamTable

SECOND = 1_000_000
START = 1000 * SECOND           # of the virtual clock
PROBE = 30 * SECOND             # how long a probe may take
USABLE, MAY_PROBE, EJECTED, UNHEALTHY = range(4)
OK, NEUTRAL, CONNECT, RESET, TIMEOUT, STATUS, CANCELLED = range(len(OUTCOME_NAMES))
NONE, EJECT, PROBE_FAILED, RETURNED, CHECK_PASSED, CHECK_FAILED = range(len(EVENT_NAMES))


def table(workers: int = 4, upstreams: int = 4, endpoints: int = 16, memory: mmap.mmap | None = None) -> UpstreamTable:
    size = UpstreamTable.size_for(workers, upstreams, endpoints)
    return UpstreamTable(mmap.mmap(-1, size) if memory is None else memory, 0, workers, upstreams, endpoints)


def addresses(count: int) -> list[str]:
    return [f"10.0.0.{n + 1}:80" for n in range(count)]


def seen_by(
    shared: UpstreamTable, worker: int, count: int = 1, name: str = "pay", **settings: object
) -> tuple[UpstreamState, list[EndpointState]]:
    """The upstream and its `count` endpoints as worker `worker` has them."""
    upstream = shared.upstream(worker, name)
    endpoints = [shared.endpoint(worker, name, address, now_us=START) for address in addresses(count)]
    upstream.set_members(endpoints)
    upstream.configure(**settings)  # type: ignore[arg-type]
    upstream.seed(7)
    for number, endpoint in enumerate(endpoints):
        endpoint.seed(100 + number)
    return upstream, endpoints


def send(upstream: UpstreamState, endpoint: EndpointState, outcome: int, now: int) -> int:
    """One request that is admitted and ends at the same moment; the event, -1 when it was not admitted."""
    ticket = endpoint.admit(now, PROBE)
    return endpoint.report(upstream, outcome, ticket, now) if ticket else -1
