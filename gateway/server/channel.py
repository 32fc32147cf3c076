"""Messages between the supervisor and its children: length-prefixed JSON and file descriptors over a socket pair.

Strategy: neither side ever blocks on the other. What does not fit into the socket waits in a queue that the owner flushes
when the socket is writable, so a stopped worker cannot hang the supervisor. A frame is 4 bytes of big-endian length and
that much JSON; descriptors (SCM_RIGHTS) ride on the first byte of the frame that announces them in its member `fds`.
"""

import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

import orjson

MAX_FRAME = 16 * 1024 * 1024  # bytes; the biggest real message is a list of problems
MAX_FDS = 253  # SCM_MAX_FD in the kernel
CHUNK = 65536
FD_SPACE = socket.CMSG_SPACE(MAX_FDS * 4)

Message = dict[str, Any]


class ChannelClosed(Exception):
    """The other side is gone, or sent something that is not a frame."""


class Channel:
    """One end of the pair; non-blocking, owned by one process."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._input = bytearray()
        self._input_fds: deque[int] = deque()
        self._output: deque[tuple[bytes, Sequence[int]]] = deque()
        self.ended = False  # receive() has raised ChannelClosed: nothing more will come

    @classmethod
    def pair(cls) -> tuple["Channel", "Channel"]:
        first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(first), cls(second)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        """Something waits for the socket to become writable."""
        return bool(self._output)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Queue a message and send what the socket takes now; the descriptors are duplicated until they left.

        Raises ValueError for more than MAX_FDS descriptors. A closed other side is noticed by receive(), not here.
        """
        if len(fds) > MAX_FDS:
            raise ValueError(f"{len(fds)} descriptors in one message; the kernel passes at most {MAX_FDS}")
        if fds:
            message = {**message, "fds": len(fds)}
        body = orjson.dumps(message)
        self._output.append((len(body).to_bytes(4, "big") + body, [os.dup(fd) for fd in fds]))
        self.flush()

    def flush(self) -> bool:
        """Send what waits; return True when nothing is left."""
        while self._output:
            data, fds = self._output[0]
            try:
                sent = socket.send_fds(self._socket, [data], list(fds)) if fds else self._socket.send(data)
            except BlockingIOError:
                return False
            except OSError:
                self._drop_output()
                return True
            for fd in fds:
                os.close(fd)
            if sent < len(data):
                self._output[0] = (data[sent:], ())
            else:
                self._output.popleft()
        return True

    def receive(self) -> list[tuple[Message, list[int]]]:
        """Return the complete messages that have arrived, each with its descriptors, which the caller now owns.

        Raises ChannelClosed once the other side is gone and everything it sent has been returned.
        """
        closed = False
        while True:
            try:
                # Not socket.recv_fds: in Python 3.11 it drops the flags, and the descriptors would be inheritable.
                data, passed, flags, _ = self._socket.recvmsg(CHUNK, FD_SPACE, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                break
            except OSError:
                closed = True
                break
            for level, kind, numbers in passed:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self._input_fds.extend(memoryview(numbers[: len(numbers) // 4 * 4]).cast("i"))
            if not data or flags & socket.MSG_CTRUNC:
                closed = True
                break
            self._input += data
        messages = self._frames()
        if closed and not messages:
            self.ended = True
            raise ChannelClosed
        return messages

    def messages(self) -> list[Message]:
        """As `receive`, for who is sent no descriptors: those that come anyway are closed."""
        received = self.receive()
        for _, fds in received:
            for fd in fds:
                os.close(fd)
        return [message for message, _ in received]

    def _frames(self) -> list[tuple[Message, list[int]]]:
        found: list[tuple[Message, list[int]]] = []
        offset = 0
        while len(self._input) - offset >= 4:
            length = int.from_bytes(self._input[offset : offset + 4], "big")
            if length > MAX_FRAME:
                self.ended = True
                raise ChannelClosed
            if len(self._input) - offset - 4 < length:
                break
            message = orjson.loads(self._input[offset + 4 : offset + 4 + length])
            count = message.pop("fds", 0)
            if count > len(self._input_fds):
                self.ended = True
                raise ChannelClosed
            found.append((message, [self._input_fds.popleft() for _ in range(count)]))
            offset += 4 + length
        del self._input[:offset]
        return found

    def _drop_output(self) -> None:
        for _, fds in self._output:
            for fd in fds:
                os.close(fd)
        self._output.clear()

    def close(self) -> None:
        self._drop_output()
        while self._input_fds:
            os.close(self._input_fds.popleft())
        self._socket.close()
