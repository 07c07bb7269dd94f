"""Refuses what would make a run fail later, such as too little memory; knows the limits of machine or container."""

import contextlib
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

BASE = {"deployment": 700, "simulation": 900}  # MiB: SuperLink, ServerApp, the launcher, `flwr run`; Ray's services
CLIENT = {True: 60, False: 180}  # MiB of an idle SuperNode and its superexec, forked or not
WORK = {True: 150, False: 370}  # MiB of a client at work
SHORT = 24  # bytes of a path that leave room for the names of Ray's sockets, which may have 107, on macOS 103, in all


def check(settings: Settings) -> str | None:
    """Return a warning, or None. Raises SetupError, with what to type, where the run can't work."""
    if settings.port:
        try:
            socket.create_server(("127.0.0.1", settings.port)).close()
        except OSError as error:
            raise SetupError(
                f"port {settings.port} can't be used ({os.strerror(error.errno)}): leave PORT out"
            ) from None
    temporary_place()
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most if most != resource.RLIM_INFINITY else max(limit, 2**16), most))
    if settings.engine == "simulation":
        needed = BASE["simulation"] + min(settings.sampled, cores()) * WORK[False]
    else:
        needed = BASE["deployment"] + settings.clients * CLIENT[settings.warm] + settings.sampled * WORK[settings.warm]
    total, free = machine_memory()
    said = f"{settings.clients} clients need about {needed} MiB of memory"
    if needed > total:
        raise SetupError(f"{said}, and there are {total:.0f}: take fewer, or ENGINE=simulation, where they take turns")
    return f"{said}, and {free:.0f} are free now" if needed > free else None


def cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: by its affinity, and by its control group's share of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        for texts in control_group_files("cpu", names, root):
            quota, period = " ".join(texts).split()
            if quota not in ("max", "-1"):  # no limit
                allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return allowed


def machine_memory(root: Path = Path("/")) -> tuple[float, float]:
    """Return the MiB that this machine has, or that its control group may take, and those that are free, with swap."""
    total = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    with contextlib.suppress(OSError):  # not Linux
        lines = re.findall(r"(\w+): +(\d+) kB", (root / "proc/meminfo").read_text())
        known = {name: int(kib) / 1024 for name, kib in lines}
        total, free = known["MemTotal"] + known["SwapTotal"], known["MemAvailable"] + known["SwapFree"]
    for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for limit, used, stat in control_group_files("memory", (*names, "memory.stat"), root):
            if limit.strip() != "max":
                files = re.findall(r"(?m)^(?:total_)?inactive_file (\d+)", stat)  # copies of files, which give way
                unused = int(limit) - int(used) + max(map(int, files), default=0)
                total, free = min(total, int(limit) / 2**20), min(free, max(0, unused / 2**20))
    return total, free


def control_group_files(controller: str, names: tuple[str, ...], root: Path) -> Iterator[list[str]]:
    """Yield what stands in these files of this process's control group, and in those of the groups above it."""
    with contextlib.suppress(OSError):  # not Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controller in (controllers or controller).split(","):  # version 2 does not name them
                mount = root / "sys/fs/cgroup" / (controller if controllers else ".")
                for folder in (Path(group), *Path(group).parents):
                    with contextlib.suppress(OSError):  # this version of control groups lacks the files
                        yield [(mount / folder.relative_to("/") / name).read_text() for name in names]


def temporary_place() -> str:
    """Return a folder for temporary files whose path is short enough for the sockets in it. Raises SetupError."""
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(os.fsencode(place)) <= SHORT and os.access(place, os.W_OK | os.X_OK):
            return place
    raise SetupError(f"{tempfile.gettempdir()} is too long a path for sockets: TMPDIR=/a/short/path ./run.sh ...")
