"""One reload: every worker changes to the new configuration, or none does.

Strategy: compile in a child, bind what is new, ask every worker to prepare, and only when all are prepared tell all to commit,
which in a worker is one assignment and cannot fail. Until that moment anything (a worker that refuses, dies or takes too
long, an address in use) aborts: prepared workers drop the new snapshot, new sockets are closed unheard. After it the new
configuration is the truth: a worker that dies now is replaced by one that starts with it.

    compiling -> preparing -> committing -> over
        '------------'-> aborted
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from gateway.config import Config
from gateway.server import log as logs
from gateway.server.channel import Message
from gateway.server.children import Child, Condition, Role, Slot
from gateway.server.log import log
from gateway.server.sockets import BindError, Listener, open_listener
from gateway.server.store import new_store, read_config
from gateway.server.wait import Timer

if TYPE_CHECKING:
    from gateway.server.supervisor import Supervisor

COMPILE_LIMIT = 60.0  # seconds
PREPARE_LIMIT = 60.0


@dataclass(frozen=True)
class Request:
    """Who asked for a reload: a signal, or request `id` of the admin process `pid`."""

    by: str
    pid: int = 0
    id: int = 0
    expect: str | None = None


class Stage(StrEnum):
    COMPILING = "compiling"
    PREPARING = "preparing"
    COMMITTING = "committing"
    OVER = "over"


class Reload:
    """The state of one reload; calls supervisor.reload_ended exactly once."""

    def __init__(self, supervisor: Supervisor, version: int, requests: list[Request]) -> None:
        self.supervisor = supervisor
        self.version = version
        self.requests = requests
        self.stage = Stage.COMPILING
        self.store = new_store()
        self.config: Config | None = None
        self.count = 0  # workers afterwards
        self.fresh: dict[str, Listener] = {}  # bound for this reload, by listener name
        self.gone: list[str] = []  # listeners that go, or move to another address
        self.fresh_admin: Listener | None = None
        self.compiler: Child | None = None
        self.asked: dict[int, Child] = {}  # workers told to prepare, by process id
        self.outstanding: set[int] = set()  # those of whom the present stage still needs an answer
        self.timer: Timer | None = None

    def begin(self) -> None:
        self.compiler = self.supervisor.start_compiler(self.version, self.store)
        self._limit(COMPILE_LIMIT, "compiling the configuration")

    def take(self, child: Child, message: Message) -> None:
        """Take a message of the compiler or of a worker that belongs to a reload."""
        kind = message["type"]
        if self.stage is Stage.COMPILING and child is self.compiler:
            if kind == "compiled":
                self._compiled()
            else:
                self._abort("invalid", message["text"], message["problems"])
        elif message.get("version") != self.version:
            return  # an answer to a reload that was aborted meanwhile
        elif self.stage is Stage.PREPARING and kind == "refused":
            self._abort("worker", f"worker {child.slot}: {message['text']}", message["problems"])
        elif self.stage is Stage.PREPARING and kind == "prepared":
            self.outstanding.discard(child.pid)
            if not self.outstanding:
                self._commit()
        elif self.stage is Stage.COMMITTING and kind == "committed":
            child.version = self.version
            self.outstanding.discard(child.pid)
            self._finish_if_all()

    def lost(self, child: Child, reason: str) -> None:
        """A child ended; before the commit a worker's death means that not all can change."""
        if child is self.compiler and self.stage is Stage.COMPILING:
            self._abort("compiler", f"reading the configuration ended with {reason}", [])
        elif self.stage is Stage.PREPARING and child.pid in self.asked:
            self._abort("worker", f"worker {child.slot} died during the reload ({reason})", [])
        elif self.stage is Stage.COMMITTING:
            self.outstanding.discard(child.pid)
            self._finish_if_all()

    def include(self, child: Child) -> None:
        """A worker was started during this reload with the configuration of before: it has to change as well."""
        if self.stage is Stage.PREPARING and child.slot < self.count:
            self._ask(child)

    def cancel(self, reason: str) -> None:
        """Give up because the gateway stops; a commit that has begun completes by itself."""
        if self.stage in (Stage.COMPILING, Stage.PREPARING):
            self._abort("stopping", reason, [])

    def forget(self) -> None:
        """In a forked child: close what belongs to this reload."""
        os.close(self.store)
        for listener in [*self.fresh.values(), self.fresh_admin]:
            if listener is not None:
                listener.forget()

    # -- the stages

    def _compiled(self) -> None:
        supervisor = self.supervisor
        try:
            self.config = config = read_config(self.store)
        except Exception as error:  # noqa: BLE001 - whatever it is, the old configuration goes on
            log.exception("the compiled configuration cannot be read")
            self._abort("compiler", f"the compiled configuration cannot be read: {error!r}", [])
            return
        self.count = supervisor.worker_count(config)
        if self.count > supervisor.capacity:
            text = (
                f"{supervisor.path}: workers: {self.count} is more than the {supervisor.capacity} that this process was started"
                " for; a restart makes room for them"
            )
            self._abort("invalid", text, [])
            return
        try:
            self._bind(config)
        except BindError as error:
            self._abort("bind", str(error), [])
            return
        except OSError as error:
            self._abort("bind", f"cannot open sockets for {self.count} workers: {error.strerror}", [])
            return
        self.stage = Stage.PREPARING
        self._limit(PREPARE_LIMIT, "preparing the workers")
        for slot in supervisor.slots[: self.count]:
            if slot.child is not None and slot.child.condition is not Condition.HUNG:
                self._ask(slot.child)
        if not self.outstanding:  # every worker is between two lives; the next ones start with the new configuration
            self._commit()

    def _bind(self, config: Config) -> None:
        """Bind the listeners that are new or moved, and the sockets of added slots. Raises BindError or OSError."""
        supervisor = self.supervisor
        old = supervisor.listeners
        self.gone = [
            name
            for name, held in old.items()
            if name not in config.listeners or config.listeners[name].bind != held.bind
        ]
        ports = {listener.address.port for listener in old.values()}
        for name, section in config.listeners.items():
            if name not in old or name in self.gone:
                self.fresh[name] = open_listener(name, section.bind, self.count, ours=ports)
                self.fresh[name].backlog = section.backlog
                ports.add(self.fresh[name].address.port)
            else:
                old[name].grow(self.count)
        if config.admin.bind != supervisor.config.admin.bind:
            self.fresh_admin = open_listener("admin", config.admin.bind, 1, mode=0o600, exclusive=True)

    def _ask(self, child: Child) -> None:
        self.asked[child.pid] = child
        self.outstanding.add(child.pid)
        sockets = [listener.sockets[child.slot].fileno() for listener in self.fresh.values()]
        message = {"type": "prepare", "version": self.version, "listen": list(self.fresh), "unlisten": self.gone}
        child.channel.send(message, [self.store, *sockets])

    def _commit(self) -> None:
        """All are prepared: from here on there is no way back."""
        supervisor = self.supervisor
        try:
            for listener in [*self.fresh.values(), self.fresh_admin]:
                if listener is not None:
                    listener.listen()
        except OSError as error:
            self._abort("bind", f"cannot listen: {error.strerror}", [])
            return
        assert self.config is not None
        self.stage = Stage.COMMITTING
        self._stop_timer()
        self._limit_commit()
        old_config, supervisor.config, supervisor.version = supervisor.config, self.config, self.version
        supervisor.loaded = time.time()
        closing = [supervisor.listeners.pop(name) for name in self.gone]
        supervisor.listeners.update(self.fresh)
        for name, listener in supervisor.listeners.items():
            listener.backlog = self.config.listeners[name].backlog
            listener.listen()
        self.outstanding = set(self.asked)
        for child in self.asked.values():
            child.channel.send({"type": "commit", "version": self.version})
        for listener in closing:
            listener.close()
        self._resize()
        if old_config.admin != self.config.admin or (old_config.mesh, self._calls(old_config)) != (self.config.mesh, self._calls(self.config)):
            self._renew_admin()
        supervisor.checking.change(old_config)
        self._change_log(old_config)
        supervisor.take_effect()
        self._finish_if_all()

    def _resize(self) -> None:
        """Start the workers of added slots, let those of removed ones finish."""
        supervisor = self.supervisor
        for slot in supervisor.slots[self.count :]:
            if slot.respawn is not None:
                slot.respawn.cancel()
            if slot.child is not None:
                supervisor.retire(slot.child, supervisor.config.drain.deadline)
        del supervisor.slots[self.count :]
        for listener in supervisor.listeners.values():
            listener.shrink(self.count)
        self.fresh = {}
        taken = {child.slot for child in supervisor.children.values() if child.role is Role.WORKER}
        for index in range(len(supervisor.slots), self.count):
            slot = Slot(index)
            supervisor.slots.append(slot)
            if index not in taken:  # else its last worker still drains; the supervisor starts this one at its end
                supervisor.start_worker(slot)

    def _calls(self, config: Config) -> object:
        """Which routes lead to services of the mesh: the admin process counts them as hops."""
        ways = {name: (upstream.service, upstream.traffic) for name, upstream in config.upstreams.items()}
        return config.mesh and [(route.name, [ways[name] for name in route.upstreams]) for route in config.routes]

    def _renew_admin(self) -> None:
        """Replace the admin process; the old one still sends the answer to the request that brought us here."""
        supervisor = self.supervisor
        old, moved = supervisor.admin, supervisor.admin_listener
        if self.fresh_admin is not None:
            supervisor.admin_listener, self.fresh_admin = self.fresh_admin, None
            if moved is not None:
                moved.close()
        supervisor.start_admin()
        if old is not None:
            supervisor.retire(old, 2.0)

    def _change_log(self, old: Config) -> None:
        assert self.config is not None
        if old.log != self.config.log:
            try:
                logs.set_up(self.config.log.file, self.config.log.level)
            except OSError as error:
                log.error("the new log file cannot be opened", extra={"error": str(error)})

    # -- the ends

    def _finish_if_all(self) -> None:
        if self.stage is Stage.COMMITTING and not self.outstanding:
            log.info("reload done", extra={"version": self.version, "hash": self.supervisor.config.digest})
            self._end({"ok": True, "text": "", "problems": []})

    def _abort(self, error: str, text: str, problems: list[object]) -> None:
        log.error("reload refused, the old configuration serves", extra={"reason": error, "text": text})
        for child in self.asked.values():
            child.channel.send({"type": "abort", "version": self.version})
        for listener in [*self.fresh.values(), self.fresh_admin]:
            if listener is not None:
                listener.close()
        for listener in self.supervisor.listeners.values():
            listener.shrink(len(self.supervisor.slots))
        if self.compiler is not None and self.stage is Stage.COMPILING:
            self.supervisor.signal_child(self.compiler, signal.SIGKILL)
        self._end({"ok": False, "error": error, "text": text, "problems": problems})

    def _end(self, result: Message) -> None:
        self.stage = Stage.OVER
        self._stop_timer()
        os.close(self.store)
        self.supervisor.reload_ended(self.requests, result)

    def _limit(self, seconds: float, what: str) -> None:
        self._stop_timer()
        text = f"{what} took more than {seconds:g} s"
        self.timer = self.supervisor.wait.after(seconds, lambda: self._abort("timeout", text, []))

    def _limit_commit(self) -> None:
        """A worker that cannot even assign is hung, and the watchdog's; those who asked need not wait for it."""

        def enough() -> None:
            self.outstanding.clear()
            self._finish_if_all()

        self.timer = self.supervisor.wait.after(self.supervisor.silence * 2, enough)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
