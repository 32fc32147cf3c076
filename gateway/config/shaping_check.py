"""What cannot be meant by a route's splits, canaries, mirror and faults.

Strategy: as in `check`, which calls this for every route: errors refuse the configuration, warnings are for a person.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.config.schema import Config, Route
from gateway.config.source import Document, Key

Place = tuple[Key, ...]

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})  # RFC 9110 9.2.1


def check_shaping(config: Config, number: int, *, identified: bool, faults: Sequence[Place]) -> None:
    """Report on route `number`. `identified`: a policy says who calls; `faults`: places of its fault policies."""
    route, document, place = config.routes[number], config.document, ("routes", number)
    if route.sticky == "client" and not identified:
        document.report(
            (*place, "sticky"),
            "sticky by client without a policy that says who calls",
            "add a jwt or api_key policy to this route, or use source, header:NAME or cookie:NAME",
        )
    _canaries(route, place, document)
    _mirror(config, route, place, document)
    for at in faults:
        document.warn(
            at,
            f"faults are injected into the route {document.show((*place, 'name'), route.name)}",
            "remove the policy where real requests arrive",
        )


def _canaries(route: Route, place: Place, document: Document) -> None:
    for index, canary in enumerate(route.canary):
        for earlier, other in enumerate(route.canary[:index]):
            if canary.when.implies(other.when):
                line = document.spot((*place, "canary", earlier)).line
                document.warn(
                    (*place, "canary", index),
                    f"no request gets here: the canary at line {line} takes them all before",
                    "put the one with more conditions first",
                )
                break


def _mirror(config: Config, route: Route, place: Place, document: Document) -> None:
    mirror = route.mirror
    if mirror is None:
        return
    at = (*place, "mirror", "upstream")
    if mirror.upstream in route.upstreams:
        document.report(
            at,
            "a mirror that is an upstream of the route itself: it would get each copied request twice",
            "name another upstream",
        )
        return
    own = {
        target.address: name
        for name in route.upstreams
        if name in config.upstreams
        for target in config.upstreams[name].targets
    }
    copied = config.upstreams[mirror.upstream].targets if mirror.upstream in config.upstreams else ()
    for target in copied:
        if target.address in own:
            document.report(
                at,
                f"a mirror with an endpoint of the route's own upstream {own[target.address]!r}: it would get each copied"
                " request twice",
                "mirror to other servers",
            )
            return
    unsafe = [method for method in mirror.methods if method not in SAFE]
    if unsafe:
        document.warn(
            (*place, "mirror", "methods"),
            f"{', '.join(unsafe)} requests are executed a second time, by the mirror",
            "be sure that it moves no money and sends no mail",
        )
