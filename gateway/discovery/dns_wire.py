"""DNS messages: the question that is asked, and the addresses or services of an answer (RFC 1035, 2782, 3596, 6891).

Strategy: no I/O and no objects but the result: an answer of a thousand records is read in about a millisecond, so that a
worker's loop can afford it. What is not the answer to our question is told apart from an answer that is malformed: the first
may be forged and is passed over, the second is an error. Names are followed backwards only, so that no pointer can loop.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

A, CNAME, AAAA, SRV = 1, 5, 28, 33
_INTERNET = 1
_OPT = 41
_QUESTION = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")  # type, class, TTL, length
_HEADER = struct.Struct("!HHHHHH")
_SERVICE = struct.Struct("!HHH")  # priority, weight, port
MAX_RECORDS = 8192  # of an answer that are looked at; 64 KiB hold at most 4096 addresses
MAX_CHAIN = 16  # aliases that lead from the name to its addresses
PAYLOAD = 1232  # bytes; what passes without fragments (DNS flag day 2020)

NOERROR, FORMERR, SERVFAIL, NXDOMAIN = 0, 1, 2, 3
RCODES = {1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}


class Malformed(ValueError):
    """An answer to our question that cannot be read."""


@dataclass(frozen=True, slots=True, order=True)
class Service:
    """One SRV record."""

    priority: int
    weight: int
    port: int
    host: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What a name server said. `values` are addresses as bytes (A, AAAA) or Services; `ttl` in seconds is the least of all."""

    rcode: int
    truncated: bool
    values: tuple[bytes | Service, ...] = ()
    ttl: int = 0


def encode_name(name: str) -> bytes:
    """Return a name on the wire. Raises ValueError when it cannot be one."""
    out = bytearray()
    for label in name.rstrip(".").split("."):
        raw = label.encode("ascii")
        if not 1 <= len(raw) <= 63:
            raise ValueError("a label of a name has 1 to 63 bytes")
        out.append(len(raw))
        out += raw
    out.append(0)
    if len(out) > 255:
        raise ValueError("a name has at most 255 bytes")
    return bytes(out)


def question(ident: int, name: bytes, kind: int, *, extended: bool = True) -> bytes:
    """Return a query that asks for recursion; `extended` offers to take PAYLOAD bytes over UDP."""
    message = _HEADER.pack(ident, 0x0100, 1, 0, 0, int(extended)) + name + _QUESTION.pack(kind, _INTERNET)
    return message + (b"\0" + _RECORD.pack(_OPT, PAYLOAD, 0, 0) if extended else b"")


def read_reply(data: bytes, ident: int, name: bytes, kind: int) -> Reply | None:
    """Return what `data` answers to that question, None when it is the answer to another. Raises Malformed."""
    if len(data) < 12:
        return None
    got, flags, questions, answers, _, _ = _HEADER.unpack_from(data)
    if got != ident or not flags & 0x8000 or flags & 0x7800:
        return None
    rcode, truncated = flags & 15, bool(flags & 0x0200)
    if questions == 0 and rcode == FORMERR:  # some servers give nothing back of what they could not read
        return Reply(rcode, truncated)
    end = 12 + len(name)
    if questions != 1 or data[12:end].lower() != name.lower() or data[end : end + 4] != _QUESTION.pack(kind, _INTERNET):
        return None
    if truncated or rcode != NOERROR:
        return Reply(rcode, truncated)
    try:
        return _answers(data, end + 4, min(answers, MAX_RECORDS), name.lower(), kind)
    except (struct.error, IndexError):
        raise Malformed("it ends too early") from None


def _answers(data: bytes, at: int, count: int, name: bytes, kind: int) -> Reply:
    """Read the records of our kind that the name owns, itself or by aliases, in whatever order they come."""
    aliases: dict[bytes, tuple[bytes, int]] = {}
    records: dict[bytes, tuple[list[bytes | Service], int]] = {}
    owners: dict[int, bytes] = {}  # by where a pointer leads: nearly every record has the same owner
    for _ in range(count):
        if data[at] >= 0xC0:
            target = (data[at] & 0x3F) << 8 | data[at + 1]
            owner = owners.get(target)
            if owner is None:
                owner = owners[target] = _name(data, at)[0]
            at += 2
        else:
            owner, at = _name(data, at)
        found, family, ttl, length = _RECORD.unpack_from(data, at)
        at += 10
        if at + length > len(data):
            raise Malformed("a record is longer than the message")
        ttl = ttl if ttl < 1 << 31 else 0  # RFC 2181 8
        if family == _INTERNET and found == CNAME:
            aliases[owner] = (_name(data, at)[0], ttl)
        elif family == _INTERNET and found == kind:
            values, least = records.get(owner, ([], ttl))
            value = _value(data, at, length, kind)
            if value is not None:
                values.append(value)
            records[owner] = (values, min(least, ttl))
        at += length
    ttl = 1 << 31
    for _ in range(MAX_CHAIN):
        if name in records:
            values, least = records[name]
            return Reply(NOERROR, False, tuple(values), min(ttl, least))
        if name not in aliases:
            return Reply(NOERROR, False, (), 0)
        name, least = aliases[name]
        ttl = min(ttl, least)
    raise Malformed("its aliases lead nowhere")


def _value(data: bytes, at: int, length: int, kind: int) -> bytes | Service | None:
    if kind == SRV:
        if length < 7:
            raise Malformed("an SRV record is too short")
        priority, weight, port = _SERVICE.unpack_from(data, at)
        host = _text(_name(data, at + 6)[0])
        # A root target says that the service is not offered here; port 0 and names of other bytes lead nowhere.
        return Service(priority, weight, port, host) if host and port else None
    if length != (4 if kind == A else 16):
        raise Malformed("an address has the wrong length")
    return data[at : at + length]


def _name(data: bytes, at: int) -> tuple[bytes, int]:
    """Return the name at `at`, lower-cased and without pointers, and where what follows it begins."""
    out = bytearray()
    after, lowest = 0, at
    while length := data[at]:
        if length >= 0xC0:
            target = (length & 0x3F) << 8 | data[at + 1]
            if target >= lowest:
                raise Malformed("a name points forwards")
            after = after or at + 2
            at = lowest = target
            continue
        if length > 63 or len(out) + length + 2 > 255:
            raise Malformed("a name is too long")
        label = data[at : at + length + 1]
        if len(label) != length + 1:
            raise Malformed("a name ends too early")
        out += label
        at += length + 1
    out.append(0)
    return bytes(out).lower(), after or at + 1


def _text(name: bytes) -> str:
    """Return a name as text without its last dot; empty when it is the root or no host name."""
    labels, at = [], 0
    while name[at]:
        label = name[at + 1 : at + 1 + name[at]]
        if not label.replace(b"-", b"").replace(b"_", b"").isalnum():
            return ""
        labels.append(label.decode("ascii"))
        at += name[at] + 1
    return ".".join(labels)
