"""A real control plane process and members that speak its wire by hand: join, renew, stream.

Strategy: members here use `ssl`, `cryptography` and `websockets` directly, not the product's own member, so that both ends are not wrong together.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import itertools
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.integration.processes import PATIENCE, environment, eventually, request

FILE = """\
version: 1
trust_domain: bank.test
control:
  bind: 127.0.0.1:0
  admin: 127.0.0.1:0
  state: {state}
  ca: ca
{control}certificates: {{lifetime: {lifetime}}}
services:
  edge: {{}}
  payments: {{protocol: http}}
  ledger: {{protocol: http, timeout: 2s, retries: {{on: [connect-failure], budget: 20%}}}}
  accounts: {{}}
authorization:
  default: deny
  rules:
    - {{name: edge-to-payments, from: [edge], to: payments, methods: [GET, POST], prefix: /v1/payments}}
    - {{name: payments-to-ledger, from: [payments], to: ledger}}
"""
SOON = 0.3  # seconds in which something that must not come would have come


class ControlProcess:
    """A `crossway mesh control` of its own."""

    def __init__(self, folder: Path, *, state: str = "mesh.db", lifetime: str = "1h", control: str = "", path: Path | None = None) -> None:
        self.folder = folder
        self.path = path or folder / "mesh.yaml"
        if not self.path.exists():
            # Most members of tests listen nowhere.
            self.path.write_text(FILE.format(state=state, lifetime=lifetime, control=control + ("" if "health:" in control else "  health: off\n")))
        self.errors = folder / f"control-{len(list(folder.glob('control-*.log')))}.log"
        self.addresses: dict[str, str] = {}
        self.start()

    def start(self) -> None:
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "mesh", "control", "-c", str(self.path)], cwd=self.folder, env=environment(),
                stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        for line in self.process.stdout:
            name, address = line.split()
            self.addresses[name] = address
            if name == "admin":
                return
        self.process.wait(PATIENCE)
        raise RuntimeError(f"it did not start ({self.process.returncode}): {self.errors.read_text()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    @property
    def url(self) -> str:
        return self.addresses["control"]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def edit(self, old: str, new: str) -> None:
        """Change the file as an editor does it: a new one takes its place."""
        text = self.path.read_text()
        assert old in text
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text.replace(old, new))
        fresh.rename(self.path)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        done = [sys.executable, "-m", "gateway", "mesh", *words, "-c", str(self.path)]
        return subprocess.run(done, cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=PATIENCE * 2, check=False)

    def token(self, service: str, *more: str) -> Path:
        """A token file, as the product's own member wants it."""
        done = self.command("token", service, *more)
        assert done.returncode == 0, done.stderr
        path = self.folder / f"{service}-{hashlib.sha256(done.stdout.encode()).hexdigest()[:8]}.token"
        path.write_text(done.stdout)
        return path

    def page(self, path: str) -> tuple[int, str]:
        status, _, body = request(int(self.addresses["admin"].rpartition(":")[2]), path)
        return status, body.decode()

    def status(self) -> dict[str, Any]:
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.errors.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]


def make_request(key: ec.EllipticCurvePrivateKey | None = None) -> tuple[str, Any]:
    key = key or ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode(), key


def post(control: ControlProcess, path: str, body: Any, pair: Path | None = None, method: str = "POST") -> tuple[int, dict[str, Any]]:
    """Send a request, with the certificate in `pair` if any; the server is not verified: who it is, other tests say."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if pair is not None:
        context.load_cert_chain(pair)
    connection = http.client.HTTPSConnection("127.0.0.1", control.port, timeout=PATIENCE, context=context)
    try:
        connection.request(method, path, None if method == "GET" else body if isinstance(body, bytes) else json.dumps(body).encode())
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if content.startswith(b"{") else {"text": content.decode()}
    finally:
        connection.close()


class Member:
    """An instance of a service."""

    def __init__(self, control: ControlProcess, service: str, number: int = 1) -> None:
        self.control, self.service, self.instance = control, service, f"{service}-{number}"
        self.pair = control.folder / f"{self.instance}.pem"
        self.inbound = f"127.0.0.1:{9000 + number}"
        self.svid, self.bundle = "", ""
        self.held: dict[str, Any] = {}  # the assignment as deltas made it
        self.messages: list[dict[str, Any]] = []
        self.refuse = ""
        self.closed = threading.Event()
        self.socket: Any = None

    @property
    def leaf(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.svid.encode())

    def join(self, token: str | None = None, **more: Any) -> tuple[int, dict[str, Any]]:
        text = token if token is not None else self.control.token(self.service).read_text()
        request, key = make_request()
        said = {"token": text, "csr": request, "instance": self.instance, "inbound": self.inbound, "labels": {}, "zone": None, **more}
        status, answer = post(self.control, "/v1/join", said)
        return self._took(status, answer, key)

    def renew(self, key: Any = None) -> tuple[int, dict[str, Any]]:
        request, key = make_request(key)
        status, answer = post(self.control, "/v1/renew", {"csr": request}, self.pair)
        return self._took(status, answer, key)

    def _took(self, status: int, answer: dict[str, Any], key: Any) -> tuple[int, dict[str, Any]]:
        if status == 200:
            self.svid, self.bundle = answer["svid"], answer["bundle"]
            self.keep(self.svid, key)
        return status, answer

    def keep(self, chain: str, key: Any) -> None:
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        self.pair.write_bytes(chain.encode() + private)

    def open(self, version: int = 0, control: ControlProcess | None = None, healthy: bool = True) -> Self:
        """Open the stream; verify the control plane by the bundle."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(cadata=self.bundle)
        context.load_cert_chain(self.pair)
        url = f"wss://127.0.0.1:{(control or self.control).port}/v1/stream?instance={self.instance}&version={version}"
        self.socket = connect(url, ssl=context, compression=None, max_size=1 << 24, proxy=None).__enter__()
        self.closed = threading.Event()
        self.beat(healthy)
        threading.Thread(target=self._hear, args=(self.socket, self.closed), daemon=True).start()
        return self

    def beat(self, healthy: bool = True, draining: bool = False, **more: Any) -> None:
        self.socket.send(json.dumps({"type": "heartbeat", "healthy": healthy, "draining": draining, **more}))

    def _hear(self, socket: Any, closed: threading.Event) -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            for text in socket:
                message = json.loads(text)
                if self.refuse:
                    answer: dict[str, Any] = {"type": "nack", "version": message["version"], "reason": self.refuse}
                else:
                    if message["type"] == "assignment":
                        self.held = message["assignment"]
                    else:
                        assert message["base"] == self.held["version"]
                        services = {**self.held["services"], **message["changes"].get("services", {})}
                        self.held = {**self.held, **message["changes"], "services": {name: each for name, each in services.items() if each is not None}}
                    verify_signature(self.held, message["signature"], self.bundle)
                    self.bundle = self.held["bundle"]
                    answer = {"type": "ack", "version": message["version"]}
                self.messages.append(message)
                socket.send(json.dumps(answer))
        closed.set()

    def has(self, what: Any, described: str) -> None:
        """Wait until the assignment is as `what` says."""
        eventually(lambda: self.held and what(self.held), f"{described} at {self.instance}")

    def endpoints(self, service: str) -> list[str]:
        return [each["address"] for each in self.held.get("services", {}).get(service, {}).get("endpoints", [])]

    def close(self) -> None:
        if self.socket is not None:
            with contextlib.suppress(Exception):
                self.socket.close()


class Door:
    """Where a member made by hand is reached: a TLS server with its certificate, at a port of its own. `open()` after it has joined."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.settimeout(0.05)
        self.port = self.socket.getsockname()[1]
        member.inbound = f"127.0.0.1:{self.port}"
        self.met: list[list[str]] = []  # URIs of who came
        self.shut = threading.Event()  # connections are taken by the kernel, and nobody answers
        self.gone = threading.Event()

    def open(self) -> Self:
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        return self

    def _serve(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.member.pair)
        context.load_verify_locations(cadata=self.member.bundle)
        context.verify_mode = ssl.CERT_REQUIRED
        while not self.gone.is_set():
            if self.shut.wait(0.01):
                continue
            with contextlib.suppress(OSError):
                raw, _ = self.socket.accept()
                raw.settimeout(PATIENCE)
                with context.wrap_socket(raw, server_side=True) as secure:
                    names = (secure.getpeercert() or {}).get("subjectAltName", ())
                    self.met.append([value for kind, value in names if kind == "URI"])
        self.socket.close()

    def close(self) -> None:
        self.gone.set()
        self.thread.join(PATIENCE)


def verify_signature(body: dict[str, Any], signature: str, bundle: str) -> None:
    """Check the detached JWS over a body and that its certificate leads to the bundle; by `cryptography` alone."""
    header, empty, seal = signature.split(".")
    assert empty == ""
    said = json.loads(_bytes(header))
    assert said["alg"] == "ES256"
    chain = [x509.load_der_x509_certificate(base64.b64decode(each)) for each in said["x5c"]]
    roots = x509.load_pem_x509_certificates(bundle.encode())
    for lower, upper in itertools.pairwise(chain):
        lower.verify_directly_issued_by(upper)
    assert any(_issued(chain[-1], root) or _issued(chain[1], root) for root in roots)
    names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://bank.test/control"]
    payload = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    raw = _bytes(seal)
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    der = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    public = chain[0].public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(der, f"{header}.{base64.urlsafe_b64encode(payload).rstrip(b'=').decode()}".encode(), ec.ECDSA(hashes.SHA256()))


def _issued(lower: x509.Certificate, upper: x509.Certificate) -> bool:
    try:
        lower.verify_directly_issued_by(upper)
    except Exception:  # noqa: BLE001 - any reason is a no
        return False
    return True


def _bytes(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def serial_of(member: Member) -> str:
    return f"{member.leaf.serial_number:x}"


def metric(control: ControlProcess, start: str) -> float:
    """The sum of the samples whose line starts so."""
    return sum(float(line.rpartition(" ")[2]) for line in control.page("/metrics")[1].splitlines() if re.match(re.escape(start), line))
