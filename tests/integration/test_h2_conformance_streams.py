"""RFC 9113, section 5.1 and 8.1 at a listener: the states of streams and their numbers, and the order of a message's frames."""

from __future__ import annotations

import struct

import pytest

from tests.integration.h2_kit import (
    CANCEL,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW,
    MAX_STREAMS,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    RST_STREAM,
    STREAM_CLOSED,
    H2Client,
    block,
    frame,
    head,
    headers,
    priority,
    rst,
    window_update,
)
from tests.integration.h2_subject import Subject

LARGE = head("/bytes/100000")

# -- 5.1 idle


@pytest.mark.parametrize(
    "sent",
    [frame(DATA, 0, 1, b"x"), frame(DATA, END_STREAM, 1), rst(1), window_update(1, 100), rst(101)],
    ids=["DATA", "empty DATA", "RST_STREAM", "WINDOW_UPDATE", "RST_STREAM far ahead"],
)
def test_a_frame_on_an_idle_stream_ends_the_connection(h2: Subject, sent: bytes) -> None:
    with h2.client() as client:
        client.send(sent)
        client.dies(PROTOCOL_ERROR)


@pytest.mark.parametrize("sent", [frame(DATA, 0, 2, b"x"), rst(2), window_update(2, 100)], ids=["DATA", "RST_STREAM", "WINDOW_UPDATE"])
def test_a_frame_on_a_stream_that_only_the_server_could_open_ends_the_connection(h2: Subject, sent: bytes) -> None:
    with h2.client() as client:
        client.send(sent)
        client.dies(PROTOCOL_ERROR)


def test_a_priority_of_an_idle_stream_opens_nothing(h2: Subject) -> None:
    with h2.client() as client:
        client.send(priority(99, 1))
        client.works()


# -- 5.1 half-closed (remote): the request is complete, the answer is not


@pytest.mark.parametrize("kind", ["DATA", "HEADERS"])
def test_a_frame_behind_the_end_of_a_request_is_an_error(h2: Subject, kind: str) -> None:
    with h2.client(offer={INITIAL_WINDOW: 0}) as client:
        stream = client.open(LARGE)
        client.headed(stream)
        client.send(frame(DATA, END_STREAM, stream, b"more") if kind == "DATA" else headers(stream, [("late", "yes")]))
        closed(client, stream, STREAM_CLOSED)


def test_windows_priorities_and_resets_are_taken_behind_the_end_of_a_request(h2: Subject) -> None:
    with h2.client(offer={INITIAL_WINDOW: 0}) as client:
        stream = client.open(LARGE)
        client.headed(stream)
        client.send(window_update(stream, 10), priority(stream))
        client.until(lambda: len(client.answer_of(stream).body) == 10, "ten bytes")
        client.send(rst(stream))
        client.barrier()
        assert not client.answer_of(stream).ended


# -- 5.1 closed


@pytest.mark.parametrize("kind", ["DATA", "HEADERS"])
def test_a_frame_on_a_stream_that_both_sides_ended_is_an_error(h2: Subject, kind: str) -> None:
    with h2.client() as client:
        assert client.ask().ended
        client.send(frame(DATA, END_STREAM, 1, b"more") if kind == "DATA" else headers(1, head()))
        closed(client, 1, STREAM_CLOSED, PROTOCOL_ERROR)


@pytest.mark.parametrize("kind", ["DATA", "HEADERS"])
def test_a_frame_on_a_stream_that_the_client_reset_is_an_error(h2: Subject, kind: str) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False)
        client.send(rst(stream), frame(DATA, END_STREAM, stream, b"more") if kind == "DATA" else headers(stream, [("late", "yes")]))
        closed(client, stream, STREAM_CLOSED, PROTOCOL_ERROR)


def closed(client: H2Client, stream: int, *codes: int) -> None:
    """STREAM_CLOSED for the stream or for the connection; a frame that is ignored where the stream was closed lately is none."""
    answer = client.answer_of(stream)
    client.until(lambda: answer.reset is not None or client.gone, "an error")
    assert (client.gone[0].error_code if client.gone else answer.reset) in codes


def test_windows_priorities_and_resets_of_a_closed_stream_are_ignored(h2: Subject) -> None:
    with h2.client() as client:
        client.works()
        client.send(window_update(1, 100), priority(1), rst(1))
        client.works()


def test_data_in_the_same_segment_behind_a_reset_hurts_nobody(h2: Subject) -> None:
    """CVE-2026-26311: what was freed by the reset must not be touched by the DATA behind it."""
    with h2.client() as client:
        other = client.open(head("/", "POST"), end=False)
        stream = client.open(head("/", "POST"), end=False)
        client.send(frame(DATA, 0, stream, b"a") + rst(stream) + frame(DATA, 0, stream, b"b" * 1000) + frame(DATA, END_STREAM, other, b"c"))
        client.until(lambda: client.gone or client.answer_of(other).over, "the other's answer, or an error")
        assert client.gone or client.answer_of(other).status == 200
    with h2.client() as client:
        client.works()


def test_an_error_of_a_stream_leaves_the_others_alone(h2: Subject) -> None:
    with h2.client(offer={INITIAL_WINDOW: 5000}) as client:
        good = client.open(LARGE)
        bad = client.open(head("/", "GET", ("te", "gzip")))
        assert client.answer(bad).reset == PROTOCOL_ERROR or client.answer(bad).status == 400
        assert len(client.answer(good).body) == 100000


# -- 5.1.1 numbers


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_client_opens_odd_streams_only(h2: Subject, number: int) -> None:
    with h2.client() as client:
        client.send(headers(number, head()))
        client.dies(PROTOCOL_ERROR)


def test_numbers_only_grow(h2: Subject) -> None:
    with h2.client() as client:
        client.send(headers(5, head()))
        assert client.answer(5).status == 200
        client.send(headers(3, head()))
        client.dies(PROTOCOL_ERROR, STREAM_CLOSED)


def test_numbers_may_be_left_out(h2: Subject) -> None:
    with h2.client() as client:
        for number in (7, 1001, 2**31 - 3):
            client.send(headers(number, head()))
            assert client.answer(number).status == 200


def test_the_last_number_is_usable(h2: Subject) -> None:
    with h2.client() as client:
        client.send(headers(2**31 - 1, head()))
        assert client.answer(2**31 - 1).status == 200


# -- 5.1.2 how many


def test_a_stream_above_the_limit_is_refused_and_the_others_go_on(h2: Subject) -> None:
    with h2.client(offer={INITIAL_WINDOW: 0}) as client:
        most = client.settings[MAX_STREAMS]
        opened = [client.open(LARGE) for _ in range(most)]
        for stream in opened:
            client.headed(stream)
        above = client.open(LARGE)
        answer = client.answer_of(above)
        client.until(lambda: answer.over or client.gone, "an error")
        assert (client.gone[0].error_code if client.gone else answer.reset) in (REFUSED_STREAM, PROTOCOL_ERROR)
        if not client.gone:
            client.send(window_update(opened[0], 100000), window_update(0, 100000))
            assert len(client.answer(opened[0]).body) == 100000
            client.send(headers(client.stream(), head("/bytes/0")))             # its place is free again
            assert client.answer(client.next_stream - 2).status == 200


# -- 8.1 the order of a message


def test_a_second_header_block_that_does_not_end_the_request_is_malformed(h2: Subject) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False)
        client.data(stream, b"body", end=False)
        client.send(headers(stream, [("digest", "x")], end=False))
        answer = client.answer_of(stream)
        client.until(lambda: answer.over or client.gone, "an error")
        assert answer.reset == PROTOCOL_ERROR or answer.status == 400 or client.gone[0].error_code == PROTOCOL_ERROR


def test_trailers_end_a_request(h2: Subject) -> None:
    with h2.client() as client:
        assert client.ask(head("/", "POST", ("te", "trailers")), b"body", trailers=[("digest", "x")]).status == 200
        assert client.ask(head("/", "POST"), None, trailers=[("digest", "x")]).status == 200
        client.works()


@pytest.mark.parametrize("name", [":path", ":status", ":method"])
def test_trailers_with_a_pseudo_header_are_malformed(h2: Subject, name: str) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False)
        client.data(stream, b"body", end=False)
        client.send(headers(stream, [(name, "/x")]))
        client.malformed(stream)


@pytest.mark.parametrize("field", [("transfer-encoding", "chunked"), ("connection", "close"), ("Digest", "x"), ("", "x"), ("a b", "x"), ("x", "a\r\nb: c")])
def test_trailers_follow_the_rules_of_headers(h2: Subject, field: tuple[str, str]) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False)
        client.data(stream, b"body", end=False)
        client.send(headers(stream, [field]))
        client.malformed(stream)


def test_a_body_may_come_in_empty_and_in_many_frames(h2: Subject) -> None:
    with h2.client() as client:
        stream = client.open(head("/echo", "POST"), end=False)
        for byte in b"payment":
            client.send(frame(DATA, 0, stream), frame(DATA, 0, stream, bytes([byte])))
        client.send(frame(DATA, END_STREAM, stream))
        answer = client.answer(stream)
        assert answer.status == 200
        assert not h2.echoes or answer.body == b"payment"


def test_headers_may_come_in_many_frames(h2: Subject) -> None:
    with h2.client() as client:
        stream, raw = client.stream(), block(head("/", "GET", ("x-more", "y" * 50)))
        pieces = [raw[at : at + 40] for at in range(0, len(raw), 40)]
        out = frame(HEADERS, END_STREAM, stream, pieces[0])
        for piece in pieces[1:]:
            out += frame(9, 0, stream, piece)
        client.send(out + frame(9, END_HEADERS, stream))
        assert client.answer(stream).status == 200


def test_many_streams_at_once_are_all_answered(h2: Subject) -> None:
    with h2.client() as client:
        streams = [client.open(head(f"/bytes/{1000}")) for _ in range(50)]
        assert [len(client.answer(stream).body) for stream in streams] == [1000] * 50


def test_a_cancelled_request_costs_only_itself(h2: Subject) -> None:
    with h2.client(offer={INITIAL_WINDOW: 10}) as client:
        for _ in range(10):
            stream = client.open(LARGE)
            client.headed(stream)
            client.send(frame(RST_STREAM, 0, stream, struct.pack("!I", CANCEL)))
        client.barrier()
        assert len(client.ask(head("/bytes/1000")).body) == 1000
