"""Redis killed, stopped, failed over, read only, out of memory, odd: what is configured happens, and no request waits for it.

Strategy: while Redis is away a worker counts how many requests waited for it, and for how long; that is what is asserted, not the
clock of a busy machine. SLACK is what a busy machine may add to a wait of 20 ms; a wait without an end would be seconds. Where an
answer of Redis is needed for the test to go on, the time for it is PATIENT instead.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.integration.processes import Gateway, eventually
from tests.integration.redis_kit import (
    CountingOrigin,
    Load,
    RedisServer,
    Relay,
    ask,
    free_port,
    gateways,
    longest_wait,
    metrics,
    shared_config,
    there,
)

BUDGET, SLACK = 0.020, 0.480        # seconds
PATIENT = "timeouts: {connect: 2s, command: 400ms}"
RULES = """
policies:
  local: {rate_limit: {key: route, rate: 1/h, burst: 40, scope: cluster}}
  deny: {rate_limit: {key: route, rate: 1/h, burst: 100, scope: cluster, on_failure: deny}}
  allow: {rate_limit: {key: route, rate: 1/h, burst: 5, scope: cluster, on_failure: allow}}
  exact: {rate_limit: {key: route, rate: 100/s, burst: 1000, scope: cluster, exact: true, on_failure: deny}}
  busy: {rate_limit: {key: route, rate: 2000/s, burst: 4000, scope: cluster, on_failure: deny}}
  plan: {quota: {key: route, limit: 48, per: month, on_failure: local}}
routes:
  - {name: local, match: {prefix: /local}, policies: [local], upstream: origin}
  - {name: deny, match: {prefix: /deny}, policies: [deny], upstream: origin}
  - {name: allow, match: {prefix: /allow}, policies: [allow], upstream: origin}
  - {name: exact, match: {prefix: /exact}, policies: [exact], upstream: origin}
  - {name: busy, match: {prefix: /busy}, policies: [busy], upstream: origin}
  - {name: plan, match: {prefix: /plan}, policies: [plan], upstream: origin}
  - {name: three, match: {prefix: /three}, policies: [exact, deny, busy], upstream: origin}
"""


@pytest.fixture(scope="module")
def origin() -> Iterator[CountingOrigin]:
    counting = CountingOrigin()
    yield counting
    counting.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as running:
        yield running


@pytest.fixture
def gateway(origin: CountingOrigin, server: RedisServer, tmp_path: Path) -> Iterator[Gateway]:
    with gateways(tmp_path, shared_config(RULES, origin, f"{{url: redis://127.0.0.1:{server.port}, nodes: 4, {PATIENT}}}"), 1) as (one,):
        eventually(lambda: there(one), "redis")
        yield one


@pytest.fixture
def prompt(origin: CountingOrigin, server: RedisServer, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that waits for Redis no longer than it does unless told otherwise: 20 ms."""
    with gateways(tmp_path, shared_config(RULES, origin, f"{{url: redis://127.0.0.1:{server.port}}}"), 1) as (one,):
        eventually(lambda: there(one), "redis")
        yield one


def waits(gateway: Gateway) -> float:
    return metrics(gateway)["crossway_limit_waits_total"]


def statuses(gateway: Gateway, path: str, count: int) -> Counter[int]:
    return Counter(ask(gateway, path)[0] for _ in range(count))


def decided(gateway: Gateway, how: str) -> float:
    return metrics(gateway)[f'crossway_limit_without_redis_total{{decision="{how}"}}']


def away(gateway: Gateway) -> None:
    eventually(lambda: there(gateway, 0.0), "the outage")


# -- dead


def test_killed_each_limit_does_what_is_configured(gateway: Gateway, server: RedisServer) -> None:
    assert ask(gateway, "/local")[0] == ask(gateway, "/deny")[0] == ask(gateway, "/allow")[0] == 200
    server.kill()
    away(gateway)
    waited = waits(gateway)
    assert statuses(gateway, "/local", 20) == {200: 10, 429: 10}, "a fourth of the burst of 40"
    assert statuses(gateway, "/allow", 20) == {200: 20}
    assert statuses(gateway, "/deny", 20) == {503: 20}
    assert statuses(gateway, "/plan", 5) == {200: 1, 429: 4}, "a 24th of 48, for four gateways: one at once"
    status, fields = ask(gateway, "/deny")
    assert (status, fields["retry-after"]) == (503, "1")
    assert waits(gateway) == waited, "a request waited for a dead redis"
    assert (decided(gateway, "local"), decided(gateway, "allow"), decided(gateway, "deny")) == (25, 20, 21)
    events = [line for line in gateway.log() if line["event"] == "redis is away"]
    assert events and all(line["reason"] and line["redis"].startswith("redis://127.0.0.1:") for line in events)
    server.start()
    eventually(lambda: there(gateway), "the return")
    assert ask(gateway, "/deny")[0] == 200
    assert "redis is there" in gateway.events()


def test_killed_in_the_middle_of_a_load_nobody_is_left_without_an_answer(
    prompt: Gateway, server: RedisServer, origin: CountingOrigin
) -> None:
    before = origin.count("/busy")
    load = Load([prompt], "/busy", clients=6, pace=100)
    eventually(lambda: load.answers[200] > 100)
    server.kill()
    eventually(lambda: load.answers[503] > 100, "refusals")
    server.start()
    eventually(lambda: there(prompt), "the return")
    again = load.answers[200]
    eventually(lambda: load.answers[200] > again + 100, "admissions after the return")
    answers = load.stop()
    assert set(answers) <= {200, 503}
    assert origin.count("/busy") - before == answers[200]
    assert longest_wait(prompt) <= BUDGET + SLACK


def test_a_gateway_that_starts_without_redis_serves(origin: CountingOrigin, tmp_path: Path) -> None:
    port = free_port()
    with gateways(tmp_path, shared_config(RULES, origin, f"{{url: redis://127.0.0.1:{port}, {PATIENT}}}"), 1) as (gateway,):
        assert there(gateway, 0.0)
        assert statuses(gateway, "/local", 50) == {200: 40, 429: 10}, "no other gateway was ever heard of: the whole limit"
        assert ask(gateway, "/deny")[0] == 503
        with RedisServer(tmp_path / "late", port=port):
            eventually(lambda: there(gateway), "redis")
            assert ask(gateway, "/deny")[0] == 200


# -- stopped


@pytest.mark.parametrize("path", ["/exact", "/busy", "/three"])
def test_stopped_no_request_waits_longer_than_its_time(
    prompt: Gateway, server: RedisServer, origin: CountingOrigin, path: str
) -> None:
    before = origin.count(path)
    load = Load([prompt], path, clients=6, pace=100)
    eventually(lambda: load.answers[200] > 50)
    server.pause()
    try:
        away(prompt)
        waited = waits(prompt)
        refused = load.answers[503]
        eventually(lambda: load.answers[503] > refused + 300, "refusals")
        assert waits(prompt) == waited, "a request waited although redis was known to be away"
        assert longest_wait(prompt) <= BUDGET + SLACK
        assert there(prompt, 0.0), "a stopped server was taken for one that is there"
    finally:
        server.go_on()
    eventually(lambda: there(prompt), "the return")
    if path != "/three":
        again = load.answers[200]
        eventually(lambda: load.answers[200] > again + 50, "admissions after the return")
    answers = load.stop()
    assert set(answers) <= {200, 429, 503}
    assert origin.count(path) - before == answers[200]


def test_what_a_stopped_server_runs_late_gives_nothing(gateway: Gateway, server: RedisServer) -> None:
    """The commands of the moment are still in its sockets when it goes on. They must neither lease nor admit a second time."""
    load = Load([gateway], "/deny", clients=8)
    eventually(lambda: load.answers[200] >= 20)
    server.pause()
    away(gateway)
    server.go_on()
    eventually(lambda: there(gateway), "the return")
    eventually(lambda: load.answers[429] > 200, "the end of the burst")
    assert load.stop()[200] <= 100


# -- another one


def test_a_promoted_replica_goes_on_counting(origin: CountingOrigin, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "first") as first, RedisServer(
        tmp_path / "second", "--replicaof", f"127.0.0.1 {first.port}", "--repl-diskless-sync-delay", "0"
    ) as second:
        relay = Relay(first.port)
        try:
            text = shared_config(RULES, origin, f"{{url: redis://127.0.0.1:{relay.port}, {PATIENT}}}")
            with gateways(tmp_path, text) as pair:
                before = origin.count("/deny")
                eventually(lambda: all(there(gateway) for gateway in pair), "redis")
                with second.client() as replica:
                    eventually(lambda: replica.info("replication")["master_link_status"] == "up", "the replica")  # type: ignore[index]
                    assert sum((statuses(gateway, "/deny", 15) for gateway in pair), Counter()) == {200: 30}
                    with first.client() as primary:
                        assert primary.wait(1, 10_000) == 1
                    relay.point(second.port)                    # a replica still: it takes no writes
                    for gateway in pair:
                        away(gateway)
                        assert ask(gateway, "/deny")[0] == 503
                    assert any("ReadOnly" in line.get("reason", "") for line in pair[0].log()), pair[0].log()
                    first.kill()
                    replica.replicaof("NO", "ONE")
                eventually(lambda: all(there(gateway) for gateway in pair), "the return")
                load = Load(pair, "/deny", clients=3)
                eventually(lambda: load.answers[429] > 100)
                load.stop()
                # Leases of the last moment are given back within a second; until then the rest cannot be had.
                eventually(lambda: [ask(gateway, "/deny") for gateway in pair] and origin.count("/deny") - before >= 100)
                assert {ask(gateway, "/deny")[0] for gateway in pair * 5} == {429}
                assert origin.count("/deny") - before == 100
        finally:
            relay.close()


def test_an_empty_server_gives_one_burst_more_and_no_other(
    gateway: Gateway, server: RedisServer, origin: CountingOrigin
) -> None:
    before = origin.count("/deny")
    eventually(lambda: ask(gateway, "/deny")[0] == 429)
    assert origin.count("/deny") - before == 100
    server.kill()
    away(gateway)
    server.start()
    eventually(lambda: there(gateway), "the return")
    eventually(lambda: ask(gateway, "/deny")[0] == 200, "the new bucket")
    eventually(lambda: ask(gateway, "/deny")[0] == 429)
    eventually(lambda: [ask(gateway, "/deny")] and origin.count("/deny") - before >= 200)
    assert origin.count("/deny") - before == 200


# -- there, and no use


def test_a_full_server_counts_as_away(gateway: Gateway, server: RedisServer) -> None:
    assert ask(gateway, "/deny")[0] == 200
    with server.client() as client:
        client.config_set("maxmemory", "1")
        away(gateway)                       # the heartbeat is a write
        assert statuses(gateway, "/deny", 5) == {503: 5}
        assert statuses(gateway, "/exact", 5) == {503: 5}
        assert any("OutOfMemory" in line.get("reason", "") for line in gateway.log()), gateway.log()
        client.config_set("maxmemory", "0")
    eventually(lambda: there(gateway), "the return")
    assert ask(gateway, "/exact")[0] == 200


def test_somebody_elses_value_spoils_one_key_only(gateway: Gateway, server: RedisServer) -> None:
    assert ask(gateway, "/exact")[0] == 200
    with server.client() as client:
        (name,) = client.keys("crossway:rate:exact@exact:*")  # type: ignore[misc]
        client.set(name, "a value of another kind")
        assert statuses(gateway, "/exact", 5) == {503: 5}, "a key of another type was taken for leave"
        assert there(gateway)
        assert ask(gateway, "/deny")[0] == 200
        client.delete(name)
    assert ask(gateway, "/exact")[0] == 200
    assert any(line["event"].startswith("a key in redis cannot be used") for line in gateway.log())


def test_scripts_that_the_server_forgot_are_sent_again(gateway: Gateway, server: RedisServer) -> None:
    assert ask(gateway, "/exact")[0] == 200
    with server.client() as client:
        client.script_flush()
    assert statuses(gateway, "/exact", 3) == {200: 3}
    assert there(gateway)


def test_a_wrong_password_is_said_and_nothing_is_shown_of_it(origin: CountingOrigin, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis", "--requirepass", "correct-horse", password="correct-horse") as server:
        text = shared_config(RULES, origin, f"{{url: redis://127.0.0.1:{server.port}, password: wrong-battery}}")
        with gateways(tmp_path, text, 1) as (gateway,):
            assert ask(gateway, "/deny")[0] == 503
            eventually(lambda: "redis is away" in gateway.events())
            log = gateway.errors.read_text()
            assert "wrong-battery" not in log
            assert "WRONGPASS" in log or "invalid username-password" in log


# -- clusters, TLS, sockets


@contextlib.contextmanager
def cluster(folder: Path, replicas: int) -> Iterator[list[RedisServer]]:
    """Three primaries and so many replicas of each; the primaries come first."""
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"]
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(RedisServer(folder / f"node-{number}", *options)) for number in range(3 + 3 * replicas)]
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        command = ["redis-cli", "--cluster", "create", *addresses, "--cluster-replicas", str(replicas), "--cluster-yes"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        for node in nodes:
            with node.client() as client:
                eventually(lambda client=client: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "the cluster")
                if node in nodes[3:]:
                    eventually(lambda client=client: client.info("replication")["master_link_status"] == "up", "a replica")
        yield nodes


TENANTS = """
policies:
  each: {rate_limit: {key: "header:x-tenant", rate: 1/h, burst: 4, scope: cluster, on_failure: deny}}
  plan: {quota: {key: "header:x-tenant", limit: 3, per: day, on_failure: deny}}
routes:
  - {name: each, match: {prefix: /each}, policies: [each], upstream: origin}
  - {name: plan, match: {prefix: /plan}, policies: [plan], upstream: origin}
"""


def test_a_cluster_counts_and_one_dead_node_is_an_outage(origin: CountingOrigin, tmp_path: Path) -> None:
    with cluster(tmp_path, 0) as nodes:
        text = shared_config(TENANTS, origin, f"{{url: redis://127.0.0.1:{nodes[0].port}, cluster: true, {PATIENT}}}")
        with gateways(tmp_path, text) as pair:
            eventually(lambda: all(there(gateway) for gateway in pair), "the cluster")
            for tenant in ("one", "two", "three", "four", "five", "six", "seven", "eight"):
                each = Counter(ask(gateway, "/each", **{"x-tenant": tenant})[0] for gateway in pair * 3)
                plan = Counter(ask(gateway, "/plan", **{"x-tenant": tenant})[0] for gateway in pair * 3)
                assert (each, plan) == ({200: 4, 429: 2}, {200: 3, 429: 3}), tenant
            held = []
            for node in nodes:
                with node.client() as client:
                    held.append(len(client.keys("crossway:*")))  # type: ignore[arg-type]
            assert all(held), "every key went to one node"
            nodes[2].kill()
            numbers = itertools.count()
            for gateway in pair:
                # Each worker finds out by itself, at the first key of the dead node.
                eventually(
                    lambda gateway=gateway: ask(gateway, "/each", **{"x-tenant": f"probe-{next(numbers)}"}) and there(gateway, 0.0),
                    "the outage",
                )
                assert ask(gateway, "/each", **{"x-tenant": "nine"})[0] == 503


def test_a_cluster_whose_replica_took_over_goes_on_although_the_url_names_the_dead_one(origin: CountingOrigin, tmp_path: Path) -> None:
    with cluster(tmp_path, 1) as nodes:
        text = shared_config(TENANTS, origin, f"{{url: redis://127.0.0.1:{nodes[0].port}, cluster: true, {PATIENT}}}")
        with gateways(tmp_path, text, 1) as (gateway,):
            eventually(lambda: there(gateway), "the cluster")
            tenants = [f"tenant-{number}" for number in range(12)]
            assert {ask(gateway, "/each", **{"x-tenant": tenant})[0] for tenant in tenants for _ in range(2)} == {200}
            for node in nodes[:3]:
                with node.client() as client:
                    assert client.wait(1, 10_000) == 1
            nodes[0].kill()
            numbers = itertools.count()
            eventually(lambda: ask(gateway, "/each", **{"x-tenant": f"probe-{next(numbers)}"})[0] == 503, "a caller on the dead node")
            # A worker finds out by itself, at its first key of the dead node: until both have, and came back, some are refused.
            eventually(
                lambda: {ask(gateway, "/each", **{"x-tenant": f"probe-{next(numbers)}"})[0] for _ in range(40)} == {200}, "the replica"
            )
            for tenant in tenants:
                found = [ask(gateway, "/each", **{"x-tenant": tenant})[0] for _ in range(4)]
                assert found == [200, 200, 429, 429], tenant


def certificates(folder: Path) -> None:
    """An authority and a server's certificate of it, and another authority that signed nothing."""
    def run(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)

    for name in ("ca", "stranger"):
        run("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "2")
    run("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    run("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", "server.pem", "-days", "2", "-extfile", "names")


def test_tls_with_our_authority_and_not_with_a_strangers(origin: CountingOrigin, tmp_path: Path) -> None:
    assert shutil.which("openssl")
    certificates(tmp_path)
    files = ["--tls-cert-file", f"{tmp_path}/server.pem", "--tls-key-file", f"{tmp_path}/server.key", "--tls-ca-cert-file", f"{tmp_path}/ca.pem"]
    with RedisServer(tmp_path / "redis", *files, tls=True, ssl_certfile=f"{tmp_path}/server.pem", ssl_keyfile=f"{tmp_path}/server.key") as server:
        url = f"rediss://localhost:{server.port}"
        mutual = f"tls: {{ca: {tmp_path}/ca.pem, cert: {tmp_path}/server.pem, key: {tmp_path}/server.key}}"
        text = shared_config(RULES, origin, f"{{url: '{url}', {mutual}, {PATIENT}}}")
        with gateways(tmp_path, text, 1) as (gateway,):
            eventually(lambda: there(gateway), "redis over TLS")
            assert ask(gateway, "/deny")[0] == 200
        (tmp_path / "no").mkdir()
        with gateways(tmp_path / "no", text.replace("/ca.pem", "/stranger.pem"), 1) as (gateway,):
            assert ask(gateway, "/deny")[0] == 503
            assert any("certificate" in line.get("reason", "").lower() for line in gateway.log())


def test_a_unix_socket_and_a_login(origin: CountingOrigin, tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with RedisServer(tmp_path / "redis", "--unixsocket", str(path)) as server, server.client() as client:
        rights = ["+@hash", "+@sortedset", "+@scripting", "+ping", "+time", "+pexpire", "+cluster", "+hello", "+client"]
        client.acl_setuser("crossway", enabled=True, passwords=["+correct-horse"], keys=["crossway:*"], commands=rights)
        login = "username: crossway, password: correct-horse"
        with gateways(tmp_path, shared_config(RULES, origin, f"{{url: 'unix://{path}', {login}, {PATIENT}}}"), 1) as (gateway,):
            eventually(lambda: there(gateway), "redis at the socket")
            assert [ask(gateway, name)[0] for name in ("/deny", "/plan", "/exact")] == [200, 200, 200]
            with pytest.raises(redis.RedisError):
                redis.Redis(port=server.port, username="crossway", password="correct-horse").get("other")
