"""The admin process: /livez, /readyz, /metrics, /status, /workers, /upstreams and POST /reload.

Strategy: its own process, so that a scrape never delays a request and a defect here never stops one. It answers from the
shared memory and from the state that the supervisor pushes whenever something changes; only a reload asks back. The
listening socket is the supervisor's, so a restart of this process refuses nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import gateway
from gateway.server import log as logs
from gateway.server.channel import ChannelClosed, Message
from gateway.server.guard import Guard
from gateway.server.launch import AdminLaunch
from gateway.server.log import log
from gateway.server.metrics import exposition, worker_counters
from gateway.server.process import cpu_seconds
from gateway.server.watch import Watch
from gateway.telemetry.upstreams import report

if TYPE_CHECKING:
    from gateway.server.member import Member

MAX_HEAD = 32 * 1024  # bytes
CONCURRENT = 100  # connections and requests; beyond it 503
RELOAD_LIMIT = 180.0  # seconds; longer than all stages of a reload together
STATUS_OF = {"invalid": 422, "mismatch": 412, "bind": 409, "stopping": 503, "timeout": 504}


def json(data: Any, status: int = 200) -> Response:
    import orjson

    return Response(orjson.dumps(data, option=orjson.OPT_APPEND_NEWLINE), status, media_type="application/json")


class Admin:
    """The pages, and the conversation with the supervisor."""

    def __init__(self, launch: AdminLaunch, loop: asyncio.AbstractEventLoop) -> None:
        self.memory = launch.memory
        self.channel = launch.channel
        self.state = launch.state
        self.loop = loop
        self.reloads: dict[int, asyncio.Future[Message]] = {}
        self.numbers = itertools.count(1)
        self.leaving = asyncio.Event()
        self.watch = Watch(lambda: self.state, self.reload_unheard)
        self.member: Member | None = None
        routes = [
            Route("/livez", self.livez),
            Route("/readyz", self.readyz),
            Route("/metrics", self.metrics),
            Route("/status", self.status),
            Route("/workers", self.workers),
            Route("/upstreams", self.upstreams),
            Route("/reload", self.reload, methods=["POST"]),
        ]
        token = launch.config.admin.token
        starlette = Starlette(routes=routes, exception_handlers={HTTPException: _problem, Exception: _failed})
        self.app = Guard(starlette, launch.config.admin.bind, token.get_secret_value() if token else None)

    # -- pages

    async def livez(self, request: Request) -> Response:
        return json({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        ready, detail = readiness(self.state)
        return json({"status": "ready" if ready else "not ready", "detail": detail}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        by_worker = request.query_params.get("by") == "worker"
        accept = "" if self.member is not None else request.headers.get("accept", "")  # the mesh's lines are classic text
        body, media_type = exposition(self.memory, self.state, accept, by_worker)
        if self.member is not None:
            body += "".join(f"{line}\n" for line in self.member.exposition(self.memory)).encode()
        return Response(body, headers={"content-type": media_type})

    async def status(self, request: Request) -> Response:
        ready, detail = readiness(self.state)
        shown = {key: value for key, value in self.state.items() if key not in ("type", "watched")}
        return json({"crossway": gateway.__version__, "ready": ready, "detail": detail, **shown})

    async def workers(self, request: Request) -> Response:
        """Counters, not rates: whoever asks twice divides by the difference of `monotonic`."""
        rows = []
        for worker in self.state["workers"]:
            cpu = cpu_seconds(worker["pid"]) if worker["pid"] else None
            rows.append({**worker, **worker_counters(self.memory, worker["slot"]), "cpu_seconds": cpu})
        return json({"monotonic": time.monotonic(), "time": time.time(), "workers": rows})

    async def upstreams(self, request: Request) -> Response:
        """What all workers know of the upstreams; counters count since the gateway started."""
        return json({"monotonic": time.monotonic(), "time": time.time(), "upstreams": report(self.memory)})

    async def reload(self, request: Request) -> Response:
        """Reload, if the running configuration is the one in If-Match; answers when all workers changed or none did."""
        expect = request.headers.get("if-match", "").strip().strip('"') or None
        number = next(self.numbers)
        future = self.reloads[number] = self.loop.create_future()
        log.info("reload asked for", extra={"by": "admin", "origin": request.client.host if request.client else "unix"})
        self.tell({"type": "reload", "id": number, "expect": None if expect == "*" else expect})
        try:
            result = await asyncio.wait_for(future, RELOAD_LIMIT)
        except TimeoutError:
            return json(
                {"ok": False, "error": "timeout", "text": "the supervisor does not answer", "problems": []}, 504
            )
        finally:
            del self.reloads[number]
        shown = {key: value for key, value in result.items() if key not in ("type", "id")}
        return json(shown, 200 if result["ok"] else STATUS_OF.get(result["error"], 500))

    # -- the supervisor

    def reload_unheard(self) -> None:
        """Ask for a reload whose outcome is told by the log and the state alone."""
        self.tell({"type": "reload", "id": next(self.numbers), "expect": None})

    def tell(self, message: Message) -> None:
        self.channel.send(message)
        if self.channel.pending:
            self.loop.add_writer(self.channel.fileno(), self._flush)

    def _flush(self) -> None:
        if self.channel.flush():
            self.loop.remove_writer(self.channel.fileno())

    def hear(self) -> None:
        try:
            messages = self.channel.messages()
        except ChannelClosed:
            self.loop.remove_reader(self.channel.fileno())
            self.leaving.set()
            return
        for message in messages:
            self._take(message)

    def _take(self, message: Message) -> None:
        if message["type"] == "state":
            self.state = message
            self.watch.reported()
        elif message["type"] == "reloaded":
            future = self.reloads.get(message["id"])
            if future is not None and not future.done():
                future.set_result(message)
        elif message["type"] == "reopen":
            logs.reopen()
        elif message["type"] == "drain":
            self.leaving.set()


def readiness(state: Message) -> tuple[bool, str]:
    """Return whether new connections should come here, and why not."""
    if state["phase"] != "running":
        return False, str(state["phase"])
    ready = sum(worker["state"] == "ready" for worker in state["workers"])
    if not ready:
        return False, "no worker is ready"
    return True, f"{ready} of {len(state['workers'])} workers are ready"


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = json({"status": error.status_code, "detail": error.detail}, error.status_code)
    response.headers.update({**(error.headers or {}), "content-type": "application/problem+json"})
    return response


async def _failed(request: Request, error: Exception) -> Response:
    log.error("an admin page failed", extra={"path": request.url.path}, exc_info=error)
    response = json({"status": 500, "detail": "this page failed; the log says why"}, 500)
    response.headers["content-type"] = "application/problem+json"
    return response


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a bound on the head, which its parser does not have, and a Date that needs no clock."""

    _head = 0

    def data_received(self, data: bytes) -> None:
        self._head += len(data)
        if self._head > MAX_HEAD:
            self.transport.close()
            return
        self.server_state.default_headers = [(b"date", formatdate(usegmt=True).encode("ascii"))]
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._head = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head = 0
        super().on_body(body)


class Server(uvicorn.Server):
    """uvicorn without its signal handling, which this process has of its own, and without the ten turns a second of its main loop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._over = asyncio.Event()

    async def main_loop(self) -> None:
        """Nothing is to be done until leave()."""
        await self._over.wait()

    def leave(self) -> None:
        """Let serve() finish what is in flight, and return."""
        self.should_exit = True
        self._over.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(launch: AdminLaunch) -> None:
    loop = asyncio.get_running_loop()
    admin = Admin(launch, loop)
    config = uvicorn.Config(
        admin.app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONCURRENT,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=1,
    )
    server = Server(config)
    loop.add_reader(admin.channel.fileno(), admin.hear)
    loop.add_signal_handler(signal.SIGTERM, admin.leaving.set)
    loop.add_signal_handler(signal.SIGUSR1, logs.reopen)
    serving = asyncio.ensure_future(server.serve(sockets=[launch.sock]))
    admin.tell({"type": "ready"})
    watching = asyncio.ensure_future(admin.watch.run())
    membership = None
    if launch.config.mesh is not None:
        from gateway.server.member import Member

        admin.member = Member(launch.config)
        membership = asyncio.ensure_future(admin.member.run())
    leaving = asyncio.ensure_future(admin.leaving.wait())
    await asyncio.wait([serving, leaving], return_when=asyncio.FIRST_COMPLETED)
    watching.cancel()
    if membership is not None:
        membership.cancel()
    server.leave()
    await serving


def run(launch: AdminLaunch) -> int:
    """Be the admin process until the supervisor ends it."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # it tells of its own start and end
    uvloop.run(_serve(launch))
    return 0
