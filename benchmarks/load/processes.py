"""Processes of a benchmark: started on a chosen core, read from /proc, and stopped with everything they started.

Strategy: CPU time comes from the kernel's per-process CPU clocks (nanoseconds, dead threads included), which
clock_gettime(2) reads for any process; utime and stime of /proc/PID/stat (ticks) are read beside it as a check.
"""

import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

TICK = os.sysconf("SC_CLK_TCK")
PACKAGES = {
    "wrk": "wrk",
    "h2load": "nghttp2-client",
    "nghttp": "nghttp2-client",
    "haproxy": "haproxy",
    "nginx": "nginx",
    "taskset": "util-linux",
    "cc": "build-essential",
}


class Unusable(Exception):
    """The machine or a program cannot run the benchmark; the message says what to do."""


def require_programs(names: Sequence[str]) -> None:
    """Raise Unusable with the apt line when one of the programs is not installed."""
    missing = [name for name in names if find_program(name) is None]
    if missing:
        packages = " ".join(sorted({PACKAGES[name] for name in missing}))
        raise Unusable(f"not installed: {', '.join(missing)}\n  apt-get install -y {packages}")


def find_program(name: str) -> str | None:
    """Return the path of a program; /usr/sbin counts even when a user's PATH lacks it."""
    return shutil.which(name, path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")


def program(name: str) -> str:
    """Return the path of a program that require_programs() has seen."""
    path = find_program(name)
    if path is None:
        raise Unusable(f"not installed: {name}\n  apt-get install -y {PACKAGES[name]}")
    return path


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def raise_descriptor_limit(wanted: int) -> int:
    """Raise RLIMIT_NOFILE for this process and those it starts; return what was granted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
        except (ValueError, PermissionError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def stat_fields(pid: int) -> list[str]:
    """Return /proc/PID/stat from the third field on; the second (the name) may hold spaces and parentheses."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def tree(root: int) -> list[int]:
    """Return the process id of `root` and of everything below it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                children.setdefault(int(stat_fields(int(entry))[1]), []).append(int(entry))
            except (FileNotFoundError, ProcessLookupError):
                continue
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue.extend(children.get(pid, ()))
    return found


def cpu_clocks(pids: Sequence[int]) -> dict[int, float]:
    """Return CPU seconds used by each process so far; one that has ended is left out.

    The clock id of another process is ~pid << 3 | CPUCLOCK_SCHED (2), as clock_getcpuclockid(3) makes it.
    """
    clocks: dict[int, float] = {}
    for pid in pids:
        try:
            clocks[pid] = time.clock_gettime(~pid << 3 | 2)
        except OSError:
            continue
    return clocks


def tick_clocks(pids: Sequence[int]) -> dict[int, float]:
    """Return utime + stime of each process in seconds, at the resolution of a tick; one that has ended is left out."""
    clocks: dict[int, float] = {}
    for pid in pids:
        try:
            fields = stat_fields(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        clocks[pid] = (int(fields[11]) + int(fields[12])) / TICK
    return clocks


def core_times(core: int) -> tuple[float, float]:
    """Return (busy, stolen) seconds of one core since boot."""
    for line in Path("/proc/stat").read_text().splitlines():
        words = line.split()
        if words[0] == f"cpu{core}":
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, words[1:9])
            return (user + nice + system + irq + softirq) / TICK, steal / TICK
    raise Unusable(f"core {core} does not exist; this machine has {os.cpu_count()} (--proxy-core, --load-core)")


def rollup(pid: int) -> dict[str, int]:
    """Return PSS, RSS and private memory of a process in bytes."""
    words = {
        line.split()[0].rstrip(":"): line.split()
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    }
    kib = {name: int(words[name][1]) for name in ("Pss", "Rss", "Private_Clean", "Private_Dirty")}
    return {
        "pss": kib["Pss"] * 1024,
        "rss": kib["Rss"] * 1024,
        "uss": (kib["Private_Clean"] + kib["Private_Dirty"]) * 1024,
    }


def pss(pids: Sequence[int]) -> int:
    """Return the proportional set size of some processes together, in bytes; one that has ended counts as nothing."""
    total = 0
    for pid in pids:
        try:
            total += rollup(pid)["pss"]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


class Program:
    """A program on one core, in a session of its own, with its output in a file.

    Used as a context manager: leaving it ends the whole session, politely first.
    """

    def __init__(self, name: str, command: Sequence[str], core: int, directory: Path, **environment: str) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [program("taskset"), "-c", str(core), *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=directory,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The first process of the tree: taskset replaces itself by the program."""
        return self.process.pid

    def tail(self, lines: int = 15) -> str:
        """Return the last lines of what the program printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def await_port(self, port: int, seconds: float = 20.0) -> None:
        """Return when the program accepts connections on the port; raise Unusable when it ends or takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Unusable(
                    f"{self.name} ended with status {self.process.returncode} before it listened:\n{self.tail()}"
                )
            with socket.socket() as attempt:
                attempt.settimeout(1.0)
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.02)
        raise Unusable(f"{self.name} does not listen on port {port} after {seconds:.0f} s:\n{self.tail()}")

    def stop(self, seconds: float = 5.0) -> None:
        """End the program; after `seconds` kill what is left of its session."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
