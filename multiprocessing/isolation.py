"""Run a function in a child process, so that everything it took is given back when it returns: memory, and the GPU's.

    weights = run_isolated(train, weights, 0.01, timeout=300)

This file, fork_server.py and child.py need nothing but Python (Linux, macOS); copy them where you like, and let MODULES
in fork_server.py be what your functions need.

The child comes from a *fork server*, in a few hundredths of a second; a fresh interpreter would import PyTorch for two.
The caller is never forked itself: that would copy locks that its other threads hold, and CUDA does not survive it.
`multiprocessing` has such a server too, but one for each process; here a whole run shares one, which imports while
the rest of the run is still starting, and takes its memory once. FLOWER_EXAMPLE_FORK_SERVER names its sockets.
"""

import atexit
import contextlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from child import NUMBER

FORK_SERVER = "FLOWER_EXAMPLE_FORK_SERVER"  # the variable with its sockets: one, or one for each GPU
START_TIMEOUT = 120.0  # seconds that a fork server may take to import
STARTING = threading.Lock()


class ChildDied(RuntimeError):
    """The child ended before it had a result; the text says by which signal, or with which status."""


def start() -> None:
    """Start a fork server, in the background; do nothing where there is one. `run_isolated` does it where it must."""
    with STARTING:
        if FORK_SERVER not in os.environ:
            folder = tempfile.mkdtemp(prefix="fork-")  # readable for this user alone, and so is the socket in it
            os.environ[FORK_SERVER] = address = f"{folder}/socket"
            script = Path(__file__).with_name("fork_server.py")
            server = subprocess.Popen([sys.executable, script, "0", address], stdin=subprocess.DEVNULL)
            atexit.register(_stop, server, folder)


def _stop(server: subprocess.Popen[bytes], folder: str) -> None:
    server.terminate()
    server.wait()
    shutil.rmtree(folder, ignore_errors=True)


def run_isolated(
    fn: Callable[..., Any],
    *args: Any,
    timeout: float | None = None,
    memory: float | None = None,
    number: int = 0,
    environment: Mapping[str, str] = os.environ,
) -> Any:
    """Return fn(*args), run in a fresh child process.

    `fn` is from a module (no lambda, and not from the main script), and `fn`, `args` and the result can be pickled.
    `timeout` is in seconds, from when the child runs; `memory`, in MiB, is how much more the child may allocate than it
    starts with (Linux only). The child has this process's `sys.path`, and the variables of `environment`. Where
    CUDA_VISIBLE_DEVICES there lists several GPUs, it sees one of them, that at `number` modulo how many there are.

    Raises what `fn` raised, with the child's traceback as a note; TimeoutError; ChildDied where the child was killed or
    left by itself. Whatever happens, also to this process, the child is gone afterwards.
    """
    if FORK_SERVER not in environment:
        start()
    name = getattr(fn, "__qualname__", repr(fn))
    variables, sockets = dict(environment), environment[FORK_SERVER].split(os.pathsep)
    gpus = variables.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(gpus) > 1:
        variables["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    request = pickle.dumps((sys.path, variables, memory, pickle.dumps((fn, args))))
    with _connect(sockets[number % len(sockets)]) as server:
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
