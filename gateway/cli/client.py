"""How the commands talk to a running gateway: its admin API, over TCP or a Unix socket.

Strategy: the address comes from --admin, or from the same file the gateway runs with. Of that file only `admin` is read, and
leniently: a file that the gateway would refuse is exactly what `crossway reload` is asked about.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

DEFAULT_BIND = "127.0.0.1:9900"
TIMEOUT = 5.0  # seconds


class Unreachable(Exception):
    """The admin API cannot be called; the text says where and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config and --admin to a command's parser."""
    parser.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        default=os.environ.get("CROSSWAY_CONFIG"),
        help="the file the gateway runs with",
    )
    parser.add_argument(
        "--admin",
        metavar="URL",
        default=os.environ.get("CROSSWAY_ADMIN"),
        help="its admin address, http://HOST:PORT or unix:/PATH, instead of the file's",
    )
    parser.add_argument(
        "--token-file", metavar="FILE", help="file with the admin token; default: $CROSSWAY_ADMIN_TOKEN or the file's"
    )


class Client:
    """One caller of the admin API."""

    def __init__(self, address: str, token: str | None = None, timeout: float = TIMEOUT) -> None:
        self.address = address
        self.token = token
        self.timeout = timeout

    @classmethod
    def from_arguments(cls, parsed: argparse.Namespace, timeout: float = TIMEOUT) -> Client:
        """Raises Unreachable when the file or the token cannot be read."""
        bind, token = DEFAULT_BIND, None
        if parsed.config is not None and parsed.admin is None:
            bind, token = _admin_of(Path(parsed.config))
        elif parsed.config is not None:
            _, token = _admin_of(Path(parsed.config))
        if parsed.token_file:
            try:
                token = Path(parsed.token_file).read_text().strip()
            except OSError as error:
                raise Unreachable(f"{parsed.token_file}: cannot be read: {error.strerror}") from None
        return cls(parsed.admin or bind, os.environ.get("CROSSWAY_ADMIN_TOKEN") or token, timeout)

    def call(self, method: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Return (status, decoded JSON). Raises Unreachable."""
        connection = self._connection()
        sent = dict(headers or {})
        if self.token:
            sent["Authorization"] = f"Bearer {self.token}"
        try:
            connection.request(method, path, headers=sent)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unreachable(
                f"{self.address}: {reason}. Is the gateway running? `--admin` or `-c FILE` says where to look."
            ) from None
        except ValueError:
            raise Unreachable(f"{self.address}: the answer is not JSON; this is not Crossway's admin API") from None
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        address = self.address.removeprefix("http://").rstrip("/")
        if address.startswith("unix:"):
            return _UnixConnection(address[5:].removeprefix("//"), self.timeout)
        if address.startswith("/"):
            return _UnixConnection(address, self.timeout)
        try:
            parts = urlsplit(f"//{address}")
            host, port = parts.hostname or "127.0.0.1", parts.port or 9900
        except ValueError:
            raise Unreachable(f"{self.address!r} is not http://HOST:PORT or unix:/PATH") from None
        # A wildcard is where it listens, not where one can connect.
        return http.client.HTTPConnection({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port, self.timeout)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _admin_of(path: Path) -> tuple[str, str | None]:
    """Return (bind, token) of a configuration file that need not be valid."""
    from gateway.config.source import Document

    try:
        document = Document(path)
        document.read()
    except OSError as error:
        raise Unreachable(f"{path}: cannot be read: {error.strerror}") from None
    admin = document.data.get("admin") if isinstance(document.data, dict) else None
    if not isinstance(admin, dict):
        return DEFAULT_BIND, None
    token = admin.get("token")
    return str(admin.get("bind", DEFAULT_BIND)), str(token) if token else None


def complain(error: Exception) -> int:
    """Print why a command cannot be done; return its exit code."""
    print(f"crossway: {error}", file=sys.stderr)
    return 1
