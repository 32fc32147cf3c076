"""A gateway's membership of a mesh: joined before the first configuration is built, then kept in the admin process.

Strategy: workers know nothing of the mesh. What the control plane says becomes files in the member's folder (endpoints, certificate,
bundle) that upstreams watch like any others; a renewed certificate is a changed file, and reloads as one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.config.mesh_member import CARRIES, ENDPOINTS, REVOKED, TRAFFIC
from gateway.mesh import metrics
from gateway.mesh.assignment import Assignment, Refused
from gateway.mesh.contact import EnrolError
from gateway.mesh.enrol import join
from gateway.mesh.identity import Identity, Svid, load, pause
from gateway.mesh.link import Link, read_assignment
from gateway.mesh.networks import LABEL
from gateway.mesh.pod import BadPod
from gateway.mesh.pod import read_token as read_pod
from gateway.mesh.state import BUNDLE, State, StateError
from gateway.mesh.traffic import Dealer, Part, Traffic, read
from gateway.mesh.tunnels import WEBSOCKET
from gateway.mesh.workload_api import Agent, AgentError, agent_at

if TYPE_CHECKING:
    from gateway.config import Config
    from gateway.config.mesh_member import Mesh

log = logging.getLogger("crossway.mesh")

FIRST = 10.0  # seconds that a start waits for the control plane's first word
RETRY = 0.5  # seconds; the admin process of before may still hold the folder
NOWHERE = "0.0.0.0:0"  # nobody calls an edge through the mesh

dealer = Dealer()  # of this process


class MemberError(Exception):
    """The gateway cannot become a member; the text says why."""


def instance_of(mesh: Mesh, state: State) -> str:
    """What this gateway is called: a pod by its own name. Raises MemberError."""
    try:
        return state.instance(mesh.service, None if mesh.kubernetes is None else read_pod(mesh.kubernetes)[1].instance)
    except BadPod as error:
        raise MemberError(str(error)) from None


def job_of(mesh: Mesh, state: State, zone: str | None) -> dict[str, Any]:
    return {
        "service": mesh.service, "control": mesh.control, "instance": instance_of(mesh, state), "inbound": NOWHERE, "zone": zone,
        "labels": {} if mesh.network is None else {LABEL: mesh.network},
    }  # fmt: skip


def _lasting_proof(mesh: Mesh) -> dict[str, Any] | None:
    """What one may join with as often as needed."""
    if mesh.kubernetes is not None:
        return {"kubernetes": str(mesh.kubernetes), "control_ca": str(mesh.control_ca)}
    if mesh.certificate is not None:
        return {"pair": [str(mesh.certificate.cert), str(mesh.certificate.key)], "control_ca": str(mesh.control_ca)}
    return None


def _proof(mesh: Mesh) -> dict[str, Any]:
    """What to join with."""
    if (lasting := _lasting_proof(mesh)) is not None:
        return lasting
    assert mesh.token is not None
    return {"token": mesh.token.read_text("ascii")}



def _agent(mesh: Mesh) -> Agent:
    assert mesh.spire is not None
    try:
        return agent_at(None if mesh.spire == "env" else mesh.spire)
    except ValueError as error:
        raise MemberError(f"mesh.spire: {error}") from None


def _by_spire(mesh: Mesh, state: State, held: Svid | None) -> Svid | None:
    """Have what the agent gives now; a certificate that is held and good will do while it gives nothing."""
    from gateway.mesh.spire import fetch

    try:
        asyncio.run(fetch(state, mesh.service, _agent(mesh), FIRST))
    except AgentError as error:
        if held is None or held.leaf.not_after <= time.time():
            raise MemberError(str(error)) from None
        log.warning("the SPIFFE agent gives nothing; the certificate that is held serves", extra={"error": str(error)})
    return load(state)


def prepare(mesh: Mesh, zone: str | None) -> None:
    """Join if there is no valid certificate, and have a file of endpoints for every service. Raises MemberError."""
    try:
        state = State(mesh.state)
        held = load(state)
        if mesh.spire is not None:
            held = _by_spire(mesh, state, held)
        if held is None or held.leaf.not_after <= time.time():
            if mesh.token is None and _lasting_proof(mesh) is None:
                raise MemberError(f"{mesh.state} holds no valid certificate: name a token of `crossway mesh token {mesh.service}` in mesh.token")
            outcome = join(state, {**job_of(mesh, state, zone), **_proof(mesh)})
            log.info("joined the mesh", extra=outcome)
            held = load(state)
        assert held is not None
        if held.service != mesh.service:
            raise MemberError(f"{mesh.state} belongs to {held.service}, not {mesh.service}")
        kept = read_assignment(state, held, mesh.spire is not None)
        if kept is not None:
            write_down(state, kept, zone)
        else:
            _first(mesh, state, zone, held)
    except EnrolError as error:
        raise MemberError(f"cannot join the mesh: {error}") from None
    except (StateError, UnicodeDecodeError) as error:
        raise MemberError(str(error)) from None
    except OSError as error:
        raise MemberError(f"cannot join the mesh: {error.filename or mesh.control}: {error.strerror or error}") from None


def _first(mesh: Mesh, state: State, zone: str | None, held: Svid) -> None:
    """Hear the control plane once; without its word every service is without endpoints."""

    async def hear() -> None:
        told = asyncio.Event()

        async def apply(assignment: Assignment) -> None:
            write_down(state, assignment, zone)
            told.set()

        link = Link(state, mesh.control, instance_of(mesh, state), lambda: held, apply)
        link.keep_roots = mesh.spire is not None
        task = asyncio.create_task(link.run())
        try:
            async with asyncio.timeout(FIRST):
                await told.wait()
                while not link.acknowledged:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            log.warning("the control plane said nothing yet; no service has endpoints", extra={"control": mesh.control})
        await link.close()
        task.cancel()

    asyncio.run(hear())


def ensure_files(mesh: Mesh, files: Iterable[Path]) -> None:
    """Have the file of each service that the configuration names, and of its parts, whether or not the control plane knows it."""
    state = State(mesh.state)
    for path in files:
        if not path.exists():
            state.write(f"{ENDPOINTS}/{path.name}", b"[]\n")


def write_down(state: State, assignment: Assignment, zone: str | None) -> None:
    """Write what changed: the deny list, one file a service and part, in the form of `discovery: {file: ...}`, and how they are divided.

    One that is gone has no endpoint. The files of parts are there before it is said that there are parts.
    """
    wanted, dealt, carries = {}, {}, {}
    for name, settings in assignment.body["services"].items():
        wanted[name] = _list(settings, zone)
        carries[name] = settings.get(WEBSOCKET) is not None
        traffic = read(settings)
        if traffic is not None:
            dealt[name] = _traffic(name, traffic)
            wanted |= {_stem(name, label): _list(some, zone) for label, some in dealer.of(name, settings, traffic)}
    folder = state.folder / ENDPOINTS
    for path in folder.glob("*.yaml") if folder.is_dir() else ():
        wanted.setdefault(path.stem, b"[]\n")
    files = {f"{ENDPOINTS}/{name}.yaml": content for name, content in wanted.items()}
    files[REVOKED] = json.dumps(assignment.body.get("revoked") or {}, sort_keys=True).encode()
    files[TRAFFIC] = json.dumps({**dealt, CARRIES: carries}, sort_keys=True).encode()
    for name, content in files.items():
        if state.read(name) != content:
            state.write(name, content)


def _stem(service: str, label: str) -> str:
    """The name of a part's file, without what stands in labels; no service's name has a ~."""
    return f"{service}~{hashlib.sha256(label.encode()).hexdigest()[:24]}"


def _traffic(service: str, traffic: Traffic) -> dict[str, Any]:
    """What gateway.config.mesh_parts reads."""

    def said(part: Part) -> dict[str, Any]:
        return {
            "label": part.name, "version": part.version, "weight": part.weight, "headers": part.headers, "cookies": part.cookies,
            "file": f"{ENDPOINTS}/{_stem(service, part.name)}.yaml",
        }  # fmt: skip

    return {"sticky": traffic.sticky, "canary": [*map(said, traffic.canaries)], "split": [*map(said, traffic.splits)]}


def _list(settings: Mapping[str, Any], zone: str | None) -> bytes:
    """The endpoints as a file. The own network goes first: by zones where there are any, else others are there while it has none."""
    rows = []
    here = any(not each.get("network") for each in settings.get("endpoints", ()))
    for each in settings.get("endpoints", ()):
        if each.get("network") and here and zone is None:
            continue
        row = {"address": each["address"], "weight": int(each.get("weight") or 1)}
        at = f"{each['network']}.network" if each.get("network") else each.get("zone")
        if at and zone is not None:
            row["zone"] = at
        rows.append(json.dumps(row))
    return ("[" + ",\n".join(rows) + "]\n").encode()


def _ways(config: Config, upstreams: Iterable[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """The upstreams of a route, and their parts, that are services of the mesh: (name, (service, version))."""
    for name in upstreams:
        upstream = config.upstreams[name]
        if upstream.service is not None:
            yield name, (upstream.service, "")
            for part in upstream.traffic.parts if upstream.traffic else ():
                yield part.name, (upstream.service, part.version)


class Member:
    """Keeps a gateway's certificate and endpoints current, for as long as the admin process lives."""

    def __init__(self, config: Config) -> None:
        assert config.mesh is not None
        self.mesh, self.zone = config.mesh, config.zone
        self.ways = {route.name: dict(_ways(config, route.upstreams)) for route in config.routes}
        self.upstreams = {name: upstream.service for name, upstream in config.upstreams.items() if upstream.service}
        self.state = State(self.mesh.state)
        self.identity: Identity | None = None
        self.link: Link | None = None

    async def run(self) -> None:
        """Be the member; returns only by cancellation. Whatever ends it is told, and it begins again: nobody else keeps the certificate."""
        failures = 0
        while True:
            await self._own()
            try:
                await self._be()
            except (StateError, MemberError) as error:
                log.error("the gateway's membership of the mesh has ended; it begins again", extra={"error": str(error)})
            except Exception:
                log.exception("the gateway's membership of the mesh has failed; it begins again")
            finally:
                self.state.unlock()
            failures += 1
            await asyncio.sleep(pause(failures, 0))

    async def _own(self) -> None:
        """Wait until the folder is ours; that another process keeps it is told, unless that is the one of before on its way out."""
        told = asyncio.get_running_loop().time() + FIRST
        while True:
            try:
                self.state.lock()
                return
            except StateError as error:
                if asyncio.get_running_loop().time() >= told:
                    told = float("inf")
                    log.warning("another process keeps this gateway's membership of the mesh; what it writes there is followed", extra={"error": str(error)})
                await asyncio.sleep(RETRY)

    async def _be(self) -> None:
        """Keep certificate and stream, until something fails."""
        held = load(self.state)
        if held is None:
            raise StateError(f"{self.state.folder}: the certificate is gone")
        self.identity = self._identity(held)
        self.link = Link(self.state, self.mesh.control, self.identity.job["instance"], self._svid, self._apply)
        self.link.healthy, self.link.keep_roots = (lambda: True), self.identity.bundle_is_ours
        self.link.place = self.identity.place
        self.link.clock = self.identity.clock
        self.link.current = read_assignment(self.state, held, self.identity.bundle_is_ours)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.identity.keep())
            group.create_task(self.link.run())

    def _identity(self, held: Svid) -> Identity:
        job = job_of(self.mesh, self.state, self.zone)
        if self.mesh.spire is None:
            return Identity(self.state, job, self._renewed, held, proof=_lasting_proof(self.mesh))
        from gateway.mesh.spire import SpireIdentity

        return SpireIdentity(self.state, job, self._renewed, held, agent=_agent(self.mesh))

    def _svid(self) -> Svid:
        assert self.identity is not None and self.identity.svid is not None
        return self.identity.svid

    def _renewed(self, svid: Svid) -> None:
        if self.link is not None:
            self.link.renewed()

    async def _apply(self, assignment: Assignment) -> None:
        try:
            assert self.identity is not None
            if not self.identity.bundle_is_ours and assignment.bundle != self.state.read(BUNDLE):
                self.state.write(BUNDLE, assignment.bundle)
                fresh = load(self.state)
                assert fresh is not None
                self.identity.svid = fresh
            write_down(self.state, assignment, self.zone)
        except (OSError, StateError, ValueError, KeyError, TypeError) as error:
            raise Refused(f"it cannot be written down: {error}") from None

    def hop(self, route: str) -> dict[str, str] | None:
        """The labels of a route that leads to a service of the mesh; `route` may name the upstream that it chose."""
        name, _, upstream = route.partition(">")
        ways = self.ways.get(name) or {}
        services = {service for service, _ in ways.values()}
        service, version = ways.get(upstream, ("", "")) if upstream else (services.pop() if len(services) == 1 else "", "")
        domain = self.mesh.joined
        if not service or domain is None:
            return None
        return metrics.labels("source", self.mesh.service, service, domain, ("", version))

    def tcp_hop(self, target: str) -> dict[str, str] | None:
        """The labels of raw TCP that leads to a service of the mesh; `target` is "tcp:LISTENER>UPSTREAM"."""
        _, _, upstream = target.partition(">")
        service, domain = self.upstreams.get(upstream), self.mesh.joined
        if not target.startswith("tcp:") or service is None or domain is None:
            return None
        return metrics.labels("source", self.mesh.service, service, domain)

    def exposition(self, memory: Any) -> Iterator[str]:
        """Lines for /metrics, behind the gateway's own."""
        if self.identity is None or self.link is None or self.identity.svid is None:
            return
        yield from metrics.numbers(metrics.membership(self.identity, self.link))
        yield from metrics.istio(memory, self.hop)
        yield from metrics.istio_tcp(memory, self.tcp_hop)

