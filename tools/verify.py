"""Checks that the same command gives the same model, bit for bit: runs it twice, and compares what the runs left.

    python tools/verify.py basic 3 3 2 2                      # twice in the example's own engine
    python tools/verify.py --both-engines basic 3 3 2 2       # once in each

The words after the options are those of ./run.sh; the environment (DATASET, ENGINE, ...) reaches it too. Exit status: 0
the same, 1 not the same, 2 a run did not complete.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BOTH = "--both-engines"


def main(words: list[str]) -> int:
    if not words or "--help" in words:
        print(__doc__)
        return 0
    engines = ("deployment", "simulation") if BOTH in words else (None, None)
    histories = [run([word for word in words if word != BOTH], engine) for engine in engines]
    if None in histories:
        return 2
    first, second = histories
    for name in ("model_sha256", "accuracy"):
        if name in first:  # not every task has an accuracy
            print(f"{name}: {first[name]} and {second[name]}")
    differences = [
        f"round {a['round']}" for a, b in zip(first["rounds"], second["rounds"], strict=True) if steady(a) != steady(b)
    ]
    if first["model_sha256"] == second["model_sha256"] and not differences:
        print("the same, bit for bit, in all rounds")
        return 0
    print(f"NOT the same: {', '.join(differences) or 'the last weights alone'}")
    return 1


def run(words: list[str], engine: str | None) -> dict[str, Any] | None:
    """Run the command, and return the run's history; None where it did not complete."""
    environment = dict(os.environ) if engine is None else {**os.environ, "ENGINE": engine}
    done = subprocess.run([ROOT / "run.sh", *words], env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        print(f"./run.sh {' '.join(words)} ended with status {done.returncode}", file=sys.stderr)
        return None
    (summary,) = [line for line in done.stdout.splitlines() if " s -> " in line]
    return json.loads((Path(summary.partition(" s -> ")[2]) / "history.json").read_text())


def steady(entry: Any) -> Any:
    """Return an entry of the history without what no two runs have in common."""
    if isinstance(entry, dict):
        return {key: steady(value) for key, value in entry.items() if "seconds" not in key and key != "memory"}
    return [steady(item) for item in entry] if isinstance(entry, list) else entry


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
