"""Heads in HTTP/2 mean what another implementation of HPACK says, in both directions, whatever came before them on the connection."""

from __future__ import annotations

import hpack
from hypothesis import example, given
from hypothesis import strategies as st

from gateway._speedups import testing
from gateway._speedups.http2_settings import Http2

Fields = list[tuple[str, str]]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FIELDS = st.lists(st.tuples(st.sampled_from(["a", "b", "x-long-name", "accept"]), st.sampled_from(["", "1", "2", "v" * 40])), max_size=4)
WAYS = st.sampled_from(["indexed", "literal", "resized"])


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


class Writer:
    """A client or a server whose heads repeat: as indices, as literals that no table keeps, and after a change of the table's size."""

    def __init__(self) -> None:
        self.encoder = hpack.Encoder()
        self.size = 4096

    def block(self, fields: Fields, way: str) -> bytes:
        if way == "resized":
            self.size = 4096 + 100 - self.size
            self.encoder.header_table_size = self.size
        made = hpack.NeverIndexedHeaderTuple if way == "literal" else hpack.HeaderTuple
        return bytes(self.encoder.encode([made(name, value) for name, value in fields]))


def lines(fields: Fields) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in fields).encode()


@given(st.lists(st.tuples(st.sampled_from(["/", "/v1", "/v2"]), FIELDS, WAYS), max_size=12), st.integers(1, 4))
@example([("/v1", [("a", "1")], "indexed")] * 4 + [("/v2", [("a", "2")], "indexed"), ("/v1", [("a", "1")], "indexed")] * 3, 1)
@example([("/", [("a", "1")], "indexed"), ("/", [("a", "2")], "indexed")], 3)  # the second's bytes are those of the first
@example([("/", [("a", "1")], "indexed")] * 3 + [("/", [("a", "1")], "resized")] * 3, 3)
def test_a_request_is_the_one_that_was_meant_however_often_it_came_before(requests: list[tuple[str, Fields, str]], times: int) -> None:
    writer, probe, expected = Writer(), testing.Http2Probe(False, Http2()), []
    sent = PREFACE + frame(4, 0, 0)
    for path, fields, way in requests:
        for _ in range(times):
            head = [(":method", "GET"), (":scheme", "http"), (":path", path), *fields]
            sent += frame(1, 5, 2 * len(expected) + 1, writer.block(head, way))
            expected.append(f"GET {path} HTTP/1.1\r\n".encode() + lines(fields) + b"\r\n")
    probe.take(sent)
    assert (probe.heads, probe.over) == (expected, None)


@given(st.lists(st.tuples(st.sampled_from([200, 404]), FIELDS, FIELDS, WAYS), max_size=12), st.integers(1, 4))
@example([(200, [("a", "1")], [("b", "2")], "indexed")] * 3, 2)
@example([(200, [("a", "1")], [("a", "1")], "indexed"), (200, [], [("a", "2")], "indexed")], 3)
@example([(200, [], [("a", "1")], "indexed"), (200, [], [("a", "2")], "indexed")], 3)
def test_a_call_ends_with_its_own_trailers(calls: list[tuple[int, Fields, Fields, str]], times: int) -> None:
    writer, probe, trailers = Writer(), testing.Http2Probe(True, Http2()), []
    probe.take(frame(4, 0, 0))
    for status, fields, closing, way in calls:
        for _ in range(times):
            stream = probe.ask(b"GET / HTTP/1.1\r\nhost: up.test\r\n\r\n")
            probe.take(frame(1, 4, stream, writer.block([(":status", str(status)), *fields], way)) + frame(0, 0, stream, b"body"))
            probe.take(frame(1, 5, stream, writer.block(closing, way)))
            trailers.append((stream, lines(closing)))
    assert probe.over is None
    assert [(stream, found) for stream, _, found, _ in probe.ends] == trailers
    assert all(payload.endswith(b"\r\n\r\n" + b"body") and whole for _, payload, _, whole in probe.ends)


def test_what_is_remembered_with_a_body_to_come_is_not_said_of_a_message_without() -> None:
    """A Content-Length of 0 is left out while the stream is open: HTTP/1.1 would take the message for complete."""
    writer, probe = Writer(), testing.Http2Probe(False, Http2())
    block = [writer.block([(":method", "POST"), (":scheme", "http"), (":path", "/"), ("content-length", "0")], "indexed") for _ in range(3)][-1]
    first = Writer().block([(":method", "POST"), (":scheme", "http"), (":path", "/"), ("content-length", "0")], "indexed")
    probe.take(PREFACE + frame(4, 0, 0) + frame(1, 5, 1, first))
    for stream, flags in ((3, 4), (5, 5), (7, 4), (9, 5)):
        probe.take(frame(1, flags, stream, block))
    assert [b"content-length: 0" in head for head in probe.heads] == [True, False, True, False, True]


NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="!#$%&'*+-.^_`|~"), min_size=1, max_size=70)
VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=126, include_characters=":"), max_size=300)
HTTP1_ONLY = {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "http2-settings", "host", "te", "sec-websocket-accept"}


@given(st.lists(st.tuples(NAMES | st.sampled_from(["Cookie", "X-API-Key", "VIA", "Content-Length", *HTTP1_ONLY]), VALUES, st.sampled_from(["", " ", "\t "])), max_size=20))
@example([("A" * size, "v" * value, " ") for size in (1, 7, 8, 9, 15, 16, 31, 32, 33, 64, 126, 127, 128) for value in (0, 1, 126, 127, 128, 254, 255, 256)])
@example([("Z@[`{az"[i:], ":", "") for i in range(7) if i not in (1, 2, 4)])
@example([("x" * 40, "v" * 16000, " ")] * 4)
def test_a_head_that_leaves_says_what_its_text_says(fields: list[tuple[str, str, str]]) -> None:
    text = "GET /a HTTP/1.1\r\nhost: up.test\r\n" + "".join(f"{name}:{space}{value}\r\n" for name, value, space in fields) + "\r\n"
    probe = testing.Http2Probe(True, Http2())
    probe.said()
    probe.ask(text.encode())
    blocks, out = b"", probe.said()
    while out:
        size, kind = int.from_bytes(out[:3], "big"), out[3]
        if kind in (1, 9):
            blocks += out[9 : 9 + size]
        out = out[9 + size :]
    decoder = hpack.Decoder(max_header_list_size=1 << 20)
    meant = [(name.lower(), value) for name, value, _ in fields if name.lower() not in HTTP1_ONLY]
    assert decoder.decode(blocks) == [(":method", "GET"), (":scheme", "http"), (":path", "/a"), (":authority", "up.test"), *meant]
