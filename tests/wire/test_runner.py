"""The transcript runner itself: it must pass what is right and fail what is wrong, against a relay without any HTTP."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wire import runner
from tests.wire.runner import Mismatch, Play, World, listen
from tests.wire.transcript import TranscriptError, raw, read

HERE = Path(__file__).parent


class Relay(threading.Thread):
    """Copies bytes between each client and an upstream connection of its own, in one thread: the barrier needs that what came first is done first."""

    def __init__(self, upstream: tuple[str, int], barrier: tuple[str, int]) -> None:
        super().__init__(daemon=True)
        self.upstream = upstream
        self.barrier = barrier
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.ready = selectors.DefaultSelector()
        self.other: dict[socket.socket, socket.socket] = {}
        self.ended: set[socket.socket] = set()

    def run(self) -> None:
        self.ready.register(self.sock, selectors.EVENT_READ)
        while self.sock.fileno() >= 0:
            for key, _ in self.ready.select():
                source = key.fileobj
                assert isinstance(source, socket.socket)
                if source is not self.sock:
                    self._copy(source)
                elif source.fileno() >= 0:
                    self.ready.register(source.accept()[0], selectors.EVENT_READ)

    def _copy(self, source: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = source.recv(65536)
        if data and source not in self.other:
            sink = socket.create_connection(self.barrier if data.startswith(b"GET /wire-barrier") else self.upstream)
            self.other[source], self.other[sink] = sink, source
            self.ready.register(sink, selectors.EVENT_READ)
        to = self.other.get(source)
        with contextlib.suppress(OSError):
            if data and to is not None:
                to.sendall(data)
        if not data:
            self._ended(source, to)

    def _ended(self, source: socket.socket, to: socket.socket | None) -> None:
        self.ready.unregister(source)
        self.ended.add(source)
        if to is not None and to not in self.ended:
            with contextlib.suppress(OSError):
                to.shutdown(socket.SHUT_WR)
            return
        for each in (source, to):
            if each is not None:
                each.close()
                self.other.pop(each, None)
                self.ended.discard(each)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World(listen(), listen())
    relay = Relay(world.upstream.getsockname(), world.barrier_socket.getsockname())
    world.listeners["public"] = relay.sock.getsockname()
    relay.start()
    yield world
    relay.sock.close()
    world.reset()
    world.upstream.close()
    world.barrier_socket.close()


def play(world: World, folder: Path, steps: str) -> None:
    path = folder / "case.wire"
    path.write_text(f"title: a case\nrule: none\n\n{steps}", "utf-8")
    transcript = read(path)
    for row in transcript.rows:
        Play(world, transcript, row).run()


REQUEST = "  |GET / HTTP/1.1\n  |Host: gw.test\n  |A: 1\n  |B: 2\n  |\n"
ANSWER = "  |HTTP/1.1 200 OK\n  |X: 1\n  |Content-Length: 2\n  |\n  >ok\n"
EXCHANGE = f"client sends\n{REQUEST}upstream expects\n{REQUEST}upstream sends\n{ANSWER}client expects\n{ANSWER}"


def test_a_conversation_that_goes_as_written_passes(world: World, tmp_path: Path) -> None:
    play(world, tmp_path, EXCHANGE)
    play(world, tmp_path, EXCHANGE + "client half-closes\nupstream expects close\nupstream closes\nclient expects close\n")


def test_rows_are_put_in(world: World, tmp_path: Path) -> None:
    table = "for each NAME VALUE:\n  |A => 1\n  |B => \\x32\n\n"
    play(world, tmp_path, table + EXCHANGE.replace("A: 1", "<NAME>: <VALUE>"))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("upstream expects\n  |GET / ", "upstream expects\n  |GET /other ", "start line"),
        ("upstream sends\n  |HTTP/1.1 200", "upstream sends\n  |HTTP/1.1 201", "start line"),
        ("client sends\n  |GET / HTTP/1.1\n", "client sends\n  |GET / HTTP/1.1\n  |Extra: 1\n", "does not list"),
        ("client sends\n  |GET / HTTP/1.1\n  |Host: gw.test\n  |A: 1", "client sends\n  |GET / HTTP/1.1\n  |Host: gw.test\n  |A:  1", "no field line"),
        ("client sends\n  |GET / HTTP/1.1\n  |Host: gw.test\n  |A: 1\n  |B: 2", "client sends\n  |GET / HTTP/1.1\n  |Host: gw.test\n  |B: 2\n  |A: 1", "another order"),
        ("upstream sends\n  |HTTP/1.1 200 OK\n  |X: 1\n  |Content-Length: 2", "upstream sends\n  |HTTP/1.1 200 OK\n  |X: 1\n  |Content-Length: 3", "no field line|waited"),
        ("upstream sends\n  |HTTP/1.1 200 OK\n", "upstream sends\n  |HTTP/1.1 200 OK\n  |Content-Length: 2\n", "more than one framing"),
        ("upstream sends\n  |HTTP/1.1 200 OK\n  |X: 1\n", "upstream sends\n  |HTTP/1.1 200 OK\n  |X : 1\n", "not a field line"),
    ],
)  # fmt: skip
def test_any_difference_fails(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, reason: str
) -> None:
    monkeypatch.setattr(runner, "FAILURE_AFTER", 2.0)
    assert old in EXCHANGE
    with pytest.raises(Mismatch, match=reason):
        play(world, tmp_path, EXCHANGE.replace(old, new, 1))


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (EXCHANGE + "client sends\n  >more\n", "upstream 1 was sent more"),
        (EXCHANGE + "upstream sends\n  >more\nwait\n", "client 1 was sent more"),
        (EXCHANGE + "client sends\n  >GET\nwait\nupstream expects nothing\n", "got b'GET'"),
        (EXCHANGE + "client expects close\n", "waited"),
        (f"client sends\n{REQUEST}client closes\nupstream expects nothing complete\n", "a complete request arrived"),
        (f"client sends\n{REQUEST}upstream expects nothing\n", "got b'GET"),
        (f"client sends\n{REQUEST}upstream expects\n{REQUEST}upstream sends\n{ANSWER}upstream closes\nclient expects truncated\n", "complete"),
        (f"client sends\n{REQUEST}upstream expects\n{REQUEST}upstream sends\n{ANSWER}client expects refusal 200\n", "content-type"),
        (f"client sends\n{REQUEST}upstream expects\n{REQUEST}upstream sends\n{ANSWER}client expects status 400\n", "status is 200"),
    ],
)  # fmt: skip
def test_what_is_left_over_or_missing_fails(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: str, reason: str
) -> None:
    monkeypatch.setattr(runner, "FAILURE_AFTER", 2.0)
    with pytest.raises(Mismatch, match=reason):
        play(world, tmp_path, steps)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("title: x\nrule: y\nclient dances\n", "unknown step"),
        ("title: x\nrule: y\nclient sends\n", "needs a block"),
        ("title: x\nrule: y\nwait\n  |x\n", "takes no block"),
        ("title: x\nclient closes\n", "no rule"),
        ("title: x\nrule: y\n  |x\nclient closes\n", "needs a step"),
        ("title: x\nrule: y\nfor each A B:\n  |1\nclient closes\n", "1 values for 2 columns"),
        ("title: x\nrule: y\nserver closes\n", "not a step"),
    ],
)
def test_an_unreadable_file_says_where(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "bad.wire"
    path.write_text(text, "utf-8")
    with pytest.raises(TranscriptError, match=reason) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("path", sorted(HERE.rglob("*.wire")), ids=lambda path: str(path.relative_to(HERE)))
def test_every_transcript_is_readable(path: Path) -> None:
    transcript = read(path)
    assert (HERE / "configs" / f"{transcript.config}.yaml").is_file()
    assert any("expects" in step.verb for step in transcript.steps), "it expects nothing at all"
    for row in transcript.rows:
        for step in transcript.with_row(row):
            sent = raw(step.block) if step.verb == "sends" else b""
            assert not any(f"<{name}>".encode() in sent for name in transcript.columns)
