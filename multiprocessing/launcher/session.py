"""Finds and ends the processes of a session: all of a run's are in one, or were started by one that is."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 4.0  # seconds from SIGTERM to SIGKILL


def members(sessions: set[int]) -> set[int]:
    """Return the ids of the living processes in some sessions, and of all that these have started; not this one."""
    relations = list(processes())
    found = {pid for pid, parent, session in relations if session in sessions or parent == os.getpid()}
    while more := {pid for pid, parent, _ in relations if parent in found} - found:  # in sessions of their own
        found |= more
    return found - {os.getpid()}


def processes() -> Iterator[tuple[int, int, int]]:
    """Yield the id, the parent and the session of each living process; a zombie counts as ended."""
    if sys.platform == "linux":  # where `ps` need not be installed
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # gone by now
                state, parent, _, session, *_ = Path("/proc", name, "stat").read_bytes().rpartition(b")")[2].split()
                if state not in b"ZX":
                    yield int(name), int(parent), int(session)
        return
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True).stdout
    for pid, parent, state in map(str.split, listing.splitlines()):
        with contextlib.suppress(OSError):
            if not state.startswith("Z"):
                yield int(pid), int(parent), os.getsid(int(pid))


def end(session: int) -> None:
    """Send SIGTERM to all of a session but its leader, then SIGKILL to what is left; each gets PATIENCE seconds."""
    sessions = {session}
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline, signalled = time.monotonic() + PATIENCE, set()
        while (pids := members(sessions) - {session}) and time.monotonic() < deadline:
            for pid in pids - signalled:  # some may have been started in the meantime
                with contextlib.suppress(OSError):
                    sessions.add(os.getsid(pid))
                    os.kill(pid, number)
            signalled |= pids
            time.sleep(0.05)
