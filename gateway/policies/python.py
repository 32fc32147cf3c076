"""python: a class of the user's own.

Strategy: its module is looked up beside the configuration first, as `crossway check` does. Modules of that folder are
imported anew for every snapshot, so a reload runs the code that is there now; requests under way finish on the old one.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from gateway._speedups.hooks import HookStep
from gateway.config.policies import Python
from gateway.policies.base import RouteParts, Use


def compile_python(settings: Python, use: Use, parts: RouteParts) -> None:
    policy = use.workshop.shared("python", use.name, lambda: _instance(settings, use.workshop.base, use))
    step = HookStep(use.name, policy, timeout=settings.timeout, go_on=settings.on_failure == "continue")
    parts.steps.append(step)
    if step.sees_response:
        parts.response_hooks.append(step)
    if step.sees_end:
        parts.end_hooks.append(step)


def _instance(settings: Python, base: Path, use: Use) -> Any:
    use.workshop.shared("python", "", lambda: _forget(base))
    folder = str(base)
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(settings.module)
    finally:
        sys.path.remove(folder)
    return getattr(module, settings.attribute)(**settings.settings)


def _forget(base: Path) -> bool:
    """Drop the folder's modules, so that the next import reads their files again."""
    importlib.invalidate_caches()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).parent == base and not name.startswith("gateway"):
            del sys.modules[name]
    return True
