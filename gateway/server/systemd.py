"""What systemd offers a service: readiness notification, the watchdog, and sockets opened before we start.

Strategy: both are environment variables and one datagram (sd_notify(3), sd_listen_fds(3)), so no library. Everything is
a no-op when the variables are absent. The variables are removed on first use: a worker's child must not speak for us.
"""

import os
import socket
import time

FIRST_FD = 3  # SD_LISTEN_FDS_START


class Notifier:
    """Sends state lines to the service supervisor named by $NOTIFY_SOCKET."""

    def __init__(self, address: str | None, watchdog: float | None = None) -> None:
        self.watchdog = watchdog  # seconds between WATCHDOG=1 lines, already halved; None: not asked for
        self._socket: socket.socket | None = None
        self._address = ""
        if address:
            self._address = "\0" + address[1:] if address.startswith("@") else address
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    @classmethod
    def from_environment(cls) -> "Notifier":
        """Read and remove $NOTIFY_SOCKET, $WATCHDOG_USEC and $WATCHDOG_PID."""
        usec, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        wanted = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(os.environ.pop("NOTIFY_SOCKET", None), int(usec) / 2e6 if wanted else None)

    def send(self, *lines: str) -> None:
        """Send state lines such as READY=1; a receiver that is gone or busy is no reason to stop serving."""
        if self._socket is not None:
            try:
                self._socket.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                pass

    def ready(self, status: str) -> None:
        self.send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=Reloading")

    def stopping(self, status: str) -> None:
        self.send("STOPPING=1", f"STATUS={status}")

    def ping(self) -> None:
        self.send("WATCHDOG=1")

    def close(self) -> None:
        """Say nothing more from this process."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def inherited_sockets() -> list[tuple[str, socket.socket]]:
    """Take the sockets of $LISTEN_FDS as (name, socket) and remove the variables; empty when they are not for us.

    The name is what FileDescriptorName= of the socket unit says; systemd's default is the unit's own name.
    """
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if not count.isdecimal() or pid != str(os.getpid()):
        return []
    found = []
    for index in range(int(count)):
        listening = socket.socket(fileno=FIRST_FD + index)
        listening.set_inheritable(False)
        listening.setblocking(False)
        found.append((names[index] if index < len(names) else "", listening))
    return found
