"""The small languages of the configuration: durations, sizes, rates, names, secrets, paths of files.

Strategy: each is one parser that either returns the stored form or raises `fault(...)`, and one Annotated type that
carries the parser and its JSON Schema. A parser never puts its input into a message: whoever reports the fault knows
whether the value may be shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

TEXT = PlainSerializer(str, return_type=str)  # dumped as the file writes it
HIDDEN = PlainSerializer(lambda secret: "***", return_type=str)
MAX_DURATION = 30 * 86400.0  # seconds; what is meant to be longer is a mistake


def fault(message: str, hint: str = "", *, at: tuple[str | int, ...] = (), detail: str = "") -> PydanticCustomError:
    """Return the error that a validator raises; `at` leads from the validated value to the culprit below it.

    `message` and `hint` never hold input; `detail` may, and is left out for values that came from `${...}`.
    """
    return PydanticCustomError("crossway", "{message}", {"message": message, "hint": hint, "at": at, "detail": detail})


def text_of(raw: Any, message: str, hint: str) -> str:
    if not isinstance(raw, str):
        raise fault(message, hint)
    return raw


def described(description: str, *, kind: str = "string", **more: Any) -> WithJsonSchema:
    return WithJsonSchema({"type": kind, "x-is": description, **more})


# -- numbers

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {
    "": 1,
    "B": 1,
    "kB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}


def parse_duration(raw: Any) -> float:
    """Return seconds for `10s`, `500ms`, `1.5h`; plain 0 needs no unit."""
    if isinstance(raw, (int, float)) and not isinstance(raw, bool) and raw == 0:
        return 0.0
    hint = "write a number with its unit, such as 500ms, 10s, 2m, 1h or 1d"
    if isinstance(raw, (int, float)) and not isinstance(raw, bool):
        raise fault("a duration without a unit", hint)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(us|ms|s|m|h|d)", text_of(raw, "expected a duration", hint))
    if not match:
        raise fault("expected a duration", hint)
    seconds = float(match[1]) * _UNITS[match[2]]
    if seconds > MAX_DURATION:
        raise fault("a duration may be at most 30d")
    return seconds


def _positive(seconds: float) -> float:
    if seconds <= 0:
        raise fault("must be longer than 0", "a wait without an end is not offered; choose a deadline")
    return seconds


def parse_size(raw: Any) -> int:
    """Return bytes for `32KiB`, `10kB`, `512`."""
    hint = "write bytes as 512, or with a unit: 32KiB, 1MiB, 10kB"
    if isinstance(raw, int) and not isinstance(raw, bool) and raw >= 0:
        return raw
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text_of(raw, "expected a size", hint))
    if not match or match[2] not in _SIZES:
        raise fault("expected a size", hint)
    size = float(match[1]) * _SIZES[match[2]]
    if size != int(size) or size >= 1 << 62:
        raise fault("a size is a whole number of bytes", hint)
    return int(match[1]) * _SIZES[match[2]] if "." not in match[1] else int(size)


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` requests in `period` seconds."""

    count: int
    period: float

    def __str__(self) -> str:
        return f"{self.count}/{self.period:g}s"


def parse_rate(raw: Any) -> Rate:
    """Return the Rate of `100/s`, `10/m`, `5/10s`."""
    hint = "write requests per time, such as 100/s, 10/m, 5/h or 1000/d"
    match = re.fullmatch(r"([0-9]+) ?/ ?([0-9]*)(s|m|h|d)", text_of(raw, "expected a rate", hint))
    if not match:
        raise fault("expected a rate", hint)
    count, period = int(match[1]), float(match[2] or 1) * _UNITS[match[3]]
    if count < 1 or period <= 0:
        raise fault("a rate is at least 1", hint)
    if count > 1_000_000_000 or period > MAX_DURATION:
        raise fault("a rate is at most 1000000000 in 30d")
    return Rate(count, period)


def parse_percent(raw: Any) -> float:
    """Return the fraction of `20%`: 0.2."""
    hint = "write a number from 0 to 100 with its sign: 20%"
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]+)?) ?%", text_of(raw, "expected a percentage", hint))
    if not match or float(match[1]) > 100:
        raise fault("expected a percentage", hint)
    return float(match[1]) / 100


def parse_int(raw: Any) -> int:
    """Return a whole number; a text of digits counts, because references are text."""
    if isinstance(raw, str) and re.fullmatch(r"-?[0-9]{1,18}", raw):
        return int(raw)
    if isinstance(raw, bool) or not isinstance(raw, int):
        raise fault("expected a whole number", "write a number such as 10")
    return raw


def parse_flag(raw: Any) -> bool:
    """Return true or false as YAML 1.2 spells them."""
    if isinstance(raw, str) and raw in ("true", "false"):
        return raw == "true"
    if not isinstance(raw, bool):
        raise fault("expected true or false", "YAML 1.2 knows true and false; yes, no, on and off are text")
    return raw


def parse_workers(raw: Any) -> int | str:
    """Return `auto` or a positive number."""
    if raw == "auto":
        return "auto"
    hint = "write `auto` (CPU affinity and cgroup quota) or a number such as 2"
    if isinstance(raw, bool) or not re.fullmatch(r"[0-9]{1,9}", str(raw)):
        raise fault("expected a number of workers", hint)
    if not 1 <= int(raw) <= 1024:
        raise fault("workers are between 1 and 1024", hint)
    return int(raw)


# -- names and texts


def parse_name(raw: Any) -> str:
    """Return the name of a listener, upstream, policy or route: it appears in metrics, logs and commands."""
    hint = "letters, digits, - _ and ., beginning with a letter or digit, at most 64"
    text = text_of(raw, "expected a name", f'{hint}; quote it if it is a number: "1"')
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise fault("not a name", hint)
    return text


def parse_text(raw: Any) -> str:
    """Return a non-empty line of text."""
    text = text_of(raw, "expected text", 'quote it if it looks like a number: "5"')
    if not text or any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise fault("must not be empty and holds no control characters")
    return text


def parse_secret(raw: Any) -> SecretStr:
    """Return a secret, which shows itself only on request."""
    if isinstance(raw, SecretStr):
        return raw
    text = text_of(raw, "expected text", "quote it, or better take it from outside: ${env:NAME} or ${file:PATH}")
    if not text:
        raise fault("an empty secret", "take it from outside: ${env:NAME} or ${file:PATH}")
    return SecretStr(str(text))


# -- files


def base_of(info: ValidationInfo) -> Path:
    return Path(info.context["base"]) if info.context else Path()


def parse_path(raw: Any, info: ValidationInfo) -> Path:
    """Return a file's path; a relative one is relative to the configuration file."""
    text = text_of(raw, "expected the path of a file", "relative paths are relative to this file")
    if not text or "\0" in text:
        raise fault("expected the path of a file", "relative paths are relative to this file")
    return base_of(info) / text


Duration = Annotated[
    float,
    PlainValidator(parse_duration),
    described("duration", pattern=r"^[0-9]+(\.[0-9]+)?(us|ms|s|m|h|d)$", examples=["10s"]),
]
Deadline = Annotated[Duration, AfterValidator(_positive)]
Size = Annotated[
    int,
    PlainValidator(parse_size),
    WithJsonSchema({"type": ["string", "integer"], "x-is": "size", "examples": ["32KiB"]}),
]
Percent = Annotated[
    float,
    PlainValidator(parse_percent),
    described("percentage", pattern=r"^[0-9]{1,3}(\.[0-9]+)? ?%$", examples=["20%"]),
]
RateText = Annotated[
    Rate,
    PlainValidator(parse_rate),
    TEXT,
    described("rate", pattern=r"^[0-9]+ ?/ ?[0-9]*(s|m|h|d)$", examples=["100/s"]),
]
Int = Annotated[int, BeforeValidator(parse_int)]
Flag = Annotated[bool, BeforeValidator(parse_flag)]
Workers = Annotated[
    int | str,
    PlainValidator(parse_workers),
    WithJsonSchema({"type": ["string", "integer"], "x-is": "number or `auto`"}),
]
Name = Annotated[str, PlainValidator(parse_name), described("name")]
Text = Annotated[str, PlainValidator(parse_text), described("text")]
Secret = Annotated[SecretStr, PlainValidator(parse_secret), HIDDEN, described("secret", writeOnly=True)]
FilePath = Annotated[Path, PlainValidator(parse_path), TEXT, described("file")]
