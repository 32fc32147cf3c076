"""Nanoseconds per route match for 10, 1,000 and 10,000 parameterised routes, and their ratio.

Strategy: every route is asked for equally often and in shuffled order, the worst case for caches and branch prediction;
sizes are interleaved, so that a noisy machine disturbs all alike; the minimum of many rounds counts. The loop around
match() is C. Run from the root of a built tree: python benchmarks/micro/bench_route_trie.py
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gateway._speedups.route_trie import Route, RouteTrie
from gateway.snapshot.matching import RouteSpec

SIZES = (10, 1_000, 10_000)
PER_ROUND = 10_000
ROUNDS = 40
HOST = "api.bank.test"

# Number of a route -> (its template, a path for it).
SHAPES: dict[str, Callable[[int], tuple[str, str]]] = {
    "/api/v1/resource{i}/{id}": lambda i: (f"/api/v1/resource{i}/{{id}}", f"/api/v1/resource{i}/{10**9 + i * 7919}"),
    "/v1/{tenant}/svc{i}/items/{id}": lambda i: (
        f"/v1/{{tenant}}/svc{i}/items/{{id}}",
        f"/v1/t{i}/svc{i}/items/{i * 31}",
    ),
    "/a/b/c/d/{x}/{y}, 10 each": lambda i: (
        "".join(f"/s{i // 10**k % 10}" for k in range(4)) + "/{a}/{b}",
        "".join(f"/s{i // 10**k % 10}" for k in range(4)) + f"/q{i}/77",
    ),
}


def main() -> None:
    """Print one line per shape, without and with a host pattern."""
    print(f"{'routes':<40}" + "".join(f"{size:>10,}" for size in SIZES) + f"{'ratio':>8}")
    for name, shape in SHAPES.items():
        for hosts in ((), (HOST,)):
            tries, paths = {}, {}
            for size in SIZES:
                specs = [RouteSpec(hosts=hosts, path=shape(i)[0], methods=("GET",)) for i in range(size)]
                tries[size] = RouteTrie([(Route(f"r{i}", i), spec) for i, spec in enumerate(specs)])
                asked = [shape(i % size)[1] for i in range(PER_ROUND)]
                random.Random(size).shuffle(asked)
                paths[size] = asked
            best = dict.fromkeys(SIZES, float("inf"))
            for _ in range(ROUNDS):
                for size in SIZES:
                    best[size] = min(best[size], tries[size]._time_match("GET", HOST, paths[size], 3))
            label = f"{name}{' + host' if hosts else ''}"
            figures = "".join(f"{best[size]:>7.1f} ns" for size in SIZES)
            print(f"{label:<40}{figures}{best[SIZES[-1]] / best[SIZES[0]]:>8.2f}")


if __name__ == "__main__":
    main()
