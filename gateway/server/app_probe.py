"""An orchestrator's probes of the app, asked on its behalf: the app's own port is reached by members of the mesh only.

Strategy: each probe is written down when the pod is made (port, path, headers); whoever asks for its page chooses nothing and has nothing sent
on. The app's answer is told by its status alone, as the kubelet judges it: 200 to 399 is good, and of gRPC SERVING.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass, field

from gateway.mesh.asked import NAME, PATH, SERVICE, good_header

HEAD = 16 << 10  # bytes of the app's answer
PATIENCE = 5.0  # seconds; who asks usually has less



@dataclass
class AppProbe:
    """One probe; without a path or a service it only connects."""

    port: int
    path: str | None = None
    service: str | None = None  # of grpc.health.v1
    headers: dict[str, str] = field(default_factory=dict)

    async def __call__(self) -> tuple[int, str, bytes]:
        try:
            async with asyncio.timeout(PATIENCE):
                why = await self._ask()
        except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            return 503, "text/plain", f"the app does not answer: {type(error).__name__}\n".encode()
        return 503 if why else 200, "text/plain", f"the app answers {why or 'that it is well'}\n".encode()

    async def _ask(self) -> str:
        """Return what the app answers, or an empty text when that is good."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=HEAD)
        try:
            if self.service is not None:
                from gateway.health.grpc import ask_grpc  # most sidecars have no such probe, and do without its library

                return await ask_grpc(reader, writer, self.service, f"127.0.0.1:{self.port}", PATIENCE)
            if self.path is None:
                return ""
            lines = {"host": f"127.0.0.1:{self.port}", "user-agent": "kube-probe", **{name.lower(): value for name, value in self.headers.items()}}
            head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
            writer.write(f"GET {self.path} HTTP/1.1\r\n{head}connection: close\r\n\r\n".encode("latin-1"))
            first = (await reader.readuntil(b"\n")).split(b" ", 2)
            status = int(first[1]) if first[0].startswith(b"HTTP/1.") and len(first) > 1 else 0
            return "" if 200 <= status < 400 else str(status)
        finally:
            writer.close()
            with contextlib.suppress(Exception):
                await writer.wait_closed()


def parse_probe(text: str) -> tuple[str, AppProbe]:
    """Parse `NAME=http:PORT/path`, `NAME=grpc:PORT/service` or `NAME=tcp:PORT`. Raises ValueError."""
    name, _, what = text.partition("=")
    match = re.fullmatch(r"(http|grpc|tcp):([0-9]{1,5})(.*)", what)
    if not NAME.fullmatch(name) or match is None or not 1 <= int(match[2]) <= 65535:
        raise ValueError
    if match[1] == "grpc":
        slash, service = match[3][:1], match[3][1:]
        if slash not in ("", "/") or not SERVICE.fullmatch(service):
            raise ValueError
        return name, AppProbe(int(match[2]), service=service)
    path = match[3] or ("/" if match[1] == "http" else "")
    if (match[1] == "tcp" and path) or (match[1] == "http" and not PATH.fullmatch(path)):
        raise ValueError
    return name, AppProbe(int(match[2]), path or None)


def parse_header(text: str) -> tuple[str, str, str]:
    """Parse `NAME=Header: value`, a header of the probe NAME. Raises ValueError."""
    probe, _, line = text.partition("=")
    name, colon, value = line.partition(":")
    value = value.strip()
    if not NAME.fullmatch(probe) or not colon or not good_header(name, value):
        raise ValueError
    return probe, name, value
