"""Starts a run's processes, each with a log of its own, and ends them, with all that they have started in turn.

Run as a script, this file is the guard: a process that waits until the launcher closes its end of a pipe, be it because
the run is over or because the launcher was killed, and then ends whatever bears the mark of the run.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

PATIENCE = 4.0  # seconds from SIGTERM to SIGKILL
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Failed(Exception):
    """The run can't go on; `log` names the log that tells why."""

    def __init__(self, reason: str, log: str | None = None) -> None:
        super().__init__(reason)
        self.log = log


class Stopped(BaseException):
    """A signal asked the launcher to stop."""


def stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


class Processes:
    """The processes of one run: all carry its folder in their environment, as RUN_DIR, by which they are known."""

    def __init__(self, run_dir: Path, temporary: Sequence[Path], environment: Mapping[str, str]) -> None:
        """`temporary` are folders that are removed at the end."""
        self.run_dir = run_dir
        self.environment = {**environment, "RUN_DIR": str(run_dir)}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        command = [sys.executable, "-I", "-S", __file__, str(run_dir), *map(str, temporary)]
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def start(self, name: str, command: Sequence[str], quiet: bool = True) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own; unless it may talk to the terminal, it writes to logs/<name>.log."""
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self.log(name).open("wb")) if quiet else None
            process = self.running[name] = subprocess.Popen(
                command,
                cwd=self.run_dir,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return process

    def log(self, name: str) -> Path:
        return self.run_dir / "logs" / f"{name}.log"

    def stop(self) -> None:
        """Let the guard end everything, and wait until it has."""
        self._guard.communicate()
        for process in self.running.values():
            process.wait()


def tail(log: Path, lines: int = 25) -> str:
    """The end of a log; from its last traceback on where there is one."""
    written = log.read_text(errors="replace").rstrip().splitlines() if log.exists() else []
    tracebacks = [i for i, line in enumerate(written) if "Traceback (most recent call last)" in line]
    return "\n".join(written[max(0, *tracebacks[-1:], len(written) - lines) :])


def marked(run_dir: Path, sessions: Collection[int] = ()) -> list[int]:
    """The ids of the living processes, other than this one, whose environment says RUN_DIR=`run_dir`.

    Those in one of the `sessions` count, too: some of Ray's processes write their title over their environment.
    """
    mark = f"RUN_DIR={run_dir}"
    if sys.platform != "linux":
        listing = subprocess.run(["ps", "axeww", "-o", "pid=,stat=,command="], capture_output=True, text=True).stdout
        living = [line.split(None, 2) for line in listing.splitlines()]
        said = {int(pid): mark in command for pid, stat, command in living if not stat.startswith("Z")}
    else:
        said = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # somebody else's, or gone by now
                if path.with_name("cmdline").read_bytes():  # empty where the process has ended, or is the kernel's
                    said[int(path.parent.name)] = mark.encode() in path.read_bytes().split(b"\0")
    return [pid for pid, is_marked in said.items() if pid != os.getpid() and (is_marked or session(pid) in sessions)]


def session(pid: int) -> int | None:
    """The session that a process is in, which is the id of its leader; None where the process is gone."""
    with contextlib.suppress(OSError):
        return os.getsid(pid)
    return None


def end(run_dir: Path) -> None:
    """SIGTERM to all of the run's processes, a bounded wait, SIGKILL to what is left."""
    sessions: set[int] = set()  # those that the run's processes lead, so that nobody else is in them
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + PATIENCE
        signalled: set[int] = set()
        while (pids := set(marked(run_dir, sessions))) and time.monotonic() < deadline:
            sessions |= {pid for pid in pids if session(pid) == pid}
            for pid in pids - signalled:  # some may have been started in the meantime
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            signalled |= pids
            time.sleep(0.05)


if __name__ == "__main__":
    sys.stdin.read()
    end(Path(sys.argv[1]))
    for folder in sys.argv[2:]:
        shutil.rmtree(folder, ignore_errors=True)
