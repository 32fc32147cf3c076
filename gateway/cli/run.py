"""`crossway run -c FILE`: start the gateway and stay until told to stop.

Strategy: everything a worker needs is imported here, before the fork, and then shared by all processes; what only the admin
process or a reload needs is imported there.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.cli import Subparsers

if TYPE_CHECKING:
    from gateway.config import Config
    from gateway.server.launch import AdminLaunch, CheckerLaunch
    from gateway.server.supervisor import Supervisor

CAPACITY = 32  # worker slots that shared memory is reserved for; untouched ones cost address space only


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("run", help="run the gateway")
    parser.add_argument("-c", "--config", metavar="FILE", required=True, help="the configuration, YAML")
    parser.add_argument("--workers", metavar="N", type=_count, help="worker processes, whatever the file says")
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1024")
    return int(text)


def run(parsed: argparse.Namespace) -> int:
    path = Path(parsed.config)
    if not path.is_file():
        print(f"crossway: {path}: there is no such file", file=sys.stderr)
        return 2
    from gateway.errors import ConfigError
    from gateway.server import log as logs
    from gateway.server.compiler import compile_file, compile_first
    from gateway.server.launch import Programs
    from gateway.server.sockets import BindError
    from gateway.server.supervisor import Supervisor
    from gateway.server.systemd import Notifier, inherited_sockets
    from gateway.server.worker import run as worker
    from gateway.telemetry.shared import SharedState

    logs.set_up()
    notifier, inherited = Notifier.from_environment(), inherited_sockets()
    capacity = max(CAPACITY, parsed.workers or 1, os.cpu_count() or 1)
    memory, seed = SharedState(workers=capacity), secrets.randbits(64)
    try:
        config = compile_first(path, seed, memory.names)
        _check_workers(path, config, capacity)
        logs.set_up(config.log.file, config.log.level)
        if config.redis is not None:
            import gateway.policies.cluster  # noqa: F401 - shared by all workers, like the rest
        supervisor = Supervisor(
            path,
            config,
            memory,
            capacity,
            Programs(worker, _admin, _checker, compile_file),
            workers=parsed.workers,
            inherited=inherited,
            notifier=notifier,
            seed=seed,
            on_ready=announce,
        )
        supervisor.bind()
    except ConfigError as error:
        print(error.render(), file=sys.stderr)
        return 2
    except (BindError, OSError) as error:
        print(f"crossway: {error}", file=sys.stderr)
        return 1
    return supervisor.run()


def _check_workers(path: Path, config: Config, capacity: int) -> None:
    from gateway.errors import ConfigError, Problem

    if isinstance(config.workers, int) and config.workers > capacity:
        raise ConfigError(
            [Problem(str(path), 0, 0, f"workers: {config.workers} is more than {capacity}, the most here")]
        )


def _admin(launch: AdminLaunch) -> int:
    # uvicorn, starlette and prometheus_client: imported in the one process that serves with them.
    from gateway.server.admin import run

    return run(launch)


def _checker(launch: CheckerLaunch) -> int:
    # h2 and httptools: imported in the one process that checks with them.
    from gateway.server.checker import run

    return run(launch)


def announce(supervisor: Supervisor) -> None:
    """Say on stdout where the gateway can be reached, once it can be."""
    lines = []
    for name, listener in supervisor.listeners.items():
        section = supervisor.config.listeners[name]
        if section.tcp is not None:
            address = str(listener.address)
            where = address if address.startswith("unix:") else f"tcp://{address}"
            lines.append((name, f"{where}  -> {', '.join(section.tcp.upstreams)}{' over TLS' if section.tls is not None else ''}"))
            continue
        offered = [route for route in supervisor.config.routes if route.listeners is None or name in route.listeners]
        secure = section.tls is not None
        lines.append((name, f"{url(str(listener.address), secure)}  -> {len(offered)} route{'' if len(offered) == 1 else 's'}"))
    if supervisor.admin_listener is not None:
        lines.append(("admin", url(str(supervisor.admin_listener.address))))
    lines.append(("workers", str(len(supervisor.slots))))
    width = max(len(name) for name, _ in lines)
    with suppress(OSError):
        print("\n".join(f"{name:<{width}}  {text}" for name, text in lines), flush=True)


def url(address: str, secure: bool = False) -> str:
    return address if address.startswith("unix:") else f"http{'s' if secure else ''}://{address}"
