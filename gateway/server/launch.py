"""What children are born with, and the programs they run.

Strategy: plain data, inherited through fork; separate from the supervisor so that a worker's module can name its own birth
certificate without importing its parent.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.config import Config
from gateway.server.board import Board
from gateway.server.channel import Channel, Message


@dataclass(frozen=True)
class Launch:
    """A worker's."""

    slot: int
    version: int
    config: Config
    seed: int
    channel: Channel
    listeners: dict[str, int]  # listener name: descriptor, the worker's to close
    memory: Any
    board: Board


@dataclass(frozen=True)
class AdminLaunch:
    """The admin process's."""

    config: Config
    channel: Channel
    sock: socket.socket
    memory: Any
    state: Message  # supervisor.describe() at the time of the fork


@dataclass(frozen=True)
class CheckerLaunch:
    """The checker's."""

    config: Config
    channel: Channel
    memory: Any
    board: Board
    beat: int  # its word of the board


@dataclass(frozen=True)
class Programs:
    """The functions that children run; each returns an exit code."""

    worker: Callable[[Launch], int]
    admin: Callable[[AdminLaunch], int]
    checker: Callable[[CheckerLaunch], int]
    compiler: Callable[[Path, int, int, Any, Channel, int], int]  # path, version, seed, names, channel, memfd
