#!/usr/bin/env python3
"""What does a round cost as the work grows? Seconds, and the memory of all the run's processes. Linux only.

    python benchmarks/scale.py                         # all three sweeps, about 8 minutes
    python benchmarks/scale.py clients --rounds 3

The sweeps are over clients (10 sampled), over sampled clients (of 100), and over the model's size, in simulations. For
the last, clients have ten pictures each, so that what is left is the cost of weights that travel and are averaged.
DATA_DIR and DATASET say which pictures, which must be ready. Makes scale.md and scale.png.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from common import ROOT, Memory, run_example, set_up, table, write_picture

sys.path.insert(0, str(ROOT / "basic"))

from rounds.history import write_whole

HERE = Path(__file__).resolve().parent
# Name: label, example, clients and sampled of each run, and further settings
SWEEPS: dict[str, list[tuple[str, str, int, int, str]]] = {
    "clients": [(f"{n}", "multiprocessing", n, 10, "") for n in (10, 100, 1000)],
    "sampled": [(f"{n}", "multiprocessing", 100, n, "") for n in (1, 10, 50)],
    "parameters": [
        ("62,006", "advanced_example", 10, 10, "toy=true model=cnn"),
        ("11.2 million", "advanced_example", 10, 10, "toy=true model=resnet18"),
    ],
}
HEADER = ["sweep", "example", "clients", "sampled", "pictures a round", "MB a round", "a round, s", "peak of all, MiB"]


def measure(example: str, clients: int, sampled: int, settings: str, rounds: int) -> dict[str, Any]:
    """Run it; return its figures, without those of round 1, which waits for imports."""
    memory = Memory()
    history = run_example(example, clients, clients, sampled, rounds, *settings.split(), memory=memory)
    later = [entry for entry in history["rounds"] if entry["round"] > 1]
    examples = [sum(row["num-examples"] for row in entry["train"]["by_client"]) for entry in later]
    return {
        "examples": statistics.median(examples),
        "megabytes": statistics.median(entry["bytes"] for entry in later) / 1e6,
        "seconds": statistics.median(entry["seconds"] for entry in later),
        "peak": memory.peak,
        "history": history,
    }


def draw(found: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """A column of two panels for each sweep, `found` being {sweep: {label: figures}}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(found), figsize=(3 * len(found), 5), layout="constrained", sharey="row", squeeze=False
    )
    for (sweep, runs), (upper, lower) in zip(found.items(), axes.T, strict=True):
        upper.bar(list(runs), [run["seconds"] for run in runs.values()], color="#0072B2")
        lower.bar(list(runs), [run["peak"] for run in runs.values()], color="#E69F00", hatch="//", edgecolor="white")
        lower.set_xlabel(sweep)
    axes[0][0].set_ylabel("seconds a round, median")
    axes[1][0].set_ylabel("peak memory of all, MiB")
    write_picture(path, figure)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SWEEP", help=f"of {', '.join(SWEEPS)}; all by default")
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder for scale.md and scale.png")
    given = parser.parse_args()
    if unknown := set(given.names) - set(SWEEPS):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(SWEEPS)}")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    rows = []
    for name in given.names or SWEEPS:
        for label, example, clients, sampled, settings in SWEEPS[name]:
            run = measure(example, clients, sampled, settings, given.rounds)
            found.setdefault(name, {})[label] = run
            figures = [f"{run['examples']:.0f}", f"{run['megabytes']:.1f}", f"{run['seconds']:.2f}"]
            rows.append([f"{name}: {label}", example, f"{clients}", f"{sampled}", *figures, f"{run['peak']:.0f}"])
            print(*rows[-1], file=sys.stderr, flush=True)
    text = f"{given.rounds} rounds each, simulation; {set_up(run['history'])}\n\n{table(HEADER, rows)}\n"
    write_whole(given.out / "scale.md", text.encode())
    draw(found, given.out / "scale.png")
    print(text)


if __name__ == "__main__":
    main()
