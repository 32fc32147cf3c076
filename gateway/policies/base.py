"""What compiling a policy works with: the route's parts, the use of a policy in it, and what a snapshot's routes share.

Strategy: a policy named under `policies:` is one thing however many routes use it (one verifier, one cache, one bucket per
caller); one written in place belongs to its route. Both are told apart by `Use.name`, which is the key of what is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gateway._speedups.exchange import Step

if TYPE_CHECKING:
    from gateway.config.redis import Redis
    from gateway.telemetry.shared import SharedState

Made = TypeVar("Made")


class SettingError(ValueError):
    """A setting that cannot be used. `at` is its place below the policy's kind, such as ("keys",)."""

    def __init__(self, message: str, at: tuple[str | int, ...]) -> None:
        super().__init__(message)
        self.at = at


@dataclass
class RouteParts:
    """What the policies of one route add up to."""

    steps: list[Step] = field(default_factory=list)
    body_limit: int | None = None                       # bytes
    total: float | None = None                          # seconds
    request_remove: list[bytes] = field(default_factory=list)
    request_add: list[bytes] = field(default_factory=list)
    response_remove: list[bytes] = field(default_factory=list)
    response_add: list[bytes] = field(default_factory=list)
    rewrite_prefix: bytes | None = None
    rewrite_path: tuple[bytes | int, ...] | None = None
    rewrite_host: bytes | None = None
    audits: list[Step] = field(default_factory=list)
    response_hooks: list[Step] = field(default_factory=list)
    end_hooks: list[Step] = field(default_factory=list)
    cors: Step | None = None
    grpc_web: bool = False                              # known before any policy is compiled
    strip_authorization: bool = False


@dataclass(frozen=True)
class Use:
    """One policy in one route."""

    name: str                                           # the policy's name, or ROUTE#N for one written in place
    route: str
    parameters: tuple[str, ...]                         # of the route's path template
    workshop: Workshop
    place: tuple[str | int, ...] = ()                   # in the file, down to the policy's kind


class Workshop:
    """What the routes of one snapshot share, made on first use."""

    def __init__(
        self, base: Path, seed: int, worker: int = -1, *, check: bool = False, redis: Redis | None = None,
        memory: SharedState | None = None,
    ) -> None:
        self.base = base
        self.redis = redis                              # where limits of several machines are kept
        self.memory = memory                            # of the gateway's processes; None when nothing of it will run
        self.worker = worker                            # index, in audit records; -1 outside of a worker
        self.seed = seed                                # of Principal.key, the same in every worker
        self.check = check                              # nothing of it will run: leave no trace
        self.notes: list[tuple[tuple[str | int, ...], str]] = []    # doubts: place in the file, sentence
        self.sources: list[Any] = []                    # background work: start(loop), stop()
        self.journals: dict[Path, Any] = {}
        self.identity_names: set[bytes] = set()
        self._made: dict[tuple[str, str], Any] = {}

    def shared(self, kind: str, name: str, make: Callable[[], Made]) -> Made:
        """Return the object of this kind and name, made once."""
        key = (kind, name)
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made
