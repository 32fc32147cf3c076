"""What surrounds the processes: CPU quotas, systemd, sockets, log lines, exit reasons."""

import io
import json
import logging
import os
import signal
import socket
from pathlib import Path

import pytest

from gateway.config import cpus
from gateway.config.web import Bind
from gateway.server import log, systemd
from gateway.server.process import cpu_seconds, exit_reason, spawn
from gateway.server.sockets import BindError, adopt, match_inherited, open_listener


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc/self whose cgroup mounts are below tmp_path."""
    (tmp_path / "proc").mkdir()
    return tmp_path / "proc"


def mount(proc: Path, lines: list[str], cgroups: str) -> None:
    (proc / "mountinfo").write_text("\n".join(lines))
    (proc / "cgroup").write_text(cgroups)


def quota(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / f"cpu.{name}").write_text(text)


def test_the_tightest_quota_above_us_counts(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "cg"
    mount(proc, [f"30 1 0:26 / {root} rw,nosuid - cgroup2 cgroup2 rw"], "0::/pod/app\n")
    quota(root, max="max 100000")
    quota(root / "pod", max="250000 100000")
    quota(root / "pod/app", max="400000 100000")
    assert cpus.cpu_quota(proc) == 2.5


def test_no_quota_is_none(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "cg"
    mount(proc, [f"30 1 0:26 / {root} rw - cgroup2 cgroup2 rw"], "0::/app\n")
    quota(root / "app", max="max 100000")
    assert cpus.cpu_quota(proc) is None
    assert cpus.available_cpus(proc) == len(os.sched_getaffinity(0))


def test_half_a_cpu_is_one_worker(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "cg"
    mount(proc, [f"30 1 0:26 / {root} rw - cgroup2 cgroup2 rw"], "0::/\n")
    quota(root, max="50000 100000")
    assert cpus.available_cpus(proc) == 1


def test_version_1_and_a_container_that_sees_only_its_own_subtree(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "cpu"
    line = f"31 1 0:27 /docker/abc {root} rw - cgroup cgroup rw,cpu,cpuacct"
    mount(proc, [line], "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n")
    quota(root, cfs_quota_us="300000\n", cfs_period_us="100000\n")
    assert cpus.cpu_quota(proc) == 3.0
    quota(root, cfs_quota_us="-1\n", cfs_period_us="100000\n")
    assert cpus.cpu_quota(proc) is None


@pytest.mark.parametrize("text", ["", "nonsense", "100000", "x 0", "100000 0", "-5 100000"])
def test_a_strange_quota_file_is_no_limit_or_a_sane_one(proc: Path, tmp_path: Path, text: str) -> None:
    root = tmp_path / "cg"
    mount(proc, [f"30 1 0:26 / {root} rw - cgroup2 cgroup2 rw", "broken line"], "0::/app/../..\n")
    quota(root, max=text)
    assert cpus.cpu_quota(proc) in (None, 1.0)
    assert cpus.available_cpus(proc) >= 1


def test_notifications_reach_the_socket_systemd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(tmp_path / "notify"))
    receiver.settimeout(5)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier = systemd.Notifier.from_environment()
    assert notifier.watchdog == 2.0
    assert "NOTIFY_SOCKET" not in os.environ
    notifier.ready("Serving")
    assert receiver.recv(100) == b"READY=1\nSTATUS=Serving"
    notifier.reloading()
    assert receiver.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    receiver.close()
    notifier.ping()  # nobody listens, nothing happens
    notifier.close()


def test_a_watchdog_meant_for_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert systemd.Notifier.from_environment().watchdog is None


def test_inherited_sockets_are_only_taken_when_they_are_for_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "3")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert systemd.inherited_sockets() == []
    assert "LISTEN_FDS" not in os.environ


def test_an_inherited_socket_is_matched_by_name_and_by_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        given = [("public", first), ("", second)]
        other = Bind(*second.getsockname())
        assert match_inherited("public", Bind("127.0.0.1", 8080), given) == [first]
        assert match_inherited("other", other, given) == [second]
        assert given == []
        listener = adopt("other", other, 3, [second])
        assert [listener.sockets[slot] for slot in range(3)] == [second] * 3
        assert listener.address == other


def test_every_slot_gets_a_socket_of_one_port() -> None:
    listener = open_listener("public", Bind("127.0.0.1", 0), 3)
    ports = {sock.getsockname()[1] for sock in listener.sockets}
    assert ports == {listener.address.port}
    assert len({sock.fileno() for sock in listener.sockets}) == 3
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", listener.address.port))
    listener.listen()
    socket.create_connection(("127.0.0.1", listener.address.port)).close()
    listener.close()


def test_a_second_gateway_on_the_same_port_is_refused() -> None:
    listener = open_listener("public", Bind("127.0.0.1", 0), 1)
    listener.listen()
    with pytest.raises(BindError, match="public: cannot bind 127.0.0.1:[0-9]+: it is in use"):
        open_listener("public", Bind("127.0.0.1", listener.address.port), 1)
    listener.close()


def test_a_stale_unix_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    where = tmp_path / "admin.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(where))
    stale.close()
    listener = open_listener("admin", Bind(path=str(where)), 1, mode=0o600)
    listener.listen()
    assert where.stat().st_mode & 0o777 == 0o600
    with pytest.raises(BindError, match="in use"):
        open_listener("admin", Bind(path=str(where)), 1)
    listener.close()
    assert not where.exists()
    where.write_text("not a socket")
    with pytest.raises(BindError, match="in use"):
        open_listener("admin", Bind(path=str(where)), 1)
    assert where.read_text() == "not a socket"


def test_a_log_line_is_one_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    sink = logging.StreamHandler(stream)
    sink.setFormatter(log.JsonLines())
    logger = logging.Logger("crossway")  # noqa: LOG001 - one that no other test has
    logger.addHandler(sink)
    try:
        raise RuntimeError("broken\nin two lines")
    except RuntimeError:
        logger.exception("worker died", extra={"slot": 3, "reason": "SIGKILL"})
    (line,) = stream.getvalue().splitlines()
    parsed = json.loads(line)
    assert parsed["event"] == "worker died"
    assert (parsed["level"], parsed["slot"], parsed["reason"]) == ("error", 3, "SIGKILL")
    assert parsed["ts"].endswith("Z")
    assert "broken" in parsed["exception"]


def test_a_log_file_is_reopened_by_name(tmp_path: Path) -> None:
    path = tmp_path / "crossway.log"
    sink = log.ReopenedFile(path)
    sink.setFormatter(log.JsonLines())
    logger = logging.Logger("crossway")  # noqa: LOG001 - one that no other test has
    logger.addHandler(sink)
    logger.warning("before")
    path.rename(tmp_path / "crossway.log.1")
    sink.reopen()
    logger.warning("after")
    assert "before" in (tmp_path / "crossway.log.1").read_text()
    assert json.loads(path.read_text())["event"] == "after"


def test_a_child_has_its_own_name_and_default_signals() -> None:
    read, write = os.pipe()
    old = signal.signal(signal.SIGTERM, lambda *_: None)

    def main() -> int:
        default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        os.write(write, f"{Path('/proc/self/comm').read_text().strip()} {default}".encode())
        return 7

    try:
        pid = spawn(main, "crossway/w0")
        assert exit_reason(os.waitpid(pid, 0)[1]) == "exit code 7"
        assert os.read(read, 100) == b"crossway/w0 True"
    finally:
        signal.signal(signal.SIGTERM, old)


def test_an_exception_in_a_child_stays_there(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise RuntimeError("planted")

    assert exit_reason(os.waitpid(spawn(main, "x"), 0)[1]) == "exit code 70"
    assert "planted" in capfd.readouterr().err


def test_the_cpu_time_of_a_process_that_is_gone_is_unknown() -> None:
    assert (cpu_seconds(os.getpid()) or 0) > 0
    pid = spawn(lambda: 0, "x")
    os.waitpid(pid, 0)
    assert cpu_seconds(pid) is None
