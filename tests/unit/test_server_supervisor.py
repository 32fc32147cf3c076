"""The supervisor with real processes and small programs in them: start, death, reload, drain."""

import os
import signal
import socket
from pathlib import Path

import pytest

from gateway.server.children import LONGEST_DELAY, Slot
from gateway.server.reload import Request
from gateway.server.report import describe
from tests.unit.server_fakes import Running, running, write_config


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_config(tmp_path / "edge.yaml")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_every_slot_has_a_worker_and_the_readiness_is_announced_once(path: Path) -> None:
    with running(path) as run:
        run.until(lambda: run.ready)
        assert run.ready == 1
        assert {run.ask()[0] for _ in range(60)} == {0, 1}


def test_a_killed_worker_is_replaced_and_its_backlog_is_served(path: Path) -> None:
    write_config(path, workers=1)
    with running(path) as run:
        (first,) = run.pids()
        os.kill(first, signal.SIGKILL)
        run.until(lambda: run.supervisor.slots[0].child is None)
        slot, second, _ = run.ask()  # connected while nobody was there to accept
        assert (slot, second != first) == (0, True)
        assert run.memory.folded == [0]
        assert run.supervisor.restarts == 1


def test_a_crash_loop_is_slowed_down() -> None:
    slot = Slot(0)
    delays = [slot.delay_after(0.1) for _ in range(9)]
    assert delays[:4] == [0.05, 0.1, 0.2, 0.4]
    assert delays[-1] == LONGEST_DELAY
    assert slot.delay_after(60) == 0.05


def test_a_crash_looping_worker_is_repaired_by_a_reload(path: Path) -> None:
    with running(path) as run:
        write_config(path, behaviour="dies-at-start")
        run.reload()
        for pid in run.pids():
            os.kill(pid, signal.SIGKILL)
        run.until(lambda: run.supervisor.restarts >= 6)
        write_config(path, behaviour="good")
        run.reload()
        while not run.supervisor.outcome.ok:  # a worker died in the middle of it: whoever asked sees that, and asks again
            run.reload()
        run.until(run.pids)
        assert run.ask()[2] == 3


def test_a_hung_worker_is_replaced(path: Path) -> None:
    write_config(path, workers=1)
    with running(path, silence=0.6) as run:
        (first,) = run.pids()
        os.kill(first, signal.SIGSTOP)
        run.until(lambda: run.pids() not in ([], [first]))
        assert run.ask()[1] != first


def test_a_child_that_is_not_ours_is_reaped_and_ignored(path: Path) -> None:
    with running(path) as run:
        before = run.pids()
        stranger = os.fork()
        if stranger == 0:
            os._exit(7)
        run.until(lambda: not Path(f"/proc/{stranger}").exists())
        assert run.pids() == before


def test_the_admin_process_is_restarted_on_the_same_socket(path: Path) -> None:
    with running(path) as run:
        first = run.until(lambda: run.supervisor.admin).pid
        os.kill(first, signal.SIGKILL)
        run.until(lambda: run.supervisor.admin is not None and run.supervisor.admin.pid != first)


def test_reload_changes_every_worker(path: Path) -> None:
    with running(path) as run:
        pids = run.pids()
        write_config(path, behaviour="other")
        run.reload()
        assert run.pids() == pids
        assert {run.ask()[2] for _ in range(20)} == {2}
        assert run.supervisor.outcome.ok
        assert [row["version"] for row in describe(run.supervisor)["workers"]] == [2, 2]


@pytest.mark.parametrize("failure", ["prepare-refused", "prepare-dies", "compiler-dies", "invalid", "port"])
def test_a_reload_that_one_worker_cannot_follow_changes_none(path: Path, failure: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, running(path) as run:
        digest, port = run.supervisor.config.digest, taken.getsockname()[1]
        if failure == "invalid":
            path.write_text("version: 1\nroutes: nonsense\n")
        elif failure == "port":
            write_config(path, extra=f", second: {{bind: '127.0.0.1:{port}'}}")
        else:
            write_config(path, behaviour=failure, extra=", second: {bind: '127.0.0.1:0'}")
        before = descriptors()
        run.reload()
        run.until(run.pids)
        assert run.supervisor.config.digest == digest
        assert run.supervisor.version == 1
        assert not run.supervisor.outcome.ok
        assert run.supervisor.outcome.text
        assert {run.ask()[2] for _ in range(20)} == {1}
        assert list(run.supervisor.listeners) == ["public"]
        run.until(lambda: len(run.supervisor.children) == 3)
        assert descriptors() == before
        write_config(path, behaviour="repaired")
        run.reload()
        assert run.supervisor.outcome.ok


def test_listeners_come_and_go_with_a_reload(path: Path) -> None:
    with running(path) as run:
        write_config(path, extra=", second: {bind: '127.0.0.1:0'}")
        run.reload()
        assert {run.ask("second")[0] for _ in range(60)} == {0, 1}
        port = run.listener("second").address.port
        write_config(path)
        run.reload()
        run.until(lambda: not run.supervisor.reload)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        assert run.ask()[2] == 3


def test_the_number_of_workers_follows_the_file(path: Path) -> None:
    with running(path) as run:
        write_config(path, workers=4)
        run.reload()
        run.until(run.pids)
        assert {run.ask()[0] for _ in range(200)} == {0, 1, 2, 3}
        write_config(path, workers=1)
        run.reload()
        run.until(lambda: len(run.supervisor.children) == 2)
        assert {run.ask()[0] for _ in range(20)} == {0}
        write_config(path, workers=2)
        run.reload()
        run.until(run.pids)
        assert {run.ask()[0] for _ in range(60)} == {0, 1}


def test_reloads_leak_no_descriptors(path: Path) -> None:
    with running(path) as run:
        counts = []
        for number in range(8):
            write_config(
                path, behaviour=f"number-{number}", extra=", second: {bind: '127.0.0.1:0'}" if number % 2 else ""
            )
            run.reload()
            run.until(lambda: len(run.supervisor.children) == 3)
            (worker, *_) = run.pids()
            counts.append((descriptors(), len(os.listdir(f"/proc/{worker}/fd"))))
        assert counts[0] == counts[2] == counts[4] == counts[6]


def test_reloads_asked_for_during_one_are_one_more(path: Path) -> None:
    with running(path) as run:
        write_config(path, behaviour="other")
        for _ in range(5):
            run.supervisor.request_reload(Request("test"))
        run.until(lambda: run.supervisor.reload is None)
        assert run.supervisor.version == 3


def test_a_reload_that_expects_another_configuration_is_refused(path: Path) -> None:
    with running(path) as run:
        run.supervisor.request_reload(Request("test", expect="0" * 64))
        assert run.supervisor.reload is None
        run.supervisor.request_reload(Request("test", expect=run.supervisor.config.digest))
        assert run.supervisor.reload is not None
        run.until(lambda: run.supervisor.reload is None)
        assert run.supervisor.outcome.ok


def test_sigterm_drains_and_ends_with_0(path: Path) -> None:
    with running(path) as run:
        port = run.listener().address.port
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.until_exit() == 0
        assert not run.supervisor.children
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_readiness_goes_before_accepting_stops(path: Path) -> None:
    path.write_text(path.read_text() + "drain: {delay: 300ms}\n")
    with running(path) as run:
        os.kill(os.getpid(), signal.SIGTERM)
        run.until(lambda: run.supervisor.shutdown)
        assert describe(run.supervisor)["phase"] == "draining"
        assert run.ask()[2] == 1
        assert run.until_exit() == 0


def test_a_second_sigterm_does_not_wait_for_the_deadline(path: Path) -> None:
    write_config(path, behaviour="never-finishes")
    with running(path) as run:
        os.kill(os.getpid(), signal.SIGTERM)
        run.until(lambda: run.supervisor.shutdown)
        run.until(lambda: any(child.condition == "draining" for child in run.supervisor.children.values()))
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.until_exit() == 0  # its patience is shorter than the deadline of 30 s


def test_the_deadline_ends_a_drain(path: Path) -> None:
    write_config(path, behaviour="never-finishes")
    path.write_text(path.read_text() + "drain: {deadline: 200ms}\n")
    with running(path) as run:
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.until_exit() == 0


def test_a_unix_listener_is_removed_at_the_end(tmp_path: Path) -> None:
    where = tmp_path / "public.sock"
    path = write_config(tmp_path / "edge.yaml", bind=f"unix:{where}")
    with running(path) as run:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(where))
            run.until(lambda: client.recv(100, socket.MSG_DONTWAIT | socket.MSG_PEEK) if _readable(client) else b"")
        os.kill(os.getpid(), signal.SIGTERM)
        run.until_exit()
    assert not where.exists()


def _readable(sock: socket.socket) -> bool:
    import select

    return bool(select.select([sock], [], [], 0)[0])


def checked(path: Path, upstream: str = "good", interval: str = "5s") -> None:
    """Give the configuration's upstream a health check."""
    text = write_config(path, behaviour=upstream).read_text()
    path.write_text(text.replace("[127.0.0.1:9]", f"[127.0.0.1:9], health: {{check: {{tcp: {{}}, interval: {interval}}}}}"))


def checker(run: Running) -> int:
    """The process id of the checker, 0 while there is none that is ready."""
    child = run.supervisor.checking.child
    return child.pid if child is not None and child.condition == "ready" else 0


def test_a_checker_runs_as_long_as_there_is_something_to_check(path: Path) -> None:
    with running(path) as run:
        run.until(lambda: run.ready)
        assert checker(run) == 0 and describe(run.supervisor)["checker"] is None
        checked(path)
        run.reload()
        pid = run.until(lambda: checker(run))
        assert describe(run.supervisor)["checker"]["pid"] == pid
        write_config(path)
        run.reload()
        run.until(lambda: run.supervisor.checking.child is None)
        assert not Path(f"/proc/{pid}").exists() and -1 in run.memory.folded


def test_a_checker_is_replaced_when_its_checks_change_and_only_then(path: Path) -> None:
    checked(path)
    with running(path) as run:
        first = run.until(lambda: checker(run))
        checked(path)
        path.write_text(path.read_text().replace("workers: 2", "workers: 1"))
        run.reload()
        assert checker(run) == first
        checked(path, interval="9s")
        run.reload()
        second = run.until(lambda: checker(run) not in (0, first) and checker(run))
        assert not Path(f"/proc/{first}").exists() and second != first


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_checker_that_dies_or_hangs_is_replaced(path: Path, number: signal.Signals) -> None:
    checked(path)
    with running(path, silence=1.0) as run:
        first = run.until(lambda: checker(run))
        os.kill(first, number)
        run.until(lambda: checker(run) not in (0, first))
        assert not Path(f"/proc/{first}").exists()


def test_a_stopping_gateway_starts_no_checker(path: Path) -> None:
    checked(path)
    with running(path) as run:
        first = run.until(lambda: checker(run))
        os.kill(os.getpid(), signal.SIGTERM)
        run.until(lambda: run.supervisor.shutdown is not None)
        os.kill(first, signal.SIGKILL)
        assert run.until_exit() == 0
