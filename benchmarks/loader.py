#!/usr/bin/env python3
"""How much of the speed of training on tensors in memory does `cifar_utils.Batches` reach? CPU seconds, one thread.

Run it with the data ready: DATA_DIR=... DATASET=cifar10 python benchmarks/loader.py
"""

import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "basic"))

from cifar_utils import Batches, Net, train
from launcher.dataset import load_split

BATCH_SIZE, EXAMPLES, REPEATS = 32, 15_000, 5


class InMemory:
    """The same batches, from pictures that were scaled to floats before."""

    def __init__(self, batches: Batches) -> None:
        self.images, self.labels = batches.images.float().div(127.5).sub(1.0), batches.labels

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in torch.randperm(len(self.labels)).split(BATCH_SIZE):
            yield self.images[rows], self.labels[rows]


def speed(batches: Batches | InMemory, examples: int) -> float:
    """Examples a CPU second in one epoch of a new network."""
    start = time.process_time()
    train(Net(), batches, epochs=1, learning_rate=0.02)
    return examples / (time.process_time() - start)


def main() -> None:
    torch.set_num_threads(1)
    images, labels = load_split("train")
    ours = Batches(images[:EXAMPLES].copy(), labels[:EXAMPLES], BATCH_SIZE, torch.device("cpu"), seed=0)
    in_memory, examples = InMemory(ours), ours.num_examples
    speed(ours, examples)  # the first optimizer imports a part of torch
    pairs = [(speed(ours, examples), speed(in_memory, examples)) for _ in range(REPEATS)]
    print(f"{examples} pictures, batch {BATCH_SIZE}, {REPEATS} repeats, Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}, {platform.machine()}, one thread")
    print(
        f"examples a second, medians: {' and '.join(f'{statistics.median(s):.0f}' for s in zip(*pairs, strict=True))}"
    )
    print(f"ratio of ours to tensors in memory, median: {statistics.median(a / b for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
