"""Crossway: API gateway and service mesh for payment traffic.

This package's own names are what Python policies import; everything else has its folder: see the map in README.md. The names
are loaded on first use, so that `crossway --help` does not wait for the native modules.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway._speedups.hooks import Headers, InvalidBody, Policy, Reply, Request, Response, deny, respond
    from gateway._speedups.token_cache import Principal

__version__ = "0.1.0"

__all__ = ["Headers", "InvalidBody", "Policy", "Principal", "Reply", "Request", "Response", "deny", "respond"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gateway' has no attribute {name!r}")
    return getattr(import_module("gateway._speedups.token_cache" if name == "Principal" else "gateway._speedups.hooks"), name)
