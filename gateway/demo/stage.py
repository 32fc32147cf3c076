"""What the demo starts and ends: the bank's services and their sidecars, the control plane, and the edge, in a temporary folder.

Strategy: everything is started by its own command line, as a person would, and all at once: who needs somebody waits for him. The
stage is ready when a request that needs everybody is answered. Its end is in order, and a signal meanwhile does not interrupt it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gateway.demo.caller import Call, Caller, ask, responds
from gateway.demo.files import BURST, CEILING, EDGE, MESH, POLICY, RATE
from gateway.demo.issuer import AUDIENCE, ISSUER
from gateway.demo.member import Member, serving
from gateway.demo.processes import HOST, STOP, Child, Ports, StageError
from gateway.demo.registry import Registry

START = 90.0  # seconds for everything to be ready, on a slow machine
PAUSE = 0.05  # seconds between two looks
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHORT, USUAL = "1m", "24h"  # lives of certificates: while the demo shows a renewal, and afterwards
INSTANCES = (("payments", "payments", "v1"), ("accounts", "accounts", "v1"), ("ledger-1", "ledger", "v1"), ("ledger-2", "ledger", "v1"))

Watch = Callable[[str], None]  # told the name of each part that has become ready


class Stage:
    """The bank, once start() was called. A context manager, whose end is everything's end; `once` takes any free ports instead of the well-known ones."""

    def __init__(self, once: bool = False) -> None:
        self.watch_waiting: Callable[[], None] = lambda: None  # called at each look of a wait
        self._ports = Ports()
        self.folder = Path(tempfile.mkdtemp(prefix="crossway-demo-"))
        self.file = self.folder / "edge.yaml"
        self.registry = Registry(self.folder / "mesh.yaml")
        self.public, self.admin = self._ports.take(0 if once else 8080), self._ports.take(0 if once else 9900)
        self.auth, self.control, self.control_admin = (self._ports.take() for _ in range(3))
        self.children: list[Child] = []
        self.members = {each[0]: Member(*each, self.folder, self._ports, self.control) for each in INSTANCES}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- asking ---

    def caller(self) -> Caller:
        """Return a client of the edge."""
        return Caller(self.public, "api.bank.test")

    def token(self, client: str, scopes: list[str], algorithm: str = "RS256", lifetime: int = 3600) -> str:
        """Ask the issuer for a token; a negative lifetime, in seconds, gives one that has already expired."""
        order = {"client": client, "scopes": scopes, "algorithm": algorithm, "lifetime": lifetime}
        return str(ask(self.auth, Call("POST", "/token", body=json.dumps(order).encode())).json()["access_token"])

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the JSON lines that a child has logged so far."""
        path = self.folder / f"{name.replace(' ', '-')}.log"
        found = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                found += [said] if isinstance(said, dict) else []
        return found

    def reached(self) -> int:
        """Return how many requests have reached the services behind the edge so far, by their own logs."""
        return sum("traceparent" in line for name in ("payments", "accounts") for line in self.lines(name))

    def ended(self) -> str:
        """Return what to say about a child that has ended by itself; empty while all run."""
        return next((child.ended for child in self.children if child.ended), "")

    def until(self, condition: Callable[[], bool], what: str, seconds: float = START) -> None:
        """Wait for a condition; raise StageError when a child ends, or it takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            if ended := self.ended():
                raise StageError(ended)
            if time.monotonic() > deadline:
                raise StageError(f"{what}: not within {seconds:.0f} s")
            self.watch_waiting()
            time.sleep(PAUSE)

    # --- starting ---

    def start(self, watch: Watch = lambda _name: None) -> None:
        """Start everything; raise StageError when something does not come up."""
        self._write()
        self._start_bank()
        self._start_mesh(watch)

    def _write(self) -> None:
        (self.folder / "policy.py").write_text(POLICY, encoding="utf-8")
        self.file.write_text(
            EDGE.format(
                folder=self.folder, admin=self.admin, public=self.public, control=self.control, auth=self.auth, issuer=ISSUER,
                audience=AUDIENCE, rate=RATE, burst=BURST, ceiling=CEILING,
            ),
            encoding="utf-8",
        )  # fmt: skip
        self.registry.file.write_text(
            MESH.format(folder=self.folder, control=self.control, control_admin=self.control_admin, lifetime=SHORT), encoding="utf-8"
        )

    def surroundings(self, member: Member) -> dict[str, str]:
        """What an app is told of where it runs: the way to other services."""
        return {"http_proxy": f"http://{HOST}:{member.outbound}"}

    def _start(self, name: str, *arguments: str) -> None:
        self.children.append(Child(name, self.folder, list(arguments)))

    def _start_bank(self) -> None:
        self._start("issuer", *serving("issuer:auth", self.auth))
        for member in self.members.values():
            self.children.append(member.start_app(self.surroundings(member)))

    def _start_mesh(self, watch: Watch) -> None:
        self._start("control plane", "gateway", "mesh", "control", "-c", str(self.registry.file))
        self.until(lambda: responds(self.control_admin, "/readyz"), "the control plane is ready")
        watch("control plane")
        self.registry.tokens({"edge": "edge", **{each.name: each.service for each in self.members.values()}})
        self._start("edge", "gateway", "run", "-c", str(self.file))
        for member in self.members.values():
            self.children.append(member.start_sidecar())
        waited: dict[str, Callable[[], bool]] = {"issuer": lambda: responds(self.auth, "/.well-known/jwks.json"), "edge": lambda: responds(self.admin, "/readyz")}
        waited |= {name: member.ready for name, member in self.members.items()}

        def all_there() -> bool:
            for name in [name for name, ready in waited.items() if ready()]:
                del waited[name]
                watch(name)
            return not waited

        self.until(all_there, "everybody is ready")
        self.until(self.settled, "everybody has heard of everybody")
        caller, token = self.caller(), self.token("stagehand", ["payments:read"])
        probes = (Call("GET", "/v1/payments/none", token), 404), (Call("GET", "/public/rates"), 200)

        def through() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return all(caller.call(call).status == status for call, status in probes)
            return False

        self.until(through, "the edge reaches the services")
        caller.close()

    def settled(self) -> bool:
        """Whether every instance is healthy and has applied what it was sent."""
        rows = self.registry.report()["instances"]
        here = len(self.members) + 1
        fine = [row for row in rows if row["state"] == "healthy" and row["applied"] is not None and row["applied"] == row["sent"]]
        return len(fine) == here

    def add(self, name: str, service: str, version: str) -> Member:
        """Start another instance, and return when it takes requests."""
        member = self.members[name] = Member(name, service, version, self.folder, self._ports, self.control)
        self.registry.tokens({name: service})
        self.children += [member.start_app(self.surroundings(member)), member.start_sidecar()]
        self.until(member.ready, f"{name} is ready")
        return member

    # --- ending ---

    def close(self) -> None:
        """End the children, the edge first, and remove the folder; a signal meanwhile does not interrupt that."""
        before = {}
        with contextlib.suppress(ValueError):  # only the main thread may, and only there signals raise
            before = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}
        try:
            for names in (("edge",), tuple(child.name for child in self.children if child.name != "edge")):
                leaving = [child for child in self.children if child.name in names]
                for child in leaving:
                    child.ask()
                until = time.monotonic() + STOP
                for child in leaving:
                    child.end(until)
            self.children.clear()
            self._ports.close()
            shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            for number, action in before.items():
                signal.signal(number, action)
