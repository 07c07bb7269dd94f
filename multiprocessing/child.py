"""What a child does, and nothing else: it reads a call from its caller, makes it, and writes back what came of it."""

import contextlib
import ctypes
import io
import os
import pickle
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

NUMBER = 8  # bytes of a process id, and of an exit status, on a connection
PR_SET_PDEATHSIG = 1  # the signal that a process gets when its parent dies


def be_child(connection: socket.socket) -> NoReturn:
    """Call the function that the caller sends, send back what came of it, and end."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if sys.platform == "linux":  # elsewhere a child ends its work even where the fork server has been killed
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        connection.sendall(os.getpid().to_bytes(NUMBER))
        with connection.makefile("rb") as file:
            sys.path[:], variables, memory, call = pickle.load(file)
        os.environ.update(variables)  # CUDA_VISIBLE_DEVICES, for one, by which the caller picks a GPU
        connection.sendall(_answer(call, memory))
        sys.stdout.flush()
        sys.stderr.flush()
        status = 0
    finally:
        os._exit(status)  # not as Python ends: there is nothing to clean up that the kernel does not


def _answer(call: bytes, memory: float | None) -> bytes:
    """Return the pickle of (result, None), or of (None, error)."""
    try:
        if memory:
            _limit_memory(memory)
        fn, args = pickle.loads(call)
        return pickle.dumps((fn(*args), None))
    except BaseException as error:
        return pickle.dumps((None, portable(error)))


def _limit_memory(mib: float) -> None:
    """Let this process allocate `mib` MiB more: what goes beyond raises MemoryError, or RuntimeError in PyTorch."""
    import resource

    with contextlib.suppress(FileNotFoundError), open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[5])  # data and stack, which is what RLIMIT_DATA counts
        limit = pages * resource.getpagesize() + int(mib * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


class BuiltIns(pickle.Unpickler):
    """Makes again what consists of Python's own classes alone."""

    def find_class(self, module: str, name: str) -> Any:
        if module != "builtins":
            raise pickle.UnpicklingError(f"{module}.{name} is not Python's own")
        return super().find_class(module, name)


def portable(error: BaseException) -> Exception:
    """Return the error with its traceback as a note, or, where it isn't Python's own, one that says the same.

    To unpickle one of PyTorch's errors the caller would import PyTorch, some hundred MiB that it keeps.
    """
    trace = "".join(traceback.format_exception(error))
    try:
        copy = BuiltIns(io.BytesIO(pickle.dumps(error))).load()
    except Exception:
        copy = None
    if not isinstance(copy, Exception):  # SystemExit and the like were meant for the child
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(f"In the child process:\n{trace}")
    return copy
