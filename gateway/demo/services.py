"""The bank's three services, payments, accounts and ledger: plain Starlette, each under a uvicorn of its own.

Strategy: nothing here knows of a mesh. A service calls another by its name, `http://ledger`, and how that is reached is the matter of
its surroundings (`http_proxy`, as for any program). What a good service does anyway is enough: it passes `traceparent` on, gives
whatever moves money an Idempotency-Key, enters a key once, and writes a line for each request.

    http_proxy=http://127.0.0.1:9102 uvicorn --factory gateway.demo.services:payments --port 9001
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LEDGER = os.environ.get("LEDGER", "http://ledger")
INSTANCE = os.environ.get("INSTANCE", "1")
VERSION = os.environ.get("VERSION", "v1")
BOOK = os.environ.get("BOOK", "book.db")
PATIENCE = 15.0  # seconds for another service


# --- payments ---


def payments() -> Starlette:
    """POST /v1/payments books through the ledger, GET /v1/payments/{id} reads one back."""
    made: dict[str, dict[str, object]] = {}

    async def create(request: Request) -> Response:
        order = await request.json()
        name = f"p-{secrets.token_hex(4)}"
        entry = {"payment": name, "amount": order["amount"]}
        said = await call(request, "POST", f"{LEDGER}/entries", entry, key=name)
        if said.status != 201:
            return JSONResponse({"id": name, "status": "failed", "ledger": said.status, "why": said.text}, 502)
        made[name] = {"id": name, "status": "booked", **json.loads(said.text), **order}
        return JSONResponse(made[name], 201, headers={"Location": f"/v1/payments/{name}"})

    async def read(request: Request) -> Response:
        payment = made.get(request.path_params["id"])
        return JSONResponse(payment) if payment else JSONResponse({"error": "no such payment"}, 404)

    return service(
        Route("/v1/payments", create, methods=["POST"]),
        Route("/v1/payments/{id}", read, methods=["GET"]),
    )


# --- accounts ---


def accounts() -> Starlette:
    """What a customer has. It would like to show the entries too, and asks the ledger for them."""

    async def listing(request: Request) -> Response:
        said = await call(request, "GET", f"{LEDGER}/balance")
        if said.status != 200:
            return JSONResponse({"error": "no balance", "why": said.text}, 502)
        return JSONResponse({"accounts": [{"iban": "DE02120300000000202051", **json.loads(said.text)}]})

    async def entries(request: Request) -> Response:
        said = await call(request, "GET", f"{LEDGER}/entries")
        return Response(said.text, said.status, media_type=said.kind)

    async def rates(_request: Request) -> Response:
        return JSONResponse({"EUR/USD": "1.0841"})

    return service(
        Route("/v1/accounts", listing),
        Route("/v1/accounts/{iban}/entries", entries),
        Route("/public/rates", rates),
    )


# --- ledger ---


def ledger() -> Starlette:
    """POST /entries enters an amount, once for each Idempotency-Key; all instances write into one book."""
    with opened() as book:
        book.execute("PRAGMA journal_mode = WAL")
        book.execute(
            "CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, cents INTEGER NOT NULL)"
        )

    def enter(key: str, cents: int) -> int:
        with opened() as book:
            book.execute("INSERT INTO entries (key, cents) VALUES (?, ?) ON CONFLICT (key) DO NOTHING", (key, cents))
            number: int = book.execute("SELECT number FROM entries WHERE key = ?", (key,)).fetchone()[0]
        return number

    def select(what: str) -> list[Any]:
        with opened() as book:
            return book.execute(f"SELECT {what} FROM entries").fetchall()

    async def write(request: Request) -> Response:
        entry = await request.json()
        key = request.headers.get("idempotency-key", entry["payment"])
        number = await run_in_threadpool(enter, key, int(Decimal(entry["amount"]) * 100))
        return JSONResponse({"entry": number, "ledger": INSTANCE, "version": VERSION}, 201)

    async def read(_request: Request) -> Response:
        return JSONResponse({"entries": await run_in_threadpool(select, "number, cents")})

    async def balance(_request: Request) -> Response:
        count, cents = (await run_in_threadpool(select, "COUNT(*), COALESCE(SUM(cents), 0)"))[0]
        return JSONResponse({"entries": count, "balance": f"-{Decimal(cents) / 100:.2f}"})

    return service(
        Route("/entries", write, methods=["POST"]),
        Route("/entries", read, methods=["GET"]),
        Route("/balance", balance),
    )


@contextlib.contextmanager
def opened() -> Iterator[sqlite3.Connection]:
    """Open the book for one transaction."""
    with contextlib.closing(sqlite3.connect(BOOK, timeout=PATIENCE)) as book, book:
        book.execute("PRAGMA synchronous = NORMAL")  # outlives every kill, not the machine
        yield book


# --- what all of them do ---


class Said(NamedTuple):
    """What another service answered."""

    status: int
    kind: str
    text: str


async def call(request: Request, method: str, url: str, body: object = None, key: str | None = None) -> Said:
    """Call another service on behalf of a request, whose trace goes on."""
    headers = {"Content-Type": "application/json"}
    if trace := request.headers.get("traceparent"):
        headers["traceparent"] = trace
    if key is not None:
        headers["Idempotency-Key"] = key
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, headers, method=method)
    return await run_in_threadpool(_fetch, asked)


def _fetch(asked: urllib.request.Request) -> Said:
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            return Said(answer.status, answer.headers.get_content_type(), answer.read().decode())
    except urllib.error.HTTPError as refused:
        with refused:
            return Said(refused.code, refused.headers.get_content_type(), refused.read().decode())
    except OSError as error:
        return Said(502, "text/plain", f"no answer: {error}")


class Log:
    """Writes one JSON line for each request, before its answer leaves."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began = time.perf_counter()
        headers = dict(scope["headers"])

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                line = {
                    "method": scope["method"], "path": scope["path"], "status": message["status"],
                    "ms": round((time.perf_counter() - began) * 1000, 3), "traceparent": headers.get(b"traceparent", b"").decode(),
                }  # fmt: skip
                print(json.dumps(line), file=sys.stdout, flush=True)
            await send(message)

        await self._app(scope, receive, answer)


def service(*routes: Route) -> Starlette:
    """Return an application of these routes that keeps a log."""
    return Starlette(routes=list(routes), middleware=[Middleware(Log)])
