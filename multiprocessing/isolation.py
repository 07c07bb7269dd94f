"""Run a function in a child process, so that everything it took is given back when it returns: memory, and the GPU's.

    isolation.preload("torch")                    # once, where it will be needed: it makes each child quick to start
    weights = run_isolated(train, weights, 0.01, timeout=300)

This file needs nothing but Python (Linux, macOS); copy it where you like.

The child comes from a *fork server*, a process without threads that has imported what was preloaded and forks itself
for each call: 0.03 s, where a child by `spawn`, which imports anew, takes as long as `import torch` does. The caller is
never forked itself: that would copy locks that its other threads hold, and a CUDA context does not survive it.
"""

import contextlib
import multiprocessing as mp
import os
import pickle
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any

METHOD = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
GRACE = 5.0  # seconds that a child has to leave after it has handed over its result
STARTING = threading.Lock()


class ChildDied(RuntimeError):
    """The child ended before it had a result; the text says by which signal, or with which status."""


def preload(*modules: str) -> None:
    """Start the fork server, in the background, with these modules imported; where one runs already, leave it.

    On Python 3.11 they must be installed, or on PYTHONPATH: it looks nowhere else, and skips what it can't import.
    """
    if METHOD == "forkserver":
        from multiprocessing import forkserver

        mp.set_forkserver_preload(list(modules))
        forkserver.ensure_running()


def run_isolated(
    fn: Callable[..., Any],
    *args: Any,
    timeout: float | None = None,
    memory: float | None = None,
    method: str = METHOD,
) -> Any:
    """Return fn(*args), run in a fresh child process.

    `fn` is importable (no lambda), and `fn`, `args` and the result can be pickled. `timeout` is in seconds, from when
    the child runs; `memory`, in MiB, is how much more the child may allocate than it starts with (Linux only).

    Raises what `fn` raised, with the child's traceback as a note; TimeoutError; ChildDied where the child was killed or
    left by itself. Whatever happens, also to this process, the child is gone afterwards.
    """
    context, name = mp.get_context(method), getattr(fn, "__qualname__", repr(fn))
    payload = pickle.dumps((fn, args))
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, payload, memory), name=name)
    answer = None
    try:
        with _main_hidden(unless=b"__main__" in payload):
            child.start()
        sender.close()  # the child's end is the only one now: when it dies, the pipe ends
        if not connection.wait([receiver, child.sentinel], timeout):
            raise TimeoutError(f"{name} was ended: it took longer than {timeout:g} s")
        if receiver.poll():  # a result, or the end of the pipe
            answer = receiver.recv_bytes()
    except (EOFError, ConnectionError):  # the child, or the fork server, has been killed
        pass
    finally:  # on KeyboardInterrupt too
        status = _end(child, patience=0 if answer is None and sys.exc_info()[0] else GRACE)
        receiver.close()
        sender.close()
    if answer is None:
        raise ChildDied(f"{name}: {_obituary(status)}")
    result, error = pickle.loads(answer)
    if error is not None:
        raise error
    return result


def _child(sender: connection.Connection, payload: bytes, memory: float | None) -> None:
    """What the child does: call the function, send what came of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the child
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        if memory:
            _limit_memory(memory)
        fn, args = pickle.loads(payload)
        answer = pickle.dumps((fn(*args), None))
    except BaseException as error:
        answer = pickle.dumps((None, _portable(error)))
    sender.send_bytes(answer)


def _leave_with_parent() -> None:
    connection.wait([mp.parent_process().sentinel])
    os._exit(1)


def _limit_memory(mib: float) -> None:
    """Let this process allocate `mib` MiB more: what goes beyond raises MemoryError, or RuntimeError in PyTorch."""
    import resource

    with contextlib.suppress(FileNotFoundError), open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[5])  # data and stack, which is what RLIMIT_DATA counts
        limit = pages * resource.getpagesize() + int(mib * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _portable(error: BaseException) -> Exception:
    """The error with its traceback as a note, or, where it can't be pickled, another that says the same."""
    trace = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, Exception):  # SystemExit and the like were meant for the child
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In the child process:\n{trace}")
    return error


@contextlib.contextmanager
def _main_hidden(unless: bool) -> Iterator[None]:
    """Keep multiprocessing from importing this program's main script in the child, unless the function is from there.

    In a Ray worker the main script is Ray's, and importing it costs half a second. Only this thread must not see where
    the script is: others may ask at the same time, and Ray, for one, fails without an answer.
    """
    main, this_thread = sys.modules["__main__"], threading.get_ident()

    class Main(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            if name in ("__file__", "__spec__") and threading.get_ident() == this_thread:
                return None
            return super().__getattribute__(name)

    with STARTING:
        kind = type(main)
        if kind is types.ModuleType and not unless:
            main.__class__ = Main
        try:
            yield
        finally:
            main.__class__ = kind


def _end(child: Any, patience: float) -> int | None:
    """Wait for a child, kill it where it does not go, and return its exit status; None where it never started."""
    if child.pid is None:
        return None
    child.join(patience)
    if child.exitcode is None:
        child.kill()
        child.join()
    status = child.exitcode
    child.close()
    return status


def _obituary(status: int | None) -> str:
    if status is None:
        return "the child process could not be started"
    if status >= 0:
        return f"the child process left with status {status}, without a result"
    name = signal.Signals(-status).name
    hints = {"SIGKILL": ", as the kernel does when memory runs out", "SIGSEGV": ": a crash in native code"}
    return f"the child process was killed by {name}{hints.get(name, '')}"
