"""Splits, canaries, mirrors and faults, through a real gateway with origins that tell them apart."""

from __future__ import annotations

import hashlib
import re
import signal
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.echo import Echo, Told, client, config, exchange, metric, problem
from tests.integration.faults import ScriptedOrigin, Stream, connect, get, ok, post
from tests.integration.processes import Gateway, eventually

REQUESTS = 2000


class Origins:
    """Four origins: v1, v2 and beta serve, shadow gets copies."""

    def __init__(self) -> None:
        self.by_name = {name: Echo() for name in ("v1", "v2", "beta", "shadow")}

    def __getitem__(self, name: str) -> Echo:
        return self.by_name[name]

    def text(self, more: str = "") -> str:
        lines = [f"  {name}: {{targets: [127.0.0.1:{echo.port}]}}\n" for name, echo in self.by_name.items()]
        return "upstreams:\n" + "".join(lines) + more

    def close(self) -> None:
        for echo in self.by_name.values():
            echo.close()


ROUTES = """
policies:
  some: {fault: {abort: 503, percent: 30}}
  slow: {fault: {delay: 1h, when: {headers: {x-chaos: slow}}}}
  pause: {fault: {delay: 20ms, abort: 502, when: {cookies: {chaos: {present: true}}}}}
routes:
  - name: drawn
    match: {prefix: /drawn}
    split: [{upstream: v1, weight: 90, response_headers: {set: {x-split: v1}}}, {upstream: v2, weight: 10, response_headers: {set: {x-split: v2}}}]
  - name: sticky
    match: {prefix: /sticky}
    split: [{upstream: v1, weight: 1, response_headers: {set: {x-split: v1}}}, {upstream: v2, weight: 1, response_headers: {set: {x-split: v2}}}]
    sticky: cookie:session
    canary:
      - {when: {headers: {x-canary: always}}, upstream: beta, response_headers: {set: {x-split: beta}}}
  - name: by-source
    match: {prefix: /by-source}
    split: [{upstream: v1, weight: 1}, {upstream: v2, weight: 1}]
    sticky: source
  - {name: patient, match: {prefix: /held}, split: [{upstream: v1, weight: 0}, {upstream: hasty, weight: 1}]}
  - {name: mirrored, match: {prefix: /mirrored}, upstream: v1, mirror: {upstream: shadow, timeout: 30s}}
  - {name: plain, match: {prefix: /plain}, policies: [{rewrite: {prefix: /mirrored}}], upstream: v1}
  - {name: writes, match: {prefix: /writes}, upstream: v1, mirror: {upstream: shadow, methods: [GET, POST], strip: [x-secret], body: 4KiB, in_flight: 2, timeout: 30s}}
  - {name: sampled, match: {prefix: /sampled}, upstream: v1, mirror: {upstream: shadow, percent: 25, in_flight: 4096, timeout: 30s}}
  - {name: keyed, match: {prefix: /keyed}, policies: [KEYS], upstream: v1, mirror: {upstream: shadow, timeout: 30s}}
  - {name: to-dead, match: {prefix: /to-dead}, upstream: v1, mirror: {upstream: dead, timeout: 30s}}
  - {name: to-hung, match: {prefix: /to-hung}, upstream: v1, mirror: {upstream: hung, in_flight: 2, timeout: 200ms}}
  - {name: some-fail, match: {prefix: /some-fail}, policies: [some], upstream: v1}
  - {name: slow, match: {prefix: /slow}, policies: [slow], upstream: v1, timeouts: {total: 10m}}
  - {name: hurried, match: {prefix: /hurried}, policies: [slow], upstream: v1, timeouts: {total: 300ms}}
  - {name: pause, match: {prefix: /pause}, policies: [pause], upstream: v1}
""".replace("KEYS", f"{{api_key: {{header: x-machine, keys: [{{client: m, hash: 'sha256:{hashlib.sha256(b'the-key').hexdigest()}'}}]}}}}")


def silent(origin: ScriptedOrigin, stream: Stream) -> None:
    """Reads requests and never answers."""
    while True:
        stream.request()
        origin.seen.release()


@pytest.fixture(scope="module")
def origins() -> Iterator[Origins]:
    made = Origins()
    yield made
    made.close()


@pytest.fixture(scope="module")
def hung() -> Iterator[ScriptedOrigin]:
    made = ScriptedOrigin(silent)
    yield made
    made.close()


@pytest.fixture(scope="module")
def gateway(origins: Origins, hung: ScriptedOrigin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    path = tmp_path_factory.mktemp("shaping") / "edge.yaml"
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))                 # bound and not listening: connections are refused
        more = f"  dead: {{targets: [127.0.0.1:{dead.getsockname()[1]}]}}\n  hung: {{targets: [127.0.0.1:{hung.port}]}}\n"
        more += f"  hasty: {{targets: [127.0.0.1:{origins['v2'].port}], timeouts: {{head: 200ms}}}}\n"
        more += f"  other: {{targets: [127.0.0.1:{origins['beta'].port}]}}\n"
        text = config(ROUTES, origins["v1"], workers=1)
        path.write_text(re.sub(r"^upstreams:.*\n", lambda _: origins.text(more), text, flags=re.MULTILINE))
        with Gateway(path) as running:
            yield running
            assert "Traceback" not in running.errors.read_text()


@pytest.fixture(scope="module")
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with client(gateway) as made:
        yield made


def mirrored(gateway: Gateway, result: str) -> float:
    return metric(gateway, f'crossway_mirrored_requests_total{{result="{result}"}}')


def within(count: int, total: int, share: float) -> bool:
    """Whether `count` of `total` is within six standard deviations of `share`."""
    return abs(count - total * share) <= 6 * (total * share * (1 - share)) ** 0.5


# -- splits and canaries


def test_a_split_is_drawn_by_weight_and_counted(gateway: Gateway, http: httpx.Client, origins: Origins) -> None:
    before = len(origins["v2"].seen)
    found = Counter(http.get("/drawn/x").headers["x-split"] for _ in range(REQUESTS))
    assert found["v1"] + found["v2"] == REQUESTS
    assert within(found["v2"], REQUESTS, 0.1), found
    assert len(origins["v2"].seen) - before == found["v2"]
    name = "crossway_route_upstream_request_duration_seconds_count"
    for upstream, count in found.items():
        assert metric(gateway, f'{name}{{http_response_status_code="200",http_route="drawn",upstream="{upstream}"}}') == count
    labels = 'http_request_method="GET",http_response_status_code="200",http_route="drawn"'
    assert metric(gateway, f"http_server_request_duration_seconds_count{{{labels}}}") == REQUESTS


def test_a_cookie_keeps_a_caller_where_it_is(http: httpx.Client) -> None:
    def home(session: str, **more: str) -> str:
        return http.get("/sticky/x", headers={"cookie": f"theme=dark; session={session}", **more}).headers["x-split"]

    callers = [str(uuid.UUID(int=number)) for number in range(40)]
    homes = {caller: home(caller) for caller in callers}
    assert set(homes.values()) == {"v1", "v2"}
    for _ in range(5):
        assert {caller: home(caller) for caller in callers} == homes
    assert {home(caller, **{"x-canary": "always"}) for caller in callers} == {"beta"}
    assert {http.get("/sticky/x").headers["x-split"] for _ in range(60)} == {"v1", "v2"}


def test_callers_stay_when_the_gateway_is_another(gateway: Gateway, http: httpx.Client, tmp_path: Path) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(gateway.path.read_text().replace("workers: 1", "workers: 2"))
    with Gateway(path) as second, client(second) as other:
        for number in range(40):
            headers = {"cookie": f"session=s{number}", "connection": "close"}       # whichever worker
            assert other.get("/sticky/x", headers=headers).headers["x-split"] == http.get("/sticky/x", headers=headers).headers["x-split"]


def test_an_address_keeps_a_caller_where_it_is(http: httpx.Client, origins: Origins) -> None:
    before = {name: len(origins[name].seen) for name in ("v1", "v2")}
    for _ in range(40):
        http.get("/by-source/x")
    assert sorted(len(origins[name].seen) - before[name] for name in ("v1", "v2")) == [0, 40]


def test_the_chosen_upstreams_timeouts_count(http: httpx.Client, origins: Origins) -> None:
    problem(http.get("/held"), 504, "upstream-head-timeout")
    origins["v2"].release.set()


# -- mirrors


def answer_of(gateway: Gateway, path: str, number: int) -> bytes:
    """The whole answer, byte for byte, to a request whose answer holds nothing of the moment."""
    request_id = uuid.UUID(int=number)
    return exchange(gateway, get(f"{path}?body=fixed&set=x-a:b", f"x-request-id: {request_id}", "connection: close"))


def test_copies_arrive_marked_and_the_answers_are_the_primarys_byte_for_byte(gateway: Gateway, origins: Origins) -> None:
    before = mirrored(gateway, "2xx")
    for number in range(20):
        assert answer_of(gateway, f"/mirrored/{number}", number) == answer_of(gateway, f"/plain/{number}", number)
    eventually(lambda: mirrored(gateway, "2xx") == before + 20, "the copies")
    copied = [target for target in origins["shadow"].seen if target.startswith("/mirrored/")]
    assert sorted(copied) == sorted(f"/mirrored/{number}?body=fixed&set=x-a:b" for number in range(20))


def test_statuses_of_copies_are_counted_by_class(gateway: Gateway, http: httpx.Client) -> None:
    before = {result: mirrored(gateway, result) for result in ("2xx", "3xx", "4xx", "5xx", "failed")}
    for status in (204, 304, 404, 500, 503):
        assert http.get(f"/mirrored/x?status={status}&body=").status_code == status
    assert http.head("/mirrored/x").status_code == 200
    after = {"2xx": 2, "3xx": 1, "4xx": 1, "5xx": 2, "failed": 0}
    eventually(lambda: {result: mirrored(gateway, result) - count for result, count in before.items()} == after, "the copies")


@pytest.fixture
def recorder(gateway: Gateway, tmp_path: Path) -> Iterator[tuple[Gateway, list[tuple[str, dict[str, str], bytes]]]]:
    """A gateway of its own whose mirror keeps what it was sent."""
    seen: list[tuple[str, dict[str, str], bytes]] = []

    def record(origin: ScriptedOrigin, stream: Stream) -> None:
        while True:
            request = stream.request()
            seen.append((request.start, request.fields, request.body))
            stream.send(ok())

    origin = ScriptedOrigin(record)
    path = tmp_path / "edge.yaml"
    path.write_text(re.sub(r"(?m)^  shadow: .*", f"  shadow: {{targets: [127.0.0.1:{origin.port}]}}", gateway.path.read_text()))
    with Gateway(path) as running:
        yield running, seen
        assert "Traceback" not in running.errors.read_text()
    origin.close()


Recorder = tuple[Gateway, list[tuple[str, dict[str, str], bytes]]]


def test_a_copy_says_that_it_is_one_and_carries_no_credentials(recorder: Recorder) -> None:
    gateway, seen = recorder
    secrets = ("authorization: Bearer s", "cookie: a=b", "x-crossway-mirror: 0")
    primary = exchange(gateway, get("/mirrored/a", *secrets, "connection: close"))
    assert b'"Bearer s"' in primary
    assert b"x-crossway-mirror" not in primary
    eventually(lambda: seen, "the copy")
    start, fields, _ = seen[0]
    assert start == "GET /mirrored/a HTTP/1.1"
    assert fields["host"] == "bank.test-shadow"
    assert fields["x-crossway-mirror"] == "1"
    assert not {"authorization", "cookie", "connection"} & fields.keys()
    request_id = fields["x-request-id"].encode()
    assert request_id in primary
    assert b"HTTP/1.1 200 " in exchange(gateway, get("/keyed/a", "x-machine: the-key", "connection: close"))
    eventually(lambda: len(seen) == 2, "the copy")
    assert "x-machine" not in seen[1][1]
    assert seen[1][1]["x-auth-subject"] == "m"


def test_what_is_stripped_and_copied_is_the_configurations_choice(recorder: Recorder) -> None:
    gateway, seen = recorder
    lines = ("authorization: Bearer s", "cookie: a=b", "x-secret: 1", "expect: 100-continue")
    with connect(gateway.port()) as stream:
        stream.send(get("/writes/pay", *lines, "content-length: 4000", method="POST"))
        stream.send(b"a" * 1000)
        stream.send(b"b" * 3000)
        assert stream.answer().status == 200
    eventually(lambda: seen, "the copy")
    start, fields, body = seen[0]
    assert start == "POST /writes/pay HTTP/1.1"
    assert body == b"a" * 1000 + b"b" * 3000
    assert fields["authorization"] == "Bearer s"
    assert fields["cookie"] == "a=b"
    assert not {"x-secret", "expect"} & fields.keys()


def test_only_methods_that_were_asked_for_are_copied(recorder: Recorder) -> None:
    gateway, seen = recorder
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        exchange(gateway, get("/mirrored/a", "content-length: 0", "connection: close", method=method))
    exchange(gateway, get("/mirrored/last", "connection: close", method="OPTIONS"))
    eventually(lambda: seen, "the copy")
    assert [start for start, _, _ in seen] == ["OPTIONS /mirrored/last HTTP/1.1"]


def test_bodies_that_are_too_long_or_unknown_are_not_copied(recorder: Recorder) -> None:
    gateway, seen = recorder
    with connect(gateway.port()) as stream:
        assert stream.ask(post("/writes/long", b"x" * 4097)).status == 200
        stream.send(get("/writes/chunked", "transfer-encoding: chunked", method="POST"), b"3\r\nabc\r\n0\r\n\r\n")
        assert stream.answer().status == 200
        assert stream.ask(post("/writes/most", b"x" * 4096)).status == 200
    eventually(lambda: seen, "the copy")
    assert [(start, len(body)) for start, _, body in seen] == [("POST /writes/most HTTP/1.1", 4096)]
    assert mirrored(gateway, "skipped") == 2


def test_a_request_that_breaks_off_is_not_copied_and_gives_its_place_back(recorder: Recorder) -> None:
    gateway, seen = recorder
    for number in range(6):                         # in_flight is 2
        with connect(gateway.port()) as stream:
            stream.send(post(f"/writes/{number}", b"x" * 100)[:-1])
            eventually(lambda: metric(gateway, "crossway_exchanges") == 1, "the request")
        eventually(lambda: metric(gateway, "crossway_exchanges") == 0, "its end")
    with connect(gateway.port()) as stream:
        assert stream.ask(post("/writes/whole", b"x" * 100)).status == 200
    eventually(lambda: seen, "the copy")
    assert [start for start, _, _ in seen] == ["POST /writes/whole HTTP/1.1"]
    assert mirrored(gateway, "dropped") == mirrored(gateway, "failed") == 0


def test_a_percentage_is_copied(gateway: Gateway, http: httpx.Client) -> None:
    before = mirrored(gateway, "2xx")
    for _ in range(1000):
        assert http.get("/sampled/x").status_code == 200
    eventually(lambda: within(int(mirrored(gateway, "2xx") - before), 1000, 0.25), "the copies")
    assert mirrored(gateway, "dropped") == 0


def test_a_dead_mirror_changes_nothing(gateway: Gateway) -> None:
    before = mirrored(gateway, "failed")
    for number in range(20):
        plain = answer_of(gateway, f"/plain/{number}", number)
        assert answer_of(gateway, f"/to-dead/{number}", number) == plain
    eventually(lambda: mirrored(gateway, "failed") == before + 20, "the failures")


def test_a_hung_mirror_changes_nothing_and_gets_no_more_than_its_share(gateway: Gateway, http: httpx.Client, hung: ScriptedOrigin) -> None:
    before = {result: mirrored(gateway, result) for result in ("failed", "dropped")}
    for number in range(30):
        assert answer_of(gateway, f"/to-hung/{number}", number) == answer_of(gateway, f"/plain/{number}", number)
    eventually(lambda: sum(mirrored(gateway, result) - count for result, count in before.items()) == 30, "the ends of the copies")
    assert mirrored(gateway, "failed") - before["failed"] >= 2
    hung.saw()
    # After their time, copies give their places back.
    failed = mirrored(gateway, "failed")
    assert http.get("/to-hung/x").status_code == 200
    eventually(lambda: mirrored(gateway, "failed") == failed + 1, "the next copy")


def run_alone(tmp_path: Path, origins: Origins, mirror: ScriptedOrigin, rest: str, more: str = "") -> Path:
    """A configuration of one route with a mirror; `rest` are settings of the mirror, `more` of the route."""
    path = tmp_path / "edge.yaml"
    routes = f"routes:\n  - {{name: all, match: {{prefix: /}}, upstream: v1, mirror: {{upstream: copies{rest}}}{more}}}\n"
    text = config(routes, origins["v1"]).replace("upstreams: {", f"upstreams: {{copies: {{targets: [127.0.0.1:{mirror.port}]}}, v1: {{targets: [127.0.0.1:{origins['v1'].port}]}}, ")
    path.write_text(text)
    return path


@pytest.mark.parametrize("limit", [1, 3])
def test_copies_above_the_limit_are_dropped(tmp_path: Path, origins: Origins, limit: int) -> None:
    mirror = ScriptedOrigin(silent)
    with Gateway(run_alone(tmp_path, origins, mirror, f", in_flight: {limit}, timeout: 1h")) as gateway, client(gateway) as http:
        for _ in range(10):
            assert http.get("/x").status_code == 200
        for _ in range(limit):
            mirror.saw()
        assert mirrored(gateway, "dropped") == 10 - limit
        assert mirror.accepted == limit
        # What hangs holds up neither a reload nor the end.
        assert gateway.command("reload").returncode == 0
        assert http.get("/x").status_code == 200
        mirror.saw()
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
        assert "Traceback" not in gateway.errors.read_text()
    mirror.close()


def test_connections_to_a_mirror_are_reused_and_end_with_their_configuration(tmp_path: Path, origins: Origins) -> None:
    answered = threading.Semaphore(0)
    ended = threading.Semaphore(0)

    def serve(origin: ScriptedOrigin, stream: Stream) -> None:
        try:
            while True:
                stream.request()
                stream.send(ok())
                answered.release()
        finally:
            ended.release()

    mirror = ScriptedOrigin(serve)
    path = run_alone(tmp_path, origins, mirror, ", timeout: 30s")
    with Gateway(path) as gateway, client(gateway) as http:
        for number in range(1, 11):
            assert http.get("/x").status_code == 200
            eventually(lambda number=number: mirrored(gateway, "2xx") == number, "the copy")
        assert mirror.accepted == 1
        path.write_text(path.read_text().replace(", mirror: {upstream: copies, timeout: 30s}", ""))
        assert gateway.command("reload").returncode == 0
        eventually(lambda: ended.acquire(blocking=False), "the end of the connection")
        assert http.get("/x").status_code == 200
        assert mirrored(gateway, "2xx") == 10
    mirror.close()


def test_a_body_that_a_policy_collected_is_copied_in_one_piece(tmp_path: Path, origins: Origins) -> None:
    seen: list[tuple[dict[str, str], bytes]] = []

    def record(origin: ScriptedOrigin, stream: Stream) -> None:
        while True:
            request = stream.request()
            seen.append((request.fields, request.body))
            stream.send(ok())

    mirror = ScriptedOrigin(record)
    (tmp_path / "looks.py").write_text(
        "from gateway import Policy\nclass Looks(Policy):\n    body_limit = 8192\n    def on_request(self, request):\n"
        "        request.set_header('x-length', len(request.body))\n"
    )
    path = run_alone(tmp_path, origins, mirror, ", timeout: 30s, methods: POST, body: 4KiB", ", policies: [{python: {class: 'looks:Looks'}}]")
    with Gateway(path) as gateway, connect(gateway.port()) as stream:
        for body in (b"x" * 4097, b"abc"):
            chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            stream.send(get("/x", "transfer-encoding: chunked", method="POST"), chunked)
            assert stream.answer().status == 200
        eventually(lambda: seen, "the copy")
        assert [body for _, body in seen] == [b"abc"]
        assert (seen[0][0]["content-length"], seen[0][0]["x-length"]) == ("3", "3")
        assert mirrored(gateway, "skipped") == 1
    mirror.close()


def broken(reply: bytes) -> Callable[[ScriptedOrigin, Stream], None]:
    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        while True:
            stream.request()
            stream.send(reply)
            if reply.startswith(b"HTTP/1.0"):
                stream.half_close()

    return script


@pytest.mark.parametrize(
    ("reply", "result", "connections"),
    [
        (b"nonsense\r\n\r\n", "failed", 3),
        (b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", "failed", 3),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "4xx", 1),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", "2xx", 3),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "2xx", 1),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", "2xx", 3),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 500 unasked\r\n\r\n", "2xx", 3),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP", "2xx", 3),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok", "failed", 3),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "failed", 3),
    ],
)
def test_whatever_a_mirror_says_is_counted_and_no_more(
    tmp_path: Path, origins: Origins, reply: bytes, result: str, connections: int
) -> None:
    mirror = ScriptedOrigin(broken(reply))
    limit = "300ms" if result == "failed" else "30s"
    with Gateway(run_alone(tmp_path, origins, mirror, f", timeout: {limit}")) as gateway, client(gateway) as http:
        for number in range(1, 4):
            assert http.get("/x?body=fixed").content == b"fixed"
            eventually(lambda number=number: mirrored(gateway, result) == number, "the copy's end")
        assert mirror.accepted == connections
        assert "Traceback" not in gateway.errors.read_text()
    mirror.close()


# -- faults


def test_a_percentage_is_answered_by_a_fault(gateway: Gateway, http: httpx.Client, origins: Origins) -> None:
    before, counted = len(origins["v1"].seen), metric(gateway, 'crossway_faults_injected_total{fault="abort"}')
    answers = [http.get("/some-fail/x") for _ in range(1000)]
    failed = [answer for answer in answers if answer.status_code == 503]
    assert within(len(failed), 1000, 0.3)
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in failed:
        assert answer.headers["x-crossway-fault"] == "abort"
    problem(failed[0], 503, "fault-injected")
    assert len(origins["v1"].seen) - before == 1000 - len(failed)
    assert metric(gateway, 'crossway_faults_injected_total{fault="abort"}') - counted == len(failed)


def test_a_delay_holds_up_nobody_else_and_ends_with_its_client(gateway: Gateway, http: httpx.Client) -> None:
    with connect(gateway.port()) as waiting:
        waiting.send(get("/slow/x", "x-chaos: slow"))
        eventually(lambda: metric(gateway, "crossway_exchanges_parked") == 1, "the delay")
        for _ in range(10):
            assert http.get("/slow/x").status_code == 200
        waiting.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            waiting.sock.recv(1)
        waiting.reset()
    eventually(lambda: metric(gateway, "crossway_exchanges_parked") == 0, "its end")


def test_a_delay_ends_with_the_exchanges_time(http: httpx.Client) -> None:
    problem(http.get("/hurried/x", headers={"x-chaos": "slow"}), 504, "total-timeout")


def test_a_delay_and_an_abort_come_one_after_the_other(gateway: Gateway, http: httpx.Client) -> None:
    answer = http.get("/pause/x", headers={"cookie": "a=b; chaos=1"})
    problem(answer, 502, "fault-injected")
    assert answer.headers["x-crossway-fault"] == "delay, abort"
    assert answer.elapsed.total_seconds() >= 0.02
    assert Told(http.get("/pause/x", headers={"cookie": "chaotic=1"})).target == "/pause/x"


def test_every_start_says_that_faults_are_injected(gateway: Gateway) -> None:
    said = [line for line in gateway.log() if line["event"].startswith("faults are injected")]
    assert {line["route"] for line in said} == {"some-fail", "slow", "hurried", "pause"}
    assert {line["level"] for line in said} == {"warning"}
    assert len(said) == 4
