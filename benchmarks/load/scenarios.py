"""The scenarios and programs that scenarios.yaml declares, checked and typed.

Strategy: one file says what is measured; this module only reads it. A cell is one program in one scenario. It names either a
configuration in peers/ or the reason why there is none, so that an empty place in a table always explains itself.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from benchmarks.load import certificates
from benchmarks.load.processes import Unusable

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DECLARATION = HERE / "scenarios.yaml"
# 119 bytes, the size that every figure of this project was taken with.
ANSWER = '{"payment":"0192f3a4-7c1e-7b53-9d10-4f6a2c8e1b07","status":"accepted","amount":"1250.00","currency":"EUR","rail":"sct"}'
PAYMENT = (
    '{"debtor":"DE02120300000000202051","creditor":"FR1420041010050500013M02606","amount":"1250.00","currency":"EUR"}'
)
PATH = "/v1/payments"
STREAMED = ("http2", "http2-tls", "http2-upstream", "grpc")  # kinds whose clients speak HTTP/2
STREAMED_UPSTREAM = ("http2-upstream", "grpc")  # ... and whose origin does
SECURED = ("tls", "http2-tls")  # kinds whose clients speak TLS
KINDS = ("plain", "routes", "token", "tls", "tls-upstream", *STREAMED)
BEST = "best"
# Identifiers do not repeat in real traffic; HAProxy keeps the last 10,000 results of its maps (tune.pattern.cache-size).
DIFFERENT = 20_000


def message(body: bytes) -> bytes:
    """Return a gRPC message: not compressed, its length, the bytes."""
    return b"\0" + len(body).to_bytes(4, "big") + body


@dataclass(frozen=True)
class Software:
    """A program under comparison: its configuration for each kind of work, or the reason why it cannot do it."""

    name: str
    title: str
    configurations: Mapping[str, str]
    cannot: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scenario:
    """One kind of work under one kind of load; the fields are explained in scenarios.yaml."""

    name: str
    title: str
    detail: str
    kind: str
    path: str = PATH
    body: int | str | None = None
    expect: int | None = None
    routes: int = 0
    bearer: bool = False
    close: bool = False
    connections: int = 64
    streams: int = 0
    rounds: int = 3
    latency: int = 1
    only: Sequence[str] = field(default=(), hash=False)
    certificate: str = ""
    resumed: bool = False
    group: str = ""

    @property
    def scheme(self) -> str:
        """How clients speak to the program."""
        return "https" if self.kind in SECURED else "http"

    @property
    def handshakes(self) -> bool:
        """True when each request makes a TLS handshake of its own."""
        return self.kind == "tls" and self.close

    @property
    def method(self) -> str:
        """POST with a body, else GET."""
        return "GET" if self.body is None else "POST"

    def payload(self) -> bytes | None:
        """Return the request's body."""
        if self.body is None:
            return None
        body = PAYMENT.encode() if isinstance(self.body, str) else b"x" * self.body
        return message(body) if self.kind == "grpc" else body

    def answer(self) -> bytes:
        """Return the body that origin.c (or origin-http2.c) sends, and that every program must pass on."""
        if self.expect is not None:
            return b"x" * self.expect
        if self.path == "/upload":
            return b'{"bytes":%d}' % len(self.payload() or b"")
        return message(ANSWER.encode()) if self.kind == "grpc" else ANSWER.encode()

    def paths(self) -> list[str]:
        """Return what is asked for in turn: as many different paths with one parameterised route as with all of them."""
        if not self.routes:
            return [self.path]
        return [f"/v1/resource-{number % self.routes:03}/{700_000 + number}/entries" for number in range(DIFFERENT)]


@dataclass(frozen=True)
class Requirement:
    """A ratio between two cells; without `at_most` it is reported and judged by nobody."""

    of: str
    to: str
    at_most: float | None = None
    figure: str = "cpu"
    note: str = ""

    @property
    def title(self) -> str:
        """The ratio as the tables name it."""
        return ("p99 at the fixed rate: " if self.figure == "p99" else "") + f"{self.of} / {self.to}"


@dataclass(frozen=True)
class Cell:
    """One program in one scenario; `reason` is empty when it has a configuration."""

    scenario: Scenario
    software: Software

    @property
    def name(self) -> str:
        """scenario/program."""
        return f"{self.scenario.name}/{self.software.name}"

    @property
    def reason(self) -> str:
        """Why the program cannot do this; empty when it can."""
        return self.software.cannot.get(self.scenario.kind, "")

    @property
    def template(self) -> Path:
        """The file that defines the cell: a configuration in peers/, or the source of the byte pass-through."""
        name = self.software.configurations[self.scenario.kind]
        return HERE / name if name.endswith(".c") else HERE / "peers" / name


@dataclass(frozen=True)
class Catalogue:
    """Everything that scenarios.yaml declares."""

    software: Mapping[str, Software]
    scenarios: Mapping[str, Scenario]
    requirements: tuple[Requirement, ...]

    def cells(self, scenario: Scenario) -> Iterator[Cell]:
        """Yield the scenario's cells in the order of the programs."""
        for software in self.software.values():
            if not scenario.only or software.name in scenario.only:
                yield Cell(scenario, software)

    def cell(self, name: str) -> Cell:
        """Return the cell named scenario/program; raise Unusable when there is none."""
        scenario, _, program = name.partition("/")
        if scenario not in self.scenarios or program not in self.software:
            raise Unusable(f"{DECLARATION.name}: there is no cell {name!r}")
        return Cell(self.scenarios[scenario], self.software[program])


def parse(document: Mapping[str, Any]) -> Catalogue:
    """Return the catalogue of a parsed declaration; raise Unusable when it names what does not exist."""
    try:
        software = {name: Software(name, **one) for name, one in document["programs"].items()}
        scenarios = {name: Scenario(name, **one) for name, one in document["scenarios"].items()}
        requirements = tuple(Requirement(**one) for one in document["ratios"])
    except (KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"{DECLARATION.name}: {error}") from error
    catalogue = Catalogue(software, scenarios, requirements)
    for scenario in scenarios.values():
        if (scenario.kind in SECURED) != (scenario.certificate in certificates.KINDS) or scenario.group in scenarios:
            raise Unusable(f"{DECLARATION.name}: {scenario.name}: its certificate or its group cannot be")
        if (scenario.kind in STREAMED) != (scenario.streams > 0):
            raise Unusable(f"{DECLARATION.name}: {scenario.name}: its streams cannot be")
        if scenario.kind not in KINDS or not set(scenario.only) <= software.keys():
            raise Unusable(f"{DECLARATION.name}: {scenario.name} names a kind or a program that does not exist")
        for cell in catalogue.cells(scenario):
            if not cell.reason and scenario.kind not in cell.software.configurations:
                raise Unusable(f"{DECLARATION.name}: {cell.name} has neither a configuration nor a reason")
    for requirement in requirements:
        catalogue.cell(requirement.of)
        if not requirement.to.endswith("/" + BEST):
            catalogue.cell(requirement.to)
    return catalogue


def declared() -> Catalogue:
    """Return what scenarios.yaml declares."""
    try:
        return parse(YAML(typ="safe", pure=True).load(DECLARATION))
    except (OSError, YAMLError) as error:
        raise Unusable(f"{DECLARATION}: {error}") from error


def configuration_hash(path: Path) -> str:
    """Return the start of the SHA-256 of a template: the same hash, the same configuration."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
