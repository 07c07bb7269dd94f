#!/usr/bin/env python3
"""What does a Ray cluster gain, and how many clients a round can one server bear? Linux only, about 10 minutes.

    python benchmarks/cluster.py

First, `multiprocessing` with heavy clients on one Ray node of one core, then on two, both on this machine. Then the CPU
seconds that the server's one process spends on each client, measured while clients have next to nothing to do; from
these, and from the sizes of messages, follows what thousands of clients would take. DATA_DIR and DATASET say which
pictures, which must be ready; a few of them are used. Makes cluster.md.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common import ROOT, processes, run_example, set_up, table

sys.path.insert(0, str(ROOT / "basic"))

import cifar_data
from rounds import history

HERE = Path(__file__).resolve().parent
CLIENTS, TESTED = 20, 50  # clients; test pictures
MODELS = {"62,006": ("Net", 62_006), "11.2 million": ("resnet18", 11_173_962)}  # label: name, parameters
ASKED = (1_000, 10_000, 100_000)  # clients a round, on paper
HEADER = ("parameters", "clients a round", "GB sent and received", "minutes of the server", "GiB of replies")
NODE = ("--num-cpus=1", "--object-store-memory=500000000", "--disable-usage-stats", "--block")


class Server:
    """The CPU seconds of the process that runs server.py, by how many rounds were done when they were looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds = folder, {}

    def look(self, launcher: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            done = len(history.load(self.folder / "runs" / "latest")["rounds"])
            for pid in processes(launcher):
                if b"flwr-simulation" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    *_, user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:13]
                    self.seconds.setdefault(done, (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"))

    def a_round(self) -> float:
        first, last = min(n for n in self.seconds if n > 1), max(self.seconds)
        return (self.seconds[last] - self.seconds[first]) / (last - first)


def make_folder(root: Path, model: str) -> Path:
    """Copy the example, with another network in place of its own."""
    leave = shutil.ignore_patterns("runs", ".venv*", "__pycache__")
    folder = shutil.copytree(ROOT / "multiprocessing", root / model, ignore=leave)
    if model != "Net":
        shutil.copy(ROOT / "advanced_example" / "models.py", folder)
        with (folder / "cifar_utils.py").open("a") as file:
            file.write(f"\nimport models\n\nNet = models.{model}\n")
    return folder


def few_pictures(root: Path, each: int) -> dict[str, str]:
    """Write a data set of `each` pictures a client; return the variables that name it."""
    data = cifar_data.find(os.environ.get("DATASET", "auto")) or sys.exit("make the data ready first")
    folder = root / f"data-{each}" / data["name"]
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", each * CLIENTS), ("test", TESTED)):
        images, labels = cifar_data.load_split(split, data["name"])
        np.save(folder / f"{split}_images.npy", images[:count])
        np.save(folder / f"{split}_labels.npy", labels[:count])
    (folder / "meta.json").write_text(json.dumps({"name": data["name"], "source": f"{data['source']}, the first few"}))
    return {"DATASET": data["name"], "DATA_DIR": str(folder.parent)}


@contextlib.contextmanager
def node(log: Path, *options: str) -> Iterator[None]:
    """Start a node of Ray on this machine, which has no DATA_DIR of its own, and end it."""
    environment = {key: value for key, value in os.environ.items() if key != "DATA_DIR"}
    with log.open("w") as file:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *NODE]
        ray = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        while "block forever" not in log.read_text():
            if ray.poll() is not None:
                sys.exit(log.read_text())
            time.sleep(0.1)
        yield
    finally:
        ray.terminate()
        ray.wait()


def seconds(run: dict[str, Any]) -> float:
    """Return a round's median, without the first, in which the actors start."""
    return statistics.median(entry["seconds"] for entry in run["rounds"] if entry["round"] > 1)


def on_paper(cost: float, parameters: int, clients: int) -> list[str]:
    """Return what a round takes of the server: what it sends and gets, in GB, its CPU's minutes, memory in GiB."""
    size = 4 * parameters * clients  # bytes, float32: all replies are there before they are averaged
    return [f"{2 * size / 1e9:,.1f}", f"{clients * cost / 60:,.1f}", f"{size / 2**30:,.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="at least 3")
    parser.add_argument("--pictures", type=int, default=50, help="that a heavy client has")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder for cluster.md")
    given = parser.parse_args()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="c-")))
        folders = {name: make_folder(root, name) for name, _ in MODELS.values()}
        heavy, light = (few_pictures(root, each) for each in (given.pictures, 10))
        command, ray = (CLIENTS, CLIENTS, CLIENTS, given.rounds), {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        head = ("--head", f"--port={port}", f"--temp-dir={root}/ray", "--include-dashboard=false")
        taken = []
        for options in (head, (f"--address={ray['RAY_ADDRESS']}",)):
            stack.enter_context(node(root / f"node-{len(taken)}.log", *options))
            run = run_example(str(folders["resnet18"]), *command, **heavy, **ray)
            taken.append(seconds(run))
            print(f"{run['ray']['nodes']} nodes: {taken[-1]:.2f} s a round", file=sys.stderr, flush=True)
        costs = {}
        for label, (name, _) in MODELS.items():
            server = Server(folders[name])
            run_example(str(folders[name]), *command, memory=server, **light, **ray)
            costs[label] = server.a_round() / CLIENTS
            print(f"{label}: {costs[label]:.4f} CPU s a client", file=sys.stderr, flush=True)
    rows = [[f"{count}", f"{one:.2f}", f"{taken[0] / one:.2f}"] for count, one in enumerate(taken, 1)]
    what = f"{CLIENTS} clients with {given.pictures} pictures each, of which they train on nine in ten"
    text = f"ResNet-18, {what}, {given.rounds} rounds; {set_up(run)}\n\n"
    text += table(["nodes of one core", "a round, s", "gain"], rows) + "\n\n"
    each, cost = taken[0] / CLIENTS, costs["11.2 million"]
    text += f"One core takes {each:.2f} s for such a client, so {each / cost:.0f} cores keep the server busy.\n\n"
    rows = [[label, f"{cost:.4f}"] for label, cost in costs.items()]
    text += table(["parameters", "server's CPU seconds a client"], rows) + "\n\n"
    rows = []
    for label, (_, parameters) in MODELS.items():
        rows += [[label, f"{clients:,}", *on_paper(costs[label], parameters, clients)] for clients in ASKED]
    text += table([*HEADER], rows) + "\n"
    history.write_whole(given.out / "cluster.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
