#!/usr/bin/env python3
"""What grows with the number of clients? Seconds a round, and the memory of all the run's processes. Linux only.

Run it with the data ready: DATA_DIR=... DATASET=cifar10 python benchmarks/scale.py [CLIENTS:SAMPLED ...] [--rounds 5]
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "multiprocessing"))

from launcher.processes import marked
from launcher.results import load_history, write_whole

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "multiprocessing"
SIZES = ("10:10", "100:10", "1000:10", "100:40")
INTERVAL = 0.5  # seconds between two looks at the memory


def measure(clients: int, sampled: int, rounds: int) -> dict[str, Any]:
    """Run it; return its figures."""
    command = [str(FOLDER / "run.sh"), *map(str, (clients, clients, sampled, rounds))]
    peak, most = 0.0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHON": sys.executable}) as launcher:
        while launcher.poll() is None:
            time.sleep(INTERVAL)
            for run_dir in FOLDER.glob(f"runs/*-{launcher.pid}"):
                sizes = [size for pid in [launcher.pid, *marked(run_dir)] if (size := own_share(pid))]
                peak, most = max(peak, sum(sizes)), max(most, len(sizes))
    if launcher.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with status {launcher.returncode}")
    history = load_history(run_dir)
    seconds = [entry["seconds"] for entry in history["rounds"]]
    return {
        **{"clients": clients, "sampled": sampled, "rounds": seconds[1:], "later": statistics.median(seconds[2:])},
        **{"rest": history["seconds"] - sum(seconds[1:]), "peak": peak, "processes": most},
        "dataset": history["dataset"],
    }


def own_share(pid: int) -> float:
    """MiB of a process, in which a page that n processes share counts as an nth; 0 where it is gone."""
    with suppress(OSError):
        if found := re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE):
            return int(found[1]) / 1024
    return 0


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| clients | sampled | round 1, s | a later round, s | the rest of the run, s | peak of all, MiB | processes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row['clients']} | {row['sampled']} | {row['rounds'][0]:.1f} | {row['later']:.2f} | {row['rest']:.1f} "
            f"| {row['peak']:.0f} | {row['processes']} |"
        )
    return "\n".join(lines)


def draw(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{row['clients']}\n{row['sampled']}" for row in found]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    left.bar(names, [row["later"] for row in found], color="#0072B2")
    right.bar(names, [row["peak"] for row in found], color="#E69F00", hatch="//", edgecolor="white")
    left.set(xlabel="clients, and how many are sampled", ylabel="seconds a round, median")
    right.set(xlabel="clients, and how many are sampled", ylabel="peak memory of all processes, MiB")
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=90))
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sizes", nargs="*", default=SIZES, metavar="CLIENTS:SAMPLED", help=f"default: {' '.join(SIZES)}"
    )
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder for scale.md and scale.png")
    arguments = parser.parse_args()
    found = [measure(*map(int, size.split(":")), arguments.rounds) for size in arguments.sizes]
    set_up = (
        f"{arguments.rounds} rounds each, simulation; {platform.system()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, dataset {found[0]['dataset']}"
    )
    text = f"{set_up}\n\n{table(found)}\n"
    write_whole(arguments.out / "scale.md", lambda file: file.write(text.encode()))
    draw(found, arguments.out / "scale.png")
    print(text)


if __name__ == "__main__":
    main()
