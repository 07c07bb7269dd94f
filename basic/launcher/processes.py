"""Starts the processes of a run, each with a log of its own, and notes how they end; and the signals that end a run."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

FOLDER = Path(__file__).resolve().parents[1]  # the example's
GUARD_DIED = signal.SIGUSR1  # what the kernel sends the leader then: see guard.py
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, GUARD_DIED)
# One that is ignored at the start, as SIGHUP is by nohup, stays ignored.
HEEDED = [number for number in SIGNALS if number == GUARD_DIED or signal.getsignal(number) != signal.SIG_IGN]
PR_SET_PDEATHSIG = 1
stopped_by: list[int] = []  # the signal that has asked the launcher to stop


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
    """Raise Stopped for the first signal only: to clean up takes seconds, and must not be cut short."""
    heed(ignore)
    stopped_by.append(number)  # where Python swallows the exception, as in a destructor, `pause` raises it again
    raise Stopped(number)


def ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing. With SIG_IGN in its place, Python would complain of a signal that came just before."""


def prctl(option: int, value: Any) -> None:
    """Ask Linux for something for this process; elsewhere, do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value)


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
        """Start a command in the example's folder. Its output goes to its log or, if not `quiet`, to the terminal."""
        self.fork(name, command, str(self.log(name)) if quiet else None)

    def fork(self, name: str, command: Sequence[str], log: str | None) -> None:
        """Start a command. One without a name nobody asks after; one without a log writes where this process does."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a child that ran our handlers would think it was the leader
        if pid := os.fork():
            self.started[pid] = name
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self.reap()  # it may have ended before it was noted
            return
        try:
            heed(signal.SIG_DFL)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if log:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
            os.chdir(FOLDER)  # relative paths in the example's code begin there
            with contextlib.suppress(OSError):  # Linux: when memory runs out, a client's work goes first
                Path("/proc/self/oom_score_adj").write_text("300" if name else "600")
            self.become(command)
        except Exception as error:
            os.write(2, f"{command[0]}: {error}\n".encode())
        finally:
            os._exit(127)

    def become(self, command: Sequence[str]) -> None:
        os.execvp(command[0], command)

    def reap(self, *_: Any) -> None:
        """Note which processes have ended, at once: Flower takes a zombie for a living process."""
        for pid in list(self.started):
            with contextlib.suppress(ChildProcessError):  # a signal has come in between, and it is done
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[self.started.pop(pid)] = os.waitstatus_to_exitcode(status)

    def pause(self, seconds: float) -> None:
        """Wait. Raises Stopped if a signal, or the death of the guard, has asked for it."""
        time.sleep(seconds)
        if stopped_by or os.getppid() != self.guard:  # macOS sends no signal then
            raise Stopped(*stopped_by or [GUARD_DIED])

    def wait(self, name: str, timeout: float = float("inf")) -> int:
        """Return the exit status of a process when it has ended. Raises Failed after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while name not in self.statuses:
            if time.monotonic() > deadline:
                raise Failed(f"{name} has not ended within {timeout:.0f} s", name)
            self.pause(0.05)
        return self.statuses[name]

    def log(self, name: str) -> Path:
        return self.run_dir / "logs" / f"{name}.log"
