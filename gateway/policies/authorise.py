"""ip, scopes and claims: may this caller do this?

Strategy: nothing but settings to steps; the steps are in _speedups/steps.pyx.
"""

from collections.abc import Mapping

from gateway._speedups.steps import ClaimsStep, IpStep, ScopesStep
from gateway.config.policies import Ip, Scalar
from gateway.policies.base import RouteParts, Use


def compile_ip(settings: Ip, use: Use, parts: RouteParts) -> None:
    parts.steps.append(IpStep(use.name, [str(net) for net in settings.allow], [str(net) for net in settings.deny]))


def compile_scopes(settings: tuple[str, ...], use: Use, parts: RouteParts) -> None:
    parts.steps.append(ScopesStep(use.name, settings))


def compile_claims(settings: Mapping[str, tuple[Scalar, ...]], use: Use, parts: RouteParts) -> None:
    parts.steps.append(ClaimsStep(use.name, settings))
