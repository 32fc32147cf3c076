"""What is fuzzed, and what must hold for every input.

Strategy: each target takes bytes, returns a signature of what happened (which the fuzzer uses to keep inputs that reach
something new) and asserts the properties that need no second opinion: only the declared exception, cutting changes nothing,
what is accepted can be written and read again. Memory errors are the sanitizers' business.
"""

from __future__ import annotations

import base64
import contextlib
import ssl
from collections.abc import Callable, Hashable
from itertools import pairwise

import h11

from gateway._speedups import testing
from gateway._speedups.http2_settings import Http2
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


FEW = Http2(streams=4, window=16384, connection_window=65535, resets=8, frames=20)
CALM = 11  # ENHANCE_YOUR_CALM (RFC 9113 7)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ASKED = b"GET /a HTTP/1.1\r\nhost: up.test\r\nx: 1\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _http2(pieces: list[bytes], *, client: bool, leaving: bytes = b"", forgetful: bool = False) -> testing.Http2Probe:
    probe = testing.Http2Probe(client, FEW, forgetful=forgetful)
    for _ in range(3 if client else 0):
        probe.ask(ASKED)
    if leaving:
        probe.take(leaving)
        probe.leave()
    for piece in pieces:
        answer = probe.take(piece)
        assert len(answer) < 1 << 20, "far more is said than was asked for"
    return probe


def _http2_side(data: bytes, *, client: bool, leaving: bytes = b"") -> Signature:
    """Whole and in pieces, and by a side that remembers no head, the same is understood; what is understood as a head is one, and no more than one."""
    at = [0, *_cuts(data), len(data)]
    whole = _http2([data], client=client, leaving=leaving)
    cut = _http2([data[a:b] for a, b in pairwise(at)], client=client, leaving=leaving, forgetful=True)
    said = [(side.heads, [end[0] for end in side.ends]) for side in (whole, cut)]
    if any(side.over and side.over[0] == CALM for side in (whole, cut)):
        # Budgets fill with time: the slower side may have got further.
        assert all(a[: len(b)] == b or b[: len(a)] == a for a, b in zip(*said))
    else:
        # How much of a body was taken before an error depends on how it came; heads, errors and what ended do not.
        assert (said[0], whole.over) == (said[1], cut.over)
        assert whole.over or [end[2] for end in whole.ends] == [end[2] for end in cut.ends]
    for head in whole.heads:
        assert head.index(b"\r\n\r\n") == len(head) - 4
        parsed = _outcome(testing.parse_request, head)
        assert parsed is not None
        assert not isinstance(parsed, dict) or not parsed["chunked"]
    for _, _, trailers, _ in whole.ends:
        assert all(line.count(b"\r") == 0 and b": " in line for line in trailers.split(b"\r\n")[:-1])
    signature = (len(whole.heads), whole.over, tuple(end[3] for end in whole.ends), sum(len(end[1]) > 0 for end in whole.ends))
    for side in (whole, cut):
        side.close()
    return signature


def http2_server(data: bytes) -> Signature:
    """Frames of a client."""
    return _http2_side(PREFACE + frame(4, 0, 0) + data, client=False)


def http2_leaving(data: bytes) -> Signature:
    """Frames that cross the last GOAWAY of a server, which has one request under way: of no other one is anything taken up."""
    signature = _http2_side(data, client=False, leaving=PREFACE + frame(4, 0, 0) + frame(1, 4, 1, POST + AUTHORITY))
    assert signature[0] == 1
    return signature


def http2_client(data: bytes) -> Signature:
    """Frames of a server that was asked three times."""
    return _http2_side(frame(4, 0, 0) + data, client=True)


def client_hello(data: bytes) -> Signature:
    """A TLS ClientHello: it names what OpenSSL would see, or it is refused; more bytes never change what was said."""
    try:
        found = testing.parse_client_hello(data)
    except ValueError as error:
        return (str(error),)
    for cut in _cuts(data):
        try:
            part = testing.parse_client_hello(data[:cut])
        except ValueError as error:
            raise AssertionError(f"cut at {cut} it is refused: {error}") from error
        assert part is False or (part == found and cut <= len(data)), (cut, part, found)
    if isinstance(found, bytes):
        assert 0 < len(found) <= 253 and found == found.lower() and not found.endswith(b".") and b".." not in found
        return (len(found), found.count(b"."))
    return (found,)


TARGETS: dict[str, Callable[[bytes], Signature]] = {
    "request": request, "response": response, "chunked": chunked, "path": path, "name_answer": name_answer,
    "health_answer": health_answer, "grpc_web": grpc_web, "http2_server": http2_server, "http2_leaving": http2_leaving,
    "http2_client": http2_client, "client_hello": client_hello,
}

# Header blocks (RFC 7541 appendix C has the like): GET and POST of /, with authority, by static index; 200; a literal field.
GET, POST, AUTHORITY, OK, FIELD = b"\x82\x86\x84", b"\x83\x86\x84", b"\x41\x07gw.test", b"\x88", b"\x00\x01x\x011"
KEPT = b"\x40\x01a\x01b\x40\x01c\x01d"  # two fields that the table takes up: \xbf and \xbe then


def _hello(name: str | None) -> bytes:
    """A ClientHello as this machine's OpenSSL writes it."""
    written = ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.check_hostname = name is not None
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), written, server_hostname=name).do_handshake()
    return written.read()


SEEDS: dict[str, list[bytes]] = {
    "http2_server": [
        frame(1, 5, 1, GET + AUTHORITY),
        frame(1, 4, 1, POST + AUTHORITY + FIELD) + frame(0, 0, 1, b"hello") + frame(0, 1, 1, b"end") + frame(6, 0, 0, b"12345678"),
        frame(1, 0, 1, GET) + frame(9, 4, 1, AUTHORITY) + frame(0, 8, 1, b"\x02ab\0\0") + frame(1, 5, 1, FIELD) + frame(3, 0, 1, b"\0\0\0\x08"),
        frame(1, 5, 1, GET + KEPT) + b"".join(frame(1, 5, i, GET + b"\xbf\xbe") for i in (3, 5)) + frame(1, 5, 7, GET + KEPT)
        + b"".join(frame(1, 5, i, GET + b"\xbf\xbe") for i in (9, 11)) + frame(1, 5, 13, b"\x20" + GET) + frame(1, 5, 15, GET + b"\xbe"),
        frame(4, 0, 0, b"\0\4\0\0\0\1") + frame(8, 0, 0, b"\0\0\1\0") + frame(1, 0x2D, 1, b"\1\0\0\0\0\x10" + GET + AUTHORITY + b"\0"),
    ],
    "http2_leaving": [
        frame(1, 4, 3, POST + AUTHORITY) + frame(0, 1, 3, b"late") + frame(0, 1, 1, b"in time"),
        frame(1, 0, 3, POST) + frame(9, 4, 3, AUTHORITY) + frame(8, 0, 3, b"\0\0\1\0") + frame(3, 0, 3, b"\0\0\0\x08") + frame(0, 1, 1, b"x"),
        frame(1, 5, 5, GET + KEPT) + frame(1, 5, 7, GET + b"\xbf\xbe") + frame(1, 5, 5, FIELD) + frame(1, 5, 1, FIELD),
    ],
    "http2_client": [
        frame(1, 4, 1, OK + FIELD) + frame(0, 1, 1, b"hello") + frame(1, 5, 3, OK),
        frame(1, 4, 1, b"\x08\x03100") + frame(1, 4, 1, OK) + frame(0, 0, 1, b"x") + frame(1, 5, 1, FIELD) + frame(7, 0, 0, b"\0\0\0\1\0\0\0\0"),
        b"".join(frame(1, 4, i, OK + x) + frame(1, 5, i, y) for i, x, y in ((1, KEPT, b"\xbf"), (3, b"\xbe", b"\xbf"), (5, b"\xbe", b"\xbf"))),
        frame(3, 0, 3, b"\0\0\0\7") + frame(8, 0, 1, b"\0\0\1\0") + frame(4, 1, 0) + frame(1, 4, 5, OK),
    ],
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
    "client_hello": [_hello("db.bank.test"), _hello("a"), _hello(None), _hello("db.bank.test")[:-3]],
    "path": [b"/a/./b/../c", b"/%61%2e%2E/%c3%a9/%e2%82%ac;v=1", b"/%25a%20"],
}
DICTIONARY = [
    b"\r\n", b"\n", b"\r", b" ", b"\t", b"\x00", b"\x0b", b"\xa0", b":", b"chunked", b"Content-Length: 5\r\n", b"Transfer-Encoding: ",
    b"Host: x\r\n", b"0\r\n\r\n", b"HTTP/1.1", b"HTTP/1.0", b"Connection: ", b"close", b",", b";", b'"', b"\\", b"%2e", b"%2f", b"%25",
    b"..", b"//", b"%c0%af", b"ffffffffffffffff", b"99999999999999999999", b"[::1]", b":65536", b"http://", b"#", b"?", b"_", b"-1", b"+",
    frame(0, 1, 1), frame(1, 5, 3, GET), frame(1, 4, 5, POST), frame(3, 0, 1, b"\0\0\0\0"), frame(9, 4, 1, FIELD), frame(8, 0, 0, b"\x7f\xff\xff\xff"),
    AUTHORITY, OK, FIELD, b"\x3f\xe1\x1f", b"\x40\x01a\x01b", b"\xbe",
]  # fmt: skip
