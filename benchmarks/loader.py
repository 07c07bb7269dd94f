"""How fast is training from a DataLoader with `cifar_utils.Pictures`, tensors in memory, and transforms per picture?

Run it with the data ready: DATA_DIR=... DATASET=cifar10 python benchmarks/loader.py. It counts CPU seconds, one thread.
"""

import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from operator import truediv as div

import torch
from plain.per_picture import load

from common import ROOT, table

sys.path.insert(0, str(ROOT / "basic"))

from cifar_utils import Net, Pictures, load_split, train

BATCH_SIZE, EXAMPLES, REPEATS = 32, 15_000, 5
OURS = "DataLoader with Pictures"


class InMemory:
    """The same batches without a DataLoader, from pictures that were scaled to floats before."""

    def __init__(self, pictures: Pictures) -> None:
        self.images, self.labels = pictures.images.float().div(127.5).sub(1.0), pictures.labels

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in torch.randperm(len(self.labels)).split(BATCH_SIZE):
            yield self.images[rows], self.labels[rows]


def speed(batches: Iterable[tuple[torch.Tensor, torch.Tensor]], examples: int) -> float:
    """Examples a CPU second in one epoch of a new network."""
    start = time.process_time()
    train(Net(), batches, epochs=1, learning_rate=0.02, device="cpu")
    return examples / (time.process_time() - start)


def main() -> None:
    torch.set_num_threads(1)
    images, labels = load_split("train")
    pictures = Pictures(images[:EXAMPLES].copy(), labels[:EXAMPLES])
    ours, examples = pictures.loader(BATCH_SIZE, shuffle=True), len(pictures)
    speed(ours, examples)  # the first optimizer imports a part of torch
    per_picture = load(images[:EXAMPLES], labels[:EXAMPLES], BATCH_SIZE)
    ways = {OURS: ours, "tensors in memory": InMemory(pictures), "DataLoader, PIL and transforms": per_picture}
    found = [[speed(batches, examples) for batches in ways.values()] for _ in range(REPEATS)]
    print(f"{examples} pictures, batch {BATCH_SIZE}, medians of {REPEATS}, one thread, {platform.machine()}, ", end="")
    print(f"Python {platform.python_version()}, torch {torch.__version__}\n")
    rows = [
        [name, f"{statistics.median(speeds):.0f}", f"{statistics.median(map(div, speeds, first)):.2f}"]
        for first in [[row[0] for row in found]]
        for name, speeds in zip(ways, zip(*found, strict=True), strict=True)
    ]
    print(table(["data from", "examples a CPU second", f"ratio to {OURS}"], rows))


if __name__ == "__main__":
    main()
