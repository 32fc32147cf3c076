"""Two sidecars between a client and a service, beside two Envoys that do the same: processor time, added latency and memory.

Strategy: client -> plain HTTP -> outbound -> mutual TLS -> inbound with authorization by identity, method and path -> origin. Rounds alternate between
the programs, and the origin by itself, so that a noisy machine wrongs nobody, and medians are told. CPU is user and system time of both processes by the
number of requests answered; latency comes from a constant rate that neither is near the end of, and what a pair adds is its latency less the
origin's own. Both processes of a pair have one core, the load and the origin another. Usage: mesh_pair.py ENVOY [-r ROUNDS] [--rate RATE] [-o FILE.json].
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.load.machine import facts
from gateway.server.process import cpu_seconds
from tests.integration.mesh_kit import Control, Sidecar, free_port

CONNECTIONS, SECONDS = 32, 5
LOAD, PROGRAM = 0, 1  # cores
NAMES = ("payments", "ledger")

OUTBOUND = """
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {admin}}}}}}}
static_resources:
  listeners:
    - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: outbound
                route_config:
                  virtual_hosts: [{{name: ledger, domains: [ledger], routes: [{{match: {{prefix: /}}, route: {{cluster: ledger, timeout: 15s}}}}]}}]
                http_filters: [{{name: router, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]
  clusters:
    - name: ledger
      connect_timeout: 2s
      load_assignment: {{cluster_name: ledger, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {to}}}}}}}}}]}}]}}
      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
          common_tls_context:
            tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}
            tls_certificates: [{{certificate_chain: {{filename: {pair}}}, private_key: {{filename: {pair}}}}}]
            validation_context:
              trusted_ca: {{filename: {ca}}}
              match_typed_subject_alt_names: [{{san_type: URI, matcher: {{exact: "spiffe://bank.test/service/ledger"}}}}]
"""

INBOUND = """
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {admin}}}}}}}
static_resources:
  listeners:
    - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
      filter_chains:
        - transport_socket:
            name: envoy.transport_sockets.tls
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
              require_client_certificate: true
              common_tls_context:
                tls_params: {{tls_minimum_protocol_version: TLSv1_3}}
                tls_certificates: [{{certificate_chain: {{filename: {pair}}}, private_key: {{filename: {pair}}}}}]
                validation_context: {{trusted_ca: {{filename: {ca}}}}}
          filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: inbound
                route_config:
                  virtual_hosts: [{{name: app, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: app, timeout: 15s}}}}]}}]
                http_filters:
                  - name: rbac
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC
                      rules:
                        action: ALLOW
                        policies:
                          rule:
                            permissions:
                              - and_rules:
                                  rules:
                                    - {{header: {{name: ":method", string_match: {{exact: GET}}}}}}
                                    - {{url_path: {{path: {{prefix: /v1}}}}}}
                            principals: [{{authenticated: {{principal_name: {{exact: "spiffe://bank.test/service/payments"}}}}}}]
                  - {{name: router, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}
  clusters:
    - name: app
      connect_timeout: 2s
      load_assignment: {{cluster_name: app, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {to}}}}}}}}}]}}]}}
"""


def origin(folder: Path) -> subprocess.Popen[bytes]:
    program = folder / "origin"
    subprocess.run(["gcc", "-O2", "-o", str(program), str(ROOT / "benchmarks/load/origin.c")], check=True)
    return subprocess.Popen([str(program), str(folder_port(folder)), '{"payment":"accepted"}'], stdout=subprocess.DEVNULL)


def folder_port(folder: Path) -> int:
    path = folder / "port"
    if not path.exists():
        path.write_text(str(free_port()))
    return int(path.read_text())


@contextmanager
def sidecars(folder: Path) -> Iterator[tuple[int, list[int]]]:
    control = Control(folder)
    control.rules = [{"name": "rule", "from": ["payments"], "to": "ledger", "methods": ["GET"], "prefix": "/v1"}]
    app = folder_port(folder)
    with Sidecar(control, "ledger", app) as ledger:
        control.services["ledger"] = {"protocol": "http", "endpoints": [{"address": f"127.0.0.1:{ledger.inbound}", "weight": 1}]}
        with Sidecar(control, "payments", app) as payments:
            yield payments.outbound, [payments.process.pid, ledger.process.pid]
    control.stop()


@contextmanager
def envoys(folder: Path, program: str) -> Iterator[tuple[int, list[int]]]:
    from tests.integration.mesh_kit import Ca

    ca = Ca()
    (folder / "ca.pem").write_text(ca.bundle)
    outbound, inbound = free_port(), free_port()
    running = []
    try:
        for name, text, port, to in (("ledger", INBOUND, inbound, folder_port(folder)), ("payments", OUTBOUND, outbound, inbound)):
            pair = ca.pair(folder, f"envoy-{name}", f"spiffe://bank.test/service/{name}")
            path = folder / f"envoy-{name}.yaml"
            path.write_text(text.format(admin=free_port(), port=port, to=to, pair=pair, ca=folder / "ca.pem"))
            running.append(subprocess.Popen(
                [program, "-c", str(path), "--concurrency", "1", "--use-dynamic-base-id", "-l", "error"], stdout=subprocess.DEVNULL,
            ))  # fmt: skip
        time.sleep(3)
        yield outbound, [process.pid for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def load(port: int, rate: int, result: Path) -> dict[str, Any]:
    """Run the load generator; return its report."""
    done = subprocess.run(
        ["taskset", "-c", str(LOAD), sys.executable, "-m", "gateway", "bench", "run", "--rate", str(rate), "--connections", str(CONNECTIONS),
         "--duration", f"{SECONDS}s", "--warmup", "1s", "-H", "Host: ledger", "--json", str(result), "--quiet", f"http://127.0.0.1:{port}/v1/payments"],
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        print("a round that the load generator itself calls invalid: the machine is too busy for its latencies", file=sys.stderr)
    return dict(json.loads(result.read_text()))


def spent(pids: list[int]) -> float:
    return sum(cpu_seconds(pid) or 0 for pid in pids)


def pss(pid: int) -> float:
    return next(int(line.split()[1]) / 1024 for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))


def answered(port: int) -> int:
    """The status of one request, which proves that the way is open."""
    done = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", "Host: ledger", f"http://127.0.0.1:{port}/v1/payments"], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("envoy", help="the program, such as build/peers/bin/envoy")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--rate", type=int, default=2500, help="requests a second (2500)")
    parser.add_argument("-o", "--output", type=Path, help="every round, with machine and commit, as JSON")
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        app = origin(folder)
        os.sched_setaffinity(app.pid, {LOAD})
        try:
            with sidecars(folder) as ours, envoys(folder, options.envoy) as theirs:
                ways: dict[str, tuple[int, list[int]]] = {"origin": (folder_port(folder), []), "crossway": ours, "envoy": theirs}
                for name, (port, pids) in ways.items():
                    for pid in pids:
                        for thread in os.listdir(f"/proc/{pid}/task"):
                            os.sched_setaffinity(int(thread), {PROGRAM})
                    if answered(port) != 200:
                        raise SystemExit(f"{name} does not answer 200")
                for _ in range(options.rounds):
                    for name, (port, pids) in ways.items():
                        rows = found.setdefault(name, {"cpu": [], "p50": [], "p99": [], "pss": []})
                        before = spent(pids)
                        report = load(port, options.rate, folder / "report.json")
                        rows["cpu"].append((spent(pids) - before) / (options.rate * (SECONDS + 1)) * 1e6)
                        for key, value in latencies(report).items():
                            rows[key].append(value)
                        rows["pss"].append(max(map(pss, pids), default=0.0))
        finally:
            app.kill()
            app.wait()
    ratios = show(found, options.rate)
    if options.output is not None:
        plan = {"rate": options.rate, "connections": CONNECTIONS, "seconds": SECONDS}
        options.output.write_text(json.dumps({**facts(), "group": "mesh-pair", "plan": plan, "rounds": found, "ratios": ratios}, indent=1) + "\n")
    return 0


def latencies(report: dict[str, Any]) -> dict[str, float]:
    """p50 and p99 in microseconds."""
    found = report["latency"]["percentiles"]
    return {"p50": float(found["p50"]["us"]), "p99": float(found["p99"]["us"])}


def show(found: dict[str, dict[str, list[float]]], rate: int) -> dict[str, float]:
    """Print the medians; return the ratios of Crossway to Envoy."""
    medians = {name: {key: statistics.median(values) for key, values in rows.items()} for name, rows in found.items()}
    print(f"{rate}/s over {CONNECTIONS} connections, both processes of a pair; medians of {len(found['origin']['p50'])} rounds; latency: what is added to the origin's own")
    bare = medians.pop("origin")
    print(f"origin     p50 {bare['p50']:6.0f} us   p99 {bare['p99']:6.0f} us")
    for row in medians.values():
        row["p50"], row["p99"] = row["p50"] - bare["p50"], row["p99"] - bare["p99"]
    for name, row in medians.items():
        print(f"{name:<10} CPU {row['cpu']:6.1f} us/request   p50 +{row['p50']:5.0f} us   p99 +{row['p99']:5.0f} us   larger PSS {row['pss']:5.1f} MiB")
    ratios = {key: round(medians["crossway"][key] / medians["envoy"][key], 3) for key in medians["envoy"]}
    print("ratio      " + "   ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    return ratios


if __name__ == "__main__":
    sys.exit(main())
