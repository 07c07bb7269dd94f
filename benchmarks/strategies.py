"""Strategies side by side on non-IID data: the table in advanced_example/README.md.

    python benchmarks/strategies.py                    # 10 clients, Dirichlet 0.3, 20 rounds: about 4 minutes each
    python benchmarks/strategies.py --rounds 3 fedavg krum

Each is a run of advanced_example in the simulation engine with the same seed, so the same first model, partitions and
samples. DATA_DIR and DATASET say which pictures, as for ./run.sh. What a run printed is shown where it fails.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "advanced_example"
# Names, and the settings that say most: advanced_example's defaults, but for a milder momentum. None is tuned.
STRATEGIES = {
    "fedavg": (),
    "fedavgm": ("server-momentum=0.5",),
    "fedprox": ("proximal-mu=0.01",),
    "fedadam": ("server-learning-rate=0.01",),
    "fedmedian": (),
    "krum": ("malicious-clients=1",),
}
HEADER = ("strategy", "settings", "after 5", "after 10", "best", "last", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="STRATEGY", help="which; all by default")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--alpha", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=2026)
    given = parser.parse_args()
    names = given.names or list(STRATEGIES)
    if unknown := set(names) - set(STRATEGIES):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(STRATEGIES)}")
    rows = []
    for name in names:
        counts = [str(number) for number in (given.clients, given.clients, given.clients, given.rounds)]
        settings = [f"strategy={name}", *STRATEGIES[name], f"alpha={given.alpha}", f"seed={given.seed}"]
        history = run([*counts, "partitioner=dirichlet", *settings])
        rows.append(row(name, history))
        print(row(name, history)[0], history["accuracy"], file=sys.stderr, flush=True)
    print(
        f"{given.clients} clients, all sampled, {given.rounds} rounds, Dirichlet {given.alpha}, seed {given.seed}, "
        f"{history['dataset']} ({history['dataset_source']}), simulation, {os.cpu_count()} cores, "
        f"{platform.machine()}, " + ", ".join(f"{name} {version}" for name, version in history["versions"].items())
    )
    print()
    for cells in (HEADER, ["---"] * len(HEADER), *rows):
        print("| " + " | ".join(cells) + " |")


def run(arguments: list[str]) -> dict:
    """Run the example, and return its history."""
    before = set(EXAMPLE.glob("runs/2*"))
    environment = {**os.environ, "ENGINE": "simulation", "PYTHON": sys.executable}
    done = subprocess.run([EXAMPLE / "run.sh", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    (folder,) = set(EXAMPLE.glob("runs/2*")) - before
    return json.loads((folder / "history.json").read_text())


def row(name: str, history: dict) -> list[str]:
    """Accuracies of the server's evaluation, and the seconds of the whole run."""
    accuracy = {entry["round"]: entry["server"]["accuracy"] for entry in history["rounds"]}
    after = [f"{accuracy[n]:.3f}" if n in accuracy else "-" for n in (5, 10)]
    settings = " ".join(STRATEGIES[name]) or "-"
    return [
        name,
        settings,
        *after,
        f"{max(accuracy.values()):.3f}",
        f"{history['accuracy']:.3f}",
        f"{history['seconds']:.0f}",
    ]


if __name__ == "__main__":
    main()
