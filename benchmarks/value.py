#!/usr/bin/env python3
"""Is federating worth it? The same model, data and number of passes over the data, three ways.

    python benchmarks/value.py
    python benchmarks/value.py --clients 3 --passes 2

In one place: one model is trained on the training examples of all clients. Alone: each client trains a model on its
own. Federated: `./run.sh advanced_example`, one pass a round, as many rounds as passes. In each, every client has kept
a tenth of its examples out of training. Accuracy is on the data set's test split, which has all classes alike, and on
those tenths, which are what each client itself will meet. DATA_DIR and DATASET say which pictures, as for ./run.sh. The
picture goes to benchmarks/value.png.
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
WAYS = ("in one place", "federated", "alone, mean", "alone, worst", "alone, best")
BATCH_SIZE, LEARNING_RATE, SEED = 32, 0.02, 2026
Data = list[tuple[DataLoader, DataLoader]]  # of each client: training, held out


def load(setting: dict[str, Any], clients: int) -> Data:
    return [load_client_data(i, clients, BATCH_SIZE, SEED, **setting) for i in range(clients)]


def trained(parts: list[DataLoader], passes: int) -> Net:
    """A model that has seen the examples of some clients, put together."""
    images = np.concatenate([part.dataset.images.numpy() for part in parts])
    labels = np.concatenate([part.dataset.labels.numpy() for part in parts])
    torch.manual_seed(SEED)  # the weights that the server begins with
    net = Net()
    train(net, Pictures(images, labels).loader(BATCH_SIZE, shuffle=True), passes, LEARNING_RATE)
    return net


def accuracies(net: Net, held_out: list[DataLoader]) -> tuple[float, float]:
    """On the test split, and on what some clients have held out, each example counted once."""
    images, labels = load_split("test")
    right = [test(net, one)["accuracy"] * len(one.dataset) for one in held_out]
    whole = Pictures(images.copy(), labels).loader(512)
    return test(net, whole)["accuracy"], sum(right) / sum(len(one.dataset) for one in held_out)


def on_this_machine(setting: dict[str, Any], clients: int, passes: int, only: int | None) -> tuple[float, float]:
    """Train on all clients' examples, or on those of one alone."""
    torch.set_num_threads(1)
    data = load(setting, clients)[slice(only, None if only is None else only + 1)]
    net = trained([part for part, _ in data], passes)
    return accuracies(net, [held_out for _, held_out in data])


def federated(setting: dict[str, Any], clients: int, passes: int) -> dict[str, Any]:
    """The history of a run by ./run.sh, with a constant learning rate."""
    config = {
        **{"partitioner" if key == "name" else key: value for key, value in setting.items()},
        **{"learning-rate": LEARNING_RATE, "warmup-rounds": 0, "decay-rounds": 1_000_000, "local-epochs": 1},
        **{"evaluate-steps": 1_000_000, "batch-size": BATCH_SIZE, "seed": SEED},
    }
    pairs = (f"{key}={value}" for key, value in config.items())
    return run_example("advanced_example", clients, clients, clients, passes, *pairs)


def measure(setting: dict[str, Any], clients: int, passes: int) -> tuple[dict[str, tuple[float, float]], dict]:
    """Accuracy by way: (on the test split, on the clients' held-out examples); and the federated run's history."""
    history = federated(setting, clients, passes)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        who = [None, *range(clients)]
        jobs = [pool.submit(on_this_machine, setting, clients, passes, only) for only in who]
        together, *alone = [job.result() for job in jobs]
    sizes = [len(held_out.dataset) for _, held_out in load(setting, clients)]
    test_split, own = map(np.array, zip(*alone, strict=True))
    return {
        "in one place": together,
        "federated": (history["accuracy"], history["rounds"][-1]["evaluate"]["accuracy"]),
        "alone, mean": (test_split.mean(), np.average(own, weights=sizes)),
        "alone, worst": (test_split.min(), own.min()),
        "alone, best": (test_split.max(), own.max()),
    }, history


def draw(found: dict[str, dict[str, tuple[float, float]]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = (("in one place", "#0072B2", ""), ("federated", "#D55E00", "//"), ("alone, mean", "#BBBBBB", ".."))
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for axes, column, name in zip(
        panels, (0, 1), ("on the test split", "on the clients' own held-out data"), strict=True
    ):
        for shift, (way, colour, hatch) in enumerate(looks):
            heights = [ways[way][column] for ways in found.values()]
            places = np.arange(len(found)) + (shift - 1) * 0.27
            axes.bar(places, heights, 0.25, color=colour, hatch=hatch, edgecolor="black", label=way)
        ends = [[abs(ways[way][column] - ways["alone, mean"][column]) for ways in found.values()] for way in WAYS[3:]]
        axes.errorbar(places, heights, yerr=ends, fmt="none", color="black", capsize=4, label="alone, worst to best")
        axes.set(title=name, xticks=range(len(found)), ylim=(0, 1))
        axes.set_xticklabels([setting.replace(", ", "\n") for setting in found])
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    write_picture(path, figure)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--passes", type=int, default=10)
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
    draw(found, f"{dataset}, {given.clients} clients, {given.passes} passes", Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
