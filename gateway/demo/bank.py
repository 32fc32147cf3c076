"""The bank itself: payments, accounts (two instances), ledger and the token issuer, each on its own port of one process.

Strategy: five small Starlette applications under uvicorn, in one loop, because a newcomer waits for them to start. payments
calls ledger over HTTP, as it would over a network. Every request that reaches payments or accounts is counted, so that a
story can prove that a refused one never did. The process prints its ports as one JSON line and ends when its standard input
does, so it cannot outlive whoever started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.demo.issuer import Issuer

HOST = "127.0.0.1"


class Counted:
    """Counts the requests that reach an application, under its name."""

    def __init__(self, name: str, app: ASGIApp, seen: Counter[str]) -> None:
        self._name, self._app, self._seen = name, app, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._seen[self._name] += 1
        await self._app(scope, receive, send)


def ledger() -> Starlette:
    """Return the ledger: POST /entries books an amount and answers with the number of the entry."""
    entries: list[dict[str, object]] = []

    async def book(request: Request) -> Response:
        entries.append(await request.json())
        return JSONResponse({"entry": len(entries)}, 201)

    return Starlette(routes=[Route("/entries", book, methods=["POST"])])


async def book(port: int, entry: dict[str, object]) -> int:
    """Book an entry in the ledger at a port and return its number; raise OSError when the ledger does not take it."""
    body = json.dumps(entry).encode()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(
            b"POST /entries HTTP/1.1\r\nHost: ledger\r\nConnection: close\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        answer = await reader.read()
    finally:
        writer.close()
    head, _, rest = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 201 "):
        raise OSError(f"the ledger answered {head[:40]!r}")
    number: int = json.loads(rest)["entry"]
    return number


def payments(ledger_port: int) -> Starlette:
    """Return payments: POST /v1/payments books through the ledger, GET /v1/payments/{id} reads one back."""
    made: dict[str, dict[str, object]] = {}
    numbers = itertools.count(1)

    async def create(request: Request) -> Response:
        order = await request.json()
        name = f"p-{next(numbers)}"
        entry = await book(ledger_port, {"payment": name, "amount": order["amount"]})
        made[name] = {"id": name, "status": "booked", "entry": entry, **order}
        return JSONResponse(made[name], 201, headers={"Location": f"/v1/payments/{name}"})

    async def read(request: Request) -> Response:
        payment = made.get(request.path_params["id"])
        return JSONResponse(payment) if payment else JSONResponse({"error": "no such payment"}, 404)

    return Starlette(
        routes=[Route("/v1/payments", create, methods=["POST"]), Route("/v1/payments/{id}", read, methods=["GET"])]
    )


def accounts(instance: str) -> Starlette:
    """Return one instance of accounts, which names itself in its answers."""

    async def listing(_request: Request) -> Response:
        return JSONResponse(
            {"instance": instance, "accounts": [{"iban": "DE02120300000000202051", "balance": "1204.50"}]}
        )

    async def rates(_request: Request) -> Response:
        return JSONResponse({"instance": instance, "EUR/USD": "1.0841"})

    return Starlette(routes=[Route("/v1/accounts", listing), Route("/public/rates", rates)])


def auth(issuer: Issuer, seen: Counter[str]) -> Starlette:
    """Return the issuer's service: keys, tokens, and what has reached the bank so far."""

    async def keys(_request: Request) -> Response:
        return JSONResponse(issuer.jwks())

    async def token(request: Request) -> Response:
        return JSONResponse({"access_token": issuer.token(**await request.json()), "token_type": "Bearer"})

    async def reached(_request: Request) -> Response:
        return JSONResponse({"reached": sum(seen.values())})

    return Starlette(
        routes=[
            Route("/.well-known/jwks.json", keys),
            Route("/token", token, methods=["POST"]),
            Route("/reached", reached),
        ]
    )


class Server(uvicorn.Server):
    """A uvicorn server that leaves the signals alone: five of them share a process, which has its own way to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install nothing."""
        yield


async def ended() -> None:
    """Return when standard input ends, or at SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    waits = [asyncio.ensure_future(over.wait()), asyncio.ensure_future(reader.read())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


async def serve() -> None:
    """Run the bank until its standard input ends."""
    names = ("payments", "accounts-1", "accounts-2", "ledger", "auth")
    sockets = {name: socket.create_server((HOST, 0), backlog=256) for name in names}
    ports: dict[str, int] = {name: sock.getsockname()[1] for name, sock in sockets.items()}
    seen: Counter[str] = Counter()
    apps: dict[str, ASGIApp] = {
        "payments": Counted("payments", payments(ports["ledger"]), seen),
        "accounts-1": Counted("accounts-1", accounts("accounts-1"), seen),
        "accounts-2": Counted("accounts-2", accounts("accounts-2"), seen),
        "ledger": ledger(),
        "auth": auth(Issuer(), seen),
    }
    servers = []
    for app in apps.values():
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=75)
        servers.append(Server(config))
    tasks = [
        asyncio.ensure_future(server.serve(sockets=[sock]))
        for server, sock in zip(servers, sockets.values(), strict=True)
    ]
    # The sockets listen already: a request that comes before its server has started waits in the backlog.
    print(json.dumps(ports), flush=True)
    await ended()
    for server in servers:
        server.should_exit = server.force_exit = True
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve())
