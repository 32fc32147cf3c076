"""Read, check and compile a configuration in a short-lived child, so that the supervisor never runs foreign code.

Strategy: parsing YAML is slow and a Python policy's module may do anything when imported, so both happen in a child that is
thrown away. It proves that the configuration compiles, enters every name into the shared name table (workers then only look
names up), and leaves the validated configuration pickled in a memfd that is handed to all workers: one parse, one copy,
the same configuration in each, even when the file changes meanwhile. The pickle never leaves the process tree.
"""

import os
import pickle
import select
from pathlib import Path
from typing import Any

from gateway.config import Config, load
from gateway.config.source import Document
from gateway.errors import ConfigError, Problem
from gateway.server.channel import Channel, ChannelClosed, Message
from gateway.server.log import log
from gateway.server.process import exit_reason, spawn
from gateway.server.store import new_store, problems_of, read_config
from gateway.snapshot import build


def compile_file(path: Path, version: int, seed: int, names: Any, channel: Channel, fd: int) -> int:
    """Do the work in the child: write the configuration to `fd`, tell the outcome, return the exit code."""
    try:
        config = load(path)
        if config.mesh is not None and config.mesh.joined is None:
            line, column = config.where(("mesh", "state"))
            raise ConfigError([Problem(str(path), line, column, "this gateway has not joined the mesh: a restart joins")])
        if config.mesh is not None:
            from gateway.server.member import ensure_files

            ensure_files(config.mesh, [upstream.discovery.file for upstream in config.upstreams.values() if upstream.service and upstream.discovery.file])
        build(config, names=names, seed=seed, version=version)
        _forget_source(config)
        with open(fd, "wb", closefd=False) as file:
            pickle.dump(config, file, pickle.HIGHEST_PROTOCOL)
        message: Message = {"type": "compiled"}
    except ConfigError as error:
        message = {"type": "refused", **problems_of(error)}
    except (OSError, ValueError) as error:  # what a policy cannot open or make
        message = {"type": "refused", **problems_of(ConfigError([Problem(str(path), 0, 0, str(error))]))}
    except Exception as error:  # noqa: BLE001 - whatever it is, the old configuration goes on
        # Somebody's policy module or a defect of ours: the traceback is for the log, the sentence for the person.
        log.exception("the configuration cannot be compiled", extra={"file": str(path)})
        found = ConfigError([Problem(str(path), 0, 0, f"cannot be compiled: {error!r}; the log says where")])
        message = {"type": "refused", **problems_of(found)}
    _tell(channel, message)
    return 0


def _tell(channel: Channel, message: Message) -> None:
    channel.send(message)
    while not channel.flush():
        select.select([], [channel], [])


def become_member(path: Path) -> None:
    """Join the mesh of which the configuration says that the gateway is a member, and have its files. Raises ConfigError."""
    config = load(path)  # reaches no service yet, if it has to join first
    if config.mesh is None:
        return
    from gateway.server.member import MemberError, prepare

    try:
        prepare(config.mesh, config.zone)
    except MemberError as error:
        line, column = config.where(("mesh",))
        raise ConfigError([Problem(str(path), line, column, str(error))]) from None


def _forget_source(config: Config) -> None:
    """Drop the text of the file and the place of every value: workers never report on them, and would keep them forever."""
    document = Document(config.path)
    document.base = config.base
    document.secrets = config.document.secrets  # a policy's own words in a worker are redacted as they are here
    config._document = document


def compile_first(path: Path, seed: int, names: Any) -> Config:
    """Compile the configuration of a starting gateway in a child and wait for it. Raises ConfigError."""
    store = new_store()
    ours, theirs = Channel.pair()

    def main() -> int:
        ours.close()
        try:
            become_member(path)
        except ConfigError as error:
            _tell(theirs, {"type": "refused", **problems_of(error)})
            return 0
        return compile_file(path, 1, seed, names, theirs, store)

    try:
        pid = spawn(main, "crossway/config")
        theirs.close()
        message = _await_message(ours)
        _, status = os.waitpid(pid, 0)
        if message is None:
            raise ConfigError([Problem(str(path), 0, 0, f"reading it ended with {exit_reason(status)}")])
        if message["type"] != "compiled":
            raise ConfigError(Problem(**problem) for problem in message["problems"])
        return read_config(store)
    finally:
        ours.close()
        os.close(store)


def _await_message(channel: Channel) -> Message | None:
    try:
        while True:
            select.select([channel], [], [])
            for message in channel.messages():
                return message
    except ChannelClosed:
        return None
