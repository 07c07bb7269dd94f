"""Will it fit, and about how long will it take? One line before the start, or a refusal with the numbers.

What the last completed run of the same work measured counts; before there is one, the figures below do: of this
folder's own network, on Linux, without a GPU.
"""

import json
import statistics
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster import Cluster
from launcher.arguments import Settings
from launcher.checks import BASE, CLIENT, cores, machine_memory
from launcher.commands import at_once
from launcher.project import UsageError
from sharing import GIB, Sharing, share, share_of_cluster

# MiB that are a process's own: pages that it shares are counted once in all. (Resident sizes count them each time.)
OWN = {"client": 115, "client's child": 145}
RESIDENT = {"client": 178, "client's child": 527}  # what the history says where OWN is true: what is more, is own too
IN_PLACE = 760  # a client's own without isolation: it has PyTorch itself

START = 15.0  # seconds that are no round's
EXAMPLES, SPEED, CALL = 50_000, 3000, 0.1  # training examples; of them, a core's a second; seconds a child, beside that

# Keys of the run config that say how large a run is, not what a client does in a round.
SIZE = {"min-clients", "sampled-clients", "num-server-rounds", "seed", "round-timeout", "child-timeout", "child-memory"}
History = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How a run fits into the machine."""

    at_once: int  # clients that work at the same time
    sharing: Sharing  # of the GPUs
    text: str

    def __str__(self) -> str:
        return self.text


def make_plan(settings: Settings, cluster: Cluster | None = None) -> Plan:
    """Look at the machine, or the cluster, and at what was measured before. Raises UsageError if the run can't fit."""
    before = last_run(settings)
    sharing = share_of_cluster(settings.config, cluster) if cluster else share(settings.config, before)
    busy = working(settings, sharing, cluster)
    needed, (total, free) = memory(settings, before, busy), machine_memory()
    if cluster:
        total = free = sum(node.memory for node in cluster.nodes)
        if reason := cluster.lacks(at_work(settings, before)):
            raise UsageError(reason)
    if needed > total:
        raise UsageError(
            f"{text(settings, busy)} take about {needed / GIB:.1f} GiB of memory, and this machine has "
            f"{total / GIB:.1f}: {fix(settings)}"
        )
    line = f"Plan: {busy} of {settings.sampled} clients at once, "
    line += f"on {cluster}, " if cluster else ""
    line += f"about {needed / GIB:.1f} of {total / GIB:.1f} GiB of memory"
    if needed > free:
        line += f" (only {free / GIB:.1f} are free now!)"
    line += str(sharing)
    source = f"by run {before['name']}" if before else "roughly: no such run was measured here yet"
    line += f", about {duration(seconds(settings, before, busy, cluster))} ({source})"
    return Plan(busy, sharing, line)


# --- What is needed --------------------------------------------------------------------------------------------------


def memory(settings: Settings, before: History | None, busy: int) -> float:
    """Return the MiB in all, at the peak."""
    if settings.engine == "simulation":
        return BASE["simulation"] + busy * at_work(settings, before)
    child = own("client's child", before)
    work = settings.sampled * (child if settings.warm else IN_PLACE)  # also of those who wait for a place on the GPU
    return BASE["deployment"] + settings.clients * CLIENT[settings.warm] + work


def at_work(settings: Settings, before: History | None) -> float:
    """Return the MiB of one client at work in a simulation."""
    client, child = (own(who, before) for who in OWN)
    return client + child if settings.config["isolation"] else max(client, IN_PLACE)


def own(who: str, before: History | None) -> float:
    measured = [entry.get("memory", {}).get(who, 0) for entry in before["rounds"]] if before else []
    return OWN[who] + max(0, max(measured, default=0) - RESIDENT[who])


def working(settings: Settings, sharing: Sharing, cluster: Cluster | None) -> int:
    """Return how many clients work at once: of a simulation as many as there are cores, else all that are sampled.

    On a GPU the fork server lets no more in than have a place there; on a cluster Ray does.
    """
    if cluster:
        return min(settings.sampled, cluster.cpus, sharing.slots * cluster.gpus if sharing.slots else cluster.cpus)
    if settings.engine == "simulation":
        return min(at_once(settings), sharing.places or settings.sampled)
    counted = sharing.gpus and settings.config["isolation"]
    return min(settings.sampled, sharing.places) if counted else settings.sampled


def seconds(settings: Settings, before: History | None, busy: int, cluster: Cluster | None = None) -> float:
    """Return the seconds of the whole run; a round's grow with the examples that are trained on in it."""
    used = min(busy, cluster.cpus if cluster else cores())
    part = settings.sampled / settings.clients / used
    calls = CALL * settings.sampled / used
    start, training = START, EXAMPLES * part * settings.config["local-epochs"] / SPEED
    if before:
        rounds = [entry["seconds"] for entry in before["rounds"][1:]]  # the first is before anybody trains
        pace = statistics.median(rounds)  # not the mean: a simulation starts Ray in a round
        then = min(before.get("at_once") or before["sampled"], before.get("ray", {}).get("cpus", cores()))
        start = max(0.0, before["seconds"] - len(rounds) * pace)
        training = max(0.0, pace - CALL * before["sampled"] / then)
        training *= part / (before["sampled"] / before["clients"] / then)
    return start + settings.rounds * (calls + training)


# --- What was --------------------------------------------------------------------------------------------------------


def last_run(settings: Settings) -> History | None:
    """Return the newest completed run of the same work: it may differ in its numbers of clients and rounds alone."""

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


# --- What is said ----------------------------------------------------------------------------------------------------


def text(settings: Settings, busy: int) -> str:
    if settings.engine == "deployment":
        return f"{settings.clients} SuperNodes, two processes each, with {settings.sampled} clients at work"
    return f"{busy} clients at once"


def fix(settings: Settings) -> str:
    if settings.engine == "deployment":
        return "take fewer CLIENTS, or ENGINE=simulation, whose memory does not grow with them"
    return "sample fewer, so that fewer work at once, or set GPU_SLOTS"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
