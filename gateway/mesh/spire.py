"""A member whose certificate comes from SPIRE, or another agent of the SPIFFE Workload API, instead of the mesh's own authority.

Strategy: the agent is asked by one call that stays open, and whatever it brings is written into the member's folder, so that everything else works
as with the mesh's own authority, a start while the agent is away too. Renewing is the agent's business; here it is watched, and told when it is
late. The bundle is the agent's alone: what an assignment says of roots is not taken.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass

from gateway._speedups.certificates import TlsError, chain_fault, parse_certificates, parse_key
from gateway.mesh.identity import LOOK, Identity, Svid, load, log, pause
from gateway.mesh.state import BUNDLE, SVID, State, StateError
from gateway.mesh.workload_api import Agent, AgentError, Shown, follow
from gateway.workload.admission import SERVICE, identity_of

LONGEST = 30.0  # seconds between two calls to the agent


def pick(shown: list[Shown], service: str) -> Shown:
    """Return the identity of a service among those that the agent holds for this process. Raises AgentError."""
    for each in shown:
        match = SERVICE.fullmatch(each.identity)
        if match is not None and match["name"] == service:
            return each
    held = ", ".join(each.identity for each in shown[:5])
    raise AgentError(f"the SPIFFE agent gives this process {held}, not spiffe://TRUST_DOMAIN/service/{service}: its registration entry needs that id")


def check(each: Shown, service: str | None) -> None:
    """Refuse what could not be used as an identity of the mesh. Raises AgentError."""
    try:
        chain, roots = parse_certificates(each.chain_pem.encode("ascii")), parse_certificates(each.bundle_pem.encode("ascii"))
        key = parse_key(each.key_pem.encode("ascii"))
        if service is not None and identity_of(chain[0])[1] != service:
            raise ValueError(f"it is for {chain[0].uris[0]}")
        if chain[0].uris != (each.identity,):
            raise ValueError(f"it says {', '.join(chain[0].uris)} and is said to be {each.identity}")
    except (TlsError, ValueError) as error:
        raise AgentError(f"the SVID that the SPIFFE agent gives cannot be used: {error}") from None
    if not key.matches(chain[0]):
        raise AgentError("the SVID that the SPIFFE agent gives is not for the key that came with it")
    if chain[0].kind != "ecdsa" or chain[0].bits != 256:
        raise AgentError(f"the SPIFFE agent makes keys of {chain[0].kind} {chain[0].bits}; the mesh's are ECDSA P-256: workload_x509_svid_key_type = \"ec-p256\"", True)
    if fault := chain_fault(chain, roots):
        clock = " (is this machine's clock right?)" if "yet valid" in fault or "expired" in fault else ""
        raise AgentError(f"the SVID that the SPIFFE agent gives does not lead to its bundle: {fault}{clock}")


def write(state: State, each: Shown, service: str) -> bool:
    """Put an identity into a member's folder, checked; False when it is there already. Raises AgentError or OSError."""
    check(each, service)
    bundle, pair = each.bundle_pem.encode("ascii"), (each.chain_pem + each.key_pem).encode("ascii")
    if state.read(BUNDLE) == bundle and state.read(SVID) == pair:
        return False
    state.write(BUNDLE, bundle)
    state.write(SVID, pair)
    return True


async def fetch(state: State, service: str, agent: Agent, patience: float) -> None:
    """Ask the agent once and write what it gives. Raises AgentError or OSError."""
    try:
        async with asyncio.timeout(patience):
            async with aclosing(follow(agent)) as answers:
                write(state, pick(await anext(answers), service), service)
    except TimeoutError:
        raise AgentError(f"the SPIFFE agent at {agent} gave nothing within {patience:g} s") from None


@dataclass
class SpireIdentity(Identity):
    """The certificate of a member as the agent gives it; what Identity says of times and alarms holds here too."""

    agent: Agent | None = None
    bundle_is_ours = True

    async def join(self, proof: dict[str, object]) -> bool:
        """Take what the agent gives first; False when that is nothing, and `error` says why."""
        return await self._hold(once=True)

    async def keep(self) -> None:
        """Follow the agent for ever."""
        watching = asyncio.ensure_future(self._watch())
        try:
            while True:
                await self._hold(once=False)
                await asyncio.sleep(min(LONGEST, pause(max(1, self.failures), self.draw())))
        finally:
            watching.cancel()

    async def _watch(self) -> None:
        while True:
            self.look(self.clock.latest())
            await asyncio.sleep(LOOK)

    async def _hold(self, once: bool) -> bool:
        """Hold one call to the agent for as long as it lasts, or until it has given something."""
        assert self.agent is not None
        try:
            async with aclosing(follow(self.agent)) as answers:
                async for shown in answers:
                    self._take(pick(shown, self.job["service"]))
                    self.failures, self.error, self.lasting = 0, "", False
                    if once:
                        return True
        except (AgentError, StateError, OSError) as error:
            self.failures += 1
            self.failed += 1
            self.error, self.lasting = str(error), isinstance(error, AgentError) and error.lasting
            if self.failures in (1, 10) or self.failures % 100 == 0:
                log.warning("the SPIFFE agent gives nothing", extra={"error": self.error, "failures": self.failures})
        return False

    def _take(self, each: Shown) -> None:
        before = self.svid
        if not write(self.state, each, self.job["service"]) and before is not None:
            return
        fresh = load(self.state)
        assert fresh is not None
        if before is not None and fresh.domain != before.domain:
            log.warning("the trust domain of this member is another", extra={"identity": fresh.identity, "before": before.identity})
        self.svid = fresh
        renewed = before is not None and fresh.leaf.serial != before.leaf.serial
        self.renewals += renewed
        self.alarm = 0 if renewed else self.alarm
        log.info(_event(before, renewed), extra={"identity": fresh.identity, "serial": fresh.leaf.serial, "not_after": fresh.leaf.not_after, "roots": len(fresh.roots)})
        self.changed(fresh)


def _event(before: Svid | None, renewed: bool) -> str:
    return "joined the mesh" if before is None else "certificate renewed" if renewed else "bundle changed"
