"""The options of one pod as they are written: annotations first, then the command line; each value is judged where it stands.

Strategy: a reader returns something usable whatever is written, and reports what is wrong, so that all mistakes of all documents are told at once. What is
wrong on the command line is told once, however many pods it is for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway.mesh.inject import Injection

PREFIX = "crossway.dev/"
NAME = r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?"  # of a service, a zone, a network
OBJECT = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"  # of a ConfigMap, a Secret
LABEL = r"[A-Za-z0-9._/-]{1,63}=[A-Za-z0-9._-]{0,63}"
QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi)?"
FILE = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
KNOWN = (
    "inject", "injected", "service", "mode", "app-port", "app-protocol", "app-uid", "sidecar-uid", "control", "image", "audience", "root", "join-cert", "spire",
    "exclude-ports", "exclude-networks", "local", "labels", "zone", "network", "advertise", "external-certs", "authorities", "egress-audit",
    "inbound-port", "outbound-port", "admin-port", "probes-port", "cpu-request", "cpu-limit", "memory-request", "memory-limit", "drain-delay",
    "drain-deadline", "log-level",
)  # fmt: skip
PROTOCOLS = ("http1", "http2", "grpc", "tcp")
LEVELS = ("debug", "info", "warning", "error")
UNPRIVILEGED = 1024  # the sidecar, which is not root, binds no port below


@dataclass(frozen=True)
class Place:
    """A document, a line, a column, and the field there as kubectl would write it."""

    line: int
    column: int
    field: str
    offset: int = 0  # lines before the document
    document: str = ""  # kind and name

    def of(self, data: Any, key: Any) -> Place:
        """Return the place of a key or an item; that of its holder when the document has no such thing."""
        name = f"{self.field}[{key}]" if isinstance(key, int) else f"{self.field}.{key}".lstrip(".")
        try:
            line, column = data.lc.item(key) if isinstance(key, int) else data.lc.key(key)
        except (AttributeError, KeyError, TypeError, IndexError):
            return replace(self, field=name)
        return Place(line + 1 + self.offset, column + 1, name, self.offset, self.document)

    @property
    def said(self) -> str:
        """Return what stands before a message."""
        return ", ".join(each for each in (self.document, self.field) if each)


class Reader:
    """The options of one pod."""

    def __init__(self, injection: Injection, annotations: Mapping[str, Any], at: Place) -> None:
        self.injection, self.annotations, self.at = injection, annotations, at
        for name in annotations:
            if str(name).startswith(PREFIX) and str(name).removeprefix(PREFIX) not in KNOWN:
                injection.report(at.of(annotations, name), "this annotation is not known", f"there are: {', '.join(KNOWN)}")

    def place(self, name: str) -> Place:
        return self.at.of(self.annotations, PREFIX + name) if PREFIX + name in self.annotations else Place(0, 0, f"--{name}")

    def wrong(self, name: str, message: str, hint: str = "") -> None:
        self.injection.report(self.place(name), message, hint)

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.annotations.get(PREFIX + name, self.injection.given.get(name))
        if value is None:
            return default
        if not isinstance(value, str):
            self.wrong(name, "the value of an annotation is text", f'write it in quotes: "{value}"')
        return str(value).strip()

    def words(self, name: str) -> tuple[str, ...]:
        return tuple(each.strip() for each in (self.text(name) or "").split(",") if each.strip())

    def number(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        text = self.text(name)
        if text is None:
            return default
        if not text.isascii() or not text.isdecimal() or not low <= int(text) <= high:
            self.wrong(name, f"{text!r} is not a number from {low} to {high}")
            return default
        return int(text)

    def seconds(self, name: str, default: float) -> float:
        text = self.text(name)
        if text is None:
            return default
        if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]+)?", text) or float(text) > 3600:
            self.wrong(name, f"{text!r} is not a number of seconds up to 3600")
            return default
        return float(text)

    def choice(self, name: str, among: tuple[str, ...], default: str) -> str:
        text = self.text(name) or default
        if text not in among:
            self.wrong(name, f"{text!r} is none of {', '.join(among)}")
            return default
        return text

    def matching(self, name: str, pattern: str, what: str, default: str) -> str:
        return self.optional(name, pattern, what) or default

    def optional(self, name: str, pattern: str, what: str) -> str | None:
        """Return a text that has to match; None when there is none."""
        text = self.text(name)
        if text and not re.fullmatch(pattern, text):
            self.wrong(name, f"{text!r} is not {what}")
        return text or None

    def pairs(self, name: str, value: str, what: str) -> Iterator[tuple[str, str]]:
        """Yield the pairs of `a=1,b=2`, each name once."""
        seen = set()
        for each in self.words(name):
            key, _, said = each.partition("=")
            if not re.fullmatch(NAME, key) or not re.fullmatch(value, said):
                self.wrong(name, f"{each!r} is not {what}")
            elif key in seen:
                self.wrong(name, f"{key} stands there twice")
            else:
                seen.add(key)
                yield key, said

    # -- what is more than a word

    def ports(self, name: str) -> tuple[int, ...]:
        found = self.words(name)
        for each in found:
            if not each.isascii() or not each.isdecimal() or not 1 <= int(each) <= 65535:
                self.wrong(name, f"{each!r} is not a port")
                return ()
        return tuple(sorted({int(each) for each in found}))

    def networks(self, name: str) -> tuple[str, ...]:
        found = []
        for each in self.words(name):
            try:
                found.append(str(ipaddress.ip_network(each)))
            except ValueError:
                self.wrong(name, f"{each!r} is not a network such as 10.0.0.0/8")
        return tuple(found)

    def local(self, taken: Mapping[int, str]) -> tuple[tuple[str, int], ...]:
        """A port of its own for each service; `taken` are those of the sidecar and of the app."""
        found: dict[str, int] = {}
        for service, text in self.pairs("local", r"[0-9]{1,5}", "SERVICE=PORT"):
            port, holders = int(text), dict(taken) | {held: other for other, held in found.items()}
            if not UNPRIVILEGED <= port <= 65535:
                self.wrong("local", f"{service}: the sidecar, which is not root, can have a port from {UNPRIVILEGED} to 65535, and not {port}")
            elif port in holders:
                self.wrong("local", f"{service}: port {port} is taken, by {holders[port]}")
            found[service] = port
        return tuple(found.items())

    def labels(self, template: Any) -> tuple[tuple[str, str], ...]:
        """For splits and canaries: what the annotation says, else the pod's version."""
        found = self.words("labels")
        for each in found:
            if not re.fullmatch(LABEL, each):
                self.wrong("labels", f"{each!r} is not KEY=VALUE")
                return ()
        if not found:
            said = ((template.get("metadata") or {}).get("labels")) or {}
            version = said.get("app.kubernetes.io/version") or said.get("version")
            found = (f"version={version}",) if version and re.fullmatch(LABEL, f"version={version}") else ()
        return tuple((each.partition("=")[0], each.partition("=")[2]) for each in found)

    def joining(self) -> tuple[str | None, str | None]:
        """Return the Secret to join by, or the agent: of those that are said nearest to the pod, one."""
        both = ("join-cert", "spire")
        said = [name for name in both if PREFIX + name in self.annotations] or [name for name in both if name in self.injection.given]
        if len(said) > 1:
            self.wrong("spire", "join-cert is there as well: one way to join is enough", "keep one of them")
        cert = self.optional("join-cert", OBJECT, "the name of a Secret") if "join-cert" in said else None
        # An agent's folder is mounted, since its socket is another one after each start; so there has to be one.
        agent = self.optional("spire", rf"csi|csi/{FILE}|(/{FILE})+/{FILE}", "csi, csi/NAME.sock or the path of a socket on the node") if "spire" in said else None
        return cert, "csi/spire-agent.sock" if agent == "csi" else agent

    def advertise(self) -> str | None:
        """How others reach the pod: by the node's address, or by one that is always the same."""
        text = self.text("advertise")
        if not text or text == "node":
            return text or None
        match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})", text)
        try:
            if match is None or not 1 <= int(match[3]) <= 65535:
                raise ValueError
            ipaddress.ip_address(match[1] or match[2])
        except ValueError:
            self.wrong("advertise", f"{text!r} is neither node nor a numeric address and a port")
        return text

    def audit(self, spec: Any) -> str | None:
        """Where calls to external hosts are recorded: a stream, or a file in a volume that the pod has."""
        text = self.text("egress-audit")
        if not text or text in ("stdout", "stderr"):
            return text or None
        volume, slash, file = text.partition("/")
        there = [str(each.get("name")) for each in spec.get("volumes") or () if isinstance(each, dict)]
        if not slash or not re.fullmatch(FILE, file):
            self.wrong("egress-audit", f"{text!r} is not stdout, stderr or VOLUME/FILE")
        elif volume not in there:
            self.wrong("egress-audit", f"the pod has no volume {volume!r}", f"it has: {', '.join(there) or 'none'}")
        return text
