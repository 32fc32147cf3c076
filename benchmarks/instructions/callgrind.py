"""Reads what callgrind wrote: instructions by function, and nothing else of it.

Strategy: the file's own grammar (valgrind manual, "Callgrind Format Specification"): a cost line belongs to the function
above it, unless a `calls=` line stands before it, which makes it the inclusive cost of a call. Pure functions over text, so
that the figures come from code with unit tests.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

_NAME = re.compile(r"\((\d+)\)(?: (.*))?")


def costs(lines: Iterable[str]) -> dict[tuple[str, str], int]:
    """Return instructions by (object, function), own ones only; raises ValueError for a file that is not callgrind's."""
    names: dict[tuple[str, str], str] = {}
    found: dict[tuple[str, str], int] = defaultdict(int)
    here = ("", "")
    seen = call = False
    for line in lines:
        line = line.rstrip("\n")
        if line.startswith("events:"):
            if line.split()[1] != "Ir":
                raise ValueError("the first event counted is not Ir, instructions read")
            seen = True
        elif line.startswith("ob="):
            here = (_named(names, "ob", line[3:]), here[1])
        elif line.startswith("fn="):
            here = (here[0], _named(names, "fn", line[3:]))
        elif line.startswith(("cob=", "cfn=")):
            _named(names, line[1:3], line[4:])  # only remembered: it may be spelled out here and abbreviated afterwards
        elif line.startswith("calls="):
            call = True
        elif line[:1].isdigit() or line[:1] in ("+", "-", "*"):
            if not call:
                found[here] += int(line.split()[1])
            call = False
    if not seen:
        raise ValueError("no events: line; this is not a file of callgrind")
    return dict(found)


def _named(names: dict[tuple[str, str], str], kind: str, text: str) -> str:
    """Return the name behind `(number) name` or the bare `(number)` of one that was spelled out before."""
    match = _NAME.fullmatch(text)
    if match is None:
        return text
    number, name = match.groups()
    if name is not None:
        names[kind, number] = name
    return names[kind, number]


def readable_name(function: str) -> str:
    """Return engine.Downstream.advance for what Cython called __pyx_f_7gateway_9_speedups_6engine_10Downstream_advance."""
    plain = re.split(r"\.(?:constprop|isra|part|cold)|'\d+$", function)[0]
    match = re.search(r"7gateway_9_speedups_(.+)", plain)
    if not plain.startswith("__pyx_") or match is None:
        return plain
    rest, parts = match.group(1), []
    while (sized := re.match(r"(\d+)(\w+)", rest)) and len(sized.group(2)) >= int(sized.group(1)):
        size = int(sized.group(1))
        parts.append(sized.group(2)[:size])
        rest = sized.group(2)[size:].removeprefix("_")
    return ".".join([*parts, re.sub(r"^\d+(?=[a-z_])", "", rest)] if rest else parts)


def readable_object(path: str) -> str:
    """Return the file's name without what an interpreter's build adds to it."""
    name = PurePosixPath(path).name
    return re.sub(r"\.cpython-[\w-]+\.so$|\.so(\.[\d.]+)?$", "", name) or "?"


def top(found: dict[tuple[str, str], int], requests: int, count: int) -> list[tuple[str, str, float]]:
    """Return the `count` most expensive functions as (function, object, instructions per request)."""
    merged: dict[tuple[str, str], int] = defaultdict(int)
    for (path, function), cost in found.items():
        merged[readable_name(function), readable_object(path)] += cost
    ranked = sorted(merged.items(), key=lambda item: (-item[1], item[0]))
    return [(function, path, cost / requests) for (function, path), cost in ranked[:count]]
