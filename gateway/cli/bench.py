"""`crossway bench run | compare | sweep`: measure an HTTP service, judge two measurements, choose the number of workers.

Strategy: words become one settings object, the packages below do the work, and this module only shows it. Exit codes: 0 a valid
run, or all rules hold; 1 a rule fails, or nothing could be measured; 2 the words are wrong; 3 the run is invalid, or the
machine too small to tell. Files are written whatever the verdict.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.cli import Subparsers

if TYPE_CHECKING:
    from rich.console import Console

    from gateway.bench.settings import Settings

GOOD, FAILED, WRONG, INVALID = 0, 1, 2, 3
WIDTH = 130  # columns, where the output is not a terminal


def register(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("bench", help="measure an HTTP service, compare two measurements, choose the workers")
    commands = parser.add_subparsers(metavar="WHAT", required=True)
    _register_run(commands)
    _register_compare(commands)
    _register_sweep(commands)


def _register_run(commands: Subparsers) -> None:
    parser = commands.add_parser("run", help="send requests at a constant rate and report latencies", epilog=__doc__)
    parser.add_argument("url", metavar="URL", help="http://HOST:PORT/PATH, or https://")
    parser.add_argument("--rate", required=True, help="requests a second; `max`: closed loop, as fast as answers come")
    _request_arguments(parser)
    parser.add_argument("--cpu", type=int, metavar="N", help="run on this processor only")
    parser.add_argument("--pid", type=int, metavar="PID", help="the server's process, to report its CPU time (and children's)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="everything, for programs and `compare`")
    parser.add_argument("--hgrm", metavar="FILE", type=Path, help="latencies in HdrHistogram's percentile format")
    parser.add_argument("--html", metavar="FILE", type=Path, help="a page with a plot, in one file")
    parser.add_argument("--png", metavar="FILE", type=Path, help="the plot alone; needs matplotlib")
    parser.add_argument("--quiet", action="store_true", help="no progress line")
    parser.set_defaults(run=_guarded(run))


def _register_compare(commands: Subparsers) -> None:
    parser = commands.add_parser("compare", help="two results beside each other; exit 1 when a rule fails")
    parser.add_argument("a", metavar="A.json", type=Path)
    parser.add_argument("b", metavar="B.json", type=Path)
    parser.add_argument("--fail-if", metavar="RULE", action="append", default=[], help="such as 'p99>+5%%' or 'p99>5ms'")
    parser.set_defaults(run=_guarded(compare))


def _register_sweep(commands: Subparsers) -> None:
    parser = commands.add_parser("sweep", help="find the number of workers for a configuration")
    parser.add_argument("path", metavar="PATH", help="the path to request, such as /v1/accounts")
    parser.add_argument("-c", "--config", metavar="FILE", type=Path, required=True, help="the gateway's configuration")
    parser.add_argument("--workers", default="1,2", metavar="N,N", help="default: 1,2")
    parser.add_argument("--slo", required=True, metavar="PXX=TIME", help="such as p99=5ms")
    parser.add_argument("--rates", metavar="N,N", help="measure these rates instead of bisecting")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="runs of a bisection; default: 6")
    parser.add_argument("--listener", metavar="NAME", help="which one, when there are several")
    parser.add_argument("--https", action="store_true", help="the listener speaks TLS")
    parser.add_argument("--no-pin", action="store_true", help="do not keep gateway and generator on processors of their own")
    _request_arguments(parser)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--html", metavar="FILE", type=Path)
    parser.add_argument("--quiet", action="store_true", help="no progress line")
    parser.set_defaults(run=_guarded(sweep))


def _request_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--connections", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--duration", default="10s", metavar="TIME", help="measured; default: 10s")
    parser.add_argument("--warmup", default="2s", metavar="TIME", help="before it, not measured; default: 2s")
    parser.add_argument("-X", "--method", default=None, help="default: GET, with --body POST")
    parser.add_argument("-H", "--header", action="append", default=[], metavar="'Name: value'")
    parser.add_argument("--body", metavar="FILE", type=Path, help="sent with every request")
    parser.add_argument("--poisson", action="store_true", help="arrivals of independent clients instead of even ones")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of --poisson; default: 1")
    parser.add_argument("--accept", default="2xx,3xx", metavar="STATUS", help="what is no error; default: 2xx,3xx")
    parser.add_argument("--timeout", default="10s", metavar="TIME", help="of a request; default: 10s")
    parser.add_argument("--no-keepalive", action="store_true", help="a new connection for each request")
    parser.add_argument("--cacert", metavar="FILE", type=Path, help="https: who may have issued the server's certificate; default: the machine's")
    parser.add_argument("--cert", metavar="FILE", type=Path, help="https: our own certificate, for servers that ask for one")
    parser.add_argument("--key", metavar="FILE", type=Path, help="https: its key; default: in the file of --cert")
    parser.add_argument("--server-name", metavar="NAME", help="https: asked for (SNI) and verified; default: the URL's host")
    parser.add_argument("--insecure", action="store_true", help="https: do not verify the server's certificate")
    parser.add_argument("--resume", action="store_true", help="https: a connection goes on with the session of the one that it replaces")
    parser.add_argument("--max-errors", default="0", metavar="N|N%", help="more make the run invalid; default: 0")


def _guarded(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def guarded(parsed: argparse.Namespace) -> int:
        from gateway.bench.gateway_process import GatewayError
        from gateway.bench.runner import CannotConnect
        from gateway.bench.settings import UsageError

        try:
            return command(parsed)
        except UsageError as error:
            print(f"crossway bench: {error}", file=sys.stderr)
            return WRONG
        except (CannotConnect, GatewayError, OSError) as error:
            print(f"crossway bench: {error}", file=sys.stderr)
            return FAILED

    return guarded


def _settings(parsed: argparse.Namespace, url: str, rate: float | None) -> Settings:
    from gateway.bench.settings import Allowance, Settings, TlsOptions, UsageError, seconds

    headers = []
    for line in parsed.header:
        name, colon, value = line.partition(":")
        if not colon:
            raise UsageError(f"-H {line!r} is not 'Name: value'")
        headers.append((name.strip(), value.strip()))
    try:
        body = parsed.body.read_bytes() if parsed.body else b""
    except OSError as error:
        raise UsageError(f"--body {parsed.body}: {error.strerror}") from None
    return Settings(
        url=url,
        rate=rate,
        connections=parsed.connections,
        duration=seconds(parsed.duration),
        warmup=seconds(parsed.warmup),
        method=parsed.method or ("POST" if parsed.body else "GET"),
        headers=tuple(headers),
        body=body,
        poisson=parsed.poisson,
        seed=parsed.seed,
        accepted=parsed.accept,
        timeout=seconds(parsed.timeout),
        keep_alive=not parsed.no_keepalive,
        max_errors=Allowance.read(parsed.max_errors),
        tls=TlsOptions(
            cacert=parsed.cacert,
            cert=parsed.cert,
            key=parsed.key,
            server_name=parsed.server_name,
            insecure=parsed.insecure,
            resume=parsed.resume,
        ),
    )


def _number(text: str, what: str) -> float:
    from gateway.bench.settings import UsageError

    try:
        number = float(text.replace("_", ""))
    except ValueError:
        raise UsageError(f"{what} {text!r} is not a number") from None
    if not 0 < number <= 1e7:
        raise UsageError(f"{what} {text!r} must be above 0 and at most 10,000,000")
    return number


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None] | None]:
    """One line on stderr, written over itself; nothing where stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return

    def show(text: str) -> None:
        sys.stderr.write(f"\r\x1b[K{text[:os.get_terminal_size(sys.stderr.fileno()).columns - 1]}")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def run(parsed: argparse.Namespace) -> int:
    """`crossway bench run`."""
    from gateway.bench import formats, pages, runner
    from gateway.bench.settings import UsageError

    settings = _settings(parsed, parsed.url, None if parsed.rate == "max" else _number(parsed.rate, "--rate"))
    settings.check()
    if parsed.png:
        pages.import_pyplot()
    if parsed.pid is not None and not Path(f"/proc/{parsed.pid}").is_dir():
        raise UsageError(f"--pid {parsed.pid}: there is no such process")
    if parsed.cpu is not None:
        if parsed.cpu not in os.sched_getaffinity(0):
            raise UsageError(f"--cpu {parsed.cpu} is none of {sorted(os.sched_getaffinity(0))}")
        os.sched_setaffinity(0, {parsed.cpu})
    with _progress(parsed.quiet) as show:
        document = runner.run(settings, show, watch=parsed.pid)
    formats.show(document, _console())
    if parsed.json:
        formats.write_json(document, parsed.json)
    if parsed.hgrm:
        parsed.hgrm.write_text(formats.hgrm(document["latency"]), "utf-8")
    if parsed.html:
        parsed.html.write_text(pages.html(document), "utf-8")
    if parsed.png:
        pages.write_png(document, parsed.png)
    return GOOD if document["valid"] else INVALID


def compare(parsed: argparse.Namespace) -> int:
    """`crossway bench compare`."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from gateway.bench.compare import Rule, differences, rows
    from gateway.bench.formats import banner, label, read_json

    rules = [Rule.read(text) for text in parsed.fail_if]
    a, b = read_json(parsed.a), read_json(parsed.b)
    console = _console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for path, document in ((parsed.a, a), (parsed.b, b)):
        table.add_column(f"{escape(path.name)}\n{escape(label(document))}", justify="right")
    table.add_column("change", justify="right")
    for row in rows(a, b):
        table.add_row(*row)
    console.print(table)
    for difference in differences(a, b):
        console.print(f"[yellow]note:[/] {escape(difference)}", soft_wrap=True)
    failed = False
    for path, document in ((parsed.a, a), (parsed.b, b)):
        if (loud := banner(document)) is not None:
            console.print(f"{escape(str(path))}:", loud)
            failed = failed or bool(rules)
    for rule in rules:
        bad, why = rule.verdict(a, b)
        failed = failed or bad
        console.print(f"{'[red]FAIL[/]' if bad else '[green]ok[/]'}  {escape(rule.text)}: {escape(why)}", soft_wrap=True)
    return FAILED if failed else GOOD


def sweep(parsed: argparse.Namespace) -> int:
    """`crossway bench sweep`."""
    from gateway.bench import formats, sweep_report
    from gateway.bench.settings import UsageError
    from gateway.bench.sweep import Objective, Plan
    from gateway.bench.sweep import sweep as measure

    words = parsed.workers.split(",")
    if not all(word.isascii() and word.isdecimal() and 1 <= int(word) <= 1024 for word in words):
        raise UsageError(f"--workers {parsed.workers!r} is not a list such as 1,2,4")
    if not 1 <= parsed.steps <= 20:
        raise UsageError("--steps must be from 1 to 20")
    if not parsed.config.is_file():
        raise UsageError(f"{parsed.config}: there is no such file")
    plan = Plan(
        config=parsed.config,
        workers=tuple(sorted({int(word) for word in words})),
        objective=Objective.read(parsed.slo),
        settings=_settings(parsed, parsed.path, 1.0),
        path=parsed.path,
        listener=parsed.listener,
        rates=tuple(_number(word, "--rates") for word in parsed.rates.split(",")) if parsed.rates else (),
        steps=parsed.steps,
        pin=not parsed.no_pin,
        scheme="https" if parsed.https else "http",
    )
    with _progress(parsed.quiet) as show:
        counts, document = measure(plan, show)
    sweep_report.show(document, _console())
    if parsed.json:
        formats.write_json(document, parsed.json)
    if parsed.html:
        parsed.html.write_text(sweep_report.html(document), "utf-8")
    if not document["conclusive"]:
        return INVALID
    return GOOD if any(count.best for count in counts) else FAILED
