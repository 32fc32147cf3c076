"""HTTP/1.1 and HTTP/2 on either side of the gateway, in every combination: what one end says is what the other hears.

The origin's scripts and the clients are the same for both versions, so a difference is the gateway's.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading

import pytest

from tests.integration.bank import Peak
from tests.integration.h2_kit import INITIAL_WINDOW, head, headers
from tests.integration.h2_origin import Call, Gone, by_path, pattern
from tests.integration.h2_pairs import Pair, exchange
from tests.integration.h2_subject import Subject
from tests.integration.processes import PATIENCE, eventually

SIZES = [0, 1, 16383, 16384, 16385, 65535, 65536, 300_000, 10 << 20]


def reported(answer: object) -> dict[str, object]:
    body: bytes = answer.body  # type: ignore[attr-defined]
    said: dict[str, object] = json.loads(body)
    return said


# -- messages


def test_a_request_says_the_same_at_both_ends(pair: Pair) -> None:
    answer = pair.ask(pair.head("/report/a%20b?x=..%2f", "PUT", ("x-a", "1"), ("x-a", "2"), ("x-obs", "caf\xe9 \x85")), b"body")
    said = reported(answer)
    assert (said["method"], said["authority"], said["length"]) == ("PUT", "bank.test", 4)
    assert str(said["path"]).endswith("/report/a%20b?x=..%2f")
    assert said["version"] == ("one" if pair.up == "one" else "two")
    (call,) = pair.origin.calls
    assert [value for name, value in call.fields if name == "x-a"] == ["1", "2"]
    assert call.get("x-obs") == "caf\xe9 \x85"
    assert call.scheme == {"one": "", "two": "http", "secure": "https"}[pair.up]
    assert "host" not in dict(call.fields) or pair.up == "one"
    assert call.get("x-forwarded-proto") == ("https" if pair.down == "secure" else "http")


def test_an_answer_says_the_same_at_both_ends(pair: Pair) -> None:
    fields = [("x-a", "1"), ("x-a", "2"), ("set-cookie", "a=b"), ("set-cookie", "c=d"), ("x-obs", "caf\xe9 \x85"), ("x-empty", "")]

    async def script(call: Call) -> None:
        await call.answer(b"gone for good", 410, fields)

    pair.origin.script = script
    answer = pair.ask(pair.head("/x"))
    assert (answer.status, bytes(answer.body)) == (410, b"gone for good")
    for name, value in fields:
        assert (name, value) in answer.fields
    assert not {"connection", "transfer-encoding", "keep-alive"} & {name for name, _ in answer.fields}


@pytest.mark.parametrize("size", SIZES)
def test_bodies_of_every_size_in_both_directions(pair: Pair, size: int) -> None:
    body = pattern(size)
    with pair.client() as client:
        said = reported(exchange(client, pair.head("/report", "POST", ("content-length", str(size))), body))
        assert (said["length"], said["digest"]) == (size, hashlib.sha256(body).hexdigest())
        if size <= 300_000:
            said = reported(exchange(client, pair.head("/report", "POST"), body))               # without a length
            assert (said["length"], said["digest"]) == (size, hashlib.sha256(body).hexdigest())
        assert exchange(client, pair.head(f"/bytes/{size}")).body == body


def test_both_sides_stream_at_once(pair: Pair) -> None:
    """Each piece comes back before the next one is sent."""
    with pair.client() as client:
        stream = client.open(pair.head("/echo", "POST"), end=False)
        total = 0
        for size in (1, 10, 1000, 16384, 50_000):
            client.data(stream, b"x" * size, end=False)
            total += size
            client.until(lambda total=total: len(client.answer_of(stream).body) == total, f"{total} bytes")
        client.data(stream, b"", end=True)
        answer = client.answer(stream)
    assert (answer.status, len(answer.body), answer.ended) == (200, total, True)


def test_ten_megabytes_through_an_echo(h2: Subject) -> None:
    """Both windows in both directions on both sides at once."""
    body = pattern(10 << 20)
    with h2.client() as client:
        assert client.ask(head("/two/echo", "POST"), body).body == body


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "DELETE", "PATCH"])
def test_methods(pair: Pair, method: str) -> None:
    with pair.client() as client:
        answer = exchange(client, pair.head("/bytes/1000", method))
        assert answer.status == 200
        assert answer.get("content-length") == "1000"
        assert len(answer.body) == (0 if method == "HEAD" else 1000)
        assert exchange(client, pair.head("/bytes/1")).body
    assert [call.method for call in pair.origin.calls] == [method, "GET"]


@pytest.mark.parametrize("status", [204, 304])
def test_answers_without_a_body(pair: Pair, status: int) -> None:
    with pair.client() as client:
        answer = exchange(client, pair.head(f"/status/{status}"))
        assert (answer.status, len(answer.body), answer.ended) == (status, 0, True)
        assert exchange(client, pair.head("/bytes/3")).status == 200


def test_interim_answers_pass(pair: Pair) -> None:
    async def script(call: Call) -> None:
        await call.inform(103, [("link", "</a.css>; rel=preload")])
        await call.inform(103, [("link", "</b.css>; rel=preload")])
        await call.answer(b"final")

    pair.origin.script = script
    answer = pair.ask(pair.head("/x"))
    assert (answer.status, bytes(answer.body)) == (200, b"final")
    assert [dict(each)["link"] for each in answer.interim] == ["</a.css>; rel=preload", "</b.css>; rel=preload"]


def test_expectations_are_met(pair: Pair) -> None:
    async def script(call: Call) -> None:
        await call.inform(100)
        await call.answer(await call.body())

    pair.origin.script = script
    with pair.client() as client:
        stream = client.open(pair.head("/x", "POST", ("expect", "100-continue"), ("content-length", "4")), end=False)
        client.until(lambda: client.answer_of(stream).interim, "100")
        client.data(stream, b"body")
        answer = client.answer(stream)
    assert (answer.status, bytes(answer.body)) == (200, b"body")


# -- trailers


def test_trailers_pass_where_both_sides_are_http2(pair: Pair) -> None:
    async def script(call: Call) -> None:
        assert await call.body() == b"body"
        await call.head(200)
        await call.write(b"answer")
        await call.finish([("x-digest", "a"), ("grpc-status", "0")])

    pair.origin.script = script
    answer = pair.ask(pair.head("/x", "POST", ("te", "trailers")), b"body", [("x-sum", "b")])
    assert (answer.status, bytes(answer.body), answer.ended) == (200, b"answer", True)
    (call,) = pair.origin.calls
    both = pair.down != "one" and pair.up != "one"
    assert answer.trailers == ([("x-digest", "a"), ("grpc-status", "0")] if both else [])
    assert call.trailers == ([("x-sum", "b")] if both else [])


def test_trailers_behind_a_length_that_was_said(h2: Subject) -> None:
    """The end of a message is the end of its stream, not the number of its bytes."""

    async def script(call: Call) -> None:
        assert await call.body() == b"body"
        await call.head(200, [("content-length", "6")])
        await call.write(b"answer")
        call.link.origin.seen.release()
        await call.released()
        await call.finish([("x-digest", "a")])

    h2.origin.script = script
    with h2.client() as client:
        stream = client.open(head("/two/x", "POST", ("te", "trailers"), ("content-length", "4")), end=False)
        client.data(stream, b"body", end=False)
        client.barrier()
        client.send(headers(stream, [("x-sum", "b")]))
        h2.origin.saw()
        client.headed(stream)
        h2.origin.release()
        answer = client.answer(stream)
    assert bytes(answer.body) == b"answer"
    assert answer.trailers == [("x-digest", "a")]
    assert h2.origin.calls[0].trailers == [("x-sum", "b")]


def test_trailers_without_a_body(pair: Pair) -> None:
    async def script(call: Call) -> None:
        assert await call.body() == b""
        await call.head(200)
        await call.finish([("x-digest", "a")])

    pair.origin.script = script
    answer = pair.ask(pair.head("/x", "POST", ("te", "trailers")), None, [("x-sum", "b")])
    assert (answer.status, bytes(answer.body), answer.ended) == (200, b"", True)


# -- early and broken answers


def test_an_answer_before_the_request_is_complete(pair: Pair) -> None:
    async def script(call: Call) -> None:
        await call.read()
        await call.answer(b"too much", 413)

    pair.origin.script = script
    with pair.client() as client:
        stream = client.open(pair.head("/x", "POST", ("content-length", "3000000")), end=False)
        client.data(stream, b"x" * 65536, end=False)
        answer = client.headed(stream)
        client.until(lambda: bytes(answer.body) == b"too much", "the body")
        assert answer.status == 413
    pair.origin.script = by_path
    assert pair.ask(pair.head("/bytes/5")).status == 200


@pytest.mark.parametrize("how", ["reset", "abort", "close"])
def test_an_upstream_that_dies_within_an_answer_never_makes_a_clean_end(pair: Pair, how: str) -> None:
    async def script(call: Call) -> None:
        await call.head(200)
        await call.write(b"x" * 1000)
        call.link.origin.seen.release()
        await call.released()
        if how == "reset":
            await call.reset()
        elif how == "abort":
            call.link.abort()
        else:
            call.link.writer.close()
        call.done = True

    pair.origin.script = script
    with pair.client() as client:
        stream = client.open(pair.head("/x"))
        client.until(lambda: len(client.answer_of(stream).body) == 1000, "what there is")
        pair.origin.release()
        answer = client.answer(stream)
    assert not answer.ended
    assert answer.reset is not None


@pytest.mark.parametrize("how", ["reset", "abort"])
def test_an_upstream_that_dies_before_an_answer_is_a_502_and_a_post_is_not_sent_again(pair: Pair, how: str) -> None:
    async def script(call: Call) -> None:
        await call.body()
        if how == "reset":
            await call.reset()
        else:
            call.link.abort()
        call.done = True

    pair.origin.script = script
    answer = pair.ask(pair.head("/x", "POST"), b"pay")
    assert answer.status == 502, answer
    assert "may have been executed" in json.loads(answer.body)["detail"]
    assert len(pair.origin.calls) == 1


def test_a_cancel_of_the_client_reaches_the_upstream(pair: Pair) -> None:
    heard = threading.Event()

    async def script(call: Call) -> None:
        try:
            call.link.origin.seen.release()
            await call.released()
        except Gone:
            heard.set()
            raise

    pair.origin.script = script
    with pair.client() as client:
        stream = client.open(pair.head("/x"))
        pair.origin.saw()
        client.cancel(stream)
        assert heard.wait(PATIENCE)


def test_a_cancel_within_a_download_reaches_the_upstream(pair: Pair) -> None:
    heard = threading.Event()

    async def script(call: Call) -> None:
        await call.head(200)
        try:
            while True:
                await call.write(b"x" * 10_000)
                await asyncio.sleep(0.001)
        except (Gone, OSError):
            heard.set()
            raise

    pair.origin.script = script
    with pair.client() as client:
        stream = client.open(pair.head("/x"))
        client.until(lambda: len(client.answer_of(stream).body) > 100_000, "some of it")
        client.cancel(stream)
        assert heard.wait(PATIENCE)


def test_a_cancel_within_an_upload_never_completes_the_request(pair: Pair) -> None:
    with pair.client() as client:
        stream = client.open(pair.head("/report", "POST"), end=False)
        client.data(stream, b"x" * 50_000, end=False)
        eventually(lambda: pair.origin.calls and pair.origin.calls[0].received == 50_000, "what was sent")
        client.cancel(stream)
        eventually(lambda: pair.origin.calls[0].gone.is_set(), "the cancel at the upstream")
    assert not pair.origin.calls[0].complete


@pytest.mark.parametrize("up", ["one", "two"])
def test_a_client_that_leaves_behind_a_whole_answer_takes_nothing_with_it(h2: Subject, up: str) -> None:
    """The answer waits for the client's window, complete, when the client breaks off: it ends without him, on a connection that others use."""
    for _ in range(20):
        with h2.client(offer={INITIAL_WINDOW: 0}) as client:
            stream = client.open(head(("" if up == "one" else "/two") + "/bytes/200000", "POST"))
            client.headed(stream)
            eventually(lambda: h2.origin.calls and h2.origin.calls[-1].done, "the whole answer")
            client.barrier()
            client.abort()
    with h2.client() as client:
        assert client.ask(head("/two/bytes/5")).status == 200


# -- backpressure


def test_a_slow_reader_holds_the_upstream_back(pair: Pair) -> None:
    sent = 0

    async def script(call: Call) -> None:
        nonlocal sent
        await call.head(200, [("content-length", str(64 << 20))])
        for _ in range(1024):
            await call.write(b"x" * 65536)
            sent += 65536
        await call.finish()

    pair.origin.script = script
    options = {} if pair.down == "one" else {"credit": False, "offer": {INITIAL_WINDOW: 65535}}
    with Peak(pair.h2.watched.pids[0]) as peak, pair.client(receive=16384, **options) as client:
        stream = client.open(pair.head("/x"))
        client.headed(stream)
        settled = 0
        while settled != sent:
            settled = sent
            assert not threading.Event().wait(0.1)
        assert sent < 48 << 20                         # sockets' own buffers included
    assert peak.growth < 20 << 20


def test_a_slow_upstream_holds_the_client_back(pair: Pair) -> None:
    async def script(call: Call) -> None:
        call.link.origin.seen.release()
        await call.released()
        await call.answer(str(len(await call.body())).encode())

    pair.origin.script = script
    body = pattern(24 << 20)
    with Peak(pair.h2.watched.pids[0]) as peak, pair.client() as client:
        stream = client.open(pair.head("/x", "POST", ("content-length", str(len(body)))), end=False)
        thread = threading.Thread(target=client.data, args=(stream, body), daemon=True)
        thread.start()
        pair.origin.saw()
        settled, taken = -1, lambda: pair.origin.calls[0].received
        while settled != taken():
            settled = taken()
            assert not threading.Event().wait(0.1)
        assert thread.is_alive() or pair.up == "one"
        growth = peak.look()
        pair.origin.release()
        thread.join(PATIENCE)
        answer = client.answer(stream)
    assert bytes(answer.body) == str(len(body)).encode()
    assert growth < 20 << 20


# -- large heads


def test_heads_that_need_more_than_a_frame(pair: Pair) -> None:
    """HEADERS and CONTINUATION, in both directions."""
    fields = [(f"x-large-{number}", chr(97 + number % 26) * 400) for number in range(60)]

    async def script(call: Call) -> None:
        await call.body()
        await call.answer(b"large", 200, fields)

    pair.origin.script = script
    with pair.client() as client:
        for _ in range(3):
            answer = exchange(client, pair.head("/x", "POST", *fields), b"body")
            assert (answer.status, bytes(answer.body)) == (200, b"large")
            assert [(name, value) for name, value in answer.fields if name.startswith("x-large-")] == fields
    for call in pair.origin.calls:
        assert [(name, value) for name, value in call.fields if name.startswith("x-large-")] == fields


def test_an_answers_head_above_the_limit_is_a_502(pair: Pair) -> None:
    async def script(call: Call) -> None:
        await call.answer(b"", 200, [(f"x-{number}", "y" * 1000) for number in range(200)])

    pair.origin.script = script
    with pair.client() as client:
        assert exchange(client, pair.head("/x")).status == 502
        pair.origin.script = by_path
        assert exchange(client, pair.head("/bytes/5")).status == 200
