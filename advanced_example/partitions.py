"""Who holds what: the examples of each class that each client has, as a table and as a picture.

The launcher runs `python partitions.py RUN_FOLDER` once, before the clients start; it writes partitions.png there.
"""

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import cifar_utils
from launcher.results import load_history, write_whole

MOST_ROWS = 20  # of the table; the picture has all


def partitioner(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the run config that says who holds what, as arguments of `cifar_utils.partition`."""
    options = {"alpha": config["alpha"]} if config["partitioner"] == "dirichlet" else {}
    return {"name": config["partitioner"], **options}


def count(labels: np.ndarray, num_partitions: int, config: Mapping[str, Any]) -> np.ndarray:
    """Examples by client and class, int64 (num_partitions, 10). Raises ValueError where the data can't be split so."""
    parts = cifar_utils.partition(labels, num_partitions, config["seed"], **partitioner(config))
    return np.stack([np.bincount(labels[part], minlength=cifar_utils.NUM_CLASSES) for part in parts])


def table(counts: np.ndarray) -> str:
    """One line a client: its examples by class, and all of them."""
    width = max(5, len(str(counts.sum())) + 1)
    lines = ["client" + "".join(f"{label:>{width}}" for label in [*range(counts.shape[1]), "all"])]
    for client, row in enumerate(counts[:MOST_ROWS]):
        lines.append(f"{client:>6}" + "".join(f"{number:>{width}}" for number in [*row, row.sum()]))
    if len(counts) > MOST_ROWS:
        lines.append(f"   ... and {len(counts) - MOST_ROWS} more")
    return "\n".join(lines)


def draw(counts: np.ndarray, title: str, path: Path) -> None:
    """A field for each client and class: the darker, the more examples, in colour and in grey."""
    import matplotlib  # no client draws, so only here

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    clients, classes = counts.shape
    figure, axes = plt.subplots(figsize=(7, min(12, 1.6 + 0.3 * clients)), layout="constrained")
    picture = axes.imshow(counts, cmap="Blues", aspect="auto")
    if clients <= MOST_ROWS:
        for (client, label), number in np.ndenumerate(counts):
            colour = "white" if number > counts.max() / 2 else "black"
            axes.text(label, client, str(number), ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="class", ylabel="client", title=title, xticks=range(classes))
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(picture, label="examples")
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)


def main(run_dir: Path) -> None:
    config = tomllib.loads((run_dir / "run-config.toml").read_text())
    history = load_history(run_dir)
    try:
        counts = count(cifar_utils.load_split("train")[1], history["clients"], config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    title = " ".join(f"{key} {value}" for key, value in partitioner(config).items()).removeprefix("name ")
    print(f"Examples by client and class ({title}); each client keeps a tenth of its own for evaluation:")
    print(table(counts), flush=True)
    draw(counts, f"Who holds what of {history['dataset']}: {title}, seed {config['seed']}", run_dir / "partitions.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
