"""Read and compare one HTTP/1.1 message as the scripted ends see it.

Strategy: an independent, pedantic reader. Whatever the gateway writes must be well formed: CRLF line ends, one framing,
token names; otherwise Malformed is raised and the transcript fails, whatever it expected. Comparing is strict too: every
field that arrives is either listed in the transcript or one that the gateway adds itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.wire.transcript import BlockLine, to_bytes

FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")
REQUEST_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+ [\x21-\x7e]+ HTTP/1\.1")
STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [\t \x21-\x7e\x80-\xff]*")
CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,16}")
OWN_REQUEST_FIELDS = {
    b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"forwarded", b"x-request-id", b"traceparent", b"via",
    b"x-crossway-deadline-ms", b"x-crossway-attempts-left",
}  # fmt: skip
OWN_RESPONSE_FIELDS = {b"via", b"x-request-id", b"date", b"server", b"connection"}
REBUILT = {b"host", b"content-length", b"transfer-encoding", b"connection"}


class Malformed(AssertionError):
    """The gateway wrote something that is not HTTP/1.1."""


@dataclass
class Message:
    """One message, possibly unfinished."""

    start: bytes
    fields: list[tuple[bytes, bytes, bytes]]
    body: bytes
    complete: bool
    length: int

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of every field with this (lower case) name."""
        return [value for lower, value, _ in self.fields if lower == name]

    @property
    def status(self) -> int:
        """The status code of a response."""
        match = STATUS_LINE.fullmatch(self.start)
        if not match:
            raise Malformed(f"not a status line: {self.start!r}")
        return int(match[1])


def _fields(lines: list[bytes]) -> list[tuple[bytes, bytes, bytes]]:
    fields = []
    for line in lines:
        match = FIELD.fullmatch(line)
        if not match:
            raise Malformed(f"not a field line: {line!r}")
        fields.append((match[1].lower(), match[2], line))
    return fields


def _chunked(data: bytes) -> tuple[bytes, int, bool]:
    """Return (payload, bytes used, done); trailers are refused, because the gateway drops them."""
    body = bytearray()
    at = 0
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            return bytes(body), len(data), False
        if not CHUNK_SIZE.fullmatch(data[at:end]):
            raise Malformed(f"not a chunk size: {data[at:end]!r}")
        size = int(data[at:end], 16)
        at = end + 2
        if size == 0:
            if len(data) < at + 2:
                return bytes(body), len(data), False
            if data[at : at + 2] != b"\r\n":
                raise Malformed(f"trailers or junk after the last chunk: {data[at : at + 40]!r}")
            return bytes(body), at + 2, True
        body += data[at : at + size]
        if len(data) < at + size + 2:
            return bytes(body), len(data), False
        if data[at + size : at + size + 2] != b"\r\n":
            raise Malformed(f"chunk data is not followed by CRLF: {data[:200]!r}")
        at += size + 2


def _framing(message: Message) -> tuple[bool, int | None]:
    """Return (chunked, content length); raises Malformed when there are two framings."""
    lengths = message.values(b"content-length")
    codings = message.values(b"transfer-encoding")
    if len(lengths) + len(codings) > 1:
        raise Malformed(f"more than one framing: {lengths} {codings}")
    if codings and codings != [b"chunked"]:
        raise Malformed(f"a transfer coding that was never asked for: {codings}")
    if lengths and not re.fullmatch(rb"[0-9]+", lengths[0]):
        raise Malformed(f"not a Content-Length: {lengths[0]!r}")
    return bool(codings), int(lengths[0]) if lengths else None


def read_message(data: bytes, *, response: bool, ended: bool = False, clean: bool = True, body: bool = True) -> Message | None:
    """Read the message at the front of `data`, or None while its head is unfinished.

    `ended` says that nothing follows, `clean` that it ended by FIN and not by RST; `body` is False for the answer to HEAD.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    lines = data[:end].split(b"\r\n")
    message = Message(lines[0], _fields(lines[1:]), b"", True, end + 4)
    if not (STATUS_LINE if response else REQUEST_LINE).fullmatch(lines[0]):
        raise Malformed(f"not a {'status' if response else 'request'} line: {lines[0]!r}")
    chunked, length = _framing(message)
    rest = data[end + 4 :]
    if response and (not body or message.status < 200 or message.status in (204, 304)):
        return message
    if chunked:
        message.body, used, message.complete = _chunked(rest)
        message.length += used
    elif length is not None:
        message.body = rest[:length]
        message.complete = len(message.body) == length
        message.length += len(message.body)
    elif response:
        message.body = rest
        message.complete = ended and clean
        message.length += len(rest)
    return message


def _split(block: tuple[BlockLine, ...]) -> tuple[list[BlockLine], bytes]:
    for index, line in enumerate(block):
        if line.kind == "|" and line.text == "":
            rest = block[index + 1 :]
            return list(block[:index]), b"".join(to_bytes(b.text) + (b"\r\n" if b.kind == "|" else b"") for b in rest)
    return list(block), b""


def _same_line(expected: BlockLine, field: tuple[bytes, bytes, bytes]) -> bool:
    lower, value, line = field
    if expected.kind == "~":
        return re.fullmatch(expected.text.encode(), line, re.IGNORECASE) is not None
    wanted = to_bytes(expected.text)
    if lower in REBUILT:
        name, _, wanted_value = wanted.partition(b":")
        return name.lower() == lower and wanted_value.strip(b" \t") == value
    return line == wanted


def compare(message: Message, block: tuple[BlockLine, ...], *, response: bool, partial: bool = False) -> str | None:
    """Return what differs between the message and the block, or None.

    Fields the gateway rebuilds (Host and framing) and adds may stand anywhere; all others must be listed, byte for byte
    and in their order.
    """
    head, body = _split(block)
    first = head[0]
    if first.kind == "~":
        if not re.fullmatch(first.text.encode(), message.start):
            return f"start line {message.start!r} does not match {first.text!r}"
    elif message.start != to_bytes(first.text):
        return f"start line is {message.start!r}, expected {to_bytes(first.text)!r}"
    left = list(enumerate(message.fields))
    places: list[int] = []
    for line in head[1:]:
        if line.kind == "!":
            if message.values(to_bytes(line.text).lower()):
                return f"field {line.text} is there: {message.values(to_bytes(line.text).lower())}"
            continue
        found = next((entry for entry in left if _same_line(line, entry[1])), None)
        if found is None:
            return f"no field line {line.text!r} in {[line for _, _, line in message.fields]}"
        left.remove(found)
        if found[1][0] not in REBUILT:
            places.append(found[0])
    own = OWN_RESPONSE_FIELDS if response else OWN_REQUEST_FIELDS
    extra = [line for _, (lower, value, line) in left if lower not in own and (lower, value) != (b"content-length", b"0")]
    names = [lower for lower, _, _ in message.fields if lower in own and lower != b"via"]
    if len(names) != len(set(names)):
        return f"a field that the gateway asserts is there twice: {[line for _, _, line in message.fields]}"
    if extra:
        return f"fields that the transcript does not list: {extra}"
    listed = [place for place in places if message.fields[place][0] not in own]
    if listed != sorted(listed):
        return f"fields in another order: {[line for _, _, line in message.fields]}"
    if partial:
        return None if message.body == body and not message.complete else f"body so far is {message.body[:200]!r}"
    if message.body != body:
        return f"body is {message.body[:200]!r} ({len(message.body)} bytes), expected {body[:200]!r} ({len(body)} bytes)"
    return None
