"""The process that children are forked from: it has no threads, and has imported what many children need.

    python fork_server.py AT_ONCE SOCKET [SOCKET ...]

It waits at each socket, one for each GPU, and has at most AT_ONCE children there (0: as many as are asked for); who
comes then waits for one to end. isolation.py starts it and talks to it. On a connection come the process id of a new
child, which then reads the call and writes its answer (child.py), and from this process the id again, without which an
answer was cut off, and the exit status.
"""

import contextlib
import gc
import importlib
import os
import select
import shutil
import signal
import socket
import sys

from child import NUMBER, be_child

# Imported once, for all children. The first optimizer would import torch._dynamo, for more than a second.
MODULES = ("torch", "torch._dynamo", "cifar_utils", "work")

# For glibc, whose malloc reads it when a program begins: memory in huge pages, of which a fork has fewer to copy, and
# none given back to the kernel between two training steps. Together a tenth of a short call; elsewhere of no effect.
ALLOCATION = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=268435456"

NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"  # with "1", torch.cuda.is_available() asks the driver without using CUDA
PATIENCE = 120.0  # seconds that a caller may take to read the answer


class Door:
    """A socket where callers come, and the children that were forked for them."""

    def __init__(self, address: str, at_once: int) -> None:
        self.address, self.at_once = address, at_once
        self.children: dict[int, socket.socket] = {}  # by process id, the connection to its caller
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{address}-")
        self.listener.listen(1024)
        os.rename(f"{address}-", address)  # whoever sees it can connect, as long as this process lives

    def is_full(self) -> bool:
        return 0 < self.at_once <= len(self.children)


def serve(at_once: int, addresses: list[str]) -> None:
    """Fork a child for each connection, until the parent of this process ends."""
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the callers, which end their children
    load(MODULES)
    woken, wake = socket.socketpair()  # becomes readable when a child has ended
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    doors = [Door(address, at_once) for address in addresses]
    poll = select.poll()
    poll.register(woken, select.POLLIN)

    while os.getppid() == parent:
        for door in doors:
            poll.register(door.listener, 0 if door.is_full() else select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(1000)}
        if woken.fileno() in ready:
            woken.recv(4096)
            while ended := _ended():
                child, status = ended
                connection = next(door.children.pop(child) for door in doors if child in door.children)
                poll.unregister(connection)
                _report(connection, child, status)
        for door in doors:
            for child, connection in door.children.items():
                if connection.fileno() in ready:  # its caller has gone away
                    os.kill(child, signal.SIGKILL)
            if door.listener.fileno() in ready:
                connection, _ = door.listener.accept()
                child = os.fork()
                if child == 0:
                    for other in doors:
                        for inherited in (other.listener, *other.children.values()):
                            inherited.close()
                    woken.close()
                    wake.close()
                    be_child(connection)
                door.children[child] = connection
                poll.register(connection, 0)  # 0: nothing but that the caller has closed it
    for door in doors:
        for child in door.children:
            os.kill(child, signal.SIGKILL)
        os.unlink(door.address)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(door.address))  # where nothing else is in it


def load(names: tuple[str, ...]) -> None:
    """Import what the children need. Exits where a module has initialised CUDA, which no child could use then."""
    before = os.environ.get(NVML_CHECK)
    os.environ[NVML_CHECK] = "1"  # for `DEVICE = "cuda" if torch.cuda.is_available() else "cpu"` at module level
    for name in names:
        importlib.import_module(name)
        if spoiled():
            sys.exit(
                f"error: {name}, or what it imports, uses CUDA while it is imported, and a process that is forked "
                "afterwards can't: move that line into a function (torch.cuda.is_available() alone may stay)"
            )
    del os.environ[NVML_CHECK]  # a child asks CUDA itself
    if before is not None:
        os.environ[NVML_CHECK] = before
    gc.freeze()  # a collection in a child would copy every page that it touches


def spoiled() -> bool:
    """Tell if there may be a GPU, and a forked process can't use it any more; only such a process knows."""
    torch = sys.modules.get("torch")
    if not torch or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not shutil.which("nvidia-smi"):
        return False
    child = os.fork()
    if child == 0:
        os._exit(torch.cuda._is_in_bad_fork())
    return os.waitpid(child, 0)[1] != 0


def _ended() -> tuple[int, int] | None:
    """Return the process id and the status of a child that has ended: an exit status, or below zero, a signal."""
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


if __name__ == "__main__":
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATION
        os.execv(sys.executable, sys.orig_argv)  # it is read when a program begins
    serve(int(sys.argv[1]), sys.argv[2:])
