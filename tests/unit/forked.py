"""Processes of a test that share its memory: several at once, and one that dies in the middle of its work."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def fork(workers: int, work: Callable[[int], None]) -> None:
    """Run work(index) in forked processes that start together; fails if one of them fails."""
    gate_read, gate_write = os.pipe()
    pids = []
    for index in range(workers):
        pid = os.fork()
        if pid == 0:
            code = 1
            signal.alarm(60)                    # a child never outlives its test
            try:
                os.close(gate_write)
                os.read(gate_read, 1)           # returns when the parent closes its end
                work(index)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    os.close(gate_read)
    os.close(gate_write)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * workers


def killed(work: Callable[[Callable[[], None]], None]) -> None:
    """Run work(tell) in a forked process and kill it with SIGKILL some time after it has called tell()."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            work(lambda: os.write(write, b"!") and None)
        finally:
            os._exit(1)
    assert os.read(read, 1) == b"!"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read)
    os.close(write)
