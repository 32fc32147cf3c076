"""Envoy as a member on either side of a sidecar, with nothing but a certificate of the mesh: the wire is plain mutual TLS and HTTP."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.mesh_pair import INBOUND, OUTBOUND
from tests.integration.mesh_kit import Control, Sidecar, free_port
from tests.integration.processes import PATIENCE, Origin, eventually
from tests.integration.test_mesh_member import call

FOUND = [os.environ.get("ENVOY", ""), *(f"{folder}/envoy/_bin/envoy" for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))]
PROGRAM = next((path for path in FOUND if path and os.access(path, os.X_OK)), None)
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="PyPI has no Envoy for this kind of machine (name one in ENVOY); plain TLS clients do the same in test_mesh_member.py"
)


class Envoy:
    """An Envoy that runs one configuration."""

    def __init__(self, folder: Path, text: str, **values: object) -> None:
        assert PROGRAM is not None
        self.admin, self.port = free_port(), free_port()
        path = folder / f"envoy-{self.port}.yaml"
        path.write_text(text.format(admin=self.admin, port=self.port, **values))
        self.log = folder / f"envoy-{self.port}.log"
        with self.log.open("wb") as log:
            words = [PROGRAM, "-c", str(path), "--concurrency", "1", "--use-dynamic-base-id", "-l", "warning"]
            self.process = subprocess.Popen(words, stdout=log, stderr=log)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    made = Control(tmp_path)
    made.rules = [{"name": "payments-to-ledger", "from": ["payments"], "to": "ledger", "methods": ["GET"], "prefix": "/v1"}]
    (tmp_path / "ca.pem").write_text(made.ca.bundle)
    yield made
    made.stop()


def test_envoy_calls_a_service_behind_a_sidecar(control: Control, origin: Origin, tmp_path: Path) -> None:
    with Sidecar(control, "ledger", origin.port) as ledger:
        pair = control.ca.pair(tmp_path, "envoy", "spiffe://bank.test/service/payments")
        envoy = Envoy(tmp_path, OUTBOUND, to=ledger.inbound, pair=pair, ca=tmp_path / "ca.pem")
        try:
            eventually(lambda: answers(envoy) == 200, "an answer through Envoy")
            assert call(envoy.port, "/v2/x")[0] == 403
            assert ledger.metric('istio_requests_total{reporter="destination",source_workload="payments"') >= 2
        finally:
            envoy.close()


def test_a_sidecar_calls_a_service_behind_envoy(control: Control, origin: Origin, tmp_path: Path) -> None:
    pair = control.ca.pair(tmp_path, "envoy", "spiffe://bank.test/service/ledger")
    envoy = Envoy(tmp_path, INBOUND, to=origin.port, pair=pair, ca=tmp_path / "ca.pem")
    try:
        control.services["ledger"] = {"protocol": "http", "endpoints": [{"address": f"127.0.0.1:{envoy.port}", "weight": 1}]}
        with Sidecar(control, "payments", origin.port) as payments, Sidecar(control, "accounts", origin.port) as accounts:
            eventually(lambda: call(payments.outbound)[0] == 200, "an answer through the sidecar")
            assert call(accounts.outbound)[0] == 403, "Envoy knows the caller by the same id"
    finally:
        envoy.close()


def answers(envoy: Envoy) -> int:
    assert envoy.process.poll() is None, envoy.log.read_text()
    try:
        return call(envoy.port)[0]
    except OSError:
        return 0
