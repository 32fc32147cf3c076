"""audit: a JSON line per exchange.

Strategy: one journal per file and process, kept over reloads, so that its sequence numbers go on.
"""

from pathlib import Path

from gateway._speedups.journal import Journal
from gateway._speedups.steps import AuditStep
from gateway.config.policies import Audit
from gateway.policies.base import RouteParts, Use

_open: dict[Path, Journal] = {}


def compile_audit(settings: Audit, use: Use, parts: RouteParts) -> None:
    path = Path(settings.file)
    journal = _open.get(path)
    if journal is None:
        journal = _open[path] = Journal(str(path))
    use.workshop.journals[path] = journal
    parts.audits.append(AuditStep(use.name, journal, settings.fields))
