"""A starter that has imported Flower and PyTorch: a process then costs a fork, not an import. Remove it to do without.

Flower's processes are forked from this one and call the function that their command stands for. Two parts of Flower are
replaced, here and nowhere else: a superexec forks its app processes, too, in place of starting a fresh Python for each
message; and a SuperNode that waits looks again after POLL seconds, in place of 3 or 0.5. Where another version of
Flower has moved one, the run goes on without it. No user's module is imported here, and nothing touches a GPU.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import inspect
import os
import signal
import subprocess
import sys
import time
import traceback
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import starter

POLL = "FLOWER_EXAMPLE_POLL"  # the environment variable with a SuperNode's seconds between two looks for a message
FLOWER = ("flwr.cli.app", "flwr.superlink.cli", "flwr.supernode.cli", "flwr.supercore.cli", "flwr.clientapp")
FOR_APPS = ("torch", "torch._dynamo", "torch.utils.data", "flwr.serverapp.strategy")  # _dynamo: for the first optimizer
EXECUTOR = "flwr.supercore.superexec.executor.subprocess_executor"
SUPERNODE = "flwr.supernode.start_client_internal"
COMMANDS = {e.name: e for e in importlib.metadata.distribution("flwr").entry_points if e.group == "console_scripts"}
PR_SET_NAME = 15


def become(command: list[str]) -> None:
    """Call what one of Flower's commands would call in a fresh interpreter; execute any other command."""
    if command[0] not in COMMANDS:
        os.execvp(command[0], command)
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


def fork_app(command: list[str], stdout: int | None = None, stderr: int | None = None) -> Any:
    """Stand in for `subprocess.Popen` in a superexec, which has one thread: fork, and become the app process."""
    if len(os.listdir("/proc/self/task")) > 1:  # a lock that another thread holds would stay locked in a child
        return subprocess.Popen(command, stdout=stdout, stderr=stderr)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for it
    if os.fork() == 0:
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        for descriptor, wanted in ((1, stdout), (2, stderr)):
            if wanted == subprocess.DEVNULL:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        starter.expendable(600)
        become(command)
    return None


def replace_parts() -> list[str]:
    """Replace the two parts of Flower; return what could not be, since this version of Flower is another."""
    missing = []
    if "subprocess.Popen(args" in source(EXECUTOR, "SubprocessExecutor.launch"):
        sys.modules[EXECUTOR].subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": fork_app})
    else:
        missing.append("how a superexec launches an app")
    if "time.sleep(3)" in source(SUPERNODE, "start_client_internal"):
        sys.modules[SUPERNODE].time = SimpleNamespace(**{**vars(time), "sleep": sleep})
    else:
        missing.append("how long a SuperNode sleeps")
    return missing


def source(module: str, function: str) -> str:
    """Return a function's source; nothing where this version of Flower has none of that name."""
    try:
        return inspect.getsource(attrgetter(function)(importlib.import_module(module)))
    except (ImportError, AttributeError):
        return ""


def sleep(seconds: float) -> None:
    """Stand in for `time.sleep` in a SuperNode, which sleeps 3 s without a message, 0.5 s without a reply to it."""
    time.sleep(min(seconds, float(os.environ.get(POLL, seconds))))


def load(names: tuple[str, ...]) -> None:
    """Import modules; one that is not installed, as PyTorch may be in a copy, is its processes' own matter."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    gc.freeze()  # a collection in a child would copy every page that it touches


def main(run_dir: str, temporary: str, *words: str) -> None:
    sys.path[:2] = [str(Path(sys.executable).parent)]  # as in Flower's commands: this folder's names are ours
    warm = starter.Starter(become)
    starter.watch_launcher(run_dir, temporary)
    warm.serve(patience=0)  # what makes the data ready needs nothing, and works during the imports
    load(FLOWER)
    for part in replace_parts():
        print(f"WARNING: this version of Flower has changed {part}: messages take longer", file=sys.stderr, flush=True)
    warm.serve(patience=0)  # a SuperLink needs no PyTorch
    if "apps" in words:
        load(FOR_APPS)
    starter.main(warm, run_dir, temporary)


if __name__ == "__main__":
    main(*sys.argv[1:])
