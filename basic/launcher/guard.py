"""Lets a process of its own do the work of a run, and ends what that leaves behind if it is killed."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from launcher import checks, session
from launcher.processes import GUARD_DIED, die_with_parent, heed, signals_wait
from launcher.screen import say

KILLED = "the launcher was killed"


def guarded(run: Any) -> int:
    """Return the exit status of `run.work`. However it ends, no process is left, and the history says how it ended."""
    if warning := checks.check(run.settings):
        say(f"WARNING: {warning}", error=True)
    with signals_wait():
        run.open()
        run.temporary = Path(tempfile.mkdtemp(prefix="fl-", dir=checks.temporary_place()))
        leader = os.fork()
        if leader == 0:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            die_with_parent(GUARD_DIED)
    if leader == 0:
        os._exit(run.work())  # not as Python ends: some libraries complain when they are taken apart

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(leader, number)

    heed(pass_on)
    status = os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1])
    if status >= 0:
        return status
    session.end(leader)
    shutil.rmtree(run.temporary, ignore_errors=True)
    run.close({"status": "stopped", "reason": KILLED})
    say(f"error: {KILLED}", error=True)
    return 1
