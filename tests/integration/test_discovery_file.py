"""Endpoints in a watched file: every way in which tools replace a file, and files that are wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.faults import Payers, ScriptedOrigin
from tests.integration.processes import Gateway, eventually
from tests.integration.test_discovery_names import HEAD, counted, flowing, settled

USELESS = "a file of endpoints cannot be used, the last good endpoints stay"


@pytest.fixture
def two() -> Iterator[tuple[ScriptedOrigin, ScriptedOrigin]]:
    with ExitStack() as stack:
        origins = ScriptedOrigin(), ScriptedOrigin()
        for origin in origins:
            stack.callback(origin.close)
        yield origins


def write(folder: Path, file: str = "endpoints.yaml") -> Path:
    path = folder / "edge.yaml"
    path.write_text(
        f"{HEAD}upstreams:\n  pay: {{discovery: {{file: {file}}}}}\n"
        "routes:\n  - {name: pay, match: {prefix: /x}, upstream: pay}\n"
    )
    return path


def renamed(path: Path, text: str) -> None:
    """Replace a file as tools do that want no reader to see half of it."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(path)


def test_a_file_that_is_replaced_moves_the_traffic(tmp_path: Path, two: tuple[ScriptedOrigin, ScriptedOrigin]) -> None:
    a, b = two
    file = tmp_path / "endpoints.yaml"
    file.write_text(f"- 127.0.0.1:{a.port}\n")
    with Gateway(write(tmp_path)) as gateway:
        with Payers(gateway.port(), 4, "/x/pay") as payers:
            flowing(a)
            assert not b.ledger.executed
            renamed(file, f"# moved\n- {{address: localhost:{b.port}, weight: 2, zone: eu-1a}}\n")
            flowing(b)
            eventually(lambda: a.open == 0, "the end of the old endpoint's connections")
            file.write_text(f"[127.0.0.1:{a.port}]")  # in place
            flowing(a)
        settled(payers, a, b)


def test_a_link_that_is_swapped_moves_the_traffic(tmp_path: Path, two: tuple[ScriptedOrigin, ScriptedOrigin]) -> None:
    """A ConfigMap in Kubernetes: the file is a link through ..data, and ..data is replaced by a rename."""
    a, b = two
    for name, origin in (("..1", a), ("..2", b)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "endpoints.yaml").write_text(f"- 127.0.0.1:{origin.port}\n")
        os.utime(tmp_path / name / "endpoints.yaml", (1_700_000_000, 1_700_000_000))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "endpoints.yaml").symlink_to("..data/endpoints.yaml")
    with Gateway(write(tmp_path)) as gateway:
        with Payers(gateway.port(), 4, "/x/pay") as payers:
            flowing(a)
            (tmp_path / "..data_tmp").symlink_to("..2")
            (tmp_path / "..data_tmp").rename(tmp_path / "..data")
            flowing(b)
            eventually(lambda: a.open == 0, "the end of the old endpoint's connections")
        settled(payers, a, b)


def test_a_file_with_mistakes_changes_nothing(tmp_path: Path, two: tuple[ScriptedOrigin, ScriptedOrigin]) -> None:
    a, b = two
    file = tmp_path / "endpoints.yaml"
    file.write_text(f"- 127.0.0.1:{a.port}\n")

    def told() -> list[tuple[str, str]]:
        return [(line["place"], line["problem"]) for line in gateway.log() if line["event"] == USELESS]

    with Gateway(write(tmp_path)) as gateway:
        with Payers(gateway.port(), 4, "/x/pay") as payers:
            flowing(a)
            renamed(file, f"- 127.0.0.1:{b.port}\n- {{address: 127.0.0.1:1, wait: 2}}\n- 127.0.0.1:nothing\n")
            eventually(lambda: len(told()) == 2, "the lines about the mistakes")
            assert told() == [
                (f"{file}:2:26", "unknown key 'wait' in [1]"),
                (f"{file}:3:3", "[2]: expected host:port, got '127.0.0.1:nothing'"),
            ]
            renamed(file, "- 127.0.0.1:1\n- {\n")
            eventually(lambda: len(told()) == 3)
            renamed(file, "")
            eventually(lambda: len(told()) == 4)
            file.unlink()
            eventually(lambda: told()[-1] == (str(file), "cannot be read: No such file or directory"))
            os.mkfifo(file)  # nobody ever writes to it: opening it would hang
            eventually(lambda: told()[-1] == (str(file), "cannot be read: not a regular file"))
            eventually(lambda: counted(gateway, "endpoint_files_rejected")[0] >= 6, "the counters of both workers")
            flowing(a)
            assert not b.ledger.executed
            renamed(file, f"- 127.0.0.1:{b.port}\n")
            flowing(b)
            eventually(lambda: "a file of endpoints can be used again" in gateway.events())
        settled(payers, a, b)


def test_a_worker_that_starts_while_the_file_is_wrong_uses_the_good_one_of_before(
    tmp_path: Path, two: tuple[ScriptedOrigin, ScriptedOrigin]
) -> None:
    a, _ = two
    file = tmp_path / "endpoints.yaml"
    file.write_text(f"- 127.0.0.1:{a.port}\n")
    with Gateway(write(tmp_path)) as gateway:
        renamed(file, "- {\n")
        eventually(lambda: USELESS in gateway.events())
        old = gateway.workers()
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: (new := gateway.workers()) and not set(new) & set(old), "the successors")
        assert [gateway.get("/x")[0] for _ in range(8)] == [200] * 8
        done = gateway.command("reload")
        assert done.returncode == 1 and f"{file}:1:1" in done.stdout + done.stderr
        assert gateway.get("/x")[0] == 200
