"""Starts a run's processes and ends them. All are in the session that this process leads, and are found by it.

    python starter.py RUN_FOLDER TEMPORARY_FOLDER

An order is a line of JSON on stdin: {"name", "command", "log", "environment"}, where `log` is null for a process that
may write to the terminal. When it has ended, [name, status] comes on stdout. It is the launcher that ends them all in
the end, this process too. Where the launcher was killed, this process does it.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this file is run by its path

from launcher.session import end
from rounds import history

PR_SET_PDEATHSIG = 1  # the signal that a process gets when its parent dies
LAUNCHER_DIED = signal.SIGUSR1


class Starter:
    """Forks a process for each order, and lets it become its command."""

    def __init__(self, run_dir: str, temporary: str) -> None:
        self.run_dir, self.temporary = Path(run_dir), Path(temporary)
        self.started: dict[int, dict[str, Any]] = {}  # the orders of the living, by process id
        self.orders, self.answers, self.unread = os.dup(0), os.dup(1), b""
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # what a process writes to the terminal
        self.sources: dict[int, Callable[[], None]] = {self.orders: self.follow}  # what to do when one can be read
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the launcher's matter
        signal.signal(signal.SIGCHLD, self.reap)
        signal.signal(LAUNCHER_DIED, self.finish)
        tell_of_parent(LAUNCHER_DIED)

    def serve(self, patience: float | None = None) -> None:
        """Do what comes, until nothing has for `patience` seconds."""
        while ready := select.select(list(self.sources), [], [], patience)[0]:
            for source in ready:
                self.sources[source]()

    def follow(self) -> None:
        """Take orders. None can come any more when the launcher has died."""
        if not (received := os.read(self.orders, 2**16)):
            self.finish()
        *lines, self.unread = (self.unread + received).split(b"\n")
        for line in lines:
            self.start(json.loads(line))

    def reap(self, *_: Any) -> None:
        """Say which processes have ended. At once, since to Flower a process that nobody has waited for is alive."""
        for pid in list(self.started):
            with contextlib.suppress(OSError):  # a signal has come in between, and it is done; or the launcher has gone
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended and (name := self.started.pop(pid)["name"]):
                    os.write(self.answers, json.dumps([name, os.waitstatus_to_exitcode(status)]).encode() + b"\n")

    def start(self, order: dict[str, Any]) -> None:
        """Fork. The launcher hears of the end of a process that it has given a name."""
        if pid := os.fork():
            self.started[pid] = order
            self.reap()  # it may have ended before it was noted
            return
        try:
            for number in (signal.SIGCHLD, LAUNCHER_DIED, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            for descriptor in (*self.sources, self.answers):
                os.close(descriptor)
            if order["log"]:
                begin = os.O_TRUNC if order["name"] else 0  # others write into the log of who has asked for them
                descriptor = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | begin, 0o666)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
            os.environ.clear()
            os.environ.update(order["environment"])
            tell_of_parent(signal.SIGKILL)
            with contextlib.suppress(OSError):  # Linux: when memory runs out, a client's work goes first
                Path("/proc/self/oom_score_adj").write_text("300" if order["name"] else "600")
            self.become(order["command"])
        except OSError as error:
            print(f"{order['command'][0]}: {error.strerror}", file=sys.stderr, flush=True)
        finally:
            os._exit(127)

    def become(self, command: list[str]) -> None:
        os.execvp(command[0], command)

    def finish(self, *_: Any) -> None:
        """End everything, and say in the history that the launcher, which can't, was killed."""
        signal.signal(LAUNCHER_DIED, signal.SIG_IGN)
        end(os.getpid())
        shutil.rmtree(self.temporary, ignore_errors=True)
        with contextlib.suppress(OSError, ValueError):
            if (record := history.load(self.run_dir))["status"] == "running":
                history.save(self.run_dir, {**record, "status": "stopped", "reason": "the launcher was killed"})
        os._exit(0)  # not as Python ends: some libraries complain when they are taken apart


def tell_of_parent(number: int) -> None:
    """Ask for a signal when the parent dies, even in the middle of an import (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


if __name__ == "__main__":
    Starter(*sys.argv[1:3]).serve()
