"""The load generators: wrk and h2load for saturation, `crossway bench run` for latency at a fixed rate and for TLS handshakes.

Strategy: all run on the load's core, one thread each, and are believed only when not one answer was wrong. A closed loop
(wrk, h2load) shows what a request costs and how many a core can carry; latency is only taken from the open loop.
"""

import json
import os
import signal
import subprocess
import sys
import time
from math import ceil
from typing import Any

from benchmarks.load import http2
from benchmarks.load.arithmetic import InvalidRun, Latency, Load, read_bench, read_handshakes, read_wrk
from benchmarks.load.processes import Program, program
from benchmarks.load.programs import Bench
from benchmarks.load.scenarios import HERE, ROOT, STREAMED, Scenario

PATIENCE = 30.0  # seconds that a generator may take beyond its duration
RESULT = "bench-run.json"
GENERATOR = [sys.executable, "-m", "gateway", "bench", "run"]


def environment() -> dict[str, str]:
    """Return the environment in which this checkout's gateway is found."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def open_loop_missing() -> str:
    """Return why `crossway bench run` cannot be used; empty when it can."""
    done = subprocess.run([*GENERATOR, "--help"], capture_output=True, text=True, env=environment(), check=False)
    return "" if done.returncode == 0 else "this checkout has no working `crossway bench run`"


def wrk_command(bench: Bench, scenario: Scenario, port: int, seconds: int) -> list[str]:
    """Return the command that loads the program from one thread, closed loop."""
    words = [f"method={scenario.method}"]
    body = http2.body_file(bench.directory, scenario)
    if body is not None:
        words.append(f"body={body}")
    if scenario.bearer:
        words.append(f"token={bench.token}")
    if scenario.close:
        words.append("close=1")
    if scenario.routes:
        paths = bench.directory / f"{scenario.name}.paths"
        paths.write_text("\n".join(scenario.paths()) + "\n")
        words.append(f"paths={paths}")
    return [
        *(program("taskset"), "-c", str(bench.load_core), program("wrk")),
        *("-t1", f"-c{scenario.connections}", f"-d{seconds}s", "-s", str(HERE / "load.lua")),
        *(f"{scenario.scheme}://127.0.0.1:{port}{scenario.paths()[0]}", "--", *words),
    ]


def warm(bench: Bench, scenario: Scenario, port: int, seconds: float) -> None:
    """Load the program for a moment; nothing is counted. wrk and h2load know whole seconds only, and end early when interrupted."""
    made = http2.command if scenario.kind in STREAMED else wrk_command
    command = made(bench, scenario, port, ceil(seconds) + 1)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            time.sleep(seconds)
            running.send_signal(signal.SIGINT)
            running.wait(PATIENCE)
        finally:
            running.kill()


def wrk(bench: Bench, scenario: Scenario, port: int, seconds: int) -> Load:
    """Measure a closed loop; raise InvalidRun when anything but a success came back."""
    command = wrk_command(bench, scenario, port, seconds)
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + PATIENCE, check=False)
    if done.returncode:
        raise InvalidRun(f"wrk ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return read_wrk(done.stdout)


def handshakes(bench: Bench, scenario: Scenario, port: int, seconds: int) -> Load:
    """Measure a closed loop in which each request makes a TLS handshake; raise InvalidRun unless each was of the kind that is due.

    wrk resumes whatever it can and does not say how often, so `crossway bench run` is the load here.
    """
    command = [
        *(*generator(bench, scenario, port), "--rate", "max", "--duration", f"{seconds}s", "--warmup", "0s", "--no-keepalive"),
        *(["--resume"] if scenario.resumed else []),
    ]
    return read_handshakes(document_of(bench, command, seconds + PATIENCE), scenario.resumed)


def saturate(bench: Bench, scenario: Scenario, port: int, seconds: int) -> Load:
    """Measure a closed loop, with the load that can do the scenario."""
    if scenario.kind in STREAMED:
        return http2.measure(bench, scenario, port, seconds, PATIENCE)
    return (handshakes if scenario.handshakes else wrk)(bench, scenario, port, seconds)


def generator(bench: Bench, scenario: Scenario, port: int, path: str = "") -> list[str]:
    """Return the beginning of a command of `crossway bench run` on the load's core."""
    url = f"{scenario.scheme}://127.0.0.1:{port}{path or scenario.paths()[0]}"
    believed = ["--cacert", str(bench.certificates.authority)] if scenario.scheme == "https" else []
    start = [program("taskset"), "-c", str(bench.load_core), *GENERATOR, url]
    return [*start, "--connections", str(scenario.connections), "--quiet", "--json", str(bench.directory / RESULT), *believed]


def document_of(bench: Bench, command: list[str], limit: float) -> dict[str, Any]:
    """Run `crossway bench run` and return its result; raise InvalidRun when there is none."""
    found = bench.directory / RESULT
    found.unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment(), check=False)
    try:
        document: dict[str, Any] = json.loads(found.read_text())
    except (OSError, ValueError):
        said = (done.stdout + done.stderr).strip()[-1000:]
        raise InvalidRun(f"`crossway bench run` ended with status {done.returncode} and no result:\n{said}") from None
    return document


def bench_run(
    bench: Bench, scenario: Scenario, proxy: Program, port: int, rate: int, seconds: float, warm_up: float
) -> Latency:
    """Send requests at a fixed rate, open loop; raise InvalidRun when the generator says that the run is not valid.

    Parameterised routes are asked for the one in the middle: the generator repeats one request.
    """
    path = scenario.paths()[len(scenario.paths()) // 2]
    command = [
        *(*generator(bench, scenario, port, path), "--rate", str(rate), "--pid", str(proxy.pid)),
        *("--duration", f"{seconds:g}s", "--warmup", f"{warm_up:g}s", "--method", scenario.method),
    ]
    body = http2.body_file(bench.directory, scenario)
    if body is not None:
        command += ["--body", str(body), "-H", "Content-Type: application/json"]
    if scenario.bearer:
        command += ["-H", f"Authorization: Bearer {bench.token}"]
    if scenario.close:
        command.append("--no-keepalive")
    return read_bench(document_of(bench, command, seconds + warm_up + PATIENCE))
