"""Does the work of a run in a child process, the *leader* of the run's session, and cleans up if that is killed."""

import contextlib
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

from launcher import checks, ending, session
from launcher.processes import GUARD_DIED, PR_SET_PDEATHSIG, SIGNALS, heed, ignore, prctl
from launcher.screen import say

PR_SET_CHILD_SUBREAPER = 36


def guarded(run: Any) -> int:
    """Return the run's exit status. If the leader is killed, end what it left, and record that."""
    if warning := checks.check(run.settings):
        say(f"WARNING: {warning}", error=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until leader and guard can do what a signal asks for
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # nobody knows an exit status where it is ignored
    run.open()
    run.temporary = Path(tempfile.mkdtemp(prefix="fl-", dir=checks.temporary_place()))
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become this process's children
    guard = os.getpid()
    if (leader := os.fork()) == 0:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        prctl(PR_SET_PDEATHSIG, GUARD_DIED)
        if os.getppid() != guard:  # it died before that
            os.kill(os.getpid(), GUARD_DIED)
        os._exit(run.work())  # not as Python ends: some libraries complain when they are taken apart
    heed(lambda number, frame: pass_on(number, leader))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    while (ended := os.wait())[0] != leader:
        pass  # an orphan: nobody else waits for it, and Flower takes a zombie for a living process
    heed(ignore)
    status = os.waitstatus_to_exitcode(ended[1])
    if status >= 0:
        return status
    session.end(leader)
    shutil.rmtree(run.temporary, ignore_errors=True)
    return ending.close_after_kill(run, f"the launcher's working process was killed by {signal.Signals(-status).name}")


def pass_on(number: int, leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(leader, number)
