"""The model, the loops that train and test, and how the data is divided over the clients: plain PyTorch.

`python cifar_utils.py [auto|cifar10|synthetic]` makes the data ready, once, and says which it is.

To make your own project of a copy, change what is marked YOUR MODEL, YOUR DATA and YOUR TRAINING STEP.
"""

import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import cifar_data

MIN_EXAMPLES = 10  # for each client, which keeps a tenth of its examples, and so at least one, for evaluation


# --- The model -------------------------------------------------------------------------------------------------------

# YOUR MODEL: another network under this name, made without arguments. It takes the inputs that your data loaders give.
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
        return self.fc3(x)  # (B, 10), one logit per class


def best_device(wanted: str = "auto") -> torch.device:
    """Return the device that is wanted; "auto" is CUDA where there is a GPU, else Apple's MPS, else the CPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(wanted)


# --- The loops -------------------------------------------------------------------------------------------------------

# YOUR TRAINING STEP: the loss and the optimizer in `train`; the same loss, and what else you measure, in `test`.


def train(
    net: nn.Module,
    trainloader: DataLoader,
    epochs: int,
    learning_rate: float,
    momentum: float = 0.9,
    penalty: Callable[[], Tensor] | None = None,
    device: str = "auto",
) -> float:
    """Train in place by SGD; return the mean cross-entropy per example seen, without the `penalty` added to it."""
    where = best_device(device)
    net.to(where).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate, momentum=momentum)
    total_loss, seen = 0.0, 0
    for _ in range(epochs):
        for images, labels in trainloader:
            images, labels = images.to(where), labels.to(where)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            (loss if penalty is None else loss + penalty()).backward()
            optimizer.step()
            total_loss += loss.item() * len(labels)  # the loss is a batch's mean, and the last batch may be smaller
            seen += len(labels)
    return total_loss / seen


@torch.no_grad()
def test(net: nn.Module, testloader: DataLoader, device: str = "auto") -> dict[str, float]:
    """Return the mean cross-entropy per example as "loss", and "accuracy", a fraction in [0, 1]."""
    where = best_device(device)
    net.to(where).eval()
    total_loss, correct, seen = 0.0, 0, 0
    for images, labels in testloader:
        images, labels = images.to(where), labels.to(where)
        logits = net(images)
        total_loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(1) == labels).sum())
        seen += labels.numel()  # what the two sums above are over: also where an example has a label for each pixel
    return {"loss": total_loss / seen, "accuracy": correct / seen}


# --- The data --------------------------------------------------------------------------------------------------------


class Pictures(Dataset):
    """Pictures and labels in memory. A batch is fetched whole, which is many times as fast as one by one."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = torch.from_numpy(images)  # (N, 3, 32, 32) uint8
        self.labels = torch.from_numpy(labels)  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:  # PyTorch calls it in place of __getitem__
        return self.images[rows].float().div_(127.5).sub_(1.0), self.labels[rows]  # pixels from 0..255 to -1..1

    def loader(self, batch_size: int, shuffle: bool = False) -> DataLoader:
        return DataLoader(self, batch_size, shuffle=shuffle, collate_fn=lambda batch: batch)  # it is a batch already


def load_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 (N, 3, 32, 32), and labels, int64 (N,): "train" is for clients, "test" for the server."""
    return cifar_data.load_split(split)


# --- Who holds what: partitions --------------------------------------------------------------------------------------


def iid(labels: np.ndarray, num_partitions: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Every client gets an equal share of the shuffled examples."""
    return np.array_split(rng.permutation(len(labels)), num_partitions)


def shards(labels: np.ndarray, num_partitions: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Sorted by label and cut into two shards a client, so that most hold two classes (McMahan et al., 2017)."""
    by_label = np.lexsort((rng.permutation(len(labels)), labels))  # random within a class
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


def are_classes(labels: np.ndarray) -> bool:
    """Whether each example has one class, as opposed to a number to predict, a mask, or several labels."""
    return labels.ndim == 1 and labels.dtype.kind in "biu"


def partition(
    labels: np.ndarray, num_partitions: int, seed: int, name: str = "iid", **options: float
) -> list[np.ndarray]:
    """Split the examples' indices over the clients: disjoint, covering, the same for the same arguments.

    Returns one int64 array of indices per client, each of at least `MIN_EXAMPLES`. Raises ValueError where no such
    split was found, or where the partitioner is unknown or goes by classes that there are not.
    """
    if name not in PARTITIONERS:
        raise ValueError(f"unknown partitioner {name!r}; there are {', '.join(PARTITIONERS)}")
    if name in ("shards", "dirichlet") and not are_classes(labels):
        raise ValueError(f"{name!r} needs one class per example; labels are {labels.dtype} {labels.shape}: take iid")
    rng = np.random.default_rng([seed, num_partitions])
    if MIN_EXAMPLES * num_partitions <= len(labels):
        for _ in range(100):
            parts = PARTITIONERS[name](labels, num_partitions, rng, **options)
            if min(len(part) for part in parts) >= MIN_EXAMPLES:
                return parts
    raise ValueError(
        f"{len(labels)} examples can't be split over {num_partitions} clients by {name!r} {options or ''} so that each "
        f"has at least {MIN_EXAMPLES}: take fewer clients" + (" or a larger alpha" if "alpha" in options else "")
    )


# YOUR DATA: return two DataLoaders over what this client has: to train on, and to evaluate on. Their Datasets have a
# length, at least one. Relative paths begin in this folder. What divides CIFAR-10, from `Pictures` to here, can go. In
# pyproject.toml, put dataset = "own", so that nothing is fetched.


def load_client_data(
    partition_id: int, num_partitions: int, batch_size: int, seed: int, **options
) -> tuple[DataLoader, DataLoader]:
    """Return a client's own examples as two loaders: to train on, and a tenth of them, at least one, to evaluate on."""
    images, labels = load_split("train")  # which the clients divide, as the `options` say
    rows = partition(labels, num_partitions, seed, **options)[partition_id]
    shuffled, tenth = np.random.default_rng([seed, partition_id]).permutation(rows), max(1, len(rows) // 10)
    held_out, kept = shuffled[:tenth], shuffled[tenth:]
    trainset, testset = Pictures(images[kept], labels[kept]), Pictures(images[held_out], labels[held_out])
    return trainset.loader(batch_size, shuffle=True), testset.loader(512)


if __name__ == "__main__":
    from cifar_data.prepare import main

    sys.exit(main(sys.argv[1:]))
