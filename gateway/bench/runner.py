"""One run: connect, warm up, measure, wait for the last answers, and judge whether the figures may be believed.

Strategy: the compiled generator works in slices of a quarter of a second; between two slices Python shows a line and lets
signals in. CPU time is read at the two ends of the measured window. Everything a reader needs goes into one document, the
reasons why it must not be believed first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import gateway
from gateway._speedups.load import Load, monotonic_ns
from gateway.bench.client_tls import client_tls
from gateway.bench.machine import cpu_seconds, machine
from gateway.bench.percentiles import summary
from gateway.bench.settings import Settings, statuses

SCHEMA, VERSION = "crossway-bench-run", 1
SLICE = 250_000_000  # ns
ENOUGH_RATE = 0.99  # of what was scheduled
MOST_CPU = 0.80  # of a core
LATE_WARNING = 0.1  # seconds
PATIENCE = 5.0  # seconds for opening the connections
SLOW_HANDSHAKES = 100  # a second: less is not waited for
# Words in a failed handshake's reason, and what to do.
HINTS = (
    ("issuer certificate", " (--cacert FILE names who may have issued the server's certificate)"),
    ("self-signed", " (--cacert FILE names who may have issued the server's certificate)"),
    ("mismatch", " (the certificate is for another name; --server-name NAME asks for that one)"),
    ("wrong version number", " (does the server speak TLS on this port?)"),
    ("complete the handshake", " (does the server speak TLS on this port?)"),
    ("left right after", " (does it ask for a client's certificate? --cert FILE and --key FILE show one)"),
    ("certificate required", " (--cert FILE and --key FILE show one)"),
)

Document = dict[str, Any]
Show = Callable[[str], None]


class CannotConnect(Exception):
    """Nothing could be measured; the text says what is not reachable."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The measured window as the generator lived it: both in seconds."""

    cpu: float
    wall: float
    server: float | None  # of the watched processes


def run(
    settings: Settings, show: Show | None = None, measured: Callable[[], None] | None = None, watch: int | None = None
) -> Document:
    """Run and return the document. `measured` is called at the end of the window, while the connections are open;
    `watch` is the process whose CPU time, with that of everything below it, is the server's.

    Raises UsageError for impossible settings, CannotConnect when the server is not there.
    """
    settings.check()
    before = machine()
    load = _connected(settings)
    start, end = load.start(int(settings.warmup * 1e9), int(settings.duration * 1e9))
    began = datetime.now(UTC)
    _work(load, start, settings, start, show)
    served = None if watch is None else cpu_seconds(watch)
    cpu, wall = time.process_time(), monotonic_ns()
    _work(load, end, settings, start, show)
    cpu, wall = time.process_time() - cpu, monotonic_ns() - wall
    usage = Usage(cpu, wall / 1e9, None if watch is None or served is None else cpu_seconds(watch) - served)
    if measured is not None:
        measured()
    # A request may wait in the backlog first and then take its whole time.
    give_up = end + int(settings.timeout * 1e9) + SLICE
    done = False
    while not done and monotonic_ns() < give_up:
        done = _work(load, min(monotonic_ns() + SLICE, give_up), settings, start, show)
    load.abandon()
    load.close()
    document = _document(settings, load, usage)
    return {**document, "date": began.isoformat(timespec="seconds"), "machine": before}


def _connected(settings: Settings) -> Load:
    try:
        host, port = settings.resolve()
    except OSError as error:
        raise CannotConnect(f"{settings.url}: the name cannot be resolved: {error.strerror or error}") from None
    secure = settings.https
    load = Load(
        host,
        port,
        settings.request(),
        connections=settings.connections,
        rate=settings.rate or 0.0,
        poisson=settings.poisson,
        seed=settings.seed,
        accepted=statuses(settings.accepted),
        timeout=int(settings.timeout * 1e9),
        no_body=settings.method == "HEAD",
        keep_alive=settings.keep_alive,
        tls=client_tls(settings.tls) if secure else None,
        server_name=settings.address()[0],
        resume=settings.tls.resume,
    )
    # Handshakes cost the server milliseconds where a plain connection costs it nothing.
    if load.connect(PATIENCE + (settings.connections / SLOW_HANDSHAKES if secure else 0)) == 0 and settings.keep_alive:
        failed = load.tls_counts()
        if failed is None or not failed["failures"]:
            raise CannotConnect(f"{settings.url}: no connection to {host} port {port} could be opened")
        raise CannotConnect(f"{settings.url}: the TLS handshake with {host} port {port} failed: {_why(failed['failures'])}")
    return load


def _why(failures: dict[str, int]) -> str:
    """Why handshakes failed, the most frequent reason first, and what helps."""
    said = sorted(failures, key=lambda reason: -failures[reason])
    hint = next((hint for reason in said for word, hint in HINTS if word in reason), "")
    return "; ".join(said) + hint


def _work(load: Load, until: int, settings: Settings, start: int, show: Show | None) -> bool:
    """Work until a time; return True when nothing is left to do."""
    while True:
        now = monotonic_ns()
        if load.run(min(now + SLICE, until)):
            return True
        if show is not None:
            show(_line(load, settings, start))
        if monotonic_ns() >= until:
            return False


def _line(load: Load, settings: Settings, start: int) -> str:
    """The live line. Cheap: it is made while requests are due."""
    counted = load.counters()
    second = (monotonic_ns() - start) / 1e9
    phase = "warming up" if second < 0 else f"{second:.0f} of {settings.duration:g} s"
    rate = counted["in_window"] / min(second, settings.duration) if second > 0.2 else 0.0
    errors = sum(load.error_counts().values())
    p99 = f"  p99 {load.latency.value_at(0.99) / 1e6:.2f} ms" if load.latency.count >= 1000 else ""
    return (
        f"{phase}  {rate:,.0f}/s  in flight {counted['in_flight']}  waiting {counted['backlog']}  errors {errors}{p99}"
    )


def _document(settings: Settings, load: Load, usage: Usage) -> Document:
    counted, errors = load.counters(), load.error_counts()
    failed = sum(errors.values())
    offered, answered = counted["measured"], counted["in_window"]
    share = answered / offered if offered else 0.0
    core = usage.cpu / usage.wall
    closed = settings.rate is None
    tls = load.tls_counts()
    reasons, warnings = judge(settings, offered, share, core, failed), list[str]()
    if tls is not None and tls["failures"]:
        # Where they make the run invalid, they are a reason.
        (reasons or warnings).append(f"TLS handshakes failed: {_why(tls['failures'])}")
    if settings.https and settings.tls.insecure:
        warnings.append("--insecure: the server's certificate was not verified, so it may be anyone's who answered")
    if counted["late_max"] > LATE_WARNING * 1e9 and not closed:
        warnings.append(
            f"the generator itself was up to {counted['late_max'] / 1e6:.0f} ms late: something else used its core"
        )
    if settings.warmup == 0:
        warnings.append("no warm-up: the first requests pay for connections and cold caches")
    if closed:
        warnings.append(
            "closed loop: a request waits for the answer before it, so a stall hides the requests that would have met it; "
            "these percentiles are not what clients see"
        )
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "crossway": gateway.__version__,
        "valid": not reasons,
        "reasons": reasons,
        "warnings": warnings,
        "loop": "closed" if closed else "open",
        "config": settings.described(),
        "result": {
            "requests": offered,
            "answered": load.latency.count,
            "achieved_rate": answered / settings.duration,
            "achieved_share": None if closed else share,
            "errors": errors,
            "errors_total": failed,
            "errors_share": failed / offered if offered else 0.0,
            "warmup_errors": load.error_counts(warmup=True),
            "statuses": {str(status): number for status, number in load.status_counts().items()},
            "backlog_max": counted["backlog_max"],
            "reconnects": counted["opened"],
            "refused_reconnects": counted["refused"],
            "closed_while_idle": counted["idle_closed"],
            "received_bytes": counted["received_bytes"],
            "tls": tls,
            "server_us_per_request": None if usage.server is None else usage.server / max(answered, 1) * 1e6,
            "generator": {
                "cpu_s": usage.cpu,
                "core_share": core,
                "us_per_request": usage.cpu / max(answered, 1) * 1e6,
                "late_max_ms": None if closed else counted["late_max"] / 1e6,
            },
        },
        "latency": summary(load.latency),
        "service": summary(load.service),
        "handshake": None if tls is None else summary(load.handshake),
    }


def judge(settings: Settings, offered: int, share: float, core: float, failed: int) -> list[str]:
    """Return the reasons why a run is not valid; none when it is."""
    reasons = []
    if offered == 0:
        reasons.append("no request was sent in the measured window")
    elif settings.rate is not None and share < ENOUGH_RATE:
        reasons.append(
            f"{share:.1%} of the scheduled requests were answered inside the window, {ENOUGH_RATE:.0%} is needed: "
            f"{settings.rate:,.0f}/s is more than the server, or {settings.connections} connections, can carry"
        )
    if core > MOST_CPU:
        reasons.append(
            f"the generator used {core:.0%} of its core, {MOST_CPU:.0%} is the most: it may be what was measured"
        )
    if settings.max_errors.exceeded(failed, offered):
        reasons.append(f"{failed:,} of {offered:,} requests failed, --max-errors is {settings.max_errors}")
    return reasons
