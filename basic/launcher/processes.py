"""Starts the processes of a run, each with a log of its own, and ends them, with all that they have started in turn."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from launcher import session

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HEEDED = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # what nohup ignores stays so
TITLE = 500  # bytes that the starter keeps free for a process's command, as `ps` shows it


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


class Processes:
    """The processes of one run. A starter forks them in a session of their own: see starter.py."""

    def __init__(
        self, run_dir: Path, temporary: Path, warm: str, lock: int | None, environment: dict[str, str]
    ) -> None:
        """Start the starter. `warm` says what it imports before it forks: "apps", "flower", or "": nothing."""
        self.run_dir, self.temporary, self.environment = run_dir, temporary, environment
        self.statuses: dict[str, int] = {}  # of those that have ended, by name
        self.unread = b""
        script = Path(__file__).with_name("warm.py" if warm else "starter.py")
        self.starter = subprocess.Popen(
            [sys.executable, str(script), str(run_dir), str(temporary), *([warm, "-" * TITLE] if warm else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=Path(__file__).resolve().parents[1],  # the example's folder: relative paths in its code begin there
            env=environment,  # with one thread, or the starter could not fork; NumPy would start more
            pass_fds=[] if lock is None else [lock],  # the run's folder stays locked until all is ended
            start_new_session=True,
        )

    def start(self, name: str, command: Sequence[str], quiet: bool = True) -> None:
        """Start a command; unless it may talk to the terminal, it writes to logs/<name>.log. Raises Failed."""
        log = str(self.log(name)) if quiet else None
        order = {"name": name, "command": list(command), "log": log, "environment": self.environment}
        self.status(name)  # takes what it has answered: a pipe that is full would let each wait for the other
        try:
            self.starter.stdin.write(json.dumps(order).encode() + b"\n")
        except OSError:
            raise Failed("the process that starts the others has ended") from None

    def status(self, name: str) -> int | None:
        """Return the exit status of a process, or None while it runs. Raises Failed where nobody can know."""
        while select.select([self.starter.stdout], [], [], 0)[0]:
            if not (received := os.read(self.starter.stdout.fileno(), 2**16)):
                raise Failed("the process that starts the others has ended")
            *lines, self.unread = (self.unread + received).split(b"\n")
            self.statuses.update(map(json.loads, lines))
        return self.statuses.get(name)

    def wait(self, name: str, timeout: float = float("inf")) -> int:
        """Return the exit status of a process when it has ended. Raises Failed after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (status := self.status(name)) is None:
            if time.monotonic() > deadline:
                raise Failed(f"{name} has not ended within {timeout:.0f} s", name)
            select.select([self.starter.stdout], [], [], 0.1)
        return status

    def log(self, name: str) -> Path:
        return self.run_dir / "logs" / f"{name}.log"

    def stop(self) -> None:
        """End everything: what has been started, the starter, and what that was about to start."""
        session.end(self.starter.pid)
        self.starter.kill()
        self.starter.wait()
        session.end(self.starter.pid)
        shutil.rmtree(self.temporary, ignore_errors=True)
