"""What the supervisor sleeps in: signals, channels and timers in one poll(2), without an event loop.

Strategy: Python writes the number of every caught signal into a pipe (signal.set_wakeup_fd), so a signal is one more
readable descriptor and nothing runs between two lines of the supervisor. Timers are a heap of (time, order, function);
the interest list is rebuilt for every call, because there are a handful of children and forgetting one is the worse cost.
"""

import heapq
import os
import select
import signal
import time
from collections.abc import Callable, Iterable

from gateway.server.channel import Channel


class Timer:
    """A function to call once; cancel() makes it never happen."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        self.action = None


class Wait:
    """Owns the wake-up pipe and the timers of the process that calls it."""

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = 0
        self._old = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in signals:
            signal.signal(number, lambda *_: None)  # only a Python-level disposition reaches the pipe

    def after(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Call `action` from turn() once `seconds` of monotonic time have passed."""
        timer = Timer(action)
        self._order += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._order, timer))
        return timer

    def turn(self, channels: Iterable[Channel]) -> tuple[set[int], set[int]]:
        """Sleep until something happens; return (signals caught, descriptors of readable channels).

        Channels with output get it flushed here, and due timers run here, after the sleep.
        """
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        by_fd = {channel.fileno(): channel for channel in channels if not channel.ended}
        for fd, channel in by_fd.items():
            poll.register(fd, select.POLLIN | (select.POLLOUT if channel.pending else 0))
        ready = dict(poll.poll(self._timeout()))
        signals = set(self._drain_pipe()) if ready.pop(self._read, 0) else set()
        for fd, event in ready.items():
            if event & select.POLLOUT:
                by_fd[fd].flush()
        readable = {fd for fd, event in ready.items() if event & (select.POLLIN | select.POLLHUP | select.POLLERR)}
        return signals, readable

    def run_due(self) -> None:
        """Run the timers that are due now; one set by a timer waits for the next call."""
        now = time.monotonic()
        due = []
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        for timer in due:
            if timer.action is not None:
                timer.action()

    def _timeout(self) -> int | None:
        while self._timers and self._timers[0][2].action is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        # Rounded up: a millisecond early would turn the loop once for nothing.
        return max(0, int((self._timers[0][0] - time.monotonic()) * 1000) + 1)

    def _drain_pipe(self) -> bytes:
        try:
            return os.read(self._read, 4096)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        signal.set_wakeup_fd(self._old)
        self.forget()

    def forget(self) -> None:
        """Close the pipe in a forked child, which has no business with the parent's signals."""
        os.close(self._read)
        os.close(self._write)
