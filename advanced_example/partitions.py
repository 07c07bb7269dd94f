"""Who holds what: one more way to divide the data, and a table and a picture of the examples that each client has.

The launcher runs `python partitions.py RUN_FOLDER` once, before the clients start; it writes partitions.png there.
"""

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import cifar_data
import cifar_utils
from rounds import history

MOST_ROWS, MOST_CLASSES = 20, 20  # of the table; the picture has all


def quantity(labels: np.ndarray, num_partitions: int, rng: np.random.Generator, alpha: float) -> list[np.ndarray]:
    """Shares of different sizes, drawn from Dirichlet(alpha), of shuffled examples: for labels that are no classes too.

    "Quantity skew" in NIID-Bench (Li et al., 2022, arXiv:2102.02079).
    """
    shares = rng.dirichlet(np.full(num_partitions, alpha))
    return np.split(rng.permutation(len(labels)), (np.cumsum(shares)[:-1] * len(labels)).astype(int))


cifar_utils.PARTITIONERS["quantity"] = quantity


def partitioner(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the run config that says who holds what, as arguments of `cifar_utils.partition`."""
    options = {"alpha": config["alpha"]} if config["partitioner"] in ("dirichlet", "quantity") else {}
    return {"name": config["partitioner"], **options}


# --- The table and the picture ---------------------------------------------------------------------------------------


def count(labels: np.ndarray, num_partitions: int, config: Mapping[str, Any]) -> tuple[list[Any], np.ndarray]:
    """Return the classes, and the examples by client and class, int64 (num_partitions, classes).

    Where an example has no class, but a number, a mask or several labels, the only class is "examples". Raises
    ValueError where the data can't be split so.
    """
    parts = cifar_utils.partition(labels, num_partitions, config["seed"], **partitioner(config))
    if not cifar_utils.are_classes(labels):
        return ["examples"], np.array([[len(part)] for part in parts])
    classes, positions = np.unique(labels, return_inverse=True)
    return classes.tolist(), np.stack([np.bincount(positions[part], minlength=len(classes)) for part in parts])


def table(classes: list[Any], counts: np.ndarray) -> str:
    """Return one line a client: its examples by class, unless there are too many for a line, and all of them."""
    by_class = 1 < len(classes) <= MOST_CLASSES
    shown = np.column_stack([counts, counts.sum(1)]) if by_class else counts.sum(1, keepdims=True)
    width = max(5, len(str(counts.sum())) + 1)
    lines = ["client" + "".join(f"{label:>{width}}" for label in [*(classes if by_class else []), "all"])]
    for client, row in enumerate(shown[:MOST_ROWS]):
        lines.append(f"{client:>6}" + "".join(f"{number:>{width}}" for number in row))
    if len(shown) > MOST_ROWS:
        lines.append(f"   ... and {len(shown) - MOST_ROWS} more")
    return "\n".join(lines)


def draw(classes: list[Any], counts: np.ndarray, title: str, path: Path) -> None:
    """Draw a field for each client and class: the darker, the more examples, in colour and in grey."""
    import matplotlib  # no client draws, so only here

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, min(12, 1.6 + 0.3 * len(counts))), layout="constrained")
    picture = axes.imshow(counts, cmap="Blues", aspect="auto", vmin=0)
    if len(counts) <= MOST_ROWS and len(classes) <= MOST_CLASSES:
        axes.set_xticks(range(len(classes)), classes)
        for (client, label), number in np.ndenumerate(counts):
            colour = "white" if number > counts.max() / 2 else "black"
            axes.text(label, client, str(number), ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="class" if len(classes) > 1 else "", ylabel="client")
    axes.set_title(title, parse_math=False)  # else a $ begins a formula
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(picture, label="examples")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    history.write_whole(path, drawn.getvalue())
    plt.close(figure)


def main(run_dir: Path) -> None:
    record = history.load(run_dir)
    config, dataset = record["config"], record["dataset"]
    try:
        labels = cifar_utils.load_split("train")[1]
    except (OSError, ValueError) as error:
        if dataset in cifar_data.DATASETS:
            sys.exit(f"error: {error}")
        return print(f"Each client has its own data, and nothing is divided (load_split: {error})")
    try:
        classes, counts = count(labels, record["clients"], config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    title = " ".join(f"{key} {value}" for key, value in partitioner(config).items()).removeprefix("name ")
    what = "client and class" if len(classes) > 1 else "client"
    print(f"Examples by {what} ({title}); each client keeps a tenth of its own for evaluation:")
    print(table(classes, counts))
    draw(classes, counts, f"Who holds what of {dataset}: {title}, seed {config['seed']}", run_dir / "partitions.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
