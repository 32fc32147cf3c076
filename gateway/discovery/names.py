"""One look-up of a name: where to ask, and what of the answer can be used.

Strategy: names that only this machine knows (without a dot, in /etc/hosts, localhost, .local) go to the C library in libuv's
threads, as nsswitch.conf orders; all others to name servers, because only those say how long an answer may be used. Addresses
that nothing can be sent to are left out, IPv6 ones also when this machine has no way to them.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.discovery.dns import Client, Missing, Unanswered
from gateway.discovery.dns_wire import AAAA, SRV, A, Reply, Service

MAX_HOSTS = 1 << 20  # bytes of /etc/hosts
_LOCAL = ("localhost", "local", "localdomain")
_NOWHERE = (b"\xff\xff\xff\xff", b"\0\0\0\0", bytes(16))


@dataclass(frozen=True, slots=True)
class Wanted:
    """A question: the addresses of a host, or the services of an SRV name; at `resolver` ("address:port") or wherever."""

    name: str
    service: bool = False
    resolver: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Values (addresses as text, or Services), and for how many seconds they hold: None when nothing says so.

    `unknown` are the IP versions of which nothing could be learned this time.
    """

    values: tuple[str | Service, ...]
    ttl: float | None = None
    unknown: tuple[int, ...] = ()


class HostsFile:
    """The names in /etc/hosts, read again when it changes."""

    def __init__(self, path: Path = Path("/etc/hosts")) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._names: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        try:
            status = os.stat(self._path)
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen != self._seen:
                with open(self._path, encoding="utf-8", errors="replace") as file:
                    lines = [line.partition("#")[0].split() for line in file.read(MAX_HOSTS).splitlines()]
                self._names = frozenset(word.lower().rstrip(".") for words in lines for word in words[1:])
                self._seen = seen
        except OSError:
            pass  # what was known stays
        return name.lower().rstrip(".") in self._names


class Lookups:
    """Answers questions; remembers nothing but the servers."""

    def __init__(self, hosts: HostsFile | None = None) -> None:
        self._hosts = hosts or HostsFile()
        self._clients: dict[str | None, Client] = {}

    async def ask(self, wanted: Wanted) -> Answer:
        """Return an answer with at least one value. Raises Missing or Unanswered."""
        if wanted.service:
            reply = await self._client(wanted.resolver).ask(wanted.name, SRV)
            return Answer(tuple(value for value in reply.values if isinstance(value, Service)), reply.ttl)
        if self._is_local(wanted):
            return Answer(usable(await _by_system(wanted.name)))
        return await self._addresses(wanted)

    def _is_local(self, wanted: Wanted) -> bool:
        if wanted.name.rpartition(".")[2] in _LOCAL:
            return True
        return wanted.resolver is None and ("." not in wanted.name or wanted.name in self._hosts)

    def _client(self, resolver: str | None) -> Client:
        if resolver not in self._clients:
            host, _, port = (resolver or "").rpartition(":")
            self._clients[resolver] = Client((host.strip("[]"), int(port)) if resolver else None)
        return self._clients[resolver]

    async def _addresses(self, wanted: Wanted) -> Answer:
        """Ask for both kinds of addresses at once; one kind is enough, but what is not known of the other is said."""
        client = self._client(wanted.resolver)
        four, six = await asyncio.gather(client.ask(wanted.name, A), client.ask(wanted.name, AAAA), return_exceptions=True)
        replies = [reply for reply in (four, six) if isinstance(reply, Reply)]
        failures = [each for each in (four, six) if isinstance(each, BaseException)]
        for failure in failures:
            if not isinstance(failure, (Missing, Unanswered)):
                raise failure
        if not replies:
            raise next((failure for failure in failures if isinstance(failure, Unanswered)), failures[0])
        unknown = tuple(version for version, each in ((4, four), (6, six)) if isinstance(each, Unanswered))
        raw = [value for reply in replies for value in reply.values if isinstance(value, bytes)]
        values = usable(socket.inet_ntop(socket.AF_INET if len(each) == 4 else socket.AF_INET6, each) for each in raw)
        return Answer(values, min(reply.ttl for reply in replies), unknown)


async def _by_system(name: str) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
            raise Missing("no such name") from None
        raise Unanswered(error.strerror or "no answer") from None
    except (OSError, UnicodeError) as error:
        raise Unanswered(str(error)) from None
    return list(dict.fromkeys(str(each[4][0]) for each in found))


def usable(addresses: Iterable[str]) -> tuple[str, ...]:
    """Return those addresses to which something can be sent. Raises Missing when there are none."""
    four: list[str] = []
    six: list[str] = []
    for text in addresses:
        raw = socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text.partition("%")[0])
        if raw not in _NOWHERE and not (raw[0] == 0xFF if len(raw) == 16 else 224 <= raw[0] < 240):
            (six if len(raw) == 16 else four).append(text)
    found = (*four, *_reachable(six))
    if not found:
        raise Missing("no address that something can be sent to")
    return found


def _reachable(addresses: Sequence[str]) -> Sequence[str]:
    """Return the IPv6 addresses that this machine has a route to. Connecting a datagram socket sends nothing."""
    if not addresses:
        return []
    try:
        probe = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    except OSError:
        return []
    with probe:
        found = []
        for address in addresses:
            try:
                probe.connect((address, 9))
            except OSError:
                continue
            found.append(address)
        return found
