"""The scripts on a real server, with a clock that the test sets: what is admitted, in every stretch of time, is what was allowed."""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import redis

from gateway.policies.leases import LIFE, QuotaFigures, RateFigures
from gateway.policies.scripts import NODES, QUOTA, RATE
from tests.integration.redis_kit import RedisServer

SECOND = 1_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running, running.client() as client:
        yield client


@dataclass
class Reply:
    granted: int
    leased: int
    kept: int
    left: int
    retry: int
    reset: int
    life: int
    slice: int


class Virtual:
    """A script whose TIME is `now`, microseconds since 1970: the server's own clock is taken out, nothing else is changed."""

    def __init__(self, client: redis.Redis, figures: RateFigures | QuotaFigures, now: int = 1_800_000_000 * SECOND) -> None:
        self.client = client
        self.figures = figures
        self.now = now
        self.key = f"test:{random.getrandbits(64):x}"
        self.seq = 0
        text = figures.script.text
        assert text.count("redis.call('TIME')") == 1
        self.text = text.replace("redis.call('TIME')", "{ARGV[12], ARGV[13]}")

    def __call__(
        self, want: int = 0, *, lease: str = "", unspent: int = 0, slice: int = 0, ask: int = 0, back: int = 0, seq: int | None = None
    ) -> Reply:
        self.seq += 1
        arguments = [*self.figures.arguments(want, lease, self.seq if seq is None else seq, unspent, slice, ask, back)]
        arguments += [0] * (11 - len(arguments))
        reply = self.client.eval(self.text, 1, self.key, *arguments, self.now // SECOND, self.now % SECOND)
        assert isinstance(reply, list)
        return Reply(*map(int, reply))


def rate(count: int, per: int, burst: int, most: int = 100) -> RateFigures:
    from gateway._speedups.token_bucket import RateLimit

    period, unit = RateLimit("x", count, per, burst).interval
    return RateFigures(period, unit, burst, most)


# -- rate.lua


def test_a_burst_then_the_rate_and_when_to_come_back(server: redis.Redis) -> None:
    ask = Virtual(server, rate(3, SECOND, 5))                   # a token every 333,333 1/3 us: thirds must not be lost
    assert ask(7).granted == 5
    refused = ask(1)
    assert (refused.granted, refused.left, refused.retry) == (0, 0, 333_334)
    ask.now += 333_333
    assert ask(1).granted == 0
    ask.now += 1
    assert ask(1).granted == 1
    ask.now += 999_999
    assert ask(9).granted == 2                                  # a third of a microsecond is missing
    ask.now += 1
    assert ask(9).granted == 1
    ask.now += 3600 * SECOND
    assert ask(9).granted == 5


def test_two_million_admissions_take_exactly_their_time(server: redis.Redis) -> None:
    ask = Virtual(server, rate(16_384, SECOND, 2000))
    admitted = 0
    for _ in range(2000):
        ask.now += 61_007
        admitted += ask(10**9).granted
    # The first finds a full bucket; what came in since is counted in 1/16384 s.
    assert admitted == 2000 + 1999 * 61_007 * 16_384 // SECOND


def test_what_is_leased_is_not_filled_up_again(server: redis.Redis) -> None:
    ask = Virtual(server, rate(10, SECOND, 20))
    assert ask(0, lease="a", ask=8).leased == 8
    ask.now += LIFE // 2
    # The bucket would be full again, were it not for the eight that may still be spent.
    assert ask(100).granted == 12
    ask.now += 1
    assert ask(0, lease="a", unspent=0).granted == 0            # all eight are spent: they may have been spent just now
    ask.now += 100_000
    assert ask(100).granted == 1


def test_a_lease_that_was_not_heard_of_again_is_given_up(server: redis.Redis) -> None:
    ask = Virtual(server, rate(10, SECOND, 20))
    ask(0, lease="a", ask=10)
    ask.now += 10 * SECOND
    assert ask(100).granted == 20


def test_unspent_tokens_come_back_once(server: redis.Redis) -> None:
    ask = Virtual(server, rate(1, 3600 * SECOND, 20))
    assert ask(10, lease="a", ask=5).leased == 5
    assert ask(0).left == 5
    assert ask(0, lease="a", back=4).left == 9
    assert ask(0, lease="a", back=4).left == 9, "what is not leased any more cannot be given back"
    assert ask(0, lease="b", back=4).left == 9


def test_a_command_that_was_given_up_does_nothing_late(server: redis.Redis) -> None:
    ask = Virtual(server, rate(1, 3600 * SECOND, 20))
    ask(0, lease="a", ask=2, seq=10)
    assert ask(0, lease="a", unspent=2, ask=2, seq=12).leased == 2
    late = ask(5, lease="a", unspent=2, ask=9, seq=11)
    assert late.granted == -1
    assert ask(0).left == 16


def test_a_server_without_its_data_drops_what_it_does_not_know(server: redis.Redis) -> None:
    ask = Virtual(server, rate(1, 3600 * SECOND, 20))
    assert ask(0, lease="a", ask=8).leased == 8
    server.delete(ask.key)
    reply = ask(0, lease="a", unspent=8, ask=2)
    assert (reply.kept, reply.leased) == (0, 2)


def test_a_clock_set_back_gives_nothing_twice(server: redis.Redis) -> None:
    ask = Virtual(server, rate(10, SECOND, 10))
    assert ask(10).granted == 10
    ask.now -= 100 * SECOND
    assert ask(1).granted == 0
    ask.now += 100 * SECOND + 100_000
    assert ask(5).granted == 1


def test_a_key_goes_when_it_says_no_more_than_its_absence(server: redis.Redis) -> None:
    ask = Virtual(server, rate(1, SECOND, 100))
    ask(50)
    assert 50_000 < int(server.pttl(ask.key)) < 60_000


@dataclass
class Machine:
    """A gateway as the script sees it: what it holds, until when, and what it did with it."""

    name: str
    tokens: int = 0
    ends: int = 0
    spent: list[int] = field(default_factory=list)


@pytest.mark.parametrize("seed", range(6))
def test_no_stretch_of_time_sees_more_than_burst_and_rate(server: redis.Redis, seed: int) -> None:
    chance = random.Random(seed)
    count, per, burst = chance.choice([(10, SECOND, 20), (100, SECOND, 40), (7, SECOND, 30), (1000, SECOND, 250), (50, SECOND, 8)])
    ask = Virtual(server, rate(count, per, burst))
    machines = [Machine(name) for name in "abc"]
    for _ in range(1500):
        ask.now += chance.choice([1, 50, 500, 5000, 20_000, 100_000])
        if chance.random() < 0.003:
            ask.now += chance.randrange(3 * SECOND)
        one = chance.choice(machines)
        alive = one.tokens if ask.now < one.ends else 0
        kind = chance.random()
        if kind < 0.5:                                          # spends of its lease
            take = chance.randint(0, alive)
            one.spent += [ask.now] * take
            one.tokens = alive - take
        elif kind < 0.8:                                        # fetches: for those that wait, and the next lease
            want, more = chance.randint(0, 4), chance.randint(0, max(2, burst // 4))
            reply = ask(want, lease=one.name, unspent=alive, ask=max(0, more - alive))
            if chance.random() < 0.9:                           # else the answer is lost, and the lease is what it was
                one.spent += [ask.now] * reply.granted
                one.tokens = reply.leased + (alive if reply.kept else 0)
                one.ends = ask.now + reply.life
        elif kind < 0.9:                                        # gives back
            reply = ask(0, lease=one.name, back=alive)
            one.tokens = 0
        else:
            one.spent += [ask.now] * ask(chance.randint(1, burst)).granted
    spent = sorted(moment for one in machines for moment in one.spent)
    assert len(spent) > 2 * burst, "too little happened to show anything"
    # Over all i <= j: j - i + 1 <= burst + count * (t_j - t_i) / per, in whole numbers.
    least = None
    for number, moment in enumerate(spent):
        value = number * per - count * moment
        least = value if least is None else min(least, value)
        assert value - least + per <= burst * per, (number, moment)


# -- quota.lua


def at(*when: int) -> int:
    return int(datetime.datetime(*when, tzinfo=datetime.UTC).timestamp()) * SECOND  # type: ignore[misc,arg-type]


@pytest.mark.parametrize(
    ("per", "start", "end"),
    [
        ("hour", at(2026, 3, 1, 13, 5, 9), at(2026, 3, 1, 14)),
        ("day", at(2026, 12, 31, 23, 59, 59), at(2027, 1, 1)),
        ("month", at(2028, 2, 29, 12), at(2028, 3, 1)),
        ("month", at(2100, 2, 28, 12), at(2100, 3, 1)),
        ("month", at(2026, 12, 15), at(2027, 1, 1)),
        ("month", at(2026, 1, 31), at(2026, 2, 1)),
    ],
)
def test_a_calendars_window_ends_where_the_calendar_says(server: redis.Redis, per: str, start: int, end: int) -> None:
    ask = Virtual(server, QuotaFigures(5, per, 0, 10), start)
    assert ask(7).granted == 5
    refused = ask(1)
    assert (refused.granted, refused.retry) == (0, end - start)
    ask.now = end - 1
    assert ask(1).granted == 0
    ask.now = end
    assert ask(7).granted == 5


def test_every_month_begins_on_its_first(server: redis.Redis) -> None:
    for year in (1999, 2000, 2026, 2027, 2028, 2100):
        for month in range(1, 13):
            start = at(year, month, 1)
            after = at(year + month // 12, month % 12 + 1, 1)
            ask = Virtual(server, QuotaFigures(1, "month", 0, 1), start)
            assert ask(1).reset == after - start, (year, month)
            ask.now = after - 1
            assert ask(1).granted == 0


def test_a_lease_ends_with_its_window(server: redis.Redis) -> None:
    end = at(2026, 5, 2)
    ask = Virtual(server, QuotaFigures(100, "day", 0, 10), end - 300_000)
    first = ask(0, ask=10)
    assert (first.leased, first.life) == (10, 300_000)
    ask.now = end
    later = ask(0, unspent=10, slice=first.slice, ask=1)
    assert (later.kept, later.left) == (0, 99), "yesterday's tokens are dead today"


def test_a_quota_takes_back_what_was_not_spent(server: redis.Redis) -> None:
    ask = Virtual(server, QuotaFigures(100, "hour", 0, 10))
    first = ask(3, ask=10)
    assert (first.leased, first.left) == (10, 87)
    assert ask(0, slice=first.slice, back=4).left == 91
    assert ask(0, slice=first.slice - 1, back=4).left == 91


def test_leases_grow_small_before_the_quota_ends(server: redis.Redis) -> None:
    ask = Virtual(server, QuotaFigures(20, "hour", 0, 10))
    assert [ask(0, ask=10).leased for _ in range(12)] == [2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert ask(9).granted == 7


@pytest.mark.parametrize("seed", range(4))
def test_a_rolling_window_never_holds_more_than_the_limit(server: redis.Redis, seed: int) -> None:
    chance = random.Random(seed)
    limit, span = 40, 3600 * SECOND
    ask = Virtual(server, QuotaFigures(limit, "rolling", span, 10))
    tokens = ends = slice = 0
    spent: list[int] = []
    for _ in range(1200):
        ask.now += chance.choice([1, 1000, LIFE // 3, 30 * SECOND, 400 * SECOND])
        tokens = tokens if ask.now < ends else 0
        if chance.random() < 0.5:
            take = chance.randint(0, tokens)
            spent += [ask.now] * take
            tokens -= take
        else:
            want = chance.randint(0, 5)
            reply = ask(want, unspent=tokens, slice=slice, ask=chance.randint(0, 10))
            spent += [ask.now] * reply.granted
            if want and not reply.granted:
                assert 0 < reply.retry <= span + 2 * span // 60 + LIFE
            tokens = reply.leased + (tokens if reply.kept else 0)
            ends, slice = ask.now + reply.life, reply.slice
    assert len(spent) > 3 * limit
    for number in range(limit, len(spent)):
        assert spent[number] - spent[number - limit] >= span, number


# -- the scripts as they are


def test_the_servers_own_clock_is_used(server: redis.Redis) -> None:
    arguments = rate(1, 3600 * SECOND, 3).arguments(5, "", 1, 0, 0, 0, 0)
    reply = server.eval(RATE.text, 1, "test:clock", *arguments)
    assert isinstance(reply, list) and reply[0] == 3
    seconds, _ = server.time()  # type: ignore[misc]
    assert abs(int(server.hget("test:clock", "at") or 0) // SECOND - seconds) < 5  # type: ignore[arg-type]


def test_each_script_is_known_by_its_hash(server: redis.Redis) -> None:
    for script in (RATE, QUOTA, NODES):
        assert server.script_load(script.text) == script.sha


def test_gateways_are_counted_and_forgotten(server: redis.Redis) -> None:
    assert [server.eval(NODES.text, 1, "test:nodes", name, 200) for name in "abba"] == [1, 2, 2, 2]
    server.zadd("test:nodes", {"b": 1})
    assert server.eval(NODES.text, 1, "test:nodes", "a", 200) == 1
