"""Starts the processes of a run, each with a log of its own, and ends them, with all that they have started in turn."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from launcher import session, starter

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TITLE = 500  # bytes that the starter keeps free for a process's command, as `ps` shows it


class Failed(Exception):
    """The run can't go on; `log` names the log that tells why."""

    def __init__(self, reason: str, log: str | None = None) -> None:
        super().__init__(reason)
        self.log = log


class Stopped(BaseException):
    """A signal asked the launcher to stop."""


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Raise Stopped, once: what follows takes seconds, and must be whole."""
    heed(ignore)
    raise Stopped(number)


def ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing. With SIG_IGN in its place, Python would complain of a signal that came just before."""


def heed(handler: Any) -> None:
    """Set a handler for the signals that end a run; one that was ignored at the start, as by nohup, stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN or number in heeded:
            heeded.add(number)
            signal.signal(number, handler)


heeded: set[int] = set()


@contextlib.contextmanager
def late() -> Iterator[None]:
    """Let a signal wait until this is over."""
    came: list[int] = []
    heed(lambda number, frame: came.append(number))
    yield
    heed(stop)
    for number in came:
        stop(number, None)


class Processes:
    """The processes of one run. A starter forks them in a session of their own, and ends them: see starter.py."""

    def __init__(
        self, run_dir: Path, temporary: Path, warm: str | None, lock: int | None, environment: dict[str, str]
    ) -> None:
        """Start the starter. `warm` says what it imports before it forks: "apps", "flower", or None: nothing."""
        self.run_dir, self.temporary, self.environment = run_dir, temporary, environment
        self.pids: dict[str, int] = {}  # of all that were started, by name
        self.statuses: dict[str, int] = {}  # of those that have ended
        self.unread = b""
        script = Path(__file__).with_name("warm.py" if warm else "starter.py")
        command = [sys.executable, str(script), str(run_dir), str(temporary), *([warm, "-" * TITLE] if warm else [])]
        self.starter = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,  # with one thread, or the starter could not fork; NumPy would start more
            pass_fds=[] if lock is None else [lock],  # the run's folder stays locked until all is ended
            start_new_session=True,
        )

    def start(self, name: str, command: Sequence[str], quiet: bool = True) -> None:
        """Start a command; unless it may talk to the terminal, it writes to logs/<name>.log. Raises Failed."""
        log = str(self.log(name)) if quiet else None
        order = {"name": name, "command": list(command), "log": log, "environment": self.environment}
        order["folder"] = str(self.run_dir.parents[1])  # the example's, so that relative paths in its code begin there
        self.pids[name] = 0
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
            for answer in map(json.loads, lines):
                kind = self.pids if "pid" in answer else self.statuses
                kind[answer["name"]] = answer.get("pid", answer.get("status"))
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
        """End everything, and the starter, which may be importing or may have been killed."""
        session.end(self.starter.pid)
        with contextlib.suppress(OSError):
            os.set_blocking(self.starter.stdin.fileno(), False)
            self.starter.stdin.write(starter.END + b"\n")
        self.starter.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.starter.wait(1)
        self.starter.kill()
        self.starter.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)


def tail(log: Path, own: str, lines: int = 25) -> str:
    """Return the end of a log or, where it holds tracebacks, the one that tells the cause.

    That is the last one with `own` code in it; else, of the last exception, what it was raised from.
    """
    written = log.read_text(errors="replace").rstrip() if log.exists() else ""
    _, *blocks = re.split(r"(?=^Traceback \(most recent call last\):)", written, flags=re.MULTILINE)
    cause = max(0, len(blocks) - 1)
    while cause and blocks[cause - 1].endswith("was the direct cause of the following exception:\n\n"):
        cause -= 1
    tracebacks = [re.split(r"\n\n|\n\x1b", block)[0] for block in blocks]  # without what Flower has logged after it
    telling = [one for one in tracebacks if own in one] or tracebacks[cause : cause + 1] or [written]
    return "\n".join(telling[-1].splitlines()[-lines:])
