"""The model, the data, and the loops that train and test: plain PyTorch, nothing federated.

`python cifar_utils.py [auto|cifar10|synthetic]` makes the data ready, once, and says which it is.

A copy of this folder becomes another project by what is marked YOUR MODEL, YOUR DATA and YOUR TRAINING STEP.
"""

import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher import dataset

MIN_EXAMPLES = 10  # a smaller partition could not keep a tenth of itself for evaluation


# --- The model -------------------------------------------------------------------------------------------------------

# YOUR MODEL: another network under this name, made without arguments. It takes what `to_inputs` returns.
NUM_CLASSES = 10


class Net(nn.Module):
    """A small convolutional network in the style of LeNet-5 (LeCun et al., 1998): 62,006 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, 32, 32)
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (B, 6, 14, 14)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 16, 5, 5)
        x = F.relu(self.fc1(x.flatten(1)))  # (B, 120)
        x = F.relu(self.fc2(x))  # (B, 84)
        return self.fc3(x)  # (B, 10), one logit a class


def best_device() -> torch.device:
    """CUDA where there is a GPU, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# --- The data --------------------------------------------------------------------------------------------------------

# YOUR DATA: the arrays that `load_split` returns, any inputs (N, ...) with a target each, and what `to_inputs` makes of
# a batch of them. Read files by an absolute path: Flower runs a copy of this folder, with the code in it alone. In
# pyproject.toml, put dataset = "own", so that CIFAR-10 is not fetched.


def load_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """All of the "train" split, which the clients divide, or of the "test" split, for who tests on the server.

    Here images, uint8 (N, 3, 32, 32), and labels, int64 (N,), of CIFAR-10 or its stand-in, made ready by the launcher.
    """
    return dataset.load_split(split)


def to_inputs(images: Tensor) -> Tensor:
    """A batch as the model takes it: pixels from 0..255 to -1..1."""
    return images.float().div_(127.5).sub_(1.0)


# --- The loops -------------------------------------------------------------------------------------------------------

# YOUR TRAINING STEP: the loss and the optimizer in `train`; the same loss, and what else you measure, in `test`.


def train(
    net: nn.Module,
    batches: "Batches",
    epochs: int,
    learning_rate: float,
    momentum: float = 0.9,
    penalty: Callable[[], Tensor] | None = None,
) -> float:
    """Train in place by SGD; return the mean cross-entropy per example over all that was seen.

    A `penalty` is a term that is added to the loss in each step; the mean leaves it out.
    """
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate, momentum=momentum)
    net.train()
    total_loss, seen = 0.0, 0
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            (loss if penalty is None else loss + penalty()).backward()
            optimizer.step()
            total_loss += loss.item() * len(labels)  # the loss is a batch's mean, and the last batch may be smaller
            seen += len(labels)
    return total_loss / seen


@torch.no_grad()
def test(net: nn.Module, batches: "Batches") -> dict[str, float]:
    """Return the mean cross-entropy per example as "loss", and "accuracy", a fraction in [0, 1]."""
    net.eval()
    total_loss, correct, seen = 0.0, 0, 0
    for images, labels in batches:
        logits = net(images)
        total_loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
    return {"loss": total_loss / seen, "accuracy": correct / seen}


class Batches:
    """A data loader over arrays in memory, such as uint8 pictures: it indexes and scales a batch at a time.

    It stands in for `torch.utils.data.DataLoader`, which fetches and converts picture by picture. Each pass over it
    shuffles anew, and passes are the same for the same seed; without a seed the order stays as it is.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, batch_size: int, device: torch.device, seed: int | None = None
    ) -> None:
        self.images = torch.from_numpy(images).to(device)  # (N, 3, 32, 32) uint8
        self.labels = torch.from_numpy(labels).to(device)  # (N,) int64
        self.batch_size = batch_size
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    @property
    def num_examples(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(self.num_examples)
        if self.generator is not None:
            order = torch.randperm(self.num_examples, generator=self.generator)
        for rows in order.to(self.labels.device).split(self.batch_size):
            yield to_inputs(self.images[rows]), self.labels[rows]


# --- Who holds what: partitions --------------------------------------------------------------------------------------


def iid(labels: np.ndarray, num_partitions: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Every client gets an equal share of the shuffled examples."""
    return np.array_split(rng.permutation(len(labels)), num_partitions)


def shards(labels: np.ndarray, num_partitions: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Sorted by label and cut into two shards a client, so that most hold two classes (McMahan et al., 2017)."""
    by_label = np.argsort(rng.permutation(len(labels)) + len(labels) * labels)  # random within a class
    pieces = np.array_split(by_label, 2 * num_partitions)
    order = rng.permutation(2 * num_partitions)
    return [np.concatenate([pieces[a], pieces[b]]) for a, b in order.reshape(-1, 2)]


def dirichlet(labels: np.ndarray, num_partitions: int, rng: np.random.Generator, alpha: float) -> list[np.ndarray]:
    """Each class is split over the clients by a draw from Dirichlet(alpha): the smaller alpha, the more skewed.

    Yurochkin et al., 2019 (arXiv:1905.12022); as in NIID-Bench, arXiv:2102.02079.
    """
    parts: list[list[np.ndarray]] = [[] for _ in range(num_partitions)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_partitions, alpha))
        for part, piece in zip(parts, np.split(rows, (np.cumsum(shares)[:-1] * len(rows)).astype(int)), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


PARTITIONERS: dict[str, Callable[..., list[np.ndarray]]] = {"iid": iid, "shards": shards, "dirichlet": dirichlet}


def partition(
    labels: np.ndarray, num_partitions: int, seed: int, name: str = "iid", **options: float
) -> list[np.ndarray]:
    """Split the examples' indices over the clients: disjoint, covering, the same for the same arguments.

    Returns one int64 array of indices per client, each of at least `MIN_EXAMPLES`. Raises ValueError where no such
    split was found, or where the partitioner is unknown.
    """
    if name not in PARTITIONERS:
        raise ValueError(f"unknown partitioner {name!r}; there are {', '.join(PARTITIONERS)}")
    rng = np.random.default_rng([seed, num_partitions])
    if MIN_EXAMPLES * num_partitions <= len(labels):
        for _ in range(100):
            parts = PARTITIONERS[name](labels, num_partitions, rng, **options)
            if min(len(part) for part in parts) >= MIN_EXAMPLES:
                return parts
    raise ValueError(
        f"{len(labels)} examples can't be split over {num_partitions} clients by {name!r} {options or ''} so that each "
        f"has at least {MIN_EXAMPLES}: take fewer clients" + (" or a larger alpha" if name == "dirichlet" else "")
    )


def load_partition(
    partition_id: int, num_partitions: int, batch_size: int, seed: int, server_round: int = 0, **options
) -> tuple[Batches, Batches]:
    """A client's own examples as (training, evaluation) batches; a tenth of them is kept for evaluation.

    `options` go to `partition`. The order in which the client trains follows from (seed, server_round, partition_id).
    """
    images, labels = load_split("train")
    rows = partition(labels, num_partitions, seed, **options)[partition_id]
    held_out, kept = np.split(np.random.default_rng([seed, partition_id]).permutation(rows), [len(rows) // 10])
    order_seed = int(np.random.SeedSequence([seed, server_round, partition_id]).generate_state(1)[0])
    device = best_device()
    return (
        Batches(images[kept], labels[kept], batch_size, device, order_seed),
        Batches(images[held_out], labels[held_out], 512, device),
    )


if __name__ == "__main__":
    sys.exit(dataset.main(sys.argv[1:]))
