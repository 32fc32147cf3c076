"""What must hold for every input of the parser: cutting it changes nothing, writing it again changes nothing, work is linear."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway._speedups import testing
from tests.model import http1_inputs as inputs

COMMON = settings(max_examples=3 * settings().max_examples)


def outcome(parse, *arguments, **limits) -> object:
    """The result, or the error's slug."""
    try:
        return parse(*arguments, **limits)
    except testing.ParseError as error:
        return (error.status, error.slug)


def whole_or_refused(parse, data: bytes, cuts: list[int]) -> None:
    """Every way of cutting the input gives what the whole input gives."""
    whole = outcome(parse, data)
    pieces = outcome(parse, data, sorted(cuts))
    if whole != pieces:
        # An error may be seen earlier, under the name of what was looked at first, but never turn into a success.
        assert isinstance(whole, tuple), f"cut at {cuts}: {pieces!r} instead of {whole!r}"
        assert isinstance(pieces, tuple), f"cut at {cuts}: {pieces!r} instead of {whole!r}"


@COMMON
@given(inputs.requests(), st.data())
@example(b"GET / HTTP/1.1\r\nHost: gw.test\r\n\r\nhello", None)
def test_cutting_a_request_changes_nothing(data: bytes, draw: st.DataObject | None) -> None:
    if draw is None:
        whole_or_refused(testing.parse_request, data, list(range(len(data))))
    else:
        whole_or_refused(testing.parse_request, data, draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))


@pytest.mark.parametrize("parse", [testing.parse_request, testing.parse_response])
@pytest.mark.parametrize(
    "data",
    [
        b"POST /a/b?c HTTP/1.1\r\nHost: gw.test\r\nContent-Length: 5\r\nX: \t y \r\n\r\nhello",
        b"GET / HTTP/1.1\r\nHost: gw.test\r\nX: a\rb\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: y\r\n\r\nhello",
        b"HTTP/1.0 200\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_cutting_at_every_offset_changes_nothing(parse, data: bytes) -> None:
    for cut in range(len(data) + 1):
        whole_or_refused(parse, data, [cut])
    whole_or_refused(parse, data, list(range(len(data))))


@COMMON
@given(inputs.responses(), st.data())
def test_cutting_a_response_changes_nothing(data: bytes, draw: st.DataObject) -> None:
    whole_or_refused(testing.parse_response, data, draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))


@COMMON
@given(inputs.chunked_bodies(), st.data())
def test_cutting_a_chunked_body_changes_nothing(data: bytes, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
    assert outcome(testing.decode_chunked, [data]) == outcome(testing.decode_chunked, pieces)
    assert outcome(testing.decode_chunked, [data]) == outcome(testing.decode_chunked, [data[i : i + 1] for i in range(len(data))])


@COMMON
@given(inputs.requests())
def test_writing_what_was_read_and_reading_it_again_changes_nothing(data: bytes) -> None:
    head = outcome(testing.parse_request, data)
    if not isinstance(head, dict):
        return
    target = data.split(b" ", 2)[1]
    again = b"%s %s HTTP/1.%d\r\n" % (head["method"], target, head["minor"])
    again += b"".join(name + b": " + value + b"\r\n" for name, value in head["fields"]) + b"\r\n"
    second = testing.parse_request(again)
    for name in ("method", "path", "query", "host", "fields", "content_length", "chunked", "close", "keep_alive", "dropped", "identity"):
        assert second[name] == head[name], name


@COMMON
@given(inputs.requests())
def test_offsets_describe_the_bytes(data: bytes) -> None:
    head = outcome(testing.parse_request, data)
    if not isinstance(head, dict):
        return
    lines = data[: head["length"]].split(b"\r\n")
    assert head["length"] == sum(len(line) + 2 for line in lines[:-1]), "the head ends with its empty line"
    assert [line + b"\r\n" for line in lines[1:-2]] == head["lines"]
    for (name, value), line in zip(head["fields"], head["lines"]):
        assert line.startswith(name + b":")
        assert line[len(name) + 1 :].strip(b" \t\r\n") == value


PATH_PIECES = [
    b"/", b"a", b".", b"..", b"%2e", b"%2E", b"%61", b"%41", b"~", b";", b";x", b"%3b", b"%20", b"%c3%a9", b"%C3%A9", b"%e2%82%ac",
    b"%25", b"%2541", b"%7e", b"b", b"-", b":", b"%3a",
]  # fmt: skip
BAD_PATH_PIECES = [b"%2f", b"%5c", b"\\", b"%00", b"%", b"%zz", b"%u0041", b"%c0%af", b"%ff", b"%252e", b"//", b"%0a"]


@settings(max_examples=8 * settings().max_examples)
@given(st.lists(inputs.mostly(PATH_PIECES, BAD_PATH_PIECES), max_size=12).map(lambda pieces: b"/" + b"".join(pieces)))
@example(b"/a/./../b")
@example(b"/%2e%2e/a")
@example(b"/a/..%3bx/b")
def test_a_normalised_path_is_final(path: bytes) -> None:
    result = outcome(testing.normalise_path, path)
    if isinstance(result, tuple):
        assert result[0] == 400
        return
    assert len(result) <= len(path)
    assert result.startswith(b"/")
    assert testing.normalise_path(result) == result, "normalising twice changes it"
    assert b"//" not in result
    assert b"\\" not in result
    for segment in result.split(b"/"):
        plain = segment.replace(b"%3B", b";").split(b";")[0] if b";" in segment.replace(b"%3B", b";") else segment
        assert plain not in (b".", b".."), f"a dot segment is left in {result!r}"
    escapes = [result[i : i + 3] for i in range(len(result)) if result[i : i + 1] == b"%"]
    assert all(escape == escape.upper() for escape in escapes)
    assert not {b"%2F", b"%5C", b"%00", b"%2E", b"%61"} & set(escapes)


@pytest.mark.parametrize("shape", [b"a/", b"../", b"a/../", b"%61", b"%c3%a9", b";", b"./", b"%25", b"a/b/c/../../../"])
def test_long_paths_of_awkward_shape_have_an_answer(shape: bytes) -> None:
    result = outcome(testing.normalise_path, b"/" + shape * 2000)
    assert result[0] == 400 if isinstance(result, tuple) else result.startswith(b"/")


@pytest.mark.parametrize("fields", [[b"X: " + b"y" * 20000], [b"X: y"] * 90, [b"X:"] * 90])
def test_a_dripping_head_costs_linear_work(fields: list[bytes]) -> None:
    data = b"GET / HTTP/1.1\r\n" + b"\r\n".join([b"Host: gw.test", *fields]) + b"\r\n\r\n"
    # Byte by byte each byte is looked at once; a line's bytes at most once more when its end arrives.
    assert testing.scanned_bytes(data, range(len(data) + 1)) <= 2 * len(data)
    assert testing.scanned_bytes(data, range(0, len(data) + 7, 7)) <= 9 * len(data)


def test_a_dripping_head_is_refused_at_its_first_wrong_byte() -> None:
    data = b"GET / HTTP/1.1\r\nHost: gw.test\r\n" + b"X: y\r\n" * 50 + b"\r\n"
    assert testing.parse_request(data, list(range(len(data)))) == testing.parse_request(data)
    with pytest.raises(testing.ParseError, match="bad-method"):
        testing.parse_request(b"\x16\x03\x01")


@pytest.mark.parametrize(("limit", "data"), [
    ({"head": 1024}, b"GET / HTTP/1.1\r\nHost: gw.test\r\nX: %s\r\n\r\n"),
    ({"target": 64}, b"GET /%s HTTP/1.1\r\nHost: gw.test\r\n\r\n"),
])  # fmt: skip
def test_limits_are_exact(limit: dict[str, int], data: bytes) -> None:
    (name, most), = limit.items()
    overhead = len(data % b"") if name == "head" else 1
    assert testing.parse_request(data % (b"x" * (most - overhead)), **limit)
    with pytest.raises(testing.ParseError) as caught:
        testing.parse_request(data % (b"x" * (most - overhead + 1)), **limit)
    assert caught.value.status == (431 if name == "head" else 414)


def test_the_number_of_fields_is_exact() -> None:
    head = b"GET / HTTP/1.1\r\nHost: gw.test\r\n"
    assert len(testing.parse_request(head + b"X: y\r\n" * 9 + b"\r\n", fields=10)["fields"]) == 10
    with pytest.raises(testing.ParseError) as caught:
        testing.parse_request(head + b"X: y\r\n" * 10 + b"\r\n", fields=10)
    assert caught.value.status == 431
