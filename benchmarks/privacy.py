#!/usr/bin/env python3
"""What does privacy cost? Accuracy against epsilon, for clients with IID data, all of them in each round.

    python benchmarks/privacy.py
    python benchmarks/privacy.py --clients 10 --rounds 2 --epsilons 100 8

Each is a run of advanced_example in the simulation engine with the same seed, so the same first model and partitions,
with `dp-target-epsilon`, which picks the least noise; one more is without noise and clipping. Accuracy is the server's,
on the test split. DATA_DIR and DATASET say which pictures, as for ./run.sh. The page goes to privacy.md, the picture to
privacy.png.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from common import run_example, set_up, table, write_picture
from launcher.screen import STAND_IN
from rounds.history import write_whole

# One learning rate for all: clipping makes the length of an update what dp-clip says.
SETTINGS = {
    "partitioner": "iid",
    "learning-rate": 0.05,
    "warmup-rounds": 0,
    "decay-rounds": 1_000_000,
    "local-epochs": 1,
    "seed": 2026,
}
HEADER = ["epsilon, at most", "dp-noise", "epsilon, counted", "accuracy after half", "best", "last"]
Runs = dict[float, dict[str, Any]]  # histories by epsilon; that without noise under infinity


def row(target: float, history: dict[str, Any]) -> list[str]:
    accuracy = [entry["server"]["accuracy"] for entry in history["rounds"]]
    spent = history.get("privacy", {}).get("epsilon")
    noise = history["config"]["dp-noise"]
    reached = [accuracy[len(accuracy) // 2], max(accuracy), accuracy[-1]]
    said = [f"{target:g}", f"{noise:g}", f"{spent:.2f}"] if spent else ["no noise", "", ""]
    return [*said, *(f"{value:.3f}" for value in reached)]


def text(found: Runs, clip: float) -> str:
    """The page: the set-up and the table."""
    history = next(iter(found.values()))
    delta = history["config"]["dp-delta"]
    who = f"{history['clients']} clients, all of them in each of {history['config']['num-server-rounds']} rounds"
    settings = " ".join(f"{key}={value}" for key, value in SETTINGS.items())
    about = f"{who}; delta {delta:g}, for adding or removing one client; dp-clip={clip:g} {settings}; {set_up(history)}"
    return f"{about}\n\n{table(HEADER, [row(target, history) for target, history in found.items()])}\n"


def draw(found: Runs, path: Path) -> None:
    """Accuracy at the end by epsilon, on a logarithmic axis; a line where there is no noise, and one for guessing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    noisy = {target: history for target, history in sorted(found.items()) if "privacy" in history}
    axes.plot([*noisy], [history["accuracy"] for history in noisy.values()], "o-", color="#0072B2", label="with noise")
    for history in found.values():
        if "privacy" not in history:
            axes.axhline(history["accuracy"], color="#D55E00", linestyle="--", label="without noise")
    axes.axhline(0.1, color="#888888", linestyle=":", label="guessing")
    axes.set(xscale="log", xlabel="epsilon: the less, the more private", ylabel="accuracy", ylim=(0, None))
    axes.set_xticks([*noisy], [f"{target:g}" for target in noisy])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    history = next(iter(found.values()))
    dataset = STAND_IN if history["dataset"] == "synthetic" else history["dataset"]
    axes.set_title(f"{dataset}, {history['clients']} clients, {history['config']['num-server-rounds']} rounds")
    write_picture(path, figure)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1000, 100, 8, 1], metavar="EPSILON")
    parser.add_argument("--clip", type=float, default=0.5, help="dp-clip of all runs with noise")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="the folder for the page and the picture"
    )
    given = parser.parse_args()
    found: Runs = {}
    for target in (float("inf"), *sorted(given.epsilons, reverse=True)):
        noise = [] if target == float("inf") else [f"dp-target-epsilon={target}", f"dp-clip={given.clip}"]
        pairs = [f"{key}={value}" for key, value in SETTINGS.items()]
        found[target] = run_example("advanced_example", *[given.clients] * 3, given.rounds, *pairs, *noise)
        print(*row(target, found[target]), file=sys.stderr, flush=True)
        write_whole(given.out / "privacy.md", text(found, given.clip).encode())  # what there is, should the next fail
        draw(found, given.out / "privacy.png")
    print(text(found, given.clip), end="")


if __name__ == "__main__":
    main()
