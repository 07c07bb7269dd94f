"""Imports Flower and PyTorch once: a process then costs a fork, not an import. WARM=0 does without.

Flower's processes are forked from the leader (see guard.py), and call the function that their command stands for. So
are those that they start in turn by a bare name, flower-superexec and, for each message, flwr-clientapp: a script of
that name, first on their PATH, asks for them here. One part of Flower is replaced, here and nowhere else: a SuperNode
that waits looks again after POLL seconds, in place of 3 or 0.5. Where another version of Flower has moved it, the run
goes on without. Nothing here touches a GPU.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import inspect
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from launcher.processes import FOLDER, Processes, prctl
from launcher.screen import say

POLL = "FLOWER_EXAMPLE_POLL"  # the environment variable with a SuperNode's seconds between two looks for a message
MODULES = {
    "flower": (
        *("flwr.cli.app", "flwr.superlink.cli", "flwr.supernode.cli", "flwr.supercore.cli", "flwr.clientapp"),
        *("flwr.supernode.main", "httpcore"),  # which they import when they are called
    ),
    "apps": ("torch", "torch._dynamo", "torch.utils.data", "flwr.serverapp.strategy"),  # _dynamo: for an optimizer
}
SUPEREXEC = "flower-superexec"
SUPERNODE = "flwr.supernode.start_client_internal"
COMMANDS = {e.name: e for e in importlib.metadata.distribution("flwr").entry_points if e.group == "console_scripts"}
PR_SET_NAME = 15
# Stands in for a command: writes to the pipe `asked` who calls it, where its output goes, its name and its arguments.
SCRIPT = """#!/bin/sh
IFS=$(printf '\\037')
printf '%s\\n' "$PPID$IFS$(readlink /proc/$$/fd/1)$IFS${0##*/}$IFS$*" > "${0%/*}/asked"
"""


class Warm(Processes):
    """Forks Flower's processes, and those that they ask for, in place of starting a fresh Python for each."""

    def __init__(self, run_dir: Path, temporary: Path) -> None:
        super().__init__(run_dir)
        self.scripts = temporary / "commands"
        self.scripts.mkdir()
        os.mkfifo(self.scripts / "asked")
        self.asked = os.open(self.scripts / "asked", os.O_RDWR | os.O_CLOEXEC)  # for writing, too: else it ends at once
        for name in COMMANDS:
            if name.startswith("flwr-") or name == SUPEREXEC:
                (self.scripts / name).write_text(SCRIPT)
                (self.scripts / name).chmod(0o700)

    def load(self, kind: str) -> None:
        """Import modules. One that isn't installed, as PyTorch may be, is left to the process that needs it."""
        for name in MODULES[kind]:
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(name)
        self.own = own_modules()  # here, since a child that looked at all modules would copy every page that it touches
        gc.freeze()  # and so would a garbage collection there
        if kind == "flower" and not replace_sleep():
            say("WARNING: this version of Flower waits for messages in another way: rounds take longer", error=True)

    def pause(self, seconds: float) -> None:
        """Wait, or start what is asked for; a caller that has ended by then gets nothing."""
        if select.select([self.asked], [], [], seconds)[0]:
            for line in os.fsdecode(os.read(self.asked, 2**16)).rstrip("\n").split("\n"):
                caller, log, *command = line.split("\037")
                if name := self.started.get(int(caller)):
                    self.fork(f"{name}-superexec" if command[0] == SUPEREXEC else "", command, log)
        super().pause(0)

    def become(self, command: Sequence[str]) -> None:
        """Call what one of Flower's commands would call in a fresh interpreter; execute any other command."""
        if command[0] not in COMMANDS:
            super().become(command)
        if command[0].startswith("flower-"):
            os.environ["PATH"] = f"{self.scripts}{os.pathsep}{os.environ['PATH']}"
        status: Any = 1
        try:
            show(command)
            reseed()
            for name in self.own:
                del sys.modules[name]  # what the app imports by these names is in its bundle
            sys.path[0] = str(Path(sys.executable).parent)  # as in Flower's commands
            sys.argv = list(command)
            atexit._clear()  # what libraries have registered so far would touch, and copy, much memory
            for stream in (sys.stdout, sys.stderr):  # Flower prints characters that other encodings lack
                stream.reconfigure(encoding="utf-8", line_buffering=True)
            status = COMMANDS[command[0]].load()()
        except SystemExit as left:
            status = left.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                threading._shutdown()  # as Python ends: waits for threads, then calls what the app has registered
                atexit._run_exitfuncs()
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status if isinstance(status, int) else int(status is not None))


def own_modules() -> list[str]:
    """Return the names of the modules that the launcher has imported of the example's folder."""
    files = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
    return [name for name, file in files.items() if file.startswith(f"{FOLDER}/{name.partition('.')[0]}")]


def reseed() -> None:
    """Draw new states for the generators that a fork copies; Python's own does so by itself."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()  # the CPU's alone: nothing here asks for a GPU


def show(command: Sequence[str]) -> None:
    """Let `ps` and `top` show a process's command (Linux): it is written over the arguments and variables in memory."""
    with contextlib.suppress(OSError, ValueError):
        os.environ.update(dict(os.environ))  # copies the variables out of there
        numbers = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(numbers[45]), int(numbers[48])
        ctypes.memmove(start, " ".join(command).encode()[: end - start - 1].ljust(end - start, b"\0"), end - start)
        prctl(PR_SET_NAME, command[0].removeprefix("flower-").encode())


def replace_sleep() -> bool:
    """Replace how long a SuperNode sleeps; return whether this version of Flower sleeps as expected."""
    try:
        module = importlib.import_module(SUPERNODE)
        known = "time.sleep(3)" in inspect.getsource(module.start_client_internal)
    except (ImportError, AttributeError, OSError):
        return False
    if known:
        module.time = SimpleNamespace(**{**vars(time), "sleep": sleep})
    return known


def sleep(seconds: float) -> None:
    """Stand in for `time.sleep` in a SuperNode, which sleeps 3 s without a message, 0.5 s without a reply to it."""
    time.sleep(min(seconds, float(os.environ.get(POLL, seconds))))
