"""The same federated work with no framework at all: the limit that ./run.sh is measured against.

    python benchmarks/floor.py basic 3 3 3               # clients, sampled, rounds
    python benchmarks/floor.py multiprocessing 100 10 5

A plain loop over rounds, and one process a core that trains and tests clients, with the examples' own `cifar_utils`. It
ends with the same model as ./run.sh, bit for bit: that is checked in tests/test_benchmarks.py. DATA_DIR and DATASET say
which pictures, which must be ready. Prints seconds for starting the processes, with their imports, and for the rounds.
"""

import argparse
import os
import random
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np

from common import ROOT

sys.path.insert(0, str(ROOT / "basic"))
EXAMPLES = ("basic", "multiprocessing")
Arrays = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=EXAMPLES)
    for name in ("clients", "sampled", "rounds"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    result = federate(given.example, given.clients, given.sampled, given.rounds)
    print(f"accuracy {result['accuracy']:.3f}, model_sha256 {result['model_sha256']}")
    print(f"{result['start']:.1f} s to start the processes, {result['rounds']:.1f} s for {given.rounds} rounds")


def federate(example: str, clients: int, sampled: int, rounds: int) -> dict[str, Any]:
    """Do an example's work with its default settings; return accuracy, model_sha256, and seconds by part."""
    config = tomllib.loads((ROOT / example / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    began = time.monotonic()
    with workers() as pool:
        arrays = pool.submit(initial, config["seed"]).result()
        started = time.monotonic()
        phases = 0
        for number in range(1, rounds + 1):
            chosen = sample(clients, sampled, config["seed"], phases)
            work = [pool.submit(train, arrays, client, clients, number, config) for client in chosen]
            arrays = average([job.result() for job in work])
            phases += 1
            if example == "multiprocessing":  # its server tests; its clients don't
                (accuracy, _) = pool.submit(test_split, arrays).result()
                continue
            chosen = sample(clients, sampled, config["seed"], phases)
            work = [pool.submit(evaluate, arrays, client, clients, config) for client in chosen]
            found = [job.result() for job in work]
            accuracy = sum(a * n for a, n in found) / sum(n for _, n in found)
            phases += 1
        ended = time.monotonic()
    from launcher.replies import model_sha256

    return {
        "accuracy": accuracy,
        "model_sha256": model_sha256(arrays),
        "start": started - began,
        "rounds": ended - started,
    }


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """One process a core, with one thread each."""
    cores = os.cpu_count() or 1
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
            yield pool
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def sample(clients: int, sampled: int, seed: int, phases: int) -> list[int]:
    """The clients of a phase, in the order of their partitions: drawn as RunGrid and Flower draw them."""
    random.seed(f"{seed} {phases}")
    return sorted(random.sample(range(clients), sampled))


def average(results: list[tuple[Arrays, int]]) -> Arrays:
    """FedAvg (McMahan et al., 2017, arXiv:1602.05629): the mean, weighted by examples; added up in Flower's order."""
    total = sum(examples for _, examples in results)
    mean: Arrays = {}
    for arrays, examples in results:
        for name, array in arrays.items():
            part = array * (examples / total)
            mean[name] = part if name not in mean else mean[name] + part
    return mean


# --- In the workers --------------------------------------------------------------------------------------------------


def network(arrays: Arrays) -> Any:
    import torch

    from cifar_utils import Net

    net = Net()
    net.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return net


def initial(seed: int) -> Arrays:
    import torch

    from cifar_utils import Net

    torch.manual_seed(seed)
    return {name: tensor.numpy() for name, tensor in Net().state_dict().items()}


def load(client: int, clients: int, config: dict[str, Any], server_round: int = 0) -> tuple[Any, Any]:
    import cifar_utils

    return cifar_utils.load_partition(client, clients, config["batch-size"], config["seed"], server_round=server_round)


def train(arrays: Arrays, client: int, clients: int, server_round: int, config: dict[str, Any]) -> tuple[Arrays, int]:
    import cifar_utils

    net, (batches, _) = network(arrays), load(client, clients, config, server_round)
    cifar_utils.train(net, batches, config["local-epochs"], config["learning-rate"])
    return {name: tensor.numpy() for name, tensor in net.state_dict().items()}, batches.num_examples


def evaluate(arrays: Arrays, client: int, clients: int, config: dict[str, Any]) -> tuple[float, int]:
    import cifar_utils

    _, held_out = load(client, clients, config)
    return cifar_utils.test(network(arrays), held_out)["accuracy"], held_out.num_examples


def test_split(arrays: Arrays) -> tuple[float, int]:
    import torch

    import cifar_utils

    images, labels = cifar_utils.load_split("test")
    batches = cifar_utils.Batches(np.array(images), labels, 512, torch.device("cpu"))
    torch.set_num_threads(os.cpu_count() or 1)  # nobody trains meanwhile
    accuracy = cifar_utils.test(network(arrays), batches)["accuracy"]
    torch.set_num_threads(1)
    return accuracy, batches.num_examples


if __name__ == "__main__":
    main()
