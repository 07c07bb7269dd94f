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
        for number in range(1, rounds + 1):
            chosen = sample(clients, sampled, f"{config['seed']} {number} train")
            work = [pool.submit(train, arrays, client, clients, number, config) for client in chosen]
            arrays = average([job.result() for job in work])
            if example == "multiprocessing":  # its server tests; its clients don't
                accuracy = pool.submit(test_split, arrays, config["device"]).result()
                continue
            chosen = sample(clients, sampled, f"{config['seed']} {number} evaluate")
            work = [pool.submit(evaluate, arrays, client, clients, config) for client in chosen]
            found = [job.result() for job in work]
            accuracy = sum(a * n for a, n in found) / sum(n for _, n in found)
        ended = time.monotonic()
    from rounds.averages import model_sha256  # imports Flower, which is no part of what is measured

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


def sample(clients: int, sampled: int, seed: str) -> list[int]:
    """Draw the clients of a phase as PatientGrid and Flower do; return them in the order of their partitions."""
    random.seed(seed)
    return sorted(random.sample(range(clients), sampled))


def average(results: list[tuple[Arrays, int]]) -> Arrays:
    """FedAvg (McMahan et al., 2017, arXiv:1602.05629): the mean, weighted by examples; added up in Flower's order.

    It needs no care for dtypes: all weights of this network are float32, and so is their mean.
    """
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


def load(client: int, clients: int, config: dict[str, Any]) -> tuple[Any, Any]:
    import cifar_utils

    return cifar_utils.load_client_data(client, clients, config["batch-size"], config["seed"])


def seed_generators(seed: int, server_round: int, client: int) -> None:
    """Seed PyTorch, which draws the order of examples, as `message_seed` in rounds/mods.py has it for training."""
    import torch

    torch.manual_seed(int(np.random.SeedSequence([seed, server_round, client, 1]).generate_state(1)[0]))


def train(arrays: Arrays, client: int, clients: int, server_round: int, config: dict[str, Any]) -> tuple[Arrays, int]:
    import cifar_utils

    seed_generators(config["seed"], server_round, client)
    net = network(arrays)
    trainloader, _ = load(client, clients, config)
    cifar_utils.train(net, trainloader, config["local-epochs"], config["learning-rate"], device=config["device"])
    return {name: tensor.cpu().numpy() for name, tensor in net.state_dict().items()}, len(trainloader.dataset)


def evaluate(arrays: Arrays, client: int, clients: int, config: dict[str, Any]) -> tuple[float, int]:
    import cifar_utils

    _, testloader = load(client, clients, config)
    return cifar_utils.test(network(arrays), testloader, config["device"])["accuracy"], len(testloader.dataset)


def test_split(arrays: Arrays, device: str) -> float:
    import torch

    import cifar_utils

    images, labels = cifar_utils.load_split("test")
    testloader = cifar_utils.Pictures(np.array(images), labels).loader(100)
    torch.set_num_threads(os.cpu_count() or 1)  # nobody trains meanwhile
    accuracy = cifar_utils.test(network(arrays), testloader, device)["accuracy"]
    torch.set_num_threads(1)
    return accuracy


if __name__ == "__main__":
    main()
