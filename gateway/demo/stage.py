"""What the demo starts and ends: the bank, a configuration in a temporary folder, and the gateway on it.

Strategy: the gateway is started by its own command line, as a person would. Both children lead sessions of their own, so that
Ctrl-C reaches only the demo, which ends them in order; should the demo be killed, the kernel tells the gateway and the end of
its standard input tells the bank.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from gateway.demo.caller import Answer, Call, Caller
from gateway.demo.files import BURST, CEILING, CONFIGURATION, POLICY, RATE
from gateway.demo.issuer import AUDIENCE, ISSUER

START = 30.0  # seconds for a child to be ready
STOP = 10.0  # seconds for a child to end before it is killed
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Asks the kernel for SIGTERM when the demo dies (PR_SET_PDEATHSIG, kept over exec), then becomes `python -m ...`. A preexec_fn
# would run between fork and exec, where the thread that draws the progress line makes everything unsafe.
LAUNCH = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])
"""


class StageError(Exception):
    """Something did not start; the message says what, with the last lines of its log."""


def free_port(preferred: int = 0) -> int:
    """Return the preferred port of 127.0.0.1 if nothing has it, else any free one."""
    for port in dict.fromkeys((preferred, 0)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as sock:
            number: int = sock.getsockname()[1]
            return number
    raise StageError("no free port on 127.0.0.1")


class Stage:
    """The running bank and gateway. A context manager; `once` takes any free ports instead of the well-known ones."""

    def __init__(self, once: bool = False) -> None:
        self._once = once
        self._children: list[subprocess.Popen[bytes]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="crossway-demo-"))
        self.file = self.folder / "edge.yaml"
        self.log = self.folder / "gateway.log"
        self.ports: dict[str, int] = {}
        self.admin = 0
        self.public = 0

    def __enter__(self) -> Self:
        try:
            self._start_bank()
            self._start_gateway()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- asking ---

    def caller(self) -> Caller:
        """Return a client of the gateway."""
        return Caller(self.public, "api.bank.test")

    def token(self, client: str, scopes: list[str], algorithm: str = "RS256", lifetime: int = 3600) -> str:
        """Ask the issuer for a token; a negative lifetime, in seconds, gives one that has already expired."""
        order = {"client": client, "scopes": scopes, "algorithm": algorithm, "lifetime": lifetime}
        answer = self._ask(self.ports["auth"], Call("POST", "/token", body=json.dumps(order).encode()))
        return str(answer.json()["access_token"])

    def reached(self) -> int:
        """Return how many requests have reached the bank's services so far."""
        return int(self._ask(self.ports["auth"], Call("GET", "/reached")).json()["reached"])

    def ended(self, seconds: float) -> str:
        """Wait up to so many seconds for a child to end; return what to say about it, empty while all run."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._children[-1].wait(seconds)
        for name, child in zip(("bank", "gateway"), self._children, strict=False):
            if child.poll() is not None:
                return f"the {name} ended with status {child.returncode}\n{self._tail()}"
        return ""

    @staticmethod
    def _ask(port: int, call: Call) -> Answer:
        caller = Caller(port)
        try:
            return caller.call(call)
        finally:
            caller.close()

    # --- starting ---

    def _spawn(self, *arguments: str, stdin: int, stdout: int) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, *arguments],
                stdin=stdin,
                stdout=stdout,
                stderr=log,
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def _start_bank(self) -> None:
        bank = self._spawn("gateway.demo.bank", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert bank.stdout is not None
        ready, _, _ = select.select([bank.stdout], [], [], START)
        line = bank.stdout.readline() if ready else b""
        if not line:
            raise StageError(f"the bank did not start\n{self._tail()}")
        self.ports = json.loads(line)

    def _start_gateway(self) -> None:
        self.admin = free_port(0 if self._once else 9900)
        wanted = 0 if self._once else free_port(8080)
        (self.folder / "policy.py").write_text(POLICY, encoding="utf-8")
        text = CONFIGURATION.format(
            file=self.file,
            admin=self.admin,
            public=wanted,
            ports=self.ports,
            issuer=ISSUER,
            audience=AUDIENCE,
            rate=RATE,
            burst=BURST,
            ceiling=CEILING,
        )
        self.file.write_text(text, encoding="utf-8")
        child = self._spawn("gateway", "run", "-c", str(self.file), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START
        while not self._is_ready():
            if child.poll() is not None or time.monotonic() > deadline:
                raise StageError(f"the gateway did not start\n{self._tail()}")
            time.sleep(0.02)
        listeners = self._ask(self.admin, Call("GET", "/status")).json()["listeners"]
        address = next(str(each["address"]) for each in listeners if each["name"] == "public")
        self.public = int(address.rpartition(":")[2])

    def _is_ready(self) -> bool:
        try:
            return self._ask(self.admin, Call("GET", "/readyz")).status == 200
        except (OSError, http.client.HTTPException):
            return False

    def _tail(self) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
        return ""

    # --- ending ---

    def close(self) -> None:
        """End the children, the gateway first, and remove the folder; a signal meanwhile does not interrupt that."""
        before = {}
        with contextlib.suppress(ValueError):  # only the main thread may, and only there signals raise
            before = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}
        try:
            while self._children:
                self._end(self._children.pop())
            shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            for number, action in before.items():
                signal.signal(number, action)

    @staticmethod
    def _end(child: subprocess.Popen[bytes]) -> None:
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP)
        # The session's leader is gone or hangs: whatever is left of it goes now.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
