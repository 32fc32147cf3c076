"""The gateway's own log: JSON lines, and nobody waits for whoever reads them."""

from __future__ import annotations

import io
import json
import logging
import os
from pathlib import Path
from typing import Any

from gateway.server.log import JsonLines, ReopenedFile


def record(event: str, **more: Any) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "crossway", "levelname": "INFO", "levelno": logging.INFO, "msg": event, **more})
    return made


def handler(path: Path | None = None) -> ReopenedFile:
    made = ReopenedFile(path)
    made.setFormatter(JsonLines())
    return made


def test_a_pipe_that_nobody_reads_loses_lines_and_blocks_nobody() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while os.write(write, b"x" * 4096):
            pass
    except BlockingIOError:
        os.set_blocking(write, True)            # as a standard error is
    log = handler()
    log.setStream(os.fdopen(write, "w", buffering=1))
    for number in range(3):
        log.emit(record("lost", number=number))
    held = b""
    while not held.endswith(b"\n"):
        held += os.read(read, 65536)
        log.emit(record("written"))
    log.emit(record("after"))
    log.stream.close()
    while piece := os.read(read, 65536):
        held += piece
    os.close(read)
    lines = [json.loads(line) for line in held.lstrip(b"x").splitlines()]
    assert lines[0]["event"] == "written" and lines[0]["lines_lost"] == 3
    assert lines[-1]["event"] == "after" and "lines_lost" not in lines[-1]


def test_a_file_and_a_stream_without_a_descriptor_get_every_line(tmp_path: Path) -> None:
    log = handler(tmp_path / "log")
    for number in range(100):
        log.emit(record("said", number=number))
    log.close()
    assert [json.loads(line)["number"] for line in (tmp_path / "log").read_text().splitlines()] == list(range(100))
    log = handler()
    log.setStream(io.StringIO())
    log.emit(record("said"))
    assert json.loads(log.stream.getvalue())["event"] == "said"      # type: ignore[attr-defined]


def test_a_line_says_when_in_utc_with_microseconds() -> None:
    assert json.loads(JsonLines().format(record("said", created=1_800_000_000.25)))["ts"] == "2027-01-15T08:00:00.250000Z"
    assert json.loads(JsonLines().format(record("said", created=0.9999999)))["ts"] == "1970-01-01T00:00:01.000000Z"


def test_whatever_is_said_becomes_a_line_of_json(tmp_path: Path) -> None:
    log = handler(tmp_path / "log")
    log.emit(record("said", path=tmp_path, raw=b"\xff", text="ü\n\x1f\u2028", half="\udc80", many=(1, 2), big=1 << 70, nothing=None))
    log.emit(record("said", endless=float("inf"), none=float("nan"), number=1.5))
    log.close()
    first, second = (json.loads(line) for line in (tmp_path / "log").read_bytes().split(b"\n")[:2])
    assert (first["path"], first["raw"], first["text"], first["half"]) == (str(tmp_path), "b'\\xff'", "ü\n\x1f\u2028", "\udc80")
    assert (first["many"], first["big"], first["nothing"]) == ([1, 2], 1 << 70, None)
    assert (second["endless"], second["none"], second["number"]) == ("inf", "nan", 1.5)
