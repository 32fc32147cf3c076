"""gRPC-Web to gRPC and back: the bytes, wherever they are cut, and what is refused."""

from __future__ import annotations

import base64
import itertools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway._speedups.testing import WebCodec, web_accepts_text, web_types

TRAILERS = b"grpc-status: 0\r\ngrpc-message: fine\r\n"


def message(payload: bytes, flag: int = 0) -> bytes:
    return struct.pack("!BI", flag, len(payload)) + payload


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(data) + 1) for place in at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


def unpadded_groups(text: bytes) -> bytes:
    """Decode base64 as a browser's client does: group by group, each maybe padded."""
    assert len(text) % 4 == 0
    return b"".join(base64.b64decode(text[i : i + 4], validate=True) for i in range(0, len(text), 4))


MESSAGES = st.lists(st.binary(max_size=300), max_size=6)
CUTS = st.lists(st.integers(0, 5000), max_size=8)


# -- requests


@given(MESSAGES, CUTS)
@settings(max_examples=300)
def test_a_binary_request_passes_as_it_is(payloads: list[bytes], cuts: list[int]) -> None:
    data = b"".join(message(payload, flag=len(payload) % 2) for payload in payloads)
    codec = WebCodec(False)
    assert b"".join(codec.decode(piece) for piece in cut(data, cuts)) == data
    codec.finish()


@given(MESSAGES, CUTS, st.booleans())
@settings(max_examples=300)
def test_a_request_in_text_is_decoded_wherever_it_is_cut(payloads: list[bytes], cuts: list[int], apart: bool) -> None:
    """Apart: each message is a base64 body of its own, with its padding."""
    data = b"".join(map(message, payloads))
    text = b"".join(base64.b64encode(message(payload)) for payload in payloads) if apart else base64.b64encode(data)
    codec = WebCodec(True)
    assert b"".join(codec.decode(piece) for piece in cut(text, cuts)) == data
    codec.finish()


def is_base64(group: bytes) -> bool:
    """Four digits as RFC 4648 4 writes them: no bit set that means nothing (3.5)."""
    try:
        made = base64.b64decode(group, validate=True)
    except ValueError:
        return False
    return bool(made) and base64.b64encode(made) == group


@given(st.text(alphabet="AQgwZ9+/=-_ \n\0", max_size=24).map(str.encode) | st.binary(max_size=24))
@settings(max_examples=2000)
def test_text_is_taken_exactly_when_its_groups_are_base64(text: bytes) -> None:
    good = all(is_base64(text[i : i + 4]) for i in range(0, len(text) - len(text) % 4, 4))
    try:
        WebCodec(True).decode(text)
    except ValueError as error:
        assert (str(error) == "base64") is not good
    else:
        assert good


@pytest.mark.parametrize(
    "text",
    [b"AAAA\n", b"AAA AAAA", b"A===", b"====", b"AA=A", b"AAB=", b"AB==", b"AA-_", b"AA\xff\xff", b"=AAA", b"A=AA"],
)
def test_what_is_no_base64_is_refused(text: bytes) -> None:
    codec = WebCodec(True)
    with pytest.raises(ValueError, match="base64"):
        for at in range(len(text)):
            codec.decode(text[at : at + 1])
        codec.decode(b"AAAAAAAA")
        codec.finish()
    whole = WebCodec(True)
    with pytest.raises(ValueError, match="base64"):
        whole.decode(text + b"AAAAAAAA"[: -len(text) % 4 + 4])


@pytest.mark.parametrize("flag", [2, 3, 0x7F, 0x80, 0x81, 0xFF])
def test_a_client_sends_messages_only(flag: int) -> None:
    """A frame of trailers in a request, or a flag that nobody has defined."""
    for text in (False, True):
        codec = WebCodec(text)
        good, bad = message(b"one"), message(b"two", flag)
        with pytest.raises(ValueError, match="frame"):
            codec.decode(base64.b64encode(good + bad) if text else good + bad)


@pytest.mark.parametrize("text", [False, True])
def test_a_request_that_ends_in_the_middle_is_not_whole(text: bool) -> None:
    data = message(b"0123456789")
    whole = base64.b64encode(data) if text else data
    for length in range(1, len(whole)):
        codec = WebCodec(text)
        codec.decode(whole[:length])
        with pytest.raises(ValueError, match="cut"):
            codec.finish()
    codec = WebCodec(text)
    codec.decode(whole)
    codec.finish()
    WebCodec(text).finish()


# -- answers


@given(MESSAGES, CUTS)
@settings(max_examples=300)
def test_an_answer_in_binary(payloads: list[bytes], cuts: list[int]) -> None:
    data = b"".join(map(message, payloads))
    codec = WebCodec(False)
    sent = b"".join(codec.encode(piece) for piece in cut(data, cuts)) + codec.trailers(TRAILERS)
    assert sent == data + message(TRAILERS, 0x80)


@given(MESSAGES, CUTS)
@settings(max_examples=300)
def test_an_answer_in_text_is_base64_wherever_it_is_cut(payloads: list[bytes], cuts: list[int]) -> None:
    data = b"".join(map(message, payloads))
    codec = WebCodec(True)
    sent = b"".join(codec.encode(piece) for piece in cut(data, cuts)) + codec.trailers(TRAILERS)
    assert unpadded_groups(sent) == data + message(TRAILERS, 0x80)


@given(MESSAGES)
def test_a_client_that_reads_text_has_every_message_as_soon_as_it_is_complete(payloads: list[bytes]) -> None:
    codec = WebCodec(True)
    for payload in payloads:
        whole = message(payload)
        sent = codec.encode(whole[:-1]) + codec.encode(whole[-1:])
        assert unpadded_groups(sent) == whole


@pytest.mark.parametrize("text", [False, True])
def test_a_service_cannot_say_in_a_message_what_trailers_say(text: bool) -> None:
    codec = WebCodec(text)
    codec.encode(message(b"one"))
    with pytest.raises(ValueError, match="frame"):
        codec.encode(message(b"grpc-status: 0\r\n", 0x80))


@pytest.mark.parametrize("text", [False, True])
def test_an_answer_that_breaks_off_gets_no_trailers(text: bool) -> None:
    codec = WebCodec(text)
    codec.encode(message(b"0123456789")[:-1])
    with pytest.raises(ValueError, match="cut"):
        codec.trailers(TRAILERS)


def test_an_answer_of_trailers_alone() -> None:
    assert WebCodec(False).trailers(b"") == b"\x80\0\0\0\0"
    assert WebCodec(True).trailers(b"") == base64.b64encode(b"\x80\0\0\0\0")
    assert WebCodec(True).trailers(TRAILERS) == base64.b64encode(message(TRAILERS, 0x80))


def test_large_pieces() -> None:
    data = message(bytes(range(256)) * 4096)
    text = base64.b64encode(data)
    assert WebCodec(True).decode(text) == data
    assert WebCodec(True).encode(data) == text


# -- content types


@pytest.mark.parametrize(
    ("value", "kind", "request_type"),
    [
        (b"application/grpc-web", "binary", b"application/grpc"),
        (b"application/grpc-web+proto", "binary", b"application/grpc+proto"),
        (b"Application/gRPC-Web+Proto", "binary", b"application/grpc+Proto"),
        (b"application/grpc-web+json; charset=utf-8", "binary", b"application/grpc+json"),
        (b"application/grpc-web-text", "text", b"application/grpc"),
        (b"application/grpc-web-text+proto", "text", b"application/grpc+proto"),
        (b"application/grpc-web-text ;a=b", "text", b"application/grpc"),
    ],
)
def test_content_types_of_requests(value: bytes, kind: str, request_type: bytes) -> None:
    assert web_types(value)[:2] == (kind, request_type)


@pytest.mark.parametrize(
    "value",
    [
        b"", b"application/grpc", b"application/grpc+proto", b"application/grpc-webx", b"application/grpc-web-texts", b"application/json",
        b"application/grpc-web+", b"application/grpc-web+a b", b"application/grpc-web+" + b"a" * 25, b"application/grpc-web, text/html",
        b"xapplication/grpc-web", b"application/grpc-web+pro\rto",
    ],
)  # fmt: skip
def test_what_is_no_grpc_web(value: bytes) -> None:
    assert web_types(value)[0] is None


@pytest.mark.parametrize(
    ("value", "suffix"),
    [
        (b"application/grpc", b"+proto"), (b"application/grpc+proto", b"+proto"), (b"application/grpc+json;x", b"+json"),
        (b"application/grpc+", b"+proto"), (b"application/grpc+" + b"a" * 25, b"+proto"), (b"text/html", b"+proto"), (b"", b"+proto"),
        (b"application/grpc+a\r\nx", b"+a"),
    ],
)  # fmt: skip
def test_content_types_of_answers(value: bytes, suffix: bytes) -> None:
    assert web_types(value)[2:] == (b"application/grpc-web" + suffix, b"application/grpc-web-text" + suffix)


@pytest.mark.parametrize(
    ("accept", "text"),
    [
        (b"application/grpc-web-text", True), (b"application/grpc-web-text+proto", True), (b"*/*, application/grpc-web-text;q=1", True),
        (b"application/grpc-web+proto", False), (b"*/*", False), (b"", False), (b",,,", False), (b"application/grpc-web-textual", False),
    ],
)  # fmt: skip
def test_what_an_accept_asks_for(accept: bytes, text: bool) -> None:
    assert web_accepts_text(accept) is text
