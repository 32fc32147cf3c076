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
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.integration.pki import Issued
from tests.integration.processes import PATIENCE, eventually


def program(name: str) -> str:
    """Return where a program of PostgreSQL is; Debian puts the server's beside its libraries."""
    found = shutil.which(name) or next(iter(sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)), None)
    assert found is not None, f"{name} is missing: script/setup --test installs postgresql"
    return str(found)


def _user() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError("no user to run PostgreSQL as")


class Postgres:
    """The running server; all belongs to `owner`, who needs no password. With `identity` (certificate and key) it offers TLS."""

    def __init__(self, folder: Path, *, owner: str = "mesh", identity: Issued | None = None) -> None:
        self.folder, self.owner = folder, owner
        user = _user()
        self._as = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": ()}
        folder.mkdir(mode=0o700)
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = int(sock.getsockname()[1])
        options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}"]
        if identity is not None:
            identity.write(folder, "server")
            (folder / "server.key").chmod(0o600)
            for path in (folder / "server.crt", folder / "server.key"):
                if user is not None:
                    os.chown(path, user.pw_uid, user.pw_gid)
            options += ["-c", "ssl=on", "-c", f"ssl_cert_file={folder}/server.crt", "-c", f"ssl_key_file={folder}/server.key"]
        self._run([program("initdb"), "-D", str(folder / "data"), "-U", owner, "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8"])
        self.process = subprocess.Popen(
            [program("postgres"), "-D", str(folder / "data"), "-p", str(self.port), *options, "-F"],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self._as,  # type: ignore[call-overload]
        )  # fmt: skip
        eventually(self._answers, "PostgreSQL")

    @property
    def url(self) -> str:
        return f"postgresql://{self.owner}@127.0.0.1:{self.port}/postgres"

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
def open_postgres(*, owner: str = "mesh", identity: Issued | None = None) -> Iterator[Postgres]:
    # pytest's own folders are closed to the user that the server runs as.
    folder = Path(tempfile.mkdtemp(prefix="crossway-pg-"))
    folder.chmod(0o755)
    try:
        server = Postgres(folder / "server", owner=owner, identity=identity)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
