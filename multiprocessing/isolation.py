"""Run a function in a child process, so that everything it took is given back when it returns: memory, and the GPU's.

    weights = run_isolated(train, weights, 0.01, timeout=300)

This file needs nothing but Python (Linux, macOS); copy it where you like, and let MODULES be what your functions need.

The child comes from a *fork server*: a process without threads that has imported what many children need, and forks
itself for each call. That takes a few hundredths of a second; a fresh interpreter would import PyTorch for two. The
caller is never forked itself: that would copy locks that its other threads hold, and CUDA does not survive it.
`multiprocessing` has such a server too, but one for each process; here a whole run shares one (FORK_SERVER names its
socket), which imports while the rest of the run is still starting, and takes its memory once.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

# Imported once, for all children. The first optimizer would import torch._dynamo, for more than a second.
MODULES = ("torch", "torch._dynamo", "cifar_utils")

NUMBER = 8  # bytes of a process id, and of an exit status, on a connection
PR_SET_PDEATHSIG = 1  # the signal that a process gets when its parent dies
START_TIMEOUT = 120.0  # seconds that a fork server may take to import
STARTING = threading.Lock()


class ChildDied(RuntimeError):
    """The child ended before it had a result; the text says by which signal, or with which status."""


# --- The caller ------------------------------------------------------------------------------------------------------


def start() -> None:
    """Start a fork server, in the background; do nothing where there is one. `run_isolated` does it where it must."""
    with STARTING:
        if "FORK_SERVER" not in os.environ:
            folder = tempfile.mkdtemp(prefix="fork-")  # readable for this user alone, and so is the socket in it
            os.environ["FORK_SERVER"] = address = f"{folder}/socket"
            server = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.DEVNULL)
            atexit.register(_stop, server, folder)


def _stop(server: subprocess.Popen[bytes], folder: str) -> None:
    server.terminate()
    server.wait()
    shutil.rmtree(folder, ignore_errors=True)


def run_isolated(fn: Callable[..., Any], *args: Any, timeout: float | None = None, memory: float | None = None) -> Any:
    """Return fn(*args), run in a fresh child process.

    `fn` is from a module (no lambda, and not from the main script), and `fn`, `args` and the result can be pickled.
    `timeout` is in seconds, from when the child runs; `memory`, in MiB, is how much more the child may allocate than it
    starts with (Linux only). The child has this process's environment variables and `sys.path`.

    Raises what `fn` raised, with the child's traceback as a note; TimeoutError; ChildDied where the child was killed or
    left by itself. Whatever happens, also to this process, the child is gone afterwards.
    """
    start()
    name = getattr(fn, "__qualname__", repr(fn))
    request = pickle.dumps((sys.path, dict(os.environ), memory, pickle.dumps((fn, args))))
    with _connect(os.environ["FORK_SERVER"]) as server:
        greeting = server.recv(NUMBER)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with contextlib.suppress(ConnectionError):  # what became of a child that does not listen is still to come
                server.sendall(request)
            answer = _read(server, deadline)
        except BaseException as error:  # KeyboardInterrupt too
            if greeting:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int.from_bytes(greeting), signal.SIGKILL)
                _read(server)  # to the end, which comes when the child is gone
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"{name} was ended: it took longer than {timeout:g} s") from None
            raise
    if not greeting or answer[-2 * NUMBER : -NUMBER] != greeting:
        raise ChildDied(f"{name}: the fork server has ended")
    answer, status = answer[: -2 * NUMBER], int.from_bytes(answer[-NUMBER:], signed=True)
    if status or not answer:
        raise ChildDied(f"{name}: {_obituary(status)}")
    result, error = pickle.loads(answer)
    if error is not None:
        raise error
    return result


def _connect(address: str) -> socket.socket:
    """Connect to the fork server, which answers when it has imported everything."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            return connection
        except ConnectionRefusedError:
            connection.close()
            raise ChildDied(f"the fork server at {address} has ended") from None
        except FileNotFoundError:
            connection.close()
            if time.monotonic() > deadline:
                raise ChildDied(f"no fork server answers at {address}") from None
            time.sleep(0.02)


def _read(connection: socket.socket, deadline: float | None = None) -> bytes:
    """All that comes until the other side closes: the answer, process id and exit status. Raises TimeoutError."""
    received = bytearray()
    connection.settimeout(None)
    while True:
        if deadline is not None:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
        piece = connection.recv(2**20)
        if not piece:
            return bytes(received)
        received += piece


def _obituary(status: int) -> str:
    if status >= 0:
        return f"the child process left with status {status}, without a result"
    name = signal.Signals(-status).name
    hints = {"SIGKILL": ", as the kernel does when memory runs out", "SIGSEGV": ": a crash in native code"}
    return f"the child process was killed by {name}{hints.get(name, '')}"


# --- The fork server -------------------------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Fork a child for each connection to the socket at `address`, until the parent of this process ends.

    On a connection come the child's process id and its answer, both from the child, and from here the process id again,
    without which an answer was cut off, and the exit status.
    """
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the callers, which end their children
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # a collection in a child would copy every page that it touches

    children: dict[int, socket.socket] = {}
    woken, wake = socket.socketpair()  # becomes readable when a child has ended
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}-")
    listener.listen(1024)
    os.rename(f"{address}-", address)  # whoever sees it can connect, as long as this process lives
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(woken, select.POLLIN)

    while os.getppid() == parent:
        ready = {descriptor for descriptor, _ in poll.poll(1000)}
        for child, connection in children.items():
            if connection.fileno() in ready:  # its caller has gone away
                os.kill(child, signal.SIGKILL)
        if woken.fileno() in ready:
            woken.recv(4096)
            while ended := _ended():
                child, status = ended
                connection = children.pop(child)
                poll.unregister(connection)
                _report(connection, child, status)
        if listener.fileno() in ready:
            connection, _ = listener.accept()
            child = os.fork()
            if child == 0:
                for inherited in (listener, woken, wake, *children.values()):
                    inherited.close()
                _be_child(connection)
            children[child] = connection
            poll.register(connection, 0)  # 0: nothing but that the caller has closed it
    for child in children:
        os.kill(child, signal.SIGKILL)
    os.unlink(address)


def _ended() -> tuple[int, int] | None:
    """The process id and the status of a child that has ended: an exit status, or a signal's number below zero."""
    try:
        child, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:  # there are none
        return None
    return (child, os.waitstatus_to_exitcode(status)) if child else None


def _report(connection: socket.socket, child: int, status: int) -> None:
    """Send the status, and close the connection even where a process that the child has left holds it open, too."""
    connection.settimeout(START_TIMEOUT)
    with connection, contextlib.suppress(OSError):  # the caller may be gone
        connection.sendall(child.to_bytes(NUMBER) + status.to_bytes(NUMBER, signed=True))
        connection.shutdown(socket.SHUT_RDWR)


# --- The child -------------------------------------------------------------------------------------------------------


def _be_child(connection: socket.socket) -> NoReturn:
    """Call the function that the caller sends, and send back what came of it."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if sys.platform == "linux":  # elsewhere a child ends its work even where the fork server has been killed
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        connection.sendall(os.getpid().to_bytes(NUMBER))
        with connection.makefile("rb") as file:
            sys.path[:], variables, memory, call = pickle.load(file)
        os.environ.update(variables)  # CUDA_VISIBLE_DEVICES, for one, which Ray sets for each actor
        connection.sendall(_answer(call, memory))
        sys.stdout.flush()
        sys.stderr.flush()
        status = 0
    finally:
        os._exit(status)  # not as Python ends: there is nothing to clean up that the kernel does not


def _answer(call: bytes, memory: float | None) -> bytes:
    """The pickle of (result, None), or of (None, error)."""
    try:
        if memory:
            _limit_memory(memory)
        fn, args = pickle.loads(call)
        return pickle.dumps((fn(*args), None))
    except BaseException as error:
        return pickle.dumps((None, _portable(error)))


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


if __name__ == "__main__":
    serve(sys.argv[1])
