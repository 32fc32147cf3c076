"""A browser that nobody here wrote, over HTTP/2: fetch, an EventSource and a WebSocket (Chromium speaks RFC 8441).

Strategy: a page does all of it and posts what came of it, so nobody waits for a time to pass. Requests are counted against streams: were
one of them not on an HTTP/2 connection, the two would differ.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.integration.browser_kit import CHROMIUM, QUIET, needs_chromium
from tests.integration.faults import ScriptedOrigin, Stream, ok
from tests.integration.processes import eventually
from tests.integration.websocket_kit import Tunnels, tunnels_at

LARGE = 3_000_000

PAGE = """<!doctype html><title>bank</title><script>
async function events() {
  const source = new EventSource("/plain/events");
  return await new Promise((done, failed) => {
    const heard = [];
    source.onmessage = event => {
      heard.push(event.data);
      if (heard.length == 1) fetch("/plain/go");                  // the next one is sent only when this one was heard
      if (heard.length == 3) { source.close(); done(heard); }
    };
    source.onerror = () => failed("no events");
  });
}
async function socket(size) {
  const socket = new WebSocket(`wss://${location.host}/lib/browser`, ["pay.v1", "pay.v2"]);
  socket.binaryType = "arraybuffer";
  await new Promise((done, failed) => { socket.onopen = done; socket.onerror = () => failed("no socket"); });
  const ask = said => new Promise(done => { socket.onmessage = event => done(event.data); socket.send(said); });
  const text = await ask("hello");
  const sent = new Uint8Array(size).map((_, i) => i % 251);
  const back = new Uint8Array(await ask(sent.buffer));
  const same = back.length == size && back.every((byte, i) => byte == i % 251);
  const closed = await new Promise(done => { socket.onclose = event => done([event.code, event.reason, event.wasClean]); socket.send("close 4002"); });
  return {protocol: socket.protocol, text, same, closed};
}
async function work() {
  const bodies = await Promise.all([...Array(20).keys()].map(n => fetch(`/plain/${n}`).then(answer => answer.text())));
  const refused = (await fetch("/bank")).status;
  const result = {bodies, refused, events: await events(), socket: await socket(SIZE)};
  result.spoken = [...new Set(performance.getEntriesByType("resource").map(entry => entry.nextHopProtocol))];
  return result;
}
work().catch(error => ({failed: String(error)})).then(result => fetch("/plain/told", {method: "POST", body: JSON.stringify(result)}));
</script>""".replace("SIZE", str(LARGE))


class Site:
    """The page, its events, and what it told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def __call__(self, origin: ScriptedOrigin, stream: Stream) -> None:
        while True:
            message = stream.request()
            if message.path == "/plain/page":
                stream.send(ok(PAGE.encode(), "content-type: text/html"))
            elif message.path == "/plain/events":
                self.events(origin, stream)
                return
            elif message.path == "/plain/told":
                self.told.append(json.loads(message.body))
                stream.send(ok(b""))
            else:
                if message.path == "/plain/go":
                    origin.seen.release()
                stream.send(ok(message.path.encode()))

    def events(self, origin: ScriptedOrigin, stream: Stream) -> None:
        stream.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store\r\n\r\ndata: one\n\n")
        origin.saw()
        stream.send(b"data: two\n\n", b"data: three\n\n")
        stream.rest()                               # until the page has heard enough


@pytest.fixture
def tunnels(tmp_path: Path) -> Iterator[Tunnels]:
    with tunnels_at(tmp_path, workers=1) as made:
        yield made
        made.origin.reset()


def pin(certificate: Path) -> str:
    """What Chromium calls a public key that it is to accept."""
    key = x509.load_pem_x509_certificates(certificate.read_bytes())[0].public_key()
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return base64.b64encode(digest.finalize()).decode()


@needs_chromium
def test_a_browser(tunnels: Tunnels, tmp_path: Path) -> None:
    site = tunnels.origin.script = Site()
    before = tunnels.gateway.metrics()
    with (tmp_path / "browser.log").open("wb") as log:
        browser = subprocess.Popen([
            CHROMIUM, *QUIET, "--no-first-run", "--disable-component-update", "--disable-sync", "--disable-extensions", "--remote-debugging-port=0",
            f"--user-data-dir={tmp_path / 'profile'}", f"--ignore-certificate-errors-spki-list={pin(tmp_path / 'edge.crt')}",
            f"https://127.0.0.1:{tunnels.gateway.port('secure')}/plain/page",
        ], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)  # fmt: skip
    try:
        (told,) = eventually(lambda: site.told, "what the page tells")
        after = tunnels.gateway.metrics()
    finally:
        browser.kill()
        browser.wait()
    assert "failed" not in told, told
    assert told["bodies"] == [f"/plain/{number}" for number in range(20)]
    assert (told["refused"], told["events"], told["spoken"]) == (401, ["one", "two", "three"], ["h2"])
    assert told["socket"] == {"protocol": "pay.v2", "text": "hello", "same": True, "closed": [4002, "as asked", True]}

    def more(name: str) -> float:
        return after[f"crossway_{name}_total"] - before[f"crossway_{name}_total"]

    assert more("tunnels") == 1
    assert more("http2_streams") == more("requests") >= 26
