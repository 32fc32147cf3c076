"""Strict base64url and JSON for tokens and key sets: one spelling, one meaning, bounded work.

Strategy: base64url is canonical when encoding the decoded bytes gives the input again, which refuses padding, the other
alphabet, white space, junk and set tail bits at once. JSON goes through the standard library's C scanner with hooks for
what it lets pass (RFC 7515 4, RFC 7519 4, RFC 8259): duplicate members, NaN, Infinity, numbers without bound. Nesting is
counted before the recursive parser sees the text. Everything that is wrong raises StrictError, whose text is fixed.
"""

import base64
import binascii
import json
import math
import re
from typing import Any

MAX_DEPTH = 16                  # objects and arrays within each other; real tokens and key sets stay below 6
MAX_DIGITS = 19                 # of an integer; 2^53 has 16
MAX_NUMBER = 32                 # characters of a number with fraction or exponent

# A string, closed or not, or one bracket. Possessive: each byte is looked at once, whatever the text is.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


class StrictError(ValueError):
    """The text is not what it claims to be. Its message never holds any of the text."""


def decode_base64url(segment: bytes) -> bytes:
    """Decode canonical unpadded base64url (RFC 7515 2). Raises StrictError."""
    try:
        decoded = base64.urlsafe_b64decode(segment + b"=" * (-len(segment) % 4))
    except (binascii.Error, ValueError):
        raise StrictError("not base64url") from None
    if base64.urlsafe_b64encode(decoded).rstrip(b"=") != segment:
        raise StrictError("not canonical base64url without padding")
    return decoded


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse one JSON object from UTF-8, refusing whatever two parsers could read differently. Raises StrictError."""
    _check_depth(text)
    try:
        value = _DECODER.decode(text.decode("utf-8", "strict"))
        # A lone surrogate can only come from an escape, and cannot be encoded again.
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8", "strict")
    except UnicodeError:
        raise StrictError("not UTF-8") from None
    except StrictError:
        raise
    except (ValueError, RecursionError):
        raise StrictError("not JSON") from None
    if type(value) is not dict:
        raise StrictError("not a JSON object")
    return value


def _check_depth(text: bytes) -> None:
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _TOKENS.finditer(text):
        token = match.group()
        if token in (b"[", b"{"):
            depth += 1
            if depth > MAX_DEPTH:
                raise StrictError("JSON nested too deeply")
        elif token in (b"]", b"}"):
            depth -= 1


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise StrictError("JSON object with a duplicate member")
    return members


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise StrictError("JSON number out of range")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_NUMBER else math.inf
    if not math.isfinite(value):
        raise StrictError("JSON number out of range")
    return value


def _constant(name: str) -> float:
    raise StrictError("JSON with NaN or Infinity")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_members, parse_int=_integer, parse_float=_real, parse_constant=_constant, strict=True
)
