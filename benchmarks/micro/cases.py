"""The micro benchmarks: what each prepares and times.

Strategy: a case is a name and a function that prepares it and returns pyperf's time function (repetitions in, seconds out).
Parts of the engine are timed in the C loops of _speedups/timing, because the engine calls them from C; the Python libraries
beside them are timed as they are used, by Python calls. A comparison therefore shows what a user pays for either, not which
C code is better.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import h11
import httptools
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from prometheus_client import CollectorRegistry, Histogram

from benchmarks.micro.heads import ANSWER, BROWSER, REQUESTS
from gateway._speedups import timing
from gateway._speedups.balance import ALGORITHMS
from gateway._speedups.exchange import RouteEntry, Snapshot
from gateway._speedups.fleet import Fleet
from gateway._speedups.histogram import SLOT_BYTES, WorkerSlot
from gateway._speedups.journal import Journal
from gateway._speedups.lease_table import LeaseTable
from gateway._speedups.pool import Endpoint, Upstream
from gateway._speedups.route_trie import Route, RouteTrie
from gateway._speedups.token_bucket import BucketTable, RateLimit
from gateway._speedups.token_cache import Principal, TokenCache
from gateway._speedups.upstream_table import UpstreamTable
from gateway.policies.jwt_keys import parse_key_set
from gateway.policies.jwt_settings import JwtSettings
from gateway.policies.jwt_verify import Verifier
from gateway.snapshot.matching import RouteSpec

Timer = Callable[[int], float]
ISSUER, AUDIENCE = "https://auth.bank.test", "payments"
ROUTES = (10, 1_000, 10_000)
RECORD = (
    b'{"time":"2026-01-01T00:00:00.000000Z","seq":184467,"id":"0192f3a4-7c1e-7b53-9d10-4f6a2c8e1b07","client":"corporate-client-7",'
    b'"subject":"corporate-client-7","issuer":"https://auth.bank.test","method":"POST","host":"api.bank.test","path":"/v1/payments",'
    b'"route":"create-payment","upstream":"127.0.0.1:9001","status":200,"outcome":"answered","reason":null,"origin":"127.0.0.1",'
    b'"duration_us":412,"bytes_in":112,"bytes_out":119,"trace":"4bf92f3577b34da6a3ce929d0e0e4736"}\n'
)
BATCH = 2000  # records appended before the journal is flushed outside the clock; they fit its buffer


def timed(call: Callable[[], object]) -> Timer:
    """Time a Python call in a Python loop."""

    def run(loops: int) -> float:
        repeat = range(loops)
        began = time.perf_counter()
        for _ in repeat:
            call()
        return time.perf_counter() - began

    return run


# -- heads


class Fields:
    """What a server built on httptools does at least: keep the target and the fields."""

    def on_message_begin(self) -> None:
        self.target = b""
        self.fields: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))


def head(parser: str, data: bytes) -> Timer:
    """Parse one complete request head."""
    if parser == "crossway":
        return lambda loops: timing.time_request_head(loops, data)
    # A body that is announced must come, or the next head is none.
    size = int(match[1]) if (match := re.search(rb"Content-Length: (\d+)", data)) else 0
    whole = data + b"x" * size
    if parser == "httptools":
        feed = httptools.HttpRequestParser(Fields()).feed_data
        return timed(lambda: feed(whole))

    def by_h11() -> None:
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(data)
        if connection.next_event() is h11.NEED_DATA:
            raise RuntimeError("h11 did not find a whole head")

    return timed(by_h11)


def route_entry() -> tuple[RouteEntry, Snapshot]:
    """Return a plain route to one upstream, and a snapshot that holds it."""
    upstream = Upstream("origin", [Endpoint("127.0.0.1:9001")])
    route = RouteEntry("everything", 0, upstream=upstream, metric=1)
    return route, Snapshot(1, "", {}, {"origin": upstream}, [route])


def serialise(writer: str) -> Timer:
    """Write the head that goes to the upstream, or the answer's to the client."""
    if writer == "h11":
        fields = [(name, value) for name, _, value in (line.partition(b": ") for line in BROWSER.split(b"\r\n")[1:-2])]
        target = BROWSER.split(b" ")[1]
        return timed(lambda: h11.Connection(h11.CLIENT).send(h11.Request(method=b"GET", target=target, headers=fields)))
    route, snapshot = route_entry()
    return lambda loops: timing.time_compose(loops, route, snapshot, BROWSER, ANSWER if writer == "answer" else None)


# -- routes


def routes(kind: str, count: int) -> Timer:
    """Match paths of `count` parameterised routes, each equally often in shuffled order: the worst case for caches."""
    numbers = list(range(count)) if kind == "trie" else random.Random(1).sample(range(count), 10)
    random.Random(2).shuffle(numbers)
    paths = [f"/api/v1/resource{i}/{10**9 + i * 7919}" for i in numbers]
    if kind == "trie":
        specs = [RouteSpec(hosts=(), path=f"/api/v1/resource{i}/{{id}}", methods=("GET",)) for i in range(count)]
        trie = RouteTrie([(Route(f"r{i}", i), spec) for i, spec in enumerate(specs)])
        asked = [path.encode() for path in paths]
        return lambda loops: timing.time_match(loops, trie, BROWSER, asked)
    patterns = [re.compile(f"/api/v1/resource{i}/([^/]+)") for i in range(count)]
    order: Iterator[str] = iter(())

    def find() -> None:
        nonlocal order
        path = next(order, None)
        if path is None:
            order = iter(paths)
            path = next(order)
        for pattern in patterns:
            if pattern.fullmatch(path):
                return
        raise RuntimeError("no pattern matches")

    return timed(find)


# -- endpoints


def choice(algorithm: str, count: int) -> Timer:
    """Choose one of `count` endpoints, and count a request out and the one that went 32 before it in."""
    fleet = Fleet(ALGORITHMS.index(algorithm), [1] * count)
    return lambda loops: timing.time_choose(loops, fleet, 32, True)


# -- policies


def bucket(keys: int) -> Timer:
    """Take a token from the bucket of one of `keys` clients."""
    slots = 65_536
    table = BucketTable(mmap.mmap(-1, BucketTable.size_for(slots)), 0, slots)
    rate = RateLimit("per-client", 1_000_000, 1_000_000, 1_000_000)
    names = [b"client-%d" % i for i in range(keys)]
    clock = 1_000_000

    def run(loops: int) -> float:
        nonlocal clock
        clock += loops
        return timing.time_take(loops, table, rate, names, clock - loops)

    return run


def leased(keys: int) -> Timer:
    """Spend a token that was leased from Redis for one of `keys` clients."""
    slots = 65_536
    table = LeaseTable(mmap.mmap(-1, LeaseTable.size_for(slots)), 0, slots)
    names = [b"client-%d" % i for i in range(keys)]
    return lambda loops: timing.time_leased(loops, table, names, 1_000_000)


def cache_hit(count: int) -> Timer:
    """Find one of `count` verified tokens of 720 bytes."""
    cache = TokenCache(64 << 20)
    source = random.Random(3)
    tokens = [source.randbytes(360).hex().encode() for _ in range(count)]
    for i, token in enumerate(tokens):
        cache.put(token, Principal(f"s{i}", f"c{i}", ISSUER, ("payments:write",), {}, 1 << 40, 1))
    source.shuffle(tokens)
    return lambda loops: timing.time_cached(loops, cache, tokens, 1)


def verification(library: str, algorithm: str) -> Timer:
    """Verify a token that is not in the cache: signature, issuer, audience, times."""
    private: Any
    if algorithm == "RS256":
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        words = RSAAlgorithm.to_jwk(private.public_key(), as_dict=True)
    else:
        private = ec.generate_private_key(ec.SECP256R1())
        words = ECAlgorithm.to_jwk(private.public_key(), as_dict=True)
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "corporate-client-7", "client_id": "corporate-client-7",
              "scope": "payments:read payments:write", "iat": now, "nbf": now, "exp": now + 86400}  # fmt: skip
    token = jwt.encode(claims, private, algorithm=algorithm, headers={"kid": "bench-1"})
    if library == "pyjwt":
        public = private.public_key()
        return timed(lambda: jwt.decode(token, public, algorithms=[algorithm], audience=AUDIENCE, issuer=ISSUER))
    keys = parse_key_set(json.dumps({"keys": [{**words, "kid": "bench-1", "use": "sig", "alg": algorithm}]}).encode(), (algorithm,))
    settings = JwtSettings(issuers=(ISSUER,), audiences=(AUDIENCE,), algorithms=(algorithm,))
    verifier, raw = Verifier(settings, keys), token.encode()
    return timed(lambda: verifier.verify(raw, now))


# -- upstreams


def attempts(what: str, workers: int) -> Timer:
    """Take a place of a limit over `workers` workers, report a success, give the place back; or all a request does."""
    table = UpstreamTable(mmap.mmap(-1, UpstreamTable.size_for(32, 1, 1)), 0, 32, 1, 1)
    seats = [(table.upstream(worker, "origin"), table.endpoint(worker, "origin", "127.0.0.1:9001")) for worker in range(workers)]
    upstream, endpoint = seats[0]
    upstream.set_members([endpoint])
    clock = time.monotonic_ns() // 1000

    def run(loops: int) -> float:
        nonlocal clock
        clock += loops
        if what == "place":
            return timing.time_places(loops, upstream, endpoint, clock - loops)
        return timing.time_attempts(loops, upstream, endpoint, 1024, clock - loops)

    return run


def upstream_path(algorithm: str, count: int) -> Timer:
    """Everything that one request asks of an upstream of `count` endpoints, and tells it."""
    table = UpstreamTable(mmap.mmap(-1, UpstreamTable.size_for(2, 1, count)), 0, 2, 1, count)
    endpoints = [Endpoint(f"127.0.{number // 250}.{number % 250 + 1}:9001") for number in range(count)]
    upstream = Upstream("origin", endpoints, balance=algorithm, table=table, worker=0)
    clock = time.monotonic_ns() // 1000

    def run(loops: int) -> float:
        nonlocal clock
        clock += 20 * loops
        return timing.time_upstream(loops, upstream, clock - 20 * loops)

    return run


# -- records


def observation(kind: str, count: int) -> Timer:
    """Count a finished exchange of one of `count` routes: counters and two histograms."""
    if kind == "crossway":
        slot = WorkerSlot(mmap.mmap(-1, SLOT_BYTES))
        return lambda loops: timing.time_observe(loops, slot, count)
    histogram = Histogram("seconds", "", ["route", "method", "status"], registry=CollectorRegistry())
    return timed(lambda: histogram.labels("everything", "GET", "200").observe(0.000412))


def record(kind: str) -> Timer:
    """Hand over an audit record of 500 bytes."""
    file = tempfile.NamedTemporaryFile(prefix="crossway-micro-")  # noqa: SIM115 - lives as long as the process
    if kind == "write":
        return timed(lambda: os.write(file.fileno(), RECORD))
    journal = Journal(file.name)

    def run(loops: int) -> float:
        spent = 0.0
        for at in range(0, loops, BATCH):
            spent += timing.time_append(min(BATCH, loops - at), journal, RECORD)
            if not journal.flush():
                raise RuntimeError("the journal's file takes no records")
            os.ftruncate(file.fileno(), 0)
        return spent

    return run


# Group -> name of the case -> what prepares it. The first of a group is what the others are divided by.
GROUPS: dict[str, dict[str, Callable[[], Timer]]] = {
    **{
        f"parse a head, {size} ({len(data)} bytes)": {
            "Crossway": partial(head, "crossway", data),
            "httptools": partial(head, "httptools", data),
            "h11": partial(head, "h11", data),
        }
        for size, data in REQUESTS.items()
    },
    "write a head, browser": {"Crossway": partial(serialise, "request"), "h11": partial(serialise, "h11")},
    "write an answer's head": {"Crossway": partial(serialise, "answer")},
    **{
        f"match {count:,} routes": {"trie": partial(routes, "trie", count), "list of regular expressions": partial(routes, "regex", count)}
        for count in ROUTES
    },
    **{
        f"choose one of {count} endpoints": {algorithm: partial(choice, algorithm, count) for algorithm in ALGORITHMS}
        for count in (10, 100)
    },
    "an upstream's whole part of a request": {
        "p2c_ewma, 1 endpoint": partial(upstream_path, "p2c_ewma", 1),
        "p2c_ewma, 10 endpoints": partial(upstream_path, "p2c_ewma", 10),
        "round_robin, 10 endpoints": partial(upstream_path, "round_robin", 10),
    },
    "rate limit, one token": {"1 client": partial(bucket, 1), "10,000 clients": partial(bucket, 10_000)},
    "rate limit, one leased token": {"1 client": partial(leased, 1), "10,000 clients": partial(leased, 10_000)},
    "token in the cache": {"1 token": partial(cache_hit, 1), "10,000 tokens": partial(cache_hit, 10_000)},
    **{
        f"token not in the cache, {algorithm}": {
            "Crossway": partial(verification, "crossway", algorithm),
            "PyJWT": partial(verification, "pyjwt", algorithm),
        }
        for algorithm in ("RS256", "ES256")
    },
    "count an exchange": {
        "Crossway, 1 route": partial(observation, "crossway", 1),
        "Crossway, 100 routes": partial(observation, "crossway", 100),
        "prometheus_client, one histogram": partial(observation, "prometheus_client", 1),
    },
    "a request at an endpoint": {
        "place and success, 2 workers": partial(attempts, "place", 2),
        "place and success, 32 workers": partial(attempts, "place", 32),
        "all of it, 2 workers": partial(attempts, "all", 2),
    },
    "audit record": {"journal": partial(record, "journal"), "a write() for each": partial(record, "write")},
    "an empty C loop": {"what each C loop adds": lambda: timing.time_nothing},
}
CASES = {f"{group}: {name}": prepare for group, cases in GROUPS.items() for name, prepare in cases.items()}
