"""Orders of events that a transcript cannot force: the worker is stopped while both ends act, and finds it all in one batch.

Strategy: SIGSTOP, then what the client does, then what the upstream does, then SIGCONT: the worker's one epoll_wait() reports
the client first.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.wire.gateway_process import GatewayProcess
from tests.wire.message import Message, read_message
from tests.wire.runner import FAILURE_AFTER, End

HEAD = b"Host: gw.test\r\n"
EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
FINE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: gw.test\r\n\r\n"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    process = GatewayProcess("default", tmp_path_factory.mktemp("interleaving"))
    yield process
    assert process.stop() == 0, process.tail()


@pytest.fixture(autouse=True)
def cleared(gateway: GatewayProcess) -> Iterator[None]:
    yield
    gateway.world.reset()
    gateway.check_alive()


@contextmanager
def stopped(gateway: GatewayProcess) -> Iterator[None]:
    """Hold the only worker still."""
    started = [json.loads(line) for line in gateway.output if '"worker started"' in line]
    pid = started[-1]["child"]
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + FAILURE_AFTER
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, "the worker does not stop"
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def message(gateway: GatewayProcess, end: End, *, response: bool) -> Message:
    """Wait for one whole message on this end and take it."""
    found: list[Message] = []

    def complete() -> bool:
        got = read_message(bytes(end.incoming), response=response, ended=end.ended, clean=end.clean)
        if got is not None and got.complete:
            found[:] = [got]
        return bool(found)

    gateway.world.wait_for(f"a message on {end.name}", complete)
    del end.incoming[: found[0].length]
    return found[0]


def upstream(gateway: GatewayProcess, number: int) -> End:
    gateway.world.wait_for(f"upstream {number}", lambda: len(gateway.world.accepted) >= number)
    return gateway.world.accepted[number - 1]


def warmed(gateway: GatewayProcess) -> End:
    """A client whose first request left an idle upstream connection behind."""
    client = gateway.world.clients[1] = gateway.world.connect("public", "client")
    client.outgoing += b"GET /first HTTP/1.1\r\n" + HEAD + b"\r\n"
    first = upstream(gateway, 1)
    message(gateway, first, response=False)
    first.outgoing += FINE
    assert message(gateway, client, response=True).body == b"fine"
    gateway.world.barrier()
    return client


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /second HTTP/1.1\r\n" + HEAD + b"\r\n",
        b"POST /second HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\n\r\nhi",
        b"POST /second HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
    ],
    ids=["get", "post", "chunked"],
)
@pytest.mark.parametrize("leaves", [False, True], ids=["stays", "leaves"])
def test_an_unsolicited_answer_reaches_nobody(gateway: GatewayProcess, request_bytes: bytes, leaves: bool) -> None:
    client = warmed(gateway)
    first = upstream(gateway, 1)
    with stopped(gateway):
        client.sock.sendall(request_bytes)
        first.sock.sendall(EVIL)
        if leaves:
            first.close()
    second = upstream(gateway, 2)
    assert message(gateway, second, response=False).start.split()[1] == b"/second"
    second.outgoing += FINE
    answer = message(gateway, client, response=True)
    assert answer.body == b"fine"
    gateway.world.barrier()
    assert not client.incoming and not second.incoming and len(gateway.world.accepted) == 2


def test_a_reset_that_our_own_write_met_first_is_no_end_of_an_answer(gateway: GatewayProcess) -> None:
    """send() takes the error; recv() then says 0, as it does after a FIN. Only the end delimits this answer."""
    client = gateway.world.clients[1] = gateway.world.connect("public", "client")
    client.outgoing += b"POST /1 HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    first = upstream(gateway, 1)
    gateway.world.wait_for("the request", lambda: b"hello" in first.incoming)
    first.outgoing += b"HTTP/1.1 200 OK\r\n\r\nhalf of it"
    gateway.world.wait_for("half of the answer", lambda: b"half of it" in client.incoming)
    with stopped(gateway):
        client.sock.sendall(b"5\r\nworld\r\n")
        first.close(reset=True)
    gateway.world.wait_for("the end", lambda: client.ended)
    assert not client.clean
    assert b"0\r\n\r\n" not in client.incoming


@pytest.mark.parametrize(
    ("early", "late"),
    [
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" + FINE, b""),
        (FINE, b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfi", b"ne"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfine\r\n0\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfine\r\n", b"0\r\n\r\n"),
    ],
    ids=["informational", "whole", "half", "chunked", "half-chunked"],
)
def test_a_payment_whose_client_is_found_gone_by_its_answer_is_finished(gateway: GatewayProcess, early: bytes, late: bytes) -> None:
    """The answer is met first, and the write of it says that the client has left: what is behind it is taken all the same, and the connection kept."""
    client = gateway.world.clients[1] = gateway.world.connect("public", "client")
    client.outgoing += b"POST /pay HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\n\r\nhi"
    first = upstream(gateway, 1)
    assert message(gateway, first, response=False).body == b"hi"
    with stopped(gateway):
        first.sock.sendall(early)
        client.close(reset=True)
    gateway.world.clients.clear()
    first.outgoing += late
    gateway.world.barrier()
    second = gateway.world.clients[1] = gateway.world.connect("public", "client")
    second.outgoing += b"GET /next HTTP/1.1\r\n" + HEAD + b"\r\n"
    assert message(gateway, first, response=False).start.split()[1] == b"/next", "the connection carries the next one"
    first.outgoing += FINE
    assert message(gateway, second, response=True).body == b"fine"


def fill_backlog(listener: socket.socket) -> list[socket.socket]:
    """Connect to it until the kernel answers no SYN any more: what connects now waits until somebody accepts."""
    listener.listen(0)
    fillers: list[socket.socket] = []
    while len(fillers) < 20:
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
        if not select.select([], [filler], [], 0.2)[1]:
            filler.close()  # its SYN must not compete with the one that matters
            return fillers
        fillers.append(filler)
    pytest.fail("a backlog of 0 has no end")


@pytest.mark.parametrize("first_words", [EVIL, b"x", b""], ids=["answer", "noise", "end"])
def test_what_an_upstream_says_before_it_is_asked_is_no_answer(gateway: GatewayProcess, first_words: bytes) -> None:
    """The connect completes while the worker is stopped: the backlog is full until then, and its SYN is sent again after 1, 3, 7 s."""
    world = gateway.world
    fillers = fill_backlog(world.upstream)
    accepted: list[socket.socket] = []
    try:
        client = socket.create_connection(world.listeners["public"], FAILURE_AFTER)
        client.sendall(b"POST /patient HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\n\r\nhi")
        world_client = world.clients[1] = End("client", client)
        client.setblocking(False)
        probe = world.connect("public", "probe")  # answered by the gateway itself once the connect is under way
        world.clients[2] = probe
        probe.outgoing += b"BAD\r\n"
        probe.flush()
        deadline = time.monotonic() + FAILURE_AFTER
        while not probe.incoming and time.monotonic() < deadline:
            probe.receive()
        known = {filler.getsockname() for filler in fillers}
        with stopped(gateway):
            world.upstream.settimeout(2 * FAILURE_AFTER)
            while True:
                sock, address = world.upstream.accept()
                accepted.append(sock)
                if address not in known:
                    break
            if first_words:
                sock.sendall(first_words)
            else:
                sock.shutdown(socket.SHUT_WR)
        world.upstream.setblocking(False)
        world.upstream.listen(256)
        # Nothing was sent, so it may be sent to another connection, which this upstream answers.
        def others() -> list[End]:
            return [end for end in world.accepted if end.incoming]  # fillers say nothing

        world.wait_for("the request on another connection", lambda: bool(others()))
        second = others()[0]
        assert message(gateway, second, response=False).body == b"hi"
        second.outgoing += FINE
        assert message(gateway, world_client, response=True).body == b"fine"
        sock.settimeout(FAILURE_AFTER)
        with suppress(ConnectionError):  # a reset, when there were words
            assert sock.recv(100) == b""
    finally:
        world.upstream.setblocking(False)
        world.upstream.listen(256)
        for each in (*fillers, *accepted):
            each.close()
