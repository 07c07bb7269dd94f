"""Starts the processes of a run, each with a log of its own, and ends them, with all that they have started in turn."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

GUARD_DIED = signal.SIGUSR1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, GUARD_DIED)
HEEDED = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # what nohup ignores stays so
PR_SET_PDEATHSIG = 1


class Failed(Exception):
    """The run can't go on; `log` names the log that tells why."""

    def __init__(self, reason: str, log: str | None = None) -> None:
        super().__init__(reason)
        self.log = log


class Stopped(BaseException):
    """A signal asked the launcher to stop."""


def heed(handler: Any) -> None:
    """Set a handler for the signals that end a run."""
    for number in HEEDED:
        signal.signal(number, handler)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Raise Stopped, once: what follows takes seconds, and must be whole."""
    heed(ignore)
    raise Stopped(number)


def ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing. With SIG_IGN in its place, Python would complain of a signal that came just before."""


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Let signals wait until what is in here is done."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def die_with_parent(number: int) -> None:
    """Ask for a signal when the parent dies (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


class Processes:
    """The processes of a run, in the session that this process leads."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.guard = run_dir, os.getppid()
        self.started: dict[int, str] = {}  # the names of the living, by process id
        self.statuses: dict[str, int] = {}  # of those that have ended, by name
        signal.signal(signal.SIGCHLD, self.reap)

    def load(self, kind: str) -> None:
        """Import nothing: each process is a fresh Python."""

    def start(self, name: str, command: Sequence[str], quiet: bool = True) -> None:
        """Start a command in the example's folder; unless it may talk to the terminal, it writes to its log."""
        self.fork(name, command, str(self.log(name)) if quiet else None, begin=os.O_TRUNC)

    def fork(self, name: str, command: Sequence[str], log: str | None, begin: int = 0) -> None:
        with signals_wait():  # a child that ran our handlers would take itself for the launcher
            if pid := os.fork():
                self.started[pid] = name
                self.reap()  # it may have ended before it was noted
                return
            heed(signal.SIG_DFL)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            die_with_parent(signal.SIGKILL)
            if log:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | begin, 0o666)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
            os.chdir(self.run_dir.parents[1])  # relative paths in the example's code begin there
            with contextlib.suppress(OSError):  # Linux: when memory runs out, a client's work goes first
                Path("/proc/self/oom_score_adj").write_text("300" if name else "600")
            self.become(command)
        except OSError as error:
            os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)

    def become(self, command: Sequence[str]) -> None:
        os.execvp(command[0], command)

    def reap(self, *_: Any) -> None:
        """Note which processes have ended. At once: to Flower, one that nobody has waited for is alive."""
        for pid in list(self.started):
            with contextlib.suppress(ChildProcessError, KeyError):  # a signal has come in between, and it is done
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[self.started.pop(pid)] = os.waitstatus_to_exitcode(status)

    def pause(self, seconds: float) -> None:
        """Let time pass, and processes start."""
        time.sleep(seconds)
        if os.getppid() != self.guard:  # where the system does not tell
            raise Stopped(GUARD_DIED)

    def wait(self, name: str, timeout: float = float("inf")) -> int:
        """Return the exit status of a process when it has ended. Raises Failed after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while name not in self.statuses:
            if time.monotonic() > deadline:
                raise Failed(f"{name} has not ended within {timeout:.0f} s", name)
            self.pause(0.05)
        return self.statuses[name]

    def status(self, name: str) -> int | None:
        """Return the exit status of a process, or None while it runs."""
        return self.statuses.get(name)

    def log(self, name: str) -> Path:
        return self.run_dir / "logs" / f"{name}.log"
