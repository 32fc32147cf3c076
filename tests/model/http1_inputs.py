"""Hypothesis strategies for HTTP/1.1 messages: mostly legal, wrong in the ways that attackers and proxies are.

Strategy: a message is put together from pieces that are each legal nine times out of ten, and then, sometimes, mutated as
bytes; pure noise would never get past the first byte of a strict parser.
"""

from __future__ import annotations

from hypothesis import strategies as st

METHODS = [b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH"]
TARGETS = [
    b"/", b"/a", b"/a/b?c=d", b"/a%20b", b"/caf%C3%A9", b"/a;v=1/b", b"/?", b"/a?x=..%2f", b"http://gw.test/a", b"http://gw.test",
    b"/a/../b", b"/./a", b"/%61", b"/~x!$&'()*+,;=:@", b"/a?[]{}|^`\"<>", b"HTTP://gw.test?x", b"/a%zz",
]  # fmt: skip
BAD_TARGETS = [b"", b"*", b"a", b"//", b"/a b", b"/\x00", b"/\xc3\xa9", b"/a#b", b"gw.test:80", b"http://", b"http://u@gw.test/", b"/a\tb"]
FIELDS = [
    b"Host: gw.test", b"Content-Length: 5", b"Content-Length: 0", b"Transfer-Encoding: chunked", b"Connection: close",
    b"Connection: keep-alive, X", b"X: 1", b"X:", b"X:\t a \t", b"X: caf\xe9\xff", b"!#$%&'*+.^`|~: 1", b"Expect: 100-continue",
    b"Cookie: a=b", b"Accept: */*", b"content-length: 5", b"TRANSFER-ENCODING:CHUNKED", b"X-Forwarded-For: 1.2.3.4", b"Host: [::1]:80",
]  # fmt: skip
BAD_FIELDS = [
    b"Host: evil.test", b"Host: a b", b"Content-Length: +5", b"Content-Length: 5, 5", b"Content-Length: 5\x0b", b"Content-Length:",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: \x0bchunked", b"Transfer-Encoding : chunked", b" folded", b"\tfolded",
    b"no colon", b": 1", b"X\x00: 1", b"X: a\x00b", b"X: a\rb", b"X: \x7f", b"Content_Length: 5", b"X Y: 1", b"X\xe9: 1", b"Expect: y",
    b"Host:", b"X: a\nY: b", b"Content-Length: 99999999999999999999", b"Transfer-Encoding:", b"Connection: a b",
]  # fmt: skip


def mostly(good: list[bytes], bad: list[bytes]) -> st.SearchStrategy[bytes]:
    """A good piece nine times out of ten."""
    return st.integers(0, 9).flatmap(lambda n: st.sampled_from(bad if n == 0 else good))


@st.composite
def field_lines(draw: st.DrawFn) -> list[bytes]:
    """The lines between the start line and the empty line."""
    lines = draw(st.lists(mostly(FIELDS[5:] if draw(st.booleans()) else FIELDS, BAD_FIELDS), max_size=6))
    framing = draw(st.sampled_from([b"", b"Content-Length: 5", b"Transfer-Encoding: chunked"]))
    if framing:
        lines.insert(draw(st.integers(0, len(lines))), framing)
    if draw(st.integers(0, 19)):
        lines = [line for line in lines if not line.lower().startswith(b"host")]
        lines.insert(draw(st.integers(0, len(lines))), b"Host: gw.test")
    return lines


def _mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """Sometimes flip, drop, double or insert a byte where it may hurt."""
    out = bytearray(data)
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, max(0, len(out) - 1)))
        kind = draw(st.sampled_from(["set", "insert", "drop", "cut"]))
        byte = draw(st.sampled_from(b"\r\n\t \x00\x0b\x7f\x80\xff:;,%/\\.#@[]0aA_-+"))
        if kind == "set" and out:
            out[at] = byte
        elif kind == "insert":
            out.insert(at, byte)
        elif kind == "drop" and out:
            del out[at]
        else:
            del out[at:]
    return bytes(out)


@st.composite
def chunked_bodies(draw: st.DrawFn) -> bytes:
    """A chunked body, mostly legal."""
    out = b""
    for data in draw(st.lists(st.binary(min_size=1, max_size=20), max_size=4)):
        size = b"%x" % len(data)
        size = draw(st.sampled_from([size, size, size.upper(), b"0" + size, b"00000" + size, size + b";a=b", size + b';a="x;\\"y"', size + b";"]))
        out += draw(mostly([size], [b"0x" + size, b"+" + size, size + b" ", b" " + size, b"", size + b"g", size + b"\x1c", b"f" * 17])) + b"\r\n"
        out += data + draw(mostly([b"\r\n"], [b"\n", b"\r", b"", b"XX", b"\r\n\r\n"]))
    out += draw(mostly([b"0", b"000", b"0;last"], [b"", b"0 ", b"-0"]))
    out += draw(mostly([b"\r\n"], [b"\n", b"\r"]))
    out += draw(mostly([b"", b"", b"X: 1\r\n", b"A: b\r\nC: d\r\n"], [b"no colon\r\n", b" : x\r\n", b"A: b\n"]))
    return _mutated(draw, out + draw(mostly([b"\r\n"], [b"\n", b""])))


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request with its body, mostly legal."""
    version = draw(mostly([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"], [b"HTTP/2.0", b"HTTP/1.10", b"http/1.1", b"HTTP/1.2", b"HTTP/0.9", b""]))
    method = draw(mostly(METHODS, [b"get", b"G T", b"", b"CONNECT", b"TRACE", b"G\x00T", b"M-SEARCH"]))
    space = draw(mostly([b" "], [b"  ", b"\t"]))
    head = method + space + draw(mostly(TARGETS, BAD_TARGETS)) + b" " + version
    lines = [head, *draw(field_lines())]
    data = b"".join(line + draw(st.sampled_from([b"\r\n"] * 30 + [b"\n"])) for line in lines) + b"\r\n"
    body = draw(st.one_of(st.just(b"hello"), st.just(b""), chunked_bodies()))
    return _mutated(draw, data + body)


@st.composite
def responses(draw: st.DrawFn) -> bytes:
    """The head of a response, mostly legal."""
    start = draw(
        mostly(
            [b"HTTP/1.1 200 OK", b"HTTP/1.0 404 Not Found", b"HTTP/1.1 304 Not Modified", b"HTTP/1.1 500 ", b"HTTP/1.1 299 a b\xe9"],
            [b"HTTP/2 200", b"HTTP/1.1  200 OK", b"HTTP/1.1 20 OK", b"HTTP/1.1 600 OK", b"HTTP/1.1 2000 OK", b"garbage", b"HTTP/1.1 200 a\x00b"],
        )
    )
    lines = [start, *draw(field_lines())]
    return _mutated(draw, b"".join(line + draw(st.sampled_from([b"\r\n"] * 30 + [b"\n"])) for line in lines) + b"\r\n")
