"""Will it fit, and about how long will it take? One line before the start, or a refusal with the numbers.

The launcher calls `plan` with the settings that it has read. What the last completed run of the same work measured
counts; before there is one, the figures below do: of this folder's own network, on Linux, without a GPU.
"""

import json
import os
import shutil
import statistics
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.arguments import Settings
from launcher.engine import at_once
from launcher.values import UsageError

# MiB that are a process's own: pages that it shares are counted once in all. (Resident sizes count them each time.)
BASE = {"simulation": 900, "deployment": 700}  # SuperLink, ServerApp, fork server, `flwr run`; Ray's services
SUPERNODE = 180  # two processes for each client, in deployment
OWN = {"client": 115, "client's child": 145}
RESIDENT = {"client": 169, "client's child": 415}  # what the history says where OWN is true: what is more, is own too
IN_PLACE = 760  # a client's own without isolation: it has PyTorch itself
DEVICE = 1500  # of the GPU's memory for a child: a CUDA context, and some room. Not measured: there was no GPU

START = 15.0  # seconds that are no round's
EXAMPLES, SPEED, CALL = 50_000, 3000, 0.1  # training examples; of them, a core's a second; seconds a child, beside that

# Keys of the run config that say how large a run is, not what a client does in a round.
SIZE = {"min-clients", "sampled-clients", "num-server-rounds", "seed", "round-timeout", "child-timeout", "child-memory"}
GIB = 1024  # MiB
History = dict[str, Any]


def plan(settings: Settings) -> Settings:
    """Print the plan; return the settings, with GPU_SLOTS where there is a GPU. Raises UsageError if it can't fit."""
    before = last_run(settings)
    free_on_gpu = gpu_memory()
    if free_on_gpu is not None and settings.gpu_slots is None:
        settings = replace(settings, gpu_slots=max(1, int(free_on_gpu / device_memory(before))))
    needed, (total, free) = memory(settings, before), machine_memory()
    if needed > total:
        raise UsageError(
            f"{text(settings)} take about {needed / GIB:.1f} GiB of memory, and this machine has {total / GIB:.1f}: "
            + fix(settings)
        )
    line = f"Plan: {working(settings)} of {settings.sampled} clients at once, "
    line += f"about {needed / GIB:.1f} of {total / GIB:.1f} GiB of memory"
    if needed > free:
        line += f" (only {free / GIB:.1f} are free now!)"
    if free_on_gpu is not None:
        line += f", {settings.gpu_slots} share {free_on_gpu / GIB:.1f} GiB of the GPU"
    source = f"by run {before['name']}" if before else "roughly: no such run was measured here yet"
    print(f"{line}, about {duration(seconds(settings, before))} ({source})")
    return settings


# --- What is needed --------------------------------------------------------------------------------------------------


def memory(settings: Settings, before: History | None) -> float:
    """MiB in all, at the peak."""
    client, child = (own(who, before) for who in OWN)
    busy = working(settings) * (client + child if settings.config["isolation"] else max(client, IN_PLACE))
    if settings.engine == "simulation":
        return BASE["simulation"] + busy
    asked = settings.clients * client if settings.sampled < settings.clients else 0  # all say who they are, once
    return BASE["deployment"] + settings.clients * SUPERNODE + max(busy, asked)


def own(who: str, before: History | None) -> float:
    measured = [entry.get("memory", {}).get(who, 0) for entry in before["rounds"]] if before else []
    return OWN[who] + max(0, max(measured, default=0) - RESIDENT[who])


def device_memory(before: History | None) -> float:
    """MiB of the GPU for one client: what was in use, whoever used it, shared by those who worked."""
    measured = [entry.get("memory", {}).get("client's device", 0) for entry in before["rounds"]] if before else []
    return max(measured, default=0) / min(before["sampled"], os.cpu_count() or 1) if any(measured) else DEVICE


def working(settings: Settings) -> int:
    """How many clients work at once: in deployment all that are sampled do, whether or not there are cores for them."""
    return at_once(settings) if settings.engine == "simulation" else settings.sampled


def seconds(settings: Settings, before: History | None) -> float:
    """Seconds of the whole run; a round's grow with the examples that are trained on in it."""
    cores = min(working(settings), os.cpu_count() or 1)
    share = settings.sampled / settings.clients / cores
    calls = CALL * settings.sampled / cores
    start, training = START, EXAMPLES * share * settings.config["local-epochs"] / SPEED
    if before:
        rounds = [entry["seconds"] for entry in before["rounds"][1:]]  # the first is before anybody trains
        pace = statistics.median(rounds)  # not the mean: a simulation starts Ray in a round
        then = min(before["sampled"], os.cpu_count() or 1)
        start = max(0.0, before["seconds"] - len(rounds) * pace)
        training = max(0.0, pace - CALL * before["sampled"] / then)
        training *= share / (before["sampled"] / before["clients"] / then)
    return start + settings.config["num-server-rounds"] * (calls + training)


# --- What was, and what there is -------------------------------------------------------------------------------------


def last_run(settings: Settings) -> History | None:
    """The newest completed run of the same work: it may differ in its numbers of clients and rounds alone."""

    def work(config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key not in SIZE}

    for path in sorted(settings.folder.glob("runs/2*/history.json"), reverse=True)[:50]:
        with suppress(Exception):  # removed just now, or not as this version writes it
            run = json.loads(path.read_text())
            same = (run["engine"], work(run["config"])) == (settings.engine, work(settings.config))
            same &= settings.dataset in ("auto", run["dataset"])
            if same and run["status"] == "completed" and len(run["rounds"]) > 1:
                return {**run, "name": path.parent.name}
    return None


def machine_memory(root: Path = Path("/")) -> tuple[float, float]:
    """MiB that this machine has, or that its control group (a container's, for one) may take; and that are free."""
    total = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    with suppress(OSError):  # not Linux
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) / 1024
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):  # version 2 of control groups, or version 1
                mount, name = ("memory", "memory.limit_in_bytes") if controllers else (".", "memory.max")
                for folder in (Path(group), *Path(group).parents):  # a limit holds for all below
                    with suppress(OSError, ValueError):  # it is not seen from here, or says "max"
                        limit = root / "sys/fs/cgroup" / mount / folder.relative_to("/") / name
                        total = min(total, int(limit.read_text()) / 2**20)
    return total, min(free, total)


def gpu_memory() -> float | None:
    """MiB that are free on the GPU, the fullest where there are several; None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, subprocess.TimeoutExpired):
        said = subprocess.run(query, capture_output=True, text=True, timeout=10)
        return min(float(word) for word in said.stdout.split())  # ValueError where it has found none
    return None


# --- What is said ----------------------------------------------------------------------------------------------------


def text(settings: Settings) -> str:
    if settings.engine == "deployment":
        return f"{settings.clients} SuperNodes, two processes each, with {settings.sampled} clients at work"
    return f"{working(settings)} clients at once"


def fix(settings: Settings) -> str:
    if settings.engine == "deployment":
        return "take fewer CLIENTS, or ENGINE=simulation, whose memory does not grow with them"
    return "sample fewer, so that fewer work at once, or set GPU_SLOTS"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
