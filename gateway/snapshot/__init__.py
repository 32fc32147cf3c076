"""From a checked configuration to the immutable objects that the engine runs on."""

from gateway._speedups.exchange import Snapshot
from gateway.snapshot.build import build, check
from gateway.snapshot.settle import settled

__all__ = ["Snapshot", "build", "check", "settled"]
