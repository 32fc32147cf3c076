"""A gateway that speaks TLS on all its listeners, with certificates of every kind, and TLS at both ends of it.

Strategy: clients are Python's ssl (on another path through OpenSSL than ours), curl and openssl itself. A TlsStream tells a
clean end (close_notify) from a cut one, which a plain socket cannot.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.integration.bank import WatchedGateway
from tests.integration.echo import Echo
from tests.integration.faults import Cut, Script, ScriptedOrigin, Stream, serve
from tests.integration.pki import DAY, Authority, Issued
from tests.integration.processes import PATIENCE

WHO = """
import json
from gateway import Policy, respond

class Who(Policy):
    def on_request(self, request):
        shown = request.client_certificate
        if shown is None:
            return respond(200, json.dumps(None), content_type="application/json")
        said = {name: getattr(shown, name) for name in ("subject", "issuer", "serial", "dns", "uris", "thumbprint", "pem")}
        return respond(200, json.dumps(said), content_type="application/json")
"""

CONFIG = """
version: 1
workers: 2
admin: {{bind: 127.0.0.1:0}}
listeners:
  public:
    bind: 127.0.0.1:0
    limits: {{body: 1GiB}}
    tls:
      certificates:
        - {{cert: rsa.crt, key: rsa.key, ocsp: rsa.ocsp}}
        - {{cert: ec.crt, key: ec.key}}
        - {{cert: other.crt, key: other.key}}
  modern: {{bind: 127.0.0.1:0, tls: {{certificates: [{{cert: ec.crt, key: ec.key}}], min_version: 1.3}}}}
  mutual:
    bind: 127.0.0.1:0
    tls:
      certificates: [{{cert: ec.crt, key: ec.key}}]
      client_ca: clients.crt
      client_auth: required
      crl: clients.crl
      forward_client_certificate: true
  asking: {{bind: 127.0.0.1:0, tls: {{certificates: [{{cert: ec.crt, key: ec.key}}], client_ca: clients.crt, client_auth: optional}}}}
  leaf:
    bind: 127.0.0.1:0
    tls: {{certificates: [{{cert: leaf.crt, key: leaf.key}}], client_ca: known.crt, client_auth: optional}}
  proxied:
    bind: 127.0.0.1:0
    proxy_protocol: required
    trusted_proxies: []
    tls: {{certificates: [{{cert: ec.crt, key: ec.key}}]}}
  capped: {{bind: 127.0.0.1:0, tls: {{certificates: [{{cert: ec.crt, key: ec.key}}], handshakes: 4, handshake: 20s}}}}
  hasty: {{bind: 127.0.0.1:0, tls: {{certificates: [{{cert: ec.crt, key: ec.key}}], handshake: 300ms}}}}
  kernel: {{bind: 127.0.0.1:0, tls: {{certificates: [{{cert: ec.crt, key: ec.key}}], ktls: true}}}}
upstreams:
  echo: {{targets: [127.0.0.1:{echo}]}}
  scripted: {{targets: [127.0.0.1:{scripted}]}}
policies:
  who: {{python: {{class: "who:Who"}}}}
  trail: {{audit: {{file: audit.jsonl}}}}
routes:
  - {{name: echo, match: {{prefix: /}}, upstream: echo, policies: [trail]}}
  - {{name: scripted, match: {{prefix: /scripted}}, upstream: scripted}}
  - {{name: who, match: {{path: /who}}, upstream: echo, policies: [who]}}
"""


class TlsStream(Stream):
    """A TLS connection. An end without close_notify is a Cut whose text says so."""

    sock: ssl.SSLSocket

    def _more(self) -> None:
        try:
            piece = self.sock.recv(self.dawdle or 1 << 18)
        except OSError as error:
            raise Cut(f"cut: {error}") from None
        if not piece:
            raise Cut("end of stream")
        self.buffer += piece

    def closed(self) -> bool:
        try:
            return not self.buffer and self.sock.recv(1) == b""
        except OSError:
            return False


@dataclass
class Vault:
    """The certificates, and the gateway that uses them."""

    folder: Path
    root: Authority
    issuing: Authority
    clients: Authority
    shown: dict[str, Issued] = field(default_factory=dict)
    gateway: WatchedGateway = field(init=False)
    echo: Echo = field(init=False)
    origin: ScriptedOrigin = field(init=False)

    def context(self, **options: Any) -> ssl.SSLContext:
        """A client that trusts the root. `show`: the name of a client certificate; `version`: the only one."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.load_verify_locations(cadata=self.root.pem.decode())
        if show := options.get("show"):
            made.load_cert_chain(self.folder / f"{show}.crt", self.folder / f"{show}.key")
        if version := options.get("version"):
            made.minimum_version = made.maximum_version = version
        if alpn := options.get("alpn"):
            made.set_alpn_protocols(alpn)
        return made

    def connect(self, name: str = "public", host: str | None = "bank.test", *, before: bytes = b"", **options: Any) -> TlsStream:
        """A connection to a listener; `before` goes out in clear text first, `session` is resumed."""
        context = options.get("context") or self.context(**options)
        sock = socket.create_connection(("127.0.0.1", self.gateway.port(name)), PATIENCE)
        sock.sendall(before)
        context.check_hostname = context.check_hostname and host is not None
        wrapped = context.wrap_socket(
            sock, server_hostname=host, suppress_ragged_eofs=False, session=options.get("session")
        )
        return TlsStream(wrapped)

    def names(self, host: str | None, name: str = "public", **options: Any) -> list[str]:
        """The names in the certificate that a client who asks for `host` gets."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with self.connect(name, host, context=context, **options) as stream:
            der = stream.sock.getpeercert(binary_form=True)
        assert der is not None
        extension = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return extension.value.get_values_for_type(x509.DNSName)

    def openssl(self, *arguments: str, name: str = "public", said: str = "", host: str = "bank.test") -> str:
        """What `openssl s_client` prints, both outputs."""
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{self.gateway.port(name)}", "-servername", host]
        done = subprocess.run(
            [*command, "-CAfile", str(self.folder / "root.crt"), *arguments],
            input=said, capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    def counter(self, name: str) -> float:
        return self.gateway.metrics()[f"crossway_{name}"]


def make_certificates(folder: Path) -> Vault:
    """Write everything that CONFIG names, and certificates of clients good and bad."""
    root = Authority("Test Root", number=1)
    issuing = Authority("Test Issuing", root, number=2)
    client_root = Authority("Clients Root", number=3)
    clients = Authority("Clients Issuing", client_root, number=4)
    stranger = Authority("Strangers", number=5)
    vault = Vault(folder, root, issuing, clients)
    (folder / "root.crt").write_bytes(root.pem)
    (folder / "clients.crt").write_bytes(client_root.pem)
    (folder / "who.py").write_text(WHO)
    rsa = issuing.issue("bank.test", "*.api.test", "localhost", "127.0.0.1", kind="rsa").write(folder, "rsa")
    (folder / "rsa.ocsp").write_bytes(issuing.staple(rsa))
    issuing.issue("bank.test", "*.api.test", "localhost", "127.0.0.1").write(folder, "ec")
    issuing.issue("other.test").write(folder, "other")
    replace(issuing.issue("bank.test"), chain=()).write(folder, "leaf")
    (folder / "known.crt").write_bytes(client_root.pem + issuing.pem + root.pem)
    show = {
        "good": clients.issue("tpp.test", "spiffe://bank.test/ns/pay/sa/tpp", subject="TPP Ürich, Ltd", number=10),
        "expired": clients.issue("tpp.test", begin=-9 * DAY, end=-DAY, number=11),
        "early": clients.issue("tpp.test", begin=DAY, number=12),
        "revoked": clients.issue("tpp.test", number=13),
        "stranger": stranger.issue("tpp.test", number=14),
        "server": clients.issue("tpp.test", usage=[ExtendedKeyUsageOID.SERVER_AUTH], number=15),
    }
    for name, issued in show.items():
        issued.write(folder, name)
    vault.shown = show
    (folder / "clients.crl").write_bytes(client_root.revocations() + clients.revocations(show["revoked"]))
    return vault


@contextlib.contextmanager
def open_vault(folder: Path) -> Iterator[Vault]:
    vault = make_certificates(folder)
    vault.echo, vault.origin = Echo(), ScriptedOrigin()
    path = folder / "vault.yaml"
    path.write_text(CONFIG.format(echo=vault.echo.port, scripted=vault.origin.port))
    try:
        with WatchedGateway(path) as vault.gateway:
            yield vault
    finally:
        vault.echo.close()
        vault.origin.close()


class TlsOrigin(ScriptedOrigin):
    """A scripted origin behind TLS. `handshakes` and `resumed` count, `failed` holds what went wrong in handshakes."""

    def __init__(self, context: ssl.SSLContext, script: Script = serve) -> None:
        self.context = context
        self.handshakes = 0
        self.resumed = 0
        self.failed: list[str] = []
        self.peers: list[dict[str, Any] | None] = []
        super().__init__(script)

    def _run(self, script: Script, stream: Stream) -> None:
        try:
            wrapped = self.context.wrap_socket(stream.sock, server_side=True, suppress_ragged_eofs=False)
        except OSError as error:
            self.failed.append(str(error))
            with self._lock:
                self._streams.discard(stream)
            stream.close()
            return
        secure = TlsStream(wrapped)
        with self._lock:
            self.handshakes += 1
            self.resumed += bool(wrapped.session_reused)
            self.peers.append(wrapped.getpeercert())
            self._streams.discard(stream)
            self._streams.add(secure)
        super()._run(script, secure)


def server_context(folder: Path, name: str, *, client_ca: bytes = b"", version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """A server with NAME.crt; with `client_ca` it demands certificates of clients."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
    if client_ca:
        made.verify_mode = ssl.CERT_REQUIRED
        made.load_verify_locations(cadata=client_ca.decode())
    if version is not None:
        made.minimum_version = made.maximum_version = version
    return made


def half_hello(port: int, host: str = "bank.test") -> socket.socket:
    """A connection on which half of a ClientHello was sent."""
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
    hello = client_hello(host)
    sock.sendall(hello[: len(hello) // 2])
    return sock


def client_hello(host: str) -> bytes:
    """The bytes of a ClientHello, one record."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=host).do_handshake()
    return outgoing.read()


def wait_for(condition: Any, seconds: float) -> bool:
    """Whether a condition comes true within a time that is allowed to pass."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False
