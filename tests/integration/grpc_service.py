"""A ledger behind gRPC, in a process of its own: grpcio serves it without generated code, messages are bytes.

    python -m tests.integration.grpc_service edge.crt edge.key 0 0 [grpc.some_option=VALUE ...]

Strategy: a call is told what to do by its metadata, so a test says everything in one place: `x-id` names it, `x-code` is the status
it ends with, `x-times` how many calls of that id do so (the others succeed), `x-after` the messages before that, `x-hold` the number of the
message after which it waits until the call is cancelled or Control/Go comes, `x-size` and `x-count` shape what a stream of the server
sends, `x-say-*` comes back in the head and `x-end-*` in the trailers. Control is asked past the gateway, for what was seen. The
health service (grpc.health.v1) is written by hand. The process says its two ports and ends when its stdin does.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

SERVICE = "bank.v1.Ledger"
OTHER = "bank.v1.Other"
CONTROL = "bank.test.Control"
HEALTH = "grpc.health.v1.Health"
PATIENCE = 60.0  # seconds
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


class Plan:
    """What a call was told, and its entry in the log."""

    def __init__(self, service: Service, method: str, context: grpc.ServicerContext) -> None:
        told = [(str(key), value) for key, value in context.invocation_metadata()]
        self.service, self.context, self.told = service, context, {key: value for key, value in told}
        self.id = str(self.told.get("x-id", ""))
        self.entry: dict[str, Any] = {
            "id": self.id, "method": method, "messages": 0, "ended": None, "remaining": context.time_remaining(), "peer": context.peer(),
            "metadata": [[key, value if isinstance(value, str) else list(value)] for key, value in told],
        }  # fmt: skip
        self.over = False
        self.gone = threading.Event()
        with service.lock:
            service.log.append(self.entry)
            service.calls[self.id] += 1
            self.number = service.calls[self.id]
        if not context.add_callback(self._ended):
            self._ended()
        head = [(key, value) for key, value in told if key.startswith("x-say-")]
        if head:
            context.send_initial_metadata(head)
        context.set_trailing_metadata([(key, value) for key, value in told if key.startswith("x-end-")])

    def _ended(self) -> None:
        self.entry["ended"] = self.entry["ended"] or ("done" if self.over else "cancelled")
        self.entry["ended_at"] = time.monotonic()
        self.gone.set()

    def count(self, name: str, default: int = 0) -> int:
        return int(self.told.get(name, default))

    def step(self, done: int) -> None:
        """`done` messages were dealt with: hold, or fail, if it is time for that."""
        if "x-hold" in self.told and self.count("x-hold") == done:
            self.entry["holding"] = True
            while not (self.gone.wait(0.02) or self.service.go.is_set()):
                pass
        code = self.service.fails or self.told.get("x-code")
        if code and self.count("x-after") == done and self.number <= self.count("x-times", 1 << 30):
            self.over = True
            self.context.abort(grpc.StatusCode[str(code)], "as told: 100 % & é")

    def end(self) -> None:
        self.over = True


class Service:
    """The handlers of all services."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.log: list[dict[str, Any]] = []
        self.calls: Counter[str] = Counter()
        self.go = threading.Event()
        self.healthy = True
        self.fails = ""                             # the status of every call, whatever it is told
        unary, client = grpc.unary_unary_rpc_method_handler, grpc.stream_unary_rpc_method_handler
        server, both = grpc.unary_stream_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        ledger = {"Book": unary(self.book), "Collect": client(self.collect), "List": server(self.list), "Talk": both(self.talk)}
        tables = {
            SERVICE: ledger, OTHER: {"Book": unary(self.other)}, HEALTH: {"Check": unary(self.check)},
            CONTROL: {"Seen": unary(self.seen), "Go": unary(self.release), "Health": unary(self.turn), "Fail": unary(self.fail)},
        }  # fmt: skip
        self.handlers = tuple(grpc.method_handlers_generic_handler(name, methods) for name, methods in tables.items())

    # -- the ledger

    def book(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        plan = Plan(self, "Book", context)
        plan.entry["messages"] = 1
        plan.step(0)
        plan.end()
        return b"booked " + request

    def collect(self, requests: Iterable[bytes], context: grpc.ServicerContext) -> bytes:
        plan, total, digest = Plan(self, "Collect", context), 0, hashlib.sha256()
        plan.step(0)
        for number, request in enumerate(requests, 1):
            plan.entry["messages"] = number
            total += len(request)
            digest.update(request)
            plan.step(number)
        plan.end()
        return json.dumps({"messages": plan.entry["messages"], "bytes": total, "sha256": digest.hexdigest()}).encode()

    def list(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        plan = Plan(self, "List", context)
        plan.step(0)
        for number in range(1, plan.count("x-count", 3) + 1):
            yield message(number, plan.count("x-size", 16))
            plan.entry["messages"] = number
            plan.step(number)
        plan.end()

    def talk(self, requests: Iterable[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        plan = Plan(self, "Talk", context)
        plan.step(0)
        for number, request in enumerate(requests, 1):
            plan.entry["messages"] = number
            yield b"%d:" % number + request
            plan.step(number)
        plan.end()

    def other(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        Plan(self, "Other", context).end()
        return b"other " + request

    # -- around it

    def check(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """HealthCheckRequest{service = 1} to HealthCheckResponse{status = 1}."""
        name = request[2:].decode() if request[:1] == b"\x0a" else ""
        if name not in ("", SERVICE):
            context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return SERVING if self.healthy else NOT_SERVING

    def turn(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.healthy = request == b"well"
        return b""

    def fail(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.fails = request.decode()
        return b""

    def release(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        (self.go.set if request == b"go" else self.go.clear)()
        return b""

    def seen(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """The calls of an id, or all."""
        with self.lock:
            return json.dumps([each for each in self.log if not request or each["id"] == request.decode()]).encode()


def message(number: int, size: int) -> bytes:
    """Message `number` of a stream of the server."""
    return (b"%d." % number * (size // 2 + 1))[:size]


def main(cert: str, key: str, clear: str, secure: str, *options: str) -> None:
    pairs = [option.partition("=")[::2] for option in options]
    settings = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    settings += [(name, int(value)) for name, value in pairs]
    service = Service()
    server = grpc.server(futures.ThreadPoolExecutor(64), options=settings)
    server.add_generic_rpc_handlers(service.handlers)
    credentials = grpc.ssl_server_credentials([(Path(key).read_bytes(), Path(cert).read_bytes())])
    ports = [server.add_insecure_port(f"127.0.0.1:{clear}"), server.add_secure_port(f"127.0.0.1:{secure}", credentials)]
    server.start()
    print(*ports, flush=True)
    sys.stdin.read()
    service.go.set()
    server.stop(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
