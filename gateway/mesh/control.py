"""The control plane: the mesh's file, the authority, the registry and the streams, kept in step.

Strategy: whatever changes (the file, the authority's folder, the registry, the deny list; here, by a command or by another control plane) sets
one flag; one task makes the assignments anew, and only those whose content differs get a version, a signature and a push. Whoever asks the
store again and again asks for a single number. A store that is away stops joining and learning, and no stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from gateway._speedups.certificates import TlsError, parse_certificates
from gateway.config.mesh_file import MeshFile
from gateway.config.mesh_load import load_mesh
from gateway.errors import ConfigError
from gateway.mesh import documents, revocation
from gateway.mesh.assign import Assignments, World, content_of
from gateway.mesh.ca import Ca
from gateway.mesh.control_metrics import Metrics
from gateway.mesh.keys import CaError
from gateway.mesh.kubernetes import Clusters
from gateway.mesh.networks import DEFAULT, is_gateway, network_of, scope, scoped, server_name
from gateway.mesh.peers import Peers
from gateway.mesh.probe import Prober
from gateway.mesh.registry import Registry
from gateway.mesh.sign import Signer
from gateway.mesh.spire_authority import SpireAuthority, open_authority
from gateway.mesh.store import Row, Store, StoreError, open_store
from gateway.mesh.stream import Hub

log = logging.getLogger("crossway.mesh")

LOOK = 0.2  # seconds between two looks at the store and the files
BEAT = 1.0  # seconds
HOUSEKEEPING = 600.0  # seconds
ISSUING_LEFT = 1 / 3  # of its life: the issuing certificate is renewed, when the root's key is there
SERVER_LIFE = 30 * 86400.0  # seconds


FileTime = tuple[int, int, int]


def file_time(path: Path) -> FileTime | None:
    """Return what changes when a file does; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


class ControlPlane:
    """One control plane of a mesh. Raises ConfigError, CaError or StoreError when it cannot begin."""

    def __init__(self, path: Path, own: MeshFile, mesh: MeshFile, ca: Ca | SpireAuthority, store: Store) -> None:
        self.path = path
        self.own = own  # what the file says
        self.mesh = mesh  # what counts: the same, or a document of the state with the file's section `control`
        self.document = 0  # number of the document of the state that was taken or refused last
        self.ca = ca
        self.store = store
        self.replica = f"{socket.gethostname()[:64]}-{secrets.token_hex(4)}"
        self.peers = Peers(mesh.trust_domain)
        self.clusters = Clusters()
        self.registry = Registry(store, self.replica, mesh.control.heartbeat)
        self.signer = Signer(ca)
        self.assignments = Assignments(lambda body: self.signer.sign(body))
        self.hub = Hub(self.assignments, self.registry, self.changed)
        self.metrics = Metrics(self)
        self.hub.on_push, self.hub.on_answer = self.metrics.pushed, self.metrics.answered
        self.prober = Prober(self.registry, ca, self.changed, self.metrics.probed, way=self._way)
        self.registry.keeps, self.hub.found = self._keeps, self.prober.found
        self._take_settings()
        self.policy = 0
        self._version = 0  # drawn last, here
        self.deny = revocation.DenyList()
        self._errors: dict[Callable[[], Awaitable[None]], Exception] = {}  # what cannot be done now, and why
        self.file_error = ""
        self.server_changed: Callable[[], None] = lambda: None  # the authority changed: TLS needs another certificate
        self._dirty = asyncio.Event()
        self._seen: dict[str, Any] = {}
        self._found: FileTime | None = None  # by the last look
        self._making = asyncio.Lock()

    @classmethod
    async def open(cls, path: Path) -> ControlPlane:
        """Read the file, open the authority (made the first time) and the state. What changes from here on is seen by the first look."""
        seen: dict[str, Any] = {"file": file_time(path)}
        own = load_mesh(path)
        ca = await open_authority(own)
        seen["ca"] = ca.fingerprint()
        store = await open_store(own.control.state)
        mesh, applied = await documents.in_force(store, own)
        plane = cls(path, own, mesh, ca, store)
        plane.document = applied.number if applied is not None else 0
        await plane.registry.start()
        plane._take_authority()
        await plane._number_policy(mesh)
        await plane.registry.load()
        plane.deny = plane.peers.deny = await revocation.load(plane.store, mesh)
        plane._seen = seen | {"changes": await plane.registry.changes()}
        return plane

    def announce(self) -> None:
        """Tell that it serves, and what."""
        log.info(
            "the control plane is ready to serve",
            extra={"trust_domain": self.mesh.trust_domain, "replica": self.replica, "services": len(self.mesh.services), "rules": len(self.mesh.authorization.rules),
                   "document": self.document, "policy": self.policy, "generation": self.ca.active_number, "root_offline": self.ca.root_offline},
        )  # fmt: skip

    def changed(self) -> None:
        """Have the assignments made anew, soon."""
        self._dirty.set()

    # -- assignments

    async def world(self) -> World:
        """Return what assignments are made from, as it is now."""
        endpoints = self.registry.endpoints(set(self.deny.serials))
        endpoints = {name: each for name, each in endpoints.items() if name not in self.deny.services}
        return World(self.mesh, self.policy, self.ca.bundle, endpoints, self.deny, self.registry.networks())

    async def make(self) -> None:
        """Make the assignments of the services whose members are here, and push what changed."""
        async with self._making:
            spared = self.registry.spared
            count = await self.registry.changes()
            if count != self._seen["changes"]:
                await self.follow()
                self._seen["changes"] = count  # what comes after this is seen by the next look
            await self.registry.load()
            self._tell_spared(spared)
            self.deny = self.peers.deny = await revocation.load(self.store, self.mesh)
            for peer in self.peers.cut_the_fallen():
                log.warning("a connection is cut", extra={"identity": peer.leaf.uris[:1], "serial": peer.serial, "reason": self.peers.fault(peer)})
            world = await self.world()
            scopes = {name: scoped(name) for name in self.hub.scopes()}
            contents = {name: content_of(service, world, network) for name, (service, network) in scopes.items() if service in self.mesh.services}
            fresh = {name: content for name, content in contents.items() if self.assignments.changed(name, content)}
            if fresh:
                version = await self._draw()
                for name, content in fresh.items():
                    self.assignments.put(name, content, version)
                self.hub.tell(fresh)
            self.assignments.forget(set(self.mesh.services), {DEFAULT, *self.mesh.networks}, set(contents))

    def _tell_spared(self, before: set[str]) -> None:
        for service in sorted(self.registry.spared - before):
            log.error("more of a service cannot be reached than may be taken out; its instances are offered as they are", extra={"service": service})
        for service in sorted(before - self.registry.spared):
            log.info("enough of a service can be reached again", extra={"service": service})

    async def ensure(self, service: str, base: int, network: str) -> int:
        """Have an assignment for a service in a network before its first stream here, newer than what the member has from elsewhere.

        Return that version; 0 for one that nobody drew: of before a state was lost, or invented. It takes no other member's time.
        """
        name = scope(service, network)
        async with self._making:
            # What was made for streams that have ended long ago may be old.
            now, content = self.assignments.current(name), content_of(service, await self.world(), network)
            if now is not None and now.version < base and base > await self._drawn():
                base = 0
            if now is None or now.version < base or self.assignments.changed(name, content):
                self.assignments.put(name, content, await self._draw())
                self.hub.tell([name])
        return base

    async def _draw(self) -> int:
        """Return the next version: also after a state that has lost its last ones, since members go by them."""
        last = self._version
        rows = await self.store.rows("UPDATE counters SET value = CASE WHEN value < ? THEN ? ELSE value END + 1 WHERE name = 'version' RETURNING value", last, last)
        self._version = int(rows[0]["value"])
        return self._version

    async def _drawn(self) -> int:
        """Return the newest version that was drawn by anybody."""
        return max(self._version, int((await self.store.rows("SELECT value FROM counters WHERE name = 'version'"))[0]["value"]))

    async def _number_policy(self, mesh: MeshFile) -> None:
        """The policy's version grows when the rules changed, for all control planes together."""
        said = mesh.authorization.model_dump(mode="json", by_alias=True) | {"services": sorted(mesh.services)}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        await self.store.run("UPDATE counters SET value = value + 1, digest = ? WHERE name = 'policy' AND digest <> ?", digest, digest)
        self.policy = int((await self.store.rows("SELECT value FROM counters WHERE name = 'policy'"))[0]["value"])

    # -- what is watched

    async def run(self) -> None:
        """Keep everything in step until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.ca.follow())
            tasks.create_task(self._every(LOOK, self._look))
            tasks.create_task(self._every(BEAT, self._beat))
            tasks.create_task(self._every(HOUSEKEEPING, self._keep_house))
            tasks.create_task(self.prober.run())
            tasks.create_task(self._make_when_changed())

    async def _make_when_changed(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            if not await self._trying(self.make):
                await asyncio.sleep(LOOK)
                self._dirty.set()

    async def _every(self, pause: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(pause)
            await self._trying(work)

    async def _trying(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Do something with the store; a failure is told once and leaves everything as it was."""
        try:
            await work()
        except (StoreError, CaError, OSError) as error:
            if str(error) != str(self._errors.get(work)):
                log.error("the state or the authority cannot be used; streams go on", extra={"error": str(error)})
            if work != self._keep_house:  # which will be long before it is tried again
                self._errors[work] = error
            return False
        if self._errors.pop(work, None) is not None and not self._errors:
            log.info("the state and the authority can be used again")
        return True

    @property
    def store_error(self) -> str:
        """Why the state cannot be used now; empty when it can."""
        return next((str(error) for error in self._errors.values() if isinstance(error, StoreError)), "")

    async def _look(self) -> None:
        """Look at what may have changed. One that fails keeps nobody from looking at the others."""
        for work in (self._look_at_file, self._look_at_authority, self._look_at_state):
            await self._trying(work)

    async def _look_at_file(self) -> None:
        before, self._found = self._found, file_time(self.path)
        if self._found != self._seen["file"] and self._found == before:  # one that changes still may be half of what it will be
            self._seen["file"] = before
            try:
                await self.reload()
            except BaseException:
                self.look_again()  # the state was away: what it did not let us take is not forgotten
                raise

    async def _look_at_authority(self) -> None:
        if (print_now := self.ca.fingerprint()) != self._seen["ca"]:
            self.ca.load()
            self._take_authority()
            self.signer = Signer(self.ca)
            self.prober.refresh()
            if self.ca.external:  # the key of before may be over soon
                self.assignments.sign_anew()
            log.info("the authority has changed", extra={"generation": self.ca.active_number, "bundle": list(self.ca.generations)})
            self.server_changed()
            self._seen["ca"] = print_now
            self.changed()

    async def _look_at_state(self) -> None:
        if await self.registry.changes() != self._seen["changes"]:
            self.changed()
        presence = await self.registry.hearing()
        if presence != self._seen.get("presence"):
            self._seen["presence"] = presence
            self.changed()

    def look_again(self) -> None:
        """Have the file read again soon, though it did not change: what it names may have."""
        self._seen["file"] = ()

    async def reload(self) -> None:
        """Read the file again; one that cannot be used changes nothing."""
        try:
            own = load_mesh(self.path)
        except ConfigError as error:
            self._refuse(error)
            return
        fixed = ("bind", "admin", "probes", "state", "ca", "heartbeat", "requests", "spire", "keys")
        if own.trust_domain != self.own.trust_domain:
            self.file_error = "trust_domain: cannot change while members live in it"
            log.error("the mesh's file is refused, the old one goes on", extra={"reason": self.file_error})
            return
        if later := [name for name in fixed if getattr(own.control, name) != getattr(self.own.control, name)]:
            log.warning("some of the change waits for a restart", extra={"keys": [f"control.{name}" for name in later]})
        await self._take(own)

    async def follow(self) -> None:
        """Take the newest document of the state, when that counts and another one is in force; one that cannot be used here changes nothing."""
        if self.own.control.source == "state" and await documents.number(self.store) != self.document:
            await self._take(self.own)

    async def _take(self, own: MeshFile) -> None:
        """Put in force what counts by the file and the state."""
        applied = await documents.newest(self.store) if own.control.source == "state" else None
        number = applied.number if applied is not None else 0
        try:
            mesh = own if applied is None else documents.of_state(applied, own)
        except ConfigError as error:
            self.document = number
            self._refuse(error)
            return
        await self._number_policy(mesh)  # may fail, and then nothing has changed
        self.document = number
        self.own, self.mesh, self.file_error = own, mesh, ""
        self._take_settings()
        self._take_authority()
        self.metrics.reloads.labels("done").inc()
        told = {"digest": mesh.digest[:12], "policy": self.policy, "services": len(mesh.services), "rules": len(mesh.authorization.rules)}
        if applied is None:
            log.info("the mesh's file is in force", extra=told)
        else:
            log.info("a document of the state is in force", extra={"version": applied.number, "by": applied.who, **told})
        self.changed()

    def _refuse(self, error: ConfigError) -> None:
        self.file_error = error.render()
        self.metrics.reloads.labels("refused").inc()
        log.error("the mesh's file is refused, the old one goes on", extra={"problems": [problem.as_dict() for problem in error.problems]})

    async def _beat(self) -> None:
        await self.registry.beat()
        await self.follow()  # also when whoever applied a document died before he could tell
        await self.hub.look()
        await self.hub.write()

    async def _keep_house(self) -> None:
        await self.registry.clean()
        if self.signer.spent:
            self.signer = Signer(self.ca)
            self.assignments.sign_anew()
            self.changed()
        self.server_changed()
        if not isinstance(self.ca, SpireAuthority) and self.ca.issuing_left() < ISSUING_LEFT:
            if self.ca.active.offline:
                log.error("the issuing certificate nears its end; `crossway mesh rotate-root issuing --root-key FILE` renews it",
                          extra={"days_left": round((self.ca.active.issuing.not_valid_after_utc.timestamp() - time.time()) / 86400)})  # fmt: skip
            else:
                self.ca.renew_issuing()
                log.info("the issuing certificate is renewed")

    def _way(self, row: Row) -> tuple[bool, str | None]:
        """Whether an instance can be looked at from here, and as what: of other networks their gateways, by the name of their service."""
        network = network_of(json.loads(row["labels"]))
        if is_gateway(row["service"], network, self.mesh):
            return True, server_name(row["service"], self.mesh.trust_domain)
        return not self.mesh.networks or network == self.mesh.control.network, None

    def _keeps(self, row: Row) -> bool:
        """Whether an instance whose stream was lost may be an endpoint for as long as it can be reached: it said that it is well, and nothing speaks against it."""
        well = row["healthy"] and not row["draining"] and row["inbound"] and row["unreachable"] is None and (row["not_after"] or 0) > time.time()
        allowed = row["service"] in self.mesh.services and row["service"] not in self.deny.services and row["serial"] not in self.deny.serials
        return bool(well and allowed and self.mesh.control.health is not None and self._way(row)[0])

    def _take_settings(self) -> None:
        self.prober.settings = probe = self.mesh.control.health
        self.registry.most = None if probe is None else probe.most

    def _take_authority(self) -> None:
        self.peers.roots = parse_certificates(self.ca.bundle.encode("ascii"))
        join = self.mesh.control.join
        try:
            self.peers.bank = parse_certificates(join.ca.read_bytes()) if join is not None and join.ca is not None else []
        except (OSError, TlsError) as error:  # it was good when the file was read; our own authority does not wait for it
            log.error("the roots of another PKI cannot be read; those of before stay", extra={"file": str(join and join.ca), "error": str(error)})
        self.clusters.take(join.kubernetes if join is not None else ())

    async def close(self) -> None:
        """End in good order: members go on, and to another control plane if there is one."""
        self.clusters.close()
        await self.hub.close()
        with contextlib.suppress(StoreError):
            await self.hub.write()
        with contextlib.suppress(StoreError):
            await self.store.close()
