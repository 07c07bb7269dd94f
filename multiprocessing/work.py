"""What runs in the child processes: making the model, training, testing, writing it down.

They take and return NumPy arrays, by the names of the model's state dict, which a parent can pass on without PyTorch.
This module is cheap to import: parents must get no PyTorch and no data with it, and children, which import it for each
piece of work, no Flower, which takes half a second. So the functions import what they need themselves.
"""

import os
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isolation import run_isolated

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

Arrays = dict[str, np.ndarray]
Numbers = dict[str, float]

TEST_BATCH = 100  # examples; as quick on a CPU as larger ones, and takes 40 MiB less than 512

# --- What parents call -----------------------------------------------------------------------------------------------


def execute(config: Mapping[str, Any], fn: Callable[..., Any], *args: Any) -> Any:
    """Return fn(*args), from a child process where the run config says `isolation`, else from this one.

    Raises what `run_isolated` raises.
    """
    if not config["isolation"]:
        return fn(*args)
    return run_isolated(fn, *args, timeout=config["child-timeout"], memory=config["child-memory"] or None)


def to_numpy(record: "ArrayRecord") -> Arrays:
    return {name: array.numpy() for name, array in record.items()}


def to_record(arrays: Arrays) -> "ArrayRecord":
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def resident() -> float:
    """MiB of memory that this process has now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except FileNotFoundError:  # not Linux
        return peak()


def peak() -> float:
    """MiB of memory that this process had at most; a forked one begins with what it shares with its parent."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# --- What children do ------------------------------------------------------------------------------------------------


def initial_arrays(seed: int) -> Arrays:
    """The model that everybody starts from."""
    import torch

    from cifar_utils import Net

    torch.manual_seed(seed)
    return _arrays(Net())


def train(
    arrays: Arrays, data: Mapping[str, Any], epochs: int, learning_rate: float
) -> tuple[Arrays, Numbers, Numbers]:
    """Train on a client's examples; return the new weights, the metrics, and the memory it took, in MiB.

    `data` are the arguments of `cifar_utils.load_partition`.
    """
    import cifar_utils

    net = _model(arrays)
    batches, _ = cifar_utils.load_partition(**data)
    train_loss = cifar_utils.train(net, batches, epochs=epochs, learning_rate=learning_rate)
    return _arrays(net), {"train_loss": train_loss, "num-examples": batches.num_examples}, _memory()


def evaluate(arrays: Arrays, data: Mapping[str, Any]) -> tuple[Numbers, Numbers]:
    """Test on the examples that a client keeps out of training; return the metrics, and the memory it took, in MiB."""
    import cifar_utils

    _, batches = cifar_utils.load_partition(**data)
    return {**cifar_utils.test(_model(arrays), batches), "num-examples": batches.num_examples}, _memory()


def evaluate_on_test_split(arrays: Arrays) -> tuple[Numbers, Numbers]:
    """Test on the data set's test split, which no client has; return the metrics, and the memory it took, in MiB."""
    import torch

    import cifar_utils

    net = _model(arrays, threads=os.cpu_count() or 1)  # no client trains now
    images, labels = cifar_utils.load_split("test")
    batches = cifar_utils.Batches(np.array(images), labels, TEST_BATCH, cifar_utils.best_device())
    if batches.images.ndim == 4:  # pictures: a sixth faster where a pixel's channels lie side by side in memory
        batches.images = batches.images.contiguous(memory_format=torch.channels_last)
    return cifar_utils.test(net, batches), _memory()


def _model(arrays: Arrays, threads: int = 1) -> Any:
    """The network with these weights, on the device."""
    import torch

    from cifar_utils import Net, best_device

    torch.set_num_threads(threads)  # clients: 1, since as many as cores train at once
    net = Net()
    net.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    return net.to(best_device())


def _arrays(net: Any) -> Arrays:
    return {name: tensor.detach().cpu().numpy() for name, tensor in net.state_dict().items()}


def _memory() -> Numbers:
    """This process's peak, and, with CUDA, what is in use on the whole device, whoever uses it."""
    import torch

    if not torch.cuda.is_available():
        return {"child": peak()}
    free, total = torch.cuda.mem_get_info()
    return {"child": peak(), "device": (total - free) / 2**20}
