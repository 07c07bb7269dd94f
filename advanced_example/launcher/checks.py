"""Refuses what would make a run fail later, such as too little memory; knows the limits of machine or container."""

import contextlib
import errno
import importlib.util
import math
import os
import re
import resource
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launcher.arguments import Settings
from launcher.environment import SetupError

BASE = {"deployment": 700, "simulation": 900}  # MiB: SuperLink, ServerApp, the starter, `flwr run`; Ray's services
CLIENT = {True: 60, False: 180}  # MiB of an idle SuperNode and its superexec, forked or not
WORK = {True: 150, False: 370}  # MiB of a client at work
SHORT = 24  # bytes of a path that leave room for the names of Ray's sockets, which may have 107, on macOS 103, in all


def check(settings: Settings) -> str | None:
    """Return a warning, or None. Raises SetupError, with what to type, where the run can't work."""
    if settings.engine == "simulation" and not importlib.util.find_spec("ray"):
        raise SetupError("ENGINE=simulation needs Ray: install requirements.txt, which asks for flwr[simulation]")
    if settings.port:
        check_port(settings.port)
    temporary_place()
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most if most != resource.RLIM_INFINITY else max(limit, 2**16), most))
    needed, (total, free) = memory(settings), machine_memory()
    said = f"{settings.clients} clients need about {needed:.0f} MiB of memory"
    if needed > total:
        raise SetupError(
            f"{said}, and there are {total:.0f}: take fewer, or ENGINE=simulation, which plays them in turn"
        )
    return f"{said}, and {free:.0f} are free now" if needed > free else None


def check_port(port: int) -> None:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended don't matter
        try:
            one.bind(("127.0.0.1", port))
        except OSError as error:
            used = "is in use: stop what listens there" if error.errno == errno.EADDRINUSE else "can't be used"
            said = f"port {port} {used} ({error.strerror}), or leave PORT out and a free one is taken"
            raise SetupError(said) from None


def memory(settings: Settings) -> float:
    """Return the MiB that a run takes at its peak, roughly."""
    if settings.engine == "simulation":
        return BASE["simulation"] + min(settings.sampled, cores()) * WORK[False]
    return BASE["deployment"] + settings.clients * CLIENT[settings.warm] + settings.sampled * WORK[settings.warm]


# --- The machine, or the container that this process is in -----------------------------------------------------------


def cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: by its affinity, and by its control group's share of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in control_groups("cpu", root):
        with contextlib.suppress(OSError, ValueError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if float(quota) > 0:  # "max" is no number, -1 no limit
                allowed = min(allowed, math.ceil(float(quota) / float(period)))
    return max(1, allowed)


def machine_memory(root: Path = Path("/")) -> tuple[float, float]:
    """Return the MiB that this machine has, or that its control group may take, and those that are free, with swap."""
    total = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    with contextlib.suppress(OSError):  # not Linux
        lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
        known = {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines}
        total, free = known["MemTotal"] + known["SwapTotal"], known["MemAvailable"] + known["SwapFree"]
    for folder in control_groups("memory", root):
        for name, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):
                limit, taken = (int((folder / one).read_text()) / 2**20 for one in (name, used))
                stale = re.findall(r"(?m)^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text())
                taken -= max(map(int, stale), default=0) / 2**20  # copies of files, which give way
                total, free = min(total, limit), min(free, max(0, limit - taken))
    return total, free


def control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders, of version 1 or 2, of this process's control group and those above: their limits hold."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                mount = root / "sys/fs/cgroup" / (controller if controllers else ".")
                for folder in (Path(group), *Path(group).parents):
                    yield mount / folder.relative_to("/")


def temporary_place() -> str:
    """Return a folder for temporary files whose path is short enough for the sockets in it. Raises SetupError."""
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(os.fsencode(place)) <= SHORT and os.access(place, os.W_OK | os.X_OK):
            return place
    raise SetupError(f"{tempfile.gettempdir()} is too long a path for sockets: TMPDIR=/short/path ./run.sh ...")
