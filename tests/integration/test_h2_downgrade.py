"""Requests in HTTP/2 that hide another request, for an upstream in HTTP/1.1 whose every byte is looked at.

Strategy: each case is sent on a stream of its own, followed by an honest request on the same connection. The upstream must have received
either nothing of the case or exactly one request, and the honest one after it with its own answer. A third request, as h11 reads what came,
or one for another path is the proof of smuggling.
"""

from __future__ import annotations

import pytest

from tests.integration.h2_kit import END_STREAM, PROTOCOL_ERROR, Answer, Fields, frame, head, headers
from tests.integration.h2_subject import Subject

M, S, A, P = (":method", "POST"), (":scheme", "http"), (":authority", "bank.test"), (":path", "/front")
HIDDEN = "GET /hidden HTTP/1.1\r\nhost: bank.test\r\n\r\n"

CASES: dict[str, tuple[Fields, bytes]] = {
    "content-length too small": ([M, S, A, P, ("content-length", "4")], b"abcd" + HIDDEN.encode()),
    "content-length 0 and a body": ([M, S, A, P, ("content-length", "0")], HIDDEN.encode()),
    "content-length too large": ([M, S, A, P, ("content-length", "100")], HIDDEN.encode()),
    "content-length with a sign": ([M, S, A, P, ("content-length", f"+{len(HIDDEN)}")], HIDDEN.encode()),
    "content-length twice": ([M, S, A, P, ("content-length", "0"), ("content-length", str(len(HIDDEN)))], HIDDEN.encode()),
    "content-length as a list": ([M, S, A, P, ("content-length", f"{len(HIDDEN)}, {len(HIDDEN)}")], HIDDEN.encode()),
    "content-length of 2^64 + n": ([M, S, A, P, ("content-length", str(2**64 + len(HIDDEN)))], HIDDEN.encode()),
    "content-length with a NUL": ([M, S, A, P, ("content-length", f"{len(HIDDEN)}\0")], HIDDEN.encode()),
    "transfer-encoding: chunked": ([M, S, A, P, ("transfer-encoding", "chunked")], b"0\r\n\r\n" + HIDDEN.encode()),
    "transfer-encoding: identity": ([M, S, A, P, ("transfer-encoding", "identity")], b"0\r\n\r\n" + HIDDEN.encode()),
    "transfer_encoding": ([M, S, A, P, ("transfer_encoding", "chunked")], b"0\r\n\r\n" + HIDDEN.encode()),
    "transfer-encoding with a space": ([M, S, A, P, ("transfer-encoding ", "chunked")], b"0\r\n\r\n" + HIDDEN.encode()),
    "te and transfer-encoding in a value": ([M, S, A, P, ("x", "y\r\ntransfer-encoding: chunked")], b"0\r\n\r\n" + HIDDEN.encode()),
    "a field in a value": ([M, S, A, P, ("x", f"y\r\n\r\n{HIDDEN}")], b""),
    "a bare LF in a value": ([M, S, A, P, ("x", f"y\n\n{HIDDEN}")], b""),
    "a bare CR in a value": ([M, S, A, P, ("x", f"y\r\r{HIDDEN}")], b""),
    "a NUL in a value": ([M, S, A, P, ("x", f"y\0{HIDDEN}")], b""),
    "a field in a name": ([M, S, A, P, (f"x: y\r\n\r\n{HIDDEN}", "z")], b""),
    "a colon in a name": ([M, S, A, P, ("transfer-encoding: chunked\r\nx", "y")], b"0\r\n\r\n" + HIDDEN.encode()),
    "an upper name": ([M, S, A, P, ("Transfer-Encoding", "chunked")], b"0\r\n\r\n" + HIDDEN.encode()),
    "an empty name": ([M, S, A, P, ("", f"y\r\n\r\n{HIDDEN}")], b""),
    "a path with a line end": ([M, S, A, (":path", f"/front HTTP/1.1\r\nhost: x\r\n\r\n{HIDDEN}")], b""),
    "a path with a space": ([M, S, A, (":path", "/front HTTP/1.1 /hidden")], b""),
    "an absolute path": ([M, S, A, (":path", "http://evil.test/hidden")], b""),
    "a path that is a userinfo": ([M, S, A, (":path", "@evil.test/hidden")], b""),
    "a path with a fragment": ([M, S, A, (":path", "/front#/hidden")], b""),
    "an empty path": ([M, S, A, (":path", "")], b""),
    "an asterisk": ([M, S, A, (":path", "*")], b""),
    "a method with a request": ([(":method", "GET /hidden HTTP/1.1\r\nhost: x\r\n\r\nPOST"), S, A, P], b""),
    "a method with a space": ([(":method", "GET /hidden"), S, A, P], b""),
    "a scheme with a line end": ([M, (":scheme", f"http\r\n\r\n{HIDDEN}"), A, P], b""),
    "a scheme that is a place": ([M, (":scheme", "http://evil.test/hidden?"), A, P], b""),
    "an authority with a line end": ([M, S, (":authority", f"bank.test\r\n\r\n{HIDDEN}"), P], b""),
    "an authority with userinfo": ([M, S, (":authority", "bank.test@evil.test"), P], b""),
    "an authority with a path": ([M, S, (":authority", "bank.test/hidden"), P], b""),
    "authority and host differ": ([M, S, A, P, ("host", "evil.test")], b""),
    "two hosts": ([M, S, P, ("host", "bank.test"), ("host", "evil.test")], b""),
    "two paths": ([M, S, A, P, (":path", "/hidden")], b""),
    "two methods": ([M, (":method", "GET"), S, A, P], b""),
    "a late path": ([M, S, A, ("x", "y"), (":path", "/hidden")], b""),
    "an unknown pseudo-header": ([M, S, A, P, (":hidden", "GET /hidden")], b""),
    "connection: content-length": ([M, S, A, P, ("connection", "content-length"), ("content-length", str(len(HIDDEN)))], HIDDEN.encode()),
    "upgrade: h2c": ([M, S, A, P, ("upgrade", "h2c"), ("http2-settings", "AAMAAABk")], HIDDEN.encode()),
    "expect": ([M, S, A, P, ("expect", "100-continue"), ("content-length", str(len(HIDDEN)))], HIDDEN.encode()),
    "CONNECT with a path": ([(":method", "CONNECT"), S, A, P], HIDDEN.encode()),
    "CONNECT": ([(":method", "CONNECT"), (":authority", "bank.test:80")], HIDDEN.encode()),
    "CONNECT with a protocol": ([(":method", "CONNECT"), S, A, P, (":protocol", "websocket")], HIDDEN.encode()),
    "a body behind HEAD": ([(":method", "HEAD"), S, A, P], HIDDEN.encode()),
    "a body behind GET": ([(":method", "GET"), S, A, P], HIDDEN.encode()),
    "a body without a length": ([M, S, A, P], HIDDEN.encode()),
    "a body that ends chunks": ([M, S, A, P], b"0\r\n\r\n" + HIDDEN.encode()),
    "a large chunk's head as a body": ([M, S, A, P], b"ffffffff\r\n" + HIDDEN.encode()),
}
# These are sound requests: their bodies only look like one.
SOUND = {"expect", "a body behind HEAD", "a body behind GET", "a body without a length", "a body that ends chunks", "a large chunk's head as a body"}


@pytest.mark.parametrize("case", CASES)
def test_at_most_one_request_reaches_the_upstream(h2: Subject, case: str) -> None:
    fields, body = CASES[case]
    with h2.client() as client:
        stream = client.stream()
        client.send(headers(stream, fields, end=not body), *([frame(0, END_STREAM, stream, body)] if body else []))
        first = client.answer(stream)
        honest = client.ask(head("/honest"))
    assert (honest.status, b'"/honest"' in honest.body) == (200, True)
    judge(h2, case, first)


def judge(h2: Subject, case: str, first: Answer) -> None:
    calls = [(call.method, call.path) for call in h2.origin.calls]
    assert calls[-1] == ("GET", "/honest")
    assert all(path == "/front" for _, path in calls[:-1]), calls
    if case in SOUND:
        assert len(calls) == 2, calls
        assert first.status == 200
        front = h2.origin.calls[0]
        assert (front.complete, front.received) == (True, len(CASES[case][1]))
    else:
        # What is only wrong at its end (a length that is not kept) may have begun to arrive; it must not be complete.
        assert len(calls) <= 2
        assert not any(call.complete for call in h2.origin.calls[:-1])
        assert first.reset == PROTOCOL_ERROR or first.status in (400, 405, 501), first


TRAILERS: dict[str, Fields] = {
    "a pseudo-header": [(":path", "/hidden")],
    "transfer-encoding": [("transfer-encoding", "chunked")],
    "connection": [("connection", "close")],
    "a line end in a value": [("x", f"y\r\n\r\n{HIDDEN}")],
    "a line end in a name": [(f"x\r\n\r\n{HIDDEN}", "y")],
    "an upper name": [("Host", "evil.test")],
}


@pytest.mark.parametrize("case", TRAILERS)
@pytest.mark.parametrize("path", ["/front", "/two/front"])
def test_trailers_smuggle_nothing(h2: Subject, path: str, case: str) -> None:
    with h2.client() as client:
        stream = client.open(head(path, "POST"), end=False)
        client.data(stream, b"body", end=False)
        client.send(headers(stream, TRAILERS[case]))
        answer = client.answer(stream)
        assert answer.reset == PROTOCOL_ERROR or answer.status == 400, answer
        assert client.ask(head("/honest")).status == 200
    assert not any(call.complete for call in h2.origin.calls if call.path == path)
    assert all(call.path in (path, "/honest") for call in h2.origin.calls)


FRAMING: list[tuple[str, str]] = [("host", "evil.test"), ("content-length", "5"), ("authorization", "Bearer x"), ("x-forwarded-for", "1.2.3.4")]


@pytest.mark.parametrize("field", FRAMING, ids=lambda field: field[0])
def test_trailers_do_not_become_headers(h2: Subject, field: tuple[str, str]) -> None:
    """RFC 9110 6.5.1: framing, routing and identity must not come behind the body. Refused or dropped, never merged."""
    with h2.client() as client:
        for path in ("/front", "/two/front"):
            answer = client.ask(head(path, "POST", ("te", "trailers")), b"body", trailers=[field])
            assert answer.status in (0, 200, 400)
            assert client.ask(head("/honest")).status == 200
    for call in h2.origin.calls:
        assert call.get(field[0]) != field[1]
        assert field[0] not in dict(call.trailers)


@pytest.mark.parametrize("path", ["/front", "/two/front"])
def test_what_is_sound_arrives_as_it_was_sent(h2: Subject, path: str) -> None:
    """Over-blocking is an error too: octets beyond ASCII, odd token names, a target that looks like dot segments in its query."""
    fields = [("x!#$%&'*+.^`|~", "a"), ("x-obs", "\x85admin\xa0"), ("cookie", "a=b"), ("cookie", "c=d"), ("digest", "sha-256=:a=:"), ("x", "")]
    with h2.client() as client:
        answer = client.ask([*head(path + "/a%20b;v=1?x=..%2f&y=%00", "PUT"), *fields], b"\r\n\r\n0\r\n\r\n")
    assert answer.status == 200
    (call,) = h2.origin.calls
    assert call.path == path + "/a%20b;v=1?x=..%2f&y=%00"
    assert call.authority == "bank.test"
    for name, value in fields:
        assert call.get(name) == ("a=b; c=d" if name == "cookie" else value)
    assert call.received == 9
