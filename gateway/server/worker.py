"""A worker process: uvloop, one Engine, and the supervisor's orders.

Strategy: everything a request meets is in the engine and its snapshot; this module only carries them through their life:
start, prepare and commit of a reload, drain, end. Modules are imported before the fork and the collector is told to leave
them alone, so that an idle worker shares almost all of its memory with its siblings.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import uvloop

from gateway import policies
from gateway._speedups.engine import Engine
from gateway.discovery.book import counts
from gateway.errors import ConfigError
from gateway.server import log as logs
from gateway.server.board import HEARTBEAT
from gateway.server.channel import ChannelClosed, Message
from gateway.server.launch import Launch
from gateway.server.log import log
from gateway.server.store import problems_of, read_config
from gateway.snapshot import Snapshot, build, settled
from gateway.snapshot.resolve import Endpoints

PAGE = os.sysconf("SC_PAGESIZE")
LAST_WORDS = 2.0  # seconds for what policies do after the last exchange
DRAIN_CHECK = 0.02  # seconds between two looks at what is still in flight


@dataclass
class Prepared:
    """A configuration that was built but not committed."""

    version: int
    drain_deadline: float
    snapshot: Snapshot
    listen: dict[str, int]
    unlisten: list[str]
    waiting: asyncio.Task[None] | None = None  # until the snapshot has settled


class Worker:
    """One worker's life. Every method runs in its loop's thread, the only one that runs Python."""

    def __init__(self, launch: Launch, loop: asyncio.AbstractEventLoop) -> None:
        self.launch = launch
        self.loop = loop
        self.channel = launch.channel
        self.deadline = launch.config.drain.deadline
        self.gauges = launch.memory.slot(launch.slot)
        self.engine = Engine(launch.slot, self.gauges, launch.memory.buckets)
        self.snapshot: Snapshot = self._build(launch.config, launch.version)
        self._begin_with_neighbours()
        self.prepared: Prepared | None = None
        self.memory = os.open("/proc/self/statm", os.O_RDONLY)  # kept: a worker without free descriptors has to beat too
        self.stop_at: float | None = None  # loop time; None while serving
        self.ended: asyncio.Future[None] = loop.create_future()

    def _build(self, config: Any, version: int) -> Snapshot:
        memory, launch = self.launch.memory, self.launch
        return build(config, names=memory.names, seed=launch.seed, version=version, worker=launch.slot, memory=memory)

    def _begin_with_neighbours(self) -> None:
        """Know from the start which endpoints the other workers have found."""
        sources = [source for source in self.snapshot.sources if isinstance(source, Endpoints)]
        if sources:
            _, rows = self.launch.memory.upstream_rows()
            for source in sources:
                source.begin_with(rows)

    async def run(self) -> None:
        """Serve until drained."""
        self.snapshot.start(self.loop)
        self.engine.apply(self.snapshot)
        self.engine.start(self.loop)
        self.loop.add_signal_handler(signal.SIGUSR1, self._reopen)
        self._beat()
        # Connections wait in the backlog meanwhile; a SIGTERM ends a worker that serves nothing yet at once.
        if not await settled(self.snapshot):
            log.warning("serving before all upstream names are resolved and all keys are fetched")
        self.loop.add_signal_handler(signal.SIGTERM, lambda: self._drain(self.deadline))
        for name, fd in self.launch.listeners.items():
            self._listen(name, fd)
        self.loop.add_reader(self.channel.fileno(), self._orders)
        self._gauge_start()
        self._tell({"type": "ready", "version": self.launch.version})
        try:
            await self.ended
        finally:
            self.loop.remove_reader(self.channel.fileno())
            self.snapshot.stop()
            self.engine.close()
            await policies.end(LAST_WORDS)

    def _beat(self) -> None:
        """Tell the watchdog that the loop turns, and the metrics what it costs."""
        self.launch.board.beat(self.launch.slot)
        self.loop.call_later(HEARTBEAT, self._beat)
        self.gauges.set_gauge("cpu_us", time.process_time_ns() // 1000)
        for name, total in counts().items():
            self.gauges.add(name, total - self.gauges.counter(name))
        self.engine.show()
        self.gauges.set_gauge("rss", int(os.pread(self.memory, 128, 0).split()[1]) * PAGE)

    def _gauge_start(self) -> None:
        self.gauges.set_gauge("pid", os.getpid())
        self.gauges.set_gauge("started", int(time.time()))
        self.gauges.set_gauge("ready", 1)

    def _listen(self, name: str, fd: int) -> None:
        self.engine.listen(name, fd)
        os.close(fd)  # the engine works on a duplicate

    # -- orders

    def _orders(self) -> None:
        try:
            for message, fds in self.channel.receive():
                self._obey(message, fds)
        except ChannelClosed:
            log.error("the supervisor is gone; finishing what is in flight")
            self.loop.remove_reader(self.channel.fileno())
            self._drain(self.deadline)
        except Exception:  # noqa: BLE001 - whatever it was
            # A worker that half obeyed is worse than none: it ends, and its successor starts from a known state.
            log.exception("an order of the supervisor failed")
            self.ended.cancel()

    def _obey(self, message: Message, fds: list[int]) -> None:
        kind = message["type"]
        if kind == "prepare":
            self._prepare(message, fds)
        elif kind == "commit":
            self._commit(message["version"])
        elif kind == "abort":
            self._abort()
        elif kind == "drain":
            self._drain(message["deadline"])
        elif kind == "reopen":
            self._reopen()

    def _tell(self, message: Message) -> None:
        self.channel.send(message)
        if self.channel.pending:
            self.loop.add_writer(self.channel.fileno(), self._flush)

    def _flush(self) -> None:
        if self.channel.flush():
            self.loop.remove_writer(self.channel.fileno())

    def _prepare(self, message: Message, fds: list[int]) -> None:
        """Build the new snapshot beside the one that serves, and say whether that worked."""
        self._abort()
        version, (store, *sockets) = message["version"], fds
        try:
            config = read_config(store)
            snapshot = self._build(config, version)
            snapshot.start(self.loop)
        except Exception as error:  # noqa: BLE001 - whatever it is, the old configuration goes on
            for fd in sockets:
                os.close(fd)
            if isinstance(error, ConfigError):
                answer = problems_of(error)
            else:
                log.exception("the new configuration cannot be built")
                answer = {"problems": [], "text": repr(error)}
            self._tell({"type": "refused", "version": version, **answer})
        else:
            listen = dict(zip(message["listen"], sockets, strict=True))
            prepared = Prepared(version, config.drain.deadline, snapshot, listen, message["unlisten"])
            self.prepared = prepared
            prepared.waiting = self.loop.create_task(self._confirm(prepared))
        finally:
            os.close(store)

    async def _confirm(self, prepared: Prepared) -> None:
        """Say that a prepared snapshot can be committed, once its names and keys are there (or cannot be had)."""
        if not await settled(prepared.snapshot):
            log.warning("the new configuration is ready before all its names are resolved and all its keys are fetched")
        if self.prepared is prepared:
            self._tell({"type": "prepared", "version": prepared.version})

    def _commit(self, version: int) -> None:
        """Change to the prepared snapshot; exchanges in flight finish on the one they began with."""
        prepared, self.prepared = self.prepared, None
        if prepared is None or prepared.version != version:
            log.error("ordered to commit what was never prepared", extra={"version": version})
            self.ended.cancel()
            return
        for name in prepared.unlisten:
            self.engine.unlisten(name)
        old, self.snapshot = self.snapshot, prepared.snapshot
        self.engine.apply(prepared.snapshot)
        if prepared.snapshot.condemned is not None and (closed := self.engine.close_servers(prepared.snapshot.condemned)):
            log.warning("connections to revoked members closed", extra={"connections": closed})
        for name, fd in prepared.listen.items():
            self._listen(name, fd)
        old.stop()
        self.deadline = prepared.drain_deadline
        self._tell({"type": "committed", "version": version})

    def _abort(self) -> None:
        prepared, self.prepared = self.prepared, None
        if prepared is not None:
            if prepared.waiting is not None:
                prepared.waiting.cancel()
            prepared.snapshot.stop()
            for fd in prepared.listen.values():
                os.close(fd)

    def _reopen(self) -> None:
        logs.reopen()
        self.engine.reopen()

    # -- the end

    def _drain(self, seconds: float) -> None:
        """Stop accepting and finish within `seconds`; a second order may only bring the end nearer."""
        now = self.loop.time()
        if self.stop_at is None:
            self.stop_at = now + seconds
            self.gauges.set_gauge("ready", 0)
            self.gauges.set_gauge("draining", 1)
            self.engine.drain()
            self._finish()
        else:
            self.stop_at = min(self.stop_at, now + seconds)

    def _finish(self) -> None:
        assert self.stop_at is not None
        if self.ended.done():
            return
        if self.engine.active() and self.loop.time() < self.stop_at:
            self.loop.call_later(DRAIN_CHECK, self._finish)
            return
        for exchange in self.engine.unfinished():
            log.warning("exchange cut off at the end of the drain", extra={"exchange": exchange})
        self.ended.set_result(None)


def _report(loop: asyncio.AbstractEventLoop, details: dict[str, Any]) -> None:
    error = details.get("exception")
    log.error(
        "a callback failed",
        extra={"text": details.get("message")},
        exc_info=(type(error), error, error.__traceback__) if error is not None else None,
    )


def run(launch: Launch) -> int:
    """Be the worker of `launch`; return 0 after a drain, 1 when it cannot start."""
    faulthandler.enable()  # SIGABRT of the watchdog prints where Python stands
    # What was inherited is shared with the siblings as long as nobody writes to it; the collector would.
    gc.freeze()
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(_report)
    try:
        worker = Worker(launch, loop)
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(worker.run())
            return 0
        return 1
    except ConfigError as error:
        log.error("the configuration cannot be built", extra={"text": error.render()})
        return 1
    except Exception:  # noqa: BLE001 - logged as one line instead of a traceback on stderr
        log.exception("the worker cannot go on")
        return 1
