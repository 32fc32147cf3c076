"""audit: a JSON line per exchange.

Strategy: one journal per file and process, kept over reloads, so that its sequence numbers go on; closed when the worker ends,
because what it still holds in memory has been promised.
"""

import os
import time
from pathlib import Path

from gateway._speedups.journal import Journal
from gateway._speedups.steps import AuditStep
from gateway.config.policies import DESCRIPTORS, Audit
from gateway.policies.base import RouteParts, Use, Workshop

_open: dict[Path, Journal] = {}


def compile_audit(settings: Audit, use: Use, parts: RouteParts) -> None:
    path = settings.file
    journal = use.workshop.shared("journal", str(path), lambda: _journal(path, use.workshop))
    use.workshop.journals[path] = journal
    parts.audits.append(AuditStep(use.name, journal, settings.fields))


def _journal(path: Path, workshop: Workshop) -> Journal:
    """Return the file's journal. A check creates no file: whether it could be written was looked at without."""
    if workshop.check:
        return Journal(os.devnull)
    if path not in _open:
        _open[path] = Journal(DESCRIPTORS.get(path, str(path)), worker=workshop.worker)
    return _open[path]


def close_journals(seconds: float) -> None:
    """Write what is in memory, waiting for slow disks and readers at most `seconds` altogether."""
    end = time.monotonic() + seconds
    while _open:
        _, journal = _open.popitem()
        journal.close(max(0.0, end - time.monotonic()))
