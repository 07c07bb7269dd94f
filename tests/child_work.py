"""What test_isolation.py lets child processes do. A module of its own, since a child imports it without pytest."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any, NoReturn


class Stubborn(Exception):
    """Can be pickled, but not be made again from that: it wants two arguments."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


def add(a: Any, b: Any) -> Any:
    return a + b


def echo(data: bytes) -> tuple[bytes, int]:
    return data, os.getpid()


def fail(error: BaseException) -> NoReturn:
    raise error


def fail_stubbornly() -> NoReturn:
    raise Stubborn(7, "no")


def fail_like_cuda() -> NoReturn:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def fail_with_a_tensor() -> NoReturn:
    import torch

    raise ValueError(torch.ones(1))


def kill_itself(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(100)


def leave(status: int) -> NoReturn:
    os._exit(status)


def allocate(mib: int) -> int:
    return len(bytearray(mib * 2**20))


def fill_memory() -> NoReturn:
    """Take all that there is, in small pieces."""
    pieces = []
    while True:
        pieces.append(bytes(1000))


def allocate_tensor(mib: int) -> int:
    import torch

    return torch.ones(mib * 2**18).numel()


def make_function() -> Any:
    return lambda: None


def variable(name: str) -> str | None:
    return os.environ.get(name)


def set_variable(name: str) -> None:
    os.environ[name] = "set in a child"


def count(folder: Path) -> tuple[int, str | None]:
    """Say how many work in a folder at the same time, of those that do this, and which GPU this one sees."""
    (folder / str(os.getpid())).touch()
    deadline, most = time.monotonic() + 1, 0
    while time.monotonic() < deadline:
        most = max(most, len(list(folder.iterdir())))
        time.sleep(0.02)
    (folder / str(os.getpid())).unlink()
    return most, os.environ.get("CUDA_VISIBLE_DEVICES")


def hang(pid_file: Path) -> None:
    """Say which process this is, then stay."""
    pid_file.with_suffix(".part").write_text(str(os.getpid()))
    pid_file.with_suffix(".part").rename(pid_file)
    time.sleep(100)


def leave_a_process_behind() -> int:
    return subprocess.Popen(["sleep", "100"]).pid
