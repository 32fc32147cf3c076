"""The parent of all processes: binds, forks, reaps, and decides what the gateway runs.

Strategy: one thread, no event loop, no request ever passes through here. It turns on signals, messages and timers (wait.py);
what takes several steps is a state machine of its own: a reload (reload.py), a shutdown (drain.py). The rule that keeps it
alive: nothing here parses a file, imports a policy or waits for a child. `Programs` are the functions that the children
run; tests put small ones in their place.
"""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from gateway.config import Config
from gateway.config.cpus import available_cpus
from gateway.server import log as logs
from gateway.server.board import Board
from gateway.server.channel import Channel, ChannelClosed, Message
from gateway.server.checking import Checking
from gateway.server.children import Child, Condition, Role, Slot
from gateway.server.drain import Shutdown
from gateway.server.launch import AdminLaunch, Launch, Programs
from gateway.server.log import log
from gateway.server.process import exit_reason, name_process, spawn
from gateway.server.reload import Reload, Request
from gateway.server.report import Outcome, describe, warn_insecure
from gateway.server.sockets import Listener, open_all
from gateway.server.systemd import Notifier
from gateway.server.tickets import TicketKeys
from gateway.server.wait import Wait
from gateway.server.watchdog import SILENCE, Watchdog

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
LAST_WORDS = 1.0  # seconds that a child which closed its channel may live on


class Memory(Protocol):
    """What the supervisor needs of gateway.telemetry.shared.SharedState."""

    names: Any

    def fold(self, slot: int) -> None: ...

    def fold_checker(self) -> None: ...


class Supervisor:
    """Runs one gateway until it is told to stop; `run` returns the exit code of the program."""

    def __init__(
        self,
        path: Path,
        config: Config,
        memory: Memory,
        capacity: int,
        programs: Programs,
        *,
        workers: int | None = None,
        inherited: list[tuple[str, socket.socket]] | None = None,
        notifier: Notifier | None = None,
        seed: int | None = None,
        on_ready: Callable[[Supervisor], None] = lambda supervisor: None,
        silence: float = SILENCE,
    ) -> None:
        """`capacity` is the number of slots in `memory`; `workers` overrides the file's number, also after reloads."""
        self.path = path
        self.config = config
        self.version = 1
        self.loaded = time.time()
        self.memory = memory
        self.capacity = capacity
        self.programs = programs
        self.workers = workers
        self.seed = secrets.randbits(64) if seed is None else seed
        self.notifier = notifier or Notifier(None)
        self.on_ready = on_ready
        self.silence = silence
        self.board = Board(capacity + 1)  # the last word is the checker's
        self.wait = Wait(SIGNALS)
        self.tickets = TicketKeys(self.wait)
        self.children: dict[int, Child] = {}
        self.slots: list[Slot] = []
        self.listeners: dict[str, Listener] = {}
        self.admin_listener: Listener | None = None
        self.admin: Child | None = None
        self.checking = Checking(self)
        self.reload: Reload | None = None
        self.waiting: list[Request] = []  # asked for while a reload runs; one more reload answers all
        self.shutdown: Shutdown | None = None
        self.outcome = Outcome()
        self.restarts = 0
        self.announced = False
        self.exit_code: int | None = None
        self._inherited = inherited or []

    # -- start

    def bind(self) -> None:
        """Open every socket of the first configuration. Raises sockets.BindError."""
        self.listeners, self.admin_listener = open_all(self.config, self.worker_count(self.config), self._inherited)

    def run(self) -> int:
        """Start, and turn until the shutdown is complete; return the exit code."""
        name_process("crossway")
        # What exists now is never garbage: the collector of a child must not write to pages shared with its siblings.
        gc.collect()
        gc.freeze()
        self.start()
        while self.exit_code is None:
            self.turn()
        self.wait.close()
        return self.exit_code

    def start(self) -> None:
        """Listen and start the children."""
        for listener in [*self.listeners.values(), self.admin_listener]:
            if listener is not None:
                listener.listen()
        self.slots = [Slot(index) for index in range(self.worker_count(self.config))]
        for slot in self.slots:
            self.start_worker(slot)
        self.start_admin()
        self.checking.start()
        self.take_effect()
        Watchdog(self, self.silence).look()
        if self.notifier.watchdog:
            self._ping(self.notifier.watchdog)

    def take_effect(self) -> None:
        """What a configuration that is in force now asks of this process itself."""
        self.tickets.follow(self.config)
        warn_insecure(self.config)

    def worker_count(self, config: Config) -> int:
        if self.workers is not None:
            return self.workers
        return config.workers if isinstance(config.workers, int) else min(available_cpus(), self.capacity)

    # -- the loop

    def turn(self) -> None:
        """Sleep, then treat messages, signals and timers, in this order: a child's last message before its death."""
        signals, readable = self.wait.turn(child.channel for child in self.children.values())
        for child in list(self.children.values()):
            if child.channel.fileno() in readable:
                self._read(child)
        if signal.SIGCHLD in signals:
            self._reap()
        if signal.SIGUSR1 in signals:
            self._reopen_logs()
        if signal.SIGHUP in signals:
            log.info("reload asked for", extra={"by": "SIGHUP"})
            self.request_reload(Request("SIGHUP"))
        if signal.SIGTERM in signals or signal.SIGINT in signals:
            self._stop()
        self.wait.run_due()

    def _read(self, child: Child) -> None:
        try:
            messages = child.channel.messages()
        except ChannelClosed:
            # It ends, or closed the channel and lives on without us: then it may not live on.
            self.kill_after(child, LAST_WORDS)
            return
        for message in messages:
            self._take(child, message)

    def _take(self, child: Child, message: Message) -> None:
        kind = message["type"]
        if kind == "ready":
            child.condition = Condition.READY
            child.version = message.get("version", self.version)
            self._after_ready()
        elif kind == "reload":
            self.request_reload(Request("admin", child.pid, message["id"], message.get("expect")))
        elif kind in ("compiled", "refused", "prepared", "committed"):
            if self.reload is not None:
                self.reload.take(child, message)
        else:
            log.warning("a child sent an unknown message", extra={"role": child.role, "type": kind})

    def _after_ready(self) -> None:
        self.publish()
        expected = [self.admin, *(slot.child for slot in self.slots)]
        if not self.announced and all(child and child.condition is Condition.READY for child in expected):
            self.announced = True
            self.publish()
            self.notifier.ready(f"Serving with {len(self.slots)} workers")
            self.on_ready(self)

    # -- children

    def start_worker(self, slot: Slot) -> None:
        """Fork the worker of a slot with the configuration of now."""
        slot.respawn = None
        ours, theirs = Channel.pair()
        self.board.beat(slot.index)

        def main() -> int:
            logs.name_process(f"worker-{slot.index}")
            fds = {name: listener.sockets[slot.index].detach() for name, listener in self.listeners.items()}
            self._abandon(ours)
            config, version = self.config, self.version
            return self.programs.worker(
                Launch(slot.index, version, config, self.seed, theirs, fds, self.memory, self.board)
            )

        pid = spawn(main, f"crossway/w{slot.index}")
        theirs.close()
        slot.child = self.children[pid] = Child(Role.WORKER, pid, ours, slot.index, self.version)
        log.info("worker started", extra={"slot": slot.index, "child": pid, "version": self.version})
        if self.reload is not None:
            self.reload.include(slot.child)

    def start_admin(self) -> None:
        assert self.admin_listener is not None
        listener = self.admin_listener
        ours, theirs = Channel.pair()

        def main() -> int:
            logs.name_process("admin")
            sock = listener.sockets[0].dup()
            self._abandon(ours)
            return self.programs.admin(AdminLaunch(self.config, theirs, sock, self.memory, describe(self)))

        pid = spawn(main, "crossway/admin")
        theirs.close()
        self.admin = self.children[pid] = Child(Role.ADMIN, pid, ours, version=self.version)
        log.info("admin started", extra={"child": pid, "bind": str(listener.address)})

    def start_compiler(self, version: int, fd: int) -> Child:
        """Fork the child that reads the file again and writes the configuration to `fd`."""
        ours, theirs = Channel.pair()

        def main() -> int:
            logs.name_process("compiler")
            store = os.dup(fd)
            self._abandon(ours)
            return self.programs.compiler(self.path, version, self.seed, self.memory.names, theirs, store)

        pid = spawn(main, "crossway/config")
        theirs.close()
        child = self.children[pid] = Child(Role.COMPILER, pid, ours, version=version)
        return child

    def _abandon(self, ours: Channel) -> None:
        """In a new child: close what belongs to the supervisor and to the siblings.

        A listening socket held by anyone keeps receiving its share of connections, and a channel held by a sibling never
        reports its end.
        """
        self.wait.forget()
        ours.close()
        for child in self.children.values():
            child.channel.close()
        for listener in [*self.listeners.values(), self.admin_listener]:
            if listener is not None:
                listener.forget()
        if self.reload is not None:
            self.reload.forget()
        self.notifier.close()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self.children.get(pid)
            if child is not None:  # as PID 1 of a container we also inherit orphans; reaping them is all they need
                with contextlib.suppress(ChannelClosed):
                    for message in child.channel.messages():
                        self._take(child, message)
                self._buried(self.children.pop(pid), status)

    def _buried(self, child: Child, status: int) -> None:
        """A child ended: free what it held, and decide whether it gets a successor."""
        child.channel.close()
        if child.kill is not None:
            child.kill.cancel()
        reason = exit_reason(status)
        if child.role is Role.WORKER:
            self.memory.fold(child.slot)
            self._worker_ended(child, reason)
        elif child.role is Role.ADMIN and child is self.admin:
            self.admin = None
            if self.shutdown is None:
                log.error("admin ended, starting it again", extra={"child": child.pid, "reason": reason})
                self.wait.after(0.05 if child.age > 10 else 1.0, self._restart_admin)
        elif child.role is Role.CHECKER:
            self.memory.fold_checker()
            self.checking.ended(child, reason)
        if self.reload is not None:
            self.reload.lost(child, reason)
        if self.shutdown is not None:
            self.shutdown.lost(child)
        self.publish()

    def _worker_ended(self, child: Child, reason: str) -> None:
        slot = self.slots[child.slot] if child.slot < len(self.slots) else None
        if slot is None or slot.child is not child:
            log.info("worker of a removed slot ended", extra={"slot": child.slot, "child": child.pid, "reason": reason})
            if slot is not None and slot.child is None and slot.respawn is None:
                self.start_worker(slot)  # the slot was added again while its last worker drained
            return
        slot.child = None
        if self.shutdown is not None and self.shutdown.draining:
            log.info("worker ended", extra={"slot": slot.index, "child": child.pid, "reason": reason})
            return
        self.restarts += 1
        delay = slot.delay_after(child.age)
        log.error(
            "worker died, starting its successor",
            extra={
                "slot": slot.index,
                "child": child.pid,
                "reason": reason,
                "lived": round(child.age, 3),
                "delay": delay,
            },
        )
        slot.respawn = self.wait.after(delay, lambda: self.start_worker(slot))

    def _restart_admin(self) -> None:
        if self.admin is None and self.shutdown is None:
            self.start_admin()

    def signal_child(self, child: Child, number: signal.Signals) -> None:
        """Send a signal to a child that was not reaped yet, so its process id is still its own."""
        if child.pid in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)

    def kill_after(self, child: Child, seconds: float) -> None:
        if child.kill is None:
            child.kill = self.wait.after(seconds, lambda: self.signal_child(child, signal.SIGKILL))

    def retire(self, child: Child, deadline: float) -> None:
        """Let one worker finish what it has, for at most `deadline` seconds, and end."""
        child.condition = Condition.DRAINING
        child.channel.send({"type": "drain", "deadline": deadline})
        self.kill_after(child, deadline + 2.0)

    def _ping(self, seconds: float) -> None:
        self.notifier.ping()
        self.wait.after(seconds, lambda: self._ping(seconds))

    # -- what people ask for

    def request_reload(self, *requests: Request) -> None:
        """Start one reload for all of `requests`, or let them join the one that follows the one under way."""
        if self.reload is not None:
            self.waiting.extend(requests)
            return
        accepted = [request for request in requests if self._acceptable(request)]
        if accepted:
            self.reload = Reload(self, self.version + 1, accepted)
            self.notifier.reloading()
            self.reload.begin()

    def _acceptable(self, request: Request) -> bool:
        """Answer a request that cannot be served, and return False."""
        if self.shutdown is not None:
            refusal = {"error": "stopping", "text": "the gateway is stopping"}
        elif request.expect is not None and request.expect != self.config.digest:
            refusal = {
                "error": "mismatch",
                "text": f"the running configuration is {self.config.digest}, not {request.expect}",
            }
        else:
            return True
        self.answer([request], {"ok": False, "problems": [], **refusal})
        return False

    def reload_ended(self, requests: list[Request], result: Message) -> None:
        """A reload is over: tell those who asked, and serve those who came meanwhile."""
        self.reload = None
        self.outcome = Outcome(time.time(), result["ok"], self.version, result["problems"], result["text"])
        self.publish()
        self.answer(requests, result)
        if self.announced:
            # systemd waits for READY=1 after RELOADING=1 whatever the outcome; the status line tells it.
            words = "" if result["ok"] else "; the last reload failed, the old configuration serves"
            self.notifier.ready(f"Serving configuration {self.version} with {len(self.slots)} workers{words}")
        waiting, self.waiting = self.waiting, []
        self.request_reload(*waiting)

    def answer(self, requests: list[Request], result: Message) -> None:
        known = {"version": self.version, "hash": self.config.digest}
        for request in requests:
            child = self.children.get(request.pid)
            if child is not None:
                child.channel.send({"type": "reloaded", "id": request.id, **known, **result})

    def _reopen_logs(self) -> None:
        logs.reopen()
        for child in self.children.values():
            child.channel.send({"type": "reopen"})
        log.info("log files reopened")

    def _stop(self) -> None:
        if self.shutdown is None:
            self.shutdown = Shutdown(self, self.config.drain.delay, self.config.drain.deadline)
            self.shutdown.begin()
        else:
            self.shutdown.force()

    def publish(self) -> None:
        """Send the state to the admin process."""
        if self.admin is not None:
            self.admin.channel.send(describe(self))
