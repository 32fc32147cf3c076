"""RFC 9113, sections 8.2 and 8.3 and RFC 7541 at a listener: what a header block may hold, and how it may be coded."""

from __future__ import annotations

import hpack
import pytest

from tests.integration.h2_kit import (
    COMPRESSION_ERROR,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PROTOCOL_ERROR,
    TABLE_SIZE,
    Fields,
    block,
    frame,
    head,
    headers,
    integer,
    literal,
    settings,
)
from tests.integration.h2_subject import Subject

M, S, A, P = (":method", "GET"), (":scheme", "http"), (":authority", "bank.test"), (":path", "/")

MALFORMED: dict[str, Fields] = {
    # 8.3 pseudo-headers
    "no :method": [S, A, P],
    "no :scheme": [M, A, P],
    "no :path": [M, S, A],
    "nothing at all": [("x", "y")],
    "empty :path": [M, S, A, (":path", "")],
    "empty :method": [(":method", ""), S, A, P],
    "two :method": [M, M, S, A, P],
    "two :scheme": [M, S, S, A, P],
    "two :path": [M, S, A, P, P],
    "two :authority": [M, S, A, A, P],
    "unknown pseudo-header": [M, S, A, P, (":cookie", "a=b")],
    ":status in a request": [M, S, A, P, (":status", "200")],
    "a pseudo-header behind a field": [M, S, A, ("x", "y"), P],
    ":authority behind a field": [M, S, P, ("x", "y"), A],
    ":protocol without CONNECT": [M, S, A, P, (":protocol", "websocket")],
    # 8.2.2 fields of a connection
    "connection": [M, S, A, P, ("connection", "keep-alive")],
    "connection: close": [M, S, A, P, ("connection", "close")],
    "keep-alive": [M, S, A, P, ("keep-alive", "timeout=5")],
    "proxy-connection": [M, S, A, P, ("proxy-connection", "keep-alive")],
    "transfer-encoding": [M, S, A, P, ("transfer-encoding", "chunked")],
    "upgrade": [M, S, A, P, ("upgrade", "h2c")],
    "te: gzip": [M, S, A, P, ("te", "gzip")],
    "te: trailers, deflate": [M, S, A, P, ("te", "trailers, deflate")],
    # 8.2.1 names and values
    "a name in upper case": [M, S, A, P, ("X-Upper", "y")],
    "a name with one upper letter": [M, S, A, P, ("x-tesT", "y")],
    "an empty name": [M, S, A, P, ("", "y")],
    "a name with a space": [M, S, A, P, ("x y", "z")],
    "a name with a colon": [M, S, A, P, ("x:y", "z")],
    "a name with CR LF": [M, S, A, P, ("x\r\nhost", "z")],
    "a name with NUL": [M, S, A, P, ("x\0", "z")],
    "a name with DEL": [M, S, A, P, ("x\x7f", "z")],
    "a name beyond ASCII": [M, S, A, P, ("x\xe4", "z")],
    "a value with CR": [M, S, A, P, ("x", "a\rb")],
    "a value with LF": [M, S, A, P, ("x", "a\nb")],
    "a value with NUL": [M, S, A, P, ("x", "a\0b")],
    # 8.1.1 lengths
    "content-length without a number": [(":method", "POST"), S, A, P, ("content-length", "x")],
    "two lengths": [(":method", "POST"), S, A, P, ("content-length", "0"), ("content-length", "1")],
    "a length that is not kept (no DATA)": [(":method", "POST"), S, A, P, ("content-length", "1")],
    "a negative length": [(":method", "POST"), S, A, P, ("content-length", "-1")],
}
# A library for servers leaves these to the server; a gateway may not.
STRICTER: dict[str, Fields] = {
    "a value with a space before": [M, S, A, P, ("x", " a")],
    "a value with a space behind": [M, S, A, P, ("x", "a ")],
    "a value with a tab behind": [M, S, A, P, ("x", "a\t")],
    "a path without a slash": [M, S, A, (":path", "x")],
    "an absolute path": [M, S, A, (":path", "http://bank.test/x")],
    "a path with a space": [M, S, A, (":path", "/a b")],
    "a path with CR LF": [M, S, A, (":path", "/a\r\nhost: x")],
    "a path with a fragment": [M, S, A, (":path", "/a#b")],
    "an asterisk with GET": [M, S, A, (":path", "*")],
    "a method with a space": [(":method", "GET /x"), S, A, P],
    "a method that ends the line": [(":method", "GET / HTTP/1.1\r\nhost: x\r\n\r\n"), S, A, P],
    "a scheme with a path": [M, (":scheme", "http://x/?"), A, P],
    "an empty scheme": [M, (":scheme", ""), A, P],
    "an unknown scheme": [M, (":scheme", "ftp"), A, P],
    "neither :authority nor host": [M, S, P],
    "an empty :authority": [M, S, (":authority", ""), P],
    "an :authority with userinfo": [M, S, (":authority", "user@bank.test"), P],
    "an :authority with a path": [M, S, (":authority", "bank.test/x"), P],
    "an :authority with a space": [M, S, (":authority", "bank test"), P],
    "an :authority with a comma": [M, S, (":authority", "bank.test,evil.test"), P],
    "an :authority with a bad port": [M, S, (":authority", "bank.test:x"), P],
    ":authority and another host": [M, S, A, P, ("host", "evil.test")],
    "two hosts": [M, S, P, ("host", "bank.test"), ("host", "bank.test")],
    "CONNECT": [(":method", "CONNECT"), (":authority", "bank.test:443")],
    "CONNECT with a path": [(":method", "CONNECT"), S, A, P],
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_ends_its_stream_only(h2: Subject, case: str) -> None:
    with h2.client() as client:
        stream = client.stream()
        client.send(headers(stream, MALFORMED[case]))
        client.malformed(stream)


@pytest.mark.parametrize("case", STRICTER)
def test_what_could_be_read_in_two_ways_is_refused(h2: Subject, case: str) -> None:
    h2.only_ours()
    with h2.client() as client:
        stream = client.stream()
        client.send(headers(stream, STRICTER[case]))
        answer = client.answer(stream)
        assert answer.reset == PROTOCOL_ERROR or answer.status in (400, 405, 501), answer
        client.works()


@pytest.mark.parametrize(
    ("length", "pieces"), [(0, [b"x"]), (3, [b"ab"]), (3, [b"abcd"]), (3, [b"ab", b"cd"]), (10**18, [b"x"])], ids=str
)
def test_a_length_that_data_does_not_keep_is_malformed(h2: Subject, length: int, pieces: list[bytes]) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST", ("content-length", str(length))), end=False)
        for number, piece in enumerate(pieces, 1):
            client.send(frame(0, END_STREAM if number == len(pieces) else 0, stream, piece))
        answer = client.answer(stream)
        assert answer.reset == PROTOCOL_ERROR or answer.status in (400, 413), answer
        client.works()


GOOD: dict[str, Fields] = {
    "pseudo-headers in any order": [P, A, S, M],
    "host instead of :authority": [M, S, P, ("host", "bank.test")],
    "host beside the same :authority": [M, S, A, P, ("host", "bank.test")],
    "te: trailers": [M, S, A, P, ("te", "trailers")],
    "empty values": [M, S, A, P, ("x", "")],
    "every character of a token": [M, S, A, P, ("x!#$%&'*+-.^`|~09az", "y")],
    "a value beyond ASCII": [M, S, A, P, ("x", "\x85admin\xa0"), ("y", "caf\xe9")],
    "a value with a tab inside": [M, S, A, P, ("x", "a\tb")],
    "cookies in crumbs": [M, S, A, P, ("cookie", "a=b"), ("cookie", "c=d"), ("cookie", "e=f")],
    "a length that is kept": [(":method", "POST"), S, A, P, ("content-length", "0")],
    "a port in :authority": [M, S, (":authority", "bank.test:8443"), P],
    "an address in :authority": [M, S, (":authority", "[::1]:80"), P],
    "a query": [M, S, A, (":path", "/?a=b/../c&d=%0d%0a")],
    "HEAD": [(":method", "HEAD"), S, A, P],
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_right_is_served(h2: Subject, case: str) -> None:
    with h2.client() as client:
        stream = client.stream()
        client.send(headers(stream, GOOD[case]))
        answer = client.answer(stream)
        assert (answer.status, answer.reset) == (200, None)
        client.works()


# -- RFC 7541: how blocks are coded


def coded(raw: bytes, stream: int = 1) -> bytes:
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, raw)


HEAD = block(head())
HUFFMAN_EOS = b"\xff\xff\xff\xff"

UNDECODABLE = {
    "index 0": HEAD + b"\x80",
    "an index behind the static table": HEAD + integer(62, 7, 0x80),
    "an index far behind the tables": HEAD + integer(10**6, 7, 0x80),
    "a name's index behind the tables": HEAD + integer(70, 6, 0x40) + b"\x01a",
    "an integer without an end": HEAD + b"\xff" + b"\xff" * 12 + b"\x7f",
    "an index that is cut off": HEAD + b"\xff\x80",
    "a string that is cut off": HEAD + b"\x00\x05ab",
    "a value that is missing": HEAD + b"\x00\x01a",
    "a string longer than any block": HEAD + b"\x00" + integer(2**31, 7) + b"a",
    "Huffman padded by zeros": HEAD + b"\x00\x01x" + b"\x81\x18",                # '0' is 00000, then 000
    "Huffman padded by more than 7 bits": HEAD + b"\x00\x01x" + b"\x82\x07\xff",
    "Huffman with an EOS": HEAD + b"\x00\x01x" + bytes([0x84]) + HUFFMAN_EOS,
    "a table larger than allowed": integer(4097, 5, 0x20) + HEAD,
    "a table of 2^32": integer(2**32, 5, 0x20) + HEAD,
    "a table size behind a field": HEAD + b"\x20",
}


@pytest.mark.parametrize("case", UNDECODABLE)
def test_a_block_that_cannot_be_decoded_ends_the_connection(h2: Subject, case: str) -> None:
    with h2.client() as client:
        client.send(coded(UNDECODABLE[case]))
        client.dies(COMPRESSION_ERROR)


def test_trailers_that_cannot_be_decoded_end_the_connection(h2: Subject) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False)
        client.send(coded(b"\x80", stream))
        client.dies(COMPRESSION_ERROR)


def test_a_refused_block_still_changes_the_table(h2: Subject) -> None:
    """4.3: whatever becomes of a request, its fields belong to the state of the connection."""
    with h2.client() as client:
        bad = block([M, S, A, P]) + literal("te", "gzip") + literal("x-kept", "seen", 0x40)
        client.send(coded(bad, 1))
        assert client.answer(1).reset == PROTOCOL_ERROR or client.answer(1).status == 400
        client.send(coded(block(head("/report")) + b"\xbe", 3))                  # 62, the newest entry
        answer = client.answer(3)
        assert answer.status == 200 or not h2.echoes
        if h2.echoes:
            assert b'["x-kept", "seen"]' in answer.body


def test_entries_of_the_table_are_found_again_and_evicted(h2: Subject) -> None:
    h2.only_ours()
    with h2.client() as client:
        encoder = hpack.Encoder()
        for turn in range(200):
            fields = [*head("/report"), ("x-turn", str(turn % 7)), (f"x-name-{turn}", "v" * 60), ("x-old", "o" * 40)]
            client.send(coded(encoder.encode(fields), client.stream()))
            answer = client.answer(client.next_stream - 2)
            assert f'["x-turn", "{turn % 7}"]'.encode() in answer.body
            assert f'["x-name-{turn}", "{"v" * 60}"]'.encode() in answer.body


@pytest.mark.parametrize("sizes", [[0], [4096], [0, 4096], [100, 0, 4096], [1, 2]], ids=str)
def test_the_table_may_change_its_size_at_the_start_of_a_block(h2: Subject, sizes: list[int]) -> None:
    with h2.client() as client:
        client.send(coded(HEAD + literal("x", "y", 0x40), 1))
        assert client.answer(1).status == 200
        if len(sizes) < 3:
            client.send(coded(b"".join(integer(size, 5, 0x20) for size in sizes) + HEAD, 3))
            assert client.answer(3).status == 200
            client.send(coded(HEAD + b"\xbe", 5))                                # what it has evicted is not there any more
            if 0 in sizes or sizes[0] < 34:
                client.dies(COMPRESSION_ERROR)
            else:
                assert client.answer(5).status == 200


def test_a_smaller_table_of_the_client_is_kept_by_the_server(h2: Subject) -> None:
    """The kit's decoder refuses a block of the server that uses more than it was allowed."""
    with h2.client(offer={TABLE_SIZE: 0}) as client:
        client.decoder.max_allowed_table_size = 0
        client.works()
        client.works()
        client.decoder.max_allowed_table_size = 4096
        client.send(settings((TABLE_SIZE, 4096)))
        client.works()


def test_never_indexed_fields_are_taken(h2: Subject) -> None:
    with h2.client() as client:
        client.send(coded(HEAD + literal("authorization", "Bearer x", 0x10)))
        assert client.answer(1).status == 200
