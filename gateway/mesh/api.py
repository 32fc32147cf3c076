"""What the control plane answers: /v1/join, /v1/renew, /v1/stream and /v1/crl for members, and the admin pages on loopback.

Strategy: who asks was settled by the handshake and is judged again for each request. Only /v1/join opens without a member's certificate, by a token, by
a pod's token or by a certificate of the bank's PKI. Bodies are bounded, attempts without proof are limited by address before anything is looked up, and
certificates by a limit over all. Answers to strangers say what is wrong with what they sent, never what is in the store.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client.exposition import generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from gateway.config.values import Rate
from gateway.mesh import clock, revocation, tokens
from gateway.mesh.ca import SKEW, BadRequest, Issued
from gateway.mesh.control import ControlPlane
from gateway.mesh.documents_api import PATH, Documents
from gateway.mesh.keys import CaError
from gateway.mesh.limit import Bucket, Buckets
from gateway.mesh.peers import Peer
from gateway.mesh.pod import BadPod
from gateway.mesh.registry import BadInstance, read_instance, read_place
from gateway.mesh.report import report
from gateway.mesh.store import StoreError
from gateway.mesh.stream import Stream

log = logging.getLogger("crossway.mesh")

MOST = 24 << 10  # bytes of a body; a certificate request has 16 at most, and a head with it 32
BODY_TIME = 10.0  # seconds
ATTEMPTS = Rate(20, 10.0)  # to join, from one address
RENEWALS = 20  # of an instance at once, and in a fifth of a certificate's life: so many of its own are good at the same time, at most six times as many
CRL_LIFE = 86400.0  # seconds
SHARED = 64  # instances that one certificate may be of, where nobody wrote down of which: agents of SPIRE give one to all of a service on their machine
TOP_VERSION = 1 << 53
UNKNOWN = "?"  # begins the name for an instance whose first certificate nobody wrote down; no instance can call itself so
UNAVAILABLE = "the control plane's state cannot be used now; try again"


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, text: str, reason: str, **headers: str) -> None:
        super().__init__(text)
        self.status, self.reason, self.headers = status, reason, headers


class Api:
    """The members' side."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.limit = Bucket(plane.mesh.control.requests)
        self.attempts = Buckets(ATTEMPTS)
        self._renewals: tuple[float, Buckets] = 0.0, self.attempts  # by the lifetime for which they were made
        self.app = Starlette(
            routes=[
                Route("/v1/join", self._answered(self.join), methods=["POST"]),
                Route("/v1/renew", self._answered(self.renew), methods=["POST"]),
                Route("/v1/crl", self._answered(self.crl), methods=["GET"]),
                WebSocketRoute("/v1/stream", self.stream),
            ]
        )

    def _answered(self, work: Callable[[Request, Peer], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            peer: Peer = request.scope["state"]["peer"]
            try:
                return await work(request, peer)
            except Refusal as refusal:
                self.plane.metrics.refusals.labels(refusal.reason).inc()
                log.warning("a request is refused", extra={"path": request.url.path, "status": refusal.status, "reason": str(refusal), "address": peer.address})
                return _json({"error": str(refusal)}, refusal.status, refusal.headers)
            except (StoreError, CaError) as error:
                self.plane.metrics.refusals.labels("unavailable").inc()
                log.error("a request cannot be answered", extra={"path": request.url.path, "error": str(error)})
                return _json({"error": UNAVAILABLE}, 503, {"retry-after": "2"})

        return answer

    # -- certificates

    async def join(self, request: Request, peer: Peer) -> Response:
        """A first certificate, for a token, as a pod of Kubernetes, or for a certificate of the bank's PKI."""
        if not self.attempts.take(peer.address):
            raise Refusal(429, "too many attempts from this address", "attempts", **{"retry-after": "1"})
        said = await _body(request)
        self._same_time(said)
        try:
            instance, place = read_instance(said.get("instance")), read_place(said)
            presented = tokens.read(said["token"]) if said.get("token") is not None else None
            if presented is not None:
                service, how = presented.service, "token"
                await tokens.check(self.plane.store, presented)
            elif said.get("kubernetes") is not None:
                service, how = await self._by_cluster(said, instance), "kubernetes"
            else:
                service, how = self._by_bank(peer, said), "bank"
        except BadInstance as error:
            raise Refusal(400, str(error), "instance") from None
        except tokens.BadToken as error:
            raise Refusal(403, str(error), "token") from None
        self._may_have(service)
        if how != "kubernetes":  # a pod has proved which instance it is
            await self._not_anothers(service, instance)
        issued = self._issue(said, service)
        if presented is not None:
            try:
                await tokens.spend(self.plane.store, presented, instance)
            except tokens.BadToken as error:
                raise Refusal(403, str(error), "token") from None
        await self._keep(issued, service, instance, how)
        await self.plane.registry.joined(service, instance, *place)
        self.plane.changed()
        return self._issued(issued)

    async def _not_anothers(self, service: str, instance: str) -> None:
        """Refuse the name of an instance that is there: whoever joined by it could move it, have it drain and take its stream."""
        found = await self.plane.store.rows("SELECT serial FROM instances WHERE service = ? AND instance = ? AND connected = 1", service, instance)
        if found and found[0]["serial"] not in self.plane.deny.serials:
            raise Refusal(409, f"{instance}: an instance of {service} with this name is there", "instance", **{"retry-after": "15"})

    async def _by_cluster(self, said: dict[str, Any], instance: str) -> str:
        """A pod is one instance: its token lets nobody join under another name, and renewing needs no token."""
        try:
            pod = await self.plane.clusters.admit(said["kubernetes"], said.get("service"))
        except BadPod as error:
            raise Refusal(403, str(error), "kubernetes") from None
        if instance != pod.instance:
            raise Refusal(403, f"the instance of this pod is {pod.instance}", "kubernetes")
        return str(said["service"])

    def _by_bank(self, peer: Peer, said: dict[str, Any]) -> str:
        join = self.plane.mesh.control.join
        if join is None or join.ca is None:
            raise Refusal(401, "a token is required", "token")
        names = self.plane.peers.bank_names(peer)
        if not names:
            raise Refusal(401, "a token or a certificate of the bank's PKI is required", "token")
        service = said.get("service")
        patterns = join.services.get(service, ()) if isinstance(service, str) else ()
        if not any(_matches(name.lower(), pattern) for name in names for pattern in patterns):
            raise Refusal(403, "this certificate may not join as this service", "bank")
        return str(service)

    async def renew(self, request: Request, peer: Peer) -> Response:
        """A further certificate, with a new key, for the one that is held."""
        service = self._member(peer)
        said = await _body(request)
        self._same_time(said)
        self._may_have(service)
        instance = await self._family(peer, service)
        if not self._renewing().take(f"{service} {instance}"):
            raise Refusal(429, "this instance has got too many certificates; try again", "renewals", **{"retry-after": "60"})
        issued = self._issue(said, service, peer.leaf.der)
        await self._keep(issued, service, instance, "renewal")
        if await revocation.inherit(self.plane.store, issued.serial, peer.serial, issued.not_after):
            await self.plane.registry.touch()
            raise Refusal(403, f"{peer.leaf.uris[0]} (serial {peer.serial}) is revoked", "revoked")
        return self._issued(issued)

    async def _family(self, peer: Peer, service: str) -> str:
        """Return the instance that a certificate was issued to.

        One that nobody here wrote down (the state was lost since) becomes the first of a name of its own: whatever is renewed by it, and again by that, goes
        with it when it is revoked.
        """
        held = await self.plane.store.rows("SELECT instance FROM certificates WHERE serial = ?", peer.serial)
        if held and held[0]["instance"]:
            return str(held[0]["instance"])
        name = f"{UNKNOWN}{peer.serial}"
        await self.plane.store.run(
            "INSERT INTO certificates (serial, service, instance, not_before, not_after, generation, how) VALUES (?, ?, ?, ?, ?, 0, 'unknown')"
            " ON CONFLICT (serial) DO UPDATE SET instance = excluded.instance",
            peer.serial, service, name, peer.leaf.not_before, peer.leaf.not_after,
        )  # fmt: skip
        return name

    def _renewing(self) -> Buckets:
        """How often each instance may renew. Its certificates are all on the deny list when it is revoked, which every member has to hold."""
        life = self.plane.mesh.certificates.lifetime
        if self._renewals[0] != life:
            self._renewals = life, Buckets(Rate(RENEWALS, life / 5))
        return self._renewals[1]

    def _member(self, peer: Peer) -> str:
        fault = self.plane.peers.fault(peer)
        if fault is not None:
            raise Refusal(401 if not peer.chain else 403, fault, "identity")
        return self.plane.peers.service(peer)

    def _may_have(self, service: str) -> None:
        if service not in self.plane.mesh.services:
            raise Refusal(403, f"{service} is not a service of this mesh", "service")
        if service in self.plane.deny.services:
            raise Refusal(403, f"{service} is revoked", "revoked")

    def _same_time(self, said: dict[str, Any]) -> None:
        """Refuse what could not be used where it is asked for: no token is spent on it, and nobody asks for it in a loop."""
        theirs, life = clock.read(said.get("time")), self.plane.mesh.certificates.lifetime
        ahead = 0.0 if theirs is None else theirs - time.time()  # a member of an older version says no time
        if ahead < -min(SKEW, life / 10) or ahead > 0.9 * life:
            what = "be over" if ahead > 0 else "not be valid yet"
            raise Refusal(409, f"the clock of your machine is {clock.compared(ahead)}: a certificate of now would {what} there", "clock")

    def _issue(self, said: dict[str, Any], service: str, held: bytes | None = None) -> Issued:
        if not self.limit.take():
            raise Refusal(429, "too many requests for certificates; try again", "limit", **{"retry-after": "1"})
        if not isinstance(said.get("csr"), str):
            raise Refusal(400, "csr: a certificate request, PEM, is expected", "request")
        try:
            return self.plane.ca.issue(said["csr"], service, self.plane.mesh.certificates.lifetime, held=held)
        except BadRequest as error:
            raise Refusal(400, str(error), "request") from None

    async def _keep(self, issued: Issued, service: str, instance: str, how: str) -> None:
        """What is not written down is not handed out: revocation has to know it."""
        await self.plane.store.run(
            "INSERT INTO certificates (serial, service, instance, not_before, not_after, generation, how) VALUES (?, ?, ?, ?, ?, ?, ?)",
            issued.serial, service, instance, issued.not_before, issued.not_after, issued.generation, how,
        )  # fmt: skip
        self.plane.metrics.issued.labels(service, how).inc()
        log.info("a certificate is issued", extra={"service": service, "instance": instance, "serial": issued.serial, "not_after": issued.not_after, "how": how})

    def _issued(self, issued: Issued) -> Response:
        return _json({"svid": issued.chain, "bundle": self.plane.ca.bundle, "not_after": issued.not_after})

    # -- the rest

    async def crl(self, request: Request, peer: Peer) -> Response:
        self._member(peer)
        return await crl_of(self.plane)

    async def stream(self, socket: WebSocket) -> None:
        """The stream of one instance, until it ends."""
        peer: Peer = socket.scope["state"]["peer"]
        try:
            service = self._member(peer)
            self._may_have(service)
            instance = read_instance(socket.query_params.get("instance"))
            base = socket.query_params.get("version", "0")
            if not base.isascii() or not base.isdecimal() or len(base) > 16 or int(base) > TOP_VERSION:
                raise BadInstance("version: a number is expected")
            await self._is(peer, service, instance)
            network = await self.plane.registry.network(service, instance)
            known = await self.plane.ensure(service, int(base), network)
        except (Refusal, BadInstance, StoreError) as error:
            self.plane.metrics.refusals.labels("stream").inc()
            log.warning("a stream is refused", extra={"reason": str(error), "address": peer.address})
            if isinstance(error, StoreError):
                answer = _json({"error": UNAVAILABLE}, 503)
            else:
                answer = _json({"error": str(error)}, error.status if isinstance(error, Refusal) else 400)
            await socket.send_denial_response(answer)
            return
        stream = Stream(self.plane.hub, socket, peer, service, instance, known, network)
        await socket.accept(headers=[(clock.HEADER.encode("ascii"), f"{time.time():.3f}".encode("ascii"))])
        try:
            await self.plane.hub.serve(stream)
        except (WebSocketDisconnect, StoreError) as error:
            log.warning("a stream has failed", extra={"service": service, "instance": instance, "error": str(error)})
            peer.cut()

    async def _is(self, peer: Peer, service: str, instance: str) -> None:
        """Refuse a member that speaks for another instance of its service than the one that its certificate was issued to.

        Under a name that is new it may go on, when nobody is there by the one of before: one certificate is one instance.
        """
        store = self.plane.store
        found = await store.rows("SELECT instance FROM certificates WHERE serial = ?", peer.serial)
        before = found[0]["instance"] if found else ""  # nobody knows: another authority's, or from before the state was lost
        if before == instance:
            return
        if before == "" or before.startswith(UNKNOWN):
            others = "SELECT COUNT(*) AS n FROM instances WHERE serial = ? AND NOT (service = ? AND instance = ?)"
            if (await store.rows(others, peer.serial, service, instance))[0]["n"] >= SHARED:
                raise Refusal(403, f"{instance}: {SHARED} instances have come with this certificate", "instance")
            return
        taken = "SELECT COUNT(*) AS n FROM instances WHERE service = ? AND (instance = ? OR (instance = ? AND connected = 1))"
        if (await store.rows(taken, service, instance, before))[0]["n"]:
            raise Refusal(403, f"{instance}: this certificate was issued to the instance {before}", "instance")
        await store.run("UPDATE certificates SET instance = ? WHERE serial = ?", instance, peer.serial)
        await store.run("DELETE FROM instances WHERE service = ? AND instance = ? AND connected <> 1", service, before)


class Pages:
    """The admin's side: reading, and over a Unix socket the mesh's document."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        probes = [Route("/livez", self.livez), Route("/readyz", self.readyz), Route("/metrics", self.metrics)]
        self.probes = Starlette(routes=probes)  # what may be asked from elsewhere
        self.app = Starlette(routes=[*probes, Route("/status", self.status), Route("/crl", self.crl), Route(PATH, Documents(plane).answer, methods=["GET", "PUT"])])

    async def livez(self, request: Request) -> Response:
        return _json({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        error = self.plane.store_error
        return _json({"status": "not ready" if error else "ready", "detail": error}, 503 if error else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.plane.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self, request: Request) -> Response:
        try:
            return _json(await report(self.plane.store, self.plane.mesh) | {"replica": self.plane.replica, "file_error": self.plane.file_error})
        except StoreError as error:
            return _json({"error": str(error)}, 503)

    async def crl(self, request: Request) -> Response:
        try:
            return await crl_of(self.plane)
        except StoreError as error:
            return _json({"error": str(error)}, 503)


async def crl_of(plane: ControlPlane) -> Response:
    if plane.ca.external:
        return _json({"error": "the authority is SPIRE's, and so would be its list: members have the deny list"}, 404)
    serials = await revocation.revoked_serials(plane.store, plane.deny)
    return Response(plane.ca.revocations(serials, CRL_LIFE), media_type="application/x-pem-file")


async def _body(request: Request) -> dict[str, Any]:
    content = b""
    try:
        async with asyncio.timeout(BODY_TIME):
            async for part in request.stream():
                content += part
                if len(content) > MOST:
                    raise Refusal(413, f"a body of at most {MOST >> 10} KiB is expected", "body")
    except (TimeoutError, ClientDisconnect):
        raise Refusal(408, "the body did not come", "body", connection="close") from None
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise Refusal(400, "a JSON object is expected", "body")
    return said


def _matches(name: str, pattern: str) -> bool:
    """Whether a certificate's name is the pattern's; `*.` stands for one label, and a wildcard in a certificate for itself only."""
    if pattern.startswith("*."):
        first, dot, rest = name.partition(".")
        return bool(first) and first != "*" and dot == "." and rest == pattern[2:]
    return name == pattern


def _json(said: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(said), status, headers, media_type="application/json")
