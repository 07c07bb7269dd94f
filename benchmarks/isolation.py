#!/usr/bin/env python3
"""What does a child process cost for each piece of work, and what does it give back? In place, fork server and spawn.

Run it with the data ready: DATA_DIR=... DATASET=cifar10 python benchmarks/isolation.py [--calls 50] [--device cuda]

Each way has a parent of its own, which lets `work.train` train one client of 100 again and again; on the CPU the ways
take turns, so that a busy machine is as busy for each. On a GPU they follow one another, since all see its memory. The
ways in a Ray actor are left out where there is no Ray; a way that fails is said to, and the others go on. No GPU was
at hand when this was written; gpu_memory.py needs less, and shows more of one.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# In front of this folder, where another isolation.py is: this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "multiprocessing"))

import work
from gpus import in_use, visible
from isolation import FORK_SERVER, run_isolated
from rounds.history import write_whole

HERE = Path(__file__).resolve().parent
Measured = tuple[float, float]  # seconds of a call, and MiB that the parent has after it


def in_place(fn: Any, *args: Any) -> Any:
    return fn(*args)


def by_spawn(fn: Any, *args: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(fn, *args).result()


WAYS = {"in place": in_place, "fork server": run_isolated, "spawn": by_spawn}
if importlib.util.find_spec("ray"):  # two of them in a Ray actor, too, as a simulation has them
    WAYS |= {"in place, Ray actor": in_place, "fork server, Ray actor": run_isolated}


class Parent:
    """The process that lets work be done, by one way."""

    def __init__(self, way: str, device: str) -> None:
        self.execute, self.device = WAYS[way], device
        self.arrays = self.execute(work.initial_arrays, 0)

    def call(self, number: int) -> Measured:
        data = {"partition_id": number % 100, "num_partitions": 100, "batch_size": 32, "seed": 0}
        start = time.perf_counter()
        self.execute(work.train, self.arrays, data, 0, self.device, 1, 0.01)
        return time.perf_counter() - start, work.resident()


def serve(way: str, device: str) -> None:
    """Be the parent of one way: make a call for each number on stdin."""
    call = None
    for line in sys.stdin:
        if call is None:
            call = in_ray(way, device) if "Ray" in way else Parent(way, device).call
        print(json.dumps(call(int(line))), flush=True)


def in_ray(way: str, device: str) -> Any:
    import ray

    sys.argv[0] = f"{sys.path[0]}/client.py"  # its folder, and this one, go first on the path of the actor
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    actor = ray.remote(Parent).remote(way, device)
    return lambda number: ray.get(actor.call.remote(number))


def measure(calls: int, device: str) -> dict[str, list[Measured]]:
    """Return the measurements of each way that works; on CUDA, the memory is the device's, less what was in use."""
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")}
    environment["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    environment.pop(FORK_SERVER, None)
    start = partial(
        subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=sys.path[0]
    )
    found: dict[str, list[Measured]] = {}
    turns = [list(WAYS)] if device == "cpu" else [[way] for way in WAYS]
    for together in turns:
        before = visible() if device == "cuda" else {}
        parents = {way: start([sys.executable, __file__, "--serve", way, "--device", device]) for way in together}
        measured: dict[str, list[Measured]] = {way: [] for way in parents}
        for number in range(calls):
            for way, parent in parents.items():
                with contextlib.suppress(BrokenPipeError):
                    print(number, file=parent.stdin, flush=True)
                if answer := parent.stdout.readline():
                    seconds, memory = json.loads(answer)
                    measured[way].append((seconds, (in_use(before) or 0.0) if device == "cuda" else memory))
        for way, parent in parents.items():
            with contextlib.suppress(BrokenPipeError):
                parent.communicate()
            if len(measured[way]) == calls:
                found[way] = measured[way]
            else:
                print(f"{way} failed after {len(measured[way])} calls: its error is above", file=sys.stderr)
    return found


def table(found: dict[str, list[Measured]], device: str) -> str:
    """Medians without the first call, in which imports are; "over in place" is the median of call by call."""
    where = "parent's MiB" if device == "cpu" else "device's MiB"
    lines = [
        f"| way | first call, s | a call, s | over in place, s | {where} after call 2 | after the last |",
        "|---|---|---|---|---|---|",
    ]
    for way, measured in found.items():
        base = found.get("in place, Ray actor" if "Ray" in way else "in place", [])
        beside = [a - b for (a, _), (b, _) in zip(measured[1:], base[1:], strict=False)]
        over = f"{statistics.median(beside):.3f}" if beside else "-"
        seconds = statistics.median(seconds for seconds, _ in measured[1:])
        (first, _), (_, early), (_, last) = measured[0], measured[1], measured[-1]
        lines.append(f"| {way} | {first:.2f} | {seconds:.3f} | {over} | {early:.0f} | {last:.0f} |")
    return "\n".join(lines)


def draw(found: dict[str, list[Measured]], device: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    colours, styles = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#56B4E9"), ("-", "-", "-.", ":", ":")
    for (way, measured), colour, style in zip(found.items(), colours, styles, strict=False):
        numbers = range(1, len(measured) + 1)
        left.plot(numbers, [seconds for seconds, _ in measured], style, color=colour, label=way)
        right.plot(numbers, [memory for _, memory in measured], style, color=colour, label=way)
    left.set(xlabel="call", ylabel="seconds", yscale="log")
    right.set(
        xlabel="call", ylabel="parent's memory, MiB" if device == "cpu" else "device's memory, MiB", ylim=(0, None)
    )
    left.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90)
    write_whole(path, drawn.getvalue())
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder for isolation.md and isolation.png")
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments.device)
    name = "isolation" if arguments.device == "cpu" else "isolation-cuda"
    if not (found := measure(arguments.calls, arguments.device)):
        sys.exit("no way worked")
    set_up = (
        f"{arguments.calls} calls each, {arguments.device}; {platform.system()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, dataset {os.environ.get('DATASET', 'auto')}"
    )
    text = f"{set_up}\n\n{table(found, arguments.device)}\n"
    write_whole(arguments.out / f"{name}.md", text.encode())
    draw(found, arguments.device, arguments.out / f"{name}.png")
    print(text)


if __name__ == "__main__":
    main()
