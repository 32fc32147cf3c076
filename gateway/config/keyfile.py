"""Key files that a configuration names: lists of API keys, and JWKS files (RFC 7517).

Strategy: a list of API keys is read like the configuration, so its mistakes have places. Of a JWKS only the bytes are read
here, for the digest; what its keys are good for is the policy's to judge (policies/jwt_keys.py), by one set of rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationInfo

from gateway.config.source import Document
from gateway.config.values import fault, parse_path

MAX_JWKS = 1 << 20  # bytes; a large bank's set is below 64 KiB


def read_api_keys(raw: str, info: ValidationInfo) -> Any:
    """Return the list in a file of API keys; its problems join those of the configuration."""
    document = Document(parse_path(raw, info))
    document.read()
    if info.context is not None:
        info.context["documents"].append(document)
    if document.problems:
        first = document.problems[0]
        raise fault(
            "the file of API keys cannot be used", "its own problems are listed too" if first.line else first.message
        )
    if not isinstance(document.data, list):
        raise fault("the file of API keys is no list", 'its items are {client: NAME, hash: "sha256:HEX", scopes: []}')
    return document.data


def read_file(path: Path, most: int) -> bytes:
    """Return a file's bytes, at most `most` of them; raise OSError as `open` does."""
    with open(path, "rb") as stream:
        return stream.read(most + 1)[:most]
