"""Which pods may join: tokens of Kubernetes service accounts, verified with the cluster's own public keys.

Strategy: the API server is not asked about a token; its keys are, now and then, or are a file. The verifier is that of the `jwt` policy (strict about
everything around a signature). Beyond it a token has to be bound to a pod and to live for a day at most, which excludes the everlasting ones
of Secrets. A cluster's keys are kept over a reload of the mesh's file, and whatever its issuer does the last good ones stay.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gateway.config.mesh_file import KubernetesJoin
from gateway.mesh.pod import MOST, BadPod, Pod, pod_of
from gateway.policies.jwt_fetch import FetchError, fetch
from gateway.policies.jwt_keys import MAX_DOCUMENT, KeysError
from gateway.policies.jwt_source import FETCH_TIMEOUT, FileSource, KeySource, UrlSource
from gateway.policies.jwt_verify import JwtSettings, TokenError, Verifier

log = logging.getLogger("crossway.mesh")

ALGORITHMS = ("RS256", "RS384", "RS512", "ES256", "ES384", "ES512")  # that API servers sign with
LONGEST = 86_400.0 + 3_600.0  # seconds of a token's life; kubelets ask for minutes or hours


class ClusterUrl(UrlSource):
    """Keys at an API server: below its own authority, and with a token if it wants one."""

    def __init__(self, url: str, authority: Path | None, bearer: Path | None) -> None:
        super().__init__(url, ALGORITHMS)
        self._authority, self._bearer = authority, bearer

    async def _read(self) -> bytes | None:
        origin, context = self._origin, None
        try:
            if self._authority is not None:
                context = ssl.create_default_context(cafile=self._authority)
            if self._bearer is not None:
                line = b"Authorization: Bearer " + self._bearer.read_bytes()[:MOST].strip() + b"\r\n\r\n"
                if line.count(b"\n") != 2:
                    raise FetchError("the bearer token is not one line")
                origin = replace(origin, request=origin.request[:-2] + line)
        except OSError as error:  # ssl.SSLError is one
            raise FetchError(f"{error.filename or self._authority}: {error.strerror or 'no certificates'}") from None
        return await fetch(origin, timeout=FETCH_TIMEOUT, limit=MAX_DOCUMENT, tls=context)


class Cluster:
    """One cluster whose pods may join."""

    def __init__(self, settings: KubernetesJoin) -> None:
        self.settings = settings
        self.source: KeySource
        if "://" in settings.keys:
            self.source = ClusterUrl(settings.keys, settings.keys_ca, settings.keys_token)
        else:
            self.source = FileSource(Path(settings.keys), ALGORITHMS)
        demands = JwtSettings(
            issuers=(settings.issuer,), audiences=(settings.audience,), algorithms=ALGORITHMS, require=("exp", "iat", "sub"), headers={},
            max_lifetime=LONGEST,
        )  # fmt: skip
        self.verifier = Verifier(demands, self.source)
        try:
            self.source.load()
        except KeysError as error:  # the file may become better; until then nobody of this cluster joins
            log.error("the keys of a cluster cannot be used", extra={"issuer": settings.issuer, "error": str(error)})

    async def pod(self, token: bytes) -> Pod:
        """Return the pod of a token. Raises TokenError or BadPod."""
        found = self.verifier.check(token)
        return pod_of((found if not hasattr(found, "__await__") else await found).claims)


class Clusters:
    """All clusters whose pods may join."""

    def __init__(self) -> None:
        self._clusters: list[Cluster] = []

    def take(self, wanted: Sequence[KubernetesJoin]) -> None:
        """Have these clusters from now on; those that did not change keep their keys. Needs a running loop."""
        kept = {id(each): each for each in self._clusters if each.settings in wanted}
        fresh = [next((each for each in kept.values() if each.settings == one), None) or Cluster(one) for one in wanted]
        for each in self._clusters:
            if id(each) not in kept:
                each.source.stop()
        for each in fresh:
            each.source.start()
        self._clusters = fresh

    async def admit(self, token: object, service: object) -> Pod:
        """Return the pod that may join as a service. Raises BadPod."""
        if not isinstance(token, str) or not token.isascii():
            raise BadPod("the token is not well-formed")
        reason = ""
        for cluster in self._clusters:  # several may have the same issuer: its default is the same everywhere
            try:
                pod = await cluster.pod(token.encode("ascii"))
            except TokenError as error:
                if error.reason != "token-issuer" or not reason:
                    reason = str(error)
                continue
            accounts = cluster.settings.services.get(service, ()) if isinstance(service, str) else ()
            if pod.service_account not in accounts:
                raise BadPod(f"the service account {pod.service_account} may not join as this service")
            return pod
        raise BadPod(reason or "no cluster's pods may join here: control.join.kubernetes is not set")

    def close(self) -> None:
        for each in self._clusters:
            each.source.stop()
