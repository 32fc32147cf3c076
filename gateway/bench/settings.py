"""What a run sends, where to, how fast: read from words, checked once.

Strategy: one frozen object holds everything that shapes a run, so that the result can name all of it. Header values are not
among what is named: they hold tokens.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
TARGET = re.compile(r"/[\x21-\x7e]*")
HOST = re.compile(r"[0-9A-Za-z:._-]{1,255}")
VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
FRAMING = {"content-length", "transfer-encoding", "connection"}
PORTS = {"http": 80, "https": 443}
UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class UsageError(ValueError):
    """The words cannot be understood; the text says which, and what is expected."""


def seconds(text: str, bare: str = "s") -> float:
    """Read 90, 1.5s, 250ms, 2m as seconds; `bare` is the unit of a plain number. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)?", text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a duration such as 10s, 250ms or 2m")
    return float(match[1]) * UNITS[match[2] or bare]


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many errors a run may have: a number, or a share of its requests."""

    number: float
    share: bool

    @classmethod
    def read(cls, text: str) -> Allowance:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
        if match is None or (not match[2] and "." in match[1]):
            raise UsageError(f"{text!r} is neither a number of errors nor a share such as 0.1%")
        return cls(float(match[1]), bool(match[2]))

    def exceeded(self, errors: int, requests: int) -> bool:
        """True when `errors` of `requests` are more than allowed."""
        return errors > (self.number / 100 * requests if self.share else self.number)

    def __str__(self) -> str:
        return f"{self.number:g}%" if self.share else f"{self.number:g}"


def statuses(text: str) -> frozenset[int]:
    """Read `2xx,304` as the statuses that count as an answer. Raises UsageError."""
    found: set[int] = set()
    for word in text.split(","):
        if re.fullmatch(r"[2-5]xx", word):
            found |= set(range(int(word[0]) * 100, int(word[0]) * 100 + 100))
        elif re.fullmatch(r"[2-5]\d\d", word):
            found.add(int(word))
        else:
            raise UsageError(f"{word!r} is not a status such as 200 or 2xx")
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """How https is spoken; by default the server is verified by this machine's authorities, and no session is resumed."""

    cacert: Path | None = None
    cert: Path | None = None
    key: Path | None = None  # None: it lies in the file of `cert`
    server_name: str | None = None  # None: the URL's host
    insecure: bool = False
    resume: bool = False

    def check(self, https: bool) -> None:
        """Raises UsageError for what contradicts itself."""
        if not https and self != TlsOptions():
            raise UsageError("--cacert, --cert, --key, --server-name, --insecure and --resume are about https")
        if self.insecure and self.cacert is not None:
            raise UsageError("--insecure verifies nothing, so --cacert is never used; remove one of them")
        if self.key is not None and self.cert is None:
            raise UsageError("--key without --cert: name the certificate, too")
        if self.server_name is not None and not HOST.fullmatch(self.server_name):
            raise UsageError(f"--server-name {self.server_name!r} is not a host name such as pay.bank.example")

    def described(self) -> dict[str, Any]:
        """The options as they stand in a result."""
        return {
            "verify": not self.insecure,
            "cacert": None if self.insecure else str(self.cacert or "system"),
            "client_certificate": self.cert is not None,
            "server_name": self.server_name,
            "resume": self.resume,
        }


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. rate: requests a second, None for a closed loop; times in seconds."""

    url: str
    rate: float | None
    connections: int = 16
    duration: float = 10.0
    warmup: float = 2.0
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    poisson: bool = False
    seed: int = 1
    accepted: str = "2xx,3xx"
    timeout: float = 10.0
    keep_alive: bool = True
    max_errors: Allowance = Allowance(0, False)
    tls: TlsOptions = TlsOptions()

    def check(self) -> None:
        """Raises UsageError for what cannot be run."""
        self.address()
        self.tls.check(self.https)
        self.request()
        statuses(self.accepted)
        if self.rate is not None and not 0 < self.rate <= 1e7:
            raise UsageError("--rate must be above 0 and at most 10,000,000 a second, or `max`")
        if self.rate is None and self.poisson:
            raise UsageError("--poisson spreads a rate; with --rate max there is none")
        if not 1 <= self.connections <= 60_000:
            raise UsageError("--connections must be from 1 to 60000")
        if not 0 < self.duration <= 86_400 or not 0 <= self.warmup <= 86_400 or not 0 < self.timeout <= 3_600:
            raise UsageError("--duration and --timeout must be above 0, --warmup at least 0, and none longer than a day")

    @property
    def https(self) -> bool:
        """Whether the URL asks for TLS."""
        return urlsplit(self.url).scheme == "https"

    def address(self) -> tuple[str, int, str, str]:
        """Return (host, port, Host field, request target). Raises UsageError."""
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"{self.url!r}: {error}") from None
        if parts.scheme not in PORTS or not host:
            raise UsageError(f"{self.url!r} is not a URL such as http://127.0.0.1:8080/path or https://bank.example/path")
        if parts.username is not None:
            raise UsageError("credentials in the URL are not sent; use -H 'Authorization: ...'")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not TARGET.fullmatch(target):
            raise UsageError(f"the path {target!r} holds characters that must be percent-encoded")
        return host, PORTS[parts.scheme] if port is None else port, parts.netloc, target

    def resolve(self) -> tuple[str, int]:
        """Return (numeric address, port), the first that the resolver gives. Raises OSError."""
        host, port, _, _ = self.address()
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return str(found[0][4][0]), port

    def request(self) -> bytes:
        """Return the bytes of every request. Raises UsageError."""
        _, _, authority, target = self.address()
        if not TOKEN.fullmatch(self.method) or self.method in ("CONNECT", "TRACE"):
            raise UsageError(f"{self.method!r} is not a method that can be sent")
        lines = [f"{self.method} {target} HTTP/1.1"]
        names = set()
        for name, value in self.headers:
            if not TOKEN.fullmatch(name) or not VALUE.fullmatch(value):
                raise UsageError(f"the header {name!r} has an invalid name or value")
            if name.lower() in FRAMING:
                raise UsageError(f"{name} is set by the generator itself")
            names.add(name.lower())
            lines.append(f"{name}: {value}")
        if "host" not in names:
            lines.insert(1, f"Host: {authority}")
        if self.body or self.method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(self.body)}")
        if not self.keep_alive:
            lines.append("Connection: close")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body

    def described(self) -> dict[str, Any]:
        """The settings as they stand in a result; of headers only the names."""
        return {
            "url": self.url,
            "method": self.method,
            "header_names": [name for name, _ in self.headers],
            "body_bytes": len(self.body),
            "rate": self.rate,
            "arrivals": None if self.rate is None else "poisson" if self.poisson else "constant",
            "seed": self.seed if self.poisson else None,
            "connections": self.connections,
            "keep_alive": self.keep_alive,
            "duration_s": self.duration,
            "warmup_s": self.warmup,
            "timeout_s": self.timeout,
            "accepted_statuses": self.accepted,
            "max_errors": str(self.max_errors),
            "tls": self.tls.described() if self.https else None,
        }
