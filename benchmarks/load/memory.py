"""Measure memory: an idle worker, and what 10,000 idle client connections add to it.

Strategy: the worker is the process that holds the accepted socket, found through its inode, so that nothing has to be known
about the program's processes. Sizes are PSS from /proc/PID/smaps_rollup: a page shared by n processes counts as 1/n. What
the kernel keeps for sockets is outside any process; it is reported beside it, for both ends of each connection together.

    python -m benchmarks.load.memory
    python -m benchmarks.load.memory --only nginx --connections 5000
"""

import argparse
import contextlib
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.load import machine
from benchmarks.load.arithmetic import memory_row
from benchmarks.load.processes import Program, Unusable, raise_descriptor_limit, require_programs, rollup, tree
from benchmarks.load.programs import Bench
from benchmarks.load.results import write_result
from benchmarks.load.scenarios import ANSWER, PATH, ROOT, configuration_hash, declared

PROGRAMS = ("crossway", "nginx")
PER_ADDRESS = 20_000  # connections from one source address: below the kernel's range of 28,231 ports
REQUEST = f"GET {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
SPARE_DESCRIPTORS = 200
ESTABLISHED = "01"


def kernel_bytes() -> dict[str, int]:
    """Return what the kernel holds: TCP buffers (sockstat) and slab memory (sockets, files, inodes and all else)."""
    tcp = re.search(r"^TCP:.* mem (\d+)", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    slab = re.search(r"^Slab:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if tcp is None or slab is None:
        raise Unusable("/proc/net/sockstat or /proc/meminfo lacks the lines that say what sockets cost")
    return {"tcp_buffers": int(tcp.group(1)) * os.sysconf("SC_PAGE_SIZE"), "slab": int(slab.group(1)) * 1024}


def accepted(port: int) -> dict[str, str]:
    """Return the inode of each accepted connection to the port, by the client's ADDRESS:PORT in hexadecimal.

    Inode 0 means that nobody has accepted it yet.
    """
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        # The address as well: a client's end at 127.0.0.2 may have the same port number.
        if words[1] == f"0100007F:{port:04X}" and words[3] == ESTABLISHED and words[9] != "0":
            found[words[2]] = words[9]
    return found


def holder(inode: str | None, pids: list[int]) -> int | None:
    """Return which of the processes has the socket open."""
    for pid in pids if inode else ():
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(descriptor) == f"socket:[{inode}]":
                    return pid
    return None


def find_worker(started: Program, port: int) -> int:
    """Return the process that serves connections on the port."""
    deadline = time.monotonic() + 5
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        ours = f":{connection.getsockname()[1]:04X}"
        while time.monotonic() < deadline:
            inode = next((inode for client, inode in accepted(port).items() if client.endswith(ours)), None)
            pid = holder(inode, tree(started.pid))
            if pid is not None:
                return pid
            time.sleep(0.01)
    raise Unusable(f"no process of {started.name} accepted a connection within 5 s:\n{started.tail()}")


@contextlib.contextmanager
def idle_connections(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Open connections that say nothing, from as many loopback addresses as their ports need."""
    with contextlib.ExitStack() as stack:
        opened = []
        for index in range(count):
            source = f"127.0.0.{2 + index // PER_ADDRESS}"
            opened.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), 10, (source, 0))))
        yield opened


def await_accepted(port: int, wanted: int) -> None:
    """Return when exactly that many connections to the port are accepted and open; raise Unusable when it stays otherwise."""
    deadline = time.monotonic() + 30
    while (now := len(accepted(port))) != wanted:
        if time.monotonic() > deadline:
            raise Unusable(
                f"{now} connections are open where {wanted} were expected: a limit or a timeout stopped the rest"
            )
        time.sleep(0.05)


def serve_each(connections: list[socket.socket]) -> None:
    """Send one request on each connection and read its answer, one after the other."""
    for connection in connections:
        connection.sendall(REQUEST)
        seen = b""
        while not seen.endswith(ANSWER.encode()):
            received = connection.recv(4096)
            if not received:
                raise Unusable(f"a connection was closed instead of answered; it had sent {seen[:200]!r}")
            seen += received


def warm(port: int) -> None:
    """Let code, free lists and the upstream pool reach the size they keep."""
    with idle_connections(port, 64) as some:
        for _ in range(10):
            serve_each(some)


def measure(bench: Bench, name: str, count: int) -> dict[str, object]:
    """Return the figures of one program: idle, with silent connections, with connections that were served once."""
    cell = declared().cell(f"plain/{name}")
    with bench.proxy(cell) as (started, port):
        worker = find_worker(started, port)
        idle = rollup(worker)
        others = {pid: rollup(pid)["pss"] for pid in tree(started.pid) if pid != worker}
        warm(port)
        await_accepted(port, 0)
        base, kernel = rollup(worker), kernel_bytes()
        with idle_connections(port, count) as connections:
            await_accepted(port, count)
            silent = rollup(worker)
            serve_each(connections)
            served, kernel_after = rollup(worker), kernel_bytes()
        await_accepted(port, 0)
        after = rollup(worker)
    growth = {key: kernel_after[key] - kernel[key] for key in kernel}
    return memory_row(count, idle, base, silent, served, after) | {
        "title": cell.software.title,
        "other_processes_pss": sum(others.values()),
        "kernel_growth_both_ends": growth,
    }


def show(rows: dict[str, dict[str, object]]) -> None:
    """Print one paragraph for each program."""
    for name, row in rows.items():
        print(f"{name}: idle worker {row['idle_pss_mib']} MiB PSS ({row['idle_verdict']}, at most 40)")
        print(
            f"  a silent connection {row['silent_kib']} KiB, one that was served {row['served_kib']} KiB ({row['connection_verdict']}, at most 8)"
        )
        print(f"  kernel, both ends together: {row['kernel_growth_both_ends']}")


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 measured and within the bounds, 1 Crossway is above a bound, 2 could not run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load.memory", description="Measure an idle worker and idle connections."
    )
    parser.add_argument("--connections", type=int, default=10_000, help="idle client connections (default 10000)")
    parser.add_argument(
        "--only", default=",".join(PROGRAMS), help="programs, separated by commas (default %(default)s)"
    )
    parser.add_argument(
        "--name", default="", help="name of the result file; `-memory` is added (default: date and commit)"
    )
    options = parser.parse_args(argv)
    try:
        names = [name for name in options.only.split(",") if name]
        if not set(names) <= set(PROGRAMS):
            raise Unusable(f"--only takes {', '.join(PROGRAMS)}")
        require_programs(["nginx", "taskset", "cc"])
        granted = raise_descriptor_limit(2 * options.connections)
        if granted < options.connections + SPARE_DESCRIPTORS:
            raise Unusable(
                f"{options.connections} connections need `ulimit -n {options.connections + SPARE_DESCRIPTORS}`, not {granted}"
            )
        facts = machine.facts()
        with tempfile.TemporaryDirectory(prefix="crossway-bench-") as directory:
            bench = Bench(Path(directory), proxy_core=1, load_core=0)
            with bench.origin():
                rows = {name: measure(bench, name, options.connections) for name in names}
    except Unusable as error:
        print(f"memory: {error}", file=sys.stderr)
        return 2
    show(rows)
    templates = [declared().cell(f"plain/{name}").template for name in names]
    hashes = {template.name: configuration_hash(template) for template in templates}
    result = facts | {"format": 1, "connections": options.connections, "configurations": hashes, "programs": rows}
    name = options.name or f"{str(facts['date'])[:10]}-{facts['commit']}"
    print(f"written: {write_result(name + '-memory', result).relative_to(ROOT)}")
    ours = rows.get("crossway", {})
    return int("missed" in (ours.get("idle_verdict"), ours.get("connection_verdict")))


if __name__ == "__main__":
    sys.exit(main())
