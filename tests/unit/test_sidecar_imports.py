"""A sidecar stands beside every instance of every service: what it does not need must not come into its memory with an import."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
before = set(sys.modules)  # what this interpreter's site has brought, which is nobody's choice here
sys.argv[1:] = ["mesh", "sidecar", "--help"]
from gateway.cli import main
assert main() == 0
import uvloop
import gateway.server.sidecar
print("MODULES", *sorted(set(sys.modules) - before))
"""

# Module -> KiB that importing it adds to a sidecar's PSS, with all that it brings (Python 3.11).
COSTLY = {
    "cryptography": 8280, "ctypes": 130, "datetime": 190, "email": 540, "gateway.config": 18530, "gateway.discovery": 170, "gateway.mesh.enrol": 650,
    "gateway._speedups.steps": 250, "gateway.mesh.spire": 220, "gateway.policies": 29380, "gateway.snapshot": 29920, "h2": 810, "http": 650, "importlib.metadata": 1210, "multiprocessing": 740,
    "orjson": 400, "platform": 40, "prometheus_client": 2240, "pydantic": 3670, "ruamel": 1030, "shutil": 170, "starlette": 2270, "tempfile": 230,
    "urllib.request": 1220, "uuid": 120, "websockets": 2380, "zipfile": 310,
}  # fmt: skip


def test_a_sidecar_imports_nothing_that_it_can_do_without() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    loaded = done.stdout.split("MODULES ")[1].split()
    assert {"asyncio", "gateway.mesh.websocket", "gateway._speedups.engine"} <= set(loaded)
    found = {name for name in loaded for each in COSTLY if name == each or name.startswith(f"{each}.")}
    assert not found, f"a sidecar imports {', '.join(sorted(found))}: `python -X importtime -m gateway mesh sidecar --help` says from where"
