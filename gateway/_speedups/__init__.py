"""The native modules, built from _speedups/ into this folder.

There is no pure-Python fallback: a gateway that silently runs a hundred times slower, or parses by other rules, is worse
than one that does not start.
"""

try:
    from . import http1 as _built  # noqa: F401
except ImportError as error:  # pragma: no cover - only on an unbuilt tree
    raise ImportError(
        f"Crossway's native modules cannot be loaded ({error}). Build them with `script/setup`, "
        "or `python setup.py build_ext --inplace` in a source tree."
    ) from error
