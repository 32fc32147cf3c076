"""The gateway's own log: one JSON object a line on stderr or in a file, through the standard logging module.

Strategy: one handler object at the root logger, opened by the supervisor and inherited by every child; O_APPEND makes
lines of different processes not overwrite each other. Each process reopens the file for itself on SIGUSR1. `event` is a
constant sentence, everything variable is a member of its own, so that a log can be searched without regular expressions.
Nobody waits for the log: while its reader takes nothing, lines are lost, and the next one says in `lines_lost` how many. The standard
library's JSON is quick enough for lines that are rare; orjson and datetime would be 0.4 MiB of every sidecar.
"""

import json
import logging
import math
import os
import select
import sys
import time
from pathlib import Path
from typing import IO, Any

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
log = logging.getLogger("crossway")


class JsonLines(logging.Formatter):
    """ts (UTC, microseconds), level, event, process, then the fields given as `extra`."""

    process = "supervisor"

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": _time(record.created),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "process": self.process,
            "pid": record.process,
        }
        if record.name != log.name:
            line["logger"] = record.name
        for key, value in record.__dict__.items():
            if key not in _STANDARD and key not in line:
                line[key] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return _JSON.encode(line)
        except ValueError:  # JSON has no word for infinite numbers
            return _JSON.encode({key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()})


def _time(seconds: float) -> str:
    """RFC 3339 in UTC, with microseconds."""
    whole, micros = divmod(round(seconds * 1e6), 1_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{micros:06d}Z"


class ReopenedFile(logging.StreamHandler[IO[str]]):
    """Writes to stderr, or to a file that can be reopened after it was renamed."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lost = 0
        super().__init__(sys.stderr if path is None else _open(path))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line unless that would have to wait: a pipe without room, a stopped terminal."""
        if not self._ready():
            self.lost += 1
            return
        if self.lost:
            record.lines_lost, self.lost = self.lost, 0
        super().emit(record)

    def _ready(self) -> bool:
        """Tell whether a line can be written now; a pipe that is said to be writable has room for 4 KiB (POSIX PIPE_BUF)."""
        try:
            poll = select.poll()
            poll.register(self.stream, select.POLLOUT)
            return bool(poll.poll(0))
        except (OSError, ValueError):
            return True  # no descriptor behind it: handleError() has the rest

    def reopen(self) -> None:
        """Open the file again by name; the old one stays in use when that fails."""
        if self.path is not None:
            try:
                stream = _open(self.path)
            except OSError as error:
                log.error("the log file cannot be reopened", extra={"file": str(self.path), "error": str(error)})
                return
            old = self.setStream(stream)
            if old is not None:
                old.close()

    def handleError(self, record: logging.LogRecord) -> None:
        """Lose the line: a full disk or a closed pipe must not stop payments, nor print a traceback for each line."""


def _open(path: Path) -> IO[str]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    return open(descriptor, "w", encoding="utf-8", errors="backslashreplace", buffering=1)  # half a surrogate pair, as JSON escapes it


_installed: ReopenedFile | None = None


def set_up(path: Path | None = None, level: str = "info") -> None:
    """Send every logger of this process, and of the children it forks, to `path` or stderr.

    Raises OSError when the file cannot be opened.
    """
    global _installed
    destination = ReopenedFile(path)
    destination.setFormatter(JsonLines())
    root = logging.getLogger()
    if _installed is not None:
        root.removeHandler(_installed)
        if _installed.path is not None:
            _installed.close()
    root.addHandler(destination)
    root.setLevel(level.upper())
    _installed = destination


def reopen() -> None:
    if _installed is not None:
        _installed.reopen()


def name_process(name: str) -> None:
    """Set the member `process` of every later line of this process: worker-0, admin."""
    JsonLines.process = name
