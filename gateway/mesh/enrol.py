"""Joining and renewing, as a program of its own: `python -m gateway.mesh.enrol`, a job as JSON on stdin, the outcome on stdout.

Strategy: a short-lived process makes the key, asks for the certificate and writes both, so that the member itself holds neither
`cryptography` nor an HTTP client in memory. The root is known before anything secret is said: joining, the token pins it; renewing,
it is in the bundle. A key is new every time, and the old pair stays until the new one is proved to fit.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import ssl
import sys
import time
from typing import Any

from gateway.mesh.clock import doubt
from gateway.mesh.contact import EnrolError, address_of, check_control, control_context, read_token, tls_fault
from gateway.mesh.pod import BadPod
from gateway.mesh.pod import read_token as read_pod
from gateway.mesh.state import BUNDLE, SVID, State, StateError
from gateway.workload.admission import identity_of

TIMEOUT = 10.0  # seconds, each of connecting, writing and reading
MOST = 1 << 20  # bytes of an answer


def pinned_root(host: str, port: int, digest: str) -> str:
    """Return the root (PEM) whose SHA-256 is `digest` out of the chain that the server shows; nothing is sent to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((host, port), TIMEOUT) as raw, context.wrap_socket(raw, server_hostname=host) as secure:
        shown = _chain(secure)
    for der in shown:
        if hashlib.sha256(der).hexdigest() == digest:
            return ssl.DER_cert_to_PEM_cert(der)
    raise EnrolError("the server's chain does not hold the root that the token names: is it another control plane?", True)


def _chain(secure: ssl.SSLSocket) -> list[bytes]:
    if hasattr(secure, "get_unverified_chain"):  # 3.13 and newer
        return [each if isinstance(each, bytes) else each.public_bytes(2) for each in secure.get_unverified_chain() or ()]
    shown = secure._sslobj.get_unverified_chain()  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(each.public_bytes(1)) for each in shown or ()]


def ask(host: str, port: int, path: str, context: ssl.SSLContext, body: dict[str, Any]) -> dict[str, Any]:
    """POST a JSON body, with the `time` of when it leaves, and return the answer's. Raises EnrolError."""
    connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=context)
    try:
        connection.connect()
        check_control(connection.sock)
        said = {**body, "time": time.time()}  # not before: a slow way to the control plane would pass for a slow clock
        connection.request("POST", path, json.dumps(said).encode(), {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read(MOST + 1)
    finally:
        connection.close()
    if len(text) > MOST:
        raise EnrolError("the answer is too large")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if answer.status != 200 or not isinstance(found, dict):
        reason = next((str(found[key]) for key in ("error", "detail", "title") if isinstance(found, dict) and found.get(key)), "")
        raise EnrolError(f"the control plane answers {answer.status}: {reason[:300] or 'no reason'}", answer.status in (400, 401, 403, 404))
    return found


def make_request(service: str) -> tuple[str, bytes]:
    """Make a key; return (certificate request, the key), both PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return request.public_bytes(serialization.Encoding.PEM).decode("ascii"), private


def accept(state: State, answer: dict[str, Any], private: bytes, service: str) -> dict[str, Any]:
    """Check what came for our request and write it; return what the member wants to know. Raises EnrolError."""
    from gateway._speedups.certificates import TlsError, chain_fault, parse_certificates, parse_key

    try:
        svid, bundle = str(answer["svid"]).encode("ascii"), str(answer["bundle"]).encode("ascii")
        chain, roots = parse_certificates(svid), parse_certificates(bundle)
        _, name = identity_of(chain[0])
    except (TlsError, ValueError, KeyError) as error:
        raise EnrolError(f"what the control plane issued cannot be used: {error}") from None
    if name != service:
        raise EnrolError(f"the control plane issued a certificate for {name}, not {service}", True)
    if not parse_key(private).matches(chain[0]):
        raise EnrolError("the certificate that was issued is not for our key")
    if fault := chain_fault(chain, roots):
        raise EnrolError(f"the certificate that was issued does not lead to the bundle: {fault}{doubt(fault)}")
    try:
        state.write(BUNDLE, bundle)
        state.write(SVID, svid + private)
    except OSError as error:
        raise EnrolError(f"what the control plane issued cannot be written to {state.folder}: {error.strerror}") from None
    return {"identity": chain[0].uris[0], "serial": chain[0].serial, "not_before": chain[0].not_before, "not_after": chain[0].not_after}


def join(state: State, job: dict[str, Any]) -> dict[str, Any]:
    """Get the first certificate, for a token, as a pod, or for a certificate of the bank's own PKI."""
    said = {key: job[key] for key in ("instance", "inbound", "labels", "zone")}
    if job.get("kubernetes") is not None:
        return _join_as_pod(state, job, said)
    if job.get("pair") is not None:
        return _join_by_pair(state, job, said)
    token = read_token(job["token"])  # whether it has expired says the control plane's clock, not this one
    if token.service != job["service"]:
        raise EnrolError(f"the token is for {token.service}, not {job['service']}", True)
    host, port = address_of(job["control"])
    root = pinned_root(host, port, token.control_ca)
    request, private = make_request(job["service"])
    answer = ask(host, port, "/v1/join", control_context(root), {"token": token.text, "csr": request, **said})
    return accept(state, answer, private, job["service"])


def _join_by_pair(state: State, job: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Show a certificate that the control plane's file allows to join as this service; its root is a file of ours."""
    host, port = address_of(job["control"])
    certificate, key = job["pair"]
    try:
        context = _known_control(job)
        context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise EnrolError(f"the certificate to join with, or the control plane's root, cannot be used: {error}", True) from None
    request, private = make_request(job["service"])
    answer = ask(host, port, "/v1/join", context, {"service": job["service"], "csr": request, **said})
    return accept(state, answer, private, job["service"])


def _join_as_pod(state: State, job: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Show the token that Kubernetes keeps in a file; it is said only to who is proved to be the control plane."""
    host, port = address_of(job["control"])
    try:
        token, pod = read_pod(job["kubernetes"])
        context = _known_control(job)
    except BadPod as error:
        raise EnrolError(str(error), True) from None
    except (OSError, ValueError) as error:
        raise EnrolError(f"the pod's token, or the control plane's root, cannot be used: {error}", True) from None
    request, private = make_request(job["service"])
    said |= {"instance": pod.instance, "kubernetes": token, "service": job["service"], "csr": request}
    return accept(state, ask(host, port, "/v1/join", context, said), private, job["service"])


def _known_control(job: dict[str, Any]) -> ssl.SSLContext:
    """What verifies a control plane whose root is a file of ours. Raises OSError or ValueError."""
    with open(job["control_ca"], encoding="ascii") as file:
        return control_context(file.read(MOST))


def renew(state: State, job: dict[str, Any]) -> dict[str, Any]:
    """Exchange the certificate that is held for one with a new key."""
    host, port = address_of(job["control"])
    bundle = state.read(BUNDLE)
    if bundle is None:
        raise EnrolError("there is no bundle to verify the control plane with", True)
    context = control_context(bundle.decode("ascii"))
    context.load_cert_chain(state.svid)
    request, private = make_request(job["service"])
    return accept(state, ask(host, port, "/v1/renew", context, {"csr": request}), private, job["service"])


def main() -> int:
    job = json.load(sys.stdin)
    try:
        state = State(job["state"])
        outcome = join(state, job) if job["kind"] == "join" else renew(state, job)
    except EnrolError as error:
        outcome = {"error": str(error), "lasting": error.lasting}
    except ssl.SSLError as error:
        outcome = {"error": f"TLS with the control plane failed: {tls_fault(error)}", "lasting": False}
    except StateError as error:
        outcome = {"error": str(error), "lasting": True}
    except (OSError, http.client.HTTPException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        outcome = {"error": f"the control plane at {job['control']} cannot be reached: {reason}", "lasting": False}
    print(json.dumps(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
