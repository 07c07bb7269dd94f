"""Strategies side by side on non-IID data: the table in advanced_example/README.md.

    python benchmarks/strategies.py                    # 10 clients, Dirichlet 0.3, 20 rounds: about 4 minutes each
    python benchmarks/strategies.py --rounds 3 fedavg krum

Each is a run of advanced_example in the simulation engine with the same seed, so the same first model, partitions and
samples. DATA_DIR and DATASET say which pictures, as for ./run.sh.
"""

import argparse
import sys
from typing import Any

from common import run_example, set_up, table

# Names, and the settings that say most: advanced_example's defaults, but for a milder momentum. None is tuned.
STRATEGIES = {
    "fedavg": "",
    "fedavgm": "server-momentum=0.5",
    "fedprox": "proximal-mu=0.01",
    "fedadam": "server-learning-rate=0.01",
    "fedmedian": "",
    "krum": "malicious-clients=1",
}
HEADER = ["strategy", "settings", "accuracy after 5", "after 10", "best", "last", "seconds"]


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
    counts = [given.clients] * 3 + [given.rounds]
    data = ["partitioner=dirichlet", f"alpha={given.alpha}", f"seed={given.seed}"]
    rows = []
    for name in names:
        history = run_example("advanced_example", *counts, *data, f"strategy={name}", *STRATEGIES[name].split())
        rows.append(row(name, history))
        print(*rows[-1], file=sys.stderr, flush=True)
    print(
        f"{given.clients} clients, all of them in each of {given.rounds} rounds; {' '.join(data)}; {set_up(history)}\n"
    )
    print(table(HEADER, rows))


def row(name: str, history: dict[str, Any]) -> list[str]:
    """Accuracies of the server's evaluation, and the seconds of the whole run."""
    accuracy = {entry["round"]: entry["server"]["accuracy"] for entry in history["rounds"]}
    after = [f"{accuracy[n]:.3f}" if n in accuracy else "-" for n in (5, 10)]
    best, last, seconds = max(accuracy.values()), history["accuracy"], history["seconds"]
    return [name, STRATEGIES[name], *after, f"{best:.3f}", f"{last:.3f}", f"{seconds:.0f}"]


if __name__ == "__main__":
    main()
