"""DNS messages as others write them, damaged ones, and name servers that misbehave."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from ipaddress import ip_address

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.discovery import dns as client
from gateway.discovery.dns import Client, Missing, Settings, Unanswered, candidates, parse_settings
from gateway.discovery.dns_wire import AAAA, SRV, A, Malformed, Service, encode_name, question, read_reply

NAME = "pay.bank.test"


def reply(kind: str, *sets: tuple[str, int, str, list[str]], rcode: int = 0) -> tuple[bytes, int]:
    """A response to a question about NAME, and its identifier."""
    query = dns.message.make_query(NAME, kind)
    response = dns.message.make_response(query)
    response.set_rcode(dns.rcode.Rcode(rcode))
    for owner, ttl, found, values in sets:
        response.answer.append(dns.rrset.from_text_list(owner, ttl, "IN", found, values))
    return response.to_wire(max_size=65535), query.id


def test_a_question_is_what_others_read() -> None:
    query = dns.message.from_wire(question(4711, encode_name("_pay._tcp.Bank.test."), SRV))
    assert (query.id, query.payload, query.flags & dns.flags.RD) == (4711, 1232, dns.flags.RD)
    assert query.question[0].to_text() == "_pay._tcp.Bank.test. IN SRV"
    assert dns.message.from_wire(question(1, encode_name("a"), A, extended=False)).edns == -1


@given(st.lists(st.ip_addresses(v=4), min_size=1, max_size=1200, unique=True), st.integers(0, 2**31 - 1))
def test_addresses_are_read_as_they_were_written(addresses: list[object], ttl: int) -> None:
    data, ident = reply("A", (NAME + ".", ttl, "A", [str(each) for each in addresses]))
    read = read_reply(data, ident, encode_name(NAME.upper()), A)
    assert read is not None and read.ttl == ttl
    assert sorted(str(ip_address(value)) for value in read.values if isinstance(value, bytes)) == sorted(map(str, addresses))


def test_aliases_are_followed_and_the_shortest_ttl_holds() -> None:
    data, ident = reply(
        "AAAA", ("c.other.test.", 90, "AAAA", ["fd00::1", "fd00::2"]), ("b.bank.test.", 7, "CNAME", ["C.other.test."]),
        (NAME + ".", 30, "CNAME", ["b.bank.test."]), ("stranger.test.", 1, "AAAA", ["fd00::bad"]),
    )
    read = read_reply(data, ident, encode_name(NAME), AAAA)
    assert read is not None and read.ttl == 7
    assert {socket.inet_ntop(socket.AF_INET6, value) for value in read.values if isinstance(value, bytes)} == {"fd00::1", "fd00::2"}


def test_services_are_read_and_those_that_lead_nowhere_left_out() -> None:
    records = ["10 5 8080 A.bank.test.", "20 0 443 b.bank.test.", "1 1 1 .", "1 1 0 c.bank.test.", "1 1 1 bad\\032name.test."]
    data, ident = reply("SRV", (NAME + ".", 5, "SRV", records))
    read = read_reply(data, ident, encode_name(NAME), SRV)
    assert read is not None
    assert set(read.values) == {Service(10, 5, 8080, "a.bank.test"), Service(20, 0, 443, "b.bank.test")}


def test_the_answer_to_another_question_is_none() -> None:
    data, ident = reply("A", (NAME + ".", 5, "A", ["192.0.2.1"]))
    assert read_reply(data, ident ^ 1, encode_name(NAME), A) is None
    assert read_reply(data, ident, encode_name("say.bank.test"), A) is None
    assert read_reply(data, ident, encode_name(NAME), AAAA) is None
    assert read_reply(question(ident, encode_name(NAME), A), ident, encode_name(NAME), A) is None  # an echo
    assert read_reply(b"", ident, encode_name(NAME), A) is None


def test_names_that_point_in_circles_are_malformed() -> None:
    name = encode_name(NAME)
    head = struct.pack("!HHHHHH", 7, 0x8180, 1, 1, 0, 0) + name + struct.pack("!HH", A, 1)
    for owner in (struct.pack("!H", 0xC000 | len(head)), struct.pack("!H", 0xC000 | (len(head) + 40)), b"\x40a\0"):
        with pytest.raises(Malformed):
            read_reply(head + owner + struct.pack("!HHIH", A, 1, 1, 4) + bytes(4) + bytes(64), 7, name, A)
    with pytest.raises(Malformed):  # an alias of itself
        read_reply(head + b"\xc0\x0c" + struct.pack("!HHIH", 5, 1, 1, 2) + b"\xc0\x0c", 7, name, A)


@given(st.data())
def test_damaged_answers_are_refused_or_read_but_never_break(data: st.DataObject) -> None:
    good, ident = reply("SRV", (NAME + ".", 5, "SRV", ["1 2 3 a.bank.test.", "1 2 4 b.a.bank.test."]))
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 6))):
        bad[data.draw(st.integers(2, len(bad) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(bad[: data.draw(st.integers(0, len(bad)))])
    try:
        read_reply(cut, ident, encode_name(NAME), SRV)
    except Malformed:
        pass


def test_resolv_conf_is_read_as_the_c_library_does() -> None:
    text = (
        "# a comment\nnameserver 10.0.0.53\nnameserver not-an-address\nnameserver fd00::53\nsearch a.test b.test.\n"
        "search prod.svc.test svc.test\noptions ndots:5 timeout:1 attempts:9 rotate ndots:x\nbogus\n"
    )
    settings = parse_settings(text)
    assert settings == Settings((("10.0.0.53", 53), ("fd00::53", 53)), ("prod.svc.test", "svc.test"), 5, 1, 5)
    assert parse_settings("").servers == (("127.0.0.1", 53),)
    assert candidates("pay.bank", settings) == ["pay.bank.prod.svc.test", "pay.bank.svc.test", "pay.bank"]
    assert candidates("a.b.c.d.e.f", settings)[0] == "a.b.c.d.e.f"
    assert candidates("pay.bank.", settings) == ["pay.bank"]


class Server(asyncio.DatagramProtocol):
    """A name server made of one function: from a query to the datagrams that it sends."""

    def __init__(self, answer: Callable[[dns.message.Message], list[bytes]]) -> None:
        self.answer = answer
        self.asked = 0

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, client: object) -> None:
        self.asked += 1
        for each in self.answer(dns.message.from_wire(data)):
            self.transport.sendto(each, client)  # type: ignore[arg-type]


def address_of(query: dns.message.Message, text: str = "192.0.2.1", ttl: int = 9) -> dns.message.Message:
    response = dns.message.make_response(query)
    response.answer.append(dns.rrset.from_text_list(query.question[0].name, ttl, "IN", "A", [text]))
    return response


def ask(*answers: Callable[[dns.message.Message], list[bytes]]) -> tuple[object, list[int]]:
    """What a client of these servers is told about NAME, and how often each server was asked."""

    async def run() -> tuple[object, list[int]]:
        loop = asyncio.get_running_loop()
        made = [await loop.create_datagram_endpoint(lambda answer=answer: Server(answer), ("127.0.0.1", 0)) for answer in answers]
        asking = Client(("127.0.0.1", 1))
        asking._settings = Settings(tuple(transport.get_extra_info("sockname")[:2] for transport, _ in made), attempt=2.0)
        try:
            told: object = await asking.ask(NAME, A)
        except (Missing, Unanswered) as error:
            told = error
        for transport, _ in made:
            transport.close()
        return told, [server.asked for _, server in made]

    return asyncio.run(run())


def test_forged_and_foreign_datagrams_are_passed_over() -> None:
    def answer(query: dns.message.Message) -> list[bytes]:
        forged = address_of(query, "203.0.113.66")
        forged.id = query.id ^ 0x5555
        other = address_of(dns.message.make_query("other.test", "A", id=query.id), "203.0.113.66")
        return [b"", b"\0", forged.to_wire(), other.to_wire(), address_of(query).to_wire()]

    told, _ = ask(answer)
    assert getattr(told, "values", None) == (socket.inet_aton("192.0.2.1"),), told


def test_the_next_server_is_asked_when_one_fails() -> None:
    def failing(query: dns.message.Message) -> list[bytes]:
        response = dns.message.make_response(query)
        response.set_rcode(dns.rcode.SERVFAIL)
        return [response.to_wire()]

    def damaged(query: dns.message.Message) -> list[bytes]:
        return [address_of(query).to_wire()[:-13]]

    told, asked = ask(failing, lambda query: [], damaged, lambda query: [address_of(query).to_wire()])
    assert getattr(told, "ttl", None) == 9 and asked == [1, 1, 1, 1]
    told, asked = ask(failing)
    assert isinstance(told, Unanswered) and str(told) == "SERVFAIL" and asked == [2]


def test_a_name_that_does_not_exist_is_not_asked_for_twice() -> None:
    def missing(query: dns.message.Message) -> list[bytes]:
        response = dns.message.make_response(query)
        response.set_rcode(dns.rcode.NXDOMAIN)
        return [response.to_wire()]

    told, asked = ask(missing, missing)
    assert isinstance(told, Missing) and asked == [1, 0]


def test_a_server_without_edns_is_asked_without() -> None:
    def old(query: dns.message.Message) -> list[bytes]:
        if query.edns < 0:
            return [address_of(query).to_wire()]
        response = dns.message.make_response(query)
        response.use_edns(False)
        response.set_rcode(dns.rcode.FORMERR)
        return [response.to_wire()]

    told, asked = ask(old)
    assert getattr(told, "ttl", None) == 9 and asked == [2]


def test_silence_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LIFETIME", 0.5)
    told, asked = ask(lambda query: [])
    assert isinstance(told, Unanswered) and asked[0] >= 1
