"""HTTP/2 clients that nobody here wrote: curl, nghttp, h2load, httpx, the h2 library and Chromium, over TLS and in clear text."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import httpx
import pytest

from tests.integration.browser_kit import CHROMIUM, QUIET, needs_chromium
from tests.integration.h2_kit import dial
from tests.integration.h2_origin import Call, by_path, pattern
from tests.integration.h2_subject import Subject
from tests.integration.processes import PATIENCE


def run(*command: str, said: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(command, input=said, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done


def curl(h2: Subject, listener: str, path: str, *arguments: str, said: bytes | None = None) -> bytes:
    """By curl, whichever way HTTP/2 is begun on that listener; the answer, behind the version that curl says it spoke."""
    way = ["--http2", "--cacert", str(h2.folder / "root.crt")] if listener == "secure" else ["--http2-prior-knowledge"]
    url = f"{'https' if listener == 'secure' else 'http'}://localhost:{h2.watched.port(listener)}{path}"
    return run("curl", "-sS", "--noproxy", "*", "-w", "%{stderr}%{http_version}", *way, *arguments, url, said=said).stdout


# -- curl


@pytest.mark.parametrize("up", ["", "/two", "/secure"], ids=["to-one", "to-two", "to-secure"])
@pytest.mark.parametrize("listener", ["two", "secure"])
def test_curl(h2: Subject, listener: str, up: str) -> None:
    said = json.loads(curl(h2, listener, f"{up}/report", "-H", "x-one: 1", "-d", "amount=5"))
    assert (said["method"], said["length"]) == ("POST", 8)
    assert ["x-one", "1"] in said["fields"]
    assert curl(h2, listener, f"{up}/bytes/3000000") == pattern(3_000_000)
    assert curl(h2, listener, f"{up}/echo", "--data-binary", "@-", said=pattern(3_000_000)) == pattern(3_000_000)
    assert curl(h2, listener, f"{up}/bytes/7", "-I").startswith(b"HTTP/2 200")


def test_curl_without_a_choice_speaks_http2_over_tls_and_http1_in_clear_text(h2: Subject) -> None:
    ca = str(h2.folder / "root.crt")
    for url, version in [(f"https://localhost:{h2.watched.port('secure')}/bytes/1", "2"), (f"http://localhost:{h2.watched.port('two')}/bytes/1", "1.1")]:
        assert run("curl", "-sS", "--noproxy", "*", "--cacert", ca, "-o", "/dev/null", "-w", "%{http_version}", url).stdout.decode() == version


def test_curl_that_asks_for_an_upgrade_gets_http1(h2: Subject) -> None:
    """`Upgrade: h2c` is withdrawn: the request is served in HTTP/1.1 and the header goes no further."""
    url = f"http://localhost:{h2.watched.port('two')}/report"
    done = run("curl", "-sS", "--noproxy", "*", "--http2", "-w", "\n%{http_version}", url).stdout.decode()
    said, _, version = done.rpartition("\n")
    assert version == "1.1"
    assert not {"upgrade", "http2-settings"} & {name for name, _ in json.loads(said)["fields"]}


def test_curl_in_parallel_over_one_connection(h2: Subject) -> None:
    port = h2.watched.port("secure")
    urls = [f"https://localhost:{port}{'/two' if number % 2 else ''}/bytes/{number * 1000}" for number in range(30)]
    outputs = [word for url in urls for word in ("-o", "/dev/null", url)]
    done = run(
        "curl", "-sS", "--noproxy", "*", "--http2", "--cacert", str(h2.folder / "root.crt"), "--parallel",
        "-w", "%{size_download} %{http_code} %{http_version}\n", *outputs,
    )  # fmt: skip
    lines = sorted(tuple(line.split()) for line in done.stdout.decode().splitlines())
    assert lines == sorted((str(number * 1000), "200", "2") for number in range(30))


# -- nghttp, h2load


@pytest.mark.parametrize("listener", ["two", "secure"])
def test_nghttp(h2: Subject, listener: str, tmp_path: Path) -> None:
    url = f"{'https' if listener == 'secure' else 'http'}://localhost:{h2.watched.port(listener)}"
    body = tmp_path / "body"
    body.write_bytes(pattern(200_000))
    assert run("nghttp", f"{url}/two/bytes/200000").stdout == pattern(200_000)
    assert run("nghttp", "-d", str(body), f"{url}/two/echo").stdout == pattern(200_000)
    assert run("nghttp", "-p", "255", "-b", "200", f"{url}/bytes/1000").stdout == pattern(1000)                # with padding
    shown = run("nghttp", "-nv", "-d", str(body), "--trailer", "x-sum: abc", "-H", "te: trailers", f"{url}/two/report").stdout.decode()
    assert ":status: 200" in shown
    assert h2.origin.calls[-1].trailers == [("x-sum", "abc")]


@pytest.mark.parametrize("path", ["/bytes/1000", "/two/bytes/1000", "/two/bytes/100000"])
@pytest.mark.parametrize("listener", ["two", "secure"])
def test_h2load(h2: Subject, listener: str, path: str) -> None:
    url = f"{'https' if listener == 'secure' else 'http'}://localhost:{h2.watched.port(listener)}{path}"
    shown = run("h2load", "-n", "400", "-c", "4", "-m", "20", url).stdout.decode()
    assert re.search(r"requests: 400 total, 400 started, 400 done, 400 succeeded, 0 failed, 0 errored, 0 timeout", shown), shown
    assert "status codes: 400 2xx" in shown


def test_h2load_with_bodies(h2: Subject, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(pattern(30_000))
    shown = run("h2load", "-n", "200", "-c", "2", "-m", "30", "-d", str(body), f"http://localhost:{h2.watched.port('two')}/two/echo").stdout.decode()
    assert "200 succeeded, 0 failed, 0 errored" in shown, shown


# -- Python's


@pytest.mark.parametrize("up", ["", "/two"], ids=["to-one", "to-two"])
def test_httpx(h2: Subject, up: str) -> None:
    base = f"https://localhost:{h2.watched.port('secure')}{up}"
    with httpx.Client(http2=True, verify=h2.context("h2", "http/1.1"), trust_env=False, timeout=PATIENCE) as client:
        for size in (0, 1, 100_000, 2_000_000):
            answer = client.get(f"{base}/bytes/{size}")
            assert (answer.http_version, answer.status_code, answer.content) == ("HTTP/2", 200, pattern(size))
        answer = client.post(f"{base}/echo", content=iter([b"a" * 1000, b"b" * 100_000]))
        assert answer.content == b"a" * 1000 + b"b" * 100_000
        with client.stream("GET", f"{base}/bytes/10000000") as stream:
            next(stream.iter_bytes())                   # and no more: a cancel
        assert client.get(f"{base}/bytes/5").status_code == 200


def test_httpx_by_many_at_once(h2: Subject) -> None:
    async def ask(client: httpx.AsyncClient, number: int) -> None:
        for turn in range(10):
            said = f"{number} {turn}".encode() * 100
            assert (await client.post(f"https://localhost:{h2.watched.port('secure')}/two/echo", content=said)).content == said

    async def all_at_once() -> None:
        async with httpx.AsyncClient(http2=True, verify=h2.context(), trust_env=False, timeout=PATIENCE) as client:
            await asyncio.gather(*(ask(client, number) for number in range(8)))

    asyncio.run(all_at_once())


@pytest.mark.parametrize("up", ["", "/two"], ids=["to-one", "to-two"])
def test_the_h2_library_finds_nothing_to_object_to(h2: Subject, up: str) -> None:
    """It checks the state of every stream and every field that it gets."""
    connection = h2lib()
    with dial(h2.watched.port("two")) as sock:
        sock.sendall(connection.data_to_send())
        for number in range(10):
            stream = connection.get_next_available_stream_id()
            fields = [(":method", "POST"), (":scheme", "http"), (":authority", "bank.test"), (":path", f"{up}/echo"), ("te", "trailers")]
            connection.send_headers(stream, fields)
            connection.send_data(stream, b"x" * number * 1000)
            connection.send_headers(stream, [("x-trailer", "y")], end_stream=True)
            sock.sendall(connection.data_to_send())
            assert drain(connection, sock, stream) == b"x" * number * 1000
        connection.ping(b"12345678")
        connection.close_connection()
        sock.sendall(connection.data_to_send())


def h2lib() -> h2.connection.H2Connection:
    made = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="latin-1"))
    made.initiate_connection()
    return made


def drain(connection: h2.connection.H2Connection, sock: socket.socket, stream: int) -> bytes:
    body = b""
    while piece := sock.recv(65536):
        for event in connection.receive_data(piece):
            if isinstance(event, h2.events.DataReceived):
                body += event.data
                connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if isinstance(event, h2.events.StreamEnded) and event.stream_id == stream:
                sock.sendall(connection.data_to_send())
                return body
        sock.sendall(connection.data_to_send())
    raise AssertionError("the connection ended")


# -- a browser

PAGE = b"""<!doctype html><title>page</title><body>waiting<script>
(async () => {
  const sizes = await Promise.all([...Array(20).keys()].map(async n => (await (await fetch(`/two/bytes/${n * 1000}`)).arrayBuffer()).byteLength));
  const echoed = await (await fetch('/two/echo', {method: 'POST', body: 'x'.repeat(200000)})).text();
  const spoken = [...new Set(performance.getEntriesByType('resource').map(e => e.nextHopProtocol))].join();
  document.body.textContent = `done ${sizes.reduce((a, b) => a + b)} ${echoed.length} ${spoken}`;
})().catch(error => document.body.textContent = 'failed ' + error);
</script>"""


@needs_chromium
def test_chromium(h2: Subject, tmp_path: Path) -> None:
    async def script(call: Call) -> None:
        if call.path == "/page":
            await call.answer(PAGE, 200, [("content-type", "text/html")])
        else:
            await by_path(call)

    h2.origin.script = script
    done = run(
        CHROMIUM, *QUIET, f"--user-data-dir={tmp_path}", "--ignore-certificate-errors", "--virtual-time-budget=10000", "--dump-dom",
        f"https://localhost:{h2.watched.port('secure')}/page",
    )  # fmt: skip
    assert b"done 190000 200000 h2" in done.stdout, (done.stdout[-500:], done.stderr[-500:])
