"""One client in ten sends 100 times its update: which strategies hold? Table and picture of advanced_example/README.md.

    python benchmarks/poisoning.py                 # IID, 10 clients, 10 rounds, with and without it: about 15 minutes
    python benchmarks/poisoning.py --rounds 2

DATA_DIR and DATASET say which pictures, as for ./run.sh. The picture goes to benchmarks/poisoning.png.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

from common import run_example, set_up, table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Name, colour (Okabe and Ito, 2008), marker
STRATEGIES = (("fedavg", "#D55E00", "o"), ("fedmedian", "#0072B2", "s"), ("krum", "#009E73", "^"))
CLIENT = {"none": -1, "client 3": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=2026)
    given = parser.parse_args()
    settings = ["partitioner=iid", f"seed={given.seed}"]
    rows, figure, axes = [], *plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, colour, marker in STRATEGIES:
        last = {}
        for who, client in CLIENT.items():
            poisoned = [f"strategy={name}", f"poisoning-client={client}"]
            history = run_example("advanced_example", 10, 10, 10, given.rounds, *settings, *poisoned, may_fail=True)
            accuracy = [entry["server"]["accuracy"] for entry in history["rounds"] if "server" in entry]
            axes.plot(accuracy, "-" if who == "none" else ":", color=colour, marker=marker, label=f"{name}, {who}")
            last[who] = f"{accuracy[-1]:.3f}"
            if history["status"] != "completed":  # losses of NaN, which no round survives
                last[who] += f", and broken off in round {history['rounds'][-1]['round']}"
            print(name, who, *accuracy, file=sys.stderr, flush=True)
        rows.append([name, *last.values()])
    axes.set(xlabel="round", ylabel="accuracy", title="One client in ten sends 100 times its update", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(title="strategy, poisoning")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)
    print(f"10 clients, all of them in each of {given.rounds} rounds; {' '.join(settings)}; {set_up(history)}\n")
    print(table(["strategy", "nobody poisons", "client 3 does"], rows))


if __name__ == "__main__":
    main()
