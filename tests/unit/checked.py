"""What `crossway check` finds in a file, as problems instead of text."""

from __future__ import annotations

from pathlib import Path

from gateway import snapshot
from gateway.config import findings, load
from gateway.errors import ConfigError, Problem


def problems(path: Path) -> list[Problem]:
    """Every problem of the file, warnings too."""
    try:
        config = load(path)
        return [*findings(config), *snapshot.check(config)]
    except ConfigError as error:
        return list(error.problems)
