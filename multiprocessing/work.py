"""What runs in the child processes: making the model, training, testing, writing it down.

They take and return NumPy arrays, by the names of the model's state dict, which a parent can pass on without PyTorch.
This module is cheap to import: parents must get no PyTorch and no data with it, and children, which import it for each
piece of work, no Flower, which takes half a second. So the functions import what they need themselves.
"""

import os
import random
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Numbers = dict[str, float]
Cost = dict[str, float | str]  # "device": what it ran on; "memory of ...": MiB

GPU_LIMIT = "FLOWER_EXAMPLE_GPU_MIB"  # the variable with the MiB of a GPU that this process may allocate
TEST_BATCH = 100  # examples; as quick on a CPU as larger ones, and takes 40 MiB less than 512


def initial_arrays(seed: int) -> Arrays:
    """Make the model that everybody starts from."""
    import torch

    from cifar_utils import Net

    torch.manual_seed(seed)
    return _arrays(Net())


def train(
    arrays: Arrays, data: Mapping[str, Any], seed: int, device: str, epochs: int, learning_rate: float
) -> tuple[Arrays, Numbers, Cost]:
    """Train on a client's examples; return the new weights, the metrics, and what it cost.

    `data` are the arguments of `cifar_utils.load_client_data`; `device` is cpu, cuda, mps, or auto.
    """
    import cifar_utils

    net = _model(arrays, seed, device)
    trainloader, _ = cifar_utils.load_client_data(**data)
    train_loss = cifar_utils.train(net, trainloader, epochs, learning_rate, device=device)
    return _arrays(net), {"train_loss": train_loss, "num-examples": len(trainloader.dataset)}, _cost(net)


def evaluate(arrays: Arrays, data: Mapping[str, Any], seed: int, device: str) -> tuple[Numbers, Cost]:
    """Test on the examples that a client keeps out of training; return the metrics, and what it cost."""
    import cifar_utils

    net = _model(arrays, seed, device)
    _, testloader = cifar_utils.load_client_data(**data)
    return {**cifar_utils.test(net, testloader, device), "num-examples": len(testloader.dataset)}, _cost(net)


def evaluate_on_test_split(arrays: Arrays, device: str) -> tuple[Numbers, Cost]:
    """Test on the data set's test split, which no client has; return the metrics, and what it cost."""
    import cifar_utils

    net = _model(arrays, 0, device)
    images, labels = cifar_utils.load_split("test")
    testloader = cifar_utils.Pictures(np.array(images), labels).loader(TEST_BATCH)
    return cifar_utils.test(net, testloader, device), _cost(net)


def write_model(path: Path, arrays: Arrays) -> None:
    """Write a plain PyTorch state dict."""
    import torch

    torch.save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, path)


def try_device(device: str) -> str:
    """Compute a little on the device, and return its name. Raises what PyTorch raises where it can't."""
    import torch

    from cifar_utils import best_device

    where = best_device(device)
    (torch.ones(8, device=where) + 1).sum().item()
    return _name(where)


def _model(arrays: Arrays, seed: int, device: str) -> Any:
    """Return the network with these weights; seed all generators, since a child has its parent's state of them."""
    import torch

    from cifar_utils import Net, best_device

    torch.set_num_threads(1)  # as many clients as cores train at once
    if (limit := os.environ.get(GPU_LIMIT)) and best_device(device).type == "cuda":  # who takes more fails, not others
        torch.cuda.set_per_process_memory_fraction(float(limit) * 2**20 / torch.cuda.mem_get_info()[1])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    net = Net()
    net.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    return net


def _arrays(net: Any) -> Arrays:
    return {name: tensor.detach().cpu().numpy() for name, tensor in net.state_dict().items()}


# --- What it cost ----------------------------------------------------------------------------------------------------


def resident() -> float:
    """Return the MiB of memory that this process has now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except FileNotFoundError:  # not Linux
        return peak()


def peak() -> float:
    """Return the MiB of memory that this process had at most; a forked one begins with what it shares."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _cost(net: Any) -> Cost:
    """Return the device and this process's peak; with CUDA also what PyTorch has allocated there, beside a context."""
    import torch

    device = next(net.parameters()).device
    on_gpu = {"memory of child on GPU": torch.cuda.max_memory_reserved() / 2**20} if device.type == "cuda" else {}
    return {"device": _name(device), "memory of child": peak(), **on_gpu}


def _name(device: Any) -> str:
    import torch

    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
