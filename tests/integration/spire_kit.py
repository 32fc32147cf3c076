"""A SPIFFE agent for tests: a grpcio server of FetchX509SVID in a thread, on a Unix socket, with an authority of its own.

Strategy: grpcio frames, the messages are encoded here by hand from the public proto (spiffe/go-spiffe, workload.proto), so that neither the product's
reader nor a generated one judges itself. Whoever asks gets the identities that the test set for the socket: attestation is the agent's business.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.integration.mesh_kit import Ca
from tests.integration.processes import PATIENCE, eventually

DER = serialization.Encoding.DER


def field(number: int, value: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


class Agent:
    """One socket whose callers are all the workload `identities`, in that order."""

    def __init__(self, folder: Path, name: str, *identities: str, ca: Ca | None = None, life: float = 3600) -> None:
        self.socket = folder / f"{name}.sock"
        self.ca, self.life = ca or Ca(), life
        self.identities = identities
        self.extra: list[Ca] = []  # more roots in the bundle
        self.kind: type[Any] | None = None
        self.status: grpc.StatusCode | None = None  # refuse every call with it
        self.calls = 0
        self.open = 0
        self.serials: list[int] = []
        self._changed = threading.Condition()
        self._version = 0
        self._stopped = False
        self.start()

    @property
    def address(self) -> str:
        return f"unix:{self.socket}"

    def start(self) -> None:
        self._stopped = False
        self.server = grpc.server(ThreadPoolExecutor(16))
        handler = grpc.unary_stream_rpc_method_handler(self._fetch)
        self.server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("SpiffeWorkloadAPI", {"FetchX509SVID": handler})])
        assert self.server.add_insecure_port(self.address)
        self.server.start()

    def stop(self) -> None:
        self._stopped = True
        with self._changed:
            self._changed.notify_all()
        self.server.stop(0.1).wait(PATIENCE)
        self.socket.unlink(missing_ok=True)

    def rotate(self, **changes: Any) -> None:
        """Give everybody who listens new certificates, with what changed."""
        for name, value in changes.items():
            setattr(self, name, value)
        with self._changed:
            self._version += 1
            self._changed.notify_all()

    def _fetch(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        self.calls += 1
        if ("workload.spiffe.io", "true") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request")
        if self.status is not None:
            context.abort(self.status, "no identity issued")
        self.open += 1
        try:
            while context.is_active() and not self._stopped:
                seen = self._version
                yield self._response()
                with self._changed:
                    while seen == self._version and context.is_active() and not self._stopped:
                        self._changed.wait(0.1)
        finally:
            self.open -= 1

    def _response(self) -> bytes:
        return b"".join(field(1, self._svid(identity)) for identity in self.identities)

    def _svid(self, identity: str) -> bytes:
        key: Any = ec.generate_private_key(ec.SECP256R1()) if self.kind is None else rsa.generate_private_key(65537, 2048)
        leaf = self.ca.issue(key.public_key(), identity, life=self.life, begin=-1)
        self.serials.append(leaf.serial_number)
        private = key.private_bytes(DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        bundle = b"".join(each.root.public_bytes(DER) for each in (self.ca, *self.extra))
        chain = leaf.public_bytes(DER) + self.ca.intermediate.public_bytes(DER)
        return field(1, identity.encode()) + field(2, chain) + field(3, private) + field(4, bundle) + field(5, b"internal")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def wait_for_call(agent: Agent, above: int = 0) -> None:
    eventually(lambda: agent.calls > above, "a call to the agent")


