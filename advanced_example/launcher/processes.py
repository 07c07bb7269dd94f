"""Starts processes, each with a log of its own, and stops them, with all that they have started in turn."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

PATIENCE = 5.0  # seconds from SIGTERM to SIGKILL
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Ask Linux to end this process when the launcher has gone, even by a kill -9."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked the launcher to stop."""


def stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


class Processes:
    """The processes of one run: all carry its folder in their environment, as RUN_DIR, by which they are known."""

    def __init__(self, run_dir: Path, environment: Mapping[str, str]) -> None:
        self.run_dir = run_dir
        self.environment = {**environment, "RUN_DIR": str(run_dir)}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

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
                preexec_fn=die_with_parent,
            )
        return process

    def log(self, name: str) -> Path:
        return self.run_dir / "logs" / f"{name}.log"

    def tail(self, name: str, lines: int = 25) -> str:
        """The end of a log; from its last traceback on where there is one."""
        written = self.log(name).read_text(errors="replace").rstrip().splitlines() if self.log(name).exists() else []
        tracebacks = [i for i, line in enumerate(written) if "Traceback (most recent call last)" in line]
        return "\n".join(written[max(0, *tracebacks[-1:], len(written) - lines) :])

    def stop(self) -> None:
        """End everything: SIGTERM, a bounded wait, SIGKILL; then whatever else bears this run's mark."""
        for process in reversed(self.running.values()):
            self._signal(process, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in self.running.values():
            self._signal(process, signal.SIGKILL)
            process.wait()
        deadline = time.monotonic() + PATIENCE
        while (pids := marked(self.run_dir)) and time.monotonic() < deadline + PATIENCE:
            for pid in pids:  # most leave by themselves when they see that their parent has gone
                with contextlib.suppress(ProcessLookupError):
                    if time.monotonic() > deadline:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    @staticmethod
    def _signal(process: subprocess.Popen[bytes], number: int) -> None:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def marked(run_dir: Path) -> list[int]:
    """The ids of the processes, other than this one, whose environment says RUN_DIR=`run_dir`."""
    mark = f"RUN_DIR={run_dir}"
    if sys.platform != "linux":
        listing = subprocess.run(["ps", "axeww", "-o", "pid=,command="], capture_output=True, text=True).stdout
        pids = [int(line.split()[0]) for line in listing.splitlines() if mark in line]
    else:
        pids = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # somebody else's, or gone by now
                if mark.encode() in path.read_bytes().split(b"\0"):
                    pids.append(int(path.parent.name))
    return [pid for pid in pids if pid != os.getpid()]
