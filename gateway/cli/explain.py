"""`crossway explain METHOD URL`: which route takes a request, why, and why the next ones do not.

Strategy: the request is made into a head, parsed and matched by the very code that serves requests; the verdicts are a
trace of that walk and not a second implementation of the rules. Nothing is bound or connected.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from gateway.cli.mesh_ways import decided, explained, share_texts, targets
from gateway.cli.routes import PROTOCOLS, conditions_of, policies_of
from gateway.errors import ConfigError

if TYPE_CHECKING:
    from gateway._speedups.route_trie import Verdict
    from gateway.config import Config
    from gateway.config.schema import Route

ROUTED, NOT_ROUTED, UNUSABLE = 0, 1, 2

# In which phase of gateway.policies.PHASES each kind runs. CORS comes first: a preflight carries no credentials. Of a
# Python policy this is on_request; on_response and on_end run when their time comes.
PHASE_OF = {
    "cors": "identify",
    "jwt": "identify",
    "api_key": "identify",
    "ip": "authorise",
    "scopes": "authorise",
    "claims": "authorise",
    "rate_limit": "limit",
    "quota": "limit",
    "limits": "limit",
    "python": "validate",
    "headers": "transform",
    "rewrite": "transform",
    "grpc_web": "transform",
    "fault": "transform",
    "audit": "record",
}
_ASCII = "".join(map(chr, range(0x21, 0x7F)))


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the trie is asked about it."""

    method: str
    host: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "explain",
        help="say which route takes a request, and why the next ones do not",
        description=__doc__.partition("\n")[0] if __doc__ else None,
        epilog="exit status: 0 routed, 1 refused (400, 404 or 405), 2 the configuration or the request cannot be read",
    )
    parser.add_argument("method", metavar="METHOD", help="such as GET; case matters")
    parser.add_argument("url", metavar="URL", help="http://host/path?query, or /path?query for any host")
    parser.add_argument(
        "-H",
        "--header",
        metavar="'NAME: VALUE'",
        dest="headers",
        action="append",
        default=[],
        help="a header of the request; may be repeated",
    )
    parser.add_argument("-c", "--config", metavar="FILE", required=True, help="the configuration file")
    parser.add_argument("--client", metavar="NAME", help="who calls, for a split that is sticky by client")
    parser.add_argument("--source", metavar="ADDRESS", help="the client's address, for a split that is sticky by source")
    parser.add_argument("--listener", metavar="NAME", help="where the request arrives (default: the file's first)")
    parser.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="how to print the answer (default: text)"
    )
    parser.add_argument("--json", dest="output", action="store_const", const="json", help="the same as -o json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Explain one request: 0 routed, 1 refused, 2 when the configuration or the arguments are unusable."""
    from gateway.config import load
    from gateway.snapshot.matching import build_trie, routes_on

    try:
        config = load(args.config)
        listener = args.listener or next(iter(config.http_listeners or config.listeners))
        if listener not in config.listeners:
            raise ValueError(f"there is no listener {listener!r}: the file has {', '.join(config.listeners)}")
        if config.listeners[listener].tcp is not None:
            raise ValueError(f"listener {listener!r} passes raw TCP: it knows no requests")
        request = read_request(args.method, args.url, args.headers)
        if args.source is not None:
            ipaddress.ip_address(args.source)
        routes = routes_on(config, listener)
        trie = build_trie(routes)
    except (ConfigError, ValueError) as error:
        print(error.render() if isinstance(error, ConfigError) else f"crossway explain: {error}", file=sys.stderr)
        return UNUSABLE
    where = (request.method, request.host, request.path, request.headers, request.query)
    try:
        name, params, allowed = trie.find(*where)
        verdicts = trie.explain(*where)
        by_name = {route.name: route for route in routes}
        way = None if name is None else _way(config, by_name[name], request, args.client, args.source)
    except ValueError as error:
        return _show(args.output, {"status": 400, "reason": str(error)})
    losers = [verdict for verdict in verdicts if verdict.outcome != "won"]
    answer: dict[str, Any] = {"listener": listener}
    answer |= {"method": request.method, "host": request.host, "path": request.path}
    if name is None:
        answer |= {"status": 405, "allow": list(allowed)} if allowed else {"status": 404}
    else:
        answer |= _winner(config, by_name[name], params) | (way or {})
    answer["others"] = [_loser(verdict, by_name[verdict.route]) for verdict in losers]
    return _show(args.output, answer)


def read_request(method: str, url: str, headers: list[str]) -> Request:
    """Return the request that the arguments describe; ValueError says what is wrong with them."""
    fields = []
    host = "localhost"
    for text in headers:
        name, colon, value = text.partition(":")
        if not colon or not name:
            raise ValueError(f"{text!r} is no header: write -H 'name: value'")
        if name.lower() == "host":
            host = value.strip()
        else:
            fields.append((name.encode(), value.strip().encode()))
    target = url.partition("#")[0]
    if not target.startswith("/"):
        parts = urlsplit(target)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"{url!r} is no URL: write http://host/path or /path")
        host = parts.netloc.rpartition("@")[2]
        target = (parts.path or "/") + (f"?{parts.query}" if "?" in target else "")
    path, _, query = target.partition("?")
    # What is not ASCII is sent in UTF-8 and percent-encoded, as browsers do it; the rest stays as it was typed.
    host = re.sub(r":[0-9]*$", "", host)
    return Request(method, host, quote(path, safe=_ASCII), quote(query, safe=_ASCII).encode(), fields)


def _winner(config: Config, route: Route, params: dict[str, str]) -> dict[str, Any]:
    from gateway.policies import PHASES

    chain = sorted(policies_of(config, route), key=lambda each: (PHASES.index(PHASE_OF[each[1]]), each[1] != "cors"))
    return {
        "route": route.name,
        "pattern": pattern(route),
        "params": params,
        "policies": [{"phase": PHASE_OF[kind], "policy": label, "kind": kind} for label, kind in chain],
    }


def _way(config: Config, route: Route, request: Request, client: str | None, source: str | None) -> dict[str, Any]:
    """Return which upstream the request takes and why, or, when only chance decides, what may become of it."""
    from gateway.snapshot.shaping import chooser_of

    facts: dict[str, Any] = {}
    chooser, name = chooser_of(route), route.upstream
    if chooser is not None:
        how, index = chooser.explain(request.headers, client, source)
        if how == "canary":
            name = route.canary[index].upstream
            facts["canary"] = conditions_of(route.canary[index].when)
        elif how == "sticky":
            name = route.splits[index].upstream
            facts["sticky"] = route.sticky
        elif route.split is not None:
            facts["split"] = [
                {"upstream": split.upstream, "weight": split.weight, "targets": targets(config, split.upstream),
                 "protocol": config.upstreams[split.upstream].protocol}
                for split in route.split
            ]
            if route.sticky is not None:
                facts["without"] = route.sticky
    facts["upstream"] = name
    if name is not None:
        facts["targets"] = targets(config, name)
        facts["protocol"] = config.upstreams[name].protocol
    found = {each: decided(config, each, request.headers, client, source) for each in ([name] if name is not None else [split.upstream for split in route.split or ()])}
    facts["mesh"] = {each: said for each, said in found.items() if said is not None}
    if route.mirror is not None:
        facts["mirror"] = {"upstream": route.mirror.upstream, "percent": route.mirror.percent}
    if route.websocket is not None:
        facts["websocket"] = {"idle": route.websocket.idle, "tunnels": route.websocket.tunnels}
    return facts


def _loser(verdict: Verdict, route: Route) -> dict[str, str]:
    return {
        "route": verdict.route,
        "pattern": pattern(route),
        "outcome": verdict.outcome,
        "reason": verdict.detail,
    }


def pattern(route: Route) -> str:
    """Return a route's match in one line: methods, hosts and path."""
    match = route.match
    hosts = "" if tuple(match.host) == ("*",) else " on " + ", ".join(match.host)
    if match.grpc is not None:
        return f"gRPC {match.grpc.service}/{match.grpc.method or '*'}{hosts}"
    where = match.path if match.path is not None else f"prefix {match.prefix}"
    return f"{','.join(match.methods or ()) or 'any method'} {where}{hosts}"


def _show(output: str, answer: dict[str, Any]) -> int:
    if output == "json":
        print(json.dumps(answer, indent=2))
    else:
        print("\n".join(_lines(answer)))
    return ROUTED if "route" in answer else NOT_ROUTED


def _lines(answer: dict[str, Any]) -> list[str]:
    if "route" in answer:
        lines = [f"route     {answer['route']}   ({answer['pattern']})"]
        lines += [f"param     {name} = {value}" for name, value in answer["params"].items()]
        lines += [f"policy    {each['phase']:<10} {_policy(each)}" for each in answer["policies"]]
        lines += _way_lines(answer)
    elif answer["status"] == 400:
        return [f"400 Bad Request: {answer['reason']}"]
    elif answer["status"] == 405:
        lines = [f"405 Method Not Allowed: with this host and path only {', '.join(answer['allow'])}"]
    else:
        lines = ["404 Not Found: no route takes this request"]
    if answer["others"]:
        lines += ["", "why not the others:"]
        width = max(len(each["route"]) for each in answer["others"])
        lines += [f"  {each['route']:<{width}}  {each['outcome']}: {each['reason']}" for each in answer["others"]]
    return lines


def _way_lines(answer: dict[str, Any]) -> list[str]:
    lines = []
    if "canary" in answer:
        lines.append(f"canary    {' and '.join(answer['canary'])}")
    if "sticky" in answer:
        lines.append(f"sticky    by {answer['sticky']}")
    if "without" in answer:
        lines.append(f"sticky    by {answer['without']}, which this request does not say: it is drawn")
    if answer["upstream"] is not None:
        spoken = "" if answer["protocol"] == "http1" else f", {PROTOCOLS[answer['protocol']]}"
        lines.append(f"upstream  {answer['upstream']}   ({', '.join(answer['targets'])}{spoken})")
    else:
        for text, each in zip(share_texts(answer["split"]), answer["split"], strict=True):
            lines.append(f"split     {text}   ({', '.join(each['targets'])})")
    for name, each in answer["mesh"].items():
        lines += explained(name, each)
    if "mirror" in answer:
        lines.append(f"mirror    {answer['mirror']['upstream']}, {answer['mirror']['percent']:g}% of the methods that it copies")
    if "websocket" in answer:
        allowed = answer["websocket"]
        lines.append(f"websocket at most {allowed['tunnels']}, closed after {allowed['idle']:g}s of silence")
    return lines


def _policy(each: dict[str, str]) -> str:
    return each["policy"] if each["policy"] == each["kind"] else f"{each['policy']} ({each['kind']})"
