"""The SPIFFE Workload API (FetchX509SVID) as a member uses it: one call to the agent on this machine, held open, and what it brings.

Strategy: gRPC is one HTTP/2 stream with frames of five bytes and a message, and the message has six fields, so h2, which is here for health
checks, and a screen of code do what `spiffe` and `grpcio` need 40 MiB for, in a sidecar that may have 30. Whatever comes is bounded and checked before it
is believed: the agent is trusted to say who we are, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import socket
import ssl
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

ENVIRONMENT = "SPIFFE_ENDPOINT_SOCKET"  # SPIFFE_Workload_Endpoint 4
METHOD = "/SpiffeWorkloadAPI/FetchX509SVID"
MOST = 4 << 20  # bytes of a message: gRPC's own bound
MOST_CERTIFICATES = 64  # of a chain or a bundle
CONNECT, FIRST = 5.0, 30.0  # seconds to connect, and from there to the first message
PIECE = 64 << 10  # bytes of one read
OK, INVALID, DENIED, UNIMPLEMENTED, UNAVAILABLE = 0, 3, 7, 12, 14  # codes of gRPC
WORDS = {INVALID: "it refuses the call", DENIED: "it knows no identity for this process: is there a registration entry with its selectors?",
         UNIMPLEMENTED: "it does not serve X.509-SVIDs", UNAVAILABLE: "it is not ready"}  # fmt: skip


class AgentError(Exception):
    """The agent gave nothing usable; `lasting` when trying again will not help without somebody's doing."""

    def __init__(self, text: str, lasting: bool = False) -> None:
        super().__init__(text)
        self.lasting = lasting


@dataclass(frozen=True)
class Agent:
    """Where the agent listens: a Unix socket, or TCP on a numeric address."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


@dataclass(frozen=True)
class Shown:
    """One identity that the agent holds for this process."""

    identity: str
    chain: tuple[bytes, ...]  # DER, the leaf first
    key: bytes = field(repr=False)  # PKCS #8, DER
    bundle: tuple[bytes, ...]

    @property
    def chain_pem(self) -> str:
        return "".join(map(ssl.DER_cert_to_PEM_cert, self.chain))

    @property
    def bundle_pem(self) -> str:
        return "".join(map(ssl.DER_cert_to_PEM_cert, self.bundle))

    @property
    def key_pem(self) -> str:
        return ssl.DER_cert_to_PEM_cert(self.key).replace("CERTIFICATE", "PRIVATE KEY")


def agent_at(text: str | None, environment: Mapping[str, str] = os.environ) -> Agent:
    """Return the agent of `unix:PATH`, `unix:///PATH` or `tcp://ADDRESS:PORT`; without a text, of SPIFFE_ENDPOINT_SOCKET. Raises ValueError."""
    text = text or environment.get(ENVIRONMENT, "")
    if not text:
        raise ValueError(f"no address of the SPIFFE agent, and {ENVIRONMENT} is not set: unix:/run/spire/agent.sock")
    if match := re.fullmatch(r"unix:(?://)?(/[^\0?#]+)", text):
        return Agent(path=match[1])
    match = re.fullmatch(r"tcp://(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})/?", text)
    with contextlib.suppress(ValueError):
        if match is not None and 0 < int(match[3]) < 65536:
            return Agent(host=str(ipaddress.ip_address(match[1] or match[2])), port=int(match[3]))
    raise ValueError(f"{text!r} is not the address of a SPIFFE agent: unix:/run/spire/agent.sock, or tcp://127.0.0.1:PORT")


async def follow(agent: Agent) -> AsyncGenerator[list[Shown], None]:
    """Yield what the agent says, now and whenever it changes. Raises AgentError when the call ends, as every call does some day."""
    try:
        async with asyncio.timeout(CONNECT):
            reader, writer = await (asyncio.open_unix_connection(agent.path) if agent.path else asyncio.open_connection(agent.host, agent.port))
    except TimeoutError:
        raise AgentError(f"the SPIFFE agent at {agent} takes no connection") from None
    except OSError as error:
        raise AgentError(f"the SPIFFE agent at {agent} cannot be reached: {error.strerror or error}") from None
    if not agent.path:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    try:
        async for message in _call(reader, writer):
            yield read_response(message)
    except AgentError as error:
        raise AgentError(f"the SPIFFE agent at {agent}: {error}", error.lasting) from None
    except OSError as error:
        raise AgentError(f"the SPIFFE agent at {agent} has gone: {error.strerror or error}") from None
    finally:
        writer.close()


async def _call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> AsyncGenerator[bytes, None]:
    """Make the call and yield its messages. Raises AgentError at its end."""
    import h2.config
    import h2.connection
    import h2.events
    import h2.exceptions

    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    connection.initiate_connection()
    connection.send_headers(1, [
        (":method", "POST"), (":scheme", "http"), (":path", METHOD), (":authority", "localhost"), ("content-type", "application/grpc"),
        ("te", "trailers"), ("user-agent", "crossway"), ("workload.spiffe.io", "true"),
    ])  # fmt: skip
    connection.send_data(1, bytes(5), end_stream=True)  # an empty request, not compressed
    writer.write(connection.data_to_send())
    told, held = False, b""
    while True:
        try:
            async with asyncio.timeout(None if told else FIRST):
                data = await reader.read(PIECE)
        except TimeoutError:
            raise AgentError(f"no answer within {FIRST:g} s") from None
        if not data:
            raise AgentError("it has ended the connection")
        try:
            events = connection.receive_data(data)
        except (h2.exceptions.H2Error, ValueError):
            raise AgentError("it does not speak HTTP/2") from None
        for event in events:
            if isinstance(event, h2.events.DataReceived):
                held += event.data or b""
                connection.acknowledge_received_data(event.flow_controlled_length or 0, 1)
                message, held = _message(held)
                while message is not None:
                    told = True
                    yield message
                    message, held = _message(held)
            elif isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                _judge(event.headers or (), isinstance(event, h2.events.TrailersReceived))
            elif isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset, h2.events.ConnectionTerminated)):
                raise AgentError("it has ended the call")
        writer.write(connection.data_to_send())


def _message(held: bytes) -> tuple[bytes | None, bytes]:
    """Take one whole message off what has come; None while there is none."""
    if len(held) < 5:
        return None, held
    size = int.from_bytes(held[1:5], "big")
    if held[0] or size > MOST:
        raise AgentError("its message is compressed" if held[0] else f"its message is larger than {MOST >> 20} MiB", True)
    return (held[5 : 5 + size], held[5 + size :]) if len(held) >= 5 + size else (None, held)


def _judge(headers: object, trailers: bool) -> None:
    """Raise AgentError for a head that is no success, and for the end of a call."""
    fields = {_text(name): _text(value) for name, value in headers}  # type: ignore[attr-defined]
    status, code = fields.get(":status", "200"), fields.get("grpc-status")
    if status != "200":
        raise AgentError(f"it answers {status}")
    if code is None and not trailers:
        return
    number = int(code) if code is not None and re.fullmatch("[0-9]{1,3}", code) else -1
    words = unquote(fields.get("grpc-message", ""))[:200]
    said = "it has ended the call" if number == OK else WORDS.get(number, f"it ends the call with gRPC status {code}")
    raise AgentError(f"{said} ({words})" if words else said, number in (INVALID, UNIMPLEMENTED))


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def read_response(message: bytes) -> list[Shown]:
    """Return the identities in an X509SVIDResponse, the default one first. Raises AgentError."""
    try:
        found = [_svid(value) for number, value in _fields(message) if number == 1]
    except (ValueError, UnicodeDecodeError) as error:
        raise AgentError(f"its message cannot be read: {error}") from None
    if not found:
        raise AgentError(WORDS[DENIED])
    return found


def _svid(message: bytes) -> Shown:
    """One X509SVID: 1 the id, 2 the chain, 3 the key, 4 the bundle of its trust domain, 5 a hint."""
    fields = dict(_fields(message))
    return Shown(fields.get(1, b"").decode(), tuple(_certificates(fields.get(2, b""))), fields.get(3, b""), tuple(_certificates(fields.get(4, b""))))


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (number, value) of the fields of a protobuf message that have a length; others, of later versions, are passed over."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 2:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError("a field is longer than the message")
            yield key >> 3, message[at : at + size]
            at += size
        elif kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of wire type {kind}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for number, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << (7 * number)
        if byte < 0x80:
            return value, at + number + 1
    raise ValueError("a number does not end")


def _certificates(der: bytes) -> Iterator[bytes]:
    """Take concatenated DER apart: each certificate is a SEQUENCE with its length."""
    at = 0
    for _ in range(MOST_CERTIFICATES):
        if at == len(der):
            return
        if der[at] != 0x30 or at + 2 > len(der):
            raise ValueError("what should be a certificate is none")
        wide = der[at + 1] & 0x7F if der[at + 1] & 0x80 else 0
        size = int.from_bytes(der[at + 2 : at + 2 + wide], "big") if wide else der[at + 1]
        end = at + 2 + wide + size
        if wide > 4 or end > len(der):
            raise ValueError("a certificate is longer than its message")
        yield der[at:end]
        at = end
    raise ValueError(f"more than {MOST_CERTIFICATES} certificates")
