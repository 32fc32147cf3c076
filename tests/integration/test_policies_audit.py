"""audit through a real gateway of two workers: a line for every exchange, whole, in order, without a secret, and losses counted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.echo import HEAD, ISSUER, LISTENER, Echo, bearer, client, config, jwks, metric, raw, token
from tests.integration.faults import ScriptedOrigin, Stream, connect, post
from tests.integration.processes import PATIENCE, Gateway, eventually

API_KEY = "api-key-that-nobody-guesses-9876543210"
QUERY = "query-that-is-private"
BODY = "body-that-is-private"
COOKIE = "cookie-that-is-private"
FIELDS = {
    "time", "worker", "seq", "id", "client", "subject", "issuer", "method", "host", "path", "route", "upstream", "status", "outcome",
    "reason", "origin", "duration_us", "bytes_in", "bytes_out", "trace",
}
RULES = f"""
policies:
  bank: {{jwt: {{issuer: {ISSUER}, audience: payments, keys: jwks.json, algorithms: [RS256]}}}}
  partner: {{api_key: {{keys: [{{client: acme, hash: "sha256:{hashlib.sha256(API_KEY.encode()).hexdigest()}"}}]}}}}
  trail: {{audit: {{file: audit.jsonl}}}}
routes:
  - {{name: pay, match: {{prefix: /pay}}, policies: [trail, bank, {{scopes: [pay]}}], upstream: origin}}
  - {{name: key, match: {{prefix: /key}}, policies: [partner, trail], upstream: origin}}
  - {{name: small, match: {{prefix: /small}}, policies: [trail, {{limits: {{body: 10}}}}], upstream: origin}}
  - {{name: gone, match: {{prefix: /gone}}, policies: [trail], upstream: nobody}}
  - {{name: odd, match: {{prefix: /odd}}, policies: [trail], upstream: origin}}
  - {{name: held, match: {{prefix: /held}}, policies: [trail], upstream: origin}}
  - {{name: many, match: {{prefix: /many}}, policies: [{{audit: {{file: many.jsonl, fields: [seq, worker, path]}}}}, partner], upstream: origin}}
  - {{name: turned, match: {{prefix: /turned}}, policies: [{{audit: {{file: turned.jsonl, fields: [path]}}}}], upstream: origin}}
  - {{name: full, match: {{prefix: /full}}, policies: [{{audit: {{file: /dev/full}}}}, partner], upstream: origin}}
"""


@pytest.fixture(scope="module")
def gateway(echo: Echo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("audit")
    (folder / "jwks.json").write_text(jwks(("RS256", "rs")))
    with socket.socket() as nobody:                 # bound, never listening: it refuses
        nobody.bind(("127.0.0.1", 0))
        text = config(RULES, echo, workers=2).replace("]}}\n", f"]}}, nobody: {{targets: [127.0.0.1:{nobody.getsockname()[1]}]}}}}\n", 1)
        (folder / "edge.yaml").write_text(text)
        with Gateway(folder / "edge.yaml") as running:
            yield running
            assert "Traceback" not in running.errors.read_text()


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with client(gateway) as made:
        yield made


def lines(gateway: Gateway, name: str = "audit.jsonl") -> list[dict[str, Any]]:
    """The records so far; anything but complete JSON objects is an error."""
    text = (Path(gateway.path).parent / name).read_text()
    assert text == "" or text.endswith("}\n")
    found = [json.loads(line) for line in text.splitlines()]
    assert all(type(line) is dict for line in found)
    return found


def record(gateway: Gateway, **wanted: Any) -> dict[str, Any]:
    """The only record with these members."""
    def find() -> list[dict[str, Any]]:
        return [line for line in lines(gateway) if all(line[name] == value for name, value in wanted.items())]

    (found,) = eventually(find, f"the record of {wanted}")
    return dict(found)


# -- what a record says


def test_a_record_says_who_what_when_and_how_it_ended(gateway: Gateway, http: httpx.Client, echo: Echo) -> None:
    began = time.time()
    answer = http.post("/pay/1?x=1", headers={**bearer(token(scope="pay", sub="alice")), "Host": "bank.test"}, content=b"12345")
    assert answer.status_code == 200
    found = record(gateway, id=answer.headers["x-request-id"])
    assert set(found) == FIELDS
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", found["time"])
    when = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(began))
    assert found["time"] >= when
    assert found["worker"] in (0, 1)
    assert 0 < found["duration_us"] < PATIENCE * 1e6
    assert re.fullmatch("[0-9a-f]{32}", found["trace"])
    expected = {
        "client": "app", "subject": "alice", "issuer": ISSUER, "method": "POST", "host": "bank.test", "path": "/pay/1", "route": "pay",
        "upstream": f"127.0.0.1:{echo.port}", "status": 200, "outcome": "answered", "reason": None, "origin": "127.0.0.1",
        "bytes_in": 5, "bytes_out": len(answer.content),
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(("path", "headers", "body", "expected"), [
    ("/pay/2", {}, b"", {"status": 401, "outcome": "refused", "reason": "token-missing", "subject": None, "upstream": None}),
    ("/pay/3", bearer("x.y.z"), b"", {"status": 401, "outcome": "refused", "reason": "token-malformed", "subject": None}),
    ("/pay/4", bearer(token(scope="look", sub="bob")), b"", {"status": 403, "outcome": "refused", "reason": "insufficient-scope", "subject": "bob"}),
    ("/key/1", {"x-api-key": API_KEY}, b"", {"status": 200, "outcome": "answered", "client": "acme", "subject": "acme"}),
    ("/small/1", {}, b"12345678901", {"status": 413, "outcome": "refused", "reason": "body-too-large"}),
    ("/gone/1", {}, b"", {"status": 503, "outcome": "failed", "reason": "upstream-unreachable"}),
    ("/key/2", {"x-api-key": "wrong"}, b"", {"status": 401, "outcome": "refused", "reason": "key-invalid", "client": None}),
])
def test_every_outcome_has_its_record(
    gateway: Gateway, http: httpx.Client, path: str, headers: dict[str, str], body: bytes, expected: dict[str, Any]
) -> None:
    answer = http.request("POST" if body else "GET", path, headers=headers, content=body)
    found = record(gateway, id=answer.headers["x-request-id"])
    assert {name: found[name] for name in expected} == expected
    assert found["path"] == path


def test_an_upstreams_own_error_is_an_answer(gateway: Gateway, http: httpx.Client) -> None:
    answer = http.get("/small/status?status=500")
    found = record(gateway, id=answer.headers["x-request-id"])
    assert (found["status"], found["outcome"], found["reason"]) == (500, "answered", None)


def test_a_client_that_leaves_is_recorded(gateway: Gateway, echo: Echo) -> None:
    connection = raw(gateway, b"GET /held/left HTTP/1.1\r\nHost: a\r\n\r\n")
    assert echo.held.acquire(timeout=PATIENCE)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    found = record(gateway, path="/held/left")
    assert (found["status"], found["outcome"]) == (499, "aborted")
    echo.release.set()


def test_odd_names_stay_within_their_strings(gateway: Gateway, http: httpx.Client) -> None:
    answer = http.get("/odd/%22%C3%A4/%E2%80%A8'")
    assert record(gateway, id=answer.headers["x-request-id"])["path"] == "/odd/%22%C3%A4/%E2%80%A8'"
    for subject in ('"', "\\", "ä", "\U0001f3e6", "x" * 1024, '"' * 1024, "\u20ac" * 512):
        answer = http.get("/pay/subject", headers=bearer(token(scope="pay", sub=subject)))
        assert answer.status_code == 200
        found = record(gateway, id=answer.headers["x-request-id"])
        # What is long is cut, perhaps within a character.
        assert len(found["subject"]) >= min(len(subject), 80)
        assert subject.startswith(found["subject"].rstrip("\ufffd"))


def test_a_long_path_is_cut(gateway: Gateway, http: httpx.Client) -> None:
    answer = http.get("/small/" + "x" * 4000)
    assert record(gateway, id=answer.headers["x-request-id"])["path"] == ("/small/" + "x" * 4000)[:1024]


def test_nothing_secret_is_ever_written(gateway: Gateway, http: httpx.Client) -> None:
    good, bad = token(scope="pay", jti="secret"), token("RS256", "somebody-else", header={"kid": "rs"})
    for value in (good, bad):
        http.post(f"/pay/s?{QUERY}", headers={**bearer(value), "Cookie": COOKIE}, content=BODY)
    http.post(f"/key/s?{QUERY}", headers={"x-api-key": API_KEY, "Cookie": COOKIE}, content=BODY)
    last = http.post(f"/small/s?{QUERY}", content=BODY)
    record(gateway, id=last.headers["x-request-id"])
    folder = Path(gateway.path).parent
    text = (folder / "audit.jsonl").read_text() + gateway.errors.read_text()
    for secret in (API_KEY, QUERY, BODY, COOKIE, good, bad, good.split(".")[2], bad.split(".")[1]):
        assert secret not in text


# -- how records are kept


def test_no_record_is_lost_split_or_doubled_by_two_workers(gateway: Gateway) -> None:
    def run(number: int) -> None:
        for turn in range(4):
            with client(gateway) as made:
                for step in range(20):
                    assert made.get(f"/many/{number}-{turn}-{step}").status_code == 401

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = eventually(lambda: len(lines(gateway, "many.jsonl")) >= 480 and lines(gateway, "many.jsonl"), "the records")
    assert {line["path"] for line in found} == {f"/many/{n}-{t}-{s}" for n in range(6) for t in range(4) for s in range(20)}
    assert all(set(line) == {"seq", "worker", "path"} for line in found)
    numbers: dict[int, list[int]] = defaultdict(list)
    for line in found:
        numbers[line["worker"]].append(line["seq"])
    assert set(numbers) == {0, 1}
    for worker, sequence in numbers.items():
        assert sequence == list(range(1, len(sequence) + 1)), f"a gap in what worker {worker} wrote"


def test_a_dead_worker_leaves_whole_lines_and_its_successor_goes_on(gateway: Gateway) -> None:
    before = len(lines(gateway, "many.jsonl"))
    old = gateway.workers()[1]
    os.kill(old, signal.SIGKILL)
    eventually(lambda: old not in gateway.workers() and len(gateway.workers()) == 2)
    for number in range(40):
        with client(gateway) as made:
            made.get(f"/many/after-{number}")
    found = eventually(lambda: len(lines(gateway, "many.jsonl")) >= before + 40 and lines(gateway, "many.jsonl")[before:])
    second = [line["seq"] for line in found if line["worker"] == 1]
    assert second == list(range(1, len(second) + 1))            # 1 again: a new process begins


def test_a_reload_keeps_the_sequence(gateway: Gateway) -> None:
    def asked(mark: str) -> list[dict[str, Any]]:
        with client(gateway) as made:               # a connection each: either worker may get it
            made.get(f"/many/{mark}")
        return eventually(lambda: [line for line in lines(gateway, "many.jsonl") if line["path"] == f"/many/{mark}"], mark)

    (before,) = asked("before-the-reload")
    assert gateway.admin("/reload", "POST")[0] == 200
    after = before | {"worker": None}
    for number in range(200):
        if after["worker"] == before["worker"]:
            break
        (after,) = asked(f"after-the-reload-{number}")
    assert after["worker"] == before["worker"] and after["seq"] == before["seq"] + 1


def test_files_are_reopened(gateway: Gateway) -> None:
    folder = Path(gateway.path).parent

    def fill(mark: str) -> set[str]:
        wanted = {f"/turned/{mark}-{number}" for number in range(20)}
        for path in wanted:
            with client(gateway) as made:           # a connection each: both workers write
                assert made.get(path).status_code == 200
        return wanted

    first = fill("a")
    eventually(lambda: {line["path"] for line in lines(gateway, "turned.jsonl")} >= first, "the first records")
    (folder / "turned.jsonl").rename(folder / "turned.jsonl.1")
    gateway.signal(signal.SIGUSR1)
    second = fill("b")
    eventually((folder / "turned.jsonl").exists, "the new file")

    def both() -> set[str]:
        return {line["path"] for name in ("turned.jsonl", "turned.jsonl.1") for line in lines(gateway, name)}

    eventually(lambda: both() == first | second, "every record")
    assert (folder / "turned.jsonl").stat().st_mode & 0o777 == 0o640
    third = fill("c")
    eventually(lambda: {line["path"] for line in lines(gateway, "turned.jsonl")} >= third, "the records after it")


def test_a_full_disk_counts_what_it_loses_and_stops_nobody(gateway: Gateway, http: httpx.Client) -> None:
    count = 6000
    request = f"GET /full/{'x' * 1000} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    accepted, lost = (metric(gateway, f"crossway_audit_records{name}_total") for name in ("", "_lost"))
    with raw(gateway, b"") as connection:
        sender = threading.Thread(target=connection.sendall, args=(request * count,))
        sender.start()
        answers, tail = 0, b""
        while answers < count:
            piece = connection.recv(1 << 16)
            assert piece, f"the connection ended after {answers} answers"
            text = tail + piece
            answers += text.count(b"HTTP/1.1 401 ")
            tail = text[-12:] if b"HTTP/1.1 401 " not in text[-12:] else b""
        sender.join()
    assert metric(gateway, "crossway_audit_records_lost_total") > lost
    total = metric(gateway, "crossway_audit_records_total") + metric(gateway, "crossway_audit_records_lost_total")
    assert total == accepted + lost + count
    assert http.get("/key/x", headers={"x-api-key": API_KEY}).status_code == 200


def test_the_last_records_are_written_before_the_end_and_to_standard_output_too(echo: Echo, tmp_path: Path) -> None:
    rules = "".join(
        f"  - {{name: {name}, match: {{prefix: /{name}}}, policies: [{{audit: {{file: {file}, fields: [path]}}}}], upstream: origin}}\n"
        for name, file in (("file", "audit.jsonl"), ("out", "stdout"), ("device", "/dev/stdout"), ("err", "stderr"))
    )
    (tmp_path / "edge.yaml").write_text(config("routes:\n" + rules, echo))
    with Gateway(tmp_path / "edge.yaml") as gateway:
        for path in ("/file", "/out", "/device", "/err"):
            assert gateway.get(path)[0] == 200
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
        assert gateway.process.stdout is not None
        rest = gateway.process.stdout.read()
    assert (tmp_path / "audit.jsonl").read_text() == '{"path":"/file"}\n'
    assert '{"path":"/out"}\n' in rest
    assert '{"path":"/device"}\n' in rest
    assert '{"path":"/err"}\n' in gateway.errors.read_text()
    assert not (tmp_path / "stdout").exists()


def test_an_exchange_that_the_end_of_the_drain_cuts_has_its_record(echo: Echo, tmp_path: Path) -> None:
    echo.release.clear()
    rules = "routes:\n  - {name: held, match: {prefix: /held}, policies: [{audit: {file: audit.jsonl}}], upstream: origin}\n"
    (tmp_path / "edge.yaml").write_text(config(rules, echo) + "drain: {deadline: 200ms}\n")
    with Gateway(tmp_path / "edge.yaml") as gateway, raw(gateway, b"GET /held/cut HTTP/1.1\r\nHost: a\r\n\r\n"):
        assert echo.held.acquire(timeout=PATIENCE)
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
        (found,) = lines(gateway)
    assert (found["path"], found["outcome"]) == ("/held/cut", "failed")
    echo.release.set()


@pytest.mark.parametrize("first", ["client", "upstream"])
def test_an_answer_that_the_end_of_the_drain_cuts_is_told_as_a_failure(tmp_path: Path, first: str) -> None:
    """It was sent, and executed: no policy refused it, and it was not answered. `first` is whose descriptor is the lower one, cut before the other."""

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        while stream.request().path != "/pay/cut":
            stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        stream.send(b"HTTP/1.1 201 Created\r\ncontent-length: 100\r\n\r\nhalf of it")
        stream.rest()

    rules = "routes: [{name: pay, match: {prefix: /pay}, policies: [{audit: {file: audit.jsonl}}], upstream: origin}]\ndrain: {deadline: 200ms}\n"
    with contextlib.closing(ScriptedOrigin(script)) as origin:
        upstream = f"upstreams: {{origin: {{targets: [127.0.0.1:{origin.port}]}}}}\n"
        (tmp_path / "edge.yaml").write_text(HEAD.format(workers=1) + LISTENER + upstream + rules)
        with Gateway(tmp_path / "edge.yaml") as gateway, contextlib.ExitStack() as stack:
            client = stack.enter_context(connect(gateway.port()))
            if first == "upstream":
                assert client.ask(post("/pay/before", b"pay")).status == 200
                client = stack.enter_context(connect(gateway.port()))
            client.send(post("/pay/cut", b"pay"))
            client.until(b"half of it")
            gateway.signal(signal.SIGTERM)
            assert gateway.wait() == 0
            (found,) = [line for line in lines(gateway) if line["path"] == "/pay/cut"]
            said = [line for line in gateway.log() if line.get("path") == "/pay/cut"]
    assert (found["status"], found["outcome"]) == (201, "failed")
    assert [(line["event"], line["status"], line["sent"]) for line in said] == [("an exchange failed", 201, True)]
