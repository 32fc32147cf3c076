"""What a sidecar's command line says, what it may join with, and the error of one that cannot start.

Strategy: plain data, read once; whatever cannot be meant was refused by the command before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway._speedups.journal import Journal
from gateway.mesh.clock import doubt
from gateway.mesh.contact import EnrolError, address_of, read_token
from gateway.mesh.identity import Svid
from gateway.server.app_probe import AppProbe

if TYPE_CHECKING:
    from gateway.mesh.workload_api import Agent


class CannotStart(Exception):
    """The sidecar cannot serve; the text is for a person."""


@dataclass(frozen=True)
class Setup:
    """What the command line says."""

    service: str
    app: tuple[str, int] | None  # None: it only calls others
    inbound: tuple[str, int]
    outbound: tuple[str, int]
    control: str
    state: str
    token: str | None = None  # a file
    pair: tuple[str, str] | None = None  # instead: files of a certificate of the bank's PKI and its key
    pod: str | None = None  # instead: the file of a Kubernetes token
    control_ca: str | None = None  # for both: the file of the control plane's root
    agent: Agent | None = None  # instead of both: SPIRE's, for certificate and bundle
    ports: dict[str, tuple[str, int]] = field(default_factory=dict)  # service -> a local address of its own
    admin: tuple[str, int] | None = None
    probes: tuple[str, int] | None = None  # /livez, /startz, /readyz, /metrics for an orchestrator, on any address
    app_probes: dict[str, AppProbe] = field(default_factory=dict)
    zone: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    advertise: str | None = None  # host:port by which others reach inbound, when it is not what is bound
    intercept: bool = False
    app_protocol: str = "http1"
    external_certs: dict[str, tuple[str, ...]] = field(default_factory=dict)  # external host -> files of our certificate and key, one or two
    egress_audit: str | None = None  # a file, stdout or stderr
    drain_delay: float = 2.0  # seconds
    drain_deadline: float = 30.0


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def journal_of(target: str | None) -> Journal | None:
    """Open where calls to external hosts are recorded. Raises CannotStart."""
    if target is None:
        return None
    try:
        return Journal({"stdout": 1, "stderr": 2}.get(target, target))
    except OSError as error:
        raise CannotStart(f"cannot write {target}: {error.strerror}") from None


def lasting_proof(setup: Setup) -> dict[str, Any] | None:
    """Return what one may join with as often as needed; None with a token, which is good once."""
    if setup.pod is not None:
        return {"kubernetes": setup.pod, "control_ca": setup.control_ca}
    return None if setup.pair is None else {"pair": list(setup.pair), "control_ca": setup.control_ca}


def proof_of(setup: Setup, folder: Path, held: Svid | None) -> tuple[dict[str, Any], float]:
    """Return what to join with, and until when that makes sense; `held` has expired. Raises CannotStart."""
    try:
        address_of(setup.control)
        if setup.agent is not None:
            return {}, float("inf")
        if (lasting := lasting_proof(setup)) is not None:
            return lasting, float("inf")
        if setup.token is None:
            what = "the certificate in it has expired" + doubt("expired") if held is not None else "there is no certificate in it"
            raise CannotStart(f"{folder}: {what}; make a token with `crossway mesh token {setup.service}` and give it with --token")
        text = Path(setup.token).read_text("ascii")
        return {"token": text}, read_token(text).expires
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStart(f"--token {setup.token}: {error.strerror if isinstance(error, OSError) else 'not a token'}; `crossway mesh token {setup.service}` makes one") from None
    except EnrolError as error:
        raise CannotStart(str(error)) from None
