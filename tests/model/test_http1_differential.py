"""The parser against two others, h11 and llhttp: what we accept, they accept and read in the same way.

Strategy: h11 is a careful reader of RFC 9112, so "we accept, h11 refuses" is always a finding. The other direction is
allowed: being stricter is the point. llhttp is laxer, so only what both accept is compared.
"""

from __future__ import annotations

import h11
import httptools
import pytest
from hypothesis import example, given, settings

from gateway._speedups import testing
from tests.model import http1_inputs as inputs

COMMON = settings(max_examples=3 * settings().max_examples)
LLHTTP_METHODS = {*inputs.METHODS}


def parse(data: bytes) -> dict | None:
    """Our reading of a request head, None when it is refused or incomplete."""
    try:
        return testing.parse_request(data)
    except testing.ParseError:
        return None


def body_of(data: bytes, head: dict) -> tuple[bytes, int] | None:
    """Our reading of the body behind a head: (payload, bytes used), None when it is refused or incomplete."""
    rest = data[head["length"] :]
    if head["chunked"]:
        try:
            payload, used, done = testing.decode_chunked([rest])
        except testing.ParseError:
            return None
        return (payload, used) if done else None
    length = head["content_length"] or 0
    return (rest[:length], length) if len(rest) >= length else None


def read_by_h11(data: bytes) -> tuple[h11.Request, bytes, bytes]:
    """h11's reading of the first request: (head, body, bytes behind it); raises h11.RemoteProtocolError."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data)
    request = connection.next_event()
    assert isinstance(request, h11.Request), request
    body = b""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return request, body, connection.trailing_data[0]
        else:
            pytest.fail(f"h11 wants more: {event}")


@COMMON
@given(inputs.requests())
@example(b"GET / HTTP/1.1\r\nHost: gw.test\r\nX: \t \r\n\r\n")
@example(b"POST / HTTP/1.1\r\nHost: gw.test\r\nTransfer-Encoding: chunked\r\n\r\n5;a=\"x;y\"\r\nhello\r\n000\r\n\r\n")
@example(b"POST / HTTP/1.1\r\nHost: gw.test\r\nContent-Length: 0005\r\n\r\nhello")
def test_what_we_accept_h11_reads_the_same(data: bytes) -> None:
    head = parse(data)
    if head is None:
        return
    found = body_of(data, head)
    if found is None:
        # Incomplete for us: it must not be complete and different for h11.
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        connection.receive_data(data[: head["length"]])
        assert isinstance(connection.next_event(), h11.Request)
        return
    payload, used = found
    request, body, _ = read_by_h11(data[: head["length"] + used])
    assert request.method == head["method"]
    assert request.target == data.split(b" ", 2)[1]
    assert request.http_version == b"1.%d" % head["minor"]
    assert list(request.headers.raw_items()) == [(name, _h11_value(name, value)) for name, value in head["fields"]]
    assert body == payload


def _h11_value(name: bytes, value: bytes) -> bytes:
    """h11 lower-cases the one transfer coding that it knows."""
    return value.lower() if name.lower() == b"transfer-encoding" else value


class Collected:
    """llhttp's callbacks, as a reading."""

    def __init__(self) -> None:
        self.url = b""
        self.fields: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.complete:
            self.fields.append((name, value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


@COMMON
@given(inputs.requests())
def test_what_llhttp_also_accepts_it_reads_the_same(data: bytes) -> None:
    head = parse(data)
    if head is None or head["method"] not in LLHTTP_METHODS or head["chunked"]:
        return
    found = body_of(data, head)
    if found is None:
        return
    read = Collected()
    parser = httptools.HttpRequestParser(read)
    try:
        parser.feed_data(data[: head["length"] + found[1]])
    except httptools.HttpParserError:
        return
    assert read.complete
    assert parser.get_method() == head["method"]
    assert read.url == data.split(b" ", 2)[1]
    assert [(name, value.rstrip(b" \t")) for name, value in read.fields] == head["fields"]
    assert read.body == found[0]


@COMMON
@given(inputs.responses())
def test_response_heads_that_we_accept_h11_reads_the_same(data: bytes) -> None:
    try:
        head = testing.parse_response(data)
    except testing.ParseError:
        return
    if head is None:
        return
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "gw.test")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data[: head["length"]])
    response = connection.next_event()
    assert isinstance(response, (h11.Response, h11.InformationalResponse))
    assert response.status_code == head["status"]
    assert bytes(response.reason) == head["reason"]
    assert list(response.headers.raw_items()) == [(name, _h11_value(name, value)) for name, value in head["fields"]]


@COMMON
@given(inputs.chunked_bodies())
@example(b"5\r\nhello\r\n0\r\n\r\n")
def test_chunked_bodies_that_we_accept_h11_reads_the_same(data: bytes) -> None:
    try:
        payload, used, done = testing.decode_chunked([data])
    except testing.ParseError:
        return
    if not done:
        return
    request = b"POST / HTTP/1.1\r\nHost: gw.test\r\nTransfer-Encoding: chunked\r\n\r\n"
    _, body, behind = read_by_h11(request + data)
    assert body == payload
    assert behind == data[used:]


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nHost: gw.test\r\n\r\n", b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"])
def test_the_comparison_sees_accepted_requests(data: bytes) -> None:
    head = parse(data)
    assert head is not None
    assert read_by_h11(data)[0].method == head["method"]
