"""What the commands on a mesh's file have in common: the file, the state, and how mistakes are told.

Strategy: they work on the state and the authority's folder directly, so they need no access to a running control plane, and work while none runs;
who may read those files may do what they do.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.config.mesh_file import MeshFile
    from gateway.mesh.store import Store


def add_file(parser: argparse.ArgumentParser) -> None:
    """Add -c to a command's parser."""
    default = os.environ.get("CROSSWAY_MESH")
    parser.add_argument(
        "-c", "--config", metavar="FILE", default=default, required=default is None, help="the mesh's file; default: $CROSSWAY_MESH"
    )


def guarded(work: Callable[[], int]) -> int:
    """Run a command; tell what it cannot do: 2 for the file or the command line, 1 for the rest."""
    from gateway.errors import ConfigError
    from gateway.mesh.keys import CaError
    from gateway.mesh.store import StoreError

    try:
        return work()
    except ConfigError as error:
        print(error.render(), file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"crossway: {error}", file=sys.stderr)
        return 2
    except (CaError, StoreError) as error:
        print(f"crossway: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"crossway: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1


def load_in_force(path: str) -> MeshFile:
    """Return the mesh that counts: the file's, or that of the state when the file says so. Raises ConfigError or StoreError."""
    from gateway.config.mesh_load import load_mesh
    from gateway.mesh.documents import in_force
    from gateway.mesh.store import is_postgres, open_store

    own = load_mesh(path)
    if own.control.source == "file" or not (is_postgres(own.control.state) or os.path.exists(own.control.state)):
        return own

    async def read() -> MeshFile:
        store = await open_store(own.control.state)
        try:
            return (await in_force(store, own))[0]
        finally:
            await store.close()

    return asyncio.run(read())


def with_store(parsed: argparse.Namespace, work: Callable[[MeshFile, Store], Awaitable[int]]) -> int:
    """Run a command with the mesh's file and its state."""
    from gateway.config.mesh_load import load_mesh
    from gateway.mesh.documents import in_force
    from gateway.mesh.store import open_store

    async def run() -> int:
        own = load_mesh(parsed.config)
        store = await open_store(own.control.state)
        try:
            return await work((await in_force(store, own))[0], store)
        finally:
            await store.close()

    return guarded(lambda: asyncio.run(run()))
