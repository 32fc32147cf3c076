"""Messages over the channel: framing, descriptors, a slow and a vanished other side."""

import os
import select

import pytest

from gateway.server.channel import MAX_FRAME, Channel, ChannelClosed


@pytest.fixture
def pair() -> tuple[Channel, Channel]:
    return Channel.pair()


def test_messages_arrive_in_order(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    for number in range(3):
        left.send({"type": "n", "number": number})
    assert [message["number"] for message, _ in right.receive()] == [0, 1, 2]
    assert right.receive() == []


def test_descriptors_arrive_with_their_message(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    read, write = os.pipe()
    left.send({"type": "plain"})
    left.send({"type": "both"}, [read, write])
    left.send({"type": "one"}, [write])
    received = right.receive()
    assert [(message["type"], len(fds)) for message, fds in received] == [("plain", 0), ("both", 2), ("one", 1)]
    copied_read, copied_write = received[1][1]
    os.write(copied_write, b"through")
    assert os.read(copied_read, 100) == b"through"
    assert not os.get_inheritable(copied_read)


def test_a_sender_never_blocks_and_a_slow_receiver_gets_everything(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    read, write = os.pipe()
    text = "x" * 100_000
    for number in range(40):
        left.send({"type": "big", "number": number, "text": text}, [write] if number % 3 == 0 else [])
    assert left.pending
    os.close(read)
    received = []
    while len(received) < 40:
        left.flush()
        received += right.receive()
    assert [message["number"] for message, _ in received] == list(range(40))
    assert [len(fds) for _, fds in received] == [number % 3 == 0 for number in range(40)]
    assert not left.pending


def test_the_last_messages_come_before_the_end(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    left.send({"type": "last"})
    left.close()
    assert [message["type"] for message, _ in right.receive()] == ["last"]
    assert not right.ended
    with pytest.raises(ChannelClosed):
        right.receive()
    assert right.ended


def test_sending_to_nobody_is_no_error(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    right.close()
    left.send({"type": "lost"})
    assert not left.pending


def test_a_frame_that_is_too_long_ends_the_channel() -> None:
    import socket

    raw, other = socket.socketpair()
    channel = Channel(other)
    raw.sendall((MAX_FRAME + 1).to_bytes(4, "big"))
    with pytest.raises(ChannelClosed):
        channel.receive()


def test_closing_gives_back_every_descriptor(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    read, write = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(400):
        left.send({"type": "big", "text": "x" * 10_000}, [read, write])
    select.select([right], [], [], 1)
    for _, fds in right.receive():
        for fd in fds:
            os.close(fd)
    left.close()
    right.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2
