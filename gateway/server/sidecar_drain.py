"""The way out of a sidecar, in order: leave the registry, wait, close inbound, and keep outbound until the app is gone.

Strategy: one step a method, each bounded by the deadline that began with the signal; a second signal (`hurry`) ends every wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from gateway.mesh.proxy import INBOUND

if TYPE_CHECKING:
    from gateway.server.sidecar import Sidecar

log = logging.getLogger("crossway.mesh")

CHECK = 0.02  # seconds between two looks whether something has ended


class Drain:
    """The end of one sidecar."""

    def __init__(self, sidecar: Sidecar) -> None:
        self.sidecar = sidecar
        self.end = sidecar.loop.time() + sidecar.setup.drain_delay + sidecar.setup.drain_deadline

    def in_time(self) -> bool:
        return not self.sidecar.hurry.is_set() and self.sidecar.loop.time() < self.end

    async def pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.sidecar.hurry.wait(), seconds)

    async def leave(self) -> None:
        """Tell the control plane, and let others learn of it; what was told before by SIGUSR2 counts."""
        sidecar, setup = self.sidecar, self.sidecar.setup
        log.info("stopping", extra={"delay": setup.drain_delay, "deadline": setup.drain_deadline})
        sidecar.gauges.set_gauge("ready", 0)
        sidecar.gauges.set_gauge("draining", 1)
        await sidecar.link.drain()
        await self.pause(setup.drain_delay if sidecar.left is None else max(0.0, sidecar.left + setup.drain_delay - sidecar.loop.time()))

    async def close_inbound(self) -> None:
        """Take no more connections of members, and end those that are open with their answers."""
        sidecar = self.sidecar
        sidecar.engine.leave(INBOUND)
        sidecar.sockets[INBOUND].close()
        log.info("inbound closed")
        while self.in_time() and sidecar.engine.serving(INBOUND):
            await asyncio.sleep(CHECK)

    async def close_outbound(self) -> None:
        """Serve the app's calls until it is gone."""
        sidecar = self.sidecar
        while self.in_time() and await sidecar.app_answers():
            await self.pause(10 * CHECK)
        sidecar.engine.drain()
        for sock in sidecar.sockets.values():
            sock.close()
        log.info("outbound closed")
        while self.in_time() and sidecar.engine.active():
            await asyncio.sleep(CHECK)

    async def finish(self, kind: str) -> None:
        """Tell what had to be cut off, an exchange or a connection, and let the process end."""
        sidecar = self.sidecar
        for each in sidecar.engine.unfinished():
            log.warning(f"{kind} cut off at the end of the drain", extra={kind: each})
        await sidecar.link.close()
        log.info("stopped", extra={"forced": sidecar.hurry.is_set()})
        if not sidecar.ended.done():
            sidecar.ended.set_result(None)
