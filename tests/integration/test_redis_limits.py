"""Two gateways of two workers on one Redis admit together exactly what is allowed; what the client is told; what a restart leaves."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.processes import PATIENCE, Gateway, eventually
from tests.integration.redis_kit import (
    CountingOrigin,
    Load,
    RedisServer,
    ask,
    gateways,
    metrics,
    shared_config,
    there,
)

RULES = """
policies:
  leased: {rate_limit: {key: route, rate: 400/s, burst: 300, scope: cluster}}
  exact: {rate_limit: {key: route, rate: 300/s, burst: 100, scope: cluster, exact: true}}
  once: {rate_limit: {key: route, rate: 1/h, burst: 120, scope: cluster, name: shop}}
  each: {rate_limit: {key: "header:x-tenant", rate: 1/h, burst: 3, scope: cluster}}
  plan: {quota: {key: "header:x-tenant", limit: 250, per: month}}
  small: {quota: {key: ip, limit: 5, per: day, window: rolling, exact: true}}
routes:
  - {name: leased, match: {prefix: /leased}, policies: [leased], upstream: origin}
  - {name: exact, match: {prefix: /exact}, policies: [exact], upstream: origin}
  - {name: once, match: {prefix: /once}, policies: [once], upstream: origin}
  - {name: each, match: {prefix: /each}, policies: [each], upstream: origin}
  - {name: plan, match: {prefix: /plan}, policies: [plan], upstream: origin}
  - {name: small, match: {prefix: /small}, policies: [small], upstream: origin}
"""
RATES = {"/leased": (400, 300), "/exact": (300, 100)}


@pytest.fixture(scope="module")
def origin() -> Iterator[CountingOrigin]:
    counting = CountingOrigin()
    yield counting
    counting.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(scope="module")
def pair(origin: CountingOrigin, server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Gateway]]:
    text = shared_config(RULES, origin, f"{{url: redis://127.0.0.1:{server.port}, timeouts: {{command: 500ms}}}}")
    with gateways(tmp_path_factory.mktemp("pair"), text) as running:
        yield running


@pytest.mark.parametrize("path", ["/leased", "/exact"])
def test_two_gateways_admit_exactly_what_the_rate_gives(pair: list[Gateway], origin: CountingOrigin, path: str) -> None:
    rate, burst = RATES[path]
    refused = [metrics(gateway)["crossway_rate_limited_total"] for gateway in pair]
    load = Load(pair, path)
    time.sleep(2.5)
    answers = load.stop()
    seconds = time.monotonic() - load.started
    assert set(answers) == {200, 429}
    assert answers[200] == origin.count(path)
    assert answers[200] <= burst + rate * seconds, "more than allowed"
    # Not starved either: the load was many times the rate all the time, so no more than a second of leases may be missing.
    assert answers[200] >= burst / 2 + rate * (seconds - 1)
    assert all(metrics(gateway)["crossway_rate_limited_total"] > before for gateway, before in zip(pair, refused, strict=True))


def test_no_stretch_of_the_run_holds_more(pair: list[Gateway], origin: CountingOrigin) -> None:
    """Pauses let the bucket fill while tokens lie in leases: that is when a bucket with leases would give too much."""
    rate, burst = RATES["/leased"]
    origin.times.pop("/leased/waves", None)
    for pause in (0.3, 0.6, 0.9):
        load = Load(pair, "/leased/waves", clients=2)
        time.sleep(0.4)
        load.stop()
        time.sleep(pause)
    times = origin.times["/leased/waves"]
    assert len(times) > burst
    # The moment at the origin lies after the decision by what the machine takes to forward; hence a little room in time.
    room = rate * 0.1
    worst = max(
        (j - i + 1) - burst - rate * (times[j] - times[i]) for i in range(0, len(times), 7) for j in range(i, len(times), 7)
    )
    assert worst <= room, worst


def test_a_burst_is_shared_to_the_last_token(pair: list[Gateway], origin: CountingOrigin) -> None:
    load = Load(pair, "/once", clients=6)
    eventually(lambda: load.answers[429] > 400)
    answers = load.stop()
    # What one machine held when the other was refused came back after half a second, and is there for anybody.
    def last() -> bool:
        answers.update(ask(gateway, "/once")[0] for gateway in pair)
        return answers[200] >= 120

    eventually(last, "the rest of the burst")
    more = Counter(ask(gateway, "/once")[0] for gateway in pair for _ in range(10))
    assert more == {429: 20}
    assert origin.count("/once") == 120


def test_the_client_is_told(pair: list[Gateway]) -> None:
    status, fields = ask(pair[0], "/each", **{"x-tenant": "told"})
    assert (status, fields["ratelimit-policy"], fields["ratelimit"]) == (200, '"each";q=3;w=10800', '"each";r=2;t=3600')
    assert ask(pair[1], "/each", **{"x-tenant": "told"})[1]["ratelimit"] == '"each";r=1;t=7200'
    assert ask(pair[0], "/each", **{"x-tenant": "told"})[0] == 200
    for gateway in pair * 2:
        status, fields = ask(gateway, "/each", **{"x-tenant": "told"})
        assert status == 429
        assert 3590 < int(fields["retry-after"]) <= 3600
    assert ask(pair[1], "/each", **{"x-tenant": "other"})[0] == 200


def test_who_is_refused_does_not_cost_a_round_trip_each(pair: list[Gateway]) -> None:
    tenant = {"x-tenant": "eager"}
    for _ in range(3):
        ask(pair[0], "/each", **tenant)
    assert ask(pair[0], "/each", **tenant)[0] == 429
    before = metrics(pair[0])["crossway_limit_waits_total"]
    started = time.monotonic()
    assert {ask(pair[0], "/each", **tenant)[0] for _ in range(50)} == {429}
    # Redis is asked again once a second, in case somebody gave back.
    assert metrics(pair[0])["crossway_limit_waits_total"] - before <= time.monotonic() - started + 1


def test_a_quota_survives_the_gateways(origin: CountingOrigin, server: RedisServer, tmp_path: Path) -> None:
    """Who ends gives back what is leased within half a second, or it is lost to the quota: a machine that stands still gets a second try."""
    assert any(_exhausted(origin, server, tmp_path / name, name) for name in ("again", "once-more")), "leases were not given back"


def _exhausted(origin: CountingOrigin, server: RedisServer, folder: Path, prefix: str) -> bool:
    """Spend a quota over two generations of gateways, never more than it; whether it was spent to the last."""
    text = shared_config(RULES, origin, f"{{url: redis://127.0.0.1:{server.port}, prefix: {prefix}, timeouts: {{command: 500ms}}}}")
    before = origin.count("/plan")
    for generation in ("first", "second"):
        (folder / generation).mkdir(parents=True)
    with gateways(folder / "first", text) as pair:
        load = Load(pair, "/plan", clients=2, headers="x-tenant: one\r\n")
        eventually(lambda: load.answers[200] > 100)
        spent = load.stop()[200]
        for gateway in pair:
            gateway.signal(signal.SIGTERM)
        assert [gateway.wait() for gateway in pair] == [0, 0]
    with gateways(folder / "second", text) as pair:
        assert ask(pair[0], "/plan", **{"x-tenant": "two"})[0] == 200
        load = Load(pair, "/plan", clients=2, headers="x-tenant: one\r\n")
        end = time.monotonic() + PATIENCE / 2
        eventually(lambda: load.answers[429] > 50 and (spent + load.answers[200] >= 250 or time.monotonic() > end), "the end of the quota")
        whole = spent + load.stop()[200]
        assert whole <= 250
        status, fields = ask(pair[1], "/plan", **{"x-tenant": "one"})
        now = time.gmtime()
        assert status == 429
        assert 0 < int(fields["retry-after"]) <= (32 - now.tm_mday) * 86400
        assert fields["ratelimit-policy"] == '"plan";q=250;w=2678400'
    assert origin.count("/plan") - before == whole + 1
    return whole == 250


def test_a_rolling_quota_counts_over_gateways(pair: list[Gateway]) -> None:
    assert [ask(gateway, "/small")[0] for gateway in pair * 4] == [200] * 5 + [429] * 3
    retry = int(ask(pair[0], "/small")[1]["retry-after"])
    assert 86400 <= retry <= 86400 + 3 * 1440


def test_leases_of_a_killed_worker_are_not_spent_twice(pair: list[Gateway], origin: CountingOrigin) -> None:
    before = origin.count("/leased/killed")
    load = Load(pair[1:], "/leased/killed", clients=1)
    load_start = load.started
    eventually(lambda: load.answers[200] > 50)
    killed = pair[0].workers()[0]
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: killed not in pair[0].workers() and len(pair[0].workers()) == 2, "a successor")
    eventually(lambda: there(pair[0]), "redis in the successor")
    answers = load.stop()
    rate, burst = RATES["/leased"]
    assert origin.count("/leased/killed") - before == answers[200] <= burst + rate * (time.monotonic() - load_start)


def test_a_reload_keeps_what_is_counted_and_the_connections(pair: list[Gateway]) -> None:
    tenant = {"x-tenant": "reload"}
    assert [ask(gateway, "/each", **tenant)[0] for gateway in pair] == [200, 200]
    connected = len([event for event in pair[0].events() if event == "redis is there"])
    path = pair[0].path
    path.write_text(path.read_text() + "  - {name: more, match: {prefix: /more}, policies: [each], upstream: origin}\n")
    pair[0].signal(signal.SIGHUP)
    eventually(lambda: ask(pair[0], "/more", **tenant)[0] != 404, "the new route")
    assert [ask(pair[0], "/more", **tenant)[0] for _ in range(2)] == [429, 429]
    assert len([event for event in pair[0].events() if event == "redis is there"]) == connected


def test_nothing_of_redis_is_there_unless_it_is_configured(origin: CountingOrigin, server: RedisServer, tmp_path: Path) -> None:
    rules = "routes: [{name: all, match: {prefix: /}, upstream: origin, policies: [{rate_limit: {key: ip, rate: 9/s}}]}]\n"
    with_it = shared_config(RULES, origin, f"{{url: redis://127.0.0.1:{server.port}}}")
    without = shared_config(rules, origin, "{}").replace("redis: {}\n", "")
    loaded = {}
    for name, text in (("with", with_it), ("without", without)):
        (tmp_path / name).mkdir()
        with gateways(tmp_path / name, text, 1) as (gateway,):
            assert ask(gateway, "/each")[0] in (200, 404)
            pids = [gateway.pid, *gateway.children()]
            loaded[name] = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
            assert any(name.startswith("crossway_redis_up{") for name in metrics(gateway)) == (name == "with")
    for module in ("lease_table", "leased_limit"):
        assert module in loaded["with"]
        assert module not in loaded["without"]
