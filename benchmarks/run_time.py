"""How far is ./run.sh from the limit? Each run beside benchmarks/floor.py's plain loop.

    python benchmarks/run_time.py                     # basic in both engines, multiprocessing: about 15 minutes
    python benchmarks/run_time.py --repeats 1 basic

For basic, a plain Flower app (benchmarks/plain_app.py), which does the same work, runs beside them.

DATA_DIR and DATASET say which pictures, which must be ready. Medians over the repeats; runs and loops take turns, so
that a machine that is busy for a while is busy for both.
"""

import argparse
import statistics
import sys
from typing import Any

import plain_app
from floor import federate

from common import run_example, set_up, table

# Name: example, engine, clients, sampled, rounds
WORK = {
    "basic": [("basic", "simulation", 3, 3, 3), ("basic", "deployment", 3, 3, 3)],
    "multiprocessing": [("multiprocessing", "simulation", 100, 10, 5), ("multiprocessing", "simulation", 100, 10, 50)],
}
HEADER = ["run", "seconds", "plain loop", "ratio", "start-up", "rounds", "end"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="EXAMPLE", help=f"of {', '.join(WORK)}; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if unknown := set(given.names) - set(WORK):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(WORK)}")
    rows, plain = [], []
    for example, engine, clients, sampled, rounds in [w for name in given.names or WORK for w in WORK[name]]:
        found = []
        for _ in range(given.repeats):
            loop = federate(example, clients, sampled, rounds)
            history = run_example(example, clients, clients, sampled, rounds, engine=engine)
            if history["model_sha256"] != loop["model_sha256"]:
                sys.exit(f"{example}, {engine}: the run's model is not the plain loop's")
            found.append(split(history, loop["start"] + loop["rounds"]))
            if (example, engine) == ("basic", "simulation"):
                plain.append(plain_app.run(clients, rounds) / found[-1][0])
        name = f"`{example} {clients} {clients} {sampled} {rounds}`, {engine}"
        middle = [statistics.median(values) for values in zip(*found, strict=True)]
        rows.append([name, *(f"{value:.2f}" if i == 2 else f"{value:.1f}" for i, value in enumerate(middle))])
        print(*rows[-1], file=sys.stderr, flush=True)
    print(f"medians of {given.repeats}, seconds; {set_up(history)}\n")
    print(table(HEADER, rows))
    if plain:
        print(f"\nA plain Flower app takes {statistics.median(plain):.1f} times as long as basic in simulation.")


def split(history: dict[str, Any], loop: float) -> list[float]:
    """Seconds of a run in all, of the plain loop, their ratio, and the run's parts."""
    total, start = history["seconds"], history["startup_seconds"]
    rounds = sum(entry["seconds"] for entry in history["rounds"])
    return [total, loop, total / loop, start, rounds, total - start - rounds]


if __name__ == "__main__":
    main()
