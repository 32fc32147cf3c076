"""A PostgreSQL server of its own for a test: loopback, a free port, nothing kept.

Strategy: the programs of the distribution; as root they are run as the user `postgres` (or `nobody`), since they refuse root.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.integration.processes import PATIENCE, eventually


def program(name: str) -> str | None:
    found = shutil.which(name)
    if found:
        return found
    paths = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(paths[-1]) if paths else None


def missing() -> str:
    """Why there can be no server here; empty when there can."""
    return "" if program("postgres") and program("initdb") else "PostgreSQL is not installed (apt-get install postgresql)"


def _user() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError("no user to run PostgreSQL as")


class Postgres:
    """The running server; its database `mesh` belongs to `mesh`, whose password is not used on a trusted socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        user = _user()
        self._as = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": ()}
        folder.mkdir(mode=0o700)
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = int(sock.getsockname()[1])
        initdb, postgres = program("initdb"), program("postgres")
        assert initdb and postgres
        self._run([initdb, "-D", str(folder / "data"), "-U", "mesh", "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8"])
        self.process = subprocess.Popen(
            [postgres, "-D", str(folder / "data"), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}"],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self._as,  # type: ignore[call-overload]
        )  # fmt: skip
        eventually(self._answers, "PostgreSQL")

    @property
    def url(self) -> str:
        return f"postgresql://mesh@127.0.0.1:{self.port}/postgres"

    def _run(self, words: Sequence[str]) -> None:
        subprocess.run(words, cwd=self.folder, check=True, capture_output=True, timeout=PATIENCE * 3, **self._as)  # type: ignore[call-overload]

    def _answers(self) -> bool:
        assert self.process.poll() is None, "PostgreSQL ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # fast shutdown
            self.process.wait(PATIENCE)

    def freeze(self) -> None:
        """Have it answer nobody."""
        self.process.send_signal(signal.SIGSTOP)


@contextlib.contextmanager
def open_postgres(folder: Path) -> Iterator[Postgres]:
    server = Postgres(folder)
    try:
        yield server
    finally:
        server.stop()
