"""What cannot be made out of a configuration, each at its place in the file.

Strategy: whatever a part raises while it is built is turned into a problem of the document, and building goes on, so that a
person sees everything at once. Only what a setting or a file can cause is caught; of somebody's own class, all of it.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.config.source import Document, Key
from gateway.errors import Problem
from gateway.policies import SettingError

Place = tuple[Key, ...]

EXPECTED = (OSError, ValueError, OverflowError)


class Faults:
    """Collects the problems of one build."""

    def __init__(self, document: Document) -> None:
        self.document = document
        document.problems = []

    @contextmanager
    def at(self, place: Place, what: str, *, foreign: bool = False) -> Iterator[None]:
        """Turn what the block raises into a problem at `place`; `what` begins its sentence.

        `foreign`: code of the user's own runs in the block, so whatever it raises is a finding.
        """
        try:
            yield
        except EXPECTED as error:
            self.note(place, what, error, key=True)
        except (Exception, SystemExit) as error:
            if not foreign:
                raise
            self.note(place, what, error, key=True)

    def note(self, place: Place, what: str, error: BaseException, *, key: bool = False) -> None:
        """Note that `error` kept something from being made; with `key`, point at the key rather than at the value."""
        if isinstance(error, SettingError):
            place, key = (*place, *error.at), False
        raised = _raised_in(error, self.document.base)
        self.document.report(place, f"{what}: {_reason(error)}", f"it was raised at {raised}" if raised else "", key=key)

    def doubt(self, place: Place, sentence: str) -> None:
        """Note a warning."""
        self.document.warn(place, sentence)

    def problems(self) -> list[Problem]:
        """Return what was found, in file order, each once: a policy that several routes use fails in each of them."""
        found, self.document.problems = dict.fromkeys(self.document.problems), []
        return sorted(found, key=lambda problem: (problem.line, problem.column))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    text = str(error)
    if isinstance(error, ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _raised_in(error: BaseException, folder: Path) -> str:
    """Return file:line of the innermost line in a module beside the configuration, if it was one that raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == folder]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
