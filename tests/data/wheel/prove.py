"""Run by script/wheel where only the wheel is installed: a gateway answers over TLS, with its own OpenSSL in a process that has Python's as well.

Strategy: a policy of the gateway says which files its process has mapped, and the dynamic linker which file each symbol was found in.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import ssl
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

POLICY = '''
import ssl

from gateway import Policy, respond

context = ssl.create_default_context()      # Python's OpenSSL at work beside the engine's


class Answers(Policy):
    def on_request(self, request):
        found = {line.split()[-1] for line in open("/proc/self/maps") if "/lib" in line and any(
            name in line for name in ("libssl", "libcrypto", "libnghttp2", "_ssl"))}
        return respond(200, chr(10).join(sorted(found)))
'''
CONFIG = """
version: 1
workers: 1
admin: {bind: "127.0.0.1:0"}
listeners: {public: {bind: "127.0.0.1:0", tls: {certificates: [{cert: cert.pem, key: key.pem}]}}}
upstreams: {nowhere: {targets: ["127.0.0.1:1"]}}
routes: [{name: all, match: {prefix: /}, policies: [{python: {class: "answers:Answers"}}], upstream: nowhere}]
"""


def certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "wheel")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - datetime.timedelta(1), now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "cert.pem").write_bytes(made.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))


def bindings() -> set[tuple[str, str]]:
    """Which libraries took symbols of OpenSSL and nghttp2 from which, when Python's ssl is there first."""
    code = "import ssl, gateway._speedups.tls, gateway._speedups.http2"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "LD_DEBUG": "bindings", "LD_BIND_NOW": "1"}, capture_output=True, text=True, check=True)
    found = re.findall(r"binding file (\S+) \[\d+\] to (\S+) \[\d+\]", done.stderr)
    return {(user, used) for user, used in found if re.search(r"lib(ssl|crypto|nghttp2)", used) and user != used}


def main() -> None:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        certificate(folder)
        (folder / "answers.py").write_text(POLICY)
        (folder / "edge.yaml").write_text(CONFIG)
        command = [str(Path(sys.executable).with_name("crossway")), "run", "-c", str(folder / "edge.yaml")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            try:
                assert running.stdout is not None
                port = next(found[1] for line in running.stdout if (found := re.search(r"^public .*127\.0\.0\.1:(\d+)", line)))
                context = ssl.create_default_context(cafile=str(folder / "cert.pem"))
                with urllib.request.urlopen(f"https://127.0.0.1:{port}/", context=context, timeout=30) as answer:
                    loaded = answer.read().decode().splitlines()
            finally:
                running.terminate()
                for _ in running.stdout or ():
                    pass
    print(*(f"mapped: {path}" for path in loaded), sep="\n")
    for name in ("libssl", "libcrypto", "libnghttp2"):
        if not any(f"/crossway.libs/{name}-" in path for path in loaded):
            sys.exit(f"wheel: {name} is not the wheel's own")
    ours = {(user, used) for user, used in bindings() if "/crossway.libs/" in user or "/gateway/_speedups/" in user}
    if not ours or any("/crossway.libs/" not in used for _, used in ours):
        sys.exit(f"wheel: symbols come from another library than the wheel's: {sorted(ours)}")
    if any("/crossway.libs/" in used for user, used in bindings() - ours):
        sys.exit("wheel: Python's own modules took symbols of the wheel's libraries")


if __name__ == "__main__":
    main()
