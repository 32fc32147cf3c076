"""A gateway whose WebSockets go to servers of HTTP/2: the h2 library makes their frames, the websockets library the messages in them.

Strategy: TwinOrigin does connections and windows, a script says what a tunnel does. What a tunnel's bytes mean is no business of the gateway's, so
most scripts take any; `messages` is a server of WebSockets.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h2.settings import SettingCodes
from websockets.frames import Opcode
from websockets.protocol import Protocol, Side, State

from tests.integration.bank import WatchedGateway
from tests.integration.echo import ISSUER, jwks
from tests.integration.faults import ScriptedOrigin
from tests.integration.h2_kit import Fields
from tests.integration.h2_origin import Call, Script, TwinOrigin, by_path
from tests.integration.h2_tunnels import TunnelClient
from tests.integration.pki import Authority
from tests.integration.websocket_kit import NOSY, Between

OFFERS = {SettingCodes.ENABLE_CONNECT_PROTOCOL: 1, SettingCodes.MAX_CONCURRENT_STREAMS: 100}
NOTHING = {SettingCodes.MAX_CONCURRENT_STREAMS: 100}
CONFIG = """
version: 1
workers: {workers}
admin: {{bind: 127.0.0.1:0}}
drain: {{deadline: {drain}}}
listeners:
  public: {{bind: 127.0.0.1:0, http2: {{clear: true}}}}
  secure: {{bind: 127.0.0.1:0, tls: {{certificates: [{{cert: edge.crt, key: edge.key}}]}}}}
upstreams:
  two: {{targets: [127.0.0.1:{two}], protocol: http2, retries: {{attempts: 3, on: [connect-failure, reset, timeout, 502, 503]}}}}
  tls: {{targets: [127.0.0.1:{secure}], protocol: http2, tls: {{ca: root.crt, server_name: bank.test}}}}
  pair: {{targets: [127.0.0.1:{two}], protocol: http2, http2: {{streams: 2}}}}
  raw: {{targets: [127.0.0.1:{raw}], protocol: http2, timeouts: {{connect: {connect}}}, retries: 1}}
policies:
  trail: {{audit: {{file: audit.jsonl}}}}
  bank: {{jwt: {{issuer: {issuer}, audience: payments, keys: jwks.json, algorithms: [RS256], leeway: 0s}}}}
  nosy: {{python: {{class: "nosy:Nosy"}}}}
routes:
  - {{name: two, match: {{prefix: /two}}, upstream: two, policies: [trail], websocket: {websocket}}}
  - {{name: tls, match: {{prefix: /tls}}, upstream: tls, policies: [trail], websocket: {websocket}}}
  - {{name: pair, match: {{prefix: /pair}}, upstream: pair, policies: [trail], websocket: true}}
  - {{name: raw, match: {{prefix: /raw}}, upstream: raw, policies: [trail], websocket: true}}
  - {{name: bank, match: {{prefix: /bank}}, upstream: two, policies: [trail, bank], websocket: true}}
  - {{name: few, match: {{prefix: /few}}, upstream: two, policies: [trail], websocket: {{tunnels: 3}}}}
  - {{name: idle, match: {{prefix: /idle}}, upstream: two, policies: [trail], websocket: {{idle: 500ms}}}}
  - {{name: nosy, match: {{prefix: /nosy}}, upstream: two, policies: [trail, nosy], websocket: true}}
  - {{name: plain, match: {{prefix: /plain}}, upstream: two, policies: [trail]}}
"""


async def parrot(call: Call) -> None:
    """Sends back every byte, and its end after the client's."""
    await call.head()
    while (piece := await call.read()) is not None:
        await call.write(piece)
    await call.finish()


async def messages(call: Call) -> None:
    """A server of WebSockets that sends back what it gets; `close CODE` closes with that code."""
    offered = [each.strip() for each in call.get("sec-websocket-protocol").split(",")]
    await call.head(200, [("sec-websocket-protocol", "pay.v2")] if "pay.v2" in offered else [])
    protocol = Protocol(Side.SERVER, state=State.OPEN, max_size=None)
    parts: list[Any] = []
    while (piece := await call.read()) is not None:
        protocol.receive_data(piece)
        for frame in protocol.events_received():
            if frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                parts.append(frame)
                if frame.fin:
                    _reply(protocol, parts)
                    parts = []
        for data in protocol.data_to_send():
            if not data:                                        # its end, which is the server's to say (RFC 6455 7.1.1)
                await call.finish()
                return
            await call.write(data)
    await call.finish()


def _reply(protocol: Protocol, parts: list[Any]) -> None:
    whole = b"".join(bytes(each.data) for each in parts)
    if whole.startswith(b"close "):
        protocol.send_close(int(whole.split()[1]), "as asked")
    elif parts[0].opcode is Opcode.TEXT:
        protocol.send_text(whole)
    else:
        protocol.send_binary(whole)


def tunnelled(script: Script) -> Script:
    """The script for WebSockets; other requests as ever."""

    async def either(call: Call) -> None:
        if call.method == "CONNECT":
            assert call.protocol == "websocket", call.protocol
            await script(call)
        else:
            await by_path(call)

    return either


def refuses(status: int, body: bytes = b"", fields: Fields = ()) -> Script:
    async def script(call: Call) -> None:
        await call.answer(body, status, fields)
        await call.body()                                       # to the request's end

    return script


@dataclass
class Behind(Between):
    """The gateway before a TwinOrigin, and before one that is a script of bytes."""

    twin: TwinOrigin
    raw: ScriptedOrigin

    def serve(self, script: Callable[[Call], Awaitable[None]]) -> None:
        self.twin.script = tunnelled(script)

    def client(self, name: str = "public") -> TunnelClient:
        """One that speaks HTTP/2."""
        if name == "public":
            return TunnelClient(self.gateway.port())
        context = self.trust()
        context.set_alpn_protocols(["h2"])
        return TunnelClient(self.gateway.port("secure"), tls=context)

    def tunnels(self) -> list[Call]:
        """The WebSockets that came to the twin."""
        return [call for call in self.twin.calls if call.method == "CONNECT"]

    def configure(self, **changes: Any) -> Path:
        known = {
            "workers": 1, "drain": "20s", "websocket": "true", "connect": "20s", "issuer": ISSUER, "raw": self.raw.port,
            "two": self.twin.two, "secure": self.twin.secure,
        }  # fmt: skip
        path = self.folder / "edge.yaml"
        path.write_text(CONFIG.format(**{**known, **changes}))
        return path


@contextlib.contextmanager
def behind(folder: Path, **changes: Any) -> Iterator[Behind]:
    root = Authority("Behind", number=97)
    root.issue("127.0.0.1", "localhost", "bank.test").write(folder, "edge")
    (folder / "root.crt").write_bytes(root.pem)
    (folder / "nosy.py").write_text(NOSY)
    (folder / "jwks.json").write_text(jwks(("RS256", "rs")))
    raw = ScriptedOrigin()
    try:
        with TwinOrigin(folder) as twin:
            made = Behind(folder, root, twin, raw)
            twin.first = dict(OFFERS)
            made.serve(parrot)
            with WatchedGateway(made.configure(**changes)) as made.gateway:
                yield made
    finally:
        raw.close()


def problem(body: bytes) -> str:
    """The kind of a problem document."""
    return str(json.loads(body)["type"]).rpartition(":")[2]
