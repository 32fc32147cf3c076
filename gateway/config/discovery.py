"""Where the endpoints of an upstream come from when the configuration does not list them.

Strategy: the file says where to look, never what was found there; a watched file's first content is validated with the
configuration and kept, so that a process that starts while the file is damaged has something to begin with.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import PrivateAttr, model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic.json_schema import WithJsonSchema

from gateway.config.base import Model, setting
from gateway.config.values import FilePath, fault, text_of
from gateway.config.web import Address, is_ip, parse_address

MAX_ENDPOINTS = 256  # of one upstream; a DNS answer may have thousands of records
_SERVICE = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


FileTime = tuple[int, int, int, int]


def file_time(path: Path) -> FileTime:
    """Return what differs when a regular file's content does: device, inode, time and size. Raises OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def parse_service(raw: Any) -> str:
    """Return the name of SRV records, lower-cased: `_pay._tcp.bank.test`."""
    hint = "write the name of the SRV records, such as _payments._tcp.bank.test"
    text = text_of(raw, "expected the name of SRV records", hint).lower().removesuffix(".")
    if not _SERVICE.fullmatch(text) or len(text) > 253:
        raise fault("not a name of SRV records", hint)
    return text


def parse_resolver(raw: Any) -> str:
    """Return `address:port` of a name server; the port defaults to 53."""
    hint = "write an IP address and a port, such as 10.0.0.53:53 or [fd00::53]:53"
    text = text_of(raw, "expected the address of a name server", hint)
    if is_ip(text.strip("[]")):
        return str(Address(text.strip("[]"), 53))
    address = parse_address(text)
    if not address.literal:
        raise fault("a name server is given by its IP address", hint)
    return str(address)


Service = Annotated[str, BeforeValidator(parse_service), WithJsonSchema({"type": "string", "x-is": "name of SRV records"})]
NameServer = Annotated[str, BeforeValidator(parse_resolver), WithJsonSchema({"type": "string", "x-is": "address:port"})]


class Discovery(Model):
    """Endpoints that are found, and found again, at run time."""

    srv: Service | None = setting(None, "SRV records: each is an endpoint, with its port and weight; lowest priority first")
    file: FilePath | None = setting(None, "a YAML file with a list as `targets` is, watched for changes")
    resolver: NameServer | None = setting(None, "the name server to ask; default: those of /etc/resolv.conf")

    _endpoints: tuple[Any, ...] = PrivateAttr(default=())
    _seen: FileTime | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.srv is not None and self.file is not None:
            raise fault("both `srv` and `file`", "keep one of them", at=("file",))
        return self

    @property
    def endpoints(self) -> tuple[Any, ...]:
        """Return what the file held when the configuration was loaded: schema.Endpoint objects."""
        return self._endpoints

    @property
    def seen(self) -> FileTime | None:
        """Return the FileTime of that content."""
        return self._seen
