"""Build the native modules: sources in _speedups/, built extensions in gateway/_speedups/.

Strategy: the .pxd files live beside the .pyx files, outside the package, so a symlink in build/cimport makes
`gateway._speedups.NAME` resolvable for Cython while it walks directories; a package_dir map alone fails as soon as two
modules cimport each other.

CROSSWAY_BUILD   release (default) | debug (directive checks and live-object counters) | asan (AddressSanitizer + UBSan)
CROSSWAY_MODULES a comma-separated list of module names to build; default all
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)


def cimport_tree() -> str:
    """Return the include directory in which `gateway._speedups` is the _speedups/ folder."""
    package = ROOT / "build" / "cimport" / "gateway"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.pxd").touch()
    link = package / "_speedups"
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(ROOT / "_speedups", package))
    return str(ROOT / "build" / "cimport")


FLAVOUR = os.environ.get("CROSSWAY_BUILD", "release")
COMPILE = {
    "release": ["-O3", "-fno-semantic-interposition", "-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"],
    "debug": ["-O1", "-g"],
    # CPython builds with -fwrapv, which hides signed overflow from UBSan. -g1 is enough for the lines in reports, and saves a third
    # of the time.
    "asan": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-wrapv", "-U_FORTIFY_SOURCE"],
}[FLAVOUR]
LINK = {
    "release": ["-Wl,-z,relro,-z,now"],
    "debug": [],
    "asan": ["-fsanitize=address,undefined"],
}[FLAVOUR]
# On no request's way: half the code, which is memory of every process. debug and asan keep their own level.
SMALL = {"certificates", "http2_settings", "notices", "tcp_listener", "upstream_table", "user_context"} if FLAVOUR == "release" else set()
LIBRARIES = {"certificates": ["ssl", "crypto"], "tls": ["ssl", "crypto"], "http2": ["nghttp2"]}
CHECKED = FLAVOUR != "release"

only = {name for name in os.environ.get("CROSSWAY_MODULES", "").split(",") if name}
extensions = [
    Extension(
        f"gateway._speedups.{source.stem}",
        [f"_speedups/{source.name}"],
        extra_compile_args=[*COMPILE, *(["-Os"] if source.stem in SMALL else []), "-fvisibility=hidden", "-Wno-unused-function", "-Wno-unused-const-variable"],
        extra_link_args=LINK,
        libraries=LIBRARIES.get(source.stem, []),
        define_macros=[("CROSSWAY_CHECKED", "1" if CHECKED else "0")],
        depends=[str(path.relative_to(ROOT)) for path in (ROOT / "_speedups").glob("*.px[di]")],
    )
    for source in sorted((ROOT / "_speedups").glob("*.pyx"))
    if not only or source.stem in only
]

setup(
    ext_modules=cythonize(
        extensions,
        include_path=[cimport_tree()],
        build_dir=f"build/cython-{FLAVOUR}",
        nthreads=os.cpu_count() or 1,
        show_all_warnings=False,
        compiler_directives={
            "language_level": 3,
            "boundscheck": True,
            "wraparound": CHECKED,
            "initializedcheck": CHECKED,
            "nonecheck": CHECKED,
            "overflowcheck": False,
            "cdivision": True,
            "embedsignature": True,
        },
    ),
)
