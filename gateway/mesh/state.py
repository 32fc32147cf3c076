"""A member's folder: its certificate with the key, the bundle, and the last assignment, each written whole or not at all.

Strategy: certificate and key are one file, so that one rename changes both; 0600, in a folder of 0700. What is written is on the
disk before it takes the old one's place. The folder belongs to one process at a time (a lock), because two members with one identity
would renew against each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
from pathlib import Path

log = logging.getLogger("crossway.mesh")

SVID = "svid.pem"  # the chain, then the private key
BUNDLE = "bundle.pem"  # roots of the trust domain
ASSIGNMENT = "assignment.json"  # {"version", "assignment", "signature"} as they came
MOST = 16 << 20  # bytes of a file that is read back


class StateError(Exception):
    """The folder cannot be used; the text says why."""


class State:
    """The files of one member below `folder`, which is made when it is not there. Raises StateError."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock = -1
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.folder.stat()
        except OSError as error:
            fault = "this is a file, and the member's state is a folder: name another" if isinstance(error, FileExistsError) else error.strerror
            raise StateError(f"{self.folder}: {fault}") from None
        if found.st_mode & 0o077:
            raise StateError(f"{self.folder}: others may enter it; chmod 0700 {self.folder}")

    @property
    def svid(self) -> Path:
        return self.folder / SVID

    @property
    def bundle(self) -> Path:
        return self.folder / BUNDLE

    def lock(self, role: str = "member") -> None:
        """Keep the folder for this process until it ends; `role` is what others may ask it for. Raises StateError when another one has it."""
        try:
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateError(f"{self.folder / 'lock'}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = -1
            raise StateError(f"{self.folder}: another process uses it") from None
        said = f"{role} {os.getpid()}\n".encode()
        try:
            os.pwrite(self._lock, said, 0)  # in the place of what was there: that needs no room on a disk that is full
            os.ftruncate(self._lock, len(said))
        except OSError as error:  # it is locked all the same, and serves
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock, 0)  # nobody may take the process of before for this one
            log.warning("who has the folder cannot be written down; `crossway mesh leave` will not find it", extra={"folder": str(self.folder), "error": error.strerror})

    def unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def read(self, name: str) -> bytes | None:
        """Return a file's content, None when there is none. Raises StateError when it cannot be read or others can."""
        path = self.folder / name
        try:
            with open(path, "rb") as file:
                if name == SVID and os.fstat(file.fileno()).st_mode & 0o077:
                    raise StateError(f"{path}: others may read it; it holds a private key: chmod 0600 {path}")
                content = file.read(MOST + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{path}: {error.strerror}") from None
        if len(content) > MOST:
            raise StateError(f"{path}: larger than {MOST >> 20} MiB")
        return content

    def instance(self, service: str, name: str | None = None) -> str:
        """Return the name of this instance of a service: `name`, or one that is drawn once. Raises StateError."""
        held = self.read("instance")
        if held is None or (name is not None and held != name.encode()):
            held = (name or f"{service}-{secrets.token_hex(6)}").encode()
            try:
                self.write("instance", held)
            except OSError as error:
                raise StateError(f"{self.folder / 'instance'}: {error.strerror}") from None
        return held.decode("ascii", "replace").strip()

    def write(self, name: str, content: bytes) -> None:
        """Put `content` in the place of the file, at once and lastingly. Raises OSError."""
        path, fresh = self.folder / name, self.folder / f".{name}.{os.getpid()}"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fresh.parent.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with open(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.rename(fresh, path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def owner(folder: str | Path, role: str) -> int | None:
    """Return the process that holds a folder's lock as `role`; None when there is none."""
    try:
        handle = os.open(Path(folder) / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None  # nobody holds it: what is written there is of one who has ended
    except OSError:
        words = os.pread(handle, 64, 0).decode("ascii", "replace").split()
        return int(words[1]) if len(words) == 2 and words[0] == role and words[1].isdecimal() else None
    finally:
        os.close(handle)
