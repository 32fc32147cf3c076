"""A client of WebSockets over HTTP/2 (RFC 8441): the h2 library makes the frames, the websockets library the messages in them.

Strategy: one blocking socket; whoever waits for something pumps it. Windows are given back as payload is taken by the test, so a test
that takes nothing is a client that reads nothing.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side, State

from tests.integration.faults import Cut
from tests.integration.h2_kit import dial
from tests.integration.processes import PATIENCE

CONNECT = h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL


class H2Stream:
    """One request, or a tunnel."""

    def __init__(self, client: TunnelClient, number: int) -> None:
        self.client, self.number = client, number
        self.fields: dict[str, str] = {}
        self.inbox = bytearray()
        self.owed = 0
        self.ended = False
        self.reset: int | None = None
        self.messages = Protocol(Side.CLIENT, state=State.OPEN, max_size=None)

    @property
    def status(self) -> int:
        return int(self.fields.get(":status", 0))

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None

    # -- bytes

    def write(self, data: bytes, *, end: bool = False) -> None:
        """As the windows allow. Raises Cut when the stream ends before all is sent."""
        machine, view = self.client.machine, memoryview(data)
        while view:
            room = self.client.until(lambda: self.reset is not None or machine.local_flow_control_window(self.number), "a window")
            if self.reset is not None:
                raise Cut(f"reset {self.reset}")
            size = min(len(view), room, machine.max_outbound_frame_size)
            machine.send_data(self.number, bytes(view[:size]))
            view = view[size:]
            self.client.flush()
        if end:
            machine.end_stream(self.number)
            self.client.flush()

    def take(self) -> bytes:
        """What has come, and its window given back."""
        data, self.inbox = bytes(self.inbox), bytearray()
        owed, self.owed = self.owed, 0
        if owed and not self.over:
            self.client.machine.acknowledge_received_data(owed, self.number)
        elif owed:
            self.client.machine.increment_flow_control_window(owed)
        self.client.flush()
        return data

    def exactly(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            self.client.until(lambda: self.inbox or self.over, f"{size} bytes")
            got += self.take()
            assert not self.over or len(got) >= size or self.inbox, f"over after {len(got)}"
        assert len(got) == size
        return got

    def rest(self) -> tuple[bytes, bool]:
        """All that still comes, and whether its end is a clean one."""
        got = b""
        while not self.over or self.inbox:
            self.client.until(lambda: self.inbox or self.over, "an end")
            got += self.take()
        return got, self.ended

    def cancel(self, code: int = 8) -> None:
        self.client.machine.reset_stream(self.number, code)
        self.reset = code
        self.client.flush()

    # -- messages

    def _sent(self) -> None:
        for data in self.messages.data_to_send():
            if data:
                self.write(data)

    def say(self, message: str | bytes) -> None:
        if isinstance(message, str):
            self.messages.send_text(message.encode())
        else:
            self.messages.send_binary(message)
        self._sent()

    def ping(self, said: bytes) -> None:
        self.messages.send_ping(said)
        self._sent()

    def close(self, code: int, reason: str = "") -> None:
        self.messages.send_close(code, reason)
        self._sent()

    def hear(self) -> Frame:
        """The next frame of any kind; those of one message are put together."""
        whole: Frame | None = None
        while True:
            for event in self._frames():
                if event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                    whole = event if whole is None else Frame(whole.opcode, bytes(whole.data) + bytes(event.data), event.fin)
                    if whole.fin:
                        return whole
                else:
                    return event
            self.client.until(lambda: self.inbox or self.over, "a frame")
            assert self.inbox, f"over (reset {self.reset}) before a frame"
            self.messages.receive_data(self.take())

    def _frames(self) -> Sequence[Any]:
        self._queue = getattr(self, "_queue", [])
        self._queue += self.messages.events_received()
        while self._queue:
            yield self._queue.pop(0)

    def heard(self) -> str | bytes:
        frame = self.hear()
        assert frame.opcode in (Opcode.TEXT, Opcode.BINARY), frame
        return bytes(frame.data).decode() if frame.opcode is Opcode.TEXT else bytes(frame.data)


class TunnelClient:
    """One connection."""

    def __init__(self, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.sock = dial(port, tls=tls, host="127.0.0.1")
        self.secure = tls is not None
        self.machine = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.streams: dict[int, H2Stream] = {}
        self.gone: list[h2.events.ConnectionTerminated] = []
        self.greeted = self.closed = False
        self.machine.initiate_connection()
        self.flush()
        self.until(lambda: self.greeted, "SETTINGS")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.sock.close()

    def offers_tunnels(self) -> bool:
        return bool(self.machine.remote_settings.get(CONNECT, 0))

    def flush(self) -> None:
        self.sock.setblocking(True)
        self.sock.settimeout(PATIENCE)
        if data := self.machine.data_to_send():
            try:
                self.sock.sendall(data)
            except OSError:
                self.closed = True

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + PATIENCE
        while not (value := condition()):
            if self.closed:
                raise Cut(f"the connection ended before {what}; GOAWAY {[each.error_code for each in self.gone]}")
            left = end - time.monotonic()
            assert left > 0, f"{what} never came"
            self.sock.settimeout(left)
            try:
                data = self.sock.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                self.closed = True
                continue
            for event in self.machine.receive_data(data):
                self._take(event)
            self.flush()
        return value

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RemoteSettingsChanged):
            self.greeted = True
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.gone.append(event)
        stream = self.streams.get(getattr(event, "stream_id", None) or 0)
        if stream is None:
            return
        if isinstance(event, h2.events.ResponseReceived):
            stream.fields = {str(name): str(value) for name, value in event.headers}
        elif isinstance(event, h2.events.DataReceived):
            stream.inbox += event.data
            stream.owed += event.flow_controlled_length
        elif isinstance(event, h2.events.StreamEnded):
            stream.ended = True
        elif isinstance(event, h2.events.StreamReset):
            stream.reset = int(event.error_code)

    # -- streams

    def open(self, fields: Sequence[tuple[str, str]], *, end: bool = False) -> H2Stream:
        stream = H2Stream(self, self.machine.get_next_available_stream_id())
        self.streams[stream.number] = stream
        self.machine.send_headers(stream.number, list(fields), end_stream=end)
        self.flush()
        return stream

    def connect(self, path: str, *more: tuple[str, str], protocol: str | None = "websocket", version: str | None = "13") -> H2Stream:
        """An extended CONNECT, not awaited."""
        fields = [(":method", "CONNECT")]
        fields += [(":protocol", protocol)] if protocol is not None else []
        fields += [(":scheme", "https" if self.secure else "http"), (":path", path)] if protocol is not None else []
        fields += [(":authority", "bank.test")]
        fields += [("sec-websocket-version", version)] if version is not None else []
        return self.open([*fields, *more])

    def headed(self, stream: H2Stream) -> H2Stream:
        self.until(lambda: stream.fields or stream.over, "an answer")
        return stream

    def tunnel(self, path: str, *more: tuple[str, str]) -> H2Stream:
        """An open tunnel."""
        stream = self.headed(self.connect(path, *more))
        assert stream.status == 200, (stream.fields, stream.reset, bytes(stream.inbox))
        return stream

    def get(self, path: str) -> tuple[int, bytes]:
        stream = self.open([(":method", "GET"), (":scheme", "http"), (":authority", "bank.test"), (":path", path)], end=True)
        body, whole = stream.rest()
        assert whole, stream.reset
        return stream.status, body


