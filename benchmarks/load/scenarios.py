"""The programs under comparison: what each runs, with which configuration, and which request it is sent.

Strategy: a configuration is a file in peers/ in which @PORT@ and its like are replaced; before any load, each program is
asked for the answer it must give, and those that guard a route for the answers they must refuse, so that a figure never
belongs to a program that did less than it claims.
"""

import hashlib
import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load.processes import Program, Unusable, free_ports, program
from benchmarks.load.tokens import AUDIENCE, ISSUER, SCOPE, Issuer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# 119 bytes, the size that every figure of this project was taken with.
ANSWER = '{"payment":"0192f3a4-7c1e-7b53-9d10-4f6a2c8e1b07","status":"accepted","amount":"1250.00","currency":"EUR","rail":"sct"}'
PAYMENT = (
    '{"debtor":"DE02120300000000202051","creditor":"FR1420041010050500013M02606","amount":"1250.00","currency":"EUR"}'
)
LIMIT = 1_000_000  # requests a second for one client: the limit is kept and checked, and never reached
PATH = "/v1/payments"


@dataclass(frozen=True)
class Scenario:
    """One program in one configuration under one request."""

    name: str
    title: str
    program: str  # crossway | haproxy | nginx | passthrough
    template: str  # a file in peers/, or the source of the byte pass-through
    guarded: bool = False  # it checks the token, limits and logs
    posts: bool = False  # wrk posts a payment with a token; else it gets the same path

    @property
    def group(self) -> str:
        """'token' for the guarded route, else 'plain': within a group everybody does the same job."""
        return "token" if self.guarded else "plain"

    @property
    def baseline(self) -> str:
        """The scenario whose figure this one is divided by in the tables."""
        return "haproxy-jwt" if self.guarded else "haproxy"


SCENARIOS = (
    Scenario("passthrough", "byte pass-through in C over epoll (the floor)", "passthrough", "passthrough.c"),
    Scenario("crossway-bare", "Crossway, bare.yaml", "crossway", "crossway-bare.yaml"),
    Scenario("haproxy", "HAProxy, plain proxy", "haproxy", "haproxy.cfg"),
    Scenario("nginx", "nginx, plain proxy with upstream keep-alive", "nginx", "nginx.conf"),
    Scenario(
        "crossway-bare-post",
        "Crossway, bare.yaml, the POST of the rows below",
        "crossway",
        "crossway-bare.yaml",
        posts=True,
    ),
    Scenario(
        "crossway-edge",
        "Crossway, edge.yaml: RS256 token, scope, limit, audit line",
        "crossway",
        "crossway-edge.yaml",
        guarded=True,
        posts=True,
    ),
    Scenario(
        "haproxy-jwt",
        "HAProxy with jwt_verify RS256, claims, stick-table limit, access log",
        "haproxy",
        "haproxy-jwt.cfg",
        guarded=True,
        posts=True,
    ),
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def fill(template: str, values: Mapping[str, object]) -> str:
    """Replace each @NAME@; raise Unusable when one has no value."""
    for name, value in values.items():
        template = template.replace(f"@{name}@", str(value))
    for word in template.split("@")[1::2]:
        if word.isupper() and word.isalpha():
            raise Unusable(f"a configuration in peers/ names @{word}@, which has no value")
    return template


def template_path(scenario: Scenario) -> Path:
    """Return the file that defines the scenario."""
    return HERE / scenario.template if scenario.program == "passthrough" else HERE / "peers" / scenario.template


def configuration_hash(path: Path) -> str:
    """Return the start of the SHA-256 of a template: the same hash, the same configuration."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Bench:
    """One invocation: a directory, keys, an origin, and the cores that things run on."""

    def __init__(self, directory: Path, proxy_core: int, load_core: int) -> None:
        self.directory = directory
        self.proxy_core = proxy_core
        self.load_core = load_core
        self.issuer = Issuer()
        self.issuer.publish(directory)
        self.token = self.issuer.token()
        self.origin_port = free_ports(1)[0]

    def origin(self) -> Program:
        """Start the origin on the load's core and return it when it listens."""
        values = {"DIRECTORY": self.directory, "ORIGIN": self.origin_port, "ANSWER": ANSWER}
        path = self.directory / "origin.conf"
        path.write_text(fill((HERE / "peers" / "origin.conf").read_text(), values))
        command = nginx_command(path, self.directory)
        started = Program("origin", command, self.load_core, self.directory)
        try:
            started.await_port(self.origin_port)
        except Unusable:
            started.stop()
            raise
        return started

    @contextmanager
    def proxy(self, scenario: Scenario, limit: int = LIMIT) -> Iterator[tuple[Program, int]]:
        """Run the scenario's program; yield it with its port when it answers. Its files are removed afterwards."""
        port, admin = free_ports(2)
        started = Program(
            scenario.name,
            self.command(scenario, port, admin, limit),
            self.proxy_core,
            self.directory,
            PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        )
        with started:
            started.await_port(port)
            self.await_answer(started, scenario, port)
            yield started, port
        for left in (self.directory / "audit.jsonl", started.log):
            left.unlink(missing_ok=True)

    def command(self, scenario: Scenario, port: int, admin: int, limit: int) -> list[str]:
        """Write the scenario's configuration and return the command that runs it."""
        if scenario.program == "passthrough":
            return [str(self.compiled_passthrough()), str(port), str(self.origin_port)]
        values = {
            "DIRECTORY": self.directory,
            "PORT": port,
            "ADMIN": admin,
            "ORIGIN": self.origin_port,
            "LIMIT": limit,
            "ISSUER": ISSUER,
            "AUDIENCE": AUDIENCE,
            "SCOPE": SCOPE,
        }
        path = self.directory / scenario.template
        path.write_text(fill(template_path(scenario).read_text(), values))
        if scenario.program == "haproxy":
            return [program("haproxy"), "-db", "-f", str(path)]
        if scenario.program == "nginx":
            return nginx_command(path, self.directory)
        return [sys.executable, "-m", "gateway", "run", "-c", str(path)]

    def compiled_passthrough(self) -> Path:
        """Compile passthrough.c once for this invocation."""
        binary = self.directory / "passthrough"
        if not binary.exists():
            source = HERE / "passthrough.c"
            built = subprocess.run(
                [program("cc"), "-O2", "-Wall", "-Wextra", "-o", str(binary), str(source)],
                capture_output=True,
                text=True,
                check=False,
            )
            if built.returncode:
                raise Unusable(f"passthrough.c does not compile:\n{built.stderr}")
        return binary

    def ask(self, scenario: Scenario, port: int, token: str | None = None) -> tuple[int, bytes]:
        """Send the scenario's request once, on a connection of its own; return the status and the body."""
        fields = {"Content-Type": "application/json"} if scenario.posts else {}
        bearer = self.token if token is None else token
        if scenario.posts and bearer:
            fields["Authorization"] = f"Bearer {bearer}"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("POST" if scenario.posts else "GET", PATH, PAYMENT if scenario.posts else None, fields)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def await_answer(self, started: Program, scenario: Scenario, port: int, seconds: float = 10.0) -> None:
        """Return when the program passes on the origin's answer: a listening socket may be older than its workers."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                status, body = self.ask(scenario, port)
            except (OSError, http.client.HTTPException) as error:
                status, body = 0, repr(error).encode()
            if (status, body) == (200, ANSWER.encode()):
                return
            if time.monotonic() > deadline:
                raise Unusable(
                    f"{scenario.name} answers {status} {body[:300]!r} instead of the origin's JSON:\n{started.tail()}"
                )
            time.sleep(0.05)

    def prove_guard(self, scenario: Scenario) -> None:
        """Raise Unusable unless the program refuses every bad token and a client over a limit of 3 a second."""
        with self.proxy(scenario) as (started, port):
            for what, token, due in self.issuer.refused():
                status, _ = self.ask(scenario, port, token)
                if status != due:
                    raise Unusable(f"{scenario.name} answers {status} to {what}; {due} is due:\n{started.tail()}")
        with self.proxy(scenario, limit=3) as (started, port):
            statuses = [self.ask(scenario, port)[0] for _ in range(12)]
            if 429 not in statuses:
                raise Unusable(f"{scenario.name} let 12 requests pass a limit of 3 a second: {statuses}")


def nginx_command(path: Path, directory: Path) -> list[str]:
    """Return the command that runs nginx in the foreground with nothing but the given configuration."""
    return [program("nginx"), "-p", str(directory), "-c", str(path), "-e", "stderr", "-g", "daemon off;"]
