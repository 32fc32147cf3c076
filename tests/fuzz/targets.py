"""What is fuzzed, and what must hold for every input.

Strategy: each target takes bytes, returns a signature of what happened (which the fuzzer uses to keep inputs that reach
something new) and asserts the properties that need no second opinion: only the declared exception, cutting changes nothing,
what is accepted can be written and read again. Memory errors are the sanitizers' business.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Hashable
from itertools import pairwise

import h11

from gateway._speedups import testing
from gateway.discovery import dns_wire
from gateway.health.grpc import serving_status

Signature = tuple[Hashable, ...]


def _outcome(parse: Callable[..., object], *arguments: object) -> object:
    try:
        return parse(*arguments)
    except testing.ParseError as error:
        return (error.status, error.slug)


def _cuts(data: bytes) -> list[int]:
    """Places to cut, chosen by the input itself so that a finding can be repeated."""
    seed = sum(data) + 31 * len(data)
    return sorted({(seed * factor) % (len(data) + 1) for factor in (1, 7, 13)})


def _head(parse: Callable[..., object], data: bytes) -> Signature:
    whole = _outcome(parse, data)
    pieces = _outcome(parse, data, _cuts(data))
    refused = isinstance(whole, tuple) and isinstance(pieces, tuple)
    assert whole == pieces or refused, f"cut at {_cuts(data)}: {pieces!r} instead of {whole!r}"
    if not isinstance(whole, dict):
        return (whole,)
    assert whole["length"] <= len(data)
    for (name, value), line in zip(whole["fields"], whole["lines"]):
        assert line.startswith(name + b":") and line.endswith(b"\r\n") and value in line
    return (len(whole["fields"]), whole["chunked"], whole["content_length"] is None, whole["close"], tuple(whole["dropped"]))


def request(data: bytes) -> Signature:
    """A request's head; whatever is accepted, h11 accepts."""
    signature = _head(testing.parse_request, data)
    if isinstance(signature[0], int):
        head = testing.parse_request(data)
        assert head is not None
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        connection.receive_data(data[: head["length"]])
        event = connection.next_event()
        assert isinstance(event, h11.Request) and event.method == head["method"], event
    return signature


def response(data: bytes) -> Signature:
    """A response's head."""
    return _head(testing.parse_response, data)


def chunked(data: bytes) -> Signature:
    """A chunked body, whole and in pieces."""
    whole = _outcome(testing.decode_chunked, [data])
    at = [0, *_cuts(data), len(data)]
    assert whole == _outcome(testing.decode_chunked, [data[a:b] for a, b in pairwise(at)])
    if isinstance(whole, tuple) and len(whole) == 3:
        payload, consumed, done = whole
        assert len(payload) <= consumed <= len(data)
        return (done, min(len(payload), 8), consumed == len(data))
    return (whole,)


def path(data: bytes) -> Signature:
    """A path: normalising is final, and never makes it longer."""
    result = _outcome(testing.normalise_path, data)
    if isinstance(result, bytes):
        assert len(result) <= len(data)
        assert testing.normalise_path(result) == result
        assert b"//" not in result and b"\\" not in result and not {b".", b".."} & set(result.split(b"/"))
        return (len(data) - len(result), result.count(b"/"), result.count(b"%"))
    return (result,)


NAME = b"\x03pay\x04bank\x04test\x00"


def name_answer(data: bytes) -> Signature:
    """A name server's answer: read, refused as malformed, or not ours; never more values than there are bytes for."""
    found = []
    for kind in (dns_wire.A, dns_wire.SRV):
        try:
            reply = dns_wire.read_reply(data, 7, NAME, kind)
        except dns_wire.Malformed as error:
            found.append(str(error))
            continue
        if reply is None:
            found.append("not ours")
            continue
        assert 0 <= reply.ttl < 1 << 31 and len(reply.values) <= len(data) // 14
        assert all(len(value) == 4 if isinstance(value, bytes) else value.host and value.port for value in reply.values)
        found.append((reply.rcode, reply.truncated, len(reply.values)))
    return tuple(found)


def health_answer(data: bytes) -> Signature:
    """The message of a gRPC health check."""
    status = serving_status(data)
    assert -1 <= status < 1 << 70
    return (status,)


def _web(data: bytes, *, text: bool, encode: bool) -> bytes | str:
    """Pass a body through a codec, in pieces; the bytes that come out, or why it is refused."""
    codec = testing.WebCodec(text)
    at = [0, *_cuts(data), len(data)]
    try:
        made = b"".join((codec.encode if encode else codec.decode)(data[a:b]) for a, b in pairwise(at))
        codec.finish()
    except ValueError as error:
        return str(error)
    return made


def grpc_web(data: bytes) -> Signature:
    """A body of gRPC-Web: what is taken as text is what base64 says, and comes back as it was."""
    binary, text = (_web(data, text=text, encode=False) for text in (False, True))
    assert isinstance(binary, str) or binary == data
    if not isinstance(text, bytes):
        return (binary if isinstance(binary, str) else "messages", text)
    assert text == b"".join(base64.b64decode(data[i : i + 4], validate=True) for i in range(0, len(data), 4))
    again = _web(text, text=True, encode=True)
    assert isinstance(again, bytes) and _web(again, text=True, encode=False) == text
    return (min(len(text), 40), data.count(b"="), binary if isinstance(binary, str) else "messages")


TARGETS: dict[str, Callable[[bytes], Signature]] = {
    "request": request, "response": response, "chunked": chunked, "path": path, "name_answer": name_answer,
    "health_answer": health_answer, "grpc_web": grpc_web,
}

SEEDS: dict[str, list[bytes]] = {
    "request": [
        b"GET / HTTP/1.1\r\nHost: gw.test\r\n\r\n",
        b"POST http://gw.test/a?b HTTP/1.1\r\nhost: gw.test\r\nContent-Length: 5\r\nConnection: close, X\r\nX: \t1\r\n\r\nhello",
        b"PUT /%61/../b HTTP/1.0\r\nHost: [::1]:80\r\nExpect: 100-continue\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nHost: x\r\nX_Auth_Subject: 1\r\n\r\n",
    ],
    "response": [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\nhello",
        b"HTTP/1.0 304\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    "chunked": [
        b"5\r\nhello\r\n0\r\n\r\n",
        b'a;x="y\\";z"\r\n0123456789\r\n000\r\nX: 1\r\n\r\nGET /',
    ],
    "name_answer": [
        b"\0\7\x81\x80\0\1\0\2\0\0\0\0" + NAME + b"\0\1\0\1" + b"\xc0\x0c\0\5\0\1\0\0\0\x09\0\4\1a\xc0\x10"
        + b"\1a\xc0\x10\0\1\0\1\0\0\0\x05\0\4\xc0\0\2\1",
        b"\0\7\x81\x80\0\1\0\1\0\0\0\0" + NAME + b"\0\x21\0\1" + b"\xc0\x0c\0\x21\0\1\0\0\0\x09\0\x0b\0\1\0\2\x1f\x90\2pd\xc0\x10",
        b"\0\7\x83\x80\0\1\0\0\0\0\0\0" + NAME + b"\0\1\0\1",
    ],
    "health_answer": [b"\0\0\0\0\2\x08\1", b"\0\0\0\0\x09\x12\2hi\x15abcd"],
    "grpc_web": [b"AAAAAAMxMjM=", b"AAAAAAAAAAAAATE=", b"AAAAAAIxMg==AAAAAAE2", b"\0\0\0\0\x03123\1\0\0\0\0"],
    "path": [b"/a/./b/../c", b"/%61%2e%2E/%c3%a9/%e2%82%ac;v=1", b"/%25a%20"],
}
DICTIONARY = [
    b"\r\n", b"\n", b"\r", b" ", b"\t", b"\x00", b"\x0b", b"\xa0", b":", b"chunked", b"Content-Length: 5\r\n", b"Transfer-Encoding: ",
    b"Host: x\r\n", b"0\r\n\r\n", b"HTTP/1.1", b"HTTP/1.0", b"Connection: ", b"close", b",", b";", b'"', b"\\", b"%2e", b"%2f", b"%25",
    b"..", b"//", b"%c0%af", b"ffffffffffffffff", b"99999999999999999999", b"[::1]", b":65536", b"http://", b"#", b"?", b"_", b"-1", b"+",
]  # fmt: skip
