"""Start, death and end of a real gateway."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.integration.processes import PATIENCE, Gateway, Origin, alive, environment, eventually, write_config


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", "run", *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_it_says_where_it_listens_and_serves_there(config: Path) -> None:
    with Gateway(config) as gateway:
        assert gateway.output[0].startswith("public   http://127.0.0.1:")
        assert gateway.output[0].rstrip().endswith("-> 1 route")
        assert gateway.output[-1].split() == ["workers", "2"]
        assert gateway.get() == (200, b'{"from": "origin"}')
        names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in gateway.children()}
        assert names == {"crossway/w0", "crossway/w1", "crossway/admin"}
        assert len(os.listdir(f"/proc/{gateway.pid}/task")) == 1


def test_a_missing_file_exits_2_with_one_line(tmp_path: Path) -> None:
    done = run("-c", str(tmp_path / "absent.yaml"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_an_invalid_file_exits_2_with_every_place(tmp_path: Path) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text("version: 1\nlistners: {}\nroutes: 5\n")
    done = run("-c", str(path))
    assert done.returncode == 2
    assert f"{path}:2:1" in done.stderr
    assert f"{path}:3:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_named(tmp_path: Path, origin: Origin) -> None:
    path = write_config(tmp_path / "edge.yaml", 9, listeners=f"public: {{bind: 127.0.0.1:{origin.port}}}")
    done = run("-c", str(path))
    assert done.returncode == 1
    assert f"listener public: cannot bind 127.0.0.1:{origin.port}" in done.stderr


def test_the_number_of_workers_on_the_command_line_wins(config: Path) -> None:
    with Gateway(config, "--workers", "1") as gateway:
        assert len(gateway.workers()) == 1


def test_a_killed_worker_is_back_within_a_second_and_nobody_is_refused(config: Path) -> None:
    with Gateway(config) as gateway:
        before = gateway.admin("/metrics")[1]
        first = gateway.workers()
        os.kill(first[0], signal.SIGKILL)
        statuses = [gateway.get()[0] for _ in range(50)]
        assert statuses == [200] * 50
        second = eventually(lambda: [pid for pid in gateway.workers() if pid not in first])
        assert gateway.workers() == [second[0], first[1]]
        died = next(line for line in gateway.log() if line["event"] == "worker died, starting its successor")
        assert (died["slot"], died["reason"]) == (0, "SIGKILL")
        assert died["delay"] <= 0.1
        assert counter(gateway.admin("/metrics")[1], "requests") >= counter(before, "requests") + 50
        assert counter(gateway.admin("/metrics")[1], "worker_restarts") == 1


def counter(text: str, name: str) -> float:
    return float(next(line for line in text.splitlines() if line.startswith(f"crossway_{name}_total ")).split()[1])


def test_every_worker_at_once_may_die(config: Path) -> None:
    with Gateway(config) as gateway:
        for _ in range(3):
            first = eventually(gateway.workers)
            for pid in first:
                os.kill(pid, signal.SIGKILL)
            assert gateway.get()[0] == 200
            # All are new: one that is dead but not missed yet cannot be killed again.
            eventually(lambda first=first: (now := set(gateway.workers())) and not now & set(first))


def test_the_admin_process_is_replaced_on_its_socket(config: Path) -> None:
    with Gateway(config) as gateway:
        admin = next(
            pid for pid in gateway.children() if Path(f"/proc/{pid}/comm").read_text().strip() == "crossway/admin"
        )
        os.kill(admin, signal.SIGKILL)
        assert gateway.admin("/livez") == (200, {"status": "alive"})
        assert gateway.get()[0] == 200


def test_workers_do_not_outlive_a_killed_supervisor(config: Path) -> None:
    with Gateway(config) as gateway:
        children, port = gateway.children(), gateway.port()
        gateway.process.kill()
        gateway.wait()
        eventually(lambda: not any(alive(pid) for pid in children), "the end of the orphans")
        with socket.socket() as again:
            again.bind(("127.0.0.1", port))


def test_a_request_in_flight_survives_sigterm(config: Path, origin: Origin) -> None:
    with Gateway(config) as gateway:
        idle, busy = gateway.connect(), gateway.connect()
        idle.request("GET", "/x")
        idle.getresponse().read()
        busy.request("GET", "/held")
        assert origin.held.acquire(timeout=PATIENCE)
        gateway.signal(signal.SIGTERM)
        eventually(lambda: gateway.admin("/readyz")[0] == 503)
        assert gateway.admin("/livez")[0] == 200
        eventually(lambda: refused(gateway.port()), "the end of accepting")
        assert idle.sock is not None
        idle.sock.settimeout(PATIENCE)
        assert idle.sock.recv(1) == b""
        origin.release.set()
        response = busy.getresponse()
        assert (response.status, response.read()) == (200, b'{"from": "origin"}')
        assert response.headers["connection"] == "close"
        assert gateway.wait() == 0
        assert gateway.log()[-1]["event"] == "stopped"
        busy.close()
        idle.close()


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return True
    return False


def test_the_delay_is_for_load_balancers(tmp_path: Path, origin: Origin) -> None:
    path = write_config(tmp_path / "edge.yaml", origin.port, more="drain: {delay: 500ms}\n")
    with Gateway(path) as gateway:
        gateway.signal(signal.SIGTERM)
        eventually(lambda: gateway.admin("/readyz")[0] == 503)
        assert gateway.get()[0] == 200
        assert gateway.wait() == 0


def test_the_deadline_cuts_what_does_not_finish_and_says_so(tmp_path: Path, origin: Origin) -> None:
    path = write_config(tmp_path / "edge.yaml", origin.port, more="drain: {deadline: 300ms}\n")
    with Gateway(path) as gateway:
        busy = gateway.connect()
        busy.request("GET", "/held")
        assert origin.held.acquire(timeout=PATIENCE)
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
        with pytest.raises((http.client.HTTPException, OSError)):
            busy.getresponse()
        assert "exchange cut off at the end of the drain" in gateway.events()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(config: Path, origin: Origin, number: signal.Signals) -> None:
    with Gateway(config) as gateway:
        busy = gateway.connect()
        busy.request("GET", "/held")
        assert origin.held.acquire(timeout=PATIENCE)
        gateway.signal(number)
        eventually(lambda: gateway.admin("/readyz")[0] == 503)
        gateway.signal(number)
        assert gateway.wait() == 0  # its patience is shorter than the deadline of 30 s
        assert "exchange cut off at the end of the drain" in gateway.events()
        busy.close()


def test_a_hung_worker_is_found(config: Path) -> None:
    with Gateway(config) as gateway:
        first = gateway.workers()
        os.kill(first[0], signal.SIGSTOP)
        second = eventually(lambda: [pid for pid in gateway.workers() if pid not in first])
        assert second
        assert "worker hangs and is replaced" in gateway.events()


def test_load_goes_on_while_workers_die(config: Path) -> None:
    """Only exchanges in flight on the killed worker may fail, and those fail visibly."""
    with Gateway(config) as gateway:
        stop, failures, done = threading.Event(), [], []

        def client() -> None:
            while not stop.is_set():
                try:
                    done.append(gateway.get()[0])
                except (OSError, http.client.HTTPException) as error:
                    failures.append(error)

        threads = [threading.Thread(target=client) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            victim = eventually(gateway.workers)[0]
            reached = len(done)
            os.kill(victim, signal.SIGKILL)
            eventually(lambda victim=victim: gateway.workers() and victim not in gateway.workers())
            eventually(lambda reached=reached: len(done) > reached + 20)
        stop.set()
        for thread in threads:
            thread.join()
        assert set(done) == {200}
        assert not any(isinstance(error, ConnectionRefusedError) for error in failures)
        assert len(failures) <= 3 * len(threads)
