"""The demo's child processes: started by command line, told apart in their logs, ended in order, and never left behind.

Strategy: each child leads a session of its own, so that Ctrl-C reaches only the demo, and asks the kernel for SIGTERM when the demo dies, so
that even a killed demo leaves nobody. Ports are reserved by sockets that are bound and never listen: nobody else is given them, and
whoever is told one may bind it again (SO_REUSEADDR).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

HOST = "127.0.0.1"
STOP = 10.0  # seconds for a child to end before it is killed
TAIL = 12  # lines of its log that say why it ended

# Asks the kernel for SIGTERM when the demo dies (PR_SET_PDEATHSIG, kept over exec), then becomes `python -m ...`. A preexec_fn
# would run between fork and exec, where the thread that draws the progress line makes everything unsafe.
LAUNCH = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
"""


class StageError(Exception):
    """Something did not start; the message says what, with the last lines of its log."""


class Ports:
    """Ports of 127.0.0.1 that are kept free for the demo's own processes."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def take(self, preferred: int = 0) -> int:
        """Return the preferred port if nothing has it, else any free one."""
        for port in dict.fromkeys((preferred, 0)):
            held = socket.socket()
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                held.bind((HOST, port))
            except OSError:
                held.close()
                continue
            self._held.append(held)
            return int(held.getsockname()[1])
        raise StageError(f"no free port on {HOST}")

    def close(self) -> None:
        """Give them back."""
        while self._held:
            self._held.pop().close()


class Child:
    """One process and its log; it can be killed, and started again as it was."""

    def __init__(self, name: str, folder: Path, arguments: list[str], extra: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = folder / f"{name.replace(' ', '-')}.log"
        self._arguments = arguments
        # A proxy that the machine's owner uses is none of the bank's; what a service needs is in `extra`.
        outside = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        self._environment = {**outside, "PYTHONUNBUFFERED": "1", **(extra or {})}
        self._folder = folder
        self.start()

    def start(self) -> None:
        """Start it, from the main thread: the kernel's promise is bound to the thread that starts."""
        self._killed = False
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(os.getpid()), *self._arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=self._environment, cwd=self._folder,
            )  # fmt: skip

    @property
    def ended(self) -> str:
        """What to say about its end; empty while it runs, or when it was killed on purpose."""
        code = self.process.poll()
        if code is None or self._killed:
            return ""
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return f"{self.name} ended {how}\n{self.tail()}"

    def tail(self) -> str:
        """Return the last lines of its log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL:])
        return ""

    def kill(self) -> None:
        """SIGKILL, to it and whatever it started; return when it is gone."""
        self._killed = True
        self._sweep()
        self.process.wait()

    def ask(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def end(self, until: float) -> None:
        """Return when it is gone; kill what is left of it at a time of the monotonic clock."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, until - time.monotonic()))
        self.kill()

    def _sweep(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
