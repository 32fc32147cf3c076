"""Small programs for the supervisor's children, and a supervisor that a test turns by hand.

The worker accepts connections, answers each with one line (`slot pid version`) and obeys the orders of a reload; what its
configuration's first upstream is called decides how it misbehaves.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gateway.config import Config, load
from gateway.errors import ConfigError
from gateway.server.channel import Channel, ChannelClosed, Message
from gateway.server.launch import AdminLaunch, CheckerLaunch, Launch, Programs
from gateway.server.sockets import Listener
from gateway.server.store import problems_of, read_config
from gateway.server.supervisor import Supervisor

PATIENCE = 20.0  # seconds until a condition that never comes fails a test


class Memory:
    """Stands in for SharedState: remembers which slots were folded."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.folded: list[int] = []

    def fold(self, slot: int) -> None:
        self.folded.append(slot)

    def fold_checker(self) -> None:
        self.folded.append(-1)


def write_config(
    path: Path, *, workers: int = 2, behaviour: str = "good", extra: str = "", bind: str = "127.0.0.1:0"
) -> Path:
    path.write_text(
        f"version: 1\nworkers: {workers}\nadmin: {{bind: 127.0.0.1:0}}\nlisteners: {{public: {{bind: '{bind}'}}{extra}}}\n"
        f"upstreams: {{{behaviour}: {{targets: [127.0.0.1:9]}}}}\n"
        f"routes: [{{name: all, match: {{prefix: /}}, upstream: {behaviour}}}]\n"
    )
    return path


def behaviour(config: Config) -> str:
    return next(iter(config.upstreams))


def compiler(path: Path, version: int, seed: int, names: Any, channel: Channel, fd: int) -> int:
    try:
        config = load(path)
    except ConfigError as error:
        channel.send({"type": "refused", **problems_of(error)})
        return 0
    if behaviour(config) == "compiler-dies":
        os.kill(os.getpid(), signal.SIGKILL)
    with open(fd, "wb", closefd=False) as file:
        pickle.dump(config, file)
    channel.send({"type": "compiled"})
    return 0


def admin(launch: AdminLaunch) -> int:
    launch.channel.send({"type": "ready"})
    for _ in orders(launch.channel):
        pass
    return 0


def checker(launch: CheckerLaunch) -> int:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    launch.channel.send({"type": "ready"})
    for order in orders(launch.channel):
        launch.board.beat(launch.beat)
        if order is not None and order[0]["type"] == "drain":
            return 0
    return 0


def orders(
    channel: Channel, sockets: Callable[[], list[Any]] = list, accept: Callable[[Any], None] = print
) -> Iterator[Any]:
    """Yield the messages of the supervisor until it closes the channel or SIGTERM comes."""
    while True:
        ready, _, _ = select.select([channel, *sockets()], [], [], 0.05)
        for sock in ready:
            if sock is not channel:
                accept(sock)
        try:
            if channel in ready:
                yield from channel.receive()
            else:
                yield None
        except ChannelClosed:
            return


def worker(launch: Launch) -> int:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if behaviour(launch.config) == "dies-at-start":
        return 9
    held = {name: socket.socket(fileno=fd) for name, fd in launch.listeners.items()}
    prepared: tuple[list[str], dict[str, socket.socket]] | None = None
    version = launch.version

    def answer(sock: socket.socket) -> None:
        try:
            connection, _ = sock.accept()
        except BlockingIOError:
            return
        connection.sendall(f"{launch.slot} {os.getpid()} {version}".encode())
        connection.close()

    launch.channel.send({"type": "ready", "version": version})
    for order in orders(launch.channel, lambda: list(held.values()), answer):
        if behaviour(launch.config) != "hangs":
            launch.board.beat(launch.slot)
        message, fds = order or ({"type": ""}, [])
        if message["type"] == "prepare":
            store, *sockets = fds
            how = behaviour(read_config(store))
            os.close(store)
            number = message["version"]
            if how == "prepare-dies" and launch.slot == 1:
                return 9
            if how == "prepare-refused" and launch.slot == 1:
                launch.channel.send({"type": "refused", "version": number, "problems": [], "text": "no such key"})
            elif how != "prepare-slow":
                fresh = {name: socket.socket(fileno=fd) for name, fd in zip(message["listen"], sockets, strict=True)}
                prepared = (message["unlisten"], fresh)
                launch.channel.send({"type": "prepared", "version": number})
        elif message["type"] == "commit" and prepared is not None:
            for name in prepared[0]:
                held.pop(name).close()
            held.update(prepared[1])
            version = message["version"]
            launch.channel.send({"type": "committed", "version": version})
        elif message["type"] == "drain":
            if behaviour(launch.config) == "never-finishes" and message["deadline"] > 0:
                continue
            return 0
    return 0


class Running:
    """A supervisor with fake children, turned by the test."""

    def __init__(self, path: Path, *, silence: float = 30.0, **options: Any) -> None:
        self.memory = Memory()
        self.ready = 0
        programs = Programs(worker, admin, checker, compiler)
        self.supervisor = Supervisor(
            path, load(path), self.memory, 8, programs, on_ready=self._count, silence=silence, **options
        )
        self.supervisor.bind()
        self.answers: list[Message] = []

    def _count(self, supervisor: Supervisor) -> None:
        self.ready += 1

    def until(self, condition: Callable[[], Any]) -> Any:
        """Turn the supervisor until `condition` holds; return what it returned."""
        end = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < end, "the condition never came"
            if self.supervisor.exit_code is not None:
                raise AssertionError("the supervisor ended")
            self.supervisor.wait.after(0.02, lambda: None)
            self.supervisor.turn()
        return found

    def until_exit(self) -> int:
        end = time.monotonic() + PATIENCE
        while self.supervisor.exit_code is None:
            assert time.monotonic() < end, "it never ended"
            self.supervisor.wait.after(0.02, lambda: None)
            self.supervisor.turn()
        return self.supervisor.exit_code

    def listener(self, name: str = "public") -> Listener:
        return self.supervisor.listeners[name]

    def ask(self, name: str = "public") -> tuple[int, int, int]:
        """Connect to a listener; return (slot, pid, version) of the worker that answered."""
        with socket.create_connection(("127.0.0.1", self.listener(name).address.port)) as client:
            client.setblocking(False)
            self.until(lambda: select.select([client], [], [], 0)[0])
            slot, pid, version = client.recv(100).split()
        return int(slot), int(pid), int(version)

    def pids(self) -> list[int]:
        """The processes of the ready workers, by slot; empty until all are."""
        children = [slot.child for slot in self.supervisor.slots]
        if any(child is None or child.condition != "ready" for child in children):
            return []
        return [child.pid for child in children if child is not None]

    def reload(self) -> None:
        """Ask for a reload and turn until it is over."""
        os.kill(os.getpid(), signal.SIGHUP)
        self.until(lambda: self.supervisor.reload is not None)
        self.until(lambda: self.supervisor.reload is None)


@contextmanager
def running(path: Path, **options: Any) -> Iterator[Running]:
    """Start a supervisor and its children; stop them at the end whatever happened."""
    before = {number: signal.getsignal(number) for number in (1, 2, 10, 15, 17)}
    run = Running(path, **options)
    supervisor = run.supervisor
    try:
        supervisor.start()
        run.until(run.pids)
        yield run
    finally:
        for child in supervisor.children.values():
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            child.channel.close()
        for listener in [*supervisor.listeners.values(), supervisor.admin_listener]:
            if listener is not None:
                listener.close()
        supervisor.wait.close()
        for number, disposition in before.items():
            signal.signal(number, disposition)
