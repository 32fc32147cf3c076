"""The fuzzer finds what is planted, and a short run of every target finds nothing."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from tests.fuzz import run
from tests.fuzz.targets import SEEDS, TARGETS, request


@pytest.fixture(autouse=True)
def findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "FINDINGS", tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_a_short_run_finds_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([name, "--runs", "3000", "--seconds", "5", "--seed", "1"]) == 0
    assert "nothing found" in capsys.readouterr().out


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_accepted(name: str) -> None:
    for seed in SEEDS[name]:
        assert TARGETS[name](seed)


@pytest.mark.parametrize("name", TARGETS)
def test_an_input_leaves_nothing_behind(name: str) -> None:
    """A long run is not to end for want of memory."""

    def feed() -> int:
        for seed in SEEDS[name] * 100:
            TARGETS[name](seed)
        gc.collect()
        return sys.getallocatedblocks()

    before = feed()
    assert feed() < before + 50


def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def planted(data: bytes) -> tuple[object, ...]:
        assert b"chunked, " not in data and b"//" not in data, "planted"
        return request(data)

    monkeypatch.setitem(TARGETS, "request", planted)
    assert run.main(["request", "--runs", "200000", "--seconds", "30", "--seed", "7"]) == 1
    assert "planted" in capsys.readouterr().err
    assert (tmp_path / "request.finding").read_bytes()


def test_an_unknown_target_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["nonsense"])
    assert "unknown target nonsense" in capsys.readouterr().err
