"""Listening sockets: opened by the supervisor, one per worker slot, kept while workers come and go.

Strategy: SO_REUSEPORT lets the kernel spread connections over the slots without a lock, and because the supervisor holds
a slot's socket open, a crashed worker's successor finds the connections that queued meanwhile. Sockets are bound before a
reload is agreed on (an address in use refuses the reload) and listen only once it is: a client is never accepted by a
configuration that is then taken back. Unix sockets and single sockets from systemd are shared by all slots.
"""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Collection
from dataclasses import dataclass, field

from gateway.config import Config
from gateway.config.web import Bind
from gateway.server.log import log

BACKLOG = 1024  # connections; the kernel caps it at net.core.somaxconn, 4096 since Linux 5.4


class BindError(Exception):
    """A listener cannot be bound; the text says which one, where, why and what to do."""


@dataclass
class Listener:
    """A bound listener: its configured address, the real one, and a socket per slot."""

    name: str
    bind: Bind  # as configured; port 0 stays 0
    address: Bind  # as the kernel says
    sockets: list[socket.socket]
    backlog: int = BACKLOG
    shared: bool = False  # one socket for all slots: Unix sockets, a single inherited socket
    inode: tuple[int, int] | None = None  # of a Unix socket's path that is ours to unlink
    extra: list[socket.socket] = field(default_factory=list)  # inherited sockets beyond the number of slots

    def listen(self) -> None:
        """Let clients connect; again for a changed backlog. Raises OSError (a port taken between bind and listen)."""
        for sock in self.sockets:
            sock.listen(self.backlog)

    def grow(self, slots: int) -> None:
        """Bind a socket for each of `slots` slots; new ones do not listen yet. Raises OSError."""
        while len(self.sockets) < slots:
            self.sockets.append(self.sockets[0] if self.shared else _tcp_socket(self.address, reuse_port=True))

    def shrink(self, slots: int) -> None:
        """Close this process's copies of the sockets beyond `slots`."""
        for sock in self.sockets[slots:]:
            if not self.shared:
                sock.close()
        del self.sockets[slots:]

    def close(self) -> None:
        """Close this process's copies; a Unix socket's path goes when it is still the one we made."""
        for sock in [*self.sockets, *self.extra]:
            sock.close()
        if self.inode is not None:
            with contextlib.suppress(OSError):
                status = os.stat(self.address.path)
                if (status.st_dev, status.st_ino) == self.inode:
                    os.unlink(self.address.path)

    def forget(self) -> None:
        """Close the copies inherited by a child that has no use for them; the path is not the child's."""
        self.inode = None
        self.close()


def open_listener(
    name: str, bind: Bind, slots: int, *, ours: Collection[int] = (), mode: int = 0o660, exclusive: bool = False
) -> Listener:
    """Bind a listener for `slots` workers without listening yet.

    `ours` are the ports that this gateway already holds; `mode` is a Unix socket's; `exclusive` is a single socket
    without SO_REUSEPORT. Raises BindError.
    """
    try:
        if bind.path:
            sock, inode = _unix_socket(bind.path, mode)
            return Listener(name, bind, bind, [sock] * slots, shared=True, inode=inode)
        if exclusive:
            first = _tcp_socket(bind, reuse_port=False)
            return Listener(name, bind, _real(first), [first] * slots, shared=True)
        if bind.port and bind.port not in ours:
            # With SO_REUSEPORT two gateways of one user would silently share a port; a bind without it shows the other.
            _tcp_socket(bind, reuse_port=False).close()
        first = _tcp_socket(bind, reuse_port=True)
        listener = Listener(name, bind, _real(first), [first])
        listener.grow(slots)
        return listener
    except OSError as error:
        raise BindError(f"listener {name}: cannot bind {bind}: {advice(error, bind)}") from None


def adopt(name: str, bind: Bind, slots: int, sockets: list[socket.socket]) -> Listener:
    """Make a listener of sockets that systemd opened; fewer than slots are shared by turns."""
    first = sockets[0]
    address = Bind(path=first.getsockname()) if first.family == socket.AF_UNIX else _real(first)
    chosen = [sockets[index % len(sockets)] for index in range(slots)]
    return Listener(name, bind, address, chosen, shared=len(sockets) < slots, extra=sockets[slots:])


def open_all(
    config: Config, slots: int, inherited: list[tuple[str, socket.socket]]
) -> tuple[dict[str, Listener], Listener]:
    """Bind the listeners and the admin socket of a starting gateway, from systemd's sockets where they fit.

    Raises BindError; what was opened until then is closed.
    """
    found: dict[str, Listener] = {}
    try:
        for name, section in config.listeners.items():
            taken = match_inherited(name, section.bind, inherited)
            ports = {listener.address.port for listener in found.values()}
            listener = (
                adopt(name, section.bind, slots, taken)
                if taken
                else open_listener(name, section.bind, slots, ours=ports)
            )
            listener.backlog = section.backlog
            found[name] = listener
        bind = config.admin.bind
        taken = match_inherited("admin", bind, inherited)
        admin = adopt("admin", bind, 1, taken) if taken else open_listener("admin", bind, 1, mode=0o600, exclusive=True)
    except BindError:
        for listener in found.values():
            listener.close()
        raise
    for name, unused in inherited:
        log.warning(
            "a socket from systemd fits no listener", extra={"socket": name, "address": str(unused.getsockname())}
        )
        unused.close()
    return found, admin


def match_inherited(name: str, bind: Bind, inherited: list[tuple[str, socket.socket]]) -> list[socket.socket]:
    """Take out of `inherited` the sockets that belong to a listener: by name, else by address."""
    chosen = [item for item in inherited if item[0] == name]
    chosen = chosen or [item for item in inherited if _same_address(item[1], bind)]
    for item in chosen:
        inherited.remove(item)
    return [sock for _, sock in chosen]


def _same_address(sock: socket.socket, bind: Bind) -> bool:
    if sock.family == socket.AF_UNIX:
        return bool(bind.path) and sock.getsockname() == bind.path
    return not bind.path and _real(sock) == bind


def _real(sock: socket.socket) -> Bind:
    host, port = sock.getsockname()[:2]
    return Bind(host, port)


def _tcp_socket(bind: Bind, *, reuse_port: bool) -> socket.socket:
    found = socket.getaddrinfo(bind.host, bind.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    family, kind, protocol, _, where = found[0]
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
    except OSError:
        sock.close()
        raise
    return sock


def _unix_socket(path: str, mode: int) -> tuple[socket.socket, tuple[int, int]]:
    """Bind a Unix socket; a file left by a process that is gone is replaced, a live one is not."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    umask = os.umask(0o777 & ~mode)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        status = os.stat(path)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(umask)
    return sock, (status.st_dev, status.st_ino)


def _stale(path: str) -> bool:
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


def advice(error: OSError, bind: Bind) -> str:
    """Return why an address cannot be bound, and what to do."""
    known = {
        errno.EADDRINUSE: f"it is in use by another process (ss -ltnp shows which); stop it or change bind: {bind}",
        errno.EACCES: "not permitted; ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE,"
        " a Unix socket needs a writable directory",
        errno.EADDRNOTAVAIL: "no interface of this machine has that address",
        errno.ENOENT: "the directory of the socket does not exist",
    }
    return known.get(error.errno or 0, error.strerror or str(error))
