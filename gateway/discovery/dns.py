"""Asks name servers, on the loop: UDP first, TCP when the answer is too long, one server after the other.

Strategy: every question has its own connected socket, so the kernel picks an unpredictable port and delivers only what comes
from that server; its identifier is random, and whatever does not answer it is passed over while the wait goes on. Every
question ends within LIFETIME. /etc/resolv.conf is read again when it changes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import secrets
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from gateway.discovery.dns_wire import (
    FORMERR,
    NOERROR,
    NXDOMAIN,
    RCODES,
    Malformed,
    Reply,
    encode_name,
    question,
    read_reply,
)

LIFETIME = 8.0  # seconds for one question, all servers and attempts together
ATTEMPT = 2.0  # seconds for one attempt; resolv.conf may make it shorter
ATTEMPTS = 2  # times that each server is asked
AT_ONCE = 32  # questions on their way; more wait
MAX_SERVERS = 8
MAX_SEARCH = 16
MAX_CONF = 64 << 10  # bytes of resolv.conf

ServerAddress = tuple[str, int]


class Unanswered(Exception):
    """No server gave an answer: nothing is known about the name. The text is the reason, as in SERVFAIL or a time-out."""


class Missing(Exception):
    """The servers say that there is no such name, or none with such records."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What resolv.conf(5) says."""

    servers: tuple[ServerAddress, ...] = (("127.0.0.1", 53),)
    search: tuple[str, ...] = ()
    ndots: int = 1
    attempt: float = ATTEMPT
    attempts: int = ATTEMPTS


def parse_settings(text: str) -> Settings:
    """Return the Settings of a resolv.conf; what is wrong or unknown in it is passed over, as the C library does."""
    servers: list[ServerAddress] = []
    search: tuple[str, ...] = ()
    numbers = {"ndots": 1, "timeout": int(ATTEMPT), "attempts": ATTEMPTS}
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0][0] in "#;":
            continue
        if words[0] == "nameserver" and len(servers) < MAX_SERVERS:
            try:
                ipaddress.ip_address(words[1].partition("%")[0])
            except ValueError:
                continue
            servers.append((words[1], 53))
        elif words[0] in ("search", "domain"):
            search = tuple(word.rstrip(".").lower() for word in words[1 : MAX_SEARCH + 1] if word.isascii() and word != ".")
        elif words[0] == "options":
            for word in words[1:]:
                name, _, number = word.partition(":")
                if name in numbers and number.isascii() and number.isdecimal():
                    numbers[name] = int(number[:6])
    return Settings(
        tuple(servers) or Settings().servers, search, min(numbers["ndots"], 15),
        min(ATTEMPT, max(1, numbers["timeout"])), min(5, max(1, numbers["attempts"])),
    )


class Client:
    """Asks the servers of resolv.conf, or one given server; the same object for as long as the process lives."""

    def __init__(self, server: ServerAddress | None = None, conf: Path = Path("/etc/resolv.conf")) -> None:
        self._conf = conf
        self._settings = Settings() if server is None else Settings((server,))
        self._fixed = server is not None
        self._seen: tuple[int, ...] | None = None
        self._slots = asyncio.Semaphore(AT_ONCE)

    def settings(self) -> Settings:
        """Return what holds now."""
        if not self._fixed:
            try:
                status = os.stat(self._conf)
                seen = (status.st_ino, status.st_mtime_ns, status.st_size)
                if seen != self._seen:
                    with open(self._conf, encoding="utf-8", errors="replace") as file:
                        self._settings = parse_settings(file.read(MAX_CONF))
                    self._seen = seen
            except OSError:
                pass  # what was known stays
        return self._settings

    async def ask(self, name: str, kind: int) -> Reply:
        """Return an answer with at least one value. Raises Missing or Unanswered."""
        settings = self.settings()
        missing: Missing | None = None
        for candidate in candidates(name, settings):
            try:
                async with self._slots, asyncio.timeout(LIFETIME):
                    return await _ask(candidate, kind, settings)
            except Missing as reason:
                missing = missing or reason
            except TimeoutError:
                raise Unanswered("no answer in time") from None
        raise missing or Missing("not a name that can be asked for")


def candidates(name: str, settings: Settings) -> list[str]:
    """Return the names to try in turn, as resolv.conf's search list and ndots order them."""
    if name.endswith("."):
        return [name.rstrip(".")]
    searched = [f"{name}.{suffix}" for suffix in settings.search if len(name) + len(suffix) < 253]
    return [name, *searched] if name.count(".") >= settings.ndots else [*searched, name]


async def _ask(name: str, kind: int, settings: Settings) -> Reply:
    """Ask every server in turn, several times. Raises Missing, Unanswered or ValueError."""
    try:
        wire = encode_name(name)
    except ValueError as error:
        raise Missing(str(error)) from None
    reason = "no answer in time"
    for _ in range(settings.attempts):
        for server in settings.servers:
            try:
                async with asyncio.timeout(settings.attempt):
                    reply = await _exchange(server, wire, kind)
            except TimeoutError:
                continue
            except (OSError, Malformed, asyncio.IncompleteReadError) as error:
                reason = f"{server[0]}: {getattr(error, 'strerror', None) or error}"
                continue
            if reply.rcode == NXDOMAIN:
                raise Missing("NXDOMAIN")
            if reply.rcode == NOERROR and not reply.values:
                raise Missing("no such record")
            if reply.rcode == NOERROR:
                return reply
            reason = RCODES.get(reply.rcode, f"RCODE {reply.rcode}")
    raise Unanswered(reason)


async def _exchange(server: ServerAddress, name: bytes, kind: int) -> Reply:
    reply = await _by_udp(server, name, kind, extended=True)
    if reply.rcode == FORMERR:  # a server from before RFC 6891
        reply = await _by_udp(server, name, kind, extended=False)
    return await _by_tcp(server, name, kind) if reply.truncated else reply


class _Datagrams(asyncio.DatagramProtocol):
    """Waits for the one datagram that answers."""

    def __init__(self, ident: int, name: bytes, kind: int) -> None:
        self._question = (ident, name, kind)
        self.answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, address: object) -> None:
        if self.answer.done():
            return
        try:
            reply = read_reply(data, *self._question)
        except Malformed as error:
            self.answer.set_exception(error)
        else:
            if reply is not None:
                self.answer.set_result(reply)

    def error_received(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_exception(error or ConnectionError("the socket was closed"))
            self.answer.exception()  # nobody may be waiting any more


async def _by_udp(server: ServerAddress, name: bytes, kind: int, *, extended: bool) -> Reply:
    ident = secrets.randbits(16)
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_INET6 if ":" in server[0] else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(server)  # of a datagram socket: returns at once
        transport, protocol = await loop.create_datagram_endpoint(lambda: _Datagrams(ident, name, kind), sock=sock)
    except BaseException:
        sock.close()
        raise
    try:
        transport.sendto(question(ident, name, kind, extended=extended))
        return await protocol.answer
    finally:
        transport.close()


async def _by_tcp(server: ServerAddress, name: bytes, kind: int) -> Reply:
    ident = secrets.randbits(16)
    reader, writer = await asyncio.open_connection(*server)
    try:
        message = question(ident, name, kind)
        writer.write(struct.pack("!H", len(message)) + message)
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        reply = read_reply(await reader.readexactly(length), ident, name, kind)
    finally:
        writer.transport.abort()
    if reply is None or reply.truncated:
        raise Malformed("not an answer to the question")
    return reply
