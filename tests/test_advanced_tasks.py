"""Copies of advanced_example for tasks without classes: regression, masks, several labels; and data of one's own."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ADVANCED
from runs import Launch, copy_example, finished

import partitions
from cifar_utils import partition

CONFIG = tomllib.loads((ADVANCED / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
TARGETS = {
    "a number": np.linspace(0.0, 1.0, 200, dtype=np.float32),  # (N,)
    "several numbers": np.zeros((200, 3)),
    "several labels": np.zeros((200, 5), np.int64),  # each there or not
    "a mask": np.zeros((200, 32, 32), np.uint8),
}
each_target = pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())


# --- Who holds what --------------------------------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("name", ["iid", "quantity"])
def test_examples_without_a_class_are_divided(name: str, targets: np.ndarray, tmp_path: Path) -> None:
    classes, counts = partitions.count(targets, 5, {**CONFIG, "partitioner": name})
    assert classes == ["examples"]
    assert counts.shape == (5, 1)
    assert counts.sum() == 200
    assert counts.min() >= 10
    assert (len(np.unique(counts)) == 1) == (name == "iid")
    table = partitions.table(classes, counts).splitlines()
    assert table[0].split() == ["client", "all"]
    assert [[int(word) for word in line.split()] for line in table[1:]] == [[i, *counts[i]] for i in range(5)]
    partitions.draw(classes, counts, "price_$^$", tmp_path / "partitions.png")
    assert (tmp_path / "partitions.png").read_bytes().startswith(b"\x89PNG")


@each_target
@pytest.mark.parametrize("name", ["dirichlet", "shards"])
def test_what_goes_by_classes_says_so(name: str, targets: np.ndarray) -> None:
    said = f"{name!r} needs one class per example; labels are {targets.dtype} {targets.shape}: take iid"
    with pytest.raises(ValueError, match=re.escape(said)):
        partitions.count(targets, 5, {**CONFIG, "partitioner": name})


@pytest.mark.parametrize("alpha", [0.3, 1.0, 1e6])
def test_quantities_are_skewed_and_classes_are_not(alpha: float) -> None:
    labels = np.arange(20_000) % 10
    parts = partition(labels, 10, seed=3, name="quantity", alpha=alpha)
    assert sorted(np.concatenate(parts)) == list(range(20_000))
    sizes = np.array([len(part) for part in parts])
    assert sizes.min() >= 10
    assert (sizes.max() > 2 * sizes.min()) == (alpha <= 1)
    largest = parts[int(sizes.argmax())]
    assert np.bincount(labels[largest]) / len(largest) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        (np.array([3, 900] * 100), ["3", "900", "all"]),  # numbers that leave some out
        (np.array([-1, 1] * 100, np.int8), ["-1", "1", "all"]),
        (np.array([True, False] * 100), ["0", "1", "all"]),
        (np.arange(200) % 100, ["all"]),  # too many for a line
        (np.zeros(200, np.uint8), ["all"]),
    ],
)
def test_classes_may_be_any_numbers(labels: np.ndarray, columns: list[str], tmp_path: Path) -> None:
    classes, counts = partitions.count(labels, 4, {**CONFIG, "partitioner": "shards"})
    assert counts.sum() == 200
    lines = partitions.table(classes, counts).splitlines()
    assert lines[0].split() == ["client", *columns]
    assert [int(line.split()[-1]) for line in lines[1:]] == counts.sum(1).tolist()
    partitions.draw(classes, counts, "", tmp_path / "partitions.png")


# --- Copies, changed as a user would: what stands below replaces what has the same name above ------------------------

REGRESSION = '''

class Net(nn.Linear):
    """The sum of four numbers has the weights 1, 1, 1, 1."""

    def __init__(self):
        super().__init__(4, 1)


def load_split(split):
    inputs = np.random.default_rng(0).normal(size=(600, 4)).astype(np.float32)
    return inputs, inputs.sum(axis=1, keepdims=True)


class Pictures(torch.utils.data.TensorDataset):
    def __init__(self, inputs, targets):
        super().__init__(torch.from_numpy(inputs), torch.from_numpy(targets))

    def loader(self, batch_size, shuffle=False):
        return DataLoader(self, batch_size, shuffle=shuffle)


def train(net, trainloader, epochs, learning_rate, *others, **more):
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
    for _ in range(epochs):
        for inputs, targets in trainloader:
            optimizer.zero_grad()
            F.mse_loss(net(inputs), targets).backward()
            optimizer.step()
    return test(net, trainloader)["loss"]


@torch.no_grad()
def test(net, testloader, *others):
    squares = [F.mse_loss(net(inputs), targets, reduction="sum").item() for inputs, targets in testloader]
    return {"loss": sum(squares) / len(testloader.dataset)}
'''
MASKS = '''

class Net(nn.Conv2d):
    """Two classes a pixel: (B, 2, 32, 32)."""

    def __init__(self):
        super().__init__(3, 2, 1)


def load_split(split):
    images, _ = cifar_data.load_split(split, "synthetic")
    images = np.array(images)
    return images, (images[:, 0] > 127).astype(np.int64)
'''
SEVERAL = '''

class Net(nn.Sequential):
    """Three labels a picture, each there or not: (B, 3)."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3072, 3))


def load_split(split):
    images, _ = cifar_data.load_split(split, "synthetic")
    images = np.array(images)
    return images, (images.mean(axis=(2, 3)) > 127).astype(np.float32)


def train(net, trainloader, epochs, learning_rate, *others, **more):
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(net(images), labels).backward()
            optimizer.step()
    return test(net, trainloader)["loss"]


@torch.no_grad()
def test(net, testloader, *others):
    found = [(net(images), labels) for images, labels in testloader]
    logits, labels = (torch.cat(parts) for parts in zip(*found))
    per_label = ((logits > 0) == (labels > 0)).float().mean(0).tolist()
    loss = F.binary_cross_entropy_with_logits(logits, labels).item()
    return {"loss": loss, "accuracy": sum(per_label) / 3, "per-label": per_label}
'''
OWN_DATA = (
    REGRESSION.replace("def load_split(split):", "def table():")
    + """

def load_split(split):
    return cifar_data.load_split(split)


def load_client_data(partition_id, num_partitions, batch_size, seed, **options):
    inputs, targets = (part[partition_id::num_partitions] for part in table())
    kept, held_out = Pictures(inputs[10:], targets[10:]), Pictures(inputs[:10], targets[:10])
    return kept.loader(batch_size, shuffle=True), held_out.loader(64)
"""
)
NO_TEST_DATA = "\n\ndef make_evaluate(config):\n    return None\n"


def changed(to: Path, utils: str, server: str = "") -> Path:
    folder = copy_example("advanced_example", to)
    for name, more in (("cifar_utils.py", utils), ("server.py", server)):
        text, begin, rest = (folder / name).read_text().partition('\n\nif __name__ == "__main__":')
        (folder / name).write_text(text + more + begin + rest)
    project = (folder / "pyproject.toml").read_text()
    assert project.count('dataset = "auto"') == 1
    (folder / "pyproject.toml").write_text(project.replace('dataset = "auto"', 'dataset = "own"'))
    return folder


def run(folder: Path, data_dir: Path, *words: object, engine: str = "simulation") -> Launch:
    run = finished(folder, 3, 3, 3, *words, data_dir=data_dir, ENGINE=engine, DATASET="")
    assert run.process.returncode == 0, run.stdout + run.stderr
    if "resume=latest" not in words:
        assert run.run_dir  # looked for now, before there is another
    return run


def model(run: Launch, name: str = "model.pt") -> dict[str, torch.Tensor]:
    return torch.load(run.run_dir / name, weights_only=True)


def test_a_regression_where_the_server_has_no_data(tmp_path: Path, data_dir: Path) -> None:
    """The clients' loss takes the place of the server's accuracy, and the model is the right one."""
    folder = changed(tmp_path / "regression", REGRESSION, NO_TEST_DATA)
    words = ("partitioner=quantity", "learning-rate=0.1", "warmup-rounds=0", "alpha=1", "batch-size=8")
    found = run(folder, data_dir, 2, *words, engine="deployment")
    rounds = found.history["rounds"]
    assert [entry["round"] for entry in rounds] == [1, 2]
    assert not any("server" in entry or "accuracy" in entry["evaluate"] for entry in rounds)
    assert "accuracy" not in found.history
    assert all(entry["evaluate"]["worst-loss"] >= entry["evaluate"]["best-loss"] for entry in rounds)
    assert model(found)["weight"].numpy() == pytest.approx(1.0, abs=0.05)
    best = min(rounds, key=lambda entry: entry["evaluate"]["loss"])
    same = all(torch.equal(tensor, model(found, "best.pt")[name]) for name, tensor in model(found).items())
    assert same == (best is rounds[-1])
    saved = torch.load(found.run_dir / "checkpoint.pt", weights_only=True)
    assert saved["best"] == {"round": best["round"], "score": -best["evaluate"]["loss"]}
    assert re.search(r"^Examples by client \(quantity alpha 1\.0\)", found.stdout, re.M)
    assert f"dataset own, loss {rounds[-1]['evaluate']['loss']:.3f}, " in found.stdout


@pytest.mark.slow
def test_it_goes_on(tmp_path: Path, data_dir: Path) -> None:
    """Without a round 0, too: one after the other is the same as all at once."""
    folder = changed(tmp_path / "regression", REGRESSION, NO_TEST_DATA)
    words = ("partitioner=iid", "strategy=fedavgm")
    whole = run(folder, data_dir, 3, *words)
    part = run(folder, data_dir, 1, *words)
    run(folder, data_dir, 3, *words, "resume=latest")
    assert [entry["round"] for entry in part.history["rounds"]] == [1, 2, 3]
    assert part.history["model_sha256"] == whole.history["model_sha256"]


@pytest.mark.slow
def test_masks(tmp_path: Path, data_dir: Path) -> None:
    """A class for each pixel, by the loops as they are: what is counted are pixels."""
    found = run(changed(tmp_path / "masks", MASKS), data_dir, 3, "partitioner=iid", "learning-rate=0.1")
    images = np.load(data_dir / "synthetic/test_images.npy")
    net = torch.nn.Conv2d(3, 2, 1)
    net.load_state_dict(model(found))
    with torch.no_grad():
        right = net(torch.from_numpy(images) / 127.5 - 1).argmax(1).numpy() == (images[:, 0] > 127)
    assert found.history["accuracy"] == pytest.approx(right.mean(), abs=1e-4)
    assert found.history["accuracy"] > 0.8


@pytest.mark.slow
def test_several_labels(tmp_path: Path, data_dir: Path) -> None:
    """With a metric for each, which is a list."""
    found = run(changed(tmp_path / "several", SEVERAL), data_dir, 2, "partitioner=quantity", "alpha=2")
    for entry in found.history["rounds"][1:]:
        evaluate = entry["evaluate"]
        assert len(evaluate["per-label"]) == len(entry["server"]["per-label"]) == 3
        assert np.mean(evaluate["per-label"]) == pytest.approx(evaluate["accuracy"])
        rows = evaluate["by_client"]
        means = np.average([row["per-label"] for row in rows], axis=0, weights=[row["num-examples"] for row in rows])
        assert evaluate["per-label"] == pytest.approx(means)
    assert found.history["accuracy"] == found.history["rounds"][-1]["server"]["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["simulation", "deployment"])
def test_where_each_client_has_its_own_data_nothing_is_divided(engine: str, tmp_path: Path, data_dir: Path) -> None:
    folder = changed(tmp_path / "own", OWN_DATA, NO_TEST_DATA)
    found = run(folder, data_dir, 3, "learning-rate=0.1", "warmup-rounds=0", engine=engine)
    assert "Each client has its own data, and nothing is divided" in found.stdout
    assert [row["num-examples"] for row in found.history["rounds"][0]["train"]["by_client"]] == [190] * 3
    assert model(found)["weight"].numpy() == pytest.approx(1.0, abs=0.05)


def test_a_split_by_classes_that_there_are_not_ends_before_the_clients_start(tmp_path: Path, data_dir: Path) -> None:
    found = finished(
        changed(tmp_path / "regression", REGRESSION), 3, 3, 3, 1, data_dir=data_dir, ENGINE="simulation", DATASET=""
    )
    assert found.process.returncode == 1
    assert "error: 'dirichlet' needs one class per example; labels are float32 (600, 1)" in found.stderr
    assert "+ flwr run" not in found.stdout
    assert found.history["status"] == "failed"
    assert found.nothing_left()
