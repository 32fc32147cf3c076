"""The journal: whole lines only, losses counted and recorded, and never a wait for the caller."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import stat
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway._speedups.journal import Journal, escape, timestamp


@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))))
@example(b"\xe2\x28\xa1\xf0\x9f\x98\xed\xa0\x80\xf4\x90\x80\x80\xc0\xaf\xc2")
@example(bytes(range(256)))
def test_escaped_text_reads_back_as_pythons_own_replacement(data: bytes) -> None:
    escaped = escape(data)
    assert json.loads(b'"' + escaped + b'"') == data.decode("utf-8", "replace")
    assert len(escaped) <= 6 * len(data)
    assert all(unit >= 0x20 and unit != 0x7F for unit in escaped)
    assert not any("\x80" <= char <= "\x9f" for char in escaped.decode())


def test_plain_text_is_copied() -> None:
    assert escape("Zürich 日本 / a".encode()) == "Zürich 日本 / a".encode()
    assert escape(b'"\\\n\r\t\x00\x1f\x7f\xc2\x9b') == rb"\"\\\n\r\t\u0000\u001f\u007f\u009b"


@pytest.mark.parametrize("odd", [b"\0", b"\x1f", b'"', b"\\", b"\x7f", b"\x80", b"\xff", "\u009b".encode(), "ü".encode(), b" ", b"~"])
def test_an_odd_byte_is_found_wherever_it_stands(odd: bytes) -> None:
    for length in range(36):
        for at in range(length + 1):
            data = b"a" * at + odd + b"b" * (length - at)
            assert json.loads(b'"' + escape(data) + b'"') == data.decode("utf-8", "replace"), (length, at)


@settings(max_examples=300)
@given(st.integers(0, 253402300799_999_999))
@example(951782399_999999)
@example(951868800_000000)
@example(1709164800_000001)
@example(4107542400_000000)
def test_timestamps_equal_the_calendar(unix_us: int) -> None:
    expected = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=unix_us)
    assert timestamp(unix_us) == expected.strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0")
    assert timestamp(unix_us - unix_us % 1_000_000) == timestamp(unix_us)[:20] + "000000Z"


def test_a_timestamp_before_1970_is_1970() -> None:
    assert timestamp(-1) == "1970-01-01T00:00:00.000000Z"


def records(path: Path) -> list[dict]:
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def eventually(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds; a machine that is busy elsewhere lets the flusher run when it can."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def test_records_arrive_in_order_with_their_mode(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    mask = os.umask(0)
    try:
        journal = Journal(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [journal.sequence_number() for _ in range(3)] == [1, 2, 3]
    for number in range(5000):
        assert journal.write(b'{"n":%d}' % number)
    assert journal.flush()
    assert [record["n"] for record in records(path)] == list(range(5000))
    assert journal.statistics == {"accepted": 5000, "written": 5000, "lost": 0, "failures": 0, "errno": 0, "buffered": 0}
    assert journal.close() and journal.close()
    assert not journal.write(b"{}") and journal.statistics["lost"] == 1


def test_records_are_written_without_being_asked(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a")
    journal.write(b"{}")
    eventually(lambda: (tmp_path / "a").stat().st_size)
    journal.close()


def test_a_line_end_in_a_record_does_not_split_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a")
    journal.write(b'{"a":\n1,\n"b":2}\n')
    journal.write(b"\n\n")
    journal.close()
    assert (tmp_path / "a").read_bytes() == b'{"a": 1, "b":2} \n  \n'


def test_the_descriptor_is_not_inherited_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    for name in ("link", "missing/dir", "."):
        with pytest.raises(OSError):
            Journal(tmp_path / name)
    with pytest.raises(ValueError, match="4096"):
        Journal(tmp_path / "a", capacity=100)
    before = set(os.listdir("/proc/self/fd"))
    journal = Journal(tmp_path / "a")
    opened = set(os.listdir("/proc/self/fd")) - before
    mine = [fd for fd in opened if os.path.exists(f"/proc/self/fd/{fd}")]
    assert mine and not any(os.get_inheritable(int(fd)) for fd in mine)
    journal.close()


def test_closing_gives_everything_back(tmp_path: Path) -> None:
    def figures() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    Journal(tmp_path / "a").close()
    before = figures()
    for _ in range(20):
        journal = Journal(tmp_path / "a")
        journal.write(b"{}")
        journal.reopen()
        journal.close()
        del journal
    assert figures() == before


def test_a_device_that_is_full_loses_with_a_count_and_blocks_nobody() -> None:
    journal = Journal("/dev/full", capacity=8192, worker=3)
    kept = sum(journal.write(b'{"n":%d}' % number) for number in range(3000))
    assert 0 < kept < 3000
    assert not journal.flush(0.05)
    eventually(lambda: journal.statistics["errno"])
    assert journal.statistics["errno"] == 28 and journal.statistics["lost"] == 3000 - kept
    assert not journal.close(0.05)


def limited_disk(path: Path, limit: int) -> int:
    """In a child: a file that cannot grow beyond `limit` bytes, then can."""
    journal = Journal(path, capacity=8192, worker=7)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    kept = sum(journal.write(b'{"n":%d}' % number) for number in range(3000))
    eventually(lambda: journal.statistics["errno"])
    full = journal.flush(0.05)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)        # not in the midst of an attempt
        between = file.read()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    again = journal.flush()
    last = journal.write(b'{"n":"last"}')
    closed = journal.close()
    whole_lines = len(between) <= limit and between.endswith(b"\n")
    return 0 if (not full and again and closed and last and whole_lines and kept < 3000) else 1


def test_a_write_cut_short_leaves_no_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            signal.alarm(30)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            code = limited_disk(path, 1001)
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    found = records(path)
    lost = [record for record in found if record.get("event") == "lost"]
    numbers = [record["n"] for record in found if "n" in record]
    assert numbers[-1] == "last" and numbers[:-1] == sorted(set(numbers[:-1]))
    assert sum(record["count"] for record in lost) == lost[-1]["lost_total"] == 3000 - len(numbers[:-1])
    assert {record["worker"] for record in lost} == {7} and {record["pid"] for record in lost} == {pid}
    assert all(record["time"].endswith("Z") for record in lost)


def test_a_pipe_without_a_reader_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    journal = Journal(path, capacity=8192)
    results = [journal.write(b'{"n":%d}' % number) for number in range(2000)]
    assert results[0] and not results[-1]
    assert journal.statistics["written"] == 0
    chunks: list[bytes] = []
    thread = threading.Thread(target=lambda: chunks.append(path.read_bytes()))      # waits for the journal to open its end
    thread.start()
    assert journal.flush()
    assert journal.write(b'{"n":"last"}') and journal.close()
    thread.join()
    found = [json.loads(line) for line in b"".join(chunks).splitlines()]
    assert [record["n"] for record in found if "n" in record] == [*range(sum(results)), "last"]
    assert sum(record["count"] for record in found if "event" in record) == results.count(False)


def test_a_pipe_whose_reader_sleeps_loses_but_does_not_block(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    journal = Journal(write, capacity=8192)
    line = b'{"pad":"' + b"x" * 5000 + b'"}'
    assert not journal.write(line), "longer than half of the buffer"
    results = [journal.write(b'{"n":%d,"pad":"%s"}' % (number, b"x" * 90)) for number in range(3000)]
    assert not all(results)
    os.close(write)
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.extend(iter(lambda: os.read(read, 65536), b"")))
    thread.start()
    assert journal.close()
    thread.join()
    os.close(read)
    found = [json.loads(row) for row in b"".join(got).splitlines()]
    assert sum(record.get("count", 0) for record in found) == results.count(False) + 1
    assert len([record for record in found if "n" in record]) == results.count(True)


def test_reopening_loses_and_splits_nothing(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    journal = Journal(path)
    number = 0
    for turn in range(10):
        for _ in range(500):
            assert journal.write(b'{"n":%d}' % number)
            number += 1
        path.rename(tmp_path / f"audit.{turn}")
        journal.reopen()
        assert journal.flush()
        assert path.exists()
    journal.close()
    files = [tmp_path / f"audit.{turn}" for turn in range(10)] + [path]
    assert [record["n"] for file in files for record in records(file)] == list(range(number))


def test_a_failed_reopening_goes_on_with_the_old_file(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    journal = Journal(folder / "audit")
    folder.rename(tmp_path / "moved")
    journal.reopen()
    journal.write(b'{"n":1}')
    eventually(lambda: (tmp_path / "moved" / "audit").stat().st_size and journal.statistics["errno"])
    assert not journal.flush(0.05)
    assert records(tmp_path / "moved" / "audit") == [{"n": 1}] and journal.statistics["errno"] == 2
    folder.mkdir()
    journal.write(b'{"n":2}')
    assert journal.flush()
    assert records(folder / "audit") + records(tmp_path / "moved" / "audit") in ([{"n": 2}, {"n": 1}], [{"n": 1}, {"n": 2}])
    assert (folder / "audit").exists()
    journal.close()


def test_a_torn_last_line_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    path.write_bytes(b'{"n":1}\n{"n":')
    journal = Journal(path)
    journal.write(b'{"n":3}')
    journal.close()
    assert path.read_bytes() == b'{"n":1}\n{"n":\n{"n":3}\n'


def test_several_processes_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    pids = []
    for worker in range(4):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(30)
                journal = Journal(path, worker=worker)
                for number in range(3000):
                    journal.write(b'{"w":%d,"n":%d,"pad":"%s"}' % (worker, number, b"x" * (number % 400)))
                    if number % 500 == 0:
                        journal.flush()
                code = 0 if journal.close() else 2
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    found = records(path)
    for worker in range(4):
        assert [record["n"] for record in found if record["w"] == worker] == list(range(3000))


def test_an_inherited_descriptor_is_not_reopened_nor_closed(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    journal = Journal(fd)
    journal.write(b"{}")
    journal.reopen()
    assert journal.close()
    os.write(fd, b"still open\n")
    os.close(fd)
    assert (tmp_path / "out").read_bytes() == b"{}\nstill open\n"


def test_a_journal_made_before_a_fork_works_in_every_child(tmp_path: Path) -> None:
    """No thread before the first record; a child has its own file, flusher and numbers, and repeats nothing of its parent."""
    path = tmp_path / "audit"
    threads = threading.active_count()
    journal = Journal(path)
    assert threading.active_count() == threads
    pids = []
    for turn in range(3):
        if turn == 2:
            assert journal.write(b'{"who":"parent"}')      # the last child is forked from a process with a flusher
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(30)
                first = journal.sequence_number()
                for number in range(500):
                    journal.write(b'{"who":"child","turn":%d,"n":%d}' % (turn, number))
                code = 0 if first == 1 and journal.flush() and journal.close() else 2
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 3
    assert journal.close()
    found = records(path)
    assert sum(record["who"] == "parent" for record in found) == 1 and len(found) == 1501
    for turn in range(3):
        assert [record["n"] for record in found if record.get("turn") == turn] == list(range(500))


def test_an_unused_journal_closes_without_a_thread(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a")
    (tmp_path / "a").unlink()
    assert journal.flush() and not (tmp_path / "a").exists()
    journal.reopen()
    assert journal.flush() and (tmp_path / "a").exists()
    assert journal.close()
