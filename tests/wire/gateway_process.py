"""One real gateway process for a session of transcripts.

Strategy: the scripted upstream's ports are bound before the configuration is written, so nothing in it is guessed; the
gateway binds port 0 and prints where it listens.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import psutil

from tests.wire.runner import FAILURE_AFTER, World, listen

# Where this interpreter finds the gateway: the source tree, or a sanitizer build beside it.
ROOT = Path(next(iter(find_spec("gateway").submodule_search_locations or []))).parent  # type: ignore[union-attr]
CONFIGS = Path(__file__).parent / "configs"
DEATHS = ("AddressSanitizer", "runtime error:", "Fatal Python error", "Traceback (most recent call last)")
START_AFTER = 15.0  # seconds; a sanitizer build starts slowly
TROUBLE = ("AddressSanitizer", "runtime error:", "internal error on a connection", "worker died", "Traceback")
ADDRESS = re.compile(r"(?P<name>[\w-]+) +http://(?P<host>127\.0\.0\.1):(?P<port>\d+)")

WORKER = re.compile(r'"event":"worker started".*"child":(\d+)')


class GatewayProcess:
    """A running gateway with the world of sockets around it."""

    def __init__(self, config: str, folder: Path) -> None:
        self.world = World(listen(), listen())
        text = (CONFIGS / f"{config}.yaml").read_text("utf-8")
        # A port that answers every connect with RST: bound, never listening.
        self._refusing = socket.socket()
        self._refusing.bind(("127.0.0.1", 0))
        for name, sock in (("UPSTREAM", self.world.upstream), ("BARRIER", self.world.barrier_socket), ("REFUSING", self._refusing)):
            text = text.replace(f"{name}_PORT", str(sock.getsockname()[1]))
        self.path = folder / f"{config}.yaml"
        self.path.write_text(text, "utf-8")
        for module in CONFIGS.glob("*.py"):  # Python policies are found beside the configuration
            shutil.copy(module, folder)
        self.output: list[str] = []
        self._checked = 0
        self._ready = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "run", "-c", str(self.path)],
            cwd=folder,
            # What is in PYTHONPATH stays in front: script/sanitize has its own build there.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(ROOT)])), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.world.alive = self.check_alive
        self._await_listeners(re.findall(r"^  (\w+): *\{bind:|^  (\w+):\n    bind:", text.split("upstreams:")[0], re.MULTILINE))
        self.idle = self.descriptors()
        assert self.idle, f"no worker has said that it started:\n{self.tail()}"
        self.world.leaks = self.leaks

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._ready:
                self.output.append(line)
                if match := ADDRESS.match(line):
                    self.world.listeners[match["name"]] = (match["host"], int(match["port"]))
                self._ready.notify_all()
        with self._ready:
            self.output.append("(end of output)\n")
            self._ready.notify_all()

    def _await_listeners(self, found: list[tuple[str, str]]) -> None:
        wanted = {first or second for first, second in found}
        deadline = time.monotonic() + START_AFTER
        with self._ready:
            while not wanted <= set(self.world.listeners):
                left = deadline - time.monotonic()
                if left <= 0 or self.output[-1:] == ["(end of output)\n"]:
                    self.process.kill()
                    raise RuntimeError(f"the gateway did not start; wanted listeners {wanted}:\n{self.tail()}")
                self._ready.wait(left)

    def descriptors(self) -> dict[int, int]:
        """Open descriptors of the workers, by pid."""
        workers = {int(match[1]) for line in self.output if (match := WORKER.search(line))}
        return {pid: psutil.Process(pid).num_fds() for pid in workers}

    def leaks(self) -> str:
        """Descriptors held beyond those of the idle start; raises when a worker is not the one of the start."""
        try:
            now = self.descriptors()
        except psutil.Error:
            now = {}
        if set(now) != set(self.idle):
            raise RuntimeError(f"a worker has ended: {set(self.idle)} are now {set(now)}\n{self.tail()}")
        pooled = 1  # the barrier's upstream connection
        held = sum(now.values()) - sum(self.idle.values()) - pooled
        return f"{held} descriptors more than at the start" if held > 0 else ""

    def await_line(self, part: str) -> None:
        """Return once the gateway has printed a line with `part` in it."""
        with self._ready:
            if not self._ready.wait_for(lambda: any(part in line for line in self.output), FAILURE_AFTER):
                raise RuntimeError(f"the gateway did not say {part}:\n{self.tail()}")

    def tail(self) -> str:
        """The last lines that the gateway printed."""
        return "".join(self.output[-60:])

    def check_alive(self) -> None:
        """Raise when the process that was started has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the gateway died with {self.process.returncode}:\n{self.tail()}")
        fresh, self._checked = self.output[self._checked :], len(self.output)
        if any(sign in line for line in fresh for sign in TROUBLE):  # a worker that crashed has a successor already
            raise RuntimeError(f"the gateway is in trouble:\n{self.tail()}")
        if any(sign in line for line in self.output for sign in DEATHS):
            raise RuntimeError(f"a sanitizer or a dying worker spoke up:\n{self.tail()}")

    def stop(self) -> int:
        """Drain by SIGTERM and return the exit code."""
        self.world.reset()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + FAILURE_AFTER + START_AFTER
        while (code := self.process.poll()) is None:
            if time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"the gateway does not end after SIGTERM:\n{self.tail()}")
            # It finishes what was sent: what it sends until then is not left to wait in a backlog.
            self.world.pump([])
            self.world.reset()
            time.sleep(0.01)
        self._reader.join(FAILURE_AFTER)
        for sock in (self.world.upstream, self.world.barrier_socket, self._refusing):
            sock.close()
        return code
