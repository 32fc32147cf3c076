"""SPIRE in the place of the control plane's own authority: who the control plane is and which roots there are, as the agent says it.

Strategy: the interface of Ca, with the half that issues refused. The control plane has an ordinary SVID, for spiffe://TRUST_DOMAIN/control, and signs
assignments with its key; whenever the agent brings another, everything is signed anew, so that no signature outlives its certificate.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gateway._speedups.certificates import Certificate, parse_certificates
from gateway.mesh.ca import BadRequest, Ca, Issued
from gateway.mesh.keys import CaError, keys_of
from gateway.mesh.spiffe import control_id
from gateway.mesh.spire import check
from gateway.mesh.workload_api import Agent, AgentError, Shown, agent_at, follow
from gateway.workload.admission import control_fault

if TYPE_CHECKING:
    from gateway.config.mesh_file import MeshFile

log = logging.getLogger("crossway.mesh")

PATIENCE = 10.0  # seconds that a start waits for the agent
LONGEST = 15.0  # seconds between two calls to the agent


class SpireAuthority:
    """What the agent says, for a control plane. Raises CaError when it says nothing usable at the start."""

    external = True
    root_offline = True
    active_number = 0

    def __init__(self, agent: Agent, domain: str) -> None:
        self.agent = agent
        self.domain = domain
        self.generations: dict[int, NoReturn] = {}
        self.held: Shown | None = None

    async def open(self) -> SpireAuthority:
        """Wait for the agent's first word."""
        try:
            async with asyncio.timeout(PATIENCE):
                async with aclosing(follow(self.agent)) as answers:
                    self._take(await anext(answers))
        except (AgentError, TimeoutError) as error:
            raise CaError(str(error) or f"the SPIFFE agent at {self.agent} gave nothing within {PATIENCE:g} s") from None
        return self

    async def follow(self) -> None:
        """Take what the agent brings, for ever."""
        failures = 0
        while True:
            try:
                async with aclosing(follow(self.agent)) as answers:
                    async for shown in answers:
                        self._take(shown)
                        failures = 0
            except (AgentError, CaError) as error:
                failures += 1
                if failures in (1, 10) or failures % 100 == 0:
                    left = round(self._ends() - time.time())
                    log.log(logging.ERROR if left < 600 else logging.WARNING, "the SPIFFE agent gives nothing", extra={"error": str(error), "failures": failures, "seconds_left": left})
            await asyncio.sleep(min(LONGEST, 0.5 * 2 ** min(failures, 10)) * random.uniform(0.5, 1))

    def _take(self, shown: list[Shown]) -> None:
        wanted = control_id(self.domain)
        each = next((each for each in shown if each.identity == wanted), None)
        if each is None:
            raise AgentError(f"the SPIFFE agent gives this process {', '.join(each.identity for each in shown[:5])}, not {wanted}: its registration entry needs that id")
        check(each, None)
        if fault := control_fault(_native(each), self.domain):
            raise AgentError(f"the SVID that the SPIFFE agent gives cannot be used: {fault}")
        if each != self.held:
            self.held = each
            log.info("the SPIFFE agent has given a certificate", extra={"identity": each.identity, "not_after": round(self._ends()), "roots": len(each.bundle)})

    @property
    def _now(self) -> Shown:
        if self.held is None:
            raise CaError(f"the SPIFFE agent at {self.agent} gave nothing yet")
        return self.held

    def _chain(self) -> list[x509.Certificate]:
        return [x509.load_der_x509_certificate(each) for each in self._now.chain]

    def _ends(self) -> float:
        return self._chain()[0].not_valid_after_utc.timestamp()

    # -- the interface of Ca

    def load(self) -> None:
        """The agent's last word is what there is."""

    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join((*self._now.chain, b"/", *self._now.bundle))).hexdigest()

    @property
    def bundle(self) -> str:
        return self._now.bundle_pem

    def ends(self) -> Iterator[tuple[int, str, float]]:
        for number, der in enumerate(self._now.bundle, 1):
            yield number, "root", x509.load_der_x509_certificate(der).not_valid_after_utc.timestamp()
        yield 0, "svid", self._ends()

    def control_pair(self, lifetime: float) -> tuple[ec.EllipticCurvePrivateKey, list[x509.Certificate]]:
        key = serialization.load_der_private_key(self._now.key, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key, self._chain()

    def server_pem(self, lifetime: float) -> tuple[bytes, int]:
        return (self._now.chain_pem + self._now.key_pem).encode("ascii"), round(self._ends())

    def issue(self, request: str, service: str, lifetime: float, *, held: bytes | None = None) -> Issued:
        raise BadRequest("certificates of this mesh come from SPIRE: start the member with --spire (an edge: mesh.spire)")

    def revocations(self, serials: Iterable[tuple[str, int]], life: float) -> str:
        raise CaError("the authority is SPIRE's, and so would be its list")


def _native(each: Shown) -> Certificate:
    return parse_certificates(each.chain_pem.encode("ascii"))[0]


async def open_authority(mesh: MeshFile) -> Ca | SpireAuthority:
    """Return the authority that the file names, ready. Raises CaError."""
    if mesh.control.spire is None:
        return Ca(mesh.control.ca, mesh.trust_domain, keys_of(mesh)).open()
    try:
        agent = agent_at(None if mesh.control.spire == "env" else mesh.control.spire)
    except ValueError as error:
        raise CaError(f"control.spire: {error}") from None
    return await SpireAuthority(agent, mesh.trust_domain).open()
