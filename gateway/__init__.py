"""Crossway: API gateway and service mesh for payment traffic.

This package's own names are what Python policies import; everything else has its folder: see the map in README.md.
"""

from gateway._speedups.hooks import Headers, InvalidBody, Policy, Reply, Request, Response, deny, respond
from gateway._speedups.token_cache import Principal

__version__ = "0.1.0"

__all__ = ["Headers", "InvalidBody", "Policy", "Principal", "Reply", "Request", "Response", "deny", "respond"]
