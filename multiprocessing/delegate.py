"""What client.py and server.py call to have work done: in a child process, by isolation.py, or in place, to compare.

It passes NumPy arrays on, and needs no PyTorch.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, Context

from cluster import NODE
from isolation import FORK_SERVER, run_isolated
from work import Arrays

FULL = re.compile(r"CUDA.*out of memory|CUBLAS_STATUS_ALLOC_FAILED")  # what PyTorch says where a GPU has no memory left


def execute(config: Mapping[str, Any], fn: Callable[..., Any], *args: Any, number: int | None = None) -> Any:
    """Return fn(*args), from a child process where the run config says `isolation`, else from this one.

    `number` is a client's: it decides which GPU the child sees. The server, alone at its work, takes the first. Raises
    what `run_isolated` raises.
    """
    try:
        if not config["isolation"]:
            return fn(*args)
        limits = {"timeout": config["child-timeout"], "memory": config["child-memory"] or None}
        return run_isolated(fn, *args, number=number or 0, **limits)
    except RuntimeError as error:
        if not FULL.search(str(error)):
            raise
        slots = int(os.environ.get("GPU_SLOTS", 1)) if number is not None else 1
        advice = f"GPU_SLOTS={slots // 2} lets fewer share it" if slots > 1 else "take device=cpu, or smaller batches"
        raise RuntimeError(f"the GPU's memory is full: {advice} ({error})") from error


def execute_for_client(context: Context, fn: Callable[..., Any], *args: Any) -> Any:
    """Do the same, but make no child where this process is a client's own: Flower starts one for each message then.

    Ray's actors, which play the clients of a simulation, live on. And on a GPU, children are made in both engines: the
    fork server lets no more of them in than have room there.
    """
    counted = "ray" in sys.modules or (FORK_SERVER in os.environ and os.environ.get("CUDA_VISIBLE_DEVICES"))
    number = context.node_config["partition-id"]
    return execute(context.run_config, fn, *args, number=number) if counted else fn(*args)


def place() -> dict[str, str]:
    """Return on which node of a Ray cluster this process is, as "node"; nothing without a cluster."""
    return {"node": os.environ[NODE]} if NODE in os.environ else {}


def device_of(config: Mapping[str, Any]) -> str:
    """Return the device to ask for: on macOS a child takes the CPU, since Apple's GPU can't be used after a fork."""
    return "cpu" if sys.platform == "darwin" and config["isolation"] else config["device"]


def to_numpy(record: ArrayRecord) -> Arrays:
    return {name: array.numpy() for name, array in record.items()}


def to_record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})
