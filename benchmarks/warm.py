#!/usr/bin/env python3
"""What does the warm Python save? WARM=0, WARM=1 and the simulation engine, side by side. Linux only.

    python benchmarks/warm.py                              # 3, 10 and 40 clients: 30 to 60 minutes
    python benchmarks/warm.py --clients 3 --repeats 1

It runs `basic 3 3 3 3`, or `basic N N 5 2` for other numbers of clients, the three ways taking turns. Each first runs
once for its memory, since looking at that takes time, then --repeats times for its seconds. Memory is of all processes
of a run together, and a page that several of them share counts once. A way that fails is not tried again: 40 clients
with WARM=0 can be too many for 24 GB. Run it as root, since some of Flower's processes hide their memory from other
users. DATA_DIR and DATASET say which pictures, which must be ready. Makes warm.md and warm.png.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from common import ROOT, Memory, run_example, set_up, table, write_picture

sys.path.insert(0, str(ROOT / "basic"))

from rounds.history import write_whole

HERE = Path(__file__).resolve().parent
# Name: engine, WARM; colour (Okabe and Ito, 2008), line
WAYS = {
    "cold": ("deployment", "0", "#D55E00", "o--"),
    "warm": ("deployment", "1", "#0072B2", "s-"),
    "simulation": ("simulation", "1", "#009E73", "^:"),
}
LIMIT = 900.0  # seconds; a run that takes longer is stopped
FIGURES = ("seconds", "start-up", "a round")
HEADER = ["run", "way", *(f"{name}, s" for name in FIGURES), "peak of all, MiB", "processes then", "same model"]
RATIOS = ["run", *(f"{what}, warm to {way}" for what in ("seconds", "memory") for way in ("cold", "simulation"))]


class Runs:
    """The runs of one way with one number of clients."""

    def __init__(self, clients: int, way: str) -> None:
        self.way, (self.engine, self.warm, *_) = way, WAYS[way]
        sampled, rounds = (3, 3) if clients == 3 else (min(clients, 5), 2)
        self.counts = (clients, clients, sampled, rounds)
        self.memory = Memory()
        self.histories: list[dict[str, Any]] = []  # the first is of the run whose memory was looked at
        self.failure: str | None = None

    def run(self) -> None:
        if self.failure is None:
            memory = None if self.histories else self.memory
            more = {"engine": self.engine, "WARM": self.warm, "memory": memory, "may_fail": True, "limit": LIMIT}
            history = run_example("basic", *self.counts, **more)
            self.histories.append(history)
            if history["status"] != "completed":
                self.failure = history.get("reason", history["status"])

    def figures(self) -> list[list[float]]:
        """Seconds, start-up, and the median of the rounds, for each run that nobody looked at."""
        if self.failure is not None:
            return []
        return [
            [run["seconds"], run["startup_seconds"], statistics.median(entry["seconds"] for entry in run["rounds"])]
            for run in self.histories[1:]
        ]

    def medians(self) -> list[float]:
        return [statistics.median(values) for values in zip(*self.figures(), strict=True)]

    def models(self) -> set[str]:
        return {run["model_sha256"] for run in self.histories if run["status"] == "completed"}

    @property
    def name(self) -> str:
        return f"`basic {' '.join(map(str, self.counts))}`"


def measure(clients: int, repeats: int) -> dict[str, Runs]:
    """All ways, taking turns."""
    found = {way: Runs(clients, way) for way in WAYS}
    for number in range(1 + repeats):
        for way, runs in found.items():
            runs.run()
            said = runs.failure or f"{runs.histories[-1]['seconds']} s"
            print(runs.name, way, "memory" if number == 0 else number, said, file=sys.stderr, flush=True)
    return found


def rows(found: dict[str, Runs]) -> list[list[str]]:
    first = next((min(runs.models()) for runs in found.values() if runs.models()), None)
    result = []
    for way, runs in found.items():
        seconds = [f"{value:.1f}" for value in runs.medians()] or ["failed", "", ""]
        same = ("yes" if runs.models() == {first} else "NO") if runs.failure is None else ""
        result.append([runs.name, way, *seconds, f"{runs.memory.peak:.0f}", f"{runs.memory.processes}", same])
    return result


def ratios(found: dict[str, Runs]) -> list[str]:
    """Seconds are compared turn by turn: the machine may be faster in one than in another."""
    warm, row = found["warm"], [found["warm"].name]
    others = [found["cold"], found["simulation"]]
    for other in others:
        pairs = zip(warm.figures(), other.figures(), strict=False)
        each = [mine[0] / theirs[0] for mine, theirs in pairs]
        row.append(f"{statistics.median(each):.2f}" if each else "")
    for other in others:
        whole = warm.failure is None and other.failure is None
        row.append(f"{warm.memory.peak / other.memory.peak:.2f}" if whole else "")
    return row


def text(found: dict[int, dict[str, Runs]], repeats: int) -> str:
    """The page: the set-up, a table of the figures, one of the ratios, and what those said that failed."""
    every = [runs for ways in found.values() for runs in ways.values()]
    whole = [run for runs in every for run in runs.histories if run["status"] == "completed"]
    parts = [f"Medians of {repeats}; {set_up(whole[0])}"] if whole else []
    if os.geteuid() != 0:
        parts.append("Not measured as root: the memory of processes that hide it, such as superexecs, is missing.")
    parts.append(table(HEADER, [row for ways in found.values() for row in rows(ways)]))
    parts.append(table(RATIOS, [ratios(ways) for ways in found.values()]))
    failed = [f"- {runs.name}, {runs.way}: {runs.failure}" for runs in every if runs.failure is not None]
    return "\n\n".join([*parts, *(["Failed:\n\n" + "\n".join(failed)] if failed else [])]) + "\n"


def draw(found: dict[int, dict[str, Runs]], path: Path) -> None:
    """Seconds and memory against clients; a way has no point where it failed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for way, (*_, colour, style) in WAYS.items():
        done = {clients: ways[way] for clients, ways in found.items() if ways[way].failure is None}
        left.plot(list(done), [runs.medians()[0] for runs in done.values()], style, color=colour, label=way)
        right.plot(list(done), [runs.memory.peak / 1024 for runs in done.values()], style, color=colour, label=way)
    for axes, what in ((left, "seconds of a run"), (right, "peak memory of all processes, GiB")):
        axes.set(xlabel="clients", ylabel=what, xticks=list(found), ylim=(0, None))
        axes.grid(alpha=0.3)
    left.legend()
    write_picture(path, figure)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[3, 10, 40], metavar="N")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE, help="the folder for warm.md and warm.png")
    given = parser.parse_args()
    if min(*given.clients, given.repeats) < 1:
        parser.error("clients and repeats are numbers from 1 on")
    found: dict[int, dict[str, Runs]] = {}
    for clients in given.clients:
        found[clients] = measure(clients, given.repeats)
        write_whole(given.out / "warm.md", text(found, given.repeats).encode())  # what there is, should the next fail
        draw(found, given.out / "warm.png")
    print(text(found, given.repeats))


if __name__ == "__main__":
    main()
