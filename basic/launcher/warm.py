"""A starter that has imported Flower and PyTorch: a process then costs a fork, not an import. Remove it to do without.

Flower's processes are forked from this one, and call the function that their command stands for. So are those that a
superexec starts, one for each message, by a bare name such as flwr-clientapp: a script of that name, first on its PATH,
asks for them here. One part of Flower is replaced, here and nowhere else: a SuperNode that waits looks again after POLL
seconds, in place of 3 or 0.5. Where another version of Flower has moved it, the run goes on without. No user's module
is imported here, and nothing touches a GPU.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import inspect
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import starter

POLL = "FLOWER_EXAMPLE_POLL"  # the environment variable with a SuperNode's seconds between two looks for a message
FLOWER = (
    *("flwr.cli.app", "flwr.superlink.cli", "flwr.supernode.cli", "flwr.supercore.cli", "flwr.clientapp"),
    *("flwr.supernode.main", "httpcore"),  # which they import when they are called
)
FOR_APPS = ("torch", "torch._dynamo", "torch.utils.data", "flwr.serverapp.strategy")  # _dynamo: for the first optimizer
SUPERNODE = "flwr.supernode.start_client_internal"
COMMANDS = {e.name: e for e in importlib.metadata.distribution("flwr").entry_points if e.group == "console_scripts"}
PR_SET_NAME = 15
# Stands in for a command: writes down the superexec that calls it, its output, the command, and its arguments.
SCRIPT = """#!/bin/sh
IFS=$(printf '\\037')
printf '%s\\n' "$PPID$IFS$(readlink /proc/$$/fd/1)$IFS${0##*/}$IFS$*" > "${0%/*}/asked"
"""


class Warm(starter.Starter):
    """Forks in place of starting a fresh Python, also what superexecs ask for."""

    def __init__(self, run_dir: str, temporary: str) -> None:
        super().__init__(run_dir, temporary)
        self.scripts = self.temporary / "commands"
        self.scripts.mkdir()
        os.mkfifo(self.scripts / "asked")
        self.asked = os.open(self.scripts / "asked", os.O_RDWR | os.O_CLOEXEC)  # to write, too, or it would end at once
        self.sources[self.asked] = self.start_asked
        for name in COMMANDS:
            if name.startswith("flwr-"):
                (self.scripts / name).write_text(SCRIPT)
                (self.scripts / name).chmod(0o700)

    def start_asked(self) -> None:
        """Start what superexecs ask for; one that has ended in the meantime needs nothing."""
        for line in os.read(self.asked, 2**16).decode().rstrip("\n").split("\n"):
            superexec, log, *command = line.split("\037")
            if order := self.started.get(int(superexec)):
                self.start({**order, "name": None, "log": log, "command": command})

    def become(self, command: list[str]) -> None:
        """Call what one of Flower's commands would call in a fresh interpreter; execute any other command."""
        if command[0] not in COMMANDS:
            super().become(command)
        if command[0] == "flower-superexec":
            os.environ["PATH"] = f"{self.scripts}{os.pathsep}{os.environ['PATH']}"
        status: Any = 1
        try:
            show(command)
            reseed()
            for name in [name for name in sys.modules if name.partition(".")[0] in ("launcher", "rounds", "starter")]:
                del sys.modules[name]  # what the app imports under these names is in its own bundle
            sys.argv = list(command)
            status = COMMANDS[command[0]].load()()
        except SystemExit as left:
            status = left.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status if isinstance(status, int) else int(status is not None))


def reseed() -> None:
    """Draw new states for the generators that a fork copies; Python's own does so by itself."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()  # the CPU's alone: nothing here asks for a GPU


def show(command: list[str]) -> None:
    """Let `ps` and `top` show a process's command (Linux). It is written over this process's arguments in memory."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
        ctypes.memmove(start, "\0".join(command).encode()[: end - start - 1].ljust(end - start, b"\0"), end - start)
        ctypes.CDLL(None).prctl(PR_SET_NAME, command[0].removeprefix("flower-").encode())


def replace_sleep() -> bool:
    """Replace how long a SuperNode sleeps; return whether this version of Flower sleeps as expected."""
    try:
        module = importlib.import_module(SUPERNODE)
        known = "time.sleep(3)" in inspect.getsource(module.start_client_internal)
    except (ImportError, AttributeError):
        return False
    if known:
        module.time = SimpleNamespace(**{**vars(time), "sleep": sleep})
    return known


def sleep(seconds: float) -> None:
    """Stand in for `time.sleep` in a SuperNode, which sleeps 3 s without a message, 0.5 s without a reply to it."""
    time.sleep(min(seconds, float(os.environ.get(POLL, seconds))))


def load(names: tuple[str, ...]) -> None:
    """Import modules; one that is not installed, as PyTorch may be in a copy, is its processes' own matter."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    gc.freeze()  # a collection in a child would copy every page that it touches


def main(run_dir: str, temporary: str, kind: str, room_for_title: str) -> None:
    sys.path[:2] = [str(Path(sys.executable).parent)]  # as in Flower's commands: this folder's names are ours
    warm = Warm(run_dir, temporary)
    warm.serve(patience=0)  # what makes the data ready needs nothing, and works during the imports
    load(FLOWER)
    if not replace_sleep():
        print("WARNING: this version of Flower waits in another way: rounds take longer", file=sys.stderr, flush=True)
    warm.serve(patience=0)  # a SuperLink needs no PyTorch
    if kind == "apps":
        load(FOR_APPS)
    warm.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
