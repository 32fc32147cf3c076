"""Every behaviour on the wire: one transcript file, both ends scripted, against a real gateway process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wire.gateway_process import GatewayProcess
from tests.wire.runner import Play
from tests.wire.transcript import Transcript, read

HERE = Path(__file__).parent
TRANSCRIPTS = [read(path) for path in sorted(HERE.rglob("*.wire"))]
CASES = [
    pytest.param(transcript, row, id=f"{transcript.path.relative_to(HERE).with_suffix('')}" + (f"[{number}]" if row else ""))
    for transcript in sorted(TRANSCRIPTS, key=lambda transcript: transcript.config)
    for number, row in enumerate(transcript.rows, 1)
]


class Gateways:
    """The running gateways by configuration, started on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, GatewayProcess] = {}

    def running_with(self, config: str) -> GatewayProcess:
        """Return the session's gateway that runs this configuration."""
        if config not in self.running:
            self.running[config] = GatewayProcess(config, self.folder)
        return self.running[config]


@pytest.fixture(scope="session")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateways]:
    """Every gateway is still the process that was started, and drains, when all transcripts have been played."""
    gateways = Gateways(tmp_path_factory.mktemp("wire"))
    yield gateways
    for gateway in gateways.running.values():
        gateway.check_alive()
        assert gateway.stop() == 0, gateway.tail()


@pytest.mark.parametrize(("transcript", "row"), CASES)
def test_transcript(gateways: Gateways, transcript: Transcript, row: dict[str, str]) -> None:
    gateway = gateways.running_with(transcript.config)
    try:
        Play(gateway.world, transcript, row).run()
    finally:
        gateway.check_alive()
