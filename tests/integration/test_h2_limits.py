"""What a request may be at most, asked in HTTP/2: 413, 414 and 431 end the stream, and the connection's tables stay true."""

from __future__ import annotations

import pytest

from tests.integration.h2_kit import END_STREAM, NO_ERROR, frame, head, headers
from tests.integration.h2_subject import Subject


@pytest.mark.parametrize(("size", "status"), [(100, 200), (500, 200), (1024, 431), (5000, 431), (60_000, 431)])
def test_the_bytes_of_a_head(h2: Subject, size: int, status: int) -> None:
    with h2.client("tight") as client:
        assert client.ask([*head(), ("x-large", "y" * size)]).status == status
        assert client.ask([*head(), ("x-large", "z" * 100)]).status == 200      # what the first one put into the table is there


@pytest.mark.parametrize("path", ["/", "/two/"])
@pytest.mark.parametrize(("count", "status"), [(10, 200), (19, 200), (21, 431), (200, 431)])
def test_the_number_of_fields(h2: Subject, count: int, status: int, path: str) -> None:
    """Those of one request, `host` among them."""
    with h2.client("tight") as client:
        assert client.ask([*head(path), *((f"x{number}", "y") for number in range(count))]).status == status
        assert client.ask().status == 200


def test_fields_that_are_only_references_count_in_full(h2: Subject) -> None:
    """An HPACK bomb of modest size: what counts is what comes out."""
    with h2.client("tight") as client:
        assert client.ask([*head(), ("x-large", "y" * 400)]).status == 200
        assert client.ask([*head(), *[("x-large", "y" * 400)] * 3]).status == 431
        assert client.ask().status == 200


def test_the_length_of_a_target(h2: Subject) -> None:
    with h2.client("tight") as client:
        assert client.ask(head("/" + "a" * 255)).status == 200
        assert client.ask(head("/" + "a" * 256)).status == 414
        assert client.ask(head("/" + "a" * 600)).status == 414
        assert client.ask().status == 200


@pytest.mark.parametrize("path", ["/report", "/two/report"])
def test_the_length_of_a_body(h2: Subject, path: str) -> None:
    """Announced or not: above the limit it is 413, and the connection goes on."""
    with h2.client("tight") as client:
        for size in (65536, 65537, 500_000):
            expected = 200 if size == 65536 else 413
            stream = client.open(head(path, "POST", ("content-length", str(size))), end=False)
            client.data(stream, b"x" * size)
            assert client.answer(stream).status == expected
            stream = client.open(head(path, "POST"), end=False)
            client.data(stream, b"x" * size)
            answer = client.answer(stream)
            assert answer.status == expected or (expected == 413 and answer.reset is not None)
        assert client.ask().status == 200


def test_a_refusal_before_the_end_of_a_body_asks_for_no_more_of_it(h2: Subject) -> None:
    """RFC 9113 8.1: a complete answer, and then RST_STREAM with NO_ERROR."""
    with h2.client("tight") as client:
        stream = client.open(head("/report", "POST", ("content-length", "1000000")), end=False)
        answer = client.answer_of(stream)
        client.until(lambda: answer.ended, "the whole answer")
        assert answer.status == 413
        client.until(lambda: answer.reset is not None, "the reset")
        assert answer.reset == NO_ERROR
        client.send(frame(0, 0, stream, b"on its way"), frame(0, END_STREAM, stream, b"and more"))
        assert client.ask().status == 200


def test_trailers_are_bounded_as_heads_are(h2: Subject) -> None:
    with h2.client("tight") as client:
        stream = client.open(head("/two/report", "POST", ("te", "trailers")), end=False)
        client.data(stream, b"body", end=False)
        client.send(headers(stream, [(f"x{number}", "y" * 100) for number in range(100)]))
        client.until(lambda: client.answer_of(stream).over or client.gone or client.end, "an end")
        assert client.answer_of(stream).status != 200
    assert not any(call.trailers for call in h2.origin.calls)
