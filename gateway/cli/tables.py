"""Where commands print their tables: a terminal's width, a pipe's, and what becomes of a table that has more columns than fit.

Strategy: nothing is ever cut. A table of figures that is wider than the terminal is printed as wide as it is, and the terminal wraps its lines, so every name and
figure can still be read and copied; one of texts (`fold`) has cells of several lines instead, down to their longest words.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PIPE_COLUMNS = 200
ENDLESS = 100_000  # columns, to measure in


def console_for(*tables: Any, fold: bool = False) -> Console:
    """Return the console on which these tables can be printed whole."""
    from rich.console import Console

    # Into a pipe, as wide as it is: whoever reads it there wants whole lines. What would be folded is not, even when a shell has exported its width.
    found = Console(width=None if sys.stdout.isatty() or ("COLUMNS" in os.environ and not fold) else PIPE_COLUMNS)
    measure = Console(width=ENDLESS)
    sizes = [measure.measure(each) for each in tables]
    needed = max((each.minimum if fold else each.maximum for each in sizes), default=0)
    return found if needed <= found.width else Console(width=needed)
