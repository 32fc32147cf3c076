"""Fixtures of the tests with real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.bank import Bank, open_bank
from tests.integration.echo import Echo
from tests.integration.grpc_kit import Calls, open_calls
from tests.integration.h2_pairs import PAIRS, Pair
from tests.integration.h2_subject import Subject, open_subject
from tests.integration.processes import Origin, write_config
from tests.integration.vault import Vault, open_vault

if TYPE_CHECKING:
    from tests.integration.mesh_kit import Control
    from tests.integration.net_kit import Host, Net


@pytest.fixture
def origin() -> Iterator[Origin]:
    server = Origin()
    yield server
    server.close()


@pytest.fixture
def config(tmp_path: Path, origin: Origin) -> Path:
    return write_config(tmp_path / "edge.yaml", origin.port)


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    """An origin that tells what reached it."""
    origin = Echo()
    yield origin
    origin.close()


@pytest.fixture(scope="session")
def opened_bank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bank]:
    with open_bank(tmp_path_factory.mktemp("bank")) as bank:
        yield bank


@pytest.fixture
def bank(opened_bank: Bank) -> Iterator[Bank]:
    """A gateway between misbehaving ends; after the test it must hold nothing and have lost no worker."""
    yield opened_bank
    opened_bank.origin.reset()
    opened_bank.gateway.calm()


@pytest.fixture(scope="session")
def opened_vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    with open_vault(tmp_path_factory.mktemp("vault")) as vault:
        yield vault


@pytest.fixture
def vault(opened_vault: Vault) -> Iterator[Vault]:
    """A gateway with TLS on every listener; after the test it must hold nothing and have lost no worker."""
    yield opened_vault
    opened_vault.origin.reset()
    opened_vault.gateway.calm()


@pytest.fixture(scope="session")
def opened_h2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with open_subject(tmp_path_factory.mktemp("h2")) as subject:
        yield subject


@pytest.fixture
def h2(opened_h2: Subject) -> Iterator[Subject]:
    """A gateway with both versions on both sides; after the test it must hold nothing and have lost no worker."""
    yield opened_h2
    if opened_h2.echoes:
        opened_h2.origin.reset()
        opened_h2.raw.reset()
        opened_h2.watched.calm()


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]}-to-{pair[1]}")
def pair(request: pytest.FixtureRequest, h2: Subject) -> Pair:
    """Every combination of a client's and an upstream's version."""
    return Pair(h2, *request.param)


@pytest.fixture
def net() -> Iterator[Net]:
    """A bridge for hosts in networks of their own."""
    from tests.integration.net_kit import Net  # which looks what this machine can do

    made = Net()
    yield made
    made.close()


@pytest.fixture
def hosts(net: Net, tmp_path: Path) -> Iterator[tuple[Control, Host, Host]]:
    """A control plane, payments and ledger, the two on hosts of their own."""
    from tests.integration.net_kit import two_hosts

    with two_hosts(net, tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def opened_calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with open_calls(tmp_path_factory.mktemp("calls")) as calls:
        yield calls


@pytest.fixture
def calls(opened_calls: Calls) -> Iterator[Calls]:
    """A gateway before a gRPC service; after the test it must hold nothing and have lost no worker."""
    yield opened_calls
    opened_calls.gateway.calm()
