"""A real gateway and what is around it: the admin pages, systemd, log files, the commands, memory."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.integration.processes import PATIENCE, Gateway, Origin, eventually, write_config

PREPARE = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
fd = int(sys.argv[1])
if fd != 3:
    os.dup2(fd, 3)
os.set_inheritable(3, True)
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_the_admin_pages(config: Path) -> None:
    with Gateway(config) as gateway:
        gateway.get()
        assert gateway.admin("/livez") == (200, {"status": "alive"})
        assert gateway.admin("/readyz") == (200, {"status": "ready", "detail": "2 of 2 workers are ready"})
        status = gateway.admin("/status")[1]
        assert status["listeners"][0]["address"] == f"127.0.0.1:{gateway.port()}"
        assert status["supervisor"] == gateway.pid
        rows = gateway.admin("/workers")[1]["workers"]
        assert sum(row["requests"] for row in rows) == 1
        assert gateway.admin("/nothing") == (404, {"status": 404, "detail": "Not Found"})


def test_metrics_are_classic_text_or_openmetrics(config: Path) -> None:
    with Gateway(config) as gateway:
        gateway.get()
        eventually(lambda: "http_server_request_duration_seconds_count{" in gateway.admin("/metrics")[1])
        text = gateway.admin("/metrics", Accept="application/openmetrics-text; version=1.0.0")[1]
        assert text.endswith("# EOF\n")
        assert 'worker="0"' in gateway.admin("/metrics?by=worker")[1]
        assert "# EOF" not in gateway.admin("/metrics", Accept="text/plain")[1]


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Host": "evil.test"}, 421), ({"Origin": "http://evil.test"}, 403), ({"Transfer-Encoding": "chunked"}, 413)],
)
def test_strangers_are_refused(config: Path, headers: dict[str, str], status: int) -> None:
    with Gateway(config) as gateway:
        assert gateway.admin("/reload", "POST", **headers)[0] == status
        assert gateway.admin("/status")[1]["config"]["version"] == 1


def test_an_endless_head_is_cut(config: Path) -> None:
    with Gateway(config) as gateway, socket.create_connection(("127.0.0.1", gateway.port("admin")), PATIENCE) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ")
        with pytest.raises(OSError):
            for _ in range(1000):
                client.sendall(b"x" * 4096)
        assert gateway.admin("/livez")[0] == 200


def test_a_token_is_demanded_and_the_commands_find_it(tmp_path: Path, origin: Origin) -> None:
    path = write_config(tmp_path / "edge.yaml", origin.port)
    secret = "a-token-of-enough-length-0123456789"
    (tmp_path / "token").write_text(secret + "\n")
    path.write_text(
        path.read_text().replace(
            "bind: 127.0.0.1:0}\nlisteners", "bind: 127.0.0.1:0, token: '${file:token}'}\nlisteners"
        )
    )
    with Gateway(path) as gateway:
        assert gateway.admin("/status")[0] == 401
        assert gateway.admin("/readyz")[0] == 200
        assert gateway.admin("/status", Authorization=f"Bearer {secret}")[0] == 200
        assert gateway.command("status").returncode == 1
        assert gateway.command("status", "--token-file", str(tmp_path / "token")).returncode == 0
        assert gateway.command("status", "-c", str(path)).returncode == 0
        assert secret not in gateway.errors.read_text()


def test_the_commands(config: Path) -> None:
    with Gateway(config) as gateway:
        assert gateway.command("health").stdout.startswith("ready")
        rows = json.loads(gateway.command("workers", "-o", "json", "--interval", "0.1").stdout)
        assert [row["pid"] for row in rows] == gateway.workers()
        table = gateway.command("workers", "--interval", "0.1").stdout
        assert all(str(pid) in table for pid in gateway.workers())
        assert str(gateway.port()) in gateway.command("status").stdout


def test_systemd_is_told_every_step(config: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(PATIENCE)
        with Gateway(config, NOTIFY_SOCKET=str(tmp_path / "notify")) as gateway:
            assert receiver.recv(200) == b"READY=1\nSTATUS=Serving with 2 workers"
            gateway.signal(signal.SIGHUP)
            assert receiver.recv(200).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert receiver.recv(200) == b"READY=1\nSTATUS=Serving configuration 2 with 2 workers"
            gateway.signal(signal.SIGTERM)
            assert receiver.recv(200).startswith(b"STOPPING=1")
            assert gateway.wait() == 0


def test_systemd_s_watchdog_is_fed(config: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(PATIENCE)
        with Gateway(config, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000"):
            seen = [receiver.recv(200) for _ in range(4)]
            assert seen.count(b"WATCHDOG=1") >= 3


def test_a_socket_of_systemd_serves_every_worker(tmp_path: Path, origin: Origin) -> None:
    import sys

    path = write_config(tmp_path / "edge.yaml", origin.port, listeners="public: {bind: 127.0.0.1:1}")
    with socket.create_server(("127.0.0.1", 0)) as given:
        script = [sys.executable, "-c", PREPARE, str(given.fileno())]
        with Gateway(
            path, wrapper=script, pass_fds=[given.fileno()], LISTEN_FDS="1", LISTEN_FDNAMES="public"
        ) as gateway:
            assert gateway.port() == given.getsockname()[1]
            assert gateway.get()[0] == 200
            os.kill(gateway.workers()[0], signal.SIGKILL)
            assert [gateway.get()[0] for _ in range(20)] == [200] * 20


def test_log_files_are_reopened(tmp_path: Path, origin: Origin) -> None:
    path = write_config(tmp_path / "edge.yaml", origin.port, more="log: {file: gateway.log}\n")
    where = tmp_path / "gateway.log"
    with Gateway(path) as gateway:
        assert "worker started" in where.read_text()
        where.rename(tmp_path / "gateway.log.1")
        gateway.signal(signal.SIGUSR1)
        eventually(where.exists)
        os.kill(gateway.workers()[0], signal.SIGKILL)
        eventually(lambda: "worker died" in where.read_text())
        assert "worker died" not in (tmp_path / "gateway.log.1").read_text()


def test_every_line_of_the_log_is_json(config: Path) -> None:
    with Gateway(config) as gateway:
        gateway.signal(signal.SIGHUP)
        gateway.get()
        gateway.signal(signal.SIGTERM)
        gateway.wait()
        lines = gateway.log()
        assert lines[-1]["event"] == "stopped"
        assert all({"ts", "level", "event"} <= line.keys() for line in lines)


def test_a_unix_listener_and_its_end(tmp_path: Path, origin: Origin) -> None:
    where = tmp_path / "public.sock"
    path = write_config(tmp_path / "edge.yaml", origin.port, listeners=f"public: {{bind: 'unix:{where}'}}")
    with Gateway(path) as gateway:
        assert gateway.addresses["public"] == f"unix:{where}"
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(where))
            client.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
    assert not where.exists()


def test_an_idle_worker_is_small(config: Path) -> None:
    with Gateway(config) as gateway:
        for pid in gateway.workers():
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            pss = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
            assert pss < 40 * 1024
