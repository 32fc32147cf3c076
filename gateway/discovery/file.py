"""A watched file of endpoints: noticed within about a second, used only when all of it is right.

Strategy: one stat() a look. It follows symbolic links, so a rename over the file and Kubernetes' swap of a link are seen like a
change in place. All files of a process are looked at in the same moment, so that many of them wake it no oftener than one. What is
still being written is left alone until it rests; parsing is done in small steps, so that a worker's loop serves requests in
between. A file that is missing or wrong changes nothing but the log.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from gateway.config.discovery import FileTime, file_time
from gateway.config.load import endpoints_of
from gateway.config.schema import Endpoint
from gateway.config.source import Document
from gateway.discovery.book import Book
from gateway.errors import ConfigError, Problem

log = logging.getLogger("crossway.discovery")

LOOK = 1.0  # seconds between two looks
REST = 0.05  # seconds in which a file must not have changed before it is read
RESTS = 20  # waits for that; a file that changes all the time is read in the end
SLICE = 0.001  # seconds of parsing between two turns of the loop
MAX_TOLD = 8  # mistakes of one version that are logged


class FileWatch:
    """Tells when the endpoints in a file change. `seen` is the time of the content that is known already."""

    def __init__(
        self, upstream: str, path: Path, seen: FileTime | None, book: Book, on_change: Callable[[tuple[Endpoint, ...]], object],
        *, empty: bool = False,
    ) -> None:
        self._empty = empty  # no endpoint at all is an answer
        self.tried = False
        self._upstream = upstream
        self._path = path
        self._seen = seen
        self._book = book
        self._on_change = on_change
        self._problems: list[Problem] = []  # of the last version, empty when it was good

    async def run(self) -> None:
        """Look again and again. Ended by cancellation."""
        while True:
            try:
                await self._look()
            except Exception as error:  # noqa: BLE001 - a defect of ours must not end the looks
                self._failed([Problem(str(self._path), 0, 0, repr(error))])
            self.tried = True
            await asyncio.sleep(self._book.until_look(LOOK))

    async def _look(self) -> None:
        try:
            seen = file_time(self._path)
            if seen == self._seen:
                return
            for _ in range(RESTS):
                await asyncio.sleep(REST)
                before, seen = seen, file_time(self._path)
                if before == seen:
                    break
        except OSError as error:
            self._seen = None  # when it is back it is read, whatever its time
            self._failed([Problem(str(self._path), 0, 0, f"cannot be read: {error.strerror}")])
            return
        await self._read(seen)

    async def _read(self, seen: FileTime) -> None:
        document = Document(self._path)
        turn = time.monotonic()
        for _ in document.reading():
            if time.monotonic() - turn > SLICE:
                await asyncio.sleep(0)
                turn = time.monotonic()
        try:
            if file_time(self._path) != seen:
                return  # it changed meanwhile: the next look reads it
        except OSError:
            return
        self._seen = seen
        try:
            endpoints = endpoints_of(document, empty=self._empty)
        except ConfigError as error:
            self._failed(list(error.problems))
        else:
            self._recovered()
            self._on_change(endpoints)

    def _failed(self, problems: list[Problem]) -> None:
        """Count and tell a version that cannot be used, once."""
        if problems == self._problems:
            return
        self._problems = problems
        self._book.rejected += 1
        for problem in problems[:MAX_TOLD]:
            self._say(logging.ERROR, "a file of endpoints cannot be used, the last good endpoints stay", place=problem.place,
                      problem=problem.message, hint=problem.hint)

    def _recovered(self) -> None:
        if self._problems:
            self._say(logging.INFO, "a file of endpoints can be used again", file=str(self._path))
        self._problems = []

    def _say(self, level: int, event: str, **more: object) -> None:
        log.log(level if self._book.loud else logging.DEBUG, event, extra={"upstream": self._upstream, **more})
