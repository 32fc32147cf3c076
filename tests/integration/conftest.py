"""Fixtures of the tests with real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.processes import Origin, write_config


@pytest.fixture
def origin() -> Iterator[Origin]:
    server = Origin()
    yield server
    server.close()


@pytest.fixture
def config(tmp_path: Path, origin: Origin) -> Path:
    return write_config(tmp_path / "edge.yaml", origin.port)
