"""A member's certificate through its life: joined once, renewed at half of it with a new key, kept until it ends.

Strategy: the work is done by a process of its own (enrol.py); here is when. Renewal is due at half-life, give or take a tenth, so that
members that started together do not ask together. What fails is tried again with growing pauses, while the old certificate serves; that
it is late is told at 60 % of its life and, louder, with 30 % left.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gateway._speedups.certificates import Certificate, PrivateKey, TlsError, parse_certificates, parse_key
from gateway.mesh.clock import Clock, stamp
from gateway.mesh.state import BUNDLE, SVID, State, StateError
from gateway.workload.admission import identity_of

log = logging.getLogger("crossway.mesh")

JITTER = 0.1  # of half a life, in both directions
FIRST, LONGEST = 1.0, 150.0  # seconds between two attempts
LATE, URGENT = 0.6, 0.7  # parts of a life after which it is told that no renewal has succeeded
EXPIRED = 15.0  # seconds between two attempts once the certificate is over, at most
LOOK = 5.0  # seconds; a clock that was set is noticed so soon
SOONEST = 1.0  # seconds from one renewal to the next
PATIENCE = 60.0  # seconds that one attempt may take


@dataclass(frozen=True)
class Svid:
    """The certificate that is held, its key, and the roots of the trust domain."""

    chain: list[Certificate]
    key: PrivateKey
    roots: list[Certificate]
    domain: str
    service: str

    @property
    def leaf(self) -> Certificate:
        return self.chain[0]

    @property
    def identity(self) -> str:
        return self.leaf.uris[0]

    def spent(self, now: float) -> float:
        """The part of its life that is over: 0 at its beginning, 1 at its end."""
        life = max(1, self.leaf.not_after - self.leaf.not_before)
        return (now - self.leaf.not_before) / life


def load(state: State) -> Svid | None:
    """Return what the folder holds; None when it holds nothing. Raises StateError for what cannot be used."""
    pair, bundle = state.read(SVID), state.read(BUNDLE)
    if pair is None or bundle is None:
        return None
    try:
        chain, key, roots = parse_certificates(pair), parse_key(pair), parse_certificates(bundle)
        domain, service = identity_of(chain[0])
        if not key.matches(chain[0]):
            raise StateError(f"{state.svid}: the key is not the certificate's")
    except (TlsError, ValueError) as error:
        raise StateError(f"{state.svid}: {error}") from None
    return Svid(chain, key, roots, domain, service)


def due_at(svid: Svid, draw: float) -> float:
    """When to renew, in unix seconds; `draw` is from -1 to 1."""
    half = (svid.leaf.not_after - svid.leaf.not_before) / 2
    return svid.leaf.not_before + half + half * JITTER * draw


def pause(failures: int, draw: float) -> float:
    """Seconds before the next attempt after `failures` in a row; `draw` is from -1 to 1, give or take a fifth."""
    return float(min(LONGEST, FIRST * 2 ** min(failures - 1, 20)) * (1 + 0.2 * draw))


@dataclass
class Identity:
    """Keeps the certificate of one member fresh. `changed` is called with each new one."""

    state: State
    job: dict[str, Any]  # service, control, instance, inbound, labels, zone
    changed: Callable[[Svid], None]
    svid: Svid | None = None
    renewals: int = 0
    failures: int = 0  # in a row
    failed: int = 0  # in all
    alarm: int = 0  # 0 in time, 1 late, 2 urgent
    error: str = ""
    proof: dict[str, Any] | None = None  # what one may join with again, should the certificate end: a pod's token, a pair of the bank's PKI
    lasting: bool = False  # the last failure will not pass by itself
    draw: Callable[[], float] = field(default=lambda: random.uniform(-1, 1))
    clock: Clock = field(default_factory=Clock)
    bundle_is_ours = False  # what assignments say of roots is not taken: they come with the certificate

    @property
    def place(self) -> dict[str, Any]:
        """Where this instance is, as its heartbeats say it."""
        return {key: self.job[key] for key in ("inbound", "labels", "zone")}

    async def join(self, proof: dict[str, Any]) -> bool:
        """Join by a `token`, as a pod (`kubernetes`) or by a `pair` of files, both under the root in `control_ca`; False when it did not work, and `error` says why."""
        return await self._attempt({**self.job, **proof, "kind": "join"})

    async def keep(self) -> None:
        """Renew for ever.

        When is measured from here on by the monotonic clock as well, so that a clock that is set back does not put it off; a clock that is set forward
        brings it on. After an attempt that failed only the pause counts, whatever the clocks say.
        """
        assert self.svid is not None
        due, at = self._plan(due_at(self.svid, self.draw()))  # unix time, infinite after a failure; monotonic time
        while True:
            await asyncio.sleep(min(LOOK, max(0.02, at - time.monotonic())))
            self.look(self.clock.latest())
            if time.monotonic() < at and self.clock.latest() < due:
                continue
            over = self.svid.leaf.not_after <= self.clock.latest()
            if await (self.join(self.proof) if over and self.proof is not None else self._attempt({**self.job, "kind": "renew"})):
                due, at = self._plan(self._next())
            else:
                due, at = math.inf, time.monotonic() + min(pause(self.failures, self.draw()), self._hurry())

    def _plan(self, due: float) -> tuple[float, float]:
        return due, time.monotonic() + due - self.clock.latest()

    def _next(self) -> float:
        """When the certificate that has just come is due, in unix seconds: with a clock that is ahead of its half, at half of what is left."""
        assert self.svid is not None
        due, now = due_at(self.svid, self.draw()), self.clock.latest()
        return due if due > now else now + max(SOONEST, (self.svid.leaf.not_after - now) / 2)

    def _hurry(self) -> float:
        """A certificate of minutes is not let expire over a pause made for one of days; one that is over needs no more hurry than the stream."""
        assert self.svid is not None
        left = self.svid.leaf.not_after - self.clock.latest()
        return EXPIRED if left <= 0 else max(0.2, left / 10)

    def look(self, now: float) -> None:
        """Tell that a renewal is late, once at each of the two marks."""
        assert self.svid is not None
        self.clock.look()
        spent = self.svid.spent(now)
        level = 0 if spent < LATE else 1 if spent < URGENT else 2
        if level > self.alarm:
            left = round(self.svid.leaf.not_after - now)
            told = {"identity": self.svid.identity, "seconds_left": left, "failures": self.failures, "error": self.error}
            if left <= 0:
                log.error("the certificate has expired and is not renewed; members refuse this one", extra=told | {"clock": stamp(now)})
            else:
                log.log(logging.ERROR if level == 2 else logging.WARNING, "the certificate is not renewed yet", extra=told)
        self.alarm = level

    async def _attempt(self, job: dict[str, Any]) -> bool:
        outcome = await run_enrol(job | {"state": str(self.state.folder)})
        self.lasting = bool(outcome.get("lasting"))
        try:
            if "error" in outcome:
                raise StateError(outcome["error"])
            fresh = load(self.state)
            if fresh is None:
                raise StateError("nothing was written")
        except StateError as error:
            self.failures += 1
            self.failed += 1
            self.error = str(error)
            log.log(
                logging.WARNING if job["kind"] == "renew" else logging.ERROR,
                "the certificate could not be renewed" if job["kind"] == "renew" else "joining the mesh failed",
                extra={"error": self.error, "failures": self.failures},
            )
            return False
        self.svid, self.failures, self.error, self.alarm = fresh, 0, "", 0
        self.renewals += job["kind"] == "renew"
        log.info(
            "certificate renewed" if job["kind"] == "renew" else "joined the mesh",
            extra={"identity": fresh.identity, "serial": fresh.leaf.serial, "not_after": fresh.leaf.not_after},
        )
        self.changed(fresh)
        return True


async def run_enrol(job: dict[str, Any]) -> dict[str, Any]:
    """Run the program; return its outcome, {"error": ...} when it did not work."""
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "gateway.mesh.enrol", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is for who asked for it, and he ends it
        )  # fmt: skip
    except OSError as error:  # no process, no memory or no descriptor to be had, or another version is being installed: it passes
        return {"error": f"the program that asks for certificates cannot be started: {error.strerror or error}"}
    try:
        said, _ = await asyncio.wait_for(process.communicate(json.dumps(job).encode()), PATIENCE)
        outcome = json.loads(said)
    except TimeoutError:
        return {"error": f"no answer within {PATIENCE:g} s"}
    except ValueError:
        return {"error": f"the program that asks for certificates ended with {process.returncode}"}
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return outcome if isinstance(outcome, dict) else {"error": "no outcome"}
