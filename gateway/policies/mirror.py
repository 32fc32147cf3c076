"""Sends copies of requests to mirrors, and forgets the answers.

Strategy: the engine hands over a whole copy (Mirror.send) and goes on; everything here runs in tasks of the worker's loop. One copy
is one task with one deadline; connections are kept for the next copy. Nothing is sent twice: a copy whose connection breaks is lost,
and counted. A snapshot that is replaced closes its idle connections at once, and the others as their copies end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import cast

import httptools

from gateway._speedups.shaping import Copy
from gateway.config.client_tls import ClientTls

log = logging.getLogger("crossway.mirror")

MARK = b"x-crossway-mirror: 1"
SUFFIX = b"-shadow"
Endpoint = tuple[str, int]  # numeric address, port

_delivering: set[asyncio.Task[None]] = set()  # a loop itself keeps no task alive


class Sender:
    """Delivers the copies of one route's mirror.

    host: the Host to send, "" for the endpoint's own, None for that of the request with `-shadow` behind its name. timeout: seconds
    for one copy. keep, idle: how many connections wait for the next copy, and how long. tls: None for clear text.
    """

    def __init__(
        self, *, strip: Iterable[str], host: str | None, timeout: float, keep: int, idle: float, tls: ClientTls | None = None
    ) -> None:
        # Not for a copy: what only the service itself may see, and a request to be asked before the body comes.
        self.strip = frozenset(name.lower().encode("ascii") for name in (*strip, "expect"))
        self.host = host
        self.timeout = timeout
        self.keep = keep
        self.idle = idle
        self.tls = tls
        self.stopped = False
        self._waiting: dict[Endpoint, list[Connection]] = {}

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Nothing to begin: connections are opened by the first copies."""

    def stop(self) -> None:
        """Close what is idle; copies under way end within their time, then close theirs."""
        self.stopped = True
        for connections in self._waiting.values():
            for connection in connections:
                connection.close()
        self._waiting.clear()

    def send(self, copy: Copy) -> None:
        """Take a whole copy; returns at once."""
        task = asyncio.get_running_loop().create_task(self._deliver(copy))
        _delivering.add(task)
        task.add_done_callback(_delivering.discard)

    async def _deliver(self, copy: Copy) -> None:
        status = 0
        connection: Connection | None = None
        endpoint = copy.host, copy.port
        try:
            async with asyncio.timeout(self.timeout):
                connection = self._idle(endpoint) or await self._connect(endpoint, copy.name)
                status = await connection.exchange(self.edited(copy) + copy.body, copy.bodiless)
        except (OSError, TimeoutError, httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            log.debug("a copy was not answered", extra={"endpoint": f"{copy.host}:{copy.port}", "error": type(error).__name__})
        except Exception:
            log.exception("a copy could not be delivered")
        finally:
            copy.finish(status)
            if connection is not None:
                self._put_back(endpoint, connection)

    def edited(self, copy: Copy) -> bytes:
        """Return the copy's head with the mirror's Host and mark, and without what is stripped."""
        start, *lines, _, _ = copy.head.split(b"\r\n")
        kept = [start]
        for line in lines:
            name, _, value = line.partition(b":")
            lower = name.lower()
            if lower == b"host":
                kept.append(b"host: " + self._host(value.strip(), copy))
            elif lower not in self.strip:
                kept.append(line)
        return b"\r\n".join([*kept, MARK, b"", b""])

    def _host(self, given: bytes, copy: Copy) -> bytes:
        if self.host is not None:
            own = f"[{copy.host}]:{copy.port}" if ":" in copy.host else f"{copy.host}:{copy.port}"
            return (self.host or own).encode("ascii")
        if given.startswith(b"["):
            return given  # behind an address in brackets no suffix can stand
        name, colon, port = given.partition(b":")
        return name + SUFFIX + colon + port if name else given

    # -- connections

    def _idle(self, endpoint: Endpoint) -> Connection | None:
        waiting = self._waiting.get(endpoint, [])
        while waiting:
            connection = waiting.pop()
            if connection.wake():
                return connection
        return None

    async def _connect(self, endpoint: Endpoint, name: str) -> Connection:
        host, port = endpoint
        loop = asyncio.get_running_loop()
        if self.tls is None:
            return (await loop.create_connection(Connection, host, port))[1]
        expected = self.tls.server_name(name)
        transport, connection = await loop.create_connection(
            Connection, host, port, ssl=self.tls.context(), server_hostname=expected
        )
        try:
            self.tls.check(transport)
        except OSError:
            connection.close()
            raise
        return connection

    def _put_back(self, endpoint: Endpoint, connection: Connection) -> None:
        waiting = self._waiting.setdefault(endpoint, [])
        if self.stopped or not connection.reusable or len(waiting) >= self.keep:
            connection.close()
        else:
            connection.rest(self.idle)
            waiting.append(connection)


class Connection(asyncio.Protocol):
    """A connection to a mirror: one exchange at a time."""

    def __init__(self) -> None:
        self.reusable = False
        self.status = 0
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answered: asyncio.Future[int] | None = None
        self._bodiless = False
        self._timer: asyncio.TimerHandle | None = None

    async def exchange(self, request: bytes, bodiless: bool) -> int:
        """Send a request and return the status of its answer, once that is complete. Raises OSError or HttpParserError."""
        if self._transport is None:
            raise ConnectionResetError("the mirror closed the connection")
        self.reusable, self.status, self._bodiless = False, 0, bodiless
        self._parser = httptools.HttpResponseParser(self)
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answered
        finally:
            self._parser = self._answered = None

    def rest(self, seconds: float) -> None:
        """Wait for the next copy, at most `seconds`."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self.close)

    def wake(self) -> bool:
        """End the wait; tell whether the connection still stands."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """End the connection, whatever waits in it."""
        self.reusable = False
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()

    def _end(self, error: BaseException | None = None) -> None:
        if self._answered is not None and not self._answered.done():
            if error is None:
                self._answered.set_result(self.status)
            else:
                self._answered.set_exception(error)

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._answered is None or self._answered.done():
            self.close()  # nobody asked for it
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.reusable = False
            self._end(error)

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        self._transport = None
        # An answer without a length ends with its connection (RFC 9112 6.3).
        self._end(None if self.status and error is None else ConnectionResetError("the mirror closed the connection"))

    # -- httptools

    def on_message_begin(self) -> None:
        if self.status:
            self.reusable = False  # something behind the answer: nobody asked for it

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status >= 200 and not self.status:
            self.status = status
            if self._bodiless:
                self._end()  # what follows would be read as a body: the connection is not used again

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._answered is not None and not self._answered.done() and self.status:
            self.reusable = self._parser.should_keep_alive()
            self._end()


async def settle(seconds: float) -> None:
    """Wait until the copies under way have ended, at most `seconds`; then give them up."""
    if _delivering:
        _, late = await asyncio.wait(set(_delivering), timeout=seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
