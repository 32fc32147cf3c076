"""Redirects an app's connections to its sidecar, and what comes for the app to its sidecar's inbound listener: nftables.

Strategy: one table of our own for each service, put in place and taken away whole in one transaction; nobody else's rules are read, changed
or flushed. Who is redirected is said by user id: the app is, the sidecar never is, so that nothing runs in circles. What cannot be
redirected (another family of addresses than the sidecar listens on) is refused by the kernel rather than let past.
"""

from __future__ import annotations

import ipaddress
import pwd
import re
import shutil
import subprocess
from dataclasses import dataclass, field

PREFIX = "crossway_mesh_"
PRIORITY = -110  # before the common place of nat rules: whatever others redirect, the app's own calls are ours first
GUARD = PRIORITY + 1  # after what every service of this host says of its own app's calls, in whatever order they came: it may be another one's that is called


class InterceptError(Exception):
    """It cannot be done; the text says why."""


@dataclass(frozen=True)
class Interception:
    """What is redirected for one service on this host."""

    service: str
    app_uid: int
    sidecar_uid: int
    outbound: int  # port
    inbound: int | None = None  # port; None: calls to the app are left alone
    app: int | None = None  # the app's port
    exclude_ports: tuple[int, ...] = ()  # of other servers, such as a database that is no part of the mesh
    exclude: tuple[str, ...] = field(default=())  # networks, likewise

    def check(self) -> None:
        """Raise InterceptError for what would run in circles or do nothing."""
        if self.app_uid == self.sidecar_uid:
            raise InterceptError("the app and the sidecar run as the same user: the sidecar's own calls would be redirected to itself")
        if (self.inbound is None) != (self.app is None):
            raise InterceptError("--inbound-port and --app-port belong together: what comes for the one goes to the other")
        if self.inbound is not None and self.inbound == self.app:
            raise InterceptError("the app's port is the sidecar's inbound port")


def user_id(text: str) -> int:
    """Return the id of a user given by number or name. Raises InterceptError."""
    if text.isascii() and text.isdecimal() and int(text) < 2**32 - 1:
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError:
        raise InterceptError(f"there is no user {text!r} on this machine") from None


def table(service: str) -> str:
    """Return the name of a service's table."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", service):
        raise InterceptError(f"{service!r} is no name of a service")
    return PREFIX + "".join(each if each.isalnum() else f"_{ord(each):02x}_" for each in service)


def rules(wanted: Interception) -> str:
    """Return the script that puts the service's table in place, whether or not there is one already."""
    wanted.check()
    begin = [f"meta skuid {wanted.sidecar_uid} return", "meta l4proto != tcp return"]
    output = [*begin, f"meta skuid != {wanted.app_uid} return", "ip daddr 127.0.0.0/8 return", "ip6 daddr ::1 return"]
    for text in wanted.exclude:
        network = ipaddress.ip_network(text)
        output.append(f"ip{'6' if network.version == 6 else ''} daddr {network} return")
    if wanted.exclude_ports:
        output.append(f"tcp dport {{ {', '.join(str(port) for port in sorted(set(wanted.exclude_ports)))} }} return")
    output.append(f"meta l4proto tcp redirect to :{wanted.outbound}")
    chains = [("output", "output", PRIORITY, output)]
    if wanted.inbound is not None:
        # Whoever on this host is neither app nor sidecar comes in as anybody does: by mutual TLS.
        guard = [*begin, f"fib daddr type local tcp dport {wanted.app} meta skuid != {wanted.app_uid} redirect to :{wanted.inbound}"]
        chains.append(("guard", "output", GUARD, guard))
        chains.append(("prerouting", "prerouting", PRIORITY, [f"fib daddr type local tcp dport {wanted.app} redirect to :{wanted.inbound}"]))
    body = "\n".join(
        f"  chain {name} {{\n    type nat hook {hook} priority {priority}; policy accept;\n"
        + "".join(f"    {rule}\n" for rule in lines) + "  }"
        for name, hook, priority, lines in chains
    )  # fmt: skip
    own = table(wanted.service)
    return f"table inet {own}\ndelete table inet {own}\ntable inet {own} {{\n{body}\n}}\n"


def removal(service: str) -> str:
    """Return the script that takes the service's table away, whether or not there is one."""
    name = table(service)
    return f"table inet {name}\ndelete table inet {name}\n"


def nft(script: str) -> None:
    """Run a script as one transaction. Raises InterceptError."""
    program = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin")
    if program is None:
        raise InterceptError("there is no nft on this machine: install nftables")
    done = subprocess.run([program, "-f", "-"], input=script, text=True, capture_output=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if line.strip()), f"exit code {done.returncode}")
        hint = " (it needs CAP_NET_ADMIN)" if "not permitted" in done.stderr else ""
        raise InterceptError(f"nft refuses the rules{hint}: {first}")
