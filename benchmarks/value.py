#!/usr/bin/env python3
"""Is federating worth it? The same model, data and number of passes over the data, in several ways.

    python benchmarks/value.py
    python benchmarks/value.py --clients 3 --passes 2

In one place: one model is trained on the training examples of all clients. Federated: `./run.sh advanced_example`, one
pass a round, as many rounds as passes. Personal head: the same, with the last layer left to each client. Fine-tuned:
each client trains the federated model for one pass more on its own examples. Alone: each client trains a model on its
own. In each, every client has kept a tenth of its examples out of training. Accuracy is on the data set's test split,
which has all classes alike, and on those tenths, which are what each client itself will meet; where each client has a
model of its own, it is the clients' mean. DATA_DIR and DATASET say which pictures, as for ./run.sh. The picture goes
to value.png.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from common import ROOT, run_example, set_up, table, write_picture

sys.path.insert(0, str(ROOT / "basic"))

from cifar_utils import Net, Pictures, load_client_data, load_split, test, train
from launcher.screen import STAND_IN

SETTINGS: dict[str, dict[str, Any]] = {
    "IID": {"name": "iid"},
    "Dirichlet, alpha 0.5": {"name": "dirichlet", "alpha": 0.5},
    "Dirichlet, alpha 0.1": {"name": "dirichlet", "alpha": 0.1},
}
WAYS = ("in one place", "federated", "personal head", "fine-tuned", "alone, mean", "alone, worst", "alone, best")
HEAD = "fc3"  # the last layer of Net
BATCH_SIZE, LEARNING_RATE, SEED = 32, 0.02, 2026
Data = list[tuple[DataLoader, DataLoader]]  # of each client: training, held out
State = dict[str, torch.Tensor]
Accuracies = tuple[float, float]  # on the test split, on what clients have held out


def load(setting: dict[str, Any], clients: int) -> Data:
    return [load_client_data(i, clients, BATCH_SIZE, SEED, **setting) for i in range(clients)]


def trained(parts: list[DataLoader], passes: int, start: State | None) -> Net:
    """A model that has seen the examples of some clients, put together."""
    images = np.concatenate([part.dataset.images.numpy() for part in parts])
    labels = np.concatenate([part.dataset.labels.numpy() for part in parts])
    torch.manual_seed(SEED)  # the weights that the server begins with
    net = Net()
    net.load_state_dict(start or net.state_dict())
    if passes:
        train(net, Pictures(images, labels).loader(BATCH_SIZE, shuffle=True), passes, LEARNING_RATE)
    return net


def accuracies(net: Net, held_out: list[DataLoader]) -> Accuracies:
    """On the test split, and on what some clients have held out, each example counted once."""
    images, labels = load_split("test")
    right = [test(net, one)["accuracy"] * len(one.dataset) for one in held_out]
    whole = Pictures(images.copy(), labels).loader(512)
    return test(net, whole)["accuracy"], sum(right) / sum(len(one.dataset) for one in held_out)


def on_this_machine(
    setting: dict[str, Any], clients: int, passes: int, only: int | None, start: State | None = None
) -> Accuracies:
    """Train on all clients' examples, or on those of one alone; from the first weights, or from others."""
    torch.set_num_threads(1)
    data = load(setting, clients)[slice(only, None if only is None else only + 1)]
    net = trained([part for part, _ in data], passes, start)
    return accuracies(net, [held_out for _, held_out in data])


def federated(setting: dict[str, Any], clients: int, passes: int, *more: str) -> dict[str, Any]:
    """The history of a run by ./run.sh, with a constant learning rate."""
    config = {
        **{"partitioner" if key == "name" else key: value for key, value in setting.items()},
        **{"learning-rate": LEARNING_RATE, "warmup-rounds": 0, "decay-rounds": 1_000_000, "local-epochs": 1},
        **{"evaluate-steps": 1_000_000, "batch-size": BATCH_SIZE, "seed": SEED},
    }
    pairs = (f"{key}={value}" for key, value in config.items())
    return run_example("advanced_example", clients, clients, clients, passes, *pairs, *more)


def own_layers(folder: Path, client: int) -> State:
    """What a client has kept to itself in a run, after the last round in which it trained."""
    newest = max(folder.glob(f"personal/client-{client}-round-*.pt"), key=lambda path: int(path.stem.split("-")[-1]))
    return torch.load(newest, weights_only=True)


def measure(setting: dict[str, Any], clients: int, passes: int) -> tuple[dict[str, Accuracies], dict[str, Any]]:
    """Accuracies by way, and the federated run's history."""
    history = federated(setting, clients, passes)
    folder = federated(setting, clients, passes, f"personal-layers={HEAD}")["folder"]
    whole, body = (torch.load(one / "model.pt", weights_only=True) for one in (history["folder"], folder))
    sizes = [len(held_out.dataset) for _, held_out in load(setting, clients)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:

        def each(passes: int, starts: list[State | None]) -> tuple[np.ndarray, np.ndarray]:
            jobs = [pool.submit(on_this_machine, setting, clients, passes, i, start) for i, start in enumerate(starts)]
            return tuple(map(np.array, zip(*(job.result() for job in jobs), strict=True)))

        together = pool.submit(on_this_machine, setting, clients, passes, None)
        alone, tuned = each(passes, [None] * clients), each(1, [whole] * clients)
        personal = each(0, [body | own_layers(folder, i) for i in range(clients)])

    def mean(found: tuple[np.ndarray, np.ndarray]) -> Accuracies:
        return found[0].mean(), np.average(found[1], weights=sizes)

    return {
        "in one place": together.result(),
        "federated": (history["accuracy"], history["rounds"][-1]["evaluate"]["accuracy"]),
        "personal head": mean(personal),
        "fine-tuned": mean(tuned),
        "alone, mean": mean(alone),
        "alone, worst": (alone[0].min(), alone[1].min()),
        "alone, best": (alone[0].max(), alone[1].max()),
    }, history


def draw(found: dict[str, dict[str, Accuracies]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ("#0072B2", "#D55E00", "#009E73", "#F0E442", "#BBBBBB")
    looks = list(zip(WAYS, colours, ("", "//", "\\\\", "xx", ".."), strict=False))
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.7), sharey=True, layout="constrained")
    for axes, column, name in zip(
        panels, (0, 1), ("on the test split", "on the clients' own held-out data"), strict=True
    ):
        for shift, (way, colour, hatch) in enumerate(looks):
            heights = [ways[way][column] for ways in found.values()]
            places = np.arange(len(found)) + (shift - 2) * 0.17
            axes.bar(places, heights, 0.16, color=colour, hatch=hatch, edgecolor="black", label=way)
        ends = [[abs(ways[way][column] - ways["alone, mean"][column]) for ways in found.values()] for way in WAYS[5:]]
        axes.errorbar(places, heights, yerr=ends, fmt="none", color="black", capsize=4, label="alone, worst to best")
        axes.set(title=name, xticks=range(len(found)), ylim=(0, 1))
        axes.set_xticklabels([setting.replace(", ", "\n") for setting in found])
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    write_picture(path, figure)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the folder for value.png")
    given = parser.parse_args()
    found = {}
    for name, setting in SETTINGS.items():
        found[name], history = measure(setting, given.clients, given.passes)
    print(
        f"{given.clients} clients, {given.passes} passes, batch {BATCH_SIZE}, SGD {LEARNING_RATE}; {set_up(history)}\n"
    )
    rows = [
        [f"{setting}, {where}", *(f"{ways[way][column]:.3f}" for way in WAYS)]
        for column, where in enumerate(("test split", "own held-out"))
        for setting, ways in found.items()
    ]
    print(table(["accuracy", *WAYS], rows))
    dataset = STAND_IN if history["dataset"] == "synthetic" else history["dataset"]
    draw(found, f"{dataset}, {given.clients} clients, {given.passes} passes", given.out / "value.png")


if __name__ == "__main__":
    main()
