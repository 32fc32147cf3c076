"""A gRPC service as grpcio serves it, without generated code: messages are bytes.

Strategy: every method shows one thing that a gateway can get wrong; what a call was told is kept for the test to look at.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

from tests.integration.processes import PATIENCE

SERVICE = "bank.v1.Payments"


class GrpcBank:
    """A server on a free port. `metadata` is what the last call was told, `remaining` its time in seconds."""

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}
        self.remaining: float | None = None
        self.go_on = threading.Event()
        self.calls = 0
        methods: dict[str, Callable[..., Any]] = {
            "Transfer": grpc.unary_unary_rpc_method_handler(self._transfer),
            "Refuse": grpc.unary_unary_rpc_method_handler(self._refuse),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
            "Stop": grpc.unary_stream_rpc_method_handler(self._stop),
            "Nothing": grpc.unary_stream_rpc_method_handler(self._nothing),
        }
        self.server = grpc.server(futures.ThreadPoolExecutor(8))
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def close(self) -> None:
        self.go_on.set()
        self.server.stop(0).wait(PATIENCE)

    def _note(self, context: grpc.ServicerContext) -> None:
        self.calls += 1
        self.metadata = {str(key): value for key, value in context.invocation_metadata()}
        self.remaining = context.time_remaining()
        context.send_initial_metadata((("x-begin", "yes"),))
        context.set_trailing_metadata((("x-end", "done"), ("x-raw-bin", b"\x00\xff")))

    def _transfer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._note(context)
        return b"paid " + request

    def _refuse(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._note(context)
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not 100 % covered: é")

    def _watch(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """The first message at once, the others when the test says so."""
        self._note(context)
        for number in range(int(request)):
            if number == 1:
                self.go_on.wait(PATIENCE)
            yield b"%d" % number * (1 + number * 7)

    def _stop(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        self._note(context)
        yield b"one"
        context.abort(grpc.StatusCode.DATA_LOSS, "gone")

    def _nothing(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        self._note(context)
        yield from ()
