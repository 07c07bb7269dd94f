"""What would make a run fail later, said before it starts: packages, proxies, port, open files, memory, disk."""

import errno
import importlib.metadata
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launcher import data_dir, dataset, engine
from launcher.arguments import Settings
from launcher.environment import SetupError, numbers

TESTED = {"flwr": "1.41.0", "ray": "2.55.1", "torch": "2.14.1", "torchvision": "0.29.1", "numpy": "2.4.6"}
MIB = 2**20
RUN_DISK = 16  # MiB of a run's folder, and of the temporary one: logs, models, what Ray writes
DATA_DISK = {"cifar10": 520, "synthetic": 50}  # MiB while it is made: the archive, what is in it, the arrays
BASE_MEMORY, CLIENT_MEMORY = 700, 180  # MiB: SuperLink, ServerApp and `flwr run`; a SuperNode's two processes
BASE_FILES, CLIENT_FILES = 64, 2  # open at once


def check(settings: Settings) -> list[str]:
    """Return warnings. Raises SetupError, with what to type, where the run can't work."""
    for problem in (packages(settings), proxies(), port(settings), memory(settings), files(settings), *disk(settings)):
        if problem:
            raise SetupError(problem)
    return [warning for warning in (versions(), crowd(settings)) if warning]


def versions() -> str | None:
    """Versions that differ in more than their last number from those that the examples were tested with."""
    others = []
    for name, tested in TESTED.items():
        here = installed(name)
        if here and numbers(here)[:2] != numbers(tested)[:2]:
            others.append((f"{name} {here}", f"{name}=={tested}"))
    if not others:
        return None
    here, tested = (" ".join(column) for column in zip(*others, strict=True))
    return f"not tested with {here}; if something fails: pip install {tested}"


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages(settings: Settings) -> str | None:
    if settings.engine == "simulation" and not installed("ray"):
        return f'ENGINE=simulation needs Ray: pip install "flwr[simulation]=={TESTED["flwr"]}"'
    return None


def proxies() -> str | None:
    """Localhost is always excepted from proxies; but there are settings with which Flower's HTTP client can't start."""
    names = [name for name, value in os.environ.items() if name.lower().endswith("_proxy") and value]
    if names:
        import httpx  # what Flower uses; it reads the variables at once, and takes a while to import

        try:
            httpx.Client(verify=False).close()  # no connection yet, so nothing to verify
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            unset = " ".join(f"-u {name}" for name in names)
            return f"Flower can't work with {', '.join(names)} as they are ({error}): env {unset} ./run.sh ..."
    return None


def port(settings: Settings) -> str | None:
    """That PORT, where it is set, can be listened on."""
    if settings.port is None:
        return None
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended don't matter
        try:
            one.bind((engine.HOST, settings.port))
        except OSError as error:
            said = (
                "is in use: stop what listens there"
                if error.errno == errno.EADDRINUSE
                else f"can't be used ({error.strerror})"
            )
            return f"port {settings.port} {said}, or leave PORT out and a free one is taken"
    return None


def files(settings: Settings) -> str | None:
    """That enough files, which connections are too, can be open at once."""
    if settings.engine == "deployment":
        limit, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], BASE_FILES + CLIENT_FILES * settings.clients
        if resource.RLIM_INFINITY != limit < needed:
            return f"{settings.clients} clients need {needed} open files, and {limit} are allowed: ulimit -n {needed}"
    return None


def memory(settings: Settings) -> str | None:
    """That the SuperNodes fit into the machine. An example with a capacity.py of its own knows better."""
    needed, total = needed_memory(settings), machine_memory("MemTotal", "SwapTotal")
    if needed > total:
        return (
            f"{settings.clients} clients need about {needed:.0f} MiB of memory, and there are {total:.0f}: "
            "take fewer, or ENGINE=simulation"
        )
    return None


def crowd(settings: Settings) -> str | None:
    """A warning where the SuperNodes fit into the machine, but not beside what else is running now."""
    needed, free = needed_memory(settings), machine_memory("MemAvailable", "SwapFree")
    if needed > free:
        return f"{settings.clients} clients need about {needed:.0f} MiB of memory, and {free:.0f} are free now"
    return None


def needed_memory(settings: Settings) -> float:
    if settings.engine == "simulation" or (settings.folder / "capacity.py").is_file():
        return 0
    return BASE_MEMORY + CLIENT_MEMORY * settings.clients


def machine_memory(*kinds: str) -> float:
    """MiB in all of some lines of /proc/meminfo; infinitely many where there is none, as on macOS."""
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    except FileNotFoundError:
        return float("inf")
    return sum(int(words[1]) / 1024 for words in lines if words[0].rstrip(":") in kinds)


def disk(settings: Settings) -> Iterator[str]:
    """That there is room for what the run writes: itself, temporary files, and the data where that is not ready."""
    places = [
        (settings.folder / "runs", RUN_DISK, "the run; make room there"),
        (Path(tempfile.gettempdir()), RUN_DISK, "temporary files; TMPDIR=... takes another folder"),
    ]
    name = {"auto": "cifar10"}.get(settings.dataset, settings.dataset)
    if name in DATA_DISK and not dataset.find(settings.dataset):
        places.append((data_dir(), DATA_DISK[name], f"the data set {name}; DATA_DIR=... takes another folder"))
    for folder, needed, what in places:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / MIB
        if free < needed:
            yield f"{free:.0f} MiB of disk are free in {there}, and {needed} are needed for {what}"
