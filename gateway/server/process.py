"""Start a child that cannot outlive its parent and inherits none of its signal handling.

Strategy: signals are blocked around fork, so that no byte of a child's signal lands in the parent's wake-up pipe; the
child names itself, asks the kernel for SIGTERM on its parent's death, restores the dispositions, runs one function and
leaves through os._exit: nothing of the parent's clean-up (sockets to unlink, buffers to flush) runs twice.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_NAME = 15
CRASHED = 70  # EX_SOFTWARE of sysexits.h: an exception left the child's main function

_libc = ctypes.CDLL(None, use_errno=True)
_ALL_SIGNALS = signal.valid_signals()


def name_process(name: str) -> None:
    """Set the name that ps -o comm and top show; the kernel keeps 15 bytes."""
    _libc.prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def spawn(main: Callable[[], int], name: str) -> int:
    """Fork a child that runs `main` and exits with what it returns; return its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS)
    try:
        pid = os.fork()
        if pid:
            return pid
        code = CRASHED
        try:
            _become_child(name, parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            code = main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:  # noqa: BLE001 - nothing may unwind into the parent's stack
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _become_child(name: str, parent: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in _ALL_SIGNALS - {signal.SIGKILL, signal.SIGSTOP}:
        disposition = signal.getsignal(number)
        if disposition not in (signal.SIG_DFL, signal.SIG_IGN, None):
            signal.signal(number, signal.SIG_DFL)
    # Ctrl-C reaches the whole foreground process group; only the supervisor answers it, by a drain.
    # SIGHUP: a closing terminal; SIGQUIT: Ctrl-\. Neither is for a child.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    name_process(name)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above; nobody will send the signal
        os._exit(CRASHED)
    # A core file of a gateway holds tokens and keys; the operator who wants one raises the soft limit by hand.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def cpu_seconds(pid: int) -> float | None:
    """Return the user and system CPU time of a process, all threads, or None when it is gone (proc(5), stat)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None


def exit_reason(status: int) -> str:
    """Turn a wait status into words: `exit code 70`, `SIGKILL`."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
