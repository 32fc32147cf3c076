"""What a run's TLS rests on, read from the files that its settings name.

Strategy: the same sessions as the gateway's towards upstreams, with the same demands: TLS 1.2 or 1.3, the server verified unless
the settings say otherwise. What cannot be used is told with the option and the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from gateway._speedups.certificates import PEM_MAX, Certificate, TlsError, parse_certificates, parse_key
from gateway._speedups.tls import TlsUpstream
from gateway.bench.settings import TlsOptions, UsageError
from gateway.config.keyfile import read_file
from gateway.workload.authorities import system_authorities

Made = TypeVar("Made")


def client_tls(options: TlsOptions) -> TlsUpstream:
    """Return what the handshakes run on. Raises UsageError."""
    chain = key = None
    if options.cert is not None:
        key_file = options.key or options.cert
        chain = _read("--cert", options.cert, parse_certificates)
        key = _read("--key", key_file, parse_key)
        if not key.matches(chain[0]):
            raise UsageError(f"--key {key_file}: the key does not belong to the certificate in {options.cert}")
    try:
        return TlsUpstream(
            digest=hashlib.sha256(repr(options).encode()).digest(), authorities=_authorities(options), chain=chain, key=key,
            server_name=options.server_name, verify=not options.insecure,
        )  # fmt: skip
    except TlsError as error:
        raise UsageError(f"TLS cannot be used: {error}") from None


def _authorities(options: TlsOptions) -> list[Certificate]:
    if options.insecure:
        return []
    path = options.cacert or system_authorities()
    if path is None:
        raise UsageError("this machine has no certificates of authorities; name a file with --cacert")
    return _read("--cacert", path, lambda content: parse_certificates(content, strict=False))


def _read(option: str, path: Path, parse: Callable[[bytes], Made]) -> Made:
    try:
        return parse(read_file(path, PEM_MAX + 1))
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from None
    except TlsError as error:
        raise UsageError(f"{option} {path}: {error}") from None
