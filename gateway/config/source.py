"""A YAML file as plain data plus the place of every key and value in it.

Strategy: ruamel.yaml composes a node graph (YAML 1.2 tags, exact marks); one walk turns it into dicts, lists and
scalars and a parallel tree of Spots. The walk also finds duplicate keys, resolves `${env:NAME}` and `${file:PATH}` and
notes which values came from there, so that no message ever shows one. Problems are collected, never raised: a reader
wants them all.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.resolver import VersionedResolver

from gateway.errors import Problem, Severity

REDACTED = "***"
MAX_FILE = 64 << 20  # bytes of a configuration file; ten thousand routes are about 2 MiB
MAX_REPEATED = 100_000  # values that aliases repeat: a dozen nested anchors may not become 2^40 values
MAX_REFERENCE = 1 << 20  # bytes of a ${file:...}
MAX_DEPTH = 64

Key = str | int
Path_ = Sequence[Key]

_REFERENCE = re.compile(r"\$(\$\{)|\$\{([^}]*)\}")
_ENV = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_SECRET_WORDS = ("token", "secret", "password", "passwd", "credential", "private_key")
_PAIR = re.compile(
    r"""(["']?)([A-Za-z_][\w-]*)\1(\s*:\s+)("(?:[^"\\]|\\.)*"?|'(?:[^']|'')*'?|\$\{[^}]*\}|[^\s,}\]#{\[&*!|>][^,}#]*)"""
)
_LOGIN = re.compile(r"://[^/@\s]*@")


class Resolved(str):
    """A text that came from `${...}`: usable as text, unreadable in a repr."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"'{REDACTED}'"


@dataclass(slots=True)
class Spot:
    """Where a value stands: its key (or list item) and itself, 1-based; `children` mirrors the value."""

    line: int
    column: int
    width: int = 1
    key: tuple[int, int, int] | None = None  # line, column, width of the key that holds it
    by_key: bool = False  # a block collection, or nothing at all: its key is the better place to point at
    resolved: bool = False
    broken: bool = False  # a reference in it failed and is reported: what it holds is not worth a second message
    children: dict[Key, Spot] = field(default_factory=dict)

    @property
    def mark(self) -> tuple[int, int, int]:
        """Return (line, column, width) of what a person would call this value's place."""
        return self.key if self.by_key and self.key else (self.line, self.column, self.width)


class Document:
    """One parsed file: `data`, the places in it, the problems so far, and what its digest covers."""

    def __init__(self, path: str | Path, content: bytes | None = None, name: str = "") -> None:
        """`content`: the text itself, as if it stood at `path`; messages then call it `name`."""
        self.name = name or str(path)
        self.path = Path(path)
        self._given = content
        self.base = self.path.resolve().parent
        self.data: Any = None
        self.root = Spot(1, 1)
        self.lines: list[str] = []
        self.problems: list[Problem] = []
        self.secrets: set[str] = set()
        self.files: dict[str, bytes] = {}  # what else was read, by place: part of the digest
        self._seen: set[int] = set()  # nodes that were walked; an alias leads to one of them again
        self._repeated = 0
        self._content = b""

    # -- places and problems

    def spot(self, path: Path_) -> Spot:
        """Return the deepest Spot along `path`; names that the file does not have (made by shorthands) are skipped."""
        spot = self.root
        for key in path:
            spot = spot.children.get(key, spot)
        return spot

    def has(self, path: Path_) -> bool:
        """Tell whether the file itself has a value at exactly this path."""
        spot: Spot | None = self.root
        for key in path:
            spot = spot.children.get(key) if spot else None
        return spot is not None

    def report(
        self, at: Path_ | Spot, message: str, hint: str = "", *, severity: Severity = "error", key: bool = False
    ) -> None:
        """Note a problem at a path or Spot; with `key`, point at the key rather than at the value."""
        spot = at if isinstance(at, Spot) else self.spot(at)
        line, column, width = spot.key if key and spot.key else spot.mark
        if not self.lines:  # the text was let go (see server/compiler.py): the file is all that is known
            line = column = 0
        self._add(line, column, width, message, hint, severity)

    def warn(self, at: Path_ | Spot, message: str, hint: str = "", *, key: bool = False) -> None:
        """Note a doubt: legal, and yet hardly meant."""
        self.report(at, message, hint, severity="warning", key=key)

    def show(self, at: Path_, value: object) -> str:
        """Return `value` quoted for a message, or the redaction mark when it came from outside the file."""
        return f"'{REDACTED}'" if self.spot(at).resolved else repr(str(value))

    def redact(self, text: str) -> str:
        """Return `text` without any resolved value: the second net below `show`."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, REDACTED)
        return text

    @property
    def content(self) -> bytes:
        """Return the text as it was read."""
        return self._content

    def digest(self) -> str:
        """Return the sha256 over the file and everything that was read because of it, in hex."""
        total = hashlib.sha256(self._content)
        for name, content in sorted(self.files.items()):
            total.update(b"\0" + name.encode() + b"\0" + hashlib.sha256(content).digest())
        return total.hexdigest()

    def _add(self, line: int, column: int, width: int, message: str, hint: str, severity: Severity = "error") -> None:
        source = mask(self.lines[line - 1]) if 0 < line <= len(self.lines) else ""
        # The source line is the author's own text, references unresolved: only the two sentences can hold a value.
        self.problems.append(
            Problem(self.name, line, column, self.redact(message), self.redact(hint), source, severity, width)
        )

    # -- reading

    def read(self) -> None:
        """Read and parse the file; on failure `problems` says why and `data` stays None."""
        text = self._text()
        if text is not None:
            self._parse(text, lambda: YAML(typ="safe", pure=True).compose(text))

    def reading(self) -> Iterator[None]:
        """Do what read() does in steps of some 10 us, for a caller that has other things to do in between."""
        text = self._text()
        if text is None:
            return
        events, failure = deque[Any](), None
        try:
            for event in YAML(typ="safe", pure=True).parse(text):
                events.append(event)
                yield
        except (YAMLError, RecursionError) as error:
            failure = error
        self._parse(text, lambda: _compose(events, failure))

    def _text(self) -> str | None:
        try:
            if self._given is not None:
                self._content, self._given = self._given, None
            else:
                with open(self.path, "rb") as stream:
                    self._content = stream.read(MAX_FILE + 1)
        except OSError as error:
            reason = {FileNotFoundError: "no such file", IsADirectoryError: "this is a directory, not a file"}.get(
                type(error), f"cannot be read: {error.strerror}"
            )
            self._add(0, 0, 1, reason, "name an existing file that this user may read")
            return None
        if len(self._content) > MAX_FILE:
            self._add(
                0, 0, 1, f"larger than {MAX_FILE >> 20} MiB", "split it: this is no configuration that a person reads"
            )
            return None
        try:
            text = self._content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = self._content.count(b"\n", 0, error.start) + 1
            column = error.start - self._content.rfind(b"\n", 0, error.start)
            self._add(line, column, 1, "not UTF-8 text", "save the file as UTF-8")
            return None
        self.lines = text.splitlines()
        return text

    def _parse(self, text: str, compose: Callable[[], Node | None]) -> None:
        try:
            node = compose()
        except MarkedYAMLError as error:
            self._syntax(error)
            return
        except RecursionError:
            self._add(1, 1, 1, "nested too deeply", f"at most {MAX_DEPTH} levels")
            return
        except YAMLError as error:  # ReaderError: a byte that YAML does not allow
            position = getattr(error, "position", None)
            before = text[:position] if isinstance(position, int) else ""
            place = (before.count("\n") + 1, len(before) - before.rfind("\n"))
            self._add(*place, 1, "a character that YAML does not allow here", "remove the control character")
            return
        if node is None:
            self._add(
                0,
                0,
                1,
                "empty: there is no configuration in it",
                "the smallest useful file is in docs/configuration.md",
            )
            return
        self.data, self.root = self._value(node, None, 0, frozenset())

    def _syntax(self, error: MarkedYAMLError) -> None:
        mark = error.problem_mark or error.context_mark
        # What is never closed is found at the end of the file, and to be repaired where it began.
        unclosed = mark is not None and error.context_mark is not None and mark.line >= len(self.lines)
        mark = error.context_mark if unclosed else mark
        message = " ".join(str(part) for part in (error.context, error.problem) if part)
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        hint = "check the indentation and the punctuation here and in the line above"
        if unclosed:
            hint = "it is never closed"
        elif error.context_mark is not None and error.context_mark is not mark:
            hint = f"it began at line {error.context_mark.line + 1}, column {error.context_mark.column + 1}"
        line = min(line, max(1, len(self.lines)))
        source = self.lines[line - 1] if self.lines else ""
        column = min(column, len(source) + 1)
        if "${" in source:
            hint = 'inside { } or [ ] a reference needs quotes: "${env:NAME}"'
        elif source[column - 1 : column] == "{" and "flow" in message:
            hint = 'inside { } a value that holds braces needs quotes: path: "/v1/payments/{id}"'
        elif "\t" in source[: len(source) - len(source.lstrip())]:
            message, hint = "a tab cannot indent YAML", "indent with spaces"
        elif "another document" in message:
            hint = "one file holds one configuration: remove the line ---"
        self._add(line, column, 1, message, hint)

    # -- nodes to data

    def _value(
        self, node: Node, key: tuple[int, int, int] | None, depth: int, above: frozenset[int]
    ) -> tuple[Any, Spot]:
        spot = _spot(node, key)
        self._repeated += id(node) in self._seen
        self._seen.add(id(node))
        if id(node) in above or depth > MAX_DEPTH or self._repeated > MAX_REPEATED:
            if self._repeated <= MAX_REPEATED + 1:
                what = "an anchor that contains itself" if id(node) in above else "too many nested or repeated values"
                self.report(spot, what, "write the values out")
            return None, spot
        if isinstance(node, ScalarNode):
            return self._scalar(node, spot), spot
        if not _plain_tag(node.tag):
            self.report(spot, f"unknown YAML tag {node.tag}", "remove the tag: only plain YAML is read")
        above = above | {id(node)}
        if isinstance(node, MappingNode):
            return self._mapping(node, spot, depth, above), spot
        assert isinstance(node, SequenceNode)
        items: list[Any] = []
        for number, child in enumerate(node.value):
            item, spot.children[number] = self._value(child, None, depth + 1, above)
            items.append(item)
        return items, spot

    def _mapping(self, node: MappingNode, spot: Spot, depth: int, above: frozenset[int]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        inherited: dict[Key, Spot] = {}
        for key_node, child in node.value:
            here = _spot(key_node, None)
            place = (here.line, here.column, here.width)
            if key_node.tag == "tag:yaml.org,2002:merge":
                self._merge(child, merged, inherited, place, depth, above)
                continue
            if not isinstance(key_node, ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                self.report(
                    here,
                    "a key must be text",
                    f'quote it: "{getattr(key_node, "value", "")}"'
                    if isinstance(key_node, ScalarNode)
                    else "keys are plain words",
                )
                if not isinstance(key_node, ScalarNode):
                    continue
            name = str(key_node.value)
            if "${" in name:
                self.report(here, "a reference cannot stand in a key", "references are resolved in values only")
            if name in spot.children:
                first = spot.children[name].key
                self.report(
                    here,
                    f"duplicate key {name!r}",
                    f"it is already at line {first[0] if first else 0}; keep one of them",
                )
                continue
            data[name], spot.children[name] = self._value(child, place, depth + 1, above)
        for name, value in merged.items():
            data.setdefault(name, value)
            spot.children.setdefault(name, inherited[name])
        return data

    def _merge(
        self,
        node: Node,
        merged: dict[str, Any],
        inherited: dict[Key, Spot],
        key: tuple[int, int, int],
        depth: int,
        above: frozenset[int],
    ) -> None:
        """Collect what `<<` brings in; an earlier mapping in a list of them wins, as in the YAML merge proposal."""
        for part in node.value if isinstance(node, SequenceNode) else [node]:
            data, spot = self._value(part, key, depth + 1, above)
            if not isinstance(data, dict):
                self.report(spot, "<< takes a mapping or a list of mappings", "use it with an anchor: <<: *defaults")
                continue
            for name, value in data.items():
                if name not in merged:
                    merged[name], inherited[name] = value, spot.children[name]

    def _scalar(self, node: ScalarNode, spot: Spot) -> Any:
        kind, text = _plain_tag(node.tag), str(node.value)
        if kind in ("str", "timestamp", "value"):  # a date is text here
            return self._resolve(text, node, spot) if "${" in text else text
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return text.lower() in ("true", "yes", "on")
            if kind == "int":
                plain = text.replace("_", "").lower()
                return int(plain, 0) if re.match(r"[-+]?0[xob]", plain) else int(plain)
            if kind == "float":
                return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            return text
        self.report(spot, f"unknown YAML tag {node.tag}", "remove the tag: only plain YAML is read")
        return text

    # -- references

    def _resolve(self, text: str, node: ScalarNode, spot: Spot) -> str:
        found = False

        def replace(match: re.Match[str]) -> str:
            nonlocal found
            if match[1]:  # $${ is a literal ${
                return match[1]
            found = True
            value, problem, hint = self._reference(match[2])
            if problem:
                offset = match.start() + (1 if node.style in ('"', "'") else 0)
                single = node.start_mark.line == node.end_mark.line
                place = spot.column + offset if single else spot.column
                self._add(spot.line, place, len(match[0]) if single else 1, problem, hint)
                spot.broken = True
            return value

        result = _REFERENCE.sub(replace, text)
        if not found:
            return result
        spot.resolved = True
        # Very short values occur in ordinary words; where they stand they are hidden by `resolved`.
        if len(result) >= 4:
            self.secrets.add(result)
        return Resolved(result)

    def _reference(self, body: str) -> tuple[str, str, str]:
        """Return (value, problem, hint) of the inside of `${...}`."""
        if match := _ENV.fullmatch(body):
            name, default = match.groups()
            value = os.environ.get(name)
            if value is None or (value == "" and default is not None):
                value = default
            if value is None:
                return (
                    "",
                    f"environment variable {name} is not set",
                    f"export {name}, or give a default: ${{env:{name}:-default}}",
                )
            self._remember(f"env:{name}", value)
            return value, "", ""
        if body.startswith("file:") and len(body) > 5:
            return self._file(body[5:])
        return (
            "",
            f"unknown reference ${{{body}}}",
            "write ${env:NAME}, ${env:NAME:-default} or ${file:PATH}; a literal ${ is $${",
        )

    def _file(self, name: str) -> tuple[str, str, str]:
        path = self.base / name
        try:
            with open(path, "rb") as stream:
                content = stream.read(MAX_REFERENCE + 1)
            text = content.decode()
        except OSError as error:
            return "", f"cannot read {name}: {error.strerror}", f"paths are relative to this file: {path}"
        except UnicodeDecodeError:
            return "", f"{name} is not UTF-8 text", "a reference takes text"
        if len(content) > MAX_REFERENCE:
            return "", f"{name} is larger than {MAX_REFERENCE >> 20} MiB", "a reference is for a secret, not for data"
        # Editors and `kubectl create secret` end a file with a newline that nobody means.
        value = text[:-1].removesuffix("\r") if text.endswith("\n") else text
        self._remember(f"file:{path}", value)
        return value, "", ""

    def _remember(self, name: str, value: str) -> None:
        self.files[name] = value.encode("utf-8", "surrogateescape")
        if len(value) >= 4:
            self.secrets.add(value)


def mask(line: str) -> str:
    """Return a source line with the values of secret-looking keys starred out, equally wide: a caret still fits."""

    def cover(match: re.Match[str]) -> str:
        quote, name, colon, value = match.groups()
        looks = name.lower() in _SECRET_WORDS or get_close_matches(name.lower(), _SECRET_WORDS, 1, 0.75)
        bare = value.strip("\"' ")
        if not looks or bare in ("null", "~") or (bare.startswith("${") and ":-" not in bare):
            return match[0]
        return f"{quote}{name}{quote}{colon}{'*' * len(value)}"

    return hide_login(_PAIR.sub(cover, line))


def hide_login(text: str) -> str:
    """Return `text` with the user and password of every URL starred out, equally wide."""
    return _LOGIN.sub(lambda match: f"://{'*' * (len(match[0]) - 4)}@", text)


class _Events:
    """Events that were parsed before, for a Composer."""

    def __init__(self, events: deque[Any]) -> None:
        self._events = events
        # What a Composer asks its loader for.
        self._parser, self._resolver, self.max_depth, self.comment_handling = self, VersionedResolver(), None, None

    def check_event(self, *kinds: type) -> bool:
        return bool(self._events) and (not kinds or isinstance(self._events[0], kinds))

    def peek_event(self) -> Any:
        return self._events[0]

    def get_event(self) -> Any:
        return self._events.popleft()


def _compose(events: deque[Any], failure: BaseException | None) -> Node | None:
    if failure is not None:
        raise failure
    node: Node | None = Composer(loader=_Events(events)).get_single_node()
    return node


def _spot(node: Node, key: tuple[int, int, int] | None) -> Spot:
    start, end = node.start_mark, node.end_mark
    width = max(1, end.column - start.column) if end.line == start.line else 1
    if isinstance(node, ScalarNode):
        by_key = start.index == end.index  # `key:` with nothing after it: its mark is that of the next token
    else:
        by_key = not getattr(node, "flow_style", False)
    return Spot(start.line + 1, start.column + 1, width, key, by_key)


def _plain_tag(tag: str | None) -> str:
    prefix = "tag:yaml.org,2002:"
    kind = str(tag).removeprefix(prefix) if str(tag).startswith(prefix) else ""
    return kind if kind in ("str", "int", "float", "bool", "null", "timestamp", "value", "map", "seq") else ""
