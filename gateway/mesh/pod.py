"""What a Kubernetes token says of the pod that holds it: its namespace, service account, name and uid.

Strategy: shared by both sides and light. A member reads its own token without verifying it, to know what it is called; the control plane reads
the same claims of a token that it has verified (gateway.mesh.kubernetes). A pod is one instance, named by its name and the beginning of
its uid, so that whoever holds its token can be nobody else.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST = 16 << 10  # bytes of a token
NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
UID = re.compile(r"[A-Za-z0-9-]{8,64}")
LONGEST = 110  # characters of a pod's name in that of its instance


class BadPod(Exception):
    """A token that is of no pod that could join; the text is for whoever presented it."""


@dataclass(frozen=True)
class Pod:
    """One pod, by its token."""

    namespace: str
    account: str
    name: str
    uid: str

    @property
    def instance(self) -> str:
        """Return the name of the instance that the pod is. A StatefulSet's pods have their names again; uids never come back."""
        return f"{self.name[:LONGEST]}-{self.uid[:8]}"

    @property
    def service_account(self) -> str:
        return f"{self.namespace}/{self.account}"


def pod_of(claims: Mapping[str, Any]) -> Pod:
    """Return the pod that a token's claims name. Raises BadPod when it is bound to none."""
    said: Any = claims.get("kubernetes.io")
    try:
        pod = Pod(said["namespace"], said["serviceaccount"]["name"], said["pod"]["name"], said["pod"]["uid"])
        whole = all(NAME.fullmatch(each) for each in (pod.namespace, pod.account, pod.name)) and UID.fullmatch(pod.uid)
    except (TypeError, KeyError, AttributeError):
        whole = None
    if not whole:
        raise BadPod("the token is bound to no pod: it has to come from a projected volume (serviceAccountToken)")
    if claims.get("sub") != f"system:serviceaccount:{pod.namespace}:{pod.account}":
        raise BadPod("the token's subject is not the service account that it names")
    return pod


def read_token(path: str | Path) -> tuple[str, Pod]:
    """Return a token file's text and, unverified, the pod that it names. Raises BadPod or OSError."""
    with open(path, "rb") as file:
        text = file.read(MOST + 1).strip()
    parts = text.split(b".")
    try:
        if len(text) > MOST or len(parts) != 3:
            raise ValueError
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + b"=" * (-len(parts[1]) % 4)))
        return text.decode("ascii"), pod_of(claims if isinstance(claims, dict) else {})
    except (ValueError, RecursionError):
        raise BadPod(f"{path} is no token of a service account") from None
