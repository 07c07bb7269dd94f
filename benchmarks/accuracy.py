"""Do our models learn what published ones do? The published settings, and what came out there and here.

    python benchmarks/accuracy.py                  # two runs of about an hour each; may be stopped, and goes on
    python benchmarks/accuracy.py iid --rounds 3

Flower's niid_bench baseline and NIID-Bench (Li et al., 2022, arXiv:2102.02079) train this CNN by FedAvg: 10 clients,
all in each of 50 rounds, 10 local epochs, batches of 64, learning rate 0.01, momentum 0.9, pictures shifted and
mirrored at random. So do these runs, but that in rounds 1 and 2 advanced_example's schedule makes one local epoch, and
that each client keeps a tenth of its pictures out of training. DATA_DIR and DATASET say which, as for ./run.sh.
"""

import argparse
import json
from typing import Any

from common import ROOT, run_example, set_up, table

EXAMPLE = "advanced_example"
# From round `decay-rounds` on, the learning rate is a tenth of `learning-rate`: 0.01, and the same in all rounds.
SCHEDULE = {"learning-rate": 0.1, "warmup-rounds": 0, "decay-rounds": 1, "local-epochs": 10}
SETTINGS = {**SCHEDULE, "batch-size": 64, "augment": True}
# Name: settings, accuracy (best round) of Flower's baseline, accuracy in NIID-Bench's own table
PUBLISHED = {
    "iid": ({"partitioner": "iid"}, "0.713 +- 0.003", ""),
    "dirichlet": ({"partitioner": "dirichlet", "alpha": 0.5}, "0.625 +- 0.004", "0.682"),
}
HEADER = ["clients' data", "Flower's baseline", "NIID-Bench", "here, best round", "here, last round"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SPLIT", help=f"of {', '.join(PUBLISHED)}; all by default")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=2026)
    given = parser.parse_args()
    if unknown := set(given.names) - set(PUBLISHED):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(PUBLISHED)}")
    rows = []
    for name in given.names or PUBLISHED:
        split, *published = PUBLISHED[name]
        history = run({**SETTINGS, **split, "seed": given.seed}, given.rounds)
        accuracy = [entry["server"]["accuracy"] for entry in history["rounds"]]
        best = max(range(len(accuracy)), key=accuracy.__getitem__)
        rows.append([name, *published, f"{accuracy[best]:.3f} (round {best})", f"{accuracy[-1]:.3f}"])
    print(f"{given.rounds} rounds, seed {given.seed}; {set_up(history)}\n")
    print(table(HEADER, rows))


def run(settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The history of a run with these settings: of one that is there, gone on with if it was stopped, or a new one."""
    wanted = {**settings, "num-server-rounds": rounds}
    for path in sorted((ROOT / EXAMPLE / "runs").glob("2*/history.json"), reverse=True):
        history = json.loads(path.read_text())
        if wanted.items() <= history["config"].items():
            if history["status"] == "completed":
                return history
            if (path.parent / "checkpoint.pt").exists():
                return run_example(EXAMPLE, resume=path.parent)
    return run_example(EXAMPLE, 10, 10, 10, rounds, *(f"{key}={value}".lower() for key, value in settings.items()))


if __name__ == "__main__":
    main()
