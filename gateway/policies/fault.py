"""fault: delays and answers on purpose, for a share of the requests.

Strategy: the step runs last before the request would be forwarded, so that whoever would be refused still is. That a route has one is
said in the log by whoever compiles the configuration, at every start and reload.
"""

import logging

from gateway._speedups.shaping import Conditions, FaultStep
from gateway.config.conditions import When, triples
from gateway.config.policies import Fault
from gateway.policies.base import RouteParts, Use

log = logging.getLogger("crossway.policies")


def conditions_of(when: When | None) -> Conditions | None:
    """Return the compiled conditions, None for none."""
    return None if when is None else Conditions(triples(when.headers), triples(when.cookies))


def compile_fault(settings: Fault, use: Use, parts: RouteParts) -> None:
    step = FaultStep(
        use.name, delay=settings.delay or 0.0, abort=settings.abort or 0, percent=settings.percent,
        when=conditions_of(settings.when),
    )
    parts.steps.append(step)
    if use.workshop.worker < 0 and not use.workshop.check:
        log.warning("faults are injected into a route on purpose", extra={"route": use.route, "policy": use.name})
