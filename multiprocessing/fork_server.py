"""The process that children are forked from: it has no threads, and has imported what many children need.

    python fork_server.py SOCKET

isolation.py starts it and talks to it. On a connection come the process id of a new child, which then reads the call
and writes its answer, and from this process the id again, without which an answer was cut off, and the exit status.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import sys
import traceback
from typing import NoReturn

# Imported once, for all children. The first optimizer would import torch._dynamo, for more than a second.
MODULES = ("torch", "torch._dynamo", "cifar_utils", "work")

# For glibc, whose malloc reads it when a program begins: memory in huge pages, of which a fork has fewer to copy, and
# none given back to the kernel between two training steps. Together a tenth of a short call; elsewhere of no effect.
ALLOCATION = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=268435456"

NUMBER = 8  # bytes of a process id, and of an exit status, on a connection
PR_SET_PDEATHSIG = 1  # the signal that a process gets when its parent dies
PATIENCE = 120.0  # seconds that a caller may take to read the answer


def serve(address: str) -> None:
    """Fork a child for each connection to the socket at `address`, until the parent of this process ends."""
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
    connection.settimeout(PATIENCE)
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
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATION
        os.execv(sys.executable, sys.orig_argv)  # it is read when a program begins
    serve(sys.argv[1])
