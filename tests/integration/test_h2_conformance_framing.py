"""RFC 9113, sections 3 to 6 at a listener: the preface, frames and their sizes, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, flow control.

What is wrong with the connection ends it by a GOAWAY with the code that the RFC names; what is wrong with a stream ends only that.
"""

from __future__ import annotations

import struct

import pytest

from tests.integration.h2_kit import (
    ACK,
    CANCEL,
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW,
    MAX_FRAME,
    MAX_STREAMS,
    PADDED,
    PING,
    PREFACE,
    PRIORITIZED,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    STREAM_CLOSED,
    WINDOW_UPDATE,
    H2Client,
    block,
    frame,
    goaway,
    head,
    headers,
    ping,
    priority,
    settings,
    window_update,
)
from tests.integration.h2_subject import Subject

LARGE = head("/bytes/100000")
LATEST = 2**31 - 1


# -- 3.4 the preface


def test_a_connection_begins_with_settings(h2: Subject) -> None:
    with h2.client() as client:
        assert type(client.frames[0]).__name__ == "SettingsFrame"
        client.works()


def test_settings_may_come_in_the_packet_of_the_preface_with_a_request(h2: Subject) -> None:
    with h2.client(start=False) as client:
        client.send(PREFACE, settings(), headers(1, head()))
        assert client.answer(1).status == 200


def test_a_preface_may_come_byte_by_byte(h2: Subject) -> None:
    with h2.client(start=False, polite=False) as client:          # no ACK of ours between the bytes
        for byte in PREFACE + settings() + headers(1, head()):
            client.send(bytes([byte]))
        assert client.answer(1).status == 200


@pytest.mark.parametrize("wrong", [b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", b"PRI * HTTP/2.1\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01" + b"a" * 40])
def test_a_wrong_preface_ends_the_connection(h2: Subject, wrong: bytes) -> None:
    with h2.dial() as sock:
        sock.sendall(wrong)
        while sock.recv(4096):
            pass


@pytest.mark.parametrize("first", [headers(1, head()), ping(), window_update(0, 1)], ids=["HEADERS", "PING", "WINDOW_UPDATE"])
def test_a_preface_without_settings_ends_the_connection(h2: Subject, first: bytes) -> None:
    with h2.client(start=False) as client:
        client.send(PREFACE, first)
        client.dies(PROTOCOL_ERROR)


# -- 4.1 frames


def test_frames_of_an_unknown_type_are_ignored(h2: Subject) -> None:
    with h2.client() as client:
        client.send(frame(0x16, 0xFF, 0, b"what"), frame(0xFF, 0, 1, b""))
        client.barrier()
        stream = client.open(head("/", "POST"), end=False)
        client.send(frame(0x99, 0x5, stream, b"12345"))
        client.data(stream, b"body")
        assert client.answer(stream).status == 200


def test_flags_without_a_meaning_are_ignored(h2: Subject) -> None:
    with h2.client() as client:
        client.send(ping(b"flagged.", 0xFE))
        client.until(lambda: b"flagged." in client.pongs, "the answer to a PING with flags")
        client.send(frame(WINDOW_UPDATE, 0xFF, 0, struct.pack("!I", 1)), frame(PRIORITY, 0xFF, 1, b"\0\0\0\0\x0f"))
        client.works()


def test_the_reserved_bits_are_ignored(h2: Subject) -> None:
    with h2.client() as client:
        client.send(frame(PING, 0, 1 << 31, b"reserved"), frame(WINDOW_UPDATE, 0, 1 << 31, struct.pack("!I", 1 << 31 | 1)))
        client.until(lambda: b"reserved" in client.pongs, "the answer to a PING with the reserved bit")
        client.works()


# -- 4.2 frame sizes


def test_frames_of_16384_bytes_are_taken(h2: Subject) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False)
        client.send(frame(DATA, END_STREAM, stream, b"x" * 16384))
        assert client.answer(stream).status == 200


@pytest.mark.parametrize("kind", [DATA, HEADERS, SETTINGS, PING, 0xEE], ids=["DATA", "HEADERS", "SETTINGS", "PING", "unknown"])
def test_a_frame_larger_than_the_server_said_it_takes_ends_the_connection(h2: Subject, kind: int) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False) if kind == DATA else client.stream() if kind == HEADERS else 0
        client.send(frame(kind, END_HEADERS if kind == HEADERS else 0, stream, b"\0" * (client.settings.get(MAX_FRAME, 16384) + 1)))
        client.dies(FRAME_SIZE_ERROR)


WRONG_SIZES = {
    "SETTINGS of 3 bytes": frame(SETTINGS, payload=b"abc"),
    "SETTINGS of 7 bytes": frame(SETTINGS, payload=b"abcdefg"),
    "SETTINGS ACK with a payload": frame(SETTINGS, ACK, payload=b"\0\x03\0\0\0\x01"),
    "PING of 7 bytes": frame(PING, payload=b"1234567"),
    "PING of 9 bytes": frame(PING, payload=b"123456789"),
    "PING ACK of 6 bytes": frame(PING, ACK, payload=b"123456"),
    "WINDOW_UPDATE of 3 bytes": frame(WINDOW_UPDATE, payload=b"\0\0\1"),
    "WINDOW_UPDATE of 5 bytes": frame(WINDOW_UPDATE, payload=b"\0\0\0\1\0"),
    "GOAWAY of 7 bytes": frame(GOAWAY, payload=b"\0" * 7),
    "RST_STREAM of 3 bytes": headers(1, head("/", "POST"), end=False) + frame(RST_STREAM, 0, 1, b"\0\0\0"),
    "RST_STREAM of 5 bytes": headers(1, head("/", "POST"), end=False) + frame(RST_STREAM, 0, 1, b"\0\0\0\0\0"),
}


@pytest.mark.parametrize("case", WRONG_SIZES)
def test_a_frame_of_a_wrong_size_ends_the_connection(h2: Subject, case: str) -> None:
    with h2.client() as client:
        client.send(WRONG_SIZES[case])
        client.dies(FRAME_SIZE_ERROR)


@pytest.mark.parametrize("size", [0, 4, 6])
def test_a_priority_of_a_wrong_size_is_an_error_of_its_stream(h2: Subject, size: int) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False)
        client.send(frame(PRIORITY, 0, stream, b"\0" * size))
        answer = client.answer_of(stream)
        client.until(lambda: answer.over or client.gone, "an error")
        assert answer.reset == FRAME_SIZE_ERROR or client.gone[0].error_code == FRAME_SIZE_ERROR


# -- frames and where they may stand

MISPLACED = {
    "DATA on stream 0": frame(DATA, payload=b"x"),
    "HEADERS on stream 0": frame(HEADERS, END_STREAM | END_HEADERS, 0, block(head())),
    "PRIORITY on stream 0": priority(0),
    "RST_STREAM on stream 0": frame(RST_STREAM, payload=b"\0\0\0\x08"),
    "SETTINGS on a stream": frame(SETTINGS, 0, 1),
    "PING on a stream": frame(PING, 0, 1, b"12345678"),
    "GOAWAY on a stream": frame(GOAWAY, 0, 1, b"\0" * 8),
    "CONTINUATION on stream 0": frame(CONTINUATION, END_HEADERS, 0, block(head())),
    "CONTINUATION that continues nothing": frame(CONTINUATION, END_HEADERS, 1, block(head())),
    "CONTINUATION behind END_HEADERS": headers(1, head("/", "POST"), end=False) + frame(CONTINUATION, END_HEADERS, 1, block([("a", "b")])),
    "PUSH_PROMISE of a client": headers(1, head("/", "POST"), end=False) + frame(PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\x02" + block(head())),
    "DATA between HEADERS and CONTINUATION": frame(HEADERS, 0, 1, block(head())) + frame(DATA, 0, 1, b"x"),
    "PING between HEADERS and CONTINUATION": frame(HEADERS, 0, 1, block(head())) + ping(),
    "an unknown frame between HEADERS and CONTINUATION": frame(HEADERS, 0, 1, block(head())) + frame(0x42, 0, 1, b"x"),
    "CONTINUATION of another stream": frame(HEADERS, 0, 1, block(head())) + frame(CONTINUATION, END_HEADERS, 3, b""),
    "HEADERS between HEADERS and CONTINUATION": frame(HEADERS, 0, 1, block(head())) + headers(3, head()),
    "PRIORITY between HEADERS and CONTINUATION": frame(HEADERS, 0, 1, block(head())) + priority(1),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_a_frame_where_it_must_not_stand_ends_the_connection(h2: Subject, case: str) -> None:
    with h2.client() as client:
        client.send(MISPLACED[case])
        client.dies(PROTOCOL_ERROR)


# -- 6.1, 6.2 padding


@pytest.mark.parametrize("pad", [0, 1, 255])
def test_padding_is_taken_off(h2: Subject, pad: int) -> None:
    with h2.client() as client:
        stream = client.stream()
        flags = PADDED | END_HEADERS
        client.send(frame(HEADERS, flags, stream, bytes([pad]) + block(head("/echo", "POST")) + b"\0" * pad))
        client.send(frame(DATA, PADDED, stream, bytes([pad]) + b"pay" + b"\0" * pad))
        client.send(frame(DATA, PADDED | END_STREAM, stream, bytes([pad]) + b"\0" * pad))
        answer = client.answer(stream)
        assert answer.status == 200
        assert not h2.echoes or answer.body == b"pay"
        client.works()


TOO_MUCH = {
    "DATA, as long as the frame": (DATA, b"\x04abc"),
    "DATA, longer": (DATA, b"\xffabc"),
    "DATA without the length": (DATA, b""),
    "HEADERS, as long as the frame": (HEADERS, bytes([len(block(head())) + 1]) + block(head())),
    "HEADERS without the length": (HEADERS, b""),
    "HEADERS with priority and padding over it": (HEADERS, b"\x05\0\0\0\0\x0f" + b"\x82"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_padding_that_is_longer_than_the_frame_ends_the_connection(h2: Subject, case: str) -> None:
    kind, payload = TOO_MUCH[case]
    with h2.client() as client:
        if kind == DATA:
            stream, flags = client.open(head("/", "POST"), end=False), PADDED
        else:
            stream, flags = client.stream(), PADDED | END_HEADERS | END_STREAM | (PRIORITIZED if "priority" in case else 0)
        client.send(frame(kind, flags, stream, payload))
        client.dies(PROTOCOL_ERROR, FRAME_SIZE_ERROR)


def test_headers_with_a_priority_that_is_cut_short_end_the_connection(h2: Subject) -> None:
    with h2.client() as client:
        client.send(frame(HEADERS, END_HEADERS | END_STREAM | PRIORITIZED, client.stream(), b"\0\0\0\0"))
        client.dies(PROTOCOL_ERROR, FRAME_SIZE_ERROR)


# -- 5.3 priorities: deprecated, and still not allowed to be nonsense


def test_priorities_are_taken_in_any_state(h2: Subject) -> None:
    with h2.client() as client:
        client.send(priority(1), priority(101, 1), frame(HEADERS, END_HEADERS | END_STREAM | PRIORITIZED, 1, b"\x80\0\0\0\xff" + block(head())))
        assert client.answer(1).status == 200
        client.send(priority(1, 3))
        client.next_stream = 3
        client.works()


@pytest.mark.parametrize("form", ["PRIORITY", "HEADERS"])
def test_a_stream_that_depends_on_itself_is_no_more_than_an_error_of_that_stream(h2: Subject, form: str) -> None:
    """RFC 7540 5.3.1 made it an error of the stream; RFC 9113 5.3.2 has nobody look at it. Both are right, a third is not."""
    with h2.client() as client:
        stream = client.stream()
        if form == "PRIORITY":
            client.send(headers(stream, head("/", "POST"), end=False), priority(stream, stream))
            client.data(stream, b"body")
        else:
            client.send(frame(HEADERS, END_HEADERS | END_STREAM | PRIORITIZED, stream, struct.pack("!IB", stream, 15) + block(head())))
        client.until(lambda: client.answer_of(stream).over or client.end, "an answer or an error")
        answer = client.answer_of(stream)
        assert answer.status == 200 or answer.reset == PROTOCOL_ERROR or PROTOCOL_ERROR in [each.error_code for each in client.gone]


# -- 6.5 SETTINGS


def test_settings_are_acknowledged(h2: Subject) -> None:
    with h2.client() as client:
        before = client.acked
        client.send(settings((MAX_STREAMS, 7)), settings(), settings((0x1234, 5), (INITIAL_WINDOW, 70000)))
        client.until(lambda: client.acked == before + 3, "three ACKs")
        client.works()


WRONG_VALUES = {
    "ENABLE_PUSH 2": ((ENABLE_PUSH, 2), PROTOCOL_ERROR),
    "INITIAL_WINDOW_SIZE 2^31": ((INITIAL_WINDOW, 2**31), FLOW_CONTROL_ERROR),
    "MAX_FRAME_SIZE 16383": ((MAX_FRAME, 16383), PROTOCOL_ERROR),
    "MAX_FRAME_SIZE 0": ((MAX_FRAME, 0), PROTOCOL_ERROR),
    "MAX_FRAME_SIZE 1": ((MAX_FRAME, 1), PROTOCOL_ERROR),
    "MAX_FRAME_SIZE 2^24": ((MAX_FRAME, 2**24), PROTOCOL_ERROR),
    "ENABLE_CONNECT_PROTOCOL 2": ((8, 2), PROTOCOL_ERROR),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_a_setting_with_a_wrong_value_ends_the_connection(h2: Subject, case: str) -> None:
    pair, code = WRONG_VALUES[case]
    with h2.client() as client:
        client.send(settings(pair))
        client.dies(code)


def test_the_last_value_of_a_setting_counts(h2: Subject) -> None:
    with h2.client(credit=False) as client:
        client.send(settings((INITIAL_WINDOW, 100), (INITIAL_WINDOW, 1)))
        client.until(lambda: client.acked == 2, "the ACK")
        stream = client.open(LARGE)
        client.until(lambda: client.answer_of(stream).body, "the first byte")
        client.barrier()
        assert len(client.answer_of(stream).body) == 1


def test_largest_frame_size_and_window_are_taken(h2: Subject) -> None:
    with h2.client(offer={MAX_FRAME: 2**24 - 1, INITIAL_WINDOW: LATEST, ENABLE_PUSH: 0}) as client:
        assert len(client.ask(LARGE).body) == 100000


# -- 6.7 PING


def test_a_ping_is_answered_with_what_it_said(h2: Subject) -> None:
    with h2.client() as client:
        client.send(ping(b"\0\xffsaid\r\n"))
        client.until(lambda: client.pongs == [b"\0\xffsaid\r\n"], "the answer")


def test_the_answer_to_a_ping_is_not_answered(h2: Subject) -> None:
    with h2.client() as client:
        client.send(ping(b"unasked!", ACK))
        client.barrier()
        assert b"unasked!" not in client.pongs


# -- 6.8 GOAWAY


def test_after_a_goaway_of_the_client_its_open_streams_are_finished(h2: Subject) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False)
        client.send(goaway(0))
        client.data(stream, b"the rest")
        assert client.answer(stream).status == 200


def test_a_goaway_with_an_unknown_code_and_a_text_is_taken(h2: Subject) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False)
        client.send(goaway(0, 0xFFFFFFF0, b"a text for people"))
        client.data(stream, b"")
        assert client.answer(stream).status == 200


def test_an_unknown_code_of_a_reset_is_taken(h2: Subject) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False)
        client.send(frame(RST_STREAM, 0, stream, b"\xff\xff\xff\xf0"))
        client.works()


# -- 6.9 WINDOW_UPDATE, 5.2 flow control


def test_no_more_is_sent_than_the_streams_window_allows(h2: Subject) -> None:
    with h2.client(offer={INITIAL_WINDOW: 0}, credit=False) as client:
        stream = client.open(LARGE)
        client.headed(stream)
        client.barrier()
        answer = client.answer_of(stream)
        assert (answer.status, len(answer.body), answer.ended) == (200, 0, False)
        for increment, total in [(1, 1), (9, 10), (16384, 16394)]:
            client.send(window_update(stream, increment))
            client.until(lambda total=total: len(answer.body) >= total, f"{total} bytes")
            client.barrier()
            assert len(answer.body) == total


def test_no_more_is_sent_than_the_connections_window_allows(h2: Subject) -> None:
    with h2.client(offer={INITIAL_WINDOW: 10**6}, credit=False) as client:
        streams = [client.open(LARGE) for _ in range(3)]
        answers = [client.answer_of(stream) for stream in streams]
        client.until(lambda: sum(len(answer.body) for answer in answers) >= 65535, "the connection's window")
        client.barrier()
        assert sum(len(answer.body) for answer in answers) == 65535
        client.send(window_update(0, 10**6))
        assert [len(client.answer(stream).body) for stream in streams] == [100000] * 3


def test_a_larger_initial_window_opens_streams_that_wait(h2: Subject) -> None:
    with h2.client(offer={INITIAL_WINDOW: 0}) as client:
        stream = client.open(LARGE)
        client.headed(stream)
        client.send(settings((INITIAL_WINDOW, 200000)))
        assert len(client.answer(stream).body) == 100000


def test_a_smaller_initial_window_makes_windows_negative(h2: Subject) -> None:
    with h2.client(offer={INITIAL_WINDOW: 1000}, credit=False) as client:
        stream = client.open(LARGE)
        answer = client.answer_of(stream)
        client.until(lambda: len(answer.body) == 1000, "the window")
        client.send(settings((INITIAL_WINDOW, 0)), window_update(stream, 999))          # one byte short of nothing
        client.barrier()
        assert len(answer.body) == 1000
        client.send(window_update(stream, 2))
        client.until(lambda: len(answer.body) == 1001, "one more byte")
        client.barrier()
        assert len(answer.body) == 1001


def test_data_that_ends_a_stream_needs_no_window_when_it_is_empty(h2: Subject) -> None:
    with h2.client(offer={INITIAL_WINDOW: 0}) as client:
        answer = client.ask(head("/bytes/0"))
        assert answer.ended
        assert answer.status == 200


def test_an_increment_of_0_on_the_connection_ends_it(h2: Subject) -> None:
    with h2.client() as client:
        client.send(window_update(0, 0))
        client.dies(PROTOCOL_ERROR)


def test_an_increment_of_0_on_a_stream_ends_the_stream(h2: Subject) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False)
        client.send(window_update(stream, 0))
        ended_by(client, stream, PROTOCOL_ERROR)


def test_a_window_above_the_largest_ends_the_connection(h2: Subject) -> None:
    with h2.client() as client:
        client.send(window_update(0, LATEST), window_update(0, LATEST))
        client.dies(FLOW_CONTROL_ERROR)


def test_a_streams_window_above_the_largest_ends_the_stream(h2: Subject) -> None:
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False)
        client.send(window_update(stream, LATEST), window_update(stream, LATEST))
        ended_by(client, stream, FLOW_CONTROL_ERROR)


def test_an_initial_window_that_lifts_a_stream_above_the_largest_ends_the_connection(h2: Subject) -> None:
    with h2.client(offer={INITIAL_WINDOW: 0}) as client:
        stream = client.open(head("/", "POST"), end=False)
        client.send(window_update(stream, LATEST), settings((INITIAL_WINDOW, 1)))
        client.dies(FLOW_CONTROL_ERROR)


def test_more_than_the_servers_window_is_an_error(h2: Subject) -> None:
    """Behind it is an upstream that does not read, so that no window comes back for ever."""
    h2.only_ours()
    with h2.client() as client:
        stream = client.open(head("/two/held", "POST"), end=False)
        sent = 0
        while sent < 32 << 20 and not client.answer_of(stream).over and not client.end and not client.gone:
            client.send(frame(DATA, 0, stream, b"x" * 16384))
            sent += 16384
        client.until(lambda: client.answer_of(stream).over or client.gone or client.end, "an error")
        codes = [each.error_code for each in client.gone]
        assert FLOW_CONTROL_ERROR in (client.answer_of(stream).reset, *codes), (client.answer_of(stream), codes)


def ended_by(client: H2Client, stream: int, code: int) -> None:
    """An error of one stream; to end the connection with the same code is allowed (5.4.2 leaves it open)."""
    answer = client.answer_of(stream)
    client.until(lambda: answer.over or client.gone, "an error")
    if client.gone:
        assert client.gone[0].error_code == code
    else:
        client.refused(stream, code)


def test_frames_for_a_stream_that_was_just_reset_are_ignored(h2: Subject) -> None:
    """5.1: they may have been on their way; the windows that they use are the connection's."""
    with h2.client() as client:
        stream = client.open(head("/", "POST"), end=False)
        client.send(frame(WINDOW_UPDATE, 0, stream, b"\0\0\0\0"))
        client.send(frame(DATA, 0, stream, b"x" * 100), window_update(stream, 5), frame(RST_STREAM, 0, stream, struct.pack("!I", CANCEL)))
        client.until(lambda: client.answer_of(stream).over or client.gone, "the reset")
        if not client.gone:
            client.works()


def test_the_window_that_data_of_a_dead_stream_took_comes_back(h2: Subject) -> None:
    with h2.client() as client:
        for _ in range(40):
            stream = client.open(head("/", "POST"), end=False)
            client.send(frame(WINDOW_UPDATE, 0, stream, b"\0\0\0\0"), frame(DATA, END_STREAM, stream, b"x" * 4000))
            client.until(lambda stream=stream: client.answer_of(stream).over or client.gone, "the reset")
            client.window -= 4000
            if client.gone:
                return
        client.until(lambda: client.window > 30000, "the connection's window")
        client.works()


def test_stream_closed_is_said_only_of_streams_that_were_closed(h2: Subject) -> None:
    with h2.client() as client:
        client.works()
        client.send(frame(DATA, 0, 1, b"x"))
        client.until(lambda: client.gone or client.answer_of(1).reset is not None, "an error")
        codes = [each.error_code for each in client.gone] + [client.answer_of(1).reset]
        assert STREAM_CLOSED in codes
