"""A name server on a free loopback port whose records a test changes while it runs.

Strategy: answers are built by dnspython, so that the gateway's own reader of DNS messages meets somebody else's writer. UDP and
TCP in a thread each; an answer that does not fit is truncated over UDP, as real servers do.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import Counter
from typing import Self

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset


class NameServer:
    """Serves `records`; a name can also be made to fail, or all to get no answer."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.records: dict[tuple[str, str], list[str]] = {}
        self.failing: dict[str, str] = {}  # name -> rcode
        self.silent = False
        self.ttl = 1
        self.asked: Counter[tuple[str, str, str]] = Counter()  # name, type, transport
        self._tcp = socket.create_server((host, 0))
        self.port: int = self._tcp.getsockname()[1]
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind((host, self.port))
        for run in (self._serve_udp, self._serve_tcp):
            threading.Thread(target=run, daemon=True).start()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def a(self, name: str, *addresses: str) -> None:
        """Let a name have exactly these IPv4 addresses."""
        self.records = {**self.records, (name, "A"): list(addresses)}

    def srv(self, name: str, *records: str) -> None:
        """Let a name have exactly these services: `priority weight port host.`"""
        self.records = {**self.records, (name, "SRV"): list(records)}

    def answer(self, data: bytes, transport: str) -> bytes | None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name, kind = question.name.to_text(omit_final_dot=True).lower(), dns.rdatatype.to_text(question.rdtype)
        self.asked[name, kind, transport] += 1
        if self.silent:
            return None
        response = dns.message.make_response(query, recursion_available=True)
        if name in self.failing:
            response.set_rcode(dns.rcode.from_text(self.failing[name]))
        elif not any(known == name for known, _ in self.records):
            response.set_rcode(dns.rcode.NXDOMAIN)
        elif found := self.records.get((name, kind)):
            response.answer.append(dns.rrset.from_text_list(question.name, self.ttl, "IN", kind, found))
        wire = response.to_wire(max_size=65535)
        if transport == "udp" and len(wire) > (query.payload if query.edns >= 0 else 512):
            response.answer.clear()
            response.flags |= dns.flags.TC
            wire = response.to_wire()
        return wire

    def _serve_udp(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, client = self._udp.recvfrom(4096)
                if not data:
                    return  # shut down
                if (wire := self.answer(data, "udp")) is not None:
                    self._udp.sendto(wire, client)

    def _serve_tcp(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._tcp.accept()
                with connection, contextlib.suppress(OSError, struct.error):
                    connection.settimeout(5)
                    (length,) = struct.unpack("!H", connection.recv(2, socket.MSG_WAITALL))
                    if (wire := self.answer(connection.recv(length, socket.MSG_WAITALL), "tcp")) is not None:
                        connection.sendall(struct.pack("!H", len(wire)) + wire)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for sock in (self._udp, self._tcp):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
