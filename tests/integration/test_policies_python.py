"""Python policies through a real gateway: what they see, what they may change, and that nothing they do hurts but their own request."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.echo import (
    ISSUER,
    Echo,
    Told,
    bearer,
    client,
    config,
    exchange,
    fields_of,
    jwks,
    metric,
    problem,
    raw,
    token,
)
from tests.integration.processes import PATIENCE, ROOT, Gateway, eventually

MODULE = '''
"""Policies of the tests."""
import asyncio
import json
import socket
import struct

from gateway import InvalidBody, Policy, deny, respond

SECRET = "DE8937" + "0400440532013000"            # as if it came from a body; not to be found in the log
events = []
kept = []
leaving = []
gate = asyncio.Event()


class Denies(Policy):
    def on_request(self, request):
        return deny(403, "no-entry", 'not "you"\\r\\n', headers={"X-Why": "policy"})


class Responds(Policy):
    def on_request(self, request):
        return respond(201, '{"ok": true}', headers={"X-From": "policy", "Content-Type": "application/json"})


class Tells(Policy):
    """What the module remembers."""

    def on_request(self, request):
        return respond(200, json.dumps(events), content_type="application/json")


class Waits(Policy):
    """Suspended until somebody calls Opens."""

    async def on_request(self, request):
        path = request.path
        events.append("waiting " + path)
        try:
            await gate.wait()
        finally:
            events.append("done " + path)           # request.path would raise here if the client is gone


class Connects(Policy):
    """Clients of the gateway, within it."""

    def on_request(self, request):
        leaving[:] = [socket.create_connection(("127.0.0.1", int(request.headers["x-port"]))) for _ in range(8)]
        return respond(204)


class Asks(Policy):
    """They ask, all in the same turn, so that the gateway has enough to do to look for more at once."""

    def on_request(self, request):
        for each in leaving:
            each.sendall(b"GET /%b HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n" % (b"leaves" if each is leaving[0] else b"denies"))
        return respond(204)


class Leaves(Policy):
    """The first of them leaves while its policy's coroutine is made."""

    def on_request(self, request):
        leaving[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        leaving[0].close()
        events.append("leaves")
        return self.later()

    async def later(self):
        events.append("stays")


class Opens(Policy):
    def on_request(self, request):
        gate.set()
        return respond(204)


class Sees(Policy):
    async def on_request(self, request):
        await asyncio.sleep(0)
        seen = {
            "method": request.method, "path": request.path, "query": request.query, "host": request.host, "client": request.client,
            "id": request.request_id, "route": request.route, "params": request.params, "tag": request.headers.get("x-TAG"),
            "tags": request.headers.getlist("X-Tag"), "has": "x-tag" in request.headers, "none": request.headers.get("x-none"),
            "count": len(request.headers), "names": sorted(set(request.headers)), "sub": request.principal and request.principal.subject,
            "scopes": sorted(request.principal.scopes) if request.principal else None,
        }
        return respond(200, json.dumps(seen), content_type="application/json")


class Edits(Policy):
    def on_request(self, request):
        request.set_header("X-Set", "one")
        request.set_header("x-set", 2)
        request.add_header("x-add", "a")
        request.add_header("x-add", "b")
        request.remove_header("X-Gone")
        request.state["edited"] = True


class EditsAgain(Policy):
    def on_request(self, request):
        request.add_header("x-state", str(request.state["edited"]))


class Counts(Policy):
    body_limit = 1024

    async def on_request(self, request):
        await asyncio.sleep(0)
        request.set_header("x-length", len(request.body))


class CountsAtOnce(Policy):
    body_limit = 1024

    def on_request(self, request):
        request.add_header("x-length", len(request.body))


class CountsLess(CountsAtOnce):
    body_limit = 512


class Reads(Policy):
    body_limit = 4096

    def on_request(self, request):
        request.set_header("x-amount", request.json()["amount"])


class Objects(Policy):
    body_limit = 4096

    def on_request(self, request):
        raise InvalidBody('the member "amount" is missing\\r\\n\\u2028')


class Fails(Policy):
    """Goes wrong in the way that the request asks for."""

    def on_request(self, request):
        how = request.query
        if how.startswith("async-"):
            return self.later(how.removeprefix("async-"))
        return self.now(how)

    async def later(self, how):
        await asyncio.sleep(0)
        return self.now(how)

    def now(self, how):
        if how == "garbage":
            return 5
        if how == "text":
            return "go on"
        if how == "class":
            return deny
        if how == "generator":
            return (x for x in ())
        if how == "secret":
            raise ValueError(SECRET)
        if how == "chain":
            try:
                raise KeyError(SECRET)
            except KeyError as error:
                raise RuntimeError(SECRET) from error
        raise {"exit": SystemExit, "interrupt": KeyboardInterrupt, "closed": GeneratorExit, "cancelled": asyncio.CancelledError,
               "stop": StopIteration, "memory": MemoryError, "recursion": RecursionError}[how]


class Sleeps(Policy):
    async def on_request(self, request):
        await asyncio.sleep(600)


class Changes(Policy):
    def on_response(self, request, response):
        response.set_header("X-Status", response.status)
        response.set_header("x-seen", response.headers["x-tag"])
        response.set_header("x-seen", response.headers["x-tag"] + "!")
        response.remove_header("x-powered-by")


class Replaces(Policy):
    async def on_response(self, request, response):
        await asyncio.sleep(0)
        if response.status >= 500:
            return respond(200, "better", headers={"x-was": response.status})
        if response.status == 404:
            return deny(410, "gone", "it was there")
        if response.status == 418:
            raise ValueError(SECRET)
        if response.status == 422:
            raise InvalidBody(SECRET)
        if response.status == 420:
            await asyncio.sleep(600)


class Ends(Policy):
    def __init__(self, awaited, breaks=""):
        self.awaited = awaited
        self.breaks = breaks

    def on_end(self, request, response):
        if self.awaited:
            return self.later(request, response)
        self.note(request, response)

    async def later(self, request, response):
        await asyncio.sleep(0.01)
        self.note(request, response)

    def note(self, request, response):
        if self.breaks:
            events.append("breaking")
            raise {"exit": SystemExit, "value": ValueError}[self.breaks](SECRET)
        subject = request.principal.subject if request.principal else None
        events.append(["end", request.method, request.path, response.status, response.reason, subject, 0 < response.duration < 60])


class Keeps(Policy):
    def on_request(self, request):
        if kept:
            try:
                found = kept[0].headers.get("x-secret") or kept[0].path
            except RuntimeError as error:
                found = str(error)
            return respond(200, found)
        kept.append(request)
'''

BANK = f"bank: {{jwt: {{issuer: {ISSUER}, audience: payments, keys: jwks.json, algorithms: [RS256]}}}}"


def route(name: str, *uses: str, match: str = "") -> str:
    policies = ", ".join(use if use == "bank" else f"{{python: {{class: {use}}}}}" for use in uses)
    return f"  - {{name: {name}, match: {{{match or f'prefix: /{name}'}}}, policies: [{policies}], upstream: origin}}\n"


RULES = f"policies:\n  {BANK}\nroutes:\n" + "".join([
    route("contract", "bank", "'policy:HighValue', ceiling: 1000", match="path: /v1/payments, methods: [POST]"),
    route("denies", "rules:Denies"),
    route("responds", "rules:Responds"),
    route("tells", "rules:Tells"),
    route("waits", "rules:Waits, timeout: 30s"),
    route("opens", "rules:Opens"),
    route("connects", "rules:Connects"),
    route("asks", "rules:Asks"),
    route("leaves", "rules:Leaves"),
    route("sees", "bank", "rules:Sees", match="path: '/sees/{kind}/{id}'"),
    route("sees-nobody", "rules:Sees"),
    route("edits", "rules:Edits", "rules:EditsAgain"),
    route("counts", "rules:Counts"),
    route("counts-twice", "rules:CountsAtOnce", "rules:CountsLess"),
    route("counts-after", "rules:Counts", "rules:CountsAtOnce"),
    route("reads", "rules:Reads"),
    route("objects", "rules:Objects"),
    route("fails", "rules:Fails"),
    route("goes-on", "rules:Fails, on_failure: continue"),
    route("sleeps", "rules:Sleeps, timeout: 100ms"),
    route("sleeps-on", "rules:Sleeps, timeout: 100ms, on_failure: continue"),
    route("changes", "rules:Changes"),
    route("replaces", "rules:Replaces, timeout: 200ms"),
    route("replaces-on", "rules:Replaces, timeout: 200ms, on_failure: continue"),
    route("ends", "rules:Ends, awaited: false", "bank"),
    route("ends-later", "rules:Ends, awaited: true", match="path: '/ends-later/{what}'"),
    route("ends-badly", "rules:Ends, awaited: false, breaks: value", "rules:Ends, awaited: true, breaks: value"),
    route("ends-exit", "rules:Ends, awaited: false, breaks: exit", "rules:Ends, awaited: true, breaks: exit"),
    route("keeps", "rules:Keeps"),
    "  - {name: plain, match: {prefix: /plain}, upstream: origin}\n",
])


@pytest.fixture(scope="module")
def gateway(echo: Echo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("python")
    (folder / "jwks.json").write_text(jwks(("RS256", "rs")))
    (folder / "rules.py").write_text(MODULE)
    shutil.copy(ROOT / "tests/data/contract/policy.py", folder)
    (folder / "edge.yaml").write_text(config(RULES, echo))
    with Gateway(folder / "edge.yaml") as running:
        (worker,) = running.workers()
        yield running
        assert running.workers() == [worker], "a policy ended the worker"
        assert "DE89370400440532013000" not in running.errors.read_text()
        eventually(lambda: metric(running, "crossway_exchanges") == 0, "the last exchange's end")
        assert "internal error" not in running.errors.read_text()


@pytest.fixture(scope="module")
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with client(gateway) as made:
        yield made


def events(http: httpx.Client) -> list[Any]:
    found: list[Any] = http.get("/tells").json()
    return found


def logged(gateway: Gateway, answer: httpx.Response) -> dict[str, Any]:
    """The line of the log about the policy that failed in this answer's request."""
    name = answer.headers["x-request-id"]

    def find() -> list[dict[str, Any]]:
        return [line for line in gateway.log() if line.get("request_id") == name and "policy" in line]

    found: dict[str, Any] = eventually(find, "the line of the log")[-1]
    return found


# -- the contract


def test_the_policy_of_the_contract_runs_unchanged(http: httpx.Client) -> None:
    def pay(body: Any, scope: str = "") -> httpx.Response:
        return http.post("/v1/payments", headers=bearer(token(scope=scope)), content=body if isinstance(body, str) else json.dumps(body))

    told = Told(pay({"amount": "999.99"}))
    assert told.body == '{"amount": "999.99"}'
    said = problem(pay({"amount": 1000.01}), 403, "amount-above-ceiling")
    assert said["detail"] == "payments above 1000 need payments:high"
    assert Told(pay({"amount": 5000}, "payments:high")).body == '{"amount": 5000}'
    problem(pay("{"), 400, "invalid-body")
    problem(pay({}), 500, "policy-failed")
    problem(pay(json.dumps({"amount": "x" * 70_000})), 413, "body-too-large")
    problem(http.post("/v1/payments", content="{}"), 401, "token-missing")


# -- requests


def test_a_refusal_is_the_policies_own(http: httpx.Client, echo: Echo) -> None:
    before = len(echo.seen)
    answer = http.get("/denies")
    assert problem(answer, 403, "no-entry")["detail"] == "not ?you???"
    assert answer.headers["x-why"] == "policy"
    assert echo.seen[before:] == []


def test_an_answer_instead_of_the_upstream(http: httpx.Client) -> None:
    answer = http.get("/responds")
    assert (answer.status_code, answer.json()) == (201, {"ok": True})
    assert answer.headers.get_list("content-type") == ["application/json"]
    assert answer.headers["x-from"] == "policy"
    head = http.head("/responds")
    assert (head.status_code, head.content, head.headers["content-length"]) == (201, b"", "12")


def test_what_a_policy_sees(gateway: Gateway) -> None:
    request = (
        f"GET /sees/../sees/pay%20ment/%37?q=%2F&a HTTP/1.1\r\nHost: bank.test:80\r\nAuthorization: Bearer {token(scope='b a')}\r\n"
        "X-Tag: one\r\nx-tag:two\r\nConnection: close\r\n\r\n"
    )
    answer = exchange(gateway, request.encode())
    seen = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert seen.pop("id") == fields_of(answer, "x-request-id")[0]
    assert seen == {
        "method": "GET", "path": "/sees/pay%20ment/7", "query": "q=%2F&a", "host": "bank.test:80", "client": "127.0.0.1", "route": "sees",
        "params": {"kind": "pay%20ment", "id": "7"}, "tag": "one, two", "tags": ["one", "two"], "has": True, "none": None, "count": 5,
        "names": ["authorization", "connection", "host", "x-tag"], "sub": "alice", "scopes": ["a", "b"],
    }


def test_nobody_is_nobody(http: httpx.Client) -> None:
    seen = http.get("/sees-nobody").json()
    assert (seen["sub"], seen["scopes"], seen["query"], seen["params"]) == (None, None, "", {})


def test_headers_to_the_upstream_are_changed(http: httpx.Client) -> None:
    told = Told(http.get("/edits", headers=[("X-Set", "theirs"), ("X-Add", "theirs"), ("x-gone", "1"), ("X-GONE", "2"), ("x-state", "False")]))
    assert told.all("x-set") == ["2"]
    assert told.all("x-add") == ["theirs", "a", "b"]
    assert told.all("x-gone") == []
    assert told.all("x-state") == ["False", "True"]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("length", [0, 1, 1024])
def test_a_body_is_given_whole_and_forwarded_once(http: httpx.Client, length: int, chunked: bool) -> None:
    body = b"b" * length
    told = Told(http.post("/counts", content=iter([body[:100], body[100:]]) if chunked else body))
    assert (told.body, told.one("x-length")) == (body.decode(), str(length))
    assert told.all("content-length") == [str(length)]
    assert told.all("transfer-encoding") == []
    assert Told(http.get("/counts")).one("x-length") == "0"


def test_a_body_above_the_policies_limit_is_refused(http: httpx.Client, echo: Echo) -> None:
    before = len(echo.seen)
    problem(http.post("/counts", content=b"b" * 1025), 413, "body-too-large")
    problem(http.post("/counts", content=iter([b"b" * 1000, b"b" * 25])), 413, "body-too-large")
    problem(http.post("/counts-twice", content=b"b" * 513), 413, "body-too-large")
    assert echo.seen[before:] == []
    assert Told(http.post("/counts-twice", content=b"b" * 512)).all("x-length") == ["512", "512"]


def test_a_policy_behind_one_that_suspended_runs_at_once(http: httpx.Client) -> None:
    assert Told(http.post("/counts-after", content=b"b" * 9, timeout=5)).all("x-length") == ["9", "9"]


def test_a_client_that_asks_first_is_told_to_go_on(gateway: Gateway) -> None:
    with raw(gateway, b"POST /counts HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n") as connection:
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"abc")
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    said = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert said["body"] == "abc"
    assert "expect" not in [name.lower() for name, _ in said["fields"]]


def test_pipelined_bodies_stay_with_their_requests(gateway: Gateway) -> None:
    one = b"POST /counts HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
    two = b"POST /counts HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n2\r\nde\r\n0\r\n\r\n"
    answer = exchange(gateway, one + two)
    first, second = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in answer.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert (first["body"], second["body"]) == ("abc", "de")


@pytest.mark.parametrize("body", ["", "{", "[1,]", '{"amount": 1, "amount": 2}', '{"amount": NaN}', '{"amount": 1e', "\xff", "[" * 3000])
def test_a_body_that_is_no_json_is_the_clients_fault(http: httpx.Client, body: str) -> None:
    problem(http.post("/reads", content=body.encode("latin-1")), 400, "invalid-body")


def test_a_policies_own_complaint_about_a_body_is_well_formed(http: httpx.Client) -> None:
    said = problem(http.post("/objects", content="{}"), 400, "invalid-body")
    assert said["detail"] == "the member ?amount? is missing???"


# -- failures


FAILURES = ["garbage", "text", "class", "generator", "exit", "interrupt", "closed", "cancelled", "stop", "memory", "recursion", "secret"]


@pytest.mark.parametrize("how", [*FAILURES, *(f"async-{how}" for how in FAILURES)])
def test_whatever_a_policy_does_costs_its_own_request_only(gateway: Gateway, http: httpx.Client, echo: Echo, how: str) -> None:
    before = len(echo.seen)
    answer = http.get(f"/fails?{how}")
    said = problem(answer, 500, "policy-failed")
    assert said["detail"] == "a policy failed; the request was not completed"
    assert echo.seen[before:] == []
    line = logged(gateway, answer)
    assert (line["level"], line["route"], line["policy"]) == ("error", "fails", "fails#0:python")
    assert Told(http.get("/plain")).method == "GET"


def test_the_log_says_where_and_never_what(gateway: Gateway, http: httpx.Client) -> None:
    line = logged(gateway, http.get("/fails?async-chain"))
    assert line["error"] == "RuntimeError"
    frames = "\n".join(line["frames"])
    assert "rules.py" in frames
    assert "KeyError" in frames
    assert logged(gateway, http.get("/fails?garbage"))["text"] == "it returned int: return None, deny() or respond()"


@pytest.mark.parametrize("how", ["garbage", "secret", "exit", "async-garbage", "async-exit", "async-cancelled"])
def test_a_failure_may_be_passed_over_when_configured_so(http: httpx.Client, how: str) -> None:
    assert Told(http.get(f"/goes-on?{how}")).target == f"/goes-on?{how}"


def test_a_policy_that_takes_too_long(gateway: Gateway, http: httpx.Client) -> None:
    before = metric(gateway, "crossway_hook_timeouts_total")
    answer = http.get("/sleeps")
    problem(answer, 500, "policy-failed")
    assert logged(gateway, answer)["timeout"] == 0.1
    assert Told(http.get("/sleeps-on")).target == "/sleeps-on"
    assert metric(gateway, "crossway_hook_timeouts_total") == before + 2


# -- answers


def test_headers_of_the_answer_are_changed(http: httpx.Client) -> None:
    answer = http.get("/changes?status=202&set=X-Tag:a&set=x-tag:b&set=X-Powered-By:php&set=X-Seen:origin")
    assert answer.status_code == 202
    assert answer.headers["x-status"] == "202"
    assert answer.headers.get_list("x-seen") == ["a, b!"]
    assert "x-powered-by" not in answer.headers
    assert answer.json()["method"] == "GET"


def test_an_answer_is_replaced(http: httpx.Client) -> None:
    answer = http.get("/replaces?status=503")
    assert (answer.status_code, answer.text, answer.headers["x-was"]) == (200, "better", "503")
    problem(http.get("/replaces?status=404"), 410, "gone")
    assert Told(http.get("/replaces?status=200")).target == "/replaces?status=200"


def test_a_failure_on_the_answer(gateway: Gateway, http: httpx.Client) -> None:
    for status in (418, 420, 422):
        answer = http.get(f"/replaces?status={status}")
        assert problem(answer, 500, "policy-failed")["detail"] == "a policy failed on the answer; the request may have been executed"
        assert logged(gateway, answer)["route"] == "replaces"
        assert http.get(f"/replaces-on?status={status}").status_code == status


# -- the end


def test_the_end_is_told_with_its_outcome(http: httpx.Client) -> None:
    http.get("/ends", headers=bearer(token(sub="ender")))
    http.get("/ends/refused")
    http.get("/ends-later/now?status=404")
    expected = [["end", "GET", "/ends", 200, None, "ender", True], ["end", "GET", "/ends/refused", 401, "token-missing", None, True],
                ["end", "GET", "/ends-later/now", 404, None, None, True]]
    eventually(lambda: all(each in events(http) for each in expected), "the ends")


def test_a_failure_at_the_end_hurts_nobody(gateway: Gateway, http: httpx.Client) -> None:
    for path in ("/ends-badly", "/ends-exit"):
        before = events(http).count("breaking")
        answer = http.get(path)
        assert answer.status_code == 200
        eventually(lambda before=before: events(http).count("breaking") == before + 2, "both")
        line = logged(gateway, answer)
        assert line["event"] == "a policy failed at the end of an exchange"


def test_a_request_that_is_over_tells_nothing_more(http: httpx.Client) -> None:
    assert http.get("/keeps", headers={"X-Secret": "of the first"}).status_code == 200
    answer = http.get("/keeps", headers={"X-Secret": "of the second"})
    assert answer.text.startswith("this request is over")


def waiting(gateway: Gateway, http: httpx.Client, path: str) -> socket.socket:
    """A client whose request is suspended in a policy."""
    connection = raw(gateway, f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    eventually(lambda: f"waiting {path}" in events(http), "the policy's call")
    return connection


def test_a_client_that_leaves_cancels_the_policy(gateway: Gateway, http: httpx.Client, echo: Echo) -> None:
    (worker,) = gateway.workers()
    events(http)                                    # its connection is among the descriptors
    seen, descriptors = len(echo.seen), len(os.listdir(f"/proc/{worker}/fd"))
    for number in range(5):
        path = f"/waits/{number}"
        connection = waiting(gateway, http, path)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()                          # a reset: nobody is there any more
        eventually(lambda path=path: f"done {path}" in events(http), "the cancellation")
    eventually(lambda: metric(gateway, "crossway_exchanges") == 0)
    assert echo.seen[seen:] == []
    assert len(os.listdir(f"/proc/{worker}/fd")) == descriptors


def test_a_client_that_leaves_before_its_policy_began_is_nothing_to_warn_of(gateway: Gateway, http: httpx.Client) -> None:
    def tries() -> list[str]:
        return [event for event in events(http) if event in ("leaves", "stays")]

    for number in range(1, 6):
        assert http.get("/connects", headers={"x-port": str(http.base_url.port)}).status_code == 204
        assert http.get("/asks").status_code == 204
        eventually(lambda number=number: tries().count("leaves") == number)
    eventually(lambda: metric(gateway, "crossway_exchanges") == 0)
    assert tries().count("stays") < 5, "no client left in time"
    assert "never awaited" not in gateway.errors.read_text()


def test_others_are_served_while_a_policy_waits(gateway: Gateway, http: httpx.Client) -> None:
    with waiting(gateway, http, "/waits/long") as connection:
        # The same connection's next request waits its turn; other connections do not.
        connection.sendall(b"GET /plain HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        for _ in range(5):
            assert http.get("/plain").status_code == 200
        assert http.get("/opens").status_code == 204
        answer = b""
        connection.settimeout(PATIENCE)
        while piece := connection.recv(65536):
            answer += piece
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2
    assert answer.index(b'"/waits/long"') < answer.index(b'"/plain"')


def test_a_reload_runs_the_new_code_and_a_broken_one_changes_nothing(gateway: Gateway, http: httpx.Client) -> None:
    """The last of this file: the module's memory begins anew."""
    file = Path(gateway.path).parent / "rules.py"
    file.write_text(MODULE.replace('"no-entry"', '"no-entry-today"'))
    assert gateway.admin("/reload", "POST")[0] == 200
    problem(http.get("/denies"), 403, "no-entry-today")
    file.write_text(MODULE + "\nraise RuntimeError('half written')\n")
    assert gateway.admin("/reload", "POST")[0] == 422
    problem(http.get("/denies"), 403, "no-entry-today")


def test_on_end_is_awaited_before_the_worker_ends(echo: Echo, tmp_path: Path) -> None:
    (tmp_path / "last.py").write_text(
        "import asyncio\nfrom gateway import Policy\n\n\nclass Last(Policy):\n    async def on_end(self, request, response):\n"
        "        await asyncio.sleep(0.3)\n        with open('last.txt', 'w') as file:\n            file.write(request.path)\n"
    )
    rules = "routes:\n  - {name: all, match: {prefix: /}, policies: [{python: {class: 'last:Last'}}], upstream: origin}\n"
    (tmp_path / "edge.yaml").write_text(config(rules, echo))
    with Gateway(tmp_path / "edge.yaml") as gateway:
        assert gateway.get("/good-bye")[0] == 200
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
    assert (tmp_path / "last.txt").read_text() == "/good-bye"
