"""Whether instances can be reached: the control plane shakes hands with each one where its callers would.

Strategy: an instance that says it is well may still be behind a wall, so its word alone is not enough; and one whose stream is lost may serve all the
same, so its silence is not either. Each control plane looks at the instances whose streams it holds or held last, spread over the interval and a bounded number at once, and says in the store which ones it cannot reach: a row
for each, which the next control plane that holds the stream inherits, so that verdicts do not change with streams. What is made of the rows,
and that never more than a part of a service is taken out, is the registry's (`judge`), and of those without a stream the hub's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import ssl
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gateway.config.mesh_file import Probe
from gateway.config.values import Rate
from gateway.config.web import parse_address
from gateway.mesh.limit import Bucket
from gateway.mesh.registry import OTHER, REACHED, Registry
from gateway.mesh.spiffe import service_id
from gateway.mesh.store import Row, StoreError

if TYPE_CHECKING:
    from gateway.mesh.ca import Ca
    from gateway.mesh.spire_authority import SpireAuthority

log = logging.getLogger("crossway.mesh")

TICK = 0.1  # seconds between two looks at what is due
AT_ONCE = 64
RATE = Rate(100, 1.0)  # handshakes; more instances than 100 in each second of the interval are looked at less often
AGAIN = 0.5  # seconds at most until an instance that cannot be reached is looked at when its stream is new
JITTER = 0.1  # of the interval, in both directions
LIFE = 86400.0  # seconds of the certificate that is shown
REASON = 200  # characters

Key = tuple[str, str]  # service, instance


def load_pair(context: ssl.SSLContext, pem: bytes) -> None:
    """Give a context a chain and its key that are on no disk: ssl reads files only, and this one has no name."""
    handle = os.memfd_create("control", os.MFD_CLOEXEC)
    try:
        os.write(handle, pem)
        context.load_cert_chain(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


@dataclass
class Target:
    """An instance whose stream is here, and what was found of it."""

    key: Key
    inbound: str
    failures: int = 0  # in a row
    out: bool = False  # the store says that it cannot be reached
    due: float = 0.0  # monotonic
    looking: bool = False
    reason: str = ""
    asked: str | None = None  # the server's name to ask for
    seen: float = 0.0  # monotonic, when it was reached last ...
    serial: str = ""  # ... and with which certificate,
    not_after: int = 0  # which is over then


@dataclass
class Prober:
    """Looks at the instances of one control plane. `changed` is called with every verdict.

    way: whether there is a way to an instance from here, and the server's name by which it is asked for, if any.
    """

    registry: Registry
    ca: Ca | SpireAuthority
    changed: Callable[[], None]
    counted: Callable[[bool], None] = lambda reached: None
    settings: Probe | None = None
    way: Callable[[Row], tuple[bool, str | None]] = lambda row: (True, None)
    targets: dict[Key, Target] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rows: list[Row] = []
        self._pace = Bucket(RATE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._context: ssl.SSLContext | None = None
        self._until = 0.0

    async def run(self) -> None:
        """Look, for ever."""
        try:
            while True:
                await asyncio.sleep(TICK)
                self._settle()
                if self.settings is not None:
                    self._begin(self.settings)
        finally:
            for task in self._tasks:
                task.cancel()

    def _settle(self) -> None:
        """Take over who is there now."""
        if self.settings is None or self.registry.rows is self._rows:
            return
        self._rows = self.registry.rows
        now, before, self.targets = time.monotonic(), self.targets, {}
        for row in self._rows:
            key = row["service"], row["instance"]
            if not row["connected"] or row["replica"] != self.registry.replica or not row["inbound"] or row["draining"] or not row["healthy"]:
                continue
            there, asked = self.way(row)
            if not there:
                if row["unreachable"] is not None:  # a verdict of when there was a way: nobody would ever take it back
                    self._start(self._forget(key))
                continue
            target = before.get(key)
            if target is None or (target.inbound, target.asked) != (row["inbound"], asked):
                wait = self.settings.interval if self.settings is not None else 0.0
                out = row["unreachable"] is not None
                # Who was found out of reach and has a new stream or place may be back; who has no stream may be gone.
                soon = out or row["connected"] == REACHED
                target = Target(key, row["inbound"], out=out, asked=asked, due=now + random.uniform(0, min(wait, AGAIN) if soon else wait))
            self.targets[key] = target

    def found(self, key: Key) -> Target | None:
        """Return what is known of an instance that can be reached, as far as anybody knows; None for one that cannot, or at which nobody looks."""
        target = self.targets.get(key) if self.settings is not None else None
        return None if target is None or target.out else target

    def _begin(self, settings: Probe) -> None:
        now = time.monotonic()
        due = [target for target in self.targets.values() if target.due <= now and not target.looking]
        for target in sorted(due, key=lambda each: each.due):
            if len(self._tasks) >= AT_ONCE or not self._pace.take():
                return
            target.looking = True
            target.due = now + settings.interval * random.uniform(1 - JITTER, 1 + JITTER)
            self._start(self._look(target, settings))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forget(self, key: Key) -> None:
        with contextlib.suppress(StoreError):
            await self.registry.reached(*key)
            self.changed()

    async def _look(self, target: Target, settings: Probe) -> None:
        try:
            fault = await self._fault(target, settings.timeout)
            if self.targets.get(target.key) is not target:
                return  # it moved or left meanwhile: this says nothing of where it is now
            self.counted(fault is None)
            target.reason = fault or ""
            target.failures = 0 if fault is None else target.failures + 1
            target.seen = time.monotonic() if fault is None else target.seen
            if fault is None and target.out:
                await self.registry.reached(*target.key)
                target.out = False
            elif fault is not None and not target.out and target.failures >= settings.failures:
                await self.registry.unreached(*target.key, fault)
                target.out = True
            else:
                return
            told = {"service": target.key[0], "instance": target.key[1], "inbound": target.inbound, "reason": target.reason}
            log.log(logging.WARNING if target.out else logging.INFO, "an instance cannot be reached" if target.out else "an instance can be reached again", extra=told)
            self.changed()
        except StoreError:
            pass  # the next look says it again
        finally:
            target.looking = False

    async def _fault(self, target: Target, timeout: float) -> str | None:
        """Why an instance cannot be reached; None when it can: it showed its service's certificate, and saw ours."""
        address = parse_address(target.inbound)
        writer = None
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_connection(address.host, address.port, ssl=self._tls(), server_hostname=target.asked)
                shown = writer.get_extra_info("peercert") or {}
                uris = [value for kind, value in shown.get("subjectAltName", ()) if kind == "URI"]
                if uris != [service_id(self.ca.domain, target.key[0])]:
                    return f"{OTHER}{', '.join(uris) or 'nobody of the mesh'} at {target.inbound}"[:REASON]
                target.serial, target.not_after = str(shown["serialNumber"]).lower().lstrip("0"), int(ssl.cert_time_to_seconds(str(shown["notAfter"])))
                with contextlib.suppress(OSError):
                    await reader.read(1)  # it ends the connection: going first could reset it in the middle of its handshake
        except TimeoutError:
            return f"no connection within {timeout:g} s" if writer is None else None
        except ssl.SSLError as error:
            return f"TLS: {getattr(error, 'verify_message', None) or error.reason or error}"[:REASON]
        except UnicodeError:
            return f"{target.asked} is no name to ask a server for"[:REASON]
        except OSError as error:
            return (error.strerror or str(error) or type(error).__name__)[:REASON]
        finally:
            if writer is not None:
                writer.transport.abort()
        return None

    def _tls(self) -> ssl.SSLContext:
        """Our identity and the roots of now."""
        if self._context is None or time.monotonic() > self._until:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False  # it is found by its address; who it is says its certificate's URI
            context.load_verify_locations(cadata=self.ca.bundle)
            load_pair(context, self.ca.server_pem(LIFE)[0])
            self._context, self._until = context, time.monotonic() + LIFE / 2
        return self._context

    def refresh(self) -> None:
        """The authority has changed."""
        self._context = None
