"""Key sources against real servers that rotate, lie, stall and fall over: the last good keys stay, and one asks at a time."""

import asyncio
import base64
import contextlib
import datetime
import ipaddress
import json
import logging
import os
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gateway._speedups.token_cache import TokenCache
from gateway.policies.jwt_fetch import Origin
from gateway.policies.jwt_keys import KeysError
from gateway.policies.jwt_source import FileSource, KeySource, UrlSource, open_source
from gateway.policies.jwt_verify import JwtSettings, TokenError, UnknownKey, Verifier

ALGORITHMS = ("EdDSA",)
NOW = 1_800_000_000
KEYS = {name: ed25519.Ed25519PrivateKey.generate() for name in "abcd"}


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwks(*names: str) -> bytes:
    return json.dumps({"keys": [
        {"kty": "OKP", "crv": "Ed25519", "kid": name, "x": b64(KEYS[name].public_key().public_bytes_raw())} for name in names
    ]}).encode()


def token(name: str, kid: str | None = None) -> bytes:
    claims = {"sub": "alice", "exp": NOW + 100}
    message = b64(json.dumps({"alg": "EdDSA", "kid": kid or name}).encode()) + "." + b64(json.dumps(claims).encode())
    return (message + "." + b64(KEYS[name].sign(message.encode()))).encode()


def answer(body: bytes, status: str = "200 OK", fields: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{fields}\r\n".encode() + body


class Issuer:
    """A server whose every answer is `script(writer)`; counts the requests it got."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.bytes: bytes = b""
        self.script: Callable[[asyncio.StreamWriter], Coroutine[Any, Any, None]] = self.send
        self.port = 0
        self.serving: set[asyncio.Task[None] | None] = set()

    async def send(self, writer: asyncio.StreamWriter) -> None:
        writer.write(self.bytes)
        await writer.drain()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self.serving.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            await self.script(writer)
        writer.close()
        self.serving.discard(task)

    def url(self, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.port}/keys?x=1"


@contextlib.asynccontextmanager
async def issuer(tls: ssl.SSLContext | None = None) -> AsyncIterator[Issuer]:
    it = Issuer()
    server = await asyncio.start_server(it.serve, "127.0.0.1", 0, ssl=tls)
    it.port = server.sockets[0].getsockname()[1]
    try:
        yield it
    finally:
        server.close()
        for task in it.serving:
            task.cancel()
        while it.serving:
            await asyncio.sleep(0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    uvloop.run(test())


def verifier(source: KeySource) -> Verifier:
    return Verifier(JwtSettings(algorithms=ALGORITHMS), source, clock=lambda: NOW)


def url_source(it: Issuer, **more: Any) -> UrlSource:
    return UrlSource(it.url(), ALGORITHMS, **({"timeout": 5.0, "cooldown": 0.0} | more))


def test_fetches_and_follows_a_rotation() -> None:
    async def test() -> None:
        async with issuer() as it:
            cache, changes = TokenCache(1 << 20), []
            source = url_source(it, on_change=lambda: (cache.invalidate(), changes.append(source.keys.generation)))
            it.bytes = answer(jwks("a"))
            assert await source.refetch()
            assert it.requests[0].startswith(b"GET /keys?x=1 HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % it.port)
            principal = verifier(source).check(token("a"))
            cache.put(token("a"), principal)

            assert not await source.refetch()                   # the same keys: nothing is forgotten
            assert cache.lookup(token("a"), NOW) is principal

            it.bytes = answer(jwks("a", "b"))
            assert (await verifier(source).check(token("b"))).subject == "alice"
            assert cache.lookup(token("a"), NOW) is None
            it.bytes = answer(jwks("b"))
            assert await source.refetch()
            with pytest.raises(UnknownKey):
                verifier(source).verify(token("a"), NOW)
            assert changes == [1, 2, 3] and (source.fetches, source.failures, source.changes) == (4, 0, 3)

    run(test)


def test_chunked_and_close_delimited_answers() -> None:
    async def test() -> None:
        body = jwks("a")
        chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:])) + b"0\r\n\r\n"
        for data in (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked,
            b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + body,
        ):
            async with issuer() as it:
                it.bytes = data
                source = url_source(it)
                assert await source.refetch(), source.error

    run(test)


LIES = {
    "HTML": answer(b"<!doctype html><title>Sign in</title>", fields="Content-Type: text/html\r\n"),
    "5 MB": answer(b'{"keys":[' + b" " * 5_000_000 + b"]}"),
    "5 MB without end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"10000\r\n" + b" " * 65536 + (
        b"\r\n10000\r\n" + b" " * 65536) * 80,
    "5 MB of head": b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 600_000,
    "redirect": answer(b"", "302 Found", "Location: http://127.0.0.1:1/\r\n"),
    "permanent redirect": answer(jwks("a"), "308 Permanent Redirect", "Location: /other\r\n"),
    "500": answer(jwks("a"), "500 Oops"), "404": answer(jwks("a"), "404 Not Found"), "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "206": answer(jwks("a"), "206 Partial Content"),
    "no key": answer(b'{"keys":[]}'), "duplicate member": answer(b'{"keys":[],' + jwks("b")[1:]),
    "duplicate kid": answer(json.dumps({"keys": [json.loads(jwks("a"))["keys"][0], json.loads(jwks("b"))["keys"][0] | {"kid": "a"}]}).encode()),
    "gzip": answer(jwks("a"), fields="Content-Encoding: gzip\r\n"),
    "not HTTP": b"SSH-2.0-OpenSSH\r\n\r\n", "nothing": b"", "cut head": b"HTTP/1.1 200 OK\r\nContent-", "cut body": answer(jwks("b"))[:-5],
    "cut chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{", "cut without framing": b"HTTP/1.0 200 OK\r\n\r\n" + jwks("b")[:-3],
    "cut behind the JSON": answer(jwks("b") + b" ")[:-1],
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n{}  ",
}


@pytest.mark.parametrize("name", LIES)
def test_keeps_the_last_good_keys(name: str) -> None:
    async def test() -> None:
        async with issuer() as it:
            source = url_source(it)
            it.bytes = answer(jwks("a", "c"))
            await source.refetch()
            before = source.keys
            it.bytes = LIES[name]
            assert not await source.refetch()
            assert source.keys is before and source.failures == 1 and source.error
            assert verifier(source).verify(token("a"), NOW).subject == "alice"
            assert len(it.requests) == 2                        # no redirect was followed
            if name.startswith("5 MB"):
                assert source.error == "the answer has more than 1048576 bytes"     # given up, not read and refused

    run(test)


def test_a_slow_issuer_runs_into_the_deadline_whatever_it_drips() -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    async def silent(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        for script in (drip, silent):
            async with issuer() as it:
                it.script = script
                source = url_source(it, timeout=0.1)
                await source.refetch()
                assert "within 0.1 s" in (source.error or "")

    run(test)


def test_an_issuer_that_is_down() -> None:
    async def test() -> None:
        async with issuer() as it:
            source = url_source(it)
        await source.refetch()
        assert "connection failed" in (source.error or "")
        with pytest.raises(UnknownKey):
            verifier(source).verify(token("a"), NOW)

    run(test)


def test_an_unknown_kid_storm_costs_one_fetch_per_cooldown() -> None:
    async def test() -> None:
        async with issuer() as it:
            it.bytes = answer(jwks("a"))
            clock = Clock()
            source = url_source(it, clock=clock, cooldown=30.0)
            await source.refetch()
            subject = verifier(source)

            async def ask(n: int) -> str:
                try:
                    result = subject.check(token("a", kid=f"invented-{n}"))
                    if not hasattr(result, "subject"):
                        await result
                except TokenError as error:
                    return error.reason
                return "accepted"

            for cooldown in range(1, 4):
                clock.now += 29.9
                assert set(await asyncio.gather(*[ask(n) for n in range(200)])) == {"token-key"}
                assert len(it.requests) == cooldown             # not one more
                clock.now += 0.1
                assert set(await asyncio.gather(*[ask(n) for n in range(200)])) == {"token-key"}
                assert len(it.requests) == cooldown + 1         # one for all
                await ask(0)
                assert not await source.refetch()
                assert len(it.requests) == cooldown + 1
            assert source.suppressed >= 600

    run(test)


def test_one_fetch_in_flight_serves_all_who_wait() -> None:
    async def test() -> None:
        async with issuer() as it:
            gate = asyncio.Event()

            async def gated(writer: asyncio.StreamWriter) -> None:
                await gate.wait()
                writer.write(answer(jwks("a")))

            it.script = gated
            source = url_source(it)
            waiting = [asyncio.ensure_future(verifier(source).check(token("a"))) for _ in range(50)]
            while not it.requests:
                await asyncio.sleep(0)
            waiting[0].cancel()                                 # one who waits goes away; the others do not notice
            gate.set()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert isinstance(results[0], asyncio.CancelledError)
            assert {result.subject for result in results[1:]} == {"alice"}
            assert len(it.requests) == 1

    run(test)


def test_refetch_works_when_stepped_outside_a_task() -> None:
    """The engine steps a coroutine once by hand, and makes a task of it only if it suspends."""

    async def test() -> None:
        async with issuer() as it:
            it.bytes = answer(jwks("a"))
            source = url_source(it, cooldown=30.0, clock=Clock())
            coroutine = verifier(source).check(token("a"))
            suspended = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(lambda: suspended.set_result(coroutine.send(None)))
            future = await suspended
            future._asyncio_future_blocking = False             # as a task does with what it is given
            await future
            with pytest.raises(StopIteration) as done:
                coroutine.send(None)
            assert done.value.value.subject == "alice"

    run(test)


def test_refreshes_in_the_background_and_stops() -> None:
    async def test() -> None:
        async with issuer() as it:
            it.bytes = answer(jwks("a"))
            changed = asyncio.Event()
            source = url_source(it, refresh=0.02, on_change=changed.set)
            source.start()
            source.start()
            await changed.wait()
            assert source.keys.knows("a")
            changed.clear()
            it.bytes = answer(jwks("b"))
            await changed.wait()
            assert source.keys.knows("b")
            source.stop()
            while it.serving:
                await asyncio.sleep(0.001)
            assert source.keys.knows("b")
            while [task for task in asyncio.all_tasks() if "of http" in task.get_name()]:
                await asyncio.sleep(0)                          # ends, or the test runs into its time limit

    run(test)


def test_stop_frees_those_who_wait() -> None:
    async def test() -> None:
        async with issuer() as it:
            it.script = lambda writer: asyncio.Event().wait()
            source = url_source(it)
            waiting = asyncio.ensure_future(verifier(source).check(token("a")))
            while not it.requests:
                await asyncio.sleep(0)
            source.stop()
            with pytest.raises(UnknownKey):
                await waiting

    run(test)


def test_backs_off_exponentially_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with issuer() as it:
            source = url_source(it, refresh=300.0)
            it.bytes = answer(b"", "503 Service Unavailable")
            delays = []
            with caplog.at_level(logging.INFO):
                for _ in range(12):
                    await source.refetch()
                    delays.append(source.delay())
                it.bytes = answer(jwks("a"))
                await source.refetch()
            for position, delay in enumerate(delays):
                assert 0.9 * min(300, 2**position) <= delay <= 1.1 * min(300, 2**position)
            assert 270 <= source.delay() <= 330
            assert len({source.delay() for _ in range(20)}) > 1
            assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]

    run(test)


def test_a_surprise_in_on_change_does_not_end_the_source() -> None:
    async def test() -> None:
        async with issuer() as it:
            it.bytes = answer(jwks("a"))
            source = url_source(it, on_change=lambda: 1 // 0)
            await source.refetch()
            assert source.error == "ZeroDivisionError"
            assert await source.refetch() is False and source.error is None

    run(test)


def certificate(directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context with a certificate of its own for 127.0.0.1, and a client's that trusts just that."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "issuer")])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    path = directory / "issuer.pem"
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + cert.public_bytes(Encoding.PEM)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cadata=cert.public_bytes(Encoding.PEM).decode())


def test_https_is_verified(tmp_path: Path) -> None:
    server, client = certificate(tmp_path)

    async def test() -> None:
        async with issuer(server) as it:
            asyncio.get_running_loop().set_exception_handler(lambda *_: None)       # the server's failed handshake
            it.bytes = answer(jwks("a"))
            stranger = UrlSource(it.url("https"), ALGORITHMS, cooldown=0)
            assert not await stranger.refetch()
            assert "CERTIFICATE_VERIFY_FAILED" in (stranger.error or "") and it.requests == []
            friend = UrlSource(it.url("https"), ALGORITHMS, cooldown=0, tls=client)
            assert await friend.refetch(), friend.error

    run(test)


@pytest.mark.parametrize("url", [
    "http://auth.bank.test/jwks", "http://127.0.0.1.evil.test/", "http://10.0.0.1/", "ftp://auth.bank.test/", "https://", "https:///x",
    "https://u:p@auth.bank.test/", "https://u@auth.bank.test/", "https://auth.bank.test/#x", "https://auth.bank.test/a b",
    "https://auth.bank.test/\r\nHost: x", "https://auth.bаnk.test/", "https://auth.bank.test:99999/", "https://auth.bank.test:x/", "file:///etc/passwd",
])
def test_urls_that_keys_must_not_come_from(url: str) -> None:
    with pytest.raises(ValueError):
        open_source(url, ALGORITHMS)


@pytest.mark.parametrize("url", ["https://auth.bank.test/jwks.json", "https://[2001:db8::1]:8443", "http://localhost:1/x", "http://[::1]:1/x", "http://127.0.0.2/x"])
def test_urls_that_keys_may_come_from(url: str) -> None:
    assert isinstance(open_source(url, ALGORITHMS), UrlSource)
    assert Origin.parse(url).request.startswith(b"GET /")


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_read_at_once_and_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_bytes(jwks("a"))
    changes: list[int] = []
    source = open_source("jwks.json", ALGORITHMS, base=tmp_path, cooldown=0, on_change=lambda: changes.append(1))
    source.load()
    assert verifier(source).verify(token("a"), NOW).subject == "alice"

    async def test() -> None:
        await source.refetch()
        assert len(changes) == 1
        path.write_bytes(jwks("a", "b"))
        assert (await verifier(source).check(token("b"))).subject == "alice"
        assert len(changes) == 2
        path.write_bytes(jwks("c")[:-4])                        # half written
        await source.refetch()
        assert source.keys.knows("b") and source.error
        os.truncate(path, 0)
        await source.refetch()
        path.unlink()
        await source.refetch()
        assert source.keys.knows("b") and "No such file" in (source.error or "")
        path.write_bytes(jwks("c"))
        assert await source.refetch()
        assert source.keys.knows("c") and source.error is None

    run(test)


def test_a_file_that_was_half_written_is_read_again_though_its_time_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    source = FileSource(path, ALGORITHMS, cooldown=0)

    async def test() -> None:
        for content in (jwks("a")[:-1] + b" ", jwks("a")):
            path.write_bytes(content)
            os.utime(path, (1, 1))
            await source.refetch()
        assert source.keys.knows("a")

    run(test)


def test_a_file_that_gives_no_keys_is_named(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    with pytest.raises(KeysError, match="jwks.json: No such file"):
        FileSource(path, ALGORITHMS).load()
    path.write_bytes(b"{}")
    with pytest.raises(KeysError, match=r"jwks\.json: the JWK set has no"):
        FileSource(path, ALGORITHMS).load()
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(KeysError, match="more than"):
        FileSource(path, ALGORITHMS).load()
    with pytest.raises(KeysError, match="directory|regular"):
        FileSource(tmp_path, ALGORITHMS).load()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(KeysError, match="regular"):
        FileSource(tmp_path / "fifo", ALGORITHMS).load()


def test_a_reload_keeps_the_keys_while_the_issuer_is_down() -> None:
    async def test() -> None:
        async with issuer() as it:
            it.bytes = answer(jwks("a"))
            former = url_source(it)
            await former.refetch()
        source = url_source(it)
        assert source.adopt(former)
        await source.refetch()
        assert source.failures == 1 and verifier(source).verify(token("a"), NOW).subject == "alice"
        assert not UrlSource(it.url() + "2", ALGORITHMS).adopt(former)
        assert not UrlSource(it.url(), ("ES256",)).adopt(former)

    run(test)
