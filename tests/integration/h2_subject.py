"""What the tests of HTTP/2 talk to: a gateway with listeners and upstreams of both versions, or any other server for comparison.

    H2_SUBJECT=8443 python -m pytest tests/integration/test_h2_conformance_*.py     a server without TLS on that port

Another server has to serve /, /bytes/0, /bytes/1000 and /bytes/100000, and to take a POST anywhere.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.bank import WatchedGateway
from tests.integration.faults import ScriptedOrigin
from tests.integration.h2_kit import H2Client, connect_h2, dial
from tests.integration.h2_origin import TwinOrigin
from tests.integration.pki import Authority

OTHER = int(os.environ.get("H2_SUBJECT", "0"))
TIMES = "timeouts: {head: 20s, body: 20s, keepalive: 60s, write: 20s}"
BRIEF = "timeouts: {head: 1s, body: 1s, keepalive: 1s, write: 1s}"
TLS = "tls: {certificates: [{cert: edge.crt, key: edge.key}]}"
CONFIG = """
version: 1
workers: {workers}
admin: {{bind: 127.0.0.1:0}}
drain: {{deadline: {drain}}}
listeners:
  one: {{bind: 127.0.0.1:0, http2: false, {times}, limits: {{body: 64MiB}}}}
  two: {{bind: 127.0.0.1:0, http2: {{clear: true}}, {times}, limits: {{body: 64MiB}}}}
  secure: {{bind: 127.0.0.1:0, {tls}, {times}, limits: {{body: 64MiB}}}}
  brief: {{bind: 127.0.0.1:0, http2: {{clear: true}}, {brief}}}
  tight:
    bind: 127.0.0.1:0
    {times}
    http2: {{clear: true, streams: 10, window: 16KiB, connection_window: 65535, resets: 10, frames: 50}}
    limits: {{head: 1KiB, target: 256, fields: 20, body: 64KiB}}
  counted: {{bind: 127.0.0.1:0, http2: {{clear: true}}, {times}, limits: {{requests: 5}}}}
  few: {{bind: 127.0.0.1:0, http2: {{clear: true, streams: 4, window: 64KiB, connection_window: 128KiB}}, {times}, limits: {{body: 64MiB}}}}
upstreams:
  one: {{targets: [127.0.0.1:{one}]}}
  two: {{targets: [127.0.0.1:{two}], protocol: http2}}
  secure: {{targets: [127.0.0.1:{secure}], protocol: http2, tls: {{ca: root.crt, server_name: bank.test}}}}
  few: {{targets: [127.0.0.1:{two}], protocol: http2, http2: {{streams: 2}}}}
  narrow: {{targets: [127.0.0.1:{two}], protocol: http2, http2: {{window: 64KiB, connection_window: 128KiB}}}}
  brief: {{targets: [127.0.0.1:{two}], protocol: http2, timeouts: {{head: 500ms, idle: 500ms}}}}
  raw: {{targets: [127.0.0.1:{raw}], protocol: http2, timeouts: {{head: 5s, idle: 5s}}}}
routes:
  - {{name: all, match: {{prefix: /}}, upstream: one}}
  - {{name: two, match: {{prefix: /two}}, upstream: two}}
  - {{name: secure, match: {{prefix: /secure}}, upstream: secure}}
  - {{name: few, match: {{prefix: /few}}, upstream: few}}
  - {{name: narrow, match: {{prefix: /narrow}}, upstream: narrow}}
  - {{name: raw, match: {{prefix: /raw}}, upstream: raw}}
  - {{name: brief, match: {{prefix: /brief}}, upstream: brief}}
"""


@dataclass
class Subject:
    """A gateway between a test and its origin; with H2_SUBJECT only `client` and `dial` work."""

    folder: Path
    authority: Authority
    gateway: WatchedGateway | None = None
    twin: TwinOrigin | None = None
    bare: ScriptedOrigin | None = None

    @property
    def echoes(self) -> bool:
        return self.gateway is not None

    def only_ours(self) -> None:
        if not self.echoes:
            pytest.skip("H2_SUBJECT names another server, and this is a rule of Crossway's own where RFC 9113 leaves a choice")

    @property
    def watched(self) -> WatchedGateway:
        assert self.gateway is not None
        return self.gateway

    @property
    def origin(self) -> TwinOrigin:
        assert self.twin is not None
        return self.twin

    @property
    def raw(self) -> ScriptedOrigin:
        """An upstream that is a script of bytes."""
        assert self.bare is not None
        return self.bare

    def port(self, name: str = "two") -> int:
        return self.watched.port(name) if self.echoes else OTHER

    def context(self, *protocols: str) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.load_verify_locations(cadata=self.authority.pem.decode())
        made.set_alpn_protocols(list(protocols or ["h2"]))
        return made

    def dial(self, name: str = "two") -> socket.socket:
        return dial(self.port(name))

    def client(self, name: str = "two", **options: Any) -> H2Client:
        return connect_h2(self.port(name), tls=self.context() if name == "secure" else None, **options)


def write_config(folder: Path, twin: TwinOrigin, raw: int, *, workers: int = 1, drain: str = "10s") -> Path:
    path = folder / "h2.yaml"
    ports = {"one": twin.one, "two": twin.two, "secure": twin.secure, "raw": raw}
    path.write_text(CONFIG.format(workers=workers, drain=drain, times=TIMES, brief=BRIEF, tls=TLS, **ports))
    return path


@contextlib.contextmanager
def open_subject(folder: Path, **options: Any) -> Iterator[Subject]:
    authority = Authority("H2 Root", number=20)
    if OTHER:
        yield Subject(folder, authority)
        return
    authority.issue("bank.test", "localhost", "127.0.0.1").write(folder, "edge")
    (folder / "root.crt").write_bytes(authority.pem)
    bare = ScriptedOrigin()
    try:
        with TwinOrigin(folder) as twin, WatchedGateway(write_config(folder, twin, bare.port, **options)) as gateway:
            yield Subject(folder, authority, gateway, twin, bare)
    finally:
        bare.close()
