"""A mesh for tests of its members: a small control plane that speaks their wire, apps, and real sidecar processes.

Strategy: the control plane here believes everybody and records what it hears; what is tested is what members do with what it says. It runs
in a thread, on asyncio, with the WebSocket protocol of `websockets` over mutual TLS.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import hashlib
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from websockets.exceptions import InvalidState
from websockets.frames import Opcode
from websockets.server import ServerProtocol

from tests.integration.processes import PATIENCE, environment, eventually, request

DOMAIN = "bank.test"
PEM = serialization.Encoding.PEM


SHARE = 2500  # ports of one test process, from 10,000: below those that the kernel gives to clients, apart from those of other test processes
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
OWN = 10_000 + (int(WORKER) if WORKER.isdecimal() else os.getpid()) % 4 * SHARE
PORTS = cycle(range(OWN, OWN + SHARE))


def free_port() -> int:
    """A port that nobody has, and that nobody gets before the process for which it is asked."""
    for port in islice(PORTS, SHARE):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class Ca:
    """A root and an intermediate of one trust domain, and whatever they issue."""

    def __init__(self, domain: str = DOMAIN) -> None:
        self.domain = domain
        number = secrets.token_hex(4)
        self.root_key, self.root = self._authority(f"{domain} root {number}", None)
        self.key, self.intermediate = self._authority(f"{domain} issuing {number}", (self.root_key, self.root))

    @property
    def bundle(self) -> str:
        return self.root.public_bytes(PEM).decode("ascii")

    def _authority(self, name: str, parent: Any) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signer, issuer = (key, subject) if parent is None else (parent[0], parent[1].subject)
        certificate = (
            self._builder(subject, issuer, key.public_key(), 86400 * 365)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
            .sign(signer, hashes.SHA256())
        )
        return key, certificate

    def _builder(self, subject: x509.Name, issuer: x509.Name, key: Any, life: float, begin: float = -60) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(seconds=begin)).not_valid_after(now + datetime.timedelta(seconds=life))
        )  # fmt: skip

    def issue(
        self, key: Any, *uris: str, life: float = 3600, begin: float = -60, usage: bool = True, ca: bool = False,
        extended: Any = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH),
    ) -> x509.Certificate:
        """A certificate for a public key."""
        builder = self._builder(x509.Name([]), self.intermediate.subject, key, life, begin)
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        if uris:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris]), critical=True)
        if usage:
            builder = builder.add_extension(x509.KeyUsage(True, False, False, False, False, False, False, False, False), critical=True)
        if extended:
            builder = builder.add_extension(x509.ExtendedKeyUsage(list(extended)), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def pem(self, certificate: x509.Certificate) -> str:
        return (certificate.public_bytes(PEM) + self.intermediate.public_bytes(PEM)).decode("ascii")

    def pair(self, folder: Path, name: str, *uris: str, **options: Any) -> Path:
        """Write NAME.pem: a chain and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        path = folder / f"{name}.pem"
        path.write_bytes(self.pem(self.issue(key.public_key(), *uris, **options)).encode() + key_pem(key))
        return path

    def seal(self, body: dict[str, Any]) -> str:
        """The detached JWS over an assignment."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self.issue(key.public_key(), f"spiffe://{self.domain}/control")
        der = [each.public_bytes(serialization.Encoding.DER) for each in (leaf, self.intermediate)]
        header = _b64(json.dumps({"alg": "ES256", "x5c": [base64.b64encode(each).decode() for each in der]}).encode())
        payload = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        r, s = utils.decode_dss_signature(key.sign(f"{header}.{_b64(payload)}".encode(), ec.ECDSA(hashes.SHA256())))
        return f"{header}..{_b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


class Control:
    """The control plane of a test. `body(service)` is what a member is told; push() tells it anew."""

    def __init__(self, folder: Path, *, life: float = 3600, ca: Ca | None = None, host: str = "127.0.0.1") -> None:
        self.folder, self.life, self.ca, self.host = folder, life, ca or Ca(), host
        self.port = free_port()
        self.services: dict[str, dict[str, Any]] = {}  # name -> settings, with endpoints
        self.own: dict[str, dict[str, Any]] = {}  # name -> what its own sidecars are told of it
        self.rules: list[dict[str, Any]] = []
        self.default = "deny"
        self.external: dict[str, dict[str, dict[str, Any]]] = {}  # caller -> what it may call outside
        self.user_authors: list[str] | None = None  # None: nothing is said of them
        self.revoked: dict[str, list[str]] = {"serials": [], "identities": []}
        self.version = 1
        self.fresh = 3600
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.joined: list[dict[str, Any]] = []
        self.issued: list[x509.Certificate] = []
        self.asked: list[tuple[str, str]] = []  # (service, ?version) of streams
        self.tokens: set[str] = set()
        self.deltas = True
        self.alter: Callable[[dict[str, Any]], dict[str, Any]] = lambda message: message
        self._sent: dict[Any, tuple[str, dict[str, Any]]] = {}
        self.start()

    # -- what it says

    def body(self, service: str) -> dict[str, Any]:
        rules = [{key: value for key, value in rule.items() if key != "to"} for rule in self.rules if rule["to"] == service]
        return {
            "version": self.version, "trust_domain": self.ca.domain, "service": service, "own": dict(self.own.get(service, {})), "issued": int(time.time()), "fresh": self.fresh,
            **({} if self.user_authors is None else {"user_authors": list(self.user_authors)}),
            "external": json.loads(json.dumps(self.external.get(service, {}))),
            "bundle": self.ca.bundle, "revoked": {key: list(value) for key, value in self.revoked.items()},
            "services": json.loads(json.dumps({name: each for name, each in self.services.items() if name != service})),
            "authorization": {"default": self.default, "version": self.version, "rules": rules},
        }  # fmt: skip

    def token(self, service: str, *, life: float = 600, root: str | None = None) -> Path:
        """Write a token file."""
        secret = secrets.token_urlsafe(24)
        digest = root or hashlib.sha256(self.ca.root.public_bytes(serialization.Encoding.DER)).hexdigest()
        text = _b64(json.dumps({"service": service, "secret": secret, "control_ca": digest, "expires": int(time.time() + life)}).encode())
        self.tokens.add(text)
        path = self.folder / f"{service}-{secret[:4]}.token"
        path.write_text(text + "\n")
        return path

    def change(self) -> None:
        """Tell every member the present state, as a delta on what it was told before."""
        self.version += 1
        asyncio.run_coroutine_threadsafe(self._push(), self.loop).result(PATIENCE)

    async def _push(self) -> None:
        for stream, (service, before) in list(self._sent.items()):
            body = self.body(service)
            if self.deltas:
                changes: dict[str, Any] = {key: body[key] for key in body if key not in ("services", "version") and body[key] != before.get(key)}
                services = {name: body["services"].get(name) for name in {**before["services"], **body["services"]}
                            if body["services"].get(name) != before["services"].get(name)}  # fmt: skip
                if services:
                    changes["services"] = services
                message = {"type": "delta", "version": body["version"], "base": before["version"], "changes": changes}
            else:
                message = {"type": "assignment", "version": body["version"], "assignment": body}
            with contextlib.suppress(InvalidState):  # it is closing: the member comes again, and hears the whole
                self._send(stream, service, body, message)

    def _send(self, stream: Any, service: str, body: dict[str, Any], message: dict[str, Any]) -> None:
        self._sent[stream] = (service, body)
        protocol, writer = stream
        protocol.send_text(json.dumps(self.alter({**message, "signature": self.ca.seal(body)})).encode())
        writer.writelines(protocol.data_to_send())

    # -- what it hears

    def of(self, service: str, kind: str) -> list[dict[str, Any]]:
        return [message for name, message in list(self.heard) if name == service and message["type"] == kind]

    def acked(self, service: str) -> int:
        return max((message["version"] for message in self.of(service, "ack")), default=0)

    def settled(self) -> None:
        """Wait until every stream has acknowledged the present version."""
        eventually(lambda: all(self.acked(service) >= self.version for service, _ in list(self._sent.values())), "the acknowledgements")

    # -- the server

    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()

        async def serve() -> None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            pair = self.ca.pair(self.folder, "control", f"spiffe://{self.ca.domain}/control")
            pair.write_bytes(self.ca.root.public_bytes(PEM).join(_split(pair.read_bytes())))
            context.load_cert_chain(pair)
            context.load_verify_locations(cadata=self.ca.bundle)
            context.verify_mode = ssl.CERT_OPTIONAL
            self.server = await asyncio.start_server(self._serve, self.host, self.port, ssl=context, reuse_address=True)
            ready.set()

        def run() -> None:
            asyncio.set_event_loop(self.loop)
            self.loop.run_until_complete(serve())
            self.loop.run_forever()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(asyncio.sleep(0.01))
            self.loop.close()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert ready.wait(PATIENCE)

    def stop(self) -> None:
        """Die without a word to anybody."""

        def end() -> None:
            self.server.close()
            for _, writer in list(self._sent):
                writer.transport.abort()
            self.loop.call_later(0.05, self.loop.stop)

        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(end)
            self.thread.join(PATIENCE)
        self._sent.clear()

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream: Any = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
            peer = writer.get_extra_info("peercert") or {}
            uri = next((value for kind, value in peer.get("subjectAltName", ()) if kind == "URI"), "")
            if method == "POST":
                length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
                status, answer = self._answer(target, json.loads(await reader.readexactly(length)), uri)
                body = json.dumps(answer).encode()
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % (status, len(body)) + body)
                await writer.drain()
                return
            protocol = ServerProtocol(max_size=1 << 24)
            stream = (protocol, writer)
            await self._stream(protocol, reader, writer, head, target, uri, stream)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._sent.pop(stream, None)
            with contextlib.suppress(Exception):
                writer.close()

    async def _stream(self, protocol: Any, reader: Any, writer: Any, head: bytes, target: str, uri: str, stream: Any) -> None:
        protocol.receive_data(head)
        (request,) = protocol.events_received()
        service = uri.rpartition("/")[2]
        if not uri:
            return
        protocol.send_response(protocol.accept(request))
        writer.writelines(protocol.data_to_send())
        query = parse_qs(urlsplit(target).query)
        self.asked.append((service, query["version"][0]))
        body = self.body(service)
        self._send(stream, service, body, {"type": "assignment", "version": body["version"], "assignment": body})
        while data := await reader.read(65536):
            protocol.receive_data(data)
            for frame in protocol.events_received():
                if frame.opcode is Opcode.TEXT:
                    self.heard.append((service, json.loads(frame.data)))
            writer.writelines([each for each in protocol.data_to_send() if each])

    def _answer(self, target: str, said: dict[str, Any], uri: str) -> tuple[int, dict[str, Any]]:
        if target == "/v1/join" and "token" not in said:  # as a pod, or by a certificate of another PKI
            self.joined.append(said)
            service = said["service"]
        elif target == "/v1/join":
            if said["token"] not in self.tokens:
                return 403, {"error": "the token is spent or unknown"}
            if json.loads(base64.urlsafe_b64decode(said["token"] + "==="))["expires"] < time.time():
                return 403, {"error": "the token has expired"}
            self.tokens.discard(said["token"])
            self.joined.append(said)
            service = json.loads(base64.urlsafe_b64decode(said["token"] + "==="))["service"]
        elif not uri:
            return 401, {"error": "a certificate is required"}
        else:
            service = uri.rpartition("/")[2]
        request = x509.load_pem_x509_csr(said["csr"].encode())
        certificate = self.ca.issue(request.public_key(), f"spiffe://{self.ca.domain}/service/{service}", life=self.life, begin=-1)
        self.issued.append(certificate)
        return 200, {"svid": self.ca.pem(certificate), "bundle": self.ca.bundle, "not_after": int(certificate.not_valid_after_utc.timestamp())}


def _split(pair: bytes) -> list[bytes]:
    """A chain-and-key file in two, so that the root can go between."""
    at = pair.index(b"-----BEGIN PRIVATE KEY")
    return [pair[:at], pair[at:]]


class Sidecar:
    """A `crossway mesh sidecar` process."""

    def __init__(
        self, control: Control, service: str, app: int, *more: str, token: Path | None = None, state: str | None = None, wait: bool = True,
        wrapper: tuple[str, ...] = (), host: str = "127.0.0.1",
    ) -> None:
        self.service, self.folder = service, control.folder
        self.state = control.folder / (state or f"{service}.state")
        self.inbound, self.outbound, self.admin = free_port(), free_port(), free_port()
        self.errors = control.folder / f"{service}.log"
        if token is None and not {"--join-kubernetes", "--spire"}.intersection(more) and not (self.state / "svid.pem").exists():
            token = control.token(service)
        self.arguments = [
            *wrapper, sys.executable, "-m", "gateway", "mesh", "sidecar", "--service", service, "--app", f"127.0.0.1:{app}",
            "--inbound", f"{host}:{self.inbound}", "--outbound", f"127.0.0.1:{self.outbound}", "--admin", f"127.0.0.1:{self.admin}",
            "--control", control.url, "--state", str(self.state), *(["--token", str(token)] if token else []), *more,
        ]  # fmt: skip
        self.start()
        if wait:
            self.ready()

    def start(self) -> None:
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(self.arguments, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True)

    def ready(self) -> None:
        def serving() -> bool:
            assert self.process.poll() is None, self.errors.read_text()
            with contextlib.suppress(OSError, ValueError):
                return bool(self.status()["ready"])
            return False

        eventually(serving, f"the sidecar of {self.service}")

    def page(self, path: str) -> str:
        if self.arguments[0] == "ip":  # in a network of its own
            done = subprocess.run(
                [*self.arguments[:4], "curl", "-s", f"http://127.0.0.1:{self.admin}{path}"], capture_output=True, text=True, check=False, timeout=PATIENCE
            )
            return done.stdout
        return request(self.admin, path)[2].decode()

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.page("/status")))

    def metric(self, start: str) -> float:
        """The sum of the samples whose line starts so."""
        return sum(float(line.rpartition(" ")[2]) for line in self.page("/metrics").splitlines() if line.startswith(start))

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.errors.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        if self.process.stdout is not None:
            self.process.stdout.close()
