"""What goes wrong outside a request, in the form in which a person reads it.

Strategy: a Problem carries its place (file, line, column), the source line and what to do about it, and renders itself
the same way everywhere: on a terminal, in the log of a refused reload and in JSON. Whoever makes a Problem has already
removed every secret from it; nothing here looks at values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding about a file. `line` and `column` count from 1; line 0 means the file as a whole."""

    file: str
    line: int
    column: int
    message: str
    hint: str = ""
    source: str = ""
    severity: Severity = "error"
    width: int = 1  # columns that the underline covers, from `column` on

    @property
    def place(self) -> str:
        """Return `file:line:column`, or the file alone for a problem of the whole file."""
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file

    def render(self) -> str:
        """Return the problem as text: place and message, the source line, a caret under it, and the hint."""
        kind = "warning: " if self.severity == "warning" else ""
        lines = [f"{self.place}: {kind}{self.message}"]
        margin = " " * len(str(self.line))
        if self.line and self.source:
            # A tab in the margin would move the caret on some terminals and not on others.
            source = self.source.replace("\t", " ")
            width = max(1, min(self.width, len(source) - self.column + 1))
            lines.append(f"  {self.line} | {source}")
            lines.append(f"  {margin} | {' ' * (self.column - 1)}^{'~' * (width - 1)}")
        if self.hint:
            lines.append(f"  {margin} = {self.hint}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str | int]:
        """Return the fields for JSON output."""
        return asdict(self)


class ConfigError(Exception):
    """A configuration that cannot be used; `problems` holds everything that is wrong with it, in file order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(self.render())

    def render(self) -> str:
        """Return all problems as text, separated by empty lines."""
        return "\n\n".join(problem.render() for problem in self.problems)
