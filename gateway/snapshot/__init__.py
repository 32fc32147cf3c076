"""From a checked configuration to the immutable objects that the engine runs on."""

from gateway._speedups.exchange import Snapshot
from gateway.snapshot.build import build

__all__ = ["Snapshot", "build"]
