"""How fast an endpoint's change reaches every proxy: a real control plane, simulated proxies on real streams (mutual TLS, WebSocket).

    python benchmarks/mesh_push.py [--proxies 1000] [--services 20] [--changes 20]

Strategy: the proxies live in one process beside the control plane, on the same machine, so the figures hold the cost of receiving
too. They get their certificates straight from the authority's folder, since joining is limited on purpose. One instance of `ledger` says
that it is ill, or well again; what is measured is the time from that word to the moment when the last proxy has the message in its hands, and
to the acknowledgement of all of them. The proxies take the message and acknowledge it, and do not verify it. The control plane's CPU for
a change, without what it needs while nothing changes, is told apart: unlike the times it means the same on a busy machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop
from websockets.asyncio.client import connect

from gateway.mesh.ca import Ca
from gateway.mesh.enrol import make_request

ROOT = Path(__file__).resolve().parents[1]
OPENING = 25  # handshakes at once
PATIENCE = 30.0  # seconds
REST = 5.0  # seconds in which nothing changes


def write_file(path: Path, services: int) -> None:
    names = [f"s{number}" for number in range(services)]
    rules = "\n".join(f"    - {{name: {name}-to-ledger, from: [{name}], to: ledger}}" for name in names)
    path.write_text(
        "version: 1\ntrust_domain: bench.test\ncontrol: {bind: 127.0.0.1:0, admin: 127.0.0.1:0, state: mesh.db, ca: ca, health: off}\n"
        "services:\n  ledger: {timeout: 2s}\n" + "".join(f"  {name}: {{}}\n" for name in names) + f"authorization:\n  default: deny\n  rules:\n{rules}\n"
    )


class Proxy:
    """One stream that takes what comes and acknowledges it."""

    def __init__(self, service: str, number: int) -> None:
        self.service, self.instance = service, f"{service}-{number}"
        self.version = 0
        self.at = 0.0
        self.size = 0
        self.healthy = True

    async def open(self, url: str, context: ssl.SSLContext) -> None:
        self.socket = await connect(f"{url}/v1/stream?instance={self.instance}&version=0", ssl=context, compression=None, proxy=None, ping_interval=None)
        await self.beat()
        self.task = asyncio.create_task(self.hear())

    async def beat(self, healthy: bool = True, **more: Any) -> None:
        self.healthy = healthy
        await self.socket.send(json.dumps({"type": "heartbeat", "healthy": healthy, "draining": False, **more}))

    async def hear(self) -> None:
        async for text in self.socket:
            self.at, self.size = time.perf_counter(), len(text)
            self.version = json.loads(text)["version"]
            await self.socket.send(json.dumps({"type": "ack", "version": self.version}))


def context_for(ca: Ca, folder: Path, service: str) -> ssl.SSLContext:
    request, key = make_request(service)
    pair = folder / f"{service}.pem"
    pair.write_bytes(ca.issue(request, service, 86400).chain.encode() + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=ca.bundle)
    context.load_cert_chain(pair)
    return context


async def measure(arguments: argparse.Namespace, folder: Path, url: str, pid: int) -> dict[str, Any]:
    ca = Ca(folder / "ca", "bench.test").open(make=False)
    contexts = {name: context_for(ca, folder, name) for name in ["ledger", *(f"s{number}" for number in range(arguments.services))]}
    proxies = [Proxy(f"s{number % arguments.services}", number) for number in range(arguments.proxies)]
    room = asyncio.Semaphore(OPENING)

    async def opened(proxy: Proxy) -> None:
        async with room:
            await proxy.open(url, contexts[proxy.service])
            there.append(proxy)

    there: list[Proxy] = []
    beating = asyncio.create_task(beats(there))
    begin = time.perf_counter()
    await asyncio.gather(*map(opened, proxies))
    opening = time.perf_counter() - begin
    ledger = Proxy("ledger", 0)
    await ledger.open(url, contexts["ledger"])
    await ledger.beat(False, inbound="127.0.0.1:9000")
    there.append(ledger)
    await settle(proxies)
    idle = await resting(pid)
    results, before, start = [], cpu(pid), time.perf_counter()
    for change in range(arguments.changes):
        known = {proxy.instance: proxy.version for proxy in proxies}
        begin = time.perf_counter()
        await ledger.beat(change % 2 == 0)
        while any(proxy.version == known[proxy.instance] for proxy in proxies):
            await asyncio.sleep(0.002)
            if time.perf_counter() - begin > PATIENCE or beating.done():
                raise RuntimeError(f"only {sum(proxy.version != known[proxy.instance] for proxy in proxies)} proxies have the change")
        results.append(max(proxy.at for proxy in proxies) - begin)
        await asyncio.sleep(arguments.pause)
    spent = (cpu(pid) - before - idle * (time.perf_counter() - start)) / arguments.changes
    beating.cancel()
    results.sort()
    return {
        "proxies": len(proxies), "services": arguments.services, "changes": arguments.changes, "opened_seconds": round(opening, 2),
        "last_proxy_ms": {"median": round(statistics.median(results) * 1000, 1), "max": round(results[-1] * 1000, 1)},
        "message_bytes": proxies[0].size, "control_cpu_ms_per_change": round(spent * 1000, 1),
        "control_cpu_us_per_proxy_and_change": round(spent * 1e6 / len(proxies), 1), "control_cpu_percent_at_rest": round(idle * 100, 1), "control_rss_mib": round(rss(pid), 1),
    }  # fmt: skip


async def beats(proxies: list[Proxy]) -> None:
    """A heartbeat of each in five seconds, spread."""
    while True:
        for proxy in list(proxies):
            await proxy.beat(proxy.healthy)
            await asyncio.sleep(5 / len(proxies))
        await asyncio.sleep(0.1)


async def resting(pid: int) -> float:
    """CPU of the control plane by time while nothing changes: heartbeats, and its own looks at the state."""
    before, begin = cpu(pid), time.perf_counter()
    await asyncio.sleep(REST)
    return (cpu(pid) - before) / (time.perf_counter() - begin)


async def settle(proxies: list[Proxy]) -> None:
    """Wait until nothing has come for a second."""
    while not all(proxy.version for proxy in proxies) or time.perf_counter() - max(proxy.at for proxy in proxies) < 1:
        await asyncio.sleep(0.1)


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--proxies", type=int, default=1000)
    parser.add_argument("--services", type=int, default=20, help="that the proxies belong to")
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two changes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_file(folder / "mesh.yaml", arguments.services)
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "mesh", "control", "-c", str(folder / "mesh.yaml"), "--log-level", "warning"],
                stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline().split()
            if len(line) != 2:
                print((folder / "log").read_text(), file=sys.stderr)
                return 1
            url = line[1].replace("https://", "wss://")
            print(json.dumps(uvloop.run(measure(arguments, folder, url, process.pid)), indent=2))
        finally:
            process.terminate()
            process.wait(20)
    return 0


if __name__ == "__main__":
    sys.exit(main())
