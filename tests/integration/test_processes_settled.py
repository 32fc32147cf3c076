"""The first request of a started, and of a reloaded, gateway already finds its upstream's name resolved."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.integration.processes import Gateway, Origin, eventually


def write(path: Path, port: int, upstreams: list[str]) -> Path:
    """A configuration in which every upstream, and so every route, has a name that must be resolved."""
    targets = "".join(f"  {name}: {{targets: [localhost:{port}]}}\n" for name in upstreams)
    routes = "".join(f"  - {{name: {name}, match: {{prefix: /{name}}}, upstream: {name}}}\n" for name in upstreams)
    path.write_text(
        "version: 1\nworkers: 2\nadmin: {bind: 127.0.0.1:0}\nlisteners: {public: {bind: 127.0.0.1:0}}\n"
        f"upstreams:\n{targets}routes:\n{routes}"
    )
    return path


def test_no_request_is_refused_for_want_of_a_resolved_name(tmp_path: Path, origin: Origin) -> None:
    path = write(tmp_path / "edge.yaml", origin.port, ["one"])
    with Gateway(path) as gateway:
        assert [gateway.get("/one")[0] for _ in range(8)] == [200] * 8
        names = ["one", *(f"new{number}" for number in range(8))]
        write(path, origin.port, names)
        gateway.signal(signal.SIGHUP)
        eventually(lambda: {row["version"] for row in gateway.admin("/status")[1]["workers"]} == {2})
        assert [gateway.get(f"/{name}")[0] for name in names for _ in range(2)] == [200] * 18
