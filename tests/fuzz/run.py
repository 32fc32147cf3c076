"""A small mutating fuzzer for the targets; `script/fuzz` runs it under AddressSanitizer and UBSan.

Strategy: no instrumentation, so novelty is judged by the target's own signature (which rule refused, what was read). Inputs
that show something new are kept and mutated further. The input under test is on disk before the target sees it, so that a
crash leaves it behind.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.targets import DICTIONARY, SEEDS, TARGETS, Signature

FINDINGS = Path(__file__).resolve().parents[2] / "build" / "fuzz"
LONGEST = 4096  # bytes of an input


def mutate(data: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    """Return the input with one to five small changes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        at = rng.randint(0, len(out))
        kind = rng.randrange(7)
        if kind == 0:
            out[at:at] = rng.choice(DICTIONARY)
        elif kind == 1 and out:
            out[at - 1] = rng.randrange(256)
        elif kind == 2:
            del out[at : at + rng.randint(1, 8)]
        elif kind == 3:
            piece = out[at : at + rng.randint(1, 40)]
            out[at:at] = piece * rng.choice([1, 1, 2, 30])
        elif kind == 4:
            other = rng.choice(corpus)
            out[at:] = other[rng.randint(0, len(other)) :]
        elif kind == 5 and out:
            out[at - 1] ^= 1 << rng.randrange(8)
        else:
            out[at : at + len(DICTIONARY[0])] = rng.choice(DICTIONARY)
    return bytes(out[:LONGEST])


def fuzz(name: str, target: Callable[[bytes], Signature], *, seconds: float, runs: int, seed: int) -> bytes | None:
    """Run one target until time or runs are used up; returns the input that failed, None when all held."""
    rng = random.Random(seed)
    corpus = list(SEEDS[name])
    seen: set[Signature] = set()
    FINDINGS.mkdir(parents=True, exist_ok=True)
    current = FINDINGS / f"{name}.current"
    deadline = time.monotonic() + seconds
    done = 0
    with current.open("r+b" if current.exists() else "w+b", buffering=0) as file:
        for data in itertools.chain(SEEDS[name], iter(lambda: mutate(rng.choice(corpus), corpus, rng), None)):
            file.seek(0)
            file.write(data)
            file.truncate()
            try:
                signature = target(data)
            except Exception:  # noqa: BLE001 - whatever a target raises is a finding
                traceback.print_exc()
                return data
            if signature not in seen:
                seen.add(signature)
                corpus.append(data)
            done += 1
            if done >= runs or (done % 64 == 0 and time.monotonic() >= deadline):
                break
    current.unlink()
    print(f"{name}: {done} runs, {len(seen)} signatures, {len(corpus)} inputs kept, seed {seed}: nothing found", flush=True)
    return None


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 1 after a finding."""
    parser = argparse.ArgumentParser(prog="script/fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--runs", type=int, default=1 << 60, help="at most, for each target")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers; 0: from the clock")
    options = parser.parse_args(arguments)
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    seed = options.seed or time.time_ns() & 0xFFFFFFFF
    for name in options.targets or TARGETS:
        found = fuzz(name, TARGETS[name], seconds=options.seconds, runs=options.runs, seed=seed)
        if found is not None:
            path = FINDINGS / f"{name}.finding"
            path.write_bytes(found)
            print(f"{name}: finding in {path}, seed {seed}:\n    {found!r}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
