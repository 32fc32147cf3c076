"""The built-in policies: from the settings of one use in one route to compiled steps.

Strategy: `compile_policy` looks up the kind's function in one table. Each function adds to the RouteParts of the route that
is being compiled; what several routes share (verifiers, caches, journals) comes from the Workshop of the snapshot.
"""

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from gateway._speedups.hooks import settle
from gateway.policies import mirror
from gateway.policies.authorise import compile_claims, compile_ip, compile_scopes
from gateway.policies.base import RouteParts, SettingError, Use, Workshop
from gateway.policies.fault import compile_fault
from gateway.policies.identify import compile_api_key, compile_jwt
from gateway.policies.limit import compile_limits, compile_quota, compile_rate_limit
from gateway.policies.python import compile_python
from gateway.policies.record import close_journals, compile_audit
from gateway.policies.transform import compile_cors, compile_grpc_web, compile_headers, compile_rewrite

COMPILERS: dict[str, Callable[[Any, Use, RouteParts], None]] = {
    "jwt": compile_jwt,
    "api_key": compile_api_key,
    "ip": compile_ip,
    "scopes": compile_scopes,
    "claims": compile_claims,
    "rate_limit": compile_rate_limit,
    "quota": compile_quota,
    "limits": compile_limits,
    "headers": compile_headers,
    "rewrite": compile_rewrite,
    "cors": compile_cors,
    "grpc_web": compile_grpc_web,
    "fault": compile_fault,
    "audit": compile_audit,
    "python": compile_python,
}

PHASES = ("identify", "authorise", "limit", "validate", "transform", "record")


async def end(seconds: float) -> None:
    """Finish what policies do after the last exchange: on_end calls, copies for mirrors, leases given back, then the audit records.
    Each takes at most `seconds`."""
    await asyncio.gather(settle(seconds), mirror.settle(seconds))
    if "gateway.policies.store" in sys.modules:
        from gateway.policies import store

        await store.settle(seconds)
    close_journals(seconds)


__all__ = ["COMPILERS", "PHASES", "RouteParts", "SettingError", "Use", "Workshop", "end"]
