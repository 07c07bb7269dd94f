"""Says which GPUs a run uses, and how many clients share each: by its free memory, and what clients took of it before.

The figures are guesses until a run has measured: no GPU was at hand when this was written.
"""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster import Cluster
from gpus import Free, visible
from launcher.project import COUNT, UsageError, convert

CLIENT = 1500  # MiB of a GPU for a client: a CUDA context, and some room
CONTEXT = 400  # of these at least; what PyTorch itself has allocated comes on top
AT_WORK, OF_CHILD = "GPU at work", "client's child on GPU"  # keys of a round's memory: of all there, of one child
GIB = 1024  # MiB


@dataclass(frozen=True)
class Sharing:
    """How the clients of a run share the GPUs."""

    gpus: Free  # those that they use, and the MiB that are free there
    slots: int | None  # clients on one GPU at the same time; without a GPU, what GPU_SLOTS says
    limit: float | None  # MiB that one may allocate there, where GPU_SLOTS has set how many share it

    @property
    def places(self) -> int | None:
        """How many clients may work at the same time; None where nothing limits them."""
        return self.slots and self.slots * max(1, len(self.gpus))

    def __str__(self) -> str:
        if not self.gpus:
            return ""
        free, several = _least(self.gpus), len(self.gpus) > 1
        room = f" ({free / GIB:.1f} GiB free)" if free is not None else ""
        return f", room for {self.slots} on {f'each of {len(self.gpus)} GPUs' if several else 'the GPU'}{room}"


def share(config: Mapping[str, Any], before: Mapping[str, Any] | None) -> Sharing:
    """Decide it; `before` is the history of a run of the same work. Raises UsageError where the device can't be had."""
    device, isolation = config["device"], config["isolation"]
    if device == "mps" and isolation:
        raise UsageError("device=mps goes with isolation=false alone: Apple's GPU can't be used in a forked process")
    if device == "cuda" and os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        raise UsageError("device=cuda, and CUDA_VISIBLE_DEVICES hides all GPUs: unset it, or take device=cpu")
    found = visible() if device in ("auto", "cuda") and sys.platform != "darwin" else {}
    found = found if isolation else dict(list(found.items())[:1])  # a process that lives on can't choose another
    slots, limit, free = None, None, _least(found)
    if asked := os.environ.get("GPU_SLOTS"):
        slots = convert("GPU_SLOTS", asked, 1, COUNT)
        limit = free / slots - CONTEXT if free and free / slots > CONTEXT else None
    elif found:
        slots = max(1, int(free / of_client(before))) if free else 1
    return Sharing(found, slots, limit)


def share_of_cluster(config: Mapping[str, Any], cluster: Cluster) -> Sharing:
    """Let GPU_SLOTS clients, or one, share each of the GPUs that Ray gives out. Raises UsageError where it has none."""
    if config["device"] == "cuda" and not cluster.gpus:
        raise UsageError("device=cuda, and the nodes of the cluster have no GPU: take device=cpu")
    wanted = config["device"] in ("auto", "cuda") and cluster.gpus
    return Sharing({}, convert("GPU_SLOTS", os.environ.get("GPU_SLOTS") or "1", 1, COUNT) if wanted else None, None)


def of_client(before: Mapping[str, Any] | None) -> float:
    """Return the MiB of a GPU that a client takes: what was in use at most, shared by those who worked there at once.

    It is no less than a context and what a child itself said: not all need have been at their peak at once.
    """
    noted = [entry.get("memory", {}) for entry in before["rounds"]] if before else []
    in_all, own = (max((entry.get(key, 0) for entry in noted), default=0) for key in (AT_WORK, OF_CHILD))
    if not own and not (in_all and before.get("at_once")):
        return CLIENT
    there = math.ceil(before.get("at_once", 1) / max(1, len(before.get("gpus", ()))))
    return max(CONTEXT + own, in_all / there)


def _least(gpus: Free) -> float | None:
    return min((mib for mib in gpus.values() if mib is not None), default=None)
