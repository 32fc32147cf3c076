"""The checker process: asks the endpoints of every upstream that has a check, once for the whole machine.

Strategy: its own process, so that the number of workers does not multiply the checks and a slow check delays no request. What it
finds goes into the shared table, where workers see it at once; a crash leaves the last verdicts there.
"""

from __future__ import annotations

import asyncio
import gc
import signal

import uvloop

from gateway._speedups.upstream_table import CHECKER, UpstreamTable
from gateway.discovery.book import book_of
from gateway.discovery.found import Found
from gateway.health.runner import Checks, Verdict
from gateway.server import log as logs
from gateway.server.board import HEARTBEAT
from gateway.server.channel import ChannelClosed
from gateway.server.launch import CheckerLaunch
from gateway.server.log import log


class Checker:
    """The life of the process."""

    def __init__(self, launch: CheckerLaunch, loop: asyncio.AbstractEventLoop) -> None:
        self.launch = launch
        self.loop = loop
        self.channel = launch.channel
        self.leaving = asyncio.Event()
        self.still_checked: list[str] | None = None  # upstreams that a successor checks
        self.checks = Checks(launch.config, self._verdict)

    def _verdict(self, upstream: str, found: Found) -> Verdict:
        table: UpstreamTable = self.launch.memory.upstreams
        state = table.endpoint(
            CHECKER, upstream, str(found.address), target=found.host, zone=found.zone, weight=found.weight
        )
        if not state.shared:
            log.error(
                "no room in the shared table: the checks of this endpoint change nothing",
                extra={"upstream": upstream, "endpoint": str(found.address)},
            )
        return state

    async def run(self) -> None:
        """Check until told to leave."""
        book_of(self.loop).loud = False  # the workers find the same, and say so
        self.loop.add_reader(self.channel.fileno(), self._hear)
        self.loop.add_signal_handler(signal.SIGTERM, self.leaving.set)
        self.loop.add_signal_handler(signal.SIGUSR1, logs.reopen)
        self._beat()
        self.checks.start(self.loop)
        self.channel.send({"type": "ready"})
        await self.leaving.wait()
        self.checks.stop(self.still_checked)

    def _beat(self) -> None:
        self.launch.board.beat(self.launch.beat)
        self.loop.call_later(HEARTBEAT, self._beat)

    def _hear(self) -> None:
        try:
            messages = self.channel.messages()
        except ChannelClosed:
            self.loop.remove_reader(self.channel.fileno())
            self.leaving.set()
            return
        for message in messages:
            if message["type"] == "checked":
                self.still_checked = message["upstreams"]
            elif message["type"] == "drain":
                self.leaving.set()
            elif message["type"] == "reopen":
                logs.reopen()


async def _check(launch: CheckerLaunch) -> None:
    await Checker(launch, asyncio.get_running_loop()).run()


def run(launch: CheckerLaunch) -> int:
    """Be the checker until the supervisor ends it."""
    gc.freeze()
    try:
        uvloop.run(_check(launch))
    except Exception:  # noqa: BLE001 - logged as one line instead of a traceback on stderr
        log.exception("the checker cannot go on")
        return 1
    return 0
