"""A worker's Redis: one round trip for all that a turn of the loop asks, and a breaker in front of it.

Strategy: calls are gathered during a turn of the loop and leave as one pipeline, so that a thousand requests cost a few round trips.
Nothing a request waits for outlives the command's time: then, or at the first error that is not one key's own, Redis counts as
away, every open call is answered with nothing, and no further one is accepted. A task of its own comes back with a new client,
new addresses and a new view of the cluster, after a growing, jittered wait, and only once Redis takes writes.

Imported only when a policy needs Redis; so is the `redis` package.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from redis.exceptions import NoScriptError

from gateway._speedups.leased_limit import Switch
from gateway.config.redis import Redis
from gateway.policies.redis_client import connect
from gateway.policies.scripts import NODES, SCRIPTS, Script

log = logging.getLogger("crossway.redis")

FIRST_WAIT, LONGEST_WAIT = 0.05, 2.0    # seconds between two attempts to come back, before jitter
STEADY = 5.0                            # seconds up, after which the next outage starts with the first wait again
HEARTBEAT = 2.0                         # seconds; this gateway tells Redis that it is there
SILENCE = 10.0                          # seconds after which a gateway that says nothing is gone
LATE = 0.002                            # seconds; a timer that much late was held up with the answers
GRACE = 3                               # times that a late timer looks again before it believes what it sees
SWEEP = 0.25                            # seconds between two looks for leases that nobody spends
LAST_WORDS = 0.5                        # seconds for giving back what is leased when a worker ends

CLUSTER_TRIES = 10                      # nodes of a cluster that may be dead in a row before an attempt to connect has failed

AWAY, THERE = 1, 2                      # the gauge `redis`


class Counts(Protocol):
    """A worker's slot of the metrics."""

    def add(self, name: str, amount: int = 1) -> None: ...
    def set_gauge(self, name: str, value: int) -> None: ...


class Uncounted:
    """Counts of a build that nobody measures."""

    def add(self, name: str, amount: int = 1) -> None:
        pass

    def set_gauge(self, name: str, value: int) -> None:
        pass


class Call:
    """One script, to be run on one key. Subclasses say with what, and what its answer means."""

    due = 0.0                           # time.monotonic(); set by Store.submit()
    late = 0
    over = False

    def command(self) -> tuple[Script, str, Sequence[int | str]]:
        """Return the script, its key and its arguments; called once, when it leaves."""
        raise AssertionError("a call says what it runs")

    def finish(self, reply: Any) -> None:
        """Take the script's answer."""

    def fail(self) -> None:
        """Take that there will be none."""


class Nodes(Call):
    """Tell Redis that this gateway is there, and learn how many there are."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def command(self) -> tuple[Script, str, Sequence[int | str]]:
        return NODES, f"{self.store.settings.prefix}:nodes", (self.store.machine, int(SILENCE * 1000))

    def finish(self, reply: Any) -> None:
        self.store.count_nodes(int(reply))


class Limits(Protocol):
    """What a store tells the limits that it keeps."""

    def sweep(self) -> bool: ...
    def give_back(self) -> None: ...
    def share(self, nodes: int) -> None: ...


class Store:
    """One Redis, as a worker uses it. `machine` names this gateway, the same in each of its workers."""

    def __init__(
        self, settings: Redis, machine: str, counts: Counts | None = None,
        connect: Callable[[Redis], Awaitable[Any]] = connect,
    ) -> None:
        self.settings = settings
        self.machine = machine
        self.counts: Counts = counts or Uncounted()
        self.switch = Switch()
        self.command_time = settings.timeouts.command
        self.nodes = settings.nodes if isinstance(settings.nodes, int) else 1
        self.limits: set[Limits] = set()        # of the snapshots that run
        self._leased: set[Limits] = set()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._connect = connect
        self._client: Any = None
        self._users = 0
        self._waiting: list[Call] = []
        self._flights: dict[asyncio.Task[None], list[Call]] = {}
        self._scheduled = self._sweeping = False
        self._tried = asyncio.Event()
        self._revival: asyncio.Task[None] | None = None
        self._beat: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._wait = FIRST_WAIT
        self._since = 0.0               # time.monotonic() of the last change
        self._reason = ""
        self._odd_key = 0.0             # when a key with an error of its own was last spoken of

    # -- life

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin, or go on, for one more snapshot."""
        self._users += 1
        # With the last stop() still giving back, the connections are there yet, and it will leave them.
        if self._users == 1 and not self.switch.up and self._revival is None:
            self.loop = loop
            self._since = time.monotonic()
            self.counts.set_gauge("redis", AWAY)
            self._revival = loop.create_task(self._come_back(0.0))

    def stop(self) -> None:
        """One snapshot less uses it; the last one gives back what is leased and hangs up."""
        self._users -= 1
        if self._users == 0 and self.loop is not None:
            task = self.loop.create_task(self._end())
            ending.add(task)
            task.add_done_callback(ending.discard)

    async def settled(self) -> None:
        """Return when Redis was tried once, whatever came of it."""
        await self._tried.wait()

    async def _end(self) -> None:
        for limits in self._leased:
            limits.give_back()
        self._leased.clear()
        self._flush()
        if self._flights:
            await asyncio.wait(set(self._flights), timeout=LAST_WORDS)
        if self._users:
            return                      # wanted again meanwhile
        self.switch.up = False
        self.counts.set_gauge("redis", 0)
        for call in self._abandon():
            call.fail()
        for task in (self._revival, *self._closing):
            if task is not None:
                task.cancel()
        self._revival = None
        if self._beat is not None:
            self._beat.cancel()
        client, self._client = self._client, None
        if _stores.get((self.settings, self.machine)) is self:
            del _stores[self.settings, self.machine]
        await _hang_up(client)

    # -- calls

    def submit(self, call: Call) -> None:
        """Send a call with the others of this turn of the loop. While Redis is away it fails at once."""
        if not self.switch.up or self.loop is None:
            call.over = True
            call.fail()
            return
        call.due = time.monotonic() + self.command_time
        self._waiting.append(call)
        self.loop.call_later(self.command_time, self._check, call)
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        if self._waiting and len(self._flights) < self.settings.pool and self.switch.up and self.loop is not None:
            calls, self._waiting = self._waiting, []
            task = self.loop.create_task(self._fly(self._client, calls))
            self._flights[task] = calls
            task.add_done_callback(self._landed)

    async def _fly(self, client: Any, calls: list[Call]) -> None:
        commands = [call.command() for call in calls]
        self.counts.add("redis_trips")
        self.counts.add("redis_commands", len(commands))
        try:
            replies = await _run(client, commands)
        except Exception as error:  # noqa: BLE001 - whatever it is, there is no answer
            if asyncio.current_task() in self._flights:     # else it was given up before
                self._away(_reason(error))
            return
        for call, reply in zip(calls, replies, strict=True):
            if call.over:
                continue
            if isinstance(reply, Exception):
                if not _own_fault(reply):
                    self._away(_reason(reply))
                    return
                self._complain(call, reply)
                call.over = True
                call.fail()
            else:
                call.over = True
                call.finish(reply)

    def _landed(self, task: asyncio.Task[None]) -> None:
        calls = self._flights.pop(task, [])
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("a round trip to redis failed unexpectedly", exc_info=error)
            self._away(type(error).__name__)
            for call in calls:
                if not call.over:
                    call.over = True
                    call.fail()
        self._flush()

    def _check(self, call: Call) -> None:
        """A call is due. When the loop was held up, its answer may be there, unread: timers run before reading does."""
        if call.over or self.loop is None:
            return
        if time.monotonic() - call.due > LATE and call.late < GRACE:
            call.late += 1
            call.due = time.monotonic() + LATE / 2
            self.loop.call_later(LATE / 2, self._check, call)
            return
        self._away(f"no answer within {self.command_time * 1000:g} ms")

    def _complain(self, call: Call, error: Exception) -> None:
        self.counts.add("redis_errors")
        if time.monotonic() - self._odd_key > 60:
            self._odd_key = time.monotonic()
            log.error("a key in redis cannot be used; its limit counts as if redis were away", extra={"reason": _reason(error)})

    # -- the breaker

    def _abandon(self) -> list[Call]:
        calls = [*self._waiting, *(call for flight in self._flights.values() for call in flight)]
        open_calls = [call for call in calls if not call.over]
        for call in open_calls:
            call.over = True
        current = asyncio.current_task() if self.loop is not None and self.loop.is_running() else None
        for task in self._flights:
            if task is not current:
                task.cancel()
        self._waiting, self._flights = [], {}
        return open_calls

    def _away(self, reason: str) -> None:
        """Redis cannot be used: answer every open call with nothing, and accept none until it is back."""
        self.counts.add("redis_errors")
        calls = self._abandon()
        if self.switch.up and self.loop is not None:
            self.switch.up = False
            self.counts.set_gauge("redis", AWAY)
            now = time.monotonic()
            self._wait = FIRST_WAIT if now - self._since > STEADY else min(self._wait * 2, LONGEST_WAIT)
            self._since, self._reason = now, reason
            log.warning("redis is away", extra={"redis": str(self.settings.url), "reason": reason})
            if self._beat is not None:
                self._beat.cancel()
            self._closing.add(task := self.loop.create_task(_hang_up(self._client)))
            task.add_done_callback(self._closing.discard)
            self._client = None
            self._revival = self.loop.create_task(self._come_back(self._wait))
        for call in calls:
            call.fail()

    async def _come_back(self, wait: float) -> None:
        """Try until Redis takes writes."""
        while True:
            if wait:
                await asyncio.sleep(wait * random.uniform(0.5, 1.5))
            try:
                self._client = await self._greet()
                break
            except Exception as error:  # noqa: BLE001 - whatever it is (a cluster's errors are no RedisError), try again
                self.counts.add("redis_errors")
                if (reason := _reason(error)) != self._reason:
                    self._reason = reason
                    log.warning("redis is away", extra={"redis": str(self.settings.url), "reason": reason})
                wait = self._wait = min(max(self._wait, wait) * 2, LONGEST_WAIT)
            finally:
                self._tried.set()
        now = time.monotonic()
        log.info("redis is there", extra={"redis": str(self.settings.url), "after": round(now - self._since, 3)})
        self._since, self._reason = now, ""
        self.switch.up = True
        self.counts.set_gauge("redis", THERE)
        self._revival = None
        self._next_beat()

    async def _greet(self) -> Any:
        """Return a client whose connections are open, whose server knows the scripts, and takes writes."""
        client = None
        try:
            # A cluster's nodes are tried one after the other, each for its time; no request waits for this.
            async with asyncio.timeout(self.settings.timeouts.connect * (CLUSTER_TRIES if self.settings.cluster else 1)):
                client = await self._connect(self.settings)
                for script in SCRIPTS:
                    await client.script_load(script.text)
            async with asyncio.timeout(self.settings.timeouts.connect):
                beat = Nodes(self)
                reply, *_ = await asyncio.gather(
                    _run(client, [beat.command()]), *(client.ping() for _ in range(self.settings.pool - 1))
                )
            if isinstance(reply[0], Exception):
                raise reply[0]
            beat.finish(reply[0])
            return client
        except BaseException:
            await _hang_up(client)
            raise

    def _next_beat(self) -> None:
        assert self.loop is not None
        self._beat = self.loop.call_later(HEARTBEAT * random.uniform(0.8, 1.2), self._heartbeat)

    def _heartbeat(self) -> None:
        if self.switch.up:
            self.submit(Nodes(self))
            self._next_beat()

    def count_nodes(self, nodes: int) -> None:
        """Take how many gateways there are, unless the configuration says so."""
        if self.settings.nodes == "auto" and nodes != self.nodes and nodes >= 1:
            self.nodes = nodes
            for limits in self.limits:
                limits.share(nodes)

    # -- leases that nobody spends

    def look_after(self, limits: Limits) -> None:
        """These limits hold leases: look after them, once in a while."""
        self._leased.add(limits)
        self._sweep_later()

    def _sweep_later(self) -> None:
        if not self._sweeping and self.loop is not None:
            self._sweeping = True
            self.loop.call_later(SWEEP, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = False
        self._leased = {limits for limits in self._leased if limits.sweep()}
        if self._leased:
            self._sweep_later()


ending: set[asyncio.Task[None]] = set()     # stores that hang up
_stores: dict[tuple[Redis, str], Store] = {}    # of this process: a reload that changes nothing goes on with the open connections


def store_for(settings: Redis, machine: str, counts: Counts | None) -> Store:
    """Return this process's store for these settings."""
    key = (settings, machine)
    if key not in _stores:
        _stores[key] = Store(settings, machine, counts)
    return _stores[key]


async def settle(seconds: float) -> None:
    """Wait until stores that nobody uses any more have given back their leases, at most `seconds`."""
    if ending:
        await asyncio.wait(set(ending), timeout=seconds)


async def _run(client: Any, commands: Sequence[tuple[Script, str, Sequence[int | str]]]) -> list[Any]:
    """Run scripts in one pipeline; those that the server has forgotten once more, with their text.

    By execute_command: a cluster's pipeline has no evalsha(), although scripts of one key go where their key is.
    """
    pipe = client.pipeline(transaction=False)
    for script, key, arguments in commands:
        pipe.execute_command("EVALSHA", script.sha, 1, key, *arguments)
    replies: list[Any] = await pipe.execute(raise_on_error=False)
    forgotten = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
    if forgotten:
        pipe = client.pipeline(transaction=False)
        for index in forgotten:
            script, key, arguments = commands[index]
            pipe.execute_command("EVAL", script.text, 1, key, *arguments)
        for index, reply in zip(forgotten, await pipe.execute(raise_on_error=False), strict=True):
            replies[index] = reply
    return replies


def _own_fault(error: Exception) -> bool:
    """Whether an error concerns one key alone: somebody else's value is in its place."""
    return "WRONGTYPE" in str(error)


def _reason(error: BaseException) -> str:
    """Return what went wrong, for an operator; a server's answers hold no secret, but may be long."""
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    text = str(error).splitlines()[0][:200] if str(error) else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


async def _hang_up(client: Any) -> None:
    if client is not None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(LAST_WORDS):
                await client.aclose()
