"""Requests, workers and endpoints on a virtual clock, with the compiled balancer between them.

Strategy: a discrete-event simulation. Requests arrive at random (Poisson), which no slow answer holds back; each is given to one of
the workers, whose balancer knows its own latencies and everybody's requests in flight, as in a gateway. An endpoint serves so
many at once in times drawn from a log-normal distribution and queues the rest; one that the network has cut off fails a request after
the connect timeout, and another has it. No clock is read and every random number comes from a seed, so a run gives the same figures
everywhere.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import Protocol

from gateway._speedups.balance import ALGORITHMS
from gateway._speedups.fleet import Fleet

MS, SECOND = 1_000, 1_000_000
SPREAD = 0.6  # sigma of the logarithm of a service time: p99 is four times the median
KEYS = 10_000  # customers, for Maglev
BORN = -(1 << 48)
CONNECT_US = 2 * SECOND  # until a connection to nobody is given up
EPOCH = 1_000 * SECOND  # the balancer takes time 0 for "never"


class Chooser(Protocol):
    """What the simulation needs of a balancer: Fleet, or a stand-in."""

    def choose(self, now: int, key: int = 0, avoid: int = -1) -> int: ...
    def start(self, index: int, now: int) -> None: ...
    def finish(self, index: int, now: int, rtt_us: int, sample: str = "good", retry_after_us: int = 0) -> None: ...
    def elsewhere(self, index: int, count: int) -> None: ...
    def join(self, members: Sequence[int]) -> None: ...
    def born(self, index: int, now: int) -> None: ...


class Compiled:
    """The balancer of the gateway."""

    def __init__(self, algorithm: str, size: int, seed: int, slow_start_us: int = 0) -> None:
        self.fleet = Fleet(ALGORITHMS.index(algorithm), [1] * size, seed=seed, slow_start_us=slow_start_us)
        self.choose, self.start, self.finish, self.join = (
            self.fleet.choose,
            self.fleet.start,
            self.fleet.finish,
            self.fleet.join,
        )

    def elsewhere(self, index: int, count: int) -> None:
        self.fleet.set(index, elsewhere=count, tell=False)

    def born(self, index: int, now: int) -> None:
        self.fleet.set(index, born=now)


class Textbook:
    """Peak EWMA and two choices as published: decays to nothing, and a failure is a fast answer. For comparison."""

    def __init__(self, size: int, seed: int) -> None:
        self.members: Sequence[int] = range(size)
        self.average = [30.0 * MS] * size
        self.at = [EPOCH] * size
        self.own, self.others = [0] * size, [0] * size
        self.random = random.Random(seed)

    def cost(self, index: int, now: int) -> float:
        return self.average[index] * exp((self.at[index] - now) / 10e6) * (self.own[index] + self.others[index] + 1)

    def choose(self, now: int, key: int = 0, avoid: int = -1) -> int:
        others = [index for index in self.members if index != avoid]
        if len(others) == 1:
            return others[0]
        first, second = self.random.sample(others, 2)
        return first if self.cost(first, now) <= self.cost(second, now) else second

    def start(self, index: int, now: int = 0) -> None:
        self.own[index] += 1

    def finish(self, index: int, now: int, rtt_us: int, sample: str = "good", retry_after_us: int = 0) -> None:
        self.own[index] -= 1
        kept = 0.0 if rtt_us > self.average[index] else exp((self.at[index] - now) / 10e6)
        self.average[index] = self.average[index] * kept + rtt_us * (1 - kept)
        self.at[index] = now

    def elsewhere(self, index: int, count: int) -> None:
        self.others[index] = count

    def join(self, members: Sequence[int]) -> None:
        self.members = members

    def born(self, index: int, now: int) -> None:
        pass


@dataclass
class Request:
    """One client's; it came at `arrival`, and its present attempt was sent at `sent`."""

    worker: int
    key: int
    arrival: float
    sent: float


@dataclass
class Endpoint:
    """One server: `servers` requests at a time, `factor(now)` times the usual service time; None answers 503 at once."""

    servers: int = 32
    factor: Callable[[float, Endpoint], float | None] = lambda now, endpoint: 1.0
    cut: Callable[[float], bool] = lambda now: False  # nothing reaches it
    busy: int = 0
    served: int = 0
    waiting: deque[Request] = field(default_factory=deque)


@dataclass
class Outcome:
    """What the clients saw: latencies in us of all answers in the order they came, and where the requests went."""

    latencies: list[tuple[float, float]]  # (arrival, latency)
    refused: int
    taken: list[int]
    peak: list[int]  # most requests at an endpoint at a time
    reached: dict[int, float] = field(default_factory=dict)  # when an endpoint had its first request after one had failed to reach it


@dataclass
class World:
    """A scenario: endpoints, and when requests arrive."""

    endpoints: list[Endpoint]
    service_us: float
    rate: Callable[[float], float]  # requests a second at a time
    most: float  # the highest rate
    until: float  # us
    members: Sequence[tuple[float, Sequence[int]]] = ()  # who is chosen from, from when on; nothing: everybody, always


class Run:
    """One run of a world with one balancer per worker."""

    def __init__(self, world: World, workers: list[Chooser], seed: int) -> None:
        self.world, self.workers = world, workers
        self.random = random.Random(seed)
        # (time, number, how it ends, endpoint, request)
        self.events: list[tuple[float, int, Callable[[float, int, Request], None], int, Request]] = []
        self.number = 0
        size = len(world.endpoints)
        self.flying = [[0] * size for _ in workers]
        self.outcome = Outcome([], 0, [0] * size, [0] * size)
        self.present: Sequence[int] = range(size)
        self.lost: set[int] = set()  # those that the last request to them did not reach

    def go(self) -> Outcome:
        """Let everything happen; requests on their way at the end are answered."""
        now, changes = 0.0, deque(self.world.members)
        arrival = self.next_arrival(0.0)
        while arrival < self.world.until or self.events:
            if changes and now >= changes[0][0]:
                self.change(now, changes.popleft()[1])
            if self.events and self.events[0][0] <= arrival:
                now, _, end, endpoint, request = heapq.heappop(self.events)
                self.tell(request.worker, endpoint, -1)
                end(now, endpoint, request)
            else:
                now = arrival
                self.arrive(now)
                arrival = self.next_arrival(now)
        return self.outcome

    def change(self, now: float, members: Sequence[int]) -> None:
        """Let the workers choose from these from now on; who was not among the others is new."""
        for worker in self.workers:
            for index in members:
                if index not in self.present:
                    worker.born(index, EPOCH + int(now))
            worker.join(members)
        self.present = members

    def next_arrival(self, now: float) -> float:
        """When the next request comes: Poisson with a rate that changes, by thinning; past the end when there is none."""
        while now < self.world.until:
            now += self.random.expovariate(self.world.most) * SECOND
            if self.random.random() * self.world.most < self.world.rate(now):
                return now
        return float("inf")

    def arrive(self, now: float) -> None:
        number = self.random.randrange(len(self.workers))
        key = self.random.randrange(KEYS) * 0x9E3779B97F4A7C15 & 0xFFFF_FFFF_FFFF_FFFF
        self.send(now, Request(number, key, now, now))

    def send(self, now: float, request: Request, avoid: int = -1) -> None:
        worker = self.workers[request.worker]
        index = worker.choose(EPOCH + int(now), request.key, avoid)
        worker.start(index, EPOCH + int(now))
        request.sent = now
        self.tell(request.worker, index, 1)
        self.outcome.taken[index] += 1
        self.outcome.peak[index] = max(self.outcome.peak[index], sum(flying[index] for flying in self.flying))
        endpoint = self.world.endpoints[index]
        if endpoint.cut(now):
            self.lost.add(index)
            self.schedule(now + CONNECT_US, self.unreached, index, request)
            return
        if index in self.lost:
            self.lost.remove(index)
            self.outcome.reached[index] = now
        if endpoint.factor(now, endpoint) is None:
            self.schedule(now + 200, self.refused, index, request)
        elif endpoint.busy < endpoint.servers:
            self.serve(now, index, request)
        else:
            endpoint.waiting.append(request)

    def serve(self, now: float, index: int, request: Request) -> None:
        endpoint = self.world.endpoints[index]
        endpoint.busy += 1
        endpoint.served += 1
        factor = endpoint.factor(now, endpoint) or 1.0
        middle = log(self.world.service_us) - SPREAD * SPREAD / 2  # so that service_us is the mean
        self.schedule(now + factor * self.random.lognormvariate(middle, SPREAD), self.answered, index, request)

    def schedule(self, when: float, end: Callable[[float, int, Request], None], index: int, request: Request) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, end, index, request))

    def unreached(self, now: float, index: int, request: Request) -> None:
        """The request goes to another endpoint, as a failed connect lets it."""
        self.learn(now, index, request, "bad")
        self.send(now, request, index)

    def refused(self, now: float, index: int, request: Request) -> None:
        self.outcome.refused += 1
        self.learn(now, index, request, "bad")

    def answered(self, now: float, index: int, request: Request) -> None:
        self.learn(now, index, request, "good")
        self.outcome.latencies.append((request.arrival, now - request.arrival))
        endpoint = self.world.endpoints[index]
        endpoint.busy -= 1
        if endpoint.waiting:
            self.serve(now, index, endpoint.waiting.popleft())

    def learn(self, now: float, index: int, request: Request, sample: str) -> None:
        self.workers[request.worker].finish(index, EPOCH + int(now), int(now - request.sent), sample)

    def tell(self, number: int, index: int, change: int) -> None:
        """One worker has one request more or less at an endpoint; the others are told."""
        self.flying[number][index] += change
        total = sum(flying[index] for flying in self.flying)
        for other, worker in enumerate(self.workers):
            if other != number:
                worker.elsewhere(index, total - self.flying[other][index])
