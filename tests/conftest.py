"""What every test shares: hypothesis profiles, chosen by HYPOTHESIS_PROFILE (default, sanitized, thorough), and SIGINT.

A shell starts what it runs in the background with SIGINT ignored, and every program started from there inherits that: tests that
interrupt a program would wait for ever. So the default is restored first.
"""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("default", deadline=None)
# A sanitized interpreter is several times slower, and looks for memory errors, not for logic.
settings.register_profile("sanitized", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", deadline=None, max_examples=20_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
