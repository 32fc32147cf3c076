"""A service's sidecar: one process with the engine, the member's certificate and the stream of the control plane.

Strategy: the engine and its snapshots are those of a worker; a new assignment or certificate becomes a new snapshot beside the one that
serves, and takes its place by one assignment or not at all. One process, because a second one would cost more memory than all that it
holds; who starts it (systemd, Kubernetes) starts it again, and it serves at once from the signed assignment on its disk. The way out is
in order: leave the registry, wait, close inbound, and keep outbound until the app is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gateway._speedups.certificates import ClientCertificate
from gateway._speedups.engine import Engine
from gateway._speedups.exchange import Snapshot, return_free_memory
from gateway.mesh.assignment import Assignment, Refused
from gateway.mesh.identity import Identity, Svid, load, pause
from gateway.mesh.link import Link, read_assignment
from gateway.mesh.pod import BadPod
from gateway.mesh.pod import read_token as read_pod
from gateway.mesh.proxy import INBOUND, OUTBOUND, TCP, Surroundings, build
from gateway.mesh.state import BUNDLE, State, StateError
from gateway.mesh.tunnels import SPOKEN, WEBSOCKET
from gateway.server import log as logs
from gateway.server.exchanged import follow
from gateway.server.pages import Pages, bound
from gateway.server.sidecar_drain import Drain
from gateway.server.sidecar_pages import Answers
from gateway.server.sidecar_setup import CannotStart, Setup, address, journal_of, lasting_proof, proof_of
from gateway.server.systemd import Notifier
from gateway.telemetry.shared import SharedState
from gateway.workload.admission import Revoked

if TYPE_CHECKING:
    from gateway.mesh.outside import Outside

log = logging.getLogger("crossway.mesh")

LOOK = 2.0  # seconds between two looks whether the app is there
CONNECT = 1.0  # seconds for one of them
BACKLOG = 1024
NOBODY = ("127.0.0.1", 9)  # stands for the app where there is none; such a member is no endpoint
TIDY = 2.0  # seconds after a change until what it left behind is given back; several changes are one


class Sidecar:
    """The life of one sidecar, from its certificate to its last connection."""

    answers: type[Answers] = Answers

    def __init__(self, setup: Setup, loop: asyncio.AbstractEventLoop) -> None:
        self.setup = setup
        self.loop = loop
        self.state = State(setup.state)
        self.state.lock("sidecar")
        self.memory = SharedState(workers=1, bucket_slots=1024)
        self.gauges = self.memory.slot(0)
        self.engine = Engine(0, self.gauges, self.memory.buckets)
        self.around = Surroundings(
            address(*(setup.app or NOBODY)), {name: f"{OUTBOUND}:{name}" for name in setup.ports}, self.memory, setup.intercept, setup.zone,
            setup.app_protocol, external_certs=setup.external_certs, journal=journal_of(setup.egress_audit),
        )
        self.outside: Outside | None = None  # made for the first assignment with an external host
        self.sockets: dict[str, socket.socket] = {}
        self.pages_at: dict[str, tuple[str, int]] = {}
        self.listening = False
        self.app_there = False
        self.draining = False
        self.left: float | None = None  # when it left the registry, on the loop's clock
        self.revoked = Revoked({})
        self.raw: frozenset[str] = frozenset()  # listeners of connections, not of requests
        self.declared: tuple[str | None, bool] | None = None  # the service's protocol as the mesh's file has it, and whether WebSockets pass
        self.cut = 0  # connections of revoked members
        self.ended: asyncio.Future[None] = loop.create_future()
        self.hurry = asyncio.Event()
        self.tidying: asyncio.TimerHandle | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        self.notifier = Notifier.from_environment()
        said = self.answers(self)
        self.pages = Pages({**said.probes(), "/status": said.status})
        self.probes = Pages({**said.probes(), **{f"/app/{name}": probe for name, probe in setup.app_probes.items()}})

    # -- start

    def bind(self) -> None:
        """Bind every socket; nothing is listened on yet. Raises CannotStart."""
        for name, (host, port) in self._wanted().items():
            try:
                self.sockets[name] = bound(host, port)
            except OSError as error:
                raise CannotStart(f"cannot bind {name} to {address(host, port)}: {error.strerror}") from None

    def _wanted(self) -> dict[str, tuple[str, int]]:
        """The listeners, and where."""
        ports = {f"{OUTBOUND}:{name}": where for name, where in self.setup.ports.items()}
        return {INBOUND: self.setup.inbound, OUTBOUND: self.setup.outbound, **ports}

    def _job(self) -> dict[str, Any]:
        """What the control plane is told of this instance."""
        bound = self.sockets[INBOUND].getsockname()
        return {
            "service": self.setup.service, "control": self.setup.control, "instance": self._instance(),
            "inbound": self.setup.advertise or address(bound[0], bound[1]), "zone": self.setup.zone,
            "labels": self.setup.labels | ({} if self.setup.app is None else {"app-port": str(self.setup.app[1])}),
        }  # fmt: skip

    def _instance(self) -> str:
        """What this instance is called: a pod by its own name. Raises CannotStart."""
        if self.setup.pod is None:
            return self.state.instance(self.setup.service)
        try:
            return self.state.instance(self.setup.service, read_pod(self.setup.pod)[1].instance)
        except (OSError, BadPod) as error:
            raise CannotStart(f"{self.setup.pod}: {error.strerror}" if isinstance(error, OSError) else str(error)) from None

    async def run(self) -> None:
        """Serve until drained. Raises CannotStart."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._stop)
        self.loop.add_signal_handler(signal.SIGUSR1, self._reopen)
        self.loop.add_signal_handler(signal.SIGUSR2, self._leave)
        self.loop.add_signal_handler(signal.SIGHUP, self._again)
        self.bind()
        for name, pages, where in (("admin", self.pages, self.setup.admin), ("probes", self.probes, self.setup.probes)):
            if where is not None:
                try:
                    self.pages_at[name] = await pages.start(*where)
                except OSError as error:
                    raise CannotStart(f"cannot bind {name} to {address(*where)}: {error.strerror}") from None
        job = self._job()
        again = lasting_proof(self.setup)
        if self.setup.agent is None:
            self.identity = Identity(self.state, job, self._renewed, proof=again)
        else:
            from gateway.mesh.spire import SpireIdentity

            self.identity = SpireIdentity(self.state, job, self._renewed, agent=self.setup.agent)
        if not await self._become_member():
            log.info("stopped before it joined the mesh", extra={"error": self.identity.error})
            return
        assert self.identity.svid is not None
        self.link = Link(self.state, self.setup.control, job["instance"], self.svid, self.apply)
        self.link.healthy = lambda: self.app_there
        self.link.place = self.identity.place
        self.link.clock = self.identity.clock
        self.link.keep_roots = self.identity.bundle_is_ours
        self.engine.start(self.loop)
        self._from_disk()
        if self.setup.app is not None:
            self._task(self._watch_app())
        if own := [each for files in self.setup.external_certs.values() for each in files]:
            self._task(follow(own, self._again))
        self._task(self.identity.keep())
        self._task(self.link.run())
        if self.notifier.watchdog:
            self._ping(self.notifier.watchdog)
        gc.collect()
        gc.freeze()
        try:
            await self.ended
        finally:
            for task in self.tasks:
                task.cancel()
            self.pages.close()
            self.probes.close()
            self.engine.close()
            if self.around.journal is not None:
                self.around.journal.close()
            self.state.unlock()

    async def _become_member(self) -> bool:
        """Take the certificate that is there, or join by what there is, for as long as it takes; False when told to stop meanwhile. Raises CannotStart."""
        try:
            held = load(self.state)
        except StateError as error:
            raise CannotStart(str(error)) from None
        if held is not None and held.service != self.setup.service:
            raise CannotStart(f"{self.state.folder} belongs to {held.service}, not {self.setup.service}")
        if held is not None and held.leaf.not_after > time.time():
            self.identity.svid = held
            return True
        proof, until = proof_of(self.setup, self.state.folder, held)
        stopped = asyncio.ensure_future(self.hurry.wait())
        try:
            while True:
                joining = asyncio.ensure_future(self.identity.join(proof))
                await asyncio.wait({joining, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not joining.done():
                    joining.cancel()
                    await asyncio.wait({joining})
                    return False
                if joining.result():
                    return True
                if self.identity.lasting:
                    raise CannotStart(f"cannot join the mesh: {self.identity.error}")
                if time.time() > until:
                    raise CannotStart(f"cannot join the mesh, and the token has ended (`crossway mesh token {self.setup.service}` makes another): {self.identity.error}")
                await asyncio.wait({stopped}, timeout=min(10.0, pause(self.identity.failures, self.identity.draw())))
                if stopped.done():
                    return False
        finally:
            stopped.cancel()

    def _from_disk(self) -> None:
        svid = self.svid()
        kept = read_assignment(self.state, svid, self.identity.bundle_is_ours)
        if kept is None:
            return
        try:
            self._take_effect(kept, svid)
        except Exception as error:  # noqa: BLE001 - whatever it is, the control plane may bring a better one
            log.error("the assignment on disk cannot be used", extra={"version": kept.version, "reason": str(error)})
            return
        self.link.current = kept
        log.info("serving from the assignment on disk", extra={"version": kept.version, "issued": kept.body.get("issued")})

    def svid(self) -> Svid:
        assert self.identity.svid is not None
        return self.identity.svid

    # -- changes

    async def apply(self, assignment: Assignment) -> None:
        """Make an assignment take effect. Raises Refused, and then nothing has changed."""
        svid = self.svid()
        if not self.identity.bundle_is_ours and assignment.bundle != self.state.read(BUNDLE):
            try:
                self.state.write(BUNDLE, assignment.bundle)
                fresh = load(self.state)
            except (OSError, StateError) as error:
                raise Refused(f"the new bundle cannot be used: {error}") from None
            assert fresh is not None
            svid = self.identity.svid = fresh
            log.info("bundle changed", extra={"roots": len(svid.roots)})
        try:
            self._take_effect(assignment, svid)
        except Exception as error:  # noqa: BLE001 - whatever it is, the old snapshot goes on
            raise Refused(f"it cannot be built: {error}") from None

    def _build(self, assignment: Assignment, svid: Svid) -> Snapshot:
        return build(assignment, svid, self.around)

    def _take_effect(self, assignment: Assignment, svid: Svid) -> None:
        snapshot = self._build(assignment, svid)
        if self.draining:
            snapshot.listeners[INBOUND].leaving = True
        self.engine.apply(snapshot)
        self._tidy()
        self._follow_outside()
        self.raw = frozenset(name for name, listener in snapshot.listeners.items() if listener.tcp is not None)
        self._declared(assignment.body.get("own") or {})
        revoked = Revoked(assignment.body.get("revoked") or {})
        if revoked.serials - self.revoked.serials or revoked.identities - self.revoked.identities:
            self._cut(revoked)
        self.revoked = revoked
        if closed := self.engine.close_denied(INBOUND):
            log.warning("connections that the policy no longer allows are closed", extra={"connections": closed})
        if not self.listening:
            self._listen()

    def _tidy(self) -> None:
        """Give free memory back, in a moment: the snapshot before has connections still."""

        def now() -> None:
            self.tidying = None
            return_free_memory()

        if self.tidying is None:
            self.tidying = self.loop.call_later(TIDY, now)

    def _follow_outside(self) -> None:
        """Look for the external hosts of the snapshot that has just taken effect."""
        if self.outside is None and self.around.outside:
            from gateway.mesh.outside import Outside  # the resolver: most services call nobody outside

            self.outside = Outside()
        if self.outside is not None:
            self.outside.follow(self.around.outside, self.loop)

    def _declared(self, own: dict[str, Any]) -> None:
        """Tell, once, that the command line and the mesh's file do not mean the same."""
        declared = own.get("protocol"), own.get(WEBSOCKET) is not None
        if declared == self.declared:
            return
        self.declared = declared
        protocol, carries = declared
        if carries and self.around.app_protocol not in (*SPOKEN, TCP):
            log.error(
                "the mesh's file lets WebSockets pass, and --app-protocol does not: their handshakes are passed on as plain requests",
                extra={"service": self.setup.service, "app_protocol": self.setup.app_protocol},
            )  # fmt: skip
        if protocol is not None and (protocol == TCP) != self.around.raw:
            log.error(
                "the mesh's file and --app-protocol do not mean the same: calls will fail",
                extra={"service": self.setup.service, "file": protocol, "app_protocol": self.setup.app_protocol},
            )  # fmt: skip

    def _cut(self, revoked: Revoked) -> None:
        """Close the connections of those who are revoked now; new ones are refused by the snapshot."""

        def condemned(certificate: ClientCertificate) -> bool:
            return revoked.holds(certificate.leaf)

        closed = self.engine.close_clients(condemned) + self.engine.close_servers(condemned)
        self.cut += closed
        if closed:
            log.warning("connections of revoked members closed", extra={"connections": closed})

    def _renewed(self, svid: Svid) -> None:
        """A new certificate: new handshakes use it; connections that are open stay, and those to services are made anew."""
        if not hasattr(self, "link") or self.link.current is None:
            return
        try:
            self._take_effect(self.link.current, svid)
        except Exception:
            log.exception("the new certificate cannot be used; the old one goes on")
            return
        self.link.renewed()

    def _again(self) -> None:
        """SIGHUP, or an exchanged file: read again what is not the control plane's to say, the certificates towards external hosts."""
        if not self.setup.external_certs or not self.listening or self.link.current is None:
            log.info("nothing to reload: the control plane says what there is to do")
            return
        try:
            self._take_effect(self.link.current, self.svid())
        except Exception as error:  # noqa: BLE001 - whatever it is, the old snapshot goes on
            log.error("the certificates towards external hosts cannot be used; the old ones go on", extra={"reason": str(error)})
        else:
            log.info("the certificates towards external hosts were read again")

    def _reopen(self) -> None:
        logs.reopen()
        if self.around.journal is not None:
            self.around.journal.reopen()

    def _listen(self) -> None:
        for name, sock in self.sockets.items():
            try:
                sock.listen(BACKLOG)
            except OSError as error:  # the kernel lets two bind one address that both may reuse, and only one of them listen
                if not self.ended.done():
                    self.ended.set_exception(CannotStart(f"cannot listen for {name} at {address(*sock.getsockname()[:2])}: {error.strerror}"))
                return
        self.listening = True
        for name, sock in self.sockets.items():
            self.engine.listen(name, sock.fileno())
        self.gauges.set_gauge("pid", os.getpid())
        self.gauges.set_gauge("started", int(time.time()))
        self.gauges.set_gauge("ready", 1)
        self._announce()
        self.notifier.ready(f"{self.svid().identity}, assignment {self.engine_version()}")

    def engine_version(self) -> int:
        return self.around.versions

    def _announce(self) -> None:
        schemes = {name: "tcp" if name in self.raw else "https" if name == INBOUND else "http" for name in self.sockets}
        rows = [(name, f"{schemes[name]}://{address(*sock.getsockname()[:2])}") for name, sock in self.sockets.items()]
        rows += [(name, f"http://{address(*where)}") for name, where in self.pages_at.items()]
        app = f"{'tcp' if self.around.raw else 'http'}://{address(*self.setup.app)}" if self.setup.app else "none"
        rows += [("app", app), ("identity", self.svid().identity)]
        with contextlib.suppress(OSError):
            print("\n".join(f"{name:<{max(len(each) for each, _ in rows)}}  {text}" for name, text in rows), flush=True)

    def _task(self, coroutine: Any) -> None:
        task = self.loop.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the sidecar failed", exc_info=task.exception())
            if not self.ended.done():
                self.ended.set_exception(CannotStart("a part of the sidecar failed; see the log"))

    def _ping(self, seconds: float) -> None:
        self.notifier.ping()
        self.loop.call_later(seconds, self._ping, seconds)

    # -- the app

    async def app_answers(self) -> bool:
        """Whether the app takes connections now."""
        if self.setup.app is None:
            return False
        try:
            async with asyncio.timeout(CONNECT):
                _, writer = await asyncio.open_connection(*self.setup.app)
            writer.close()
        except (OSError, TimeoutError):
            return False
        return True

    async def _watch_app(self) -> None:
        while True:
            there = await self.app_answers()
            if there != self.app_there:
                self.app_there = there
                log.log(logging.INFO if there else logging.WARNING, "the app takes connections" if there else "the app takes no connections")
                await self.link.beat()
            await asyncio.sleep(LOOK if there else CONNECT)

    # -- the end

    def _leave(self) -> None:
        """SIGUSR2: callers are told to go elsewhere; whoever comes is still served."""
        if self.left is None and self.listening and not self.draining:
            self.left = self.loop.time()
            log.info("leaving the registry; inbound goes on")
            self.gauges.set_gauge("ready", 0)
            self._task(self.link.drain())

    def _stop(self) -> None:
        """SIGTERM: drain; a second one: now."""
        if self.draining or not self.listening:
            self.hurry.set()
            if not self.listening and not self.ended.done():
                self.ended.set_result(None)
            return
        self.draining = True
        self.notifier.stopping("Draining")
        self._task(self._drain())

    async def _drain(self) -> None:
        way = Drain(self)
        await way.leave()
        await way.close_inbound()
        await way.close_outbound()
        await way.finish("exchange")


def run(setup: Setup) -> int:
    """Be a sidecar; return the exit code."""
    return run_member("sidecar", lambda loop: Sidecar(setup, loop))


def run_member(name: str, make: Callable[[asyncio.AbstractEventLoop], Sidecar]) -> int:
    """Be what `make` makes for a loop; return the exit code."""
    import uvloop

    logs.name_process(name)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # who is told to leave before he has begun has nothing to leave
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(make(loop).run())
        return 0
    except (CannotStart, StateError) as error:
        import sys

        print(f"crossway: {error}", file=sys.stderr)
        return 1
