"""A short run of the stream fuzzer finds nothing, and it does find what is planted."""

from __future__ import annotations

import pytest

from tests.fuzz import streams


@pytest.mark.timeout(120)
def test_a_short_run_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert streams.main(["--seconds", "12", "--seed", "1"]) == 0
    assert "nothing found" in capsys.readouterr().out


@pytest.mark.timeout(120)
def test_an_answer_of_another_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As if the gateway had mixed up two answers: the upstream says another's id now and then."""
    planned = streams.Fuzz.answer

    def mixed(self: streams.Fuzz, ask: streams.Ask, served: streams.Served) -> None:
        planned(self, ask, served)
        if ask.name.endswith("7"):
            served.pieces = [b"".join(served.pieces).replace(b"X-Id: " + ask.name.encode(), b"X-Id: r1")]

    monkeypatch.setattr(streams.Fuzz, "answer", mixed)
    assert streams.main(["--seconds", "30", "--seed", "1"]) == 1
    assert "got the answer to b'r1'" in capsys.readouterr().err
