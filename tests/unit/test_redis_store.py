"""The breaker before Redis and what a limit asks it for: one round trip a turn, no call without an end, no leave by mistake."""

from __future__ import annotations

import asyncio
import logging
import mmap
from collections.abc import Awaitable, Callable
from typing import Any, Self

import pytest
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

from gateway._speedups.lease_table import LeaseTable
from gateway._speedups.token_bucket import RateLimit
from gateway.config.redis import Redis
from gateway.policies import store as store_module
from gateway.policies.leases import IDLE, LIFE, Limiter, QuotaFigures, RateFigures
from gateway.policies.scripts import NODES, SCRIPTS
from gateway.policies.store import Call, Store

NEVER = 20.0        # seconds that a test gives to what must not take long


class Pipe:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.commands: list[tuple[Any, ...]] = []

    def execute_command(self, *words: Any) -> None:
        self.commands.append(words)

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        assert raise_on_error is False
        replies = [[1] if words[1] in (NODES.sha, NODES.text) else None for words in self.commands]
        if None not in replies:
            return [self.server.nodes] * len(replies) if self.server.beats else await self.server.hang()
        self.server.trips.append(self.commands)
        return await self.server.answer(self.commands)


class Server:
    """A client whose server does what `answer` says; `refuse` is raised to who connects."""

    def __init__(self) -> None:
        self.trips: list[list[tuple[Any, ...]]] = []
        self.refuse: list[BaseException] = []
        self.connects = self.closed = 0
        self.beats = True
        self.nodes = 1
        self.answer: Callable[[list[tuple[Any, ...]]], Awaitable[list[Any]]] = self.grant

    async def connect(self, settings: Redis) -> Server:
        self.connects += 1
        if self.refuse:
            raise self.refuse.pop(0)
        return self

    async def grant(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        """All that is wanted, and the lease in full."""
        return [[words[7], words[11], 1, 50, 0, 1000, LIFE, 0] for words in commands]

    async def hang(self, commands: Any = None) -> list[Any]:
        await asyncio.sleep(NEVER)
        raise AssertionError("nobody cancelled it")

    def pipeline(self, transaction: bool) -> Pipe:
        assert transaction is False
        return Pipe(self)

    async def script_load(self, text: str) -> str:
        return next(script.sha for script in SCRIPTS if script.text == text)

    async def ping(self) -> bool:
        return True

    async def aclose(self) -> None:
        self.closed += 1


class Clock:
    def __init__(self) -> None:
        self.now = 10**10

    def __call__(self) -> int:
        return self.now


def settings(command: str = "200ms", **more: Any) -> Redis:
    return Redis(url="redis://127.0.0.1:6379", timeouts={"command": command, "connect": "30s"}, **more)  # type: ignore[arg-type]


class Setup:
    """A store over a fake server, and one limit of 1000/s with a burst of 400 on it."""

    def __init__(self, command: str = "200ms", figures: Any = None, **more: Any) -> None:
        self.server = Server()
        self.store = Store(settings(command, **more), "me", connect=self.server.connect)
        self.table = LeaseTable(mmap.mmap(-1, LeaseTable.size_for(64)), 0, 64)
        self.clock = Clock()
        self.shares: list[int] = []
        self.limiter = self.limit(figures or RateFigures(1000, 1, 400, 100))

    def limit(self, figures: Any, *, exact: bool = False) -> Limiter:
        limiter = Limiter(
            self.table, figures, "crossway:rate:x", store=self.store, exact=exact, share=self.share, clock=self.clock
        )
        self.store.limits.add(limiter)
        return limiter

    def share(self, nodes: int) -> RateLimit:
        self.shares.append(nodes)
        return RateLimit("x", 1, 1_000_000 * nodes, 1)

    async def __aenter__(self) -> Self:
        self.store.start(asyncio.get_running_loop())
        await asyncio.wait_for(self.store.settled(), NEVER)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.store.stop()
        await store_module.settle(NEVER)
        async with asyncio.timeout(NEVER):          # nothing runs on
            while asyncio.all_tasks() != {asyncio.current_task()}:
                await asyncio.sleep(0.001)

    async def up(self, wanted: bool = True) -> None:
        async with asyncio.timeout(NEVER):
            while self.store.switch.up is not wanted:
                await asyncio.sleep(0.001)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within_its_time() -> None:
        async with asyncio.timeout(NEVER):
            await test()

    asyncio.run(within_its_time())


def wanted(words: tuple[Any, ...]) -> dict[str, Any]:
    names = ("period", "unit", "burst", "want", "lease", "seq", "unspent", "ask", "share", "back", "life")
    return dict(zip(names, words[4:], strict=True))


# -- one round trip


def test_what_one_turn_asks_travels_together() -> None:
    async def test() -> None:
        async with Setup() as made:
            answers = [made.limiter.ask(key, b"%d" % key, 0.0) for key in (1, 2, 2, 2, 3)]
            assert await asyncio.gather(*answers) == [(True, 50, 1000)] * 5
            (trip,) = made.server.trips
            assert [words[0] for words in trip] == ["EVALSHA"] * 3
            assert len({words[3] for words in trip}) == 3
            assert [wanted(words)["want"] for words in trip] == [1, 3, 1]

    run(test)


def test_who_calls_is_not_in_the_name_of_a_key() -> None:
    async def test() -> None:
        async with Setup() as made:
            await made.limiter.ask(1, b"calice", 0.0)
            name = made.server.trips[0][0][3]
            assert name.startswith("crossway:rate:x:") and "alice" not in name

    run(test)


def test_those_who_got_nothing_are_told_when() -> None:
    async def test() -> None:
        async with Setup() as made:
            async def two(commands: Any) -> list[Any]:
                return [[2, 0, 1, 0, 777, 1000, LIFE, 0]]

            made.server.answer = two
            answers = await asyncio.gather(*(made.limiter.ask(1, b"x", 0.0) for _ in range(4)))
            assert answers == [(True, 0, 1000)] * 2 + [(False, 0, 777)] * 2
            assert made.table.take_key(1, made.clock.now)[0] == 0, "nobody needs to ask again before"

    run(test)


def test_a_script_that_the_server_forgot_is_sent_once_more() -> None:
    async def test() -> None:
        async with Setup() as made:
            async def forgetful(commands: list[tuple[Any, ...]]) -> list[Any]:
                if commands[0][0] == "EVALSHA":
                    return [NoScriptError("No matching script")]
                return await made.server.grant(commands)

            made.server.answer = forgetful
            assert await made.limiter.ask(1, b"x", 0.0) == (True, 50, 1000)
            assert [trip[0][0] for trip in made.server.trips] == ["EVALSHA", "EVAL"]

    run(test)


# -- leases


def test_a_caller_gets_leases_once_it_comes_again() -> None:
    async def test() -> None:
        async with Setup() as made:
            asked = []
            for turn in range(5):
                if made.table.take_key(1, made.clock.now)[0] != 1:
                    await made.limiter.ask(1, b"x", 0.0)
                else:
                    while (spent := made.table.take_key(1, made.clock.now))[0] == 1 and not spent[3]:
                        pass
                    made.limiter.prefetch(1, b"x")
                    while len(made.server.trips) <= turn:
                        await asyncio.sleep(0)
                    await asyncio.sleep(0)
                made.clock.now += 10_000
                asked.append(wanted(made.server.trips[-1][0]))
            assert [one["ask"] + one["unspent"] for one in asked] == [0, 2, 4, 8, 16]
            assert [one["want"] for one in asked] == [1, 1, 0, 0, 0]
            assert asked[0]["lease"] == "" and len({one["lease"] for one in asked[1:]}) == 1

    run(test)


def test_what_nobody_spends_is_given_back_and_at_the_end_all() -> None:
    async def test() -> None:
        async with Setup() as made:
            for _ in range(2):
                await made.limiter.ask(1, b"x", 0.0)
                made.clock.now += 1000
            assert made.table.held(made.clock.now) == 2
            made.clock.now += IDLE - 2000
            assert made.limiter.sweep() and made.table.held(made.clock.now) == 2
            made.clock.now += 2000
            assert not made.limiter.sweep() and made.table.held(made.clock.now) == 0
            while len(made.server.trips) < 3:
                await asyncio.sleep(0)
            assert wanted(made.server.trips[2][0]) | {"seq": 0} == wanted(made.server.trips[1][0]) | {
                "seq": 0, "want": 0, "unspent": 0, "ask": 0, "back": 2}
            for _ in range(2):
                await made.limiter.ask(1, b"x", 0.0)
                made.clock.now += 1000
            held = made.table.held(made.clock.now)
            assert held > 2, "it was spent of again soon after"
        assert wanted(made.server.trips[-1][0])["back"] == held
        assert made.table.held(made.clock.now) == 0

    run(test)


def test_an_exact_limit_leases_nothing() -> None:
    async def test() -> None:
        async with Setup() as made:
            exact = made.limit(RateFigures(1000, 1, 400, 100), exact=True)
            for _ in range(3):
                await exact.ask(1, b"x", 0.0)
            assert [(wanted(trip[0])["want"], wanted(trip[0])["ask"]) for trip in made.server.trips] == [(1, 0)] * 3
            assert made.table.held(made.clock.now) == 0

    run(test)


def test_a_quotas_lease_says_where_its_tokens_were_counted() -> None:
    async def test() -> None:
        async with Setup(figures=QuotaFigures(10_000, "month", 0, 100)) as made:
            async def october(commands: list[tuple[Any, ...]]) -> list[Any]:
                return [[words[7], words[10], 1, 50, 0, 1000, LIFE, 24_321] for words in commands]

            made.server.answer = october
            for _ in range(2):
                await made.limiter.ask(1, b"x", 0.0)
                made.clock.now += 1000
            assert made.table.held(made.clock.now) == 2
            made.limiter.prefetch(1, b"x")
            while len(made.server.trips) < 3:
                await asyncio.sleep(0)
            assert made.server.trips[2][0][8:10] == (2, 24_321)

    run(test)


# -- the breaker


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("command not allowed when used memory > 'maxmemory'"), ReadOnlyError("You can't write"),
        BusyLoadingError("Redis is loading the dataset in memory"), ClusterDownError("CLUSTERDOWN"), MovedError("1 127.0.0.1:1"),
        ResponseError("MISCONF"), ResponseError("NOPERM this user has no permissions"), ConnectionError("gone"), OSError(104, "reset"),
        EOFError(),
    ],
    ids=lambda error: type(error).__name__ + str(error)[:7],
)
@pytest.mark.parametrize("whole", [False, True])
def test_every_error_is_an_outage_and_no_leave(error: Exception, whole: bool) -> None:
    async def test() -> None:
        async with Setup() as made:
            async def fails(commands: Any) -> list[Any]:
                if whole:
                    raise error
                return [error] * len(commands)

            made.server.answer = fails
            answers = [made.limiter.ask(key, b"x", 0.0) for key in (1, 2)]
            assert await asyncio.gather(*answers) == [None, None]
            assert not made.store.switch.up
            assert made.table.begin(1, made.clock.now, 1) is not None, "the lock was not given up"
            await made.up()
            assert made.server.connects == 2

    run(test)


def test_one_odd_key_is_no_outage() -> None:
    async def test() -> None:
        async with Setup() as made:
            async def odd(commands: list[tuple[Any, ...]]) -> list[Any]:
                good = await made.server.grant(commands)
                return [ResponseError("WRONGTYPE Operation against a key"), *good[1:]]

            made.server.answer = odd
            assert await asyncio.gather(made.limiter.ask(1, b"1", 0.0), made.limiter.ask(2, b"2", 0.0)) == [None, (True, 50, 1000)]
            assert made.store.switch.up

    run(test)


def test_a_server_that_says_nothing_costs_its_time_and_then_nothing() -> None:
    async def test() -> None:
        async with Setup("10ms") as made:
            made.server.answer = made.server.hang
            made.server.beats = False
            assert await asyncio.gather(*(made.limiter.ask(key, b"x", 0.0) for key in range(1, 6))) == [None] * 5
            assert not made.store.switch.up
            late = made.limiter.ask(9, b"x", 0.0)
            assert late.done() and late.result() is None, "it would wait for nothing"
            assert len(made.server.trips) == 1
            made.server.beats, made.server.answer = True, made.server.grant
            await made.up()
            assert await made.limiter.ask(1, b"x", 0.0) == (True, 50, 1000)

    run(test)


def test_calls_behind_a_full_pool_end_as_well() -> None:
    async def test() -> None:
        async with Setup("20ms", pool=1) as made:
            made.server.answer = made.server.hang
            first = made.limiter.ask(1, b"x", 0.0)
            while not made.server.trips:
                await asyncio.sleep(0)
            second = made.limiter.ask(2, b"x", 0.0)
            assert await asyncio.gather(first, second) == [None, None]
            assert len(made.server.trips) == 1

    run(test)


def test_a_request_that_waited_elsewhere_has_the_rest_of_its_time() -> None:
    async def test() -> None:
        async with Setup("1s") as made:                         # the store itself would wait on
            made.server.answer = made.server.hang
            assert await made.limiter.ask(1, b"x", 0.999) is None
            assert made.store.switch.up

    run(test)


def test_the_answer_of_a_held_up_loop_counts() -> None:
    """Timers run before what was received is read: a loop that was busy must not take its own delay for Redis's."""
    async def test() -> None:
        async with Setup("1s") as made:
            answer = made.limiter.ask(1, b"x", 0.0)
            (call,) = made.store._waiting
            call.due -= 5                       # as if the loop had been busy for so long
            made.store._check(call)
            assert made.store.switch.up and not answer.done()
            assert await answer == (True, 50, 1000)

            made.server.answer = made.server.hang
            answer = made.limiter.ask(2, b"x", 0.0)
            (call,) = made.store._waiting
            call.due -= 5
            made.store._check(call)
            assert await answer is None, "however often it looks again, it comes to an end"

    run(test)


def test_coming_back_takes_longer_each_time_and_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real(0)

    class Quick:
        def __getattr__(self, name: str) -> Any:
            return sleep if name == "sleep" else getattr(asyncio, name)

    monkeypatch.setattr(store_module, "asyncio", Quick())
    caplog.set_level(logging.INFO, "crossway.redis")

    async def test() -> None:
        made = Setup()
        made.server.refuse = [OSError(111, "Connection refused")] * 8
        async with made:
            await made.up()
            assert made.server.connects == 9

    run(test)
    assert len(waits) == 8
    bases = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    assert all(base * 0.5 <= wait <= base * 1.5 for base, wait in zip(bases, waits, strict=True)), waits
    assert len({wait / base for base, wait in zip(bases, waits, strict=True)}) > 1, "no jitter"
    assert [record.message for record in caplog.records] == ["redis is away", "redis is there"]


def test_the_number_of_gateways_is_what_redis_last_said() -> None:
    async def test() -> None:
        made = Setup()
        made.server.nodes = 3
        async with made:
            await made.up()
            assert made.shares == [3]
            made.store.count_nodes(3)
            assert made.shares == [3]
        fixed = Setup(nodes=5)
        fixed.server.nodes = 3
        async with fixed:
            await fixed.up()
            assert (fixed.store.nodes, fixed.shares) == (5, [])

    run(test)


def test_a_store_is_kept_over_a_reload_and_ended_by_the_last() -> None:
    async def test() -> None:
        async with Setup() as made:
            made.store.start(asyncio.get_running_loop())
            made.store.stop()
            await asyncio.sleep(0)
            assert made.store.switch.up and made.server.connects == 1
            made.store.stop()
            made.store.start(asyncio.get_running_loop())    # at once: nothing was hung up yet
            await store_module.settle(NEVER)
            assert made.store.switch.up and made.server.connects == 1
        assert made.server.closed == 1 and not made.store.switch.up

    run(test)


def test_a_call_says_what_it_runs() -> None:
    with pytest.raises(AssertionError):
        Call().command()
