"""`crossway demo`: a small bank from its edge to its ledger, step by step with a verdict each, then what to try.

Strategy: `gateway.demo` starts everything and does it; this module says in which order, and shows it. The exit status is 0 only if
everything did what it should.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.markup import escape

if TYPE_CHECKING:
    from gateway.demo.chapters import Finding
    from gateway.demo.load import Load
    from gateway.demo.stage import Stage

SUMMARY = (
    "Start a small bank, services with sidecars behind an edge, and show what the mesh does with requests, denials, deaths and "
    "renewals; then stay up until Ctrl-C."
)
WIDTH = 100  # columns, where the output is not a terminal and nothing says otherwise
STAYING = 0.5  # seconds between two looks whether all still run


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("demo", help="show a small bank, from its edge to its ledger", description=SUMMARY)
    parser.add_argument("--once", action="store_true", help="end after the last step: 0 only if each did what it should")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show the demo; return 0 if every step did what it should, 1 if not, 3 if it could not be started."""
    from gateway.demo.processes import StageError
    from gateway.demo.stage import Stage

    once: bool = arguments.once
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without these signs still shows the words
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=WIDTH)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with Stage(once) as stage:
            _raise(stage, console)
            good = Play(stage, console).all()
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


def _raise(stage: Stage, console: Console) -> None:
    """Start everything, showing what is up."""
    from gateway.demo import show

    ready: list[str] = []
    if not console.is_terminal:
        stage.start(ready.append)
        console.print(show.picture(ready))
        return
    with Live(show.picture(ready), console=console, refresh_per_second=8) as live:

        def up(name: str) -> None:
            ready.append(name)
            live.update(show.picture(ready))

        stage.start(up)


class Play:
    """The steps in their order, each shown as it ends."""

    def __init__(self, stage: Stage, console: Console) -> None:
        self._stage, self._console = stage, console
        self._right = self._total = self._chapter = 0
        self._began = time.monotonic()

    def all(self) -> bool:
        """Play everything; return whether each step did what it should."""
        from gateway.demo import chapters, show
        from gateway.demo.load import Load

        self._edge()
        self._payment()
        self._findings("A call that no rule allows", chapters.denied(self._stage))
        before = chapters.serials(self._stage)
        with Load(self._stage) as load:
            self._findings("A ledger dies, while payments go on", chapters.killed(self._stage, load), load)
            self._findings("A canary gets a tenth", chapters.canary(self._stage, load), load)
            self._findings("Certificates renewed, while payments go on", chapters.renewed(self._stage, load, before), load)
        self._findings("The books", chapters.books(self._stage, load))
        self._console.print()
        self._console.print(show.verdict(self._right, self._total, time.monotonic() - self._began))
        return self._right == self._total

    def _heading(self, title: str) -> None:
        from gateway.demo import show

        self._chapter += 1
        self._console.print(show.heading(self._chapter, title))

    def _count(self, good: bool) -> None:
        self._total += 1
        self._right += good

    def _edge(self) -> None:
        from gateway.demo import show
        from gateway.demo.story import Story

        self._heading("The edge: who and what gets in")
        outcomes = []
        with self._console.status("sending requests") as status:
            for outcome in Story(self._stage).play():
                outcomes.append(outcome)
                self._count(outcome.good)
                status.update(f"sending requests: {outcome.title}")
        self._console.print(show.requests(outcomes, self._console.width))

    def _payment(self) -> None:
        from gateway.demo import show
        from gateway.demo.journey import follow

        self._heading("A payment through every hop")
        with self._console.status("following a payment"):
            found = follow(self._stage)
        self._count(not found.problem)
        self._console.print(show.journey(found, self._console.width))

    def _findings(self, title: str, chapter: Iterator[Finding], load: Load | None = None) -> None:
        from gateway.demo import chapters, show

        self._heading(title)
        told: Callable[[], str] = (lambda: f"payments: {load.since()}") if load else (lambda: "asking")
        with self._console.status(told()) as status:
            self._stage.watch_waiting = lambda: status.update(told())
            for found in chapters.guarded(chapter):
                self._count(not found.problem)
                self._console.print(show.finding(found, self._console.width))
            self._stage.watch_waiting = lambda: None


def _invite(stage: Stage, console: Console) -> None:
    gateway, admin = f"http://127.0.0.1:{stage.public}", f"http://127.0.0.1:{stage.admin}"
    token = stage.token("you", ["payments:write", "payments:read"], "ES256")
    console.print(
        f"\nedge           {gateway}\n"
        f"status         {admin}/status\n"
        f"metrics        {admin}/metrics\n"
        f"sidecar        http://127.0.0.1:{stage.members['payments'].admin}/metrics (of payments)\n"
        f"configuration  {stage.file}\n"
        f"mesh           {stage.registry.file}\n"
        f"audit trail    {stage.folder / 'audit.jsonl'}\n"
        f"logs           {stage.folder}/*.log\n\n"
        "Try it; the token is good for an hour:\n",
        soft_wrap=True,
    )
    print(
        f"curl -i {gateway}/v1/payments -H 'Authorization: Bearer {token}' -H 'Content-Type: application/json' "
        '-d \'{"creditor": "DE02500105170137075030", "amount": "12.50", "currency": "EUR"}\'\n',
        flush=True,
    )
    for words in ("status", "can payments ledger POST /entries", "revoke accounts"):
        print(f"{_command()} mesh {words} -c {stage.registry.file}", flush=True)
    console.print("\n[bold]Ctrl-C[/] ends it and removes everything.")


def _command() -> str:
    """How the command is called here: as installed beside this Python, said from this folder if that is shorter."""
    installed = Path(sys.executable).with_name("crossway")
    if not installed.exists():
        return "crossway"
    return str(installed.relative_to(Path.cwd()) if installed.is_relative_to(Path.cwd()) else installed)


def _stay(stage: Stage, console: Console) -> bool:
    """Wait until Ctrl-C, which raises; return False when a child ends by itself."""
    while not (what := stage.ended()):
        time.sleep(STAYING)
    console.print(f"[red]demo:[/] {escape(what)}", soft_wrap=True)
    return False
