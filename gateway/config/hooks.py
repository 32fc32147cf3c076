"""Whether a Python policy can be made: its module imports, its class exists, and its signature fits the settings.

Strategy: import it as the worker will (the configuration's folder first), then take the folder's modules out of the
process again: a check leaves no trace, and after a reload the new code is what is checked.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from gateway.config.policies import Python
from gateway.config.source import Document, Key

PHASES = ("on_request", "on_response", "on_end")


def check_hook(settings: Python, place: tuple[Key, ...], document: Document) -> None:
    """Report what keeps a Python policy from being made."""
    at = (*place, "class")
    with folder_first(document.base):
        try:
            module = importlib.import_module(settings.module)
        except Exception as error:  # noqa: BLE001 - the module is the user's: whatever it raises is a finding
            missing = isinstance(error, ModuleNotFoundError) and error.name == settings.module.partition(".")[0]
            hint = (
                f"it is looked up in {document.base} and among the installed packages"
                if missing
                else "repair the module"
            )
            document.report(at, f"cannot import {settings.module}: {type(error).__name__}: {error}", hint)
            return
        except SystemExit:
            document.report(
                at,
                f"importing {settings.module} ends the process",
                'guard the script part with `if __name__ == "__main__":`',
            )
            return
        _remember(module.__file__, document)
        found = getattr(module, settings.attribute, None)
    if not inspect.isclass(found):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        close = get_close_matches(settings.attribute, classes, 1, 0.6)
        what = "has no" if found is None else "does not define a class of the name"
        hint = f"did you mean '{close[0]}'?" if close else f"classes there: {', '.join(classes) or 'none'}"
        document.report(at, f"{settings.module} {what} {settings.attribute}", hint)
        return
    if not any(callable(getattr(found, phase, None)) for phase in PHASES):
        document.report(at, f"{settings.attribute} has no phase to call", f"define one of {', '.join(PHASES)}")
    _signature(found, settings, place, document)


def _signature(found: type, settings: Python, place: tuple[Key, ...], document: Document) -> None:
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return  # a class in C may hide its signature; the worker will tell
    accepted = signature.parameters.values()
    names = [each.name for each in accepted if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    if not any(each.kind is each.VAR_KEYWORD for each in accepted):
        for name in settings.settings:
            if name not in names:
                close = get_close_matches(name, names, 1, 0.6)
                hint = f"did you mean '{close[0]}'?" if close else f"it takes: {', '.join(names) or 'nothing'}"
                document.report((*place, name), f"{settings.attribute} takes no setting {name!r}", hint, key=True)
    for each in accepted:
        if each.default is each.empty and each.name in names and each.name not in settings.settings:
            document.report(
                (*place, "class"),
                f"{settings.attribute} needs the setting {each.name!r}",
                f"add `{each.name}:` beside `class`",
            )


def _remember(name: str | None, document: Document) -> None:
    """Count the module's source into the digest: changed code is a changed configuration."""
    path = Path(name) if name else None
    if path is not None and path.is_relative_to(document.base):
        try:
            document.files[f"file:{path}"] = path.read_bytes()
        except OSError:
            pass  # imported from an archive or removed meanwhile; nothing to compare with later


@contextmanager
def folder_first(folder: Path) -> Iterator[None]:
    """Make `folder` the first place of imports, write nothing into it, and forget afterwards what came from it."""
    before = dict(sys.modules)
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    for name in [name for name, module in before.items() if _inside(module, folder)]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = bytecode
        for name in [name for name, module in sys.modules.items() if _inside(module, folder)]:
            del sys.modules[name]
        for name, module in before.items():
            sys.modules.setdefault(name, module)


def _inside(module: object, folder: Path) -> bool:
    name = getattr(module, "__file__", None)
    if not isinstance(name, str) or str(getattr(module, "__name__", "")).partition(".")[0] in ("gateway", "__main__"):
        return False
    # A folder that holds installed packages (or this program) is no folder of policies.
    return Path(name).parent == folder or (Path(name).name == "__init__.py" and Path(name).parent.parent == folder)
