"""The life of HTTP/2 connections: idle times and deadlines, drain and reload, and the numbers that bound them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.h2_kit import (
    DATA,
    END_STREAM,
    HEADERS,
    NO_ERROR,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    H2Client,
    block,
    frame,
    head,
    headers,
    rst,
    window_update,
)
from tests.integration.h2_origin import Call
from tests.integration.h2_subject import Subject, open_subject
from tests.integration.processes import eventually

LATEST = 2**31 - 1


def lasts(client: H2Client) -> list[tuple[int, int]]:
    """Last id and code of every GOAWAY so far."""
    return [(each.last_stream_id, each.error_code) for each in client.gone]


# -- deadlines


def test_an_idle_connection_is_told_to_go(h2: Subject) -> None:
    with h2.client("brief") as client:
        assert client.ask(head("/bytes/5")).status == 200
        client.ended()
        assert lasts(client)[-1] == (1, NO_ERROR)
        assert client.end == "closed"


def test_a_connection_without_a_preface_is_given_up(h2: Subject) -> None:
    for said in (b"", b"PRI * HTTP/2.0\r\n\r\n"):
        with h2.dial("brief") as sock:
            sock.sendall(said)
            while sock.recv(4096):
                pass


def test_a_connection_without_settings_is_given_up(h2: Subject) -> None:
    with h2.client("brief", start=False) as client:
        client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        client.ended()


def test_half_a_head_is_waited_for_no_longer_than_the_head_timeout(h2: Subject) -> None:
    with h2.client("brief") as client:
        client.send(frame(HEADERS, 1, 1, block(head())))
        client.ended()
        assert not h2.origin.calls


def test_half_a_body_is_waited_for_no_longer_than_the_body_timeout(h2: Subject) -> None:
    """It costs the stream, not the connection."""
    with h2.client("brief") as client:
        stream = client.open(head("/report", "POST", ("content-length", "10")), end=False)
        client.data(stream, b"half ", end=False)
        other = 0
        answer = client.answer_of(stream)
        while not answer.over:
            assert client.ask(head("/bytes/5")).status == 200
            other += 1
            assert not threading.Event().wait(0.02)
        assert answer.status == 408 or answer.reset is not None
        assert other
        assert client.ask(head("/bytes/5")).status == 200
    assert not any(call.complete for call in h2.origin.calls if call.path == "/report")


def test_pings_keep_nothing_open_for_ever(h2: Subject) -> None:
    """A connection without streams ends by its idle time whatever else is said on it."""
    with h2.client("brief") as client:
        while not client.end and not client.gone:
            client.send(frame(6, 0, 0, b"are you?"))
            try:
                client.sock.settimeout(0.05)
                client._receive()
            except TimeoutError:
                pass
        assert client.end or client.gone


# -- numbers


def test_after_as_many_requests_as_are_allowed_a_connection_is_drained(h2: Subject) -> None:
    with h2.client("counted") as client:
        for _ in range(5):
            assert client.ask(head("/bytes/5")).status == 200
        client.ended()
        assert lasts(client)[0] == (LATEST, NO_ERROR)
        assert lasts(client)[-1][1] == NO_ERROR
        assert client.end == "closed"


def test_what_is_under_way_when_a_connection_is_full_is_finished(h2: Subject) -> None:
    with h2.client("counted") as client:
        streams = [client.open(head("/held")) for _ in range(5)]
        h2.origin.saw(5)
        client.until(lambda: client.gone, "the first GOAWAY")
        h2.origin.release()
        assert [client.answer(stream).status for stream in streams] == [200] * 5
        client.ended()
        assert client.end == "closed"


def test_streams_above_the_limit_are_refused_and_counted(h2: Subject) -> None:
    before = h2.watched.metrics()["crossway_http2_streams_refused_total"]
    with h2.client("few") as client:
        assert client.settings[3] == 4
        streams = [client.open(head("/held")) for _ in range(4)]
        h2.origin.saw(4)
        above = [client.open(head("/bytes/5")) for _ in range(3)]
        assert [client.answer(stream).reset for stream in above] == [REFUSED_STREAM] * 3
        h2.origin.release()
        assert [client.answer(stream).status for stream in streams] == [200] * 4
        assert client.ask(head("/bytes/5")).status == 200
    assert h2.watched.metrics()["crossway_http2_streams_refused_total"] == before + 3


def test_the_windows_are_those_of_the_configuration(h2: Subject) -> None:
    with h2.client("few") as client:
        assert client.settings[4] == 64 << 10
        assert client.window == 128 << 10
        stream = client.open(head("/two/held", "POST"), end=False)
        client.send(frame(0, 0, stream, b"x" * 16384) * 4)
        client.barrier()
        assert not client.answer_of(stream).over


def test_http2_is_spoken_only_where_it_is_offered(h2: Subject) -> None:
    with h2.dial("one") as sock:                        # http2: false
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        said = b""
        while piece := sock.recv(4096):
            said += piece
        assert said.startswith(b"HTTP/1.1 505")
    with h2.client("secure") as client:
        assert client.ask(head("/bytes/5", scheme="https")).status == 200
    with h2.dial("two") as sock:                        # clear: HTTP/1.1 is understood as well
        sock.sendall(b"GET /bytes/5 HTTP/1.1\r\nhost: bank.test\r\nconnection: close\r\n\r\n")
        said = b""
        while piece := sock.recv(4096):
            said += piece
        assert said.startswith(b"HTTP/1.1 200")


def test_streams_of_a_client_that_left_end_at_the_upstream(h2: Subject) -> None:
    with h2.client() as client:
        for _ in range(5):
            client.open(head("/two/held"))
            client.open(head("/held"))
        h2.origin.saw(10)
        client.abort()
        eventually(lambda: all(call.gone.is_set() for call in h2.origin.calls), "ten cancels")


def test_a_client_that_closes_politely_gets_what_it_asked_for(h2: Subject) -> None:
    """A half-closed socket is no reason to drop answers that were asked for."""
    with h2.client() as client:
        streams = [client.open(head("/held")) for _ in range(3)]
        h2.origin.saw(3)
        client.sock.shutdown(1)
        h2.origin.release()
        answers = []
        for stream in streams:
            client.until(lambda stream=stream: client.answer_of(stream).over or client.end, "an answer or the end")
            answers.append(client.answer_of(stream))
        assert all(answer.status in (0, 200) for answer in answers)


# -- drain and reload


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Subject]:
    """A gateway that the test may end."""
    with open_subject(tmp_path) as subject:
        yield subject


def test_a_drain_is_announced_in_two_steps_and_finishes_what_is_under_way(own: Subject) -> None:
    with own.client() as idle, own.client() as busy:
        assert idle.ask(head("/bytes/5")).status == 200
        streams = [busy.open(head("/held")), busy.open(head("/two/held")), busy.open(head("/two/echo", "POST"), end=False)]
        own.origin.saw(2)
        busy.data(streams[2], b"half", end=False)
        busy.until(lambda: bytes(busy.answer_of(streams[2]).body) == b"half", "the echo")
        own.watched.signal(signal.SIGTERM)
        idle.ended()
        assert lasts(idle) == [(LATEST, NO_ERROR), (1, NO_ERROR)]
        busy.until(lambda: len(busy.gone) == 2, "both GOAWAYs")
        assert lasts(busy) == [(LATEST, NO_ERROR), (streams[2], NO_ERROR)]
        late = busy.open(head("/bytes/5"))
        busy.data(streams[2], b" and half")
        own.origin.release()
        assert [busy.answer(stream).status for stream in streams] == [200] * 3
        assert bytes(busy.answer_of(streams[2]).body) == b"half and half"
        busy.ended()
        assert not busy.answer_of(late).fields
    assert own.watched.wait() == 0


def test_a_request_that_crosses_the_first_goaway_is_served(own: Subject) -> None:
    with own.client(polite=False) as client:            # its PING is not answered, so the second step waits
        assert client.ask(head("/bytes/5")).status == 200
        client.send(frame(4, 1))
        own.watched.signal(signal.SIGTERM)
        client.until(lambda: client.gone, "the first GOAWAY")
        assert lasts(client) == [(LATEST, NO_ERROR)]
        assert client.ask(head("/bytes/7")).status == 200
        client.ended()
        assert lasts(client)[-1] == (3, NO_ERROR)
    assert own.watched.wait() == 0


def test_a_request_with_a_body_that_crosses_the_last_goaway_costs_nobody_else(own: Subject) -> None:
    """Its frames are passed over, for the one who sent them could not know (RFC 9113 6.8)."""
    with own.client(polite=False) as client:            # so far away that its answer to the PING is not waited for
        streams = [client.open(head("/two/held", "POST", ("x-payment", "1"))), client.open(head("/held"))]
        own.origin.saw(2)
        own.watched.signal(signal.SIGTERM)
        client.until(lambda: len(client.gone) == 2, "both GOAWAYs")
        late = [client.open(head("/bytes/5", "POST"), end=False) for _ in range(2)]
        client.send(*(frame(DATA, 0, stream, b"pay") + window_update(stream, 1000) for stream in late))
        client.send(headers(late[0], [("x-trailer", "1")]), rst(late[1]), frame(DATA, END_STREAM, late[1], b"pay"))
        client.barrier()
        own.origin.release()
        assert [client.answer(stream).status for stream in streams] == [200] * 2
        client.ended()
        assert lasts(client) == [(LATEST, NO_ERROR), (streams[-1], NO_ERROR)]
        assert not any(client.answer_of(stream).fields for stream in late)
    assert own.watched.wait() == 0
    assert len(own.origin.calls) == 2


def test_a_connection_that_fails_behind_its_last_goaway_does_not_take_back_what_that_said(own: Subject) -> None:
    """A client may have sent elsewhere what was above it: a later GOAWAY must not claim it."""
    with own.client(polite=False) as client:
        stream = client.open(head("/held"))
        own.origin.saw()
        own.watched.signal(signal.SIGTERM)
        client.until(lambda: len(client.gone) == 2, "both GOAWAYs")
        client.open(head("/bytes/5", "POST"), end=False)
        client.send(window_update(0, 0))
        client.ended()
        assert lasts(client) == [(LATEST, NO_ERROR), (stream, NO_ERROR), (stream, PROTOCOL_ERROR)]
    assert own.watched.wait() == 0


def test_a_stream_that_never_ends_is_cut_at_the_deadline_of_the_drain(tmp_path: Path) -> None:
    with open_subject(tmp_path, drain="1s") as own, own.client() as client:
        stream = client.open(head("/held"))
        own.origin.saw()
        own.watched.signal(signal.SIGTERM)
        client.ended()
        assert not client.answer_of(stream).ended
        assert own.watched.wait() in (0, 1)


def test_a_reload_keeps_connections_and_what_is_under_way(own: Subject) -> None:
    path = own.watched.path
    with own.client() as client:
        assert client.ask(head("/bytes/5")).status == 200
        streams = [client.open(head("/held")), client.open(head("/two/held"))]
        own.origin.saw(2)
        path.write_text(path.read_text() + "  - {name: new, match: {prefix: /new}, upstream: two}\n")
        done = own.watched.command("reload")
        assert done.returncode == 0, done
        own.origin.release()
        assert [client.answer(stream).status for stream in streams] == [200] * 2
        answer = client.ask(head("/new/report"))
        assert answer.status == 200
        assert b'"version": "two"' in answer.body       # by the new route, on the old connection


def test_a_reload_that_changes_an_upstreams_version_loses_nothing(own: Subject) -> None:
    path = own.watched.path
    with own.client() as client:
        stream = client.open(head("/two/held"))
        own.origin.saw()
        before = path.read_text()
        port = own.origin.one
        line = next(line for line in before.splitlines() if line.startswith("  two: {targets"))
        path.write_text(before.replace(line, f"  two: {{targets: [127.0.0.1:{port}]}}"))
        done = own.watched.command("reload")
        assert done.returncode == 0, done
        assert b'"version": "one"' in client.ask(head("/two/report")).body
        own.origin.release()
        assert client.answer(stream).status == 200
        path.write_text(before)
        assert own.watched.command("reload").returncode == 0
        assert b'"version": "two"' in client.ask(head("/two/report")).body


def test_a_drain_with_downloads_loses_no_byte(own: Subject) -> None:
    async def script(call: Call) -> None:
        await call.head(200)
        for _ in range(20):
            await call.write(b"x" * 50_000)
        call.link.origin.seen.release()
        await call.released()
        for _ in range(20):
            await call.write(b"y" * 50_000)
        await call.finish()

    own.origin.script = script
    with own.client() as client:
        client.send(window_update(0, 1 << 24))
        streams = [client.open(head(path)) for path in ("/x", "/two/x", "/secure/x")]
        for stream in streams:
            client.until(lambda stream=stream: len(client.answer_of(stream).body) == 1_000_000, "the first half")
        own.watched.signal(signal.SIGTERM)
        client.until(lambda: len(client.gone) == 2, "both GOAWAYs")
        own.origin.release()
        assert [len(client.answer(stream).body) for stream in streams] == [2_000_000] * 3
        assert all(client.answer_of(stream).ended for stream in streams)
        client.ended()
    assert own.watched.wait() == 0


def test_a_killed_worker_costs_its_own_connections_and_the_next_one_serves(own: Subject) -> None:
    with own.client() as client:
        stream = client.open(head("/two/held"))
        own.origin.saw()
        os.kill(own.watched.pids[0], signal.SIGKILL)
        client.ended()
        assert not client.answer_of(stream).fields
    eventually(lambda: (own.watched.workers() or own.watched.pids) != own.watched.pids, "the next worker")
    with own.client() as client:
        assert client.ask(head("/two/bytes/5")).status == 200
