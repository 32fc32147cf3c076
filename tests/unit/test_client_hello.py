"""The name in a ClientHello: the same however it was cut, and nothing that two readers could read in two ways."""

from __future__ import annotations

import contextlib
import ssl
import struct

import pytest

from gateway._speedups.testing import parse_client_hello


def hello(name: str | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    """What OpenSSL sends."""
    written = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = version
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), written, server_hostname=name).do_handshake()
    return written.read()


def records(message: bytes, *sizes: int) -> bytes:
    """The message in records with so many bytes each; the last takes the rest."""
    out, at = b"", 0
    for size in (*sizes, len(message)):
        piece, at = message[at : at + size], at + size
        if piece:
            out += b"\x16\x03\x01" + struct.pack(">H", len(piece)) + piece
    return out


def made(*extensions: tuple[int, bytes], session: bytes = b"", suites: bytes = b"\x13\x01", compression: bytes = b"\0") -> bytes:
    """A ClientHello of our own, without its records."""
    listed = b"".join(struct.pack(">HH", kind, len(body)) + body for kind, body in extensions)
    body = b"\x03\x03" + bytes(32) + bytes([len(session)]) + session + struct.pack(">H", len(suites)) + suites
    body += bytes([len(compression)]) + compression + struct.pack(">H", len(listed)) + listed
    return b"\x01" + struct.pack(">I", len(body))[1:] + body


def server_name(*names: bytes, kind: int = 0) -> tuple[int, bytes]:
    listed = b"".join(bytes([kind]) + struct.pack(">H", len(name)) + name for name in names)
    return 0, struct.pack(">H", len(listed)) + listed


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("name", ["db.bank.test", "DB.Bank.TEST", "a", "x" * 63 + ".test", ".".join(["y" * 60] * 4)])
def test_the_name_that_openssl_sends(name: str, version: ssl.TLSVersion) -> None:
    assert parse_client_hello(hello(name, version)) == name.lower().encode()


def test_without_a_name() -> None:
    assert parse_client_hello(hello(None)) is None
    # Before TLS 1.3 all extensions could be missing.
    bare = made()[:-2]
    assert parse_client_hello(records(b"\x01" + struct.pack(">I", len(bare) - 4)[1:] + bare[4:])) is None


def test_every_prefix_waits_and_every_cut_into_records_names_the_same() -> None:
    whole = hello("db.bank.test")
    for cut in range(len(whole)):
        assert parse_client_hello(whole[:cut]) is False, cut
    message = whole[5:]
    for cut in range(1, len(message)):
        assert parse_client_hello(records(message, cut)) == b"db.bank.test", cut
    assert parse_client_hello(records(message, *[1] * len(message))) == b"db.bank.test"


def test_what_follows_in_further_records_is_not_looked_at() -> None:
    assert parse_client_hello(hello("db.bank.test") + b"\x14\x03\x03\x00\x01\x01" + b"\x17\x03\x03\xff\xff") == b"db.bank.test"


GOOD = made(server_name(b"db.bank.test"))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET / HTTP/1.1\r\n", "not TLS"),
        (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", "not TLS"),  # PostgreSQL's SSLRequest
        (b"\x80\x2e\x01\x03\x01", "not TLS"),  # SSL 2
        (b"\x16\x02\x00", "not TLS"),
        (b"\x16\x03\x01\x00\x00", "malformed"),  # an empty record
        (b"\x16\x03\x01\x40\x01", "malformed"),  # one longer than RFC 8446 allows
        (b"\x16\x03\x05\x00\x10", "malformed"),
        (records(b"\x02" + GOOD[1:]), "malformed"),  # a ServerHello
        (records(GOOD, 20)[:25] + b"\x17", "malformed"),  # another content type in the middle
        (records(GOOD + b"\0"), "malformed"),
        (records(GOOD + b"\0")[:-1], "malformed"),  # told before its last byte is there
        (b"\x16\x03\x01\x40\x00\x01\x00\x40\x00", "too long"),
        (records(made((0xFF00, bytes(16384))), 9000), "too long"),
        (records(made((0xFF00, bytes(14000))), *[1] * 3000), "too long"),  # of records the heads count too
        (records(made(server_name(b"a.test"), server_name(b"b.test"))), "malformed"),
        (records(made(server_name(b"a.test", b"b.test"))), "malformed"),
        (records(made(server_name(b"a.test", kind=1))), "malformed"),
        (records(made(server_name(b""))), "malformed"),
        (records(made((0, b""))), "malformed"),
        (records(made((0, b"\0\0"))), "malformed"),
        (records(made((0, server_name(b"a.test")[1] + b"x"))), "malformed"),
        (records(made(server_name(b"a.test."))), "malformed"),
        (records(made(server_name(b".a.test"))), "malformed"),
        (records(made(server_name(b"a..test"))), "malformed"),
        (records(made(server_name(b"a\0.test"))), "malformed"),
        (records(made(server_name(b"a/b.test"))), "malformed"),
        (records(made(server_name(b"*.test"))), "malformed"),
        (records(made(server_name("bänk.test".encode()))), "malformed"),
        (records(made(server_name(b"x" * 64 + b".test"))), "malformed"),
        (records(made(server_name(b".".join([b"x" * 50] * 5)))), "malformed"),
        (records(made(session=bytes(33))), "malformed"),
        (records(made(suites=b"")), "malformed"),
        (records(made(suites=b"\x13")), "malformed"),
        (records(made(compression=b"")), "malformed"),
    ],
)
def test_what_is_none(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_client_hello(data)


def test_every_wrong_length_is_malformed_or_waits() -> None:
    """A length that is off by one anywhere never leads to another name."""
    for at in range(len(GOOD)):
        for change in (-1, 1):
            wrong = bytearray(GOOD)
            wrong[at] = (wrong[at] + change) % 256
            try:
                found = parse_client_hello(records(bytes(wrong)))
            except ValueError:
                continue
            if found not in (False, None, b"db.bank.test"):
                assert isinstance(found, bytes) and len(found) == len(b"db.bank.test"), (at, found)
