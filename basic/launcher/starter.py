"""Starts a run's processes and ends them. All are in the session that this process leads, and are found by it.

    python starter.py RUN_FOLDER TEMPORARY_FOLDER

An order is a line of JSON on stdin: {"name", "command", "log", "environment", "folder"}, where `log` is null for a
process that may write to the terminal. The answers on stdout are {"name", "pid"} and, in the end, {"name", "status"}.
When stdin closes, all are ended and the temporary folder goes. The launcher does so itself, unless it was killed.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this file is run by its path

from launcher.session import end
from rounds import history

END = b"end"  # the last order: without it, the launcher was killed
PR_SET_PDEATHSIG = 1  # the signal that a process gets when its parent dies


class Starter:
    """Forks a process for each order, and lets it become its command."""

    def __init__(self) -> None:
        self.started: dict[int, dict[str, Any]] = {}  # the orders of the living, by process id
        self.orderly = False  # whether the launcher ends the run, and says how it ended
        self.orders, self.answers, self.unread = os.dup(0), os.dup(1), b""
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # what a process writes to the terminal
        self.woken, self.wake = socket.socketpair()  # readable when a process has ended
        self.wake.setblocking(False)
        signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the launcher's matter
        self.sources: dict[int, Callable[[], bool]] = {self.woken.fileno(): self.reap, self.orders: self.follow}

    def serve(self, patience: float | None = None) -> None:
        """Do what comes until nothing has for `patience` seconds, or there will be no more orders."""
        while ready := select.select(list(self.sources), [], [], patience)[0]:
            if not all(self.sources[source]() for source in ready):
                return

    def follow(self) -> bool:
        """Take orders; return whether there can be more."""
        received = os.read(self.orders, 2**16)
        *lines, self.unread = (self.unread + received).split(b"\n")
        for line in lines:
            if line == END:
                self.orderly = True
            else:
                self.start(json.loads(line))
        return bool(received)

    def answer(self, **facts: Any) -> None:
        with contextlib.suppress(OSError):  # the launcher has gone
            os.write(self.answers, json.dumps(facts).encode() + b"\n")

    def reap(self) -> bool:
        """Say which processes have ended. At once, since to Flower a process that nobody has waited for is alive."""
        self.woken.recv(4096)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if name := self.started.pop(ended[0], {}).get("name"):
                    self.answer(name=name, status=os.waitstatus_to_exitcode(ended[1]))
        return True

    def start(self, order: dict[str, Any]) -> None:
        """Fork. The launcher hears of a process that it has given a name."""
        if pid := os.fork():
            self.started[pid] = order
            if order["name"]:
                self.answer(name=order["name"], pid=pid)
            return
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            for descriptor in (*self.sources, self.answers, self.wake.fileno()):
                os.close(descriptor)
            if order["log"]:
                begin = os.O_TRUNC if order["name"] else 0  # others write into the log of who has asked for them
                descriptor = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | begin, 0o666)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
            os.environ.clear()
            os.environ.update(order["environment"])
            os.chdir(order["folder"])
            expendable(300 if order["name"] else 600)
            self.become(order["command"])
        except OSError as error:
            print(f"{order['command'][0]}: {error.strerror}", file=sys.stderr, flush=True)
        finally:
            os._exit(127)

    def become(self, command: list[str]) -> None:
        os.execvp(command[0], command)


def expendable(score: int) -> None:
    """Let this process end with its parent, and before others when memory runs out (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        Path("/proc/self/oom_score_adj").write_text(str(score))


def watch_launcher(run_dir: str, temporary: str) -> None:
    """Finish as soon as the launcher is killed, even in the middle of an import (Linux; elsewhere after it)."""
    signal.signal(signal.SIGUSR1, lambda *_: finish(run_dir, temporary, orderly=False))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)


def finish(run_dir: str, temporary: str, orderly: bool) -> None:
    """End everything; where the launcher does not say how the run ended, since it was killed, say that."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    end(os.getpid())
    shutil.rmtree(temporary, ignore_errors=True)
    if not orderly:
        with contextlib.suppress(OSError, ValueError):
            if (record := history.load(Path(run_dir)))["status"] == "running":
                history.save(Path(run_dir), {**record, "status": "stopped", "reason": "the launcher was killed"})
    os._exit(0)  # not as Python ends: nothing is left to do, and some libraries complain when they are taken apart


def main(starter: Starter, run_dir: str, temporary: str) -> None:
    """Follow orders to the end, then end everything."""
    starter.serve()
    finish(run_dir, temporary, starter.orderly)


if __name__ == "__main__":
    watch_launcher(*sys.argv[1:3])
    main(Starter(), *sys.argv[1:3])
