"""Play many connections at once against a real gateway, in random segments and with random ends, and judge what comes out.

Strategy: every request carries its id in its path and in its body, every answer of the scripted upstream in its head and in
its body; so both ends can tell whose bytes they got, whatever was mutated, cut, reset, or sent early. One thread pumps all
sockets; now and then the worker is stopped for a moment, so that it finds events in orders that time alone rarely makes.
What must hold: nobody sees another's bytes; a POST arrives complete at most once, and only if its client sent all of it; a
truncated answer never looks complete; nothing waits for ever; afterwards all gauges are zero.

    python -m tests.fuzz.streams --seconds 60 [--seed N]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.run import mutate
from tests.wire.gateway_process import GatewayProcess
from tests.wire.message import Malformed, Message, read_message
from tests.wire.runner import End

PATIENCE = 12.0  # seconds until something that should have come counts as lost
ROUTES = ("reads", "names", "checks", "checks/later", "quotes", "nowhere")
ID = re.compile(rb"^/[a-z/]+/(r\d+)$")
GAUGES = ("connections", "exchanges", 'upstream_connections{state="active"}', "exchanges_parked")


class Finding(AssertionError):
    """Something that must never happen, happened."""


@dataclass
class Ask:
    """One request of one client."""

    name: str
    method: str
    body: bytes
    stream: bytes
    last: bool
    old: bool  # HTTP/1.0
    expected: bytes | None = None  # the body of the answer that the upstream gave
    whole: bool = False  # the upstream meant to send all of it
    nonsense: bool = False  # what it sent was mutated
    arrived: int = 0  # how often the request reached an upstream completely


@dataclass
class Client:
    """One connection to the gateway with what it still has to send."""

    end: End
    asks: list[Ask]
    mutated: bool
    pieces: list[bytes]
    cut: str  # how it ends: "", "reset", "half-close", "close"
    started: float
    sent_all: bool = False
    answered: int = 0
    done: bool = False


@dataclass
class Served:
    """One upstream connection: what it is answering, and what it still has to say."""

    end: End
    ask: Ask | None = None
    pieces: list[bytes] = field(default_factory=list)
    after: str = ""  # "", "close", "reset" once the pieces are out
    due: Ask | None = None  # an answer to be planned once its request is complete


def segments(data: bytes, rng: random.Random) -> list[bytes]:
    """Cut at random places; mostly into few pieces, sometimes a short stream into single bytes."""
    if rng.random() < 0.1 and len(data) < 2000:
        return [data[i : i + 1] for i in range(len(data))]
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 0, 1, 2, 5))))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)]) if a < b]


def chunks(body: bytes, rng: random.Random) -> bytes:
    """The body in chunks of random sizes, as an honest but playful sender writes them."""
    out = bytearray()
    while body:
        n = rng.choice((1, 7, 100, 5000, len(body))) if len(body) < 3000 else rng.choice((1, 4096, 20000, 65536, len(body) - 1))
        piece, body = body[:n], body[n:]
        out += b"%s%x%s\r\n%b\r\n" % (b"0" * rng.randrange(3), len(piece), rng.choice((b"", b"", b";a=b")), piece)
    return bytes(out) + b"0\r\n" + rng.choice((b"", b"X-Trailer: 1\r\n")) + b"\r\n"


class Fuzz:
    """One gateway, and rounds of conversations with it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.gateway = GatewayProcess("hooked", folder)
        self.gateway.await_line("workers ")
        self.world = self.gateway.world
        self.asks: dict[bytes, Ask] = {}
        self.served: list[Served] = []
        self.clients: list[Client] = []
        self.late = False  # a mutant's request of the round before, whose client is gone, may still come
        self.counter = 0
        self.answers = 0

    # -- what is sent --------------------------------------------------------------------------------------------------

    def ask(self, last: bool, mutated: bool) -> Ask:
        """Make up one request."""
        rng = self.rng
        self.counter += 1
        name = f"{'mutant' if mutated else 'r'}{self.counter}"
        method = rng.choice(("GET", "GET", "HEAD", "POST", "POST", "PUT"))
        old = last and rng.random() < 0.2
        smuggled = b"\r\n0\r\n\r\nGET /names/smuggled-%b HTTP/1.1\r\nHost: gw.test\r\n\r\n" % name.encode()
        body = b""
        if method in ("POST", "PUT"):
            body = b"<" + name.encode() + b">" + smuggled + b"x" * rng.choice((0, 0, 10, 500, 9000, 70000, 300000))
        head = f"{method} /{rng.choice(ROUTES)}/{name} HTTP/1.{0 if old else 1}\r\nHost: gw.test\r\n".encode()
        head += rng.choice((b"", b"Accept: */*\r\n", b"Expect: 100-continue\r\n" if body else b"", b"X-Pad: " + b"p" * 3000 + b"\r\n"))
        if last:
            head += rng.choice((b"", b"Connection: close\r\n"))
        if body and not old and rng.random() < 0.5:
            stream = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(body, rng)
        else:
            stream = head + (b"Content-Length: %d\r\n" % len(body) if body else b"") + b"\r\n" + body
        made = Ask(name, method, body, stream, last, old)
        self.asks[name.encode()] = made
        return made

    def client(self) -> Client:
        """Make up one connection: up to four requests, pipelined or not, whole or mutated, and its end."""
        rng = self.rng
        count = rng.randint(1, 4)
        mutated = rng.random() < 0.2
        asks = [self.ask(index == count - 1, mutated) for index in range(count)]
        stream = b"".join(ask.stream for ask in asks)
        if mutated:
            stream = mutate(stream, [stream], rng)
        cut = rng.choice(("", "", "", "half-close", "reset", "close"))
        if cut in ("reset", "close"):
            stream = stream[: rng.randrange(len(stream) + 1)]
        end = self.world.connect("public", f"client of {asks[0].name}")
        return Client(end, asks, mutated, segments(stream, rng), cut or ("half-close" if mutated else ""), time.monotonic())

    def answer(self, ask: Ask, served: Served) -> None:
        """Plan what the upstream says to this request, and how it ends."""
        rng = self.rng
        payload = b"[" + ask.name.encode() + b"]" + b"y" * rng.choice((0, 3, 200, 20000, 200000))
        mark = b"X-Id: " + ask.name.encode() + b"\r\n" + rng.choice((b"", b"", b"X-Refuse: 1\r\n", b"Connection: close\r\n"))
        status = rng.choice((b"200 OK", b"200 OK", b"404 Not Found", b"204 No Content", b"304 Not Modified"))
        bodiless = ask.method == "HEAD" or status[:3] in (b"204", b"304")
        before = rng.choice((b"", b"", b"", b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n" * rng.randint(1, 3), b"HTTP/1.1 100 Continue\r\n\r\n"))
        head = before + b"HTTP/1.1 " + status + b"\r\n" + mark
        framing = rng.choice(("length", "chunked", "close"))
        served.after = "close" if framing == "close" and not bodiless else rng.choice(("", "", "", "close"))
        if bodiless:
            stream = head + b"\r\n"
        elif framing == "length":
            stream = head + b"Content-Length: %d\r\n\r\n" % len(payload) + payload
        elif framing == "chunked":
            stream = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(payload, rng)
        else:
            stream = head + b"\r\n" + payload
        ask.expected, ask.whole = b"" if bodiless else payload, True
        trouble = rng.random()
        pieces = segments(stream, rng)
        if trouble < 0.12:  # cut short
            pieces = segments(stream[: rng.randrange(len(stream))], rng)
            served.after = "reset" if framing == "close" and not bodiless else rng.choice(("close", "reset"))
            ask.whole = False
        elif trouble < 0.2:  # nonsense
            pieces = segments(mutate(stream[:4000], [stream[:4000]], rng), rng)
            served.after = "close"
            ask.nonsense = True
        elif trouble < 0.28 and served.after != "close":  # more than was asked for, in the answer's own last segment
            pieces[-1] += b"HTTP/1.1 200 OK\r\nX-Id: evil\r\nContent-Length: 4\r\n\r\nevil"
        served.pieces = pieces

    # -- the upstream's side -------------------------------------------------------------------------------------------

    def hear(self, served: Served) -> None:
        """Read requests, strictly; plan an answer, now and then before the request is complete."""
        end = served.end
        while end.incoming and served.ask is None:
            message = read_message(bytes(end.incoming), response=False)
            if message is None:
                return
            ask = self._whose(message.start)
            if not message.complete:
                if self.rng.random() < 0.02:
                    served.ask = ask
                    self.answer(ask, served)
                    served.after = served.after or "close"
                return
            del end.incoming[: message.length]
            self._complete(ask, message)
            served.ask = ask
            self.answer(ask, served)

    def _whose(self, start: bytes) -> Ask:
        name = ID.search(start.split()[1])
        ask = self.asks.get(name[1]) if name else None
        if ask is not None:
            return ask
        if b"smuggled-r" in start or not (self.late or any(client.mutated for client in self.clients)):
            raise Finding(f"a request that nobody made reached the upstream: {start!r}")
        return Ask("mutant", start.split()[0].decode(), b"", b"", last=False, old=False)

    def _complete(self, ask: Ask, message: Message) -> None:
        owner = next((client for client in self.clients if any(each is ask for each in client.asks)), None)
        ask.arrived += 1
        if owner is None:
            return  # a mutant's
        if message.body != ask.body:
            raise Finding(f"the body of {ask.name} changed: {message.body[:200]!r}, {len(message.body)} of {len(ask.body)} bytes")
        if ask.arrived > 1 and ask.method in ("POST", "PUT"):
            raise Finding(f"{ask.method} {ask.name} reached an upstream {ask.arrived} times")

    def say(self, served: Served) -> None:
        """Send a piece; after the last one end the connection, or be ready for the next request."""
        end = served.end
        if served.ask is None or end.outgoing or not end.open:
            return
        if served.pieces:
            end.outgoing += served.pieces.pop(0)
            end.flush()
        if not served.pieces and not end.outgoing:
            served.ask = None
            if served.after:
                end.close(reset=served.after == "reset")

    # -- the clients' side ---------------------------------------------------------------------------------------------

    def send(self, client: Client) -> None:
        """Send a piece; after the last one end as planned."""
        end = client.end
        if client.sent_all or end.outgoing or not end.open:
            return
        if client.pieces:
            end.outgoing += client.pieces.pop(0)
            end.flush()
        elif not client.sent_all:
            client.sent_all = True
            if client.cut == "half-close":
                with contextlib.suppress(OSError):
                    end.sock.shutdown(1)
            elif client.cut:
                end.close(reset=client.cut == "reset")

    def judge(self, client: Client) -> None:
        """Take the answers that are there; each has to be the one whose turn it is."""
        end = client.end
        if client.mutated:  # where its requests begin and end is anybody's guess
            if b"evil" in end.incoming:
                raise Finding(f"the client of {client.asks[0].name} got an answer that nobody asked for")
            client.done = not end.open or end.ended
        else:
            while end.open and end.incoming and client.answered < len(client.asks):
                ask = client.asks[client.answered]
                message = self._message(client, ask)
                if message is None or not message.complete:
                    break
                self._own(ask, message)
                del end.incoming[: message.length]
                if message.status >= 200:
                    client.answered += 1
                    self.answers += 1
            client.done = not end.open or end.ended or (client.sent_all and client.answered == len(client.asks))
        if client.done and end.open:
            end.close()

    def _message(self, client: Client, ask: Ask) -> Message | None:
        end, got = client.end, bytes(client.end.incoming)
        try:
            return read_message(got, response=True, ended=end.ended, clean=end.clean, body=ask.method != "HEAD")
        except Malformed as error:
            raise Finding(f"the answer to {ask.name} ({ask.stream[:60]!r}...): {error}; {got[:300]!r}") from None

    def _own(self, ask: Ask, message: Message) -> None:
        if message.status < 200 or not message.values(b"x-id"):
            return
        name = message.values(b"x-id")[0]
        if name == b"evil":
            raise Finding(f"the client of {ask.name} got an answer that nobody asked for")
        whose = self.asks.get(name)
        if ask.nonsense:
            return
        if whose is not ask:
            raise Finding(f"the client of {ask.name} got the answer to {name!r} in its turn: {message.start!r}")
        if message.body != ask.expected or not ask.whole:
            raise Finding(f"the answer to {ask.name} changed: {message.body[:100]!r}, {len(message.body)} of {len(ask.expected or b'')}")

    # -- rounds --------------------------------------------------------------------------------------------------------

    def round(self, size: int) -> None:
        """Some clients at once, until all of them are done."""
        self.late = any(client.mutated for client in self.clients)
        self.clients = [self.client() for _ in range(size)]
        self.world.clients = {index: client.end for index, client in enumerate(self.clients)}
        while not all(client.done for client in self.clients):
            if self.rng.random() < 0.03:
                self.pause()
            self.step()
            for client in self.clients:
                if not client.done and time.monotonic() - client.started > PATIENCE:
                    raise Finding(
                        f"nothing more comes: {client.end.name}, sent all {client.sent_all}, {client.answered} of {len(client.asks)} "
                        f"answers, mutated {client.mutated}, cut {client.cut!r}, unread {bytes(client.end.incoming[:200])!r}"
                    )
        self.gateway.check_alive()

    def step(self) -> None:
        """One turn of everybody, in random order."""
        self.world.pump([served.end for served in self.served])
        self.served += [Served(end) for end in self.world.accepted]
        self.world.accepted.clear()
        turns = [*self.clients, *self.served]
        self.rng.shuffle(turns)
        for one in turns:
            if isinstance(one, Client):
                if not one.done:
                    self.send(one)
                    self.judge(one)
            elif one.end.open:
                self.hear(one)
                self.say(one)
                if one.end.ended and one.ask is None and one.end.open:
                    one.end.close()
        self.served = [served for served in self.served if served.end.open]

    def pause(self) -> None:
        """Let both ends act while the worker stands still."""
        pid = [json.loads(line)["child"] for line in self.gateway.output if '"worker started"' in line][-1]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            try:
                for _ in range(3):
                    self.step()
            finally:
                os.kill(pid, signal.SIGCONT)

    def settle(self) -> None:
        """Close every connection, those that come late as well; every gauge has to come back to zero.

        A payment whose client has left is finished all the same: where nobody took its connection, it would wait for the answer's head.
        """
        for served in self.served:
            served.end.close()
        url = next(line.split()[1] for line in self.gateway.output if line.startswith("admin ")) + "/metrics"
        deadline = time.monotonic() + PATIENCE
        while True:
            self.world.pump([])
            self.world.reset()
            text = urllib.request.urlopen(url, timeout=PATIENCE).read().decode()
            found = {name: float(re.search(rf"^crossway_{re.escape(name)} (\S+)$", text, re.MULTILINE)[1]) for name in GAUGES}  # type: ignore[index]
            if not any(found.values()):
                return
            if time.monotonic() > deadline:
                raise Finding(f"gauges do not come back to zero: {found}")
            time.sleep(0.05)


def fuzz(seconds: float, seed: int, size: int = 6) -> int:
    """Rounds until the time is up; returns how many answers were judged. Raises Finding or Malformed."""
    with tempfile.TemporaryDirectory() as folder:
        run = Fuzz(Path(folder), seed)
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                run.round(size)
            run.settle()
        except (Finding, Malformed) as error:
            raise Finding(f"seed {seed}, after {run.counter} requests: {error}\n{run.gateway.tail()}") from None
        finally:
            for served in run.served:  # a finding leaves requests without an answer, which a drain would wait for
                served.end.close()
            run.gateway.stop()
        return run.answers


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 1 after a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.streams", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers; 0: from the clock")
    options = parser.parse_args(arguments)
    seed = options.seed or time.time_ns() & 0xFFFFFFFF
    try:
        answers = fuzz(options.seconds, seed)
    except Finding as error:
        print(error, file=sys.stderr)
        return 1
    print(f"streams: {answers} answers judged, seed {seed}: nothing found", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
