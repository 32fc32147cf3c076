"""What the demo asks the control plane's state: tokens for those who are to join, and who is there.

Strategy: the functions behind `crossway mesh token` and `crossway mesh status`, without a process for each question. Where what a person
would type is to be seen, `command` runs it as typed.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gateway.config.mesh_load import load_mesh
from gateway.mesh import tokens
from gateway.mesh.ca import Ca
from gateway.mesh.keys import keys_of
from gateway.mesh.report import report
from gateway.mesh.store import open_store

TOKEN_LIFE = 600.0  # seconds
PATIENCE = 60.0  # seconds for a command


class Registry:
    """The state of one mesh, by its file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def tokens(self, wanted: Mapping[str, str]) -> None:
        """Write NAME.token beside the file for each name, of the service that it maps to."""

        async def make() -> None:
            mesh = load_mesh(str(self.file))
            authority = Ca(mesh.control.ca, mesh.trust_domain, keys_of(mesh)).open(make=False)
            store = await open_store(mesh.control.state)
            try:
                for name, service in wanted.items():
                    line = await tokens.make(store, service, authority.root_digest, TOKEN_LIFE)
                    handle = os.open(self.file.with_name(f"{name}.token"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                    os.write(handle, f"{line}\n".encode("ascii"))
                    os.close(handle)
            finally:
                await store.close()

        asyncio.run(make())

    def report(self) -> dict[str, Any]:
        """Return what `crossway mesh status --json` prints."""

        async def ask() -> dict[str, Any]:
            mesh = load_mesh(str(self.file))
            store = await open_store(mesh.control.state)
            try:
                return await report(store, mesh)
            finally:
                await store.close()

        return asyncio.run(ask())

    def instances(self) -> dict[str, dict[str, Any]]:
        """The rows of the report by the address where they are called; the edge, which nobody calls, by its service."""
        return {row["inbound"] or row["service"]: row for row in self.report()["instances"]}

    def command(self, *words: str) -> tuple[int, str]:
        """Run `crossway mesh ...` on the file, and return its status and what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "gateway", "mesh", *words, "-c", str(self.file)],
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        return done.returncode, (done.stdout + done.stderr).strip()

    def edit(self, old: str, new: str) -> None:
        """Change the file as an editor does it: a new one takes its place."""
        text = self.file.read_text(encoding="utf-8")
        if old not in text:
            raise ValueError(f"{self.file} does not say {old!r}")
        fresh = self.file.with_suffix(".new")
        fresh.write_text(text.replace(old, new), encoding="utf-8")
        fresh.rename(self.file)
