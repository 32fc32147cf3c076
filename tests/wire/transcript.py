"""Read a wire transcript: the plain text of one behaviour, with both ends of the gateway scripted.

Strategy: line oriented and without nesting, so that a person reads it top to bottom as the conversation it is. The format is
described in README.md beside this file. Text stays text until a row of the `for each` table is put in; only then are
escapes turned into bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

HEADERS = ("title", "rule", "config", "listener")
STEP = re.compile(r"(client|upstream)(?: (\d+))? (.+)|(wait)")
BLOCK = re.compile(r"\s+([|>~!])(.*)", re.DOTALL)
ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|([rntse0\\]))")
REPEAT = re.compile(r'<repeat (\d+) "((?:[^"\\]|\\.)*)">')
SIMPLE = {"r": b"\r", "n": b"\n", "t": b"\t", "s": b" ", "e": b"\x1b", "0": b"\x00", "\\": b"\\"}
VERBS = re.compile(
    r"sends|expects|expects without body|expects partial|expects bytes|expects truncated|expects close|expects nothing"
    r"|expects nothing complete|expects (?:status|problem|refusal) (?:\d{3}|<[A-Z]+>)|half-closes|closes|resets|<[A-Z]+>"
)
WITH_BLOCK = {"sends", "expects", "expects without body", "expects partial", "expects bytes"}


class TranscriptError(ValueError):
    """A transcript file that cannot be read; the message names file and line."""


@dataclass(frozen=True)
class BlockLine:
    """One line of a block: `|` text and CRLF, `>` bytes alone, `~` a regular expression, `!` a field that must be absent."""

    kind: str
    text: str


@dataclass(frozen=True)
class Step:
    """One thing that one end does or sees."""

    line: int
    end: str
    number: int
    verb: str
    block: tuple[BlockLine, ...] = ()

    @property
    def title(self) -> str:
        """The step as it is written, for messages."""
        return self.verb if self.end == "wait" else f"{self.end} {self.number} {self.verb}"


@dataclass
class Transcript:
    """A whole file, before a row is put in."""

    path: Path
    title: str = ""
    rule: str = ""
    config: str = "default"
    listener: str = "public"
    columns: tuple[str, ...] = ()
    rows: list[dict[str, str]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def with_row(self, row: dict[str, str]) -> list[Step]:
        """Return the steps with the row's values in place of <COLUMN>."""

        def put(text: str) -> str:
            for name, value in row.items():
                text = text.replace(f"<{name}>", value)
            return text

        steps = [
            Step(step.line, step.end, step.number, put(step.verb), tuple(BlockLine(b.kind, put(b.text)) for b in step.block))
            for step in self.steps
        ]
        for step in steps:
            if step.end != "wait" and ("<" in step.verb or not VERBS.fullmatch(step.verb)):
                raise TranscriptError(f"{self.path}:{step.line}: unknown step {step.verb!r} in row {row}")
        return steps


def to_bytes(text: str) -> bytes:
    r"""Turn escapes (\r \n \t \0 \s \e \\ \xHH \uHHHH) and <repeat N "..."> into bytes; everything else is UTF-8."""
    out = bytearray()
    at = 0
    while at < len(text):
        if text[at] == "<" and (repeat := REPEAT.match(text, at)):
            out += to_bytes(repeat[2].replace('\\"', '"')) * int(repeat[1])
            at = repeat.end()
        elif text[at] == "\\":
            escape = ESCAPE.match(text, at)
            if not escape:
                raise TranscriptError(f"unknown escape in {text!r} at character {at + 1}; write \\\\ for a backslash")
            if escape[1]:
                out.append(int(escape[1], 16))
            else:
                out += chr(int(escape[2], 16)).encode() if escape[2] else SIMPLE[escape[3]]
            at = escape.end()
        else:
            out += text[at].encode()
            at += 1
    return bytes(out)


def raw(block: tuple[BlockLine, ...]) -> bytes:
    """Return a block's bytes: text lines end in CRLF, raw lines do not."""
    return b"".join(to_bytes(line.text) + (b"\r\n" if line.kind == "|" else b"") for line in block)


def _header(transcript: Transcript, line: str) -> bool:
    name, colon, value = line.partition(":")
    if not colon or name not in HEADERS:
        return False
    setattr(transcript, name, value.strip())
    return True


def _step(line: str, number: int, where: str) -> Step:
    match = STEP.fullmatch(line)
    if not match:
        raise TranscriptError(f"{where}: not a step: {line!r}; steps begin with client, upstream or wait")
    if match[4]:
        return Step(number, "wait", 0, "wait")
    if not VERBS.fullmatch(match[3]):
        raise TranscriptError(f"{where}: unknown step {match[3]!r}; README.md beside the runner lists them")
    return Step(number, match[1], int(match[2] or 1), match[3])


def read(path: Path) -> Transcript:
    """Read one .wire file; raises TranscriptError with file and line."""
    transcript = Transcript(path)
    blocks: list[list[BlockLine]] = []
    table: list[str] | None = None
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        where = f"{path}:{number}"
        if not line.strip() or line.startswith("#"):
            continue
        block = BLOCK.fullmatch(line)
        if block and table is not None and not transcript.steps:
            table.append(block[2])
        elif block and transcript.steps:
            blocks[-1].append(BlockLine(block[1], block[2]))
        elif block:
            raise TranscriptError(f"{where}: a block needs a step before it")
        elif line.startswith("for each ") and line.endswith(":"):
            transcript.columns = tuple(line[len("for each ") : -1].split())
            table = []
        elif not transcript.steps and _header(transcript, line):
            pass
        else:
            transcript.steps.append(_step(line, number, where))
            blocks.append([])
    transcript.steps = [_with_block(path, step, lines) for step, lines in zip(transcript.steps, blocks)]
    transcript.rows = [_row(path, transcript.columns, text) for text in table] if table is not None else [{}]
    for name in ("title", "rule", "steps", "rows"):
        if not getattr(transcript, name):
            raise TranscriptError(f"{path}: no {name}")
    return transcript


def _with_block(path: Path, step: Step, lines: list[BlockLine]) -> Step:
    if bool(lines) != (step.verb in WITH_BLOCK):
        raise TranscriptError(f"{path}:{step.line}: {step.verb!r} {'takes no block' if lines else 'needs a block'}")
    return Step(step.line, step.end, step.number, step.verb, tuple(lines))


def _row(path: Path, columns: tuple[str, ...], text: str) -> dict[str, str]:
    values = text.split(" => ") if len(columns) > 1 else [text]
    if len(values) != len(columns):
        raise TranscriptError(f"{path}: row {text!r} has {len(values)} values for {len(columns)} columns {columns}")
    return dict(zip(columns, values))
