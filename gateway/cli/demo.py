"""`crossway demo`: a small bank behind the gateway, each request and its outcome in a table, then the URLs to try.

Strategy: `gateway.demo` starts everything and plays the story; this module only shows it. The exit status is 0 only if every
request did what it should.
"""

from __future__ import annotations

import argparse
import signal
import statistics
from types import FrameType

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from gateway.demo.stage import Stage, StageError
from gateway.demo.story import Outcome, Story

SUMMARY = (
    "Start a small bank and the gateway in front of it, send requests through, show each; then stay up until Ctrl-C."
)
WIDTH = 130  # columns, where the output is not a terminal


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("demo", help="show a small bank behind the gateway", description=SUMMARY)
    parser.add_argument("--once", action="store_true", help="end after the requests: 0 only if each did what it should")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show the demo; return 0 if every request did what it should, 1 if not, 3 if it could not be started."""
    once: bool = arguments.once
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with console.status("starting a small bank and the gateway in front of it"):
            stage = Stage(once).__enter__()
        with stage:
            outcomes = _play(stage, console)
            good = all(outcome.good for outcome in outcomes)
            if not once:
                _invite(stage, console)
                good = _stay(stage, console) and good
            return 0 if good else 1
    except StageError as error:
        console.print(f"[red]demo:[/] {escape(str(error))}", soft_wrap=True)
        return 3
    except KeyboardInterrupt:
        console.print("\ndemo: ended, everything it started is gone")
        return 130


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _play(stage: Stage, console: Console) -> list[Outcome]:
    with console.status("sending requests") as status:
        outcomes = []
        for outcome in Story(stage).play():
            outcomes.append(outcome)
            status.update(f"sending requests: {outcome.title}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "request", "sent", "status"):
        table.add_column(name, no_wrap=True)
    table.add_column("reason", ratio=1)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("bank\nsaw", justify="right", no_wrap=True)
    for outcome in outcomes:
        mark, colour = ("[green]✓[/]", "green" if outcome.status.startswith("2") else "yellow")
        if not outcome.good:
            mark, colour = "[red]✗[/]", "red"
        reason = escape(outcome.reason)
        if outcome.problem:
            reason = f"[red]{escape(outcome.problem)}[/] {reason}"
        table.add_row(
            mark,
            outcome.title,
            outcome.sent,
            f"[{colour}]{outcome.status}[/]",
            reason,
            f"{outcome.seconds * 1000:.1f}",
            str(outcome.reached or "-"),
        )
    right = sum(outcome.good for outcome in outcomes)
    middle = statistics.median(outcome.seconds for outcome in outcomes) * 1000
    style = "green" if right == len(outcomes) else "red"
    console.print(
        Panel(
            f"[bold {style}]{right} of {len(outcomes)} requests did what they should[/], median {middle:.1f} ms as the client sees it",
            title="Crossway in front of a small bank",
            border_style=style,
            expand=False,
        )
    )
    console.print(table)
    return outcomes


def _invite(stage: Stage, console: Console) -> None:
    gateway, admin = f"http://127.0.0.1:{stage.public}", f"http://127.0.0.1:{stage.admin}"
    token = stage.token("you", ["payments:write", "payments:read"], "ES256")
    console.print(
        f"gateway        {gateway}\n"
        f"status         {admin}/status\n"
        f"metrics        {admin}/metrics\n"
        f"configuration  {stage.file}\n"
        f"audit trail    {stage.folder / 'audit.jsonl'}\n\n"
        "Try it; the token is good for an hour:\n",
        soft_wrap=True,
    )
    print(
        f"curl -i {gateway}/v1/payments -H 'Authorization: Bearer {token}' -H 'Content-Type: application/json' "
        '-d \'{"creditor": "DE02500105170137075030", "amount": "12.50", "currency": "EUR"}\'',
        flush=True,
    )
    console.print("\n[bold]Ctrl-C[/] ends it and removes everything.")


def _stay(stage: Stage, console: Console) -> bool:
    """Wait until Ctrl-C, which raises; return False when a child ends by itself."""
    while not (what := stage.ended(0.5)):
        pass
    console.print(f"[red]demo:[/] {escape(what)}", soft_wrap=True)
    return False
