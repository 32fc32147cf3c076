"""Noise over HTTP/2: sound conversations of which a few bytes, frames or flags are changed at random, by seed.

Nothing is expected of the answers; the worker has to live, hold nothing afterwards, and serve others meanwhile.
"""

from __future__ import annotations

import contextlib
import random

import pytest

from tests.integration.faults import Cut, ScriptedOrigin, Stream
from tests.integration.h2_kit import (
    PREFACE,
    H2Client,
    dial,
    frame,
    goaway,
    head,
    headers,
    literal,
    ping,
    priority,
    rst,
    settings,
    window_update,
)
from tests.integration.h2_subject import Subject

CONVERSATIONS = 150


def sound(chance: random.Random) -> list[bytes]:
    """Frames that a client might send."""
    out = [settings((4, chance.choice([0, 1, 65535, 2**31 - 1])))]
    for stream in range(1, chance.choice([3, 9, 41]), 2):
        path = chance.choice(["/echo", "/two/echo", "/bytes/100000", "/two/bytes/100000", "/held", "/two/held"])
        body = chance.random() < 0.5
        out.append(headers(stream, head(path, "POST" if body else "GET", ("x", "y" * chance.randrange(200))), end=not body, split=chance.choice([16384, 20])))
        if body:
            out += [frame(0, 0, stream, b"x" * chance.randrange(3000)) for _ in range(chance.randrange(4))]
            out.append(chance.choice([frame(0, 1, stream), headers(stream, [("x-trailer", "y")])]))
        extra = [rst(stream), window_update(stream, chance.randrange(1, 2**31)), window_update(0, chance.randrange(1, 1000)), ping(), priority(stream), settings((1, chance.randrange(5000)))]
        out += chance.sample(extra, chance.randrange(3))
    if chance.random() < 0.2:
        out.append(goaway(0))
    return out


def disturbed(frames: list[bytes], chance: random.Random) -> bytes:
    """The same, with one to three disturbances."""
    frames = list(frames)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(frames))
        piece = bytearray(frames[at])
        if len(piece) < 9:
            continue                                    # cut already
        match chance.randrange(8):
            case 0:
                piece[chance.randrange(len(piece))] ^= 1 << chance.randrange(8)
            case 1:
                piece[3] = chance.randrange(12)                                 # the type
            case 2:
                piece[4] = chance.randrange(256)                                # the flags
            case 3:
                piece[8] = chance.randrange(50)                                 # the stream
            case 4:
                piece = piece[: chance.randrange(len(piece))]
            case 5:
                frames.insert(chance.randrange(len(frames)), bytes(piece))      # twice
            case 6:
                other = chance.randrange(len(frames))
                frames[at], frames[other] = frames[other], frames[at]
                continue
            case 7:
                piece[9:9] = chance.choice([literal("te", "gzip"), b"\x80", chance.randbytes(20)])
        frames[at] = bytes(piece)
    return b"".join(frames)


@pytest.mark.parametrize("seed", range(4))
def test_noise_of_clients_hurts_nobody(h2: Subject, seed: int) -> None:
    chance = random.Random(seed)
    with h2.client() as other:
        for _ in range(CONVERSATIONS):
            data = PREFACE + disturbed(sound(chance), chance)
            client = H2Client(dial(h2.watched.port(chance.choice(["two", "tight"]))), start=False)
            at = 0
            while at < len(data):
                size = chance.choice([1, 9, 100, 16384, 1 << 20])
                client.send(data[at : at + size])
                at += size
            with contextlib.suppress(Exception):                                # what comes back may be anything by now
                client.sock.settimeout(0.005)
                client._receive()
            chance.choice([client.close, client.abort])()
            if chance.random() < 0.1:
                assert other.ask(head("/two/bytes/1000")).status == 200
        assert other.ask(head("/bytes/1000")).status == 200
    h2.origin.failures.clear()                          # a request that was cut short is none of the origin's


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_upstreams_hurts_nobody(h2: Subject, seed: int) -> None:
    chance = random.Random(100 + seed)
    ok = [(":status", "200"), ("x", "y")]

    def script(origin: ScriptedOrigin, stream: Stream) -> None:
        stream.exactly(24)
        number = 1
        out = [settings()]
        for _ in range(chance.randrange(1, 6)):
            out.append(headers(number, ok, end=False, split=chance.choice([16384, 5])))
            out += [frame(0, 0, number, b"z" * chance.randrange(5000)) for _ in range(chance.randrange(3))]
            out.append(chance.choice([frame(0, 1, number), headers(number, [("x-trailer", "y")]), rst(number), goaway(number), ping()]))
            number += 2
        stream.send(disturbed(out, chance))
        stream.sock.settimeout(0.02)
        with contextlib.suppress(Cut, OSError):
            while stream.sock.recv(65536):
                pass

    h2.raw.script = script
    with h2.client() as client:
        for _ in range(40):
            streams = [client.open(head("/raw/x", chance.choice(["GET", "POST"]))) for _ in range(chance.randrange(1, 5))]
            for stream in streams:
                answer = client.answer(stream)
                assert answer.status or answer.reset is not None
            if client.gone:
                break
        assert client.ask(head("/two/bytes/1000")).status == 200
