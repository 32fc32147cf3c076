"""The load of the HTTP/2 scenarios: h2load for saturation, nghttp for the one request that proves a program.

Strategy: both are of nghttp2 and speak HTTP/2 from the first byte, in clear text or with ALPN. h2load knows HTTP statuses and nothing of
gRPC, so a run also has to carry the bytes of every answer: a call that failed has none.
"""

import re
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.load.arithmetic import InvalidRun, Load, read_h2load
from benchmarks.load.certificates import SUITES
from benchmarks.load.processes import Unusable, program
from benchmarks.load.scenarios import Scenario

if TYPE_CHECKING:
    from benchmarks.load.programs import Bench

GRPC_FIELDS = ("content-type: application/grpc", "te: trailers")
STATUS = re.compile(rb"recv \(stream_id=\d+\) :status: (\d{3})")
GRPC_STATUS = re.compile(rb"recv \(stream_id=\d+\) grpc-status: (\d+)")
UNANSWERED = 0
FAILED = 500  # as what a call counts that HTTP calls a success, and gRPC does not


def body_file(directory: Path, scenario: Scenario) -> Path | None:
    """Write the request's body once and return its path; None without a body."""
    body = scenario.payload()
    if body is None:
        return None
    path = directory / f"{scenario.name}.body"
    if not path.exists():
        path.write_bytes(body)
    return path


def request_words(bench: "Bench", scenario: Scenario, port: int, path: str = "") -> list[str]:
    """Return what h2load and nghttp are told alike: the request's fields, its body, its address."""
    body = body_file(bench.directory, scenario)
    words = [word for field in (GRPC_FIELDS if scenario.kind == "grpc" else ()) for word in ("-H", field)]
    words += ["-d", str(body)] if body is not None else []
    return [*words, f"{scenario.scheme}://127.0.0.1:{port}{path or scenario.paths()[0]}"]


def ask(bench: "Bench", scenario: Scenario, port: int, path: str = "") -> tuple[int, bytes]:
    """Send the scenario's request once; return the status and the body. A gRPC call that failed has the status FAILED."""
    if scenario.scheme == "https":
        require_tls(bench, port)
    command = [program("nghttp"), "--no-verify-peer", "-t", "5", "-v", *request_words(bench, scenario, port, path)]
    said = subprocess.run(command, capture_output=True, timeout=15, check=False).stdout
    status, due = STATUS.search(said), scenario.answer()
    if status is None:
        return UNANSWERED, said[-300:]
    grpc = GRPC_STATUS.search(said)
    if scenario.kind == "grpc" and status[1] == b"200" and (grpc is None or grpc[1] != b"0"):
        return FAILED, said[-300:]
    return int(status[1]), due if due in said else said[-300:]  # the body stands among the frames


def require_tls(bench: "Bench", port: int) -> None:
    """Raise Unusable unless the program speaks TLS 1.3 with a suite of the benchmark's, and HTTP/2 in it."""
    context = bench.certificates.client()
    context.set_alpn_protocols(["h2", "http/1.1"])
    with socket.create_connection(("127.0.0.1", port), 5) as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as tls:
        spoken = (tls.version(), (tls.cipher() or ("none",))[0], tls.selected_alpn_protocol())
    if spoken[0] != "TLSv1.3" or spoken[1] not in SUITES or spoken[2] != "h2":
        raise Unusable(f"it speaks {' '.join(map(str, spoken))} instead of TLSv1.3 {SUITES[0]} h2")


def command(bench: "Bench", scenario: Scenario, port: int, seconds: int) -> list[str]:
    """Return the command that loads the program from one thread, closed loop."""
    secured = [f"--tls13-ciphers={SUITES[0]}", "--groups=X25519"] if scenario.scheme == "https" else []
    return [
        *(program("taskset"), "-c", str(bench.load_core), program("h2load"), "-t1", f"-c{scenario.connections}"),
        *(f"-m{scenario.streams}", f"-D{seconds}s", *secured, *request_words(bench, scenario, port)),
    ]


def measure(bench: "Bench", scenario: Scenario, port: int, seconds: int, patience: float) -> Load:
    """Measure a closed loop; raise InvalidRun when anything but a whole and successful answer came back."""
    done = subprocess.run(
        command(bench, scenario, port, seconds), capture_output=True, text=True, timeout=seconds + patience, check=False
    )
    if done.returncode:
        raise InvalidRun(f"h2load ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return read_h2load(done.stdout, scenario.connections * scenario.streams, len(scenario.answer()), "h2" if scenario.scheme == "https" else "h2c")
