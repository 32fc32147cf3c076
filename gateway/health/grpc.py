"""The gRPC health checking protocol (grpc.health.v1): one Check call over HTTP/2.

Strategy: `http2` does the talking; the two messages have one field each, so they are written and read by hand, within bounds.
"""

from __future__ import annotations

import asyncio
import struct

from gateway.health.http2 import Answer, ask

MAX_MESSAGE = 16 << 10  # bytes; a HealthCheckResponse has two
MAX_TRAFFIC = 256 << 10  # bytes read for one call
STATUSES = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
# https://grpc.io/docs/guides/status-codes
CODES = {1: "CANCELLED", 2: "UNKNOWN", 4: "DEADLINE_EXCEEDED", 5: "NOT_FOUND", 7: "PERMISSION_DENIED", 8: "RESOURCE_EXHAUSTED",
         12: "UNIMPLEMENTED", 13: "INTERNAL", 14: "UNAVAILABLE", 16: "UNAUTHENTICATED"}


async def ask_grpc(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, service: str, host: str, timeout: float, scheme: str = "http"
) -> str:
    """Make the call on a fresh connection; return why the endpoint is not healthy."""
    head = [
        (":method", "POST"), (":scheme", scheme), (":path", "/grpc.health.v1.Health/Check"), (":authority", host),
        ("content-type", "application/grpc"), ("te", "trailers"), ("user-agent", "crossway-check"),
        ("grpc-timeout", f"{max(1, round(timeout * 1000))}m"),
    ]
    answer = await ask(
        reader, writer, head, request(service), most=MAX_TRAFFIC, enough=lambda answer: len(answer.body) > MAX_MESSAGE
    )
    return answer.failure or verdict(answer)


def verdict(answer: Answer) -> str:
    """Return why the answer is not SERVING, or an empty text."""
    if len(answer.body) > MAX_MESSAGE:
        return "the answer is too long"
    if answer.fields.get(":status") != "200":
        return f"HTTP status {answer.fields.get(':status', 'missing')[:16]}"
    code = answer.fields.get("grpc-status", "")
    if code != "0":
        name = CODES.get(int(code), code[:8]) if code.isascii() and code.isdecimal() and len(code) < 3 else "missing"
        return f"gRPC status {name}"
    status = serving_status(answer.body)
    return "" if status == 1 else STATUSES.get(status, "an unknown status") if status >= 0 else "the answer is malformed"


def request(service: str) -> bytes:
    """Return a HealthCheckRequest with its prefix: not compressed, its length."""
    name = service.encode()
    message = b"\x0a" + _varint(len(name)) + name if name else b""
    return struct.pack("!BI", 0, len(message)) + message


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def serving_status(body: bytes) -> int:
    """Return the status in a HealthCheckResponse with its prefix; -1 when it cannot be read."""
    if len(body) < 5 or body[0] != 0 or struct.unpack_from("!I", body, 1)[0] != len(body) - 5:
        return -1
    at, status = 5, 0
    try:
        while at < len(body):
            tag, at = _number(body, at)
            if tag & 7 == 0:
                value, at = _number(body, at)
                status = value if tag >> 3 == 1 else status
            elif tag & 7 == 2:
                length, at = _number(body, at)
                at += length
            elif tag & 7 in (1, 5):
                at += 8 if tag & 7 == 1 else 4
            else:
                return -1
    except (IndexError, ValueError):
        return -1
    return status if at == len(body) else -1


def _number(body: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")
