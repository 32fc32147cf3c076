"""An origin that speaks HTTP/1.1 and HTTP/2, clear and behind TLS, and whose behaviour is one coroutine for all of them.

Strategy: h11 and h2 do the protocols, so what the gateway sends is judged by implementations that nobody here wrote: a ProtocolError of
theirs is a failure of the test. One event loop in a thread; a Call is one request, and the script decides what becomes of it. Without
a script the path does: /echo sends the body back as it comes, /bytes/N sends N bytes, /held waits for release(), /status/N is that
status, and all else is a report of what was received.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Self

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import h11

from tests.integration.faults import PATTERN
from tests.integration.h2_kit import MAX_STREAMS, REFUSED_STREAM, Fields, octets, settings
from tests.integration.processes import PATIENCE, eventually

NO_BODY = ("GET", "HEAD")
RESET_CODE = int(h2.errors.ErrorCodes.INTERNAL_ERROR)


class Gone(Exception):
    """The gateway has cancelled the request, or the connection has ended."""


def pattern(size: int) -> bytes:
    return (PATTERN * (size // len(PATTERN) + 1))[:size]


class Call:
    """One request, and the means to answer it."""

    def __init__(self, link: Link, fields: list[tuple[str, str]], stream: int = 0) -> None:
        self.link, self.stream = link, stream
        pseudo = {name: value for name, value in fields if name.startswith(":")}
        self.method, self.path = pseudo[":method"], pseudo[":path"]
        self.authority, self.scheme = pseudo.get(":authority", ""), pseudo.get(":scheme", "")
        self.protocol = pseudo.get(":protocol", "")
        self.fields = [(name, value) for name, value in fields if not name.startswith(":")]
        self.trailers: list[tuple[str, str]] = []
        self.received = 0
        self.complete = False                           # the whole request has come
        self.gone = asyncio.Event()
        self.code: int | None = None                    # of the reset
        self.done = False                               # the answer was sent completely
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue()

    @property
    def version(self) -> str:
        return "two" if self.stream else "one"

    def get(self, name: str, default: str = "") -> str:
        return dict(self.fields).get(name, default)

    # -- the request

    async def read(self) -> bytes | None:
        """The next piece of the body, None at its end; reading gives the window back. Raises Gone."""
        piece = await self._or_gone(self._pieces.get())
        if piece is None:
            self._pieces.put_nowait(None)
        elif piece:
            await self.link.took(self, len(piece))
        return piece

    async def body(self) -> bytes:
        pieces = []
        while (piece := await self.read()) is not None:
            pieces.append(piece)
        return b"".join(pieces)

    async def released(self) -> None:
        """Wait for the test's release()."""
        await self._or_gone(self.link.origin.go.wait())

    async def _or_gone(self, awaitable: Any) -> Any:
        wanted, gone = asyncio.ensure_future(awaitable), asyncio.ensure_future(self.gone.wait())
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if wanted.done():
            return wanted.result()
        wanted.cancel()
        raise Gone

    # -- the answer

    async def inform(self, status: int, fields: Fields = ()) -> None:
        await self.link.inform(self, status, fields)

    async def head(self, status: int = 200, fields: Fields = (), *, end: bool = False) -> None:
        await self.link.head(self, status, [(octets(name), octets(value)) for name, value in fields], end)
        self.done = self.done or end

    async def write(self, data: bytes) -> None:
        """Send a piece as the windows allow. Raises Gone."""
        if data:
            await self.link.write(self, data)

    async def finish(self, trailers: Fields = ()) -> None:
        await self.link.finish(self, trailers)
        self.done = True

    async def answer(self, body: bytes = b"", status: int = 200, fields: Fields = (), trailers: Fields = ()) -> None:
        bare = status in (204, 304)
        length = [] if bare else [("content-length", str(len(body)))]
        quiet = bare or self.method == "HEAD" or (not body and not trailers)
        await self.head(status, [*length, *fields], end=quiet)
        if not quiet:
            await self.write(body)
            await self.finish(trailers)

    async def reset(self, code: int = RESET_CODE) -> None:
        """End this request without an answer: RST_STREAM, or the connection's end in HTTP/1.1."""
        await self.link.reset(self, code)
        self.done = True

    # -- from the link

    def feed(self, piece: bytes | None) -> None:
        self.received += len(piece or b"")
        self.complete = self.complete or piece is None
        self._pieces.put_nowait(piece)

    def cancel(self, code: int | None = None) -> None:
        self.code = code
        self.gone.set()


class Link:
    """A connection of the gateway's; `raw` is what it received, byte for byte (HTTP/1.1 only)."""

    version = ""

    def __init__(self, origin: TwinOrigin, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.origin, self.reader, self.writer = origin, reader, writer
        self.calls: dict[int, Call] = {}
        self.raw = bytearray()
        self.closed = False                             # by the gateway, or broken
        self.busiest = 0                                # most requests at once
        self.refused = 0                                # those above the limit of streams
        self.tasks: set[asyncio.Task[None]] = set()

    def begin(self, call: Call) -> None:
        self.origin.calls.append(call)
        self.calls[call.stream] = call
        self.busiest = max(self.busiest, len(self.calls))
        task = asyncio.create_task(self._run(call))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _run(self, call: Call) -> None:
        try:
            await self.origin.script(call)
        except (Gone, OSError):
            pass
        except (h2.exceptions.StreamClosedError, h2.exceptions.StreamIDTooLowError):
            pass                                        # reset by the gateway between two of our steps
        except Exception as error:  # noqa: BLE001 - shown by reset()
            self.origin.failures.append(error)
            self.abort()
        finally:
            self.calls.pop(call.stream, None)
            await self.ran(call)

    async def ran(self, call: Call) -> None:
        pass

    def lost(self) -> None:
        self.closed = True
        for call in list(self.calls.values()):
            call.cancel()

    def abort(self) -> None:
        """End the connection by RST."""
        self.writer.transport.abort()

    async def send(self, data: bytes) -> None:
        """Any bytes."""
        if self.writer.transport.is_closing():          # asyncio's TLS fails in its own way
            raise ConnectionError("closed")
        self.writer.write(data)
        await self.writer.drain()


class OneLink(Link):
    """HTTP/1.1, by h11."""

    version = "one"

    async def serve(self) -> None:
        self.h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        self.idle = asyncio.Event()
        call: Call | None = None
        while True:
            event = self.h11.next_event()
            if event is h11.NEED_DATA:
                piece = await self.reader.read(65536)
                self.raw += piece
                self.h11.receive_data(piece)
            elif event is h11.PAUSED:
                await self.idle.wait()
                self.idle.clear()
                if self.h11.our_state is not h11.DONE:
                    return
                self.h11.start_next_cycle()
            elif isinstance(event, h11.Request):
                fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers]
                pseudo = [(":method", event.method.decode()), (":path", event.target.decode("latin-1"))]
                call = Call(self, [*pseudo, (":authority", dict(fields).get("host", "")), *fields])
                self.begin(call)
            elif isinstance(event, h11.Data):
                assert call is not None
                while call._pieces.qsize() > 8 and call in self.calls.values():
                    await asyncio.sleep(0.001)          # backpressure
                call.feed(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                assert call is not None
                call.trailers = [(name.decode(), value.decode()) for name, value in event.headers]
                call.feed(None)
                if self.h11.our_state is not h11.DONE:  # wait for the answer, and see a cancel meanwhile
                    await self._answered(call)
            else:
                return

    async def _answered(self, call: Call) -> None:
        watch = asyncio.ensure_future(self.reader.read(1))
        ready = asyncio.ensure_future(self.idle.wait())
        await asyncio.wait({watch, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if watch.done():
            self.raw += watch.result()
            if not watch.result():
                raise ConnectionError("the gateway has closed")
            self.h11.receive_data(watch.result())
            return
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch

    async def ran(self, call: Call) -> None:
        self.idle.set()
        if not call.done:
            self.abort()

    async def took(self, call: Call, size: int) -> None:
        pass

    async def emit(self, event: Any) -> None:
        if data := self.h11.send(event):
            await self.send(data)

    async def inform(self, call: Call, status: int, fields: Fields) -> None:
        await self.emit(h11.InformationalResponse(status_code=status, headers=[*fields]))

    async def head(self, call: Call, status: int, fields: Fields, end: bool) -> None:
        # An answer that ends with its head and has no length would be chunked and empty.
        await self.emit(h11.Response(status_code=status, headers=[*fields], reason=b"Said"))
        if end:
            await self.emit(h11.EndOfMessage())

    async def write(self, call: Call, data: bytes) -> None:
        if call.gone.is_set():
            raise Gone
        await self.emit(h11.Data(data=data))

    async def finish(self, call: Call, trailers: Fields) -> None:
        await self.emit(h11.EndOfMessage(headers=[*trailers]))

    async def reset(self, call: Call, code: int) -> None:
        self.abort()


class TwoLink(Link):
    """HTTP/2, by h2."""

    version = "two"

    async def serve(self) -> None:
        config = h2.config.H2Configuration(client_side=False, header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        if self.origin.first:                           # before anything else is said
            self.h2.local_settings = h2.settings.Settings(client=False, initial_values=self.origin.first)
        self.room = asyncio.Event()                     # a window has grown
        self.goaways: list[h2.events.ConnectionTerminated] = []
        self.pings = 0
        self.h2.initiate_connection()
        await self.flush()
        if self.origin.offer:                           # as bytes: what is over a limit is counted here, not an error of the library's
            await self.send(settings(*self.origin.offer.items()))
        while piece := await self.reader.read(65536):
            for event in self.h2.receive_data(piece):
                self.take(event)
            await self.flush()

    async def flush(self) -> None:
        if data := self.h2.data_to_send():
            await self.send(data)

    def take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived() if len(self.calls) >= self.origin.offer.get(MAX_STREAMS, 100):
                self.refused += 1
                self.h2.reset_stream(event.stream_id, REFUSED_STREAM)
            case h2.events.RequestReceived():
                self.begin(Call(self, [(octets(n).decode("latin-1"), octets(v).decode("latin-1")) for n, v in event.headers], event.stream_id))
            case h2.events.DataReceived():
                call = self.calls.get(event.stream_id)
                if call is None or call.gone.is_set():
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                else:
                    if padding := event.flow_controlled_length - len(event.data):
                        self.h2.acknowledge_received_data(padding, event.stream_id)
                    call.feed(event.data)
            case h2.events.TrailersReceived():
                if call := self.calls.get(event.stream_id):
                    call.trailers = [(octets(n).decode("latin-1"), octets(v).decode("latin-1")) for n, v in event.headers]
            case h2.events.StreamEnded():
                if call := self.calls.get(event.stream_id):
                    call.feed(None)
            case h2.events.StreamReset():
                if call := self.calls.get(event.stream_id):
                    call.cancel(event.error_code)
                self.grown()
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                self.grown()
            case h2.events.PingReceived():
                self.pings += 1
            case h2.events.ConnectionTerminated():
                self.goaways.append(event)

    def grown(self) -> None:
        self.room.set()
        self.room = asyncio.Event()

    async def took(self, call: Call, size: int) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self.h2.acknowledge_received_data(size, call.stream)
        await self.flush()

    async def inform(self, call: Call, status: int, fields: Fields) -> None:
        self.h2.send_headers(call.stream, [(":status", str(status)), *fields])
        await self.flush()

    async def head(self, call: Call, status: int, fields: Fields, end: bool) -> None:
        self.h2.send_headers(call.stream, [(":status", str(status)), *fields], end_stream=end)
        await self.flush()

    async def write(self, call: Call, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if call.gone.is_set():
                raise Gone
            size = min(len(view), self.h2.local_flow_control_window(call.stream), self.h2.max_outbound_frame_size)
            if size <= 0:
                await call._or_gone(self.room.wait())
                continue
            self.h2.send_data(call.stream, bytes(view[:size]))
            view = view[size:]
            await self.flush()

    async def finish(self, call: Call, trailers: Fields) -> None:
        if trailers:
            self.h2.send_headers(call.stream, [*trailers], end_stream=True)
        else:
            self.h2.end_stream(call.stream)
        await self.flush()

    async def reset(self, call: Call, code: int) -> None:
        self.h2.reset_stream(call.stream, code)
        await self.flush()

    async def goaway(self, last: int, code: int = 0) -> None:
        """Bytes, so that the h2 library goes on afterwards."""
        await self.send(b"\0\0\x08\x07\0\0\0\0\0" + last.to_bytes(4, "big") + code.to_bytes(4, "big"))


Script = Callable[[Call], Awaitable[None]]


async def by_path(call: Call) -> None:
    """What happens without a script; see the module's head. A first segment that names an upstream is left out."""
    first, _, rest = call.path[1:].partition("/")
    path = call.path.partition("?")[0] if first not in ("two", "secure", "few", "narrow", "brief") else "/" + rest.partition("?")[0]
    if path == "/echo":
        await call.head(200, [("content-type", call.get("content-type", "text/plain"))])
        while (piece := await call.read()) is not None:
            await call.write(piece)
        await call.finish()
    elif path.startswith("/bytes/"):
        await call.body()
        await call.answer(pattern(int(path[7:])))
    elif path == "/held":
        call.link.origin.seen.release()
        await call.released()
        await call.answer(b"released")
    elif path.startswith("/status/"):
        await call.body()
        await call.answer(b"said", int(path[8:]))
    else:
        await report(call)


async def report(call: Call) -> None:
    """Answer with what was received, as JSON."""
    body = await call.body()
    said = {
        "version": call.version, "method": call.method, "path": call.path, "authority": call.authority, "scheme": call.scheme,
        "fields": call.fields, "trailers": call.trailers, "length": len(body), "digest": hashlib.sha256(body).hexdigest(),
    }  # fmt: skip
    await call.answer(json.dumps(said).encode(), 200, [("content-type", "application/json")])


class TwinOrigin:
    """Ports `one`, `two` and `secure` (HTTP/2 behind TLS with edge.crt of the folder), all behaving alike."""

    def __init__(self, folder: Path | None = None) -> None:
        self.script: Script = by_path
        self.first: dict[Any, int] = {}                 # the first SETTINGS of the HTTP/2 side; empty: the library's own
        self.offer: dict[int, int] = {}                 # ... and a second one's
        self.calls: list[Call] = []
        self.links: list[Link] = []
        self.failures: list[BaseException] = []
        self.seen = threading.Semaphore(0)              # released by scripts at the moment a test waits for
        self.one = self.two = self.secure = 0
        self._ready = threading.Event()
        self._context: ssl.SSLContext | None = None
        if folder is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(folder / "edge.crt", folder / "edge.key")
            self._context.set_alpn_protocols(["h2"])
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(PATIENCE)

    async def _main(self) -> None:
        self.loop, self.go, self._stop = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        one = await asyncio.start_server(lambda r, w: self._serve(OneLink(self, r, w)), "127.0.0.1", 0, backlog=1024)
        two = await asyncio.start_server(lambda r, w: self._serve(TwoLink(self, r, w)), "127.0.0.1", 0, backlog=1024)
        self.one, self.two = (server.sockets[0].getsockname()[1] for server in (one, two))
        if self._context is not None:
            secure = await asyncio.start_server(
                lambda r, w: self._serve(TwoLink(self, r, w)), "127.0.0.1", 0, ssl=self._context, backlog=1024
            )
            self.secure = secure.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()

    async def _serve(self, link: Any) -> None:
        self.links.append(link)
        try:
            await link.serve()
        except (OSError, asyncio.CancelledError):
            pass
        except (h2.exceptions.ProtocolError, h11.ProtocolError) as error:
            # h11 takes an end within a body for an error of the protocol; it is a cancelled request.
            if not (isinstance(error, h11.RemoteProtocolError) and "without sending complete message body" in str(error)):
                self.failures.append(error)
        except Exception as error:  # noqa: BLE001 - shown by reset()
            self.failures.append(error)
        finally:
            link.lost()
            link.writer.close()

    # -- for tests

    def run(self, coroutine: Any) -> Any:
        """Run it in the origin's loop and wait for the result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)

    def release(self) -> None:
        self.loop.call_soon_threadsafe(self.go.set)

    def saw(self, times: int = 1) -> None:
        """Wait until a script has come to the moment that it marks with `seen`."""
        for _ in range(times):
            assert self.seen.acquire(timeout=PATIENCE), self.failures

    def open(self, version: str = "") -> list[Link]:
        return [link for link in self.links if not link.closed and version in ("", link.version)]

    def reset(self) -> None:
        """Break what is open and behave as in the beginning."""
        self.run(self._reset())
        eventually(lambda: not self.open() or self.run(self._reset()), "the end of the origin's connections")
        self.script, self.offer, self.seen = by_path, {}, threading.Semaphore(0)
        self.calls, self.links = [], []
        failures, self.failures = self.failures, []
        assert not failures, failures

    async def _reset(self) -> None:
        self.go.set()
        self.go = asyncio.Event()
        for link in self.open():
            link.abort()

    def close(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def heads(calls: Iterable[Call]) -> list[tuple[str, str]]:
    """Method and path of requests."""
    return [(call.method, call.path) for call in calls]
