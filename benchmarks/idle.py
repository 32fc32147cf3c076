"""What processes cost while nobody asks anything of them: processor time and wake-ups a second, of a gateway, of two sidecars, and of nginx.

Strategy: all run at once and are left alone for a while, so one busy minute of the machine meets them all. Processor time is the kernel's clock of each
process, wake-ups are its voluntary context switches: a process that sleeps has none. Twice: without any client, and with client connections that were
served once and say nothing since, as browsers and connection pools leave them. The gateway checks one endpoint's health, so that all its processes run.
Usage: idle.py [--seconds 60] [--connections 32] [-o FILE.json].
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.load import machine
from benchmarks.load.memory import idle_connections, serve_each
from benchmarks.load.processes import Program, Unusable, cpu_clocks, free_ports, require_programs, tree
from benchmarks.load.programs import Bench
from benchmarks.load.scenarios import declared
from tests.integration.mesh_kit import Control, Sidecar

SETTLE = 5.0  # seconds until what a start, or a request, leaves to be done is done
PROGRAM, LOAD = 1, 0  # cores

CONFIG = """
version: 1
workers: 1
admin: {{bind: 127.0.0.1:{admin}}}
listeners: {{public: {{bind: "127.0.0.1:{port}"}}}}
upstreams:
  origin: {{targets: [127.0.0.1:{origin}], health: {{check: {{http: {{path: /v1/payments}}}}}}}}
routes: [{{name: everything, match: {{prefix: /}}, upstream: origin}}]
"""


def wakeups(pid: int) -> int:
    """How often a process has gone to sleep so far, all its threads together."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches:"))
    return total


def rates(pids: Mapping[str, int], seconds: float) -> dict[str, dict[str, float]]:
    """Return what each process costs a second, by its name, seen for so long."""
    before = {name: (cpu_clocks([pid])[pid], wakeups(pid)) for name, pid in pids.items()}
    began = time.monotonic()
    time.sleep(seconds)
    took, rows = time.monotonic() - began, {}
    for name, pid in pids.items():
        cpu, woken = before[name]
        rows[name] = {"cpu_ms": round((cpu_clocks([pid])[pid] - cpu) * 1e3 / took, 3), "wakeups": round((wakeups(pid) - woken) / took, 2)}
    return rows


def processes(program: str, root: int) -> dict[str, int]:
    """Return the processes of a program, by what ps calls them."""
    found = {f"{program} {Path(f'/proc/{pid}/comm').read_text().strip()}": pid for pid in tree(root)}
    return dict(sorted(found.items(), key=lambda each: each[1]))


@contextmanager
def gateway(bench: Bench) -> Iterator[tuple[int, int]]:
    """Run Crossway; yield its first process and its port."""
    port, admin = free_ports(2)
    path = bench.directory / "idle.yaml"
    path.write_text(CONFIG.format(port=port, admin=admin, origin=bench.origin_port))
    with Program("crossway", [sys.executable, "-m", "gateway", "run", "-c", str(path)], PROGRAM, bench.directory, PYTHONPATH=str(ROOT)) as started:
        started.await_port(port)
        bench.await_answer(started, declared().cell("plain/crossway").scenario, port)
        yield started.pid, port


@contextmanager
def nginx(bench: Bench) -> Iterator[tuple[int, int]]:
    """Run nginx; yield its first process and its port."""
    with bench.proxy(declared().cell("plain/nginx")) as (started, port):
        yield started.pid, port


@contextmanager
def sidecars(folder: Path, app: int) -> Iterator[dict[str, int]]:
    """Run two sidecars of an app, in one mesh."""
    control = Control(folder)
    try:
        with Sidecar(control, "ledger", app) as ledger, Sidecar(control, "payments", app) as payments:
            yield {f"sidecar {each.service}": each.process.pid for each in (ledger, payments)}
    finally:
        control.stop()


def show(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    print(title)
    for name, row in rows.items():
        print(f"  {name:<28} {row['cpu_ms']:7.3f} ms CPU/s  {row['wakeups']:6.2f} wake-ups/s")


def measure(folder: Path, seconds: float, connections: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the rows without clients, and with connections that are open and silent."""
    bench = Bench(folder, proxy_core=PROGRAM, load_core=LOAD)
    with bench.origin(), gateway(bench) as ours, nginx(bench) as theirs, sidecars(folder, bench.origin_port) as beside:
        edge = processes("gateway", ours[0]) | processes("nginx", theirs[0])
        time.sleep(SETTLE)
        alone = rates(edge | beside, seconds)
        with idle_connections(ours[1], connections) as one, idle_connections(theirs[1], connections) as other:
            serve_each(one)
            serve_each(other)
            time.sleep(SETTLE)
            return {"no clients": alone, f"{connections} silent connections": rates(edge, seconds)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement (60)")
    parser.add_argument("--connections", type=int, default=32, help="that are open and silent in the second one (32)")
    parser.add_argument("-o", "--output", type=Path, help="the rows, with machine and commit, as JSON")
    options = parser.parse_args()
    try:
        require_programs(["nginx", "taskset", "cc"])
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), options.seconds, options.connections)
    except Unusable as error:
        print(f"idle: {error}", file=sys.stderr)
        return 2
    for title, rows in found.items():
        show(title, rows)
    if options.output is not None:
        options.output.write_text(json.dumps({**machine.facts(), "group": "idle", "seconds": options.seconds, "found": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
