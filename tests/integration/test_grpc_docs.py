"""The example of docs/grpc.md does what the page says, with every file as it stands there but for the ports."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

from tests.integration.processes import PATIENCE, ROOT, Gateway, environment, eventually


def blocks() -> list[str]:
    """The pieces of code in "Try it"."""
    text = (ROOT / "docs" / "grpc.md").read_text().partition("\n## Try it\n")[2].partition("\n## ")[0]
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_example_of_the_page(tmp_path: Path) -> None:
    service, edge, client, printed = blocks()
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)          # grpc's servers share a port that is bound so
        kept.bind(("127.0.0.1", 0))
        port = str(kept.getsockname()[1])
        (tmp_path / "service.py").write_text(service.replace("9000", port))
        (tmp_path / "edge.yaml").write_text(edge.replace("9000", port).replace("8080", "0") + "admin: {bind: 127.0.0.1:0}\n")
        with subprocess.Popen([sys.executable, "service.py"], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL) as running:
            try:
                with Gateway(tmp_path / "edge.yaml") as gateway:
                    waited = client.replace("8080", str(gateway.port())).replace("timeout=5", f"timeout={PATIENCE}")
                    eventually(lambda: answers(int(port)), "the service")
                    done = run(tmp_path, waited)
            finally:
                running.kill()
    assert (done.stdout, done.stderr, done.returncode) == (printed, "", 0)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def run(folder: Path, client: str) -> subprocess.CompletedProcess[str]:
    (folder / "client.py").write_text(client)
    return subprocess.run([sys.executable, "client.py"], cwd=folder, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)
