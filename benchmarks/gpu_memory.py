#!/usr/bin/env python3
"""Shows in two minutes that a child process gives a GPU's memory back, where a process that lives on keeps it.

    python benchmarks/gpu_memory.py

It takes a machine with an NVIDIA GPU and nvidia-smi, Linux, Python 3.11 or newer, PyTorch and NumPy: no Flower, no Ray.
Workers that live on, as the actors of a simulation do, train one client after the other on random pictures; one client
is greedy, and allocates 2 GiB, which it frees. First the workers train in place, then new ones by a child for each
client. After each client nvidia-smi is asked what is in use, beyond what was before. In the end a process wants nearly
all that was free at the start. Makes gpu_memory.md and gpu_memory.svg.

Exit status: 0 if isolated work ends at most 16 MiB above the start, and work in place more than 100; 1 if not; 2 where
PyTorch finds no GPU. No GPU was at hand when this was written.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# In front of this folder, where another isolation.py is: this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "multiprocessing"))

from gpus import Free, in_use, visible
from isolation import FORK_SERVER, ChildDied, run_isolated

HERE = Path(__file__).resolve().parent
WAYS = ("in place", "isolated")
PARTS = ("fork", "to the GPU", "first step", "rest")  # of a call's seconds
EXAMPLES, GREEDY = 405, 2048  # pictures of a client, as many as one of 100 trains on in CIFAR-10; MiB of the greedy one
ROOM = 1024  # MiB that the last process leaves: it has a context of its own
SETTLE = 5.0  # seconds that the driver may take to notice that processes have ended
PRETENCE = "GPU_MEMORY_PRETENCE"  # for the test: a folder whose nvidia0 stands in for /dev/nvidia0; the CPU computes


# --- What is done with the GPU, in a child or in place ---------------------------------------------------------------


def device() -> str:
    if folder := os.environ.get(PRETENCE):
        kept.append(os.open(f"{folder}/nvidia0", os.O_RDONLY))  # as CUDA keeps its devices open
        return "cpu"
    return "cuda"


kept: list[int] = []


def find_gpu() -> str:
    """Return the name of the GPU, and the version of PyTorch. Raises what PyTorch raises where it can't use one."""
    import torch

    if not kept and device() == "cpu":
        return f"a pretence; PyTorch {torch.__version__}"
    (torch.ones(8, device="cuda") + 1).sum().item()
    return f"{torch.cuda.get_device_name()}; PyTorch {torch.__version__}"


def train_client(number: int, greedy: bool) -> list[float]:
    """Train one client; return the seconds until its model is on the GPU, of its first step, and of the rest."""
    import numpy as np
    import torch

    from cifar_utils import Net, Pictures, train

    torch.set_num_threads(1)
    rng, where = np.random.default_rng(number), device()
    images, labels = rng.integers(0, 256, (EXAMPLES, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, EXAMPLES)
    marks = [time.perf_counter()]

    def mark() -> None:
        if where == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    net = Net().to(where)
    mark()
    train(net, Pictures(images[:32], labels[:32]).loader(32), 1, 0.01, device=where)
    mark()
    train(net, Pictures(images, labels).loader(32), 1, 0.01, device=where)
    if greedy:
        allocate(GREEDY, where)
    mark()
    return [later - earlier for earlier, later in itertools.pairwise(marks)]


def allocate(mib: float, where: str | None = None) -> None:
    """Take memory, and free it. Raises RuntimeError where there is not as much."""
    import torch

    where = where or device()
    if where == "cuda":
        torch.empty(int(mib * 2**20), dtype=torch.uint8, device=where)
    elif mib > min(visible().values()):  # who only pretends asks the program that pretends
        raise RuntimeError("out of memory")


# --- The workers -----------------------------------------------------------------------------------------------------


def serve(way: str) -> None:
    """Be a worker: train the client of each line on stdin, and answer with its seconds."""
    for line in sys.stdin:
        number, greedy, began = *json.loads(line), time.perf_counter()
        call = run_isolated if way == "isolated" else lambda fn, *args: fn(*args)
        seconds = call(train_client, number, greedy)
        print(json.dumps([time.perf_counter() - began - sum(seconds), *seconds]), flush=True)


def measure(way: str, clients: int, workers: int, before: Free, fork_server: int) -> dict[str, Any]:
    """Let fresh workers train the clients in turn; return what was in use after each, the links, and the seconds."""
    command = [sys.executable, str(HERE / "gpu_memory.py"), "--serve", way]
    pool = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(workers)]
    used, seconds = [], []
    try:
        for number in range(clients):
            worker = pool[number % workers]
            print(json.dumps([number, number == clients // 2]), file=worker.stdin, flush=True)
            if not (answer := worker.stdout.readline()):
                raise RuntimeError(f"{way}: a worker has ended; its error is above")
            seconds.append(json.loads(answer))
            used.append(in_use(before))
        links = {"workers": sum(device_links(worker.pid) for worker in pool), "fork server": device_links(fork_server)}
        used[-1] = settled(before, 16)
        least = min(mib for mib in before.values() if mib is not None)
        return {"used": used, "seconds": seconds, "links": links, "all": can_take(max(0.9 * least, least - ROOM))}
    finally:
        for worker in pool:
            with contextlib.suppress(OSError):
                worker.stdin.close()
            worker.wait()


def settled(before: Free, most: float) -> float | None:
    """Return what is in use once it is no more than `most`, or SETTLE seconds have passed."""
    deadline = time.monotonic() + SETTLE
    while (now := in_use(before)) is not None and now > most and time.monotonic() < deadline:
        time.sleep(0.2)
    return now


def can_take(mib: float) -> str:
    try:
        run_isolated(allocate, mib)
    except (RuntimeError, ChildDied) as error:
        return f"{mib:.0f} MiB can't be had: {str(error).strip().splitlines()[0].split('. ')[0]}"
    return f"{mib:.0f} MiB can be had"


def device_links(pid: int) -> int:
    """Return how many of NVIDIA's devices a process has open."""
    links, found = os.environ.get(PRETENCE, "/dev") + "/nvidia", 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found += os.readlink(descriptor).startswith(links)
    return found


@contextlib.contextmanager
def forking() -> Iterator[int]:
    """Start the fork server of all workers; yield its process id."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        os.environ[FORK_SERVER] = f"{folder}/socket"
        script = Path(sys.path[0]) / "fork_server.py"
        with subprocess.Popen([sys.executable, script, "0", f"{folder}/socket"]) as server:
            try:
                yield server.pid
            finally:
                server.terminate()


# --- What is said ----------------------------------------------------------------------------------------------------


def table(found: dict[str, dict[str, Any]]) -> str:
    used = zip(*(found[way]["used"] for way in WAYS), strict=True)
    lines = ["| after client | in use in place, MiB | isolated, MiB |", "|---|---|---|"]
    lines += [f"| {i} | {a:.0f} | {b:.0f} |" for i, (a, b) in enumerate(used, 1)]
    links = ("links of workers to /dev/nvidia*", "of the fork server")
    header = ["way", *(f"{part}, s" for part in PARTS), *links, "nearly all at the end"]
    lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for way in WAYS:
        later = found[way]["seconds"][len(found[way]["seconds"]) // 2 + 1 :]  # nobody's first
        middle = " | ".join(f"{sorted(part)[len(part) // 2]:.3f}" for part in zip(*later, strict=True))
        links = found[way]["links"]
        lines.append(f"| {way} | {middle} | {links['workers']} | {links['fork server']} | {found[way]['all']} |")
    return "\n".join(lines)


def picture(found: dict[str, dict[str, Any]], title: str) -> str:
    """Draw both curves, as SVG, since a bare machine has no matplotlib."""
    most = max(100.0, *(mib for way in WAYS for mib in found[way]["used"]))
    count = len(found[WAYS[0]]["used"])
    top, low = 40, 300
    lines = []
    for way, colour, dashes, y in (("in place", "#D55E00", "", 60), ("isolated", "#0072B2", "6 3", 78)):
        points = []
        for i, mib in enumerate(found[way]["used"]):
            height = low - (low - top) * mib / most
            points += [f"{70 + 600 / count * i:.1f},{height:.1f}", f"{70 + 600 / count * (i + 1):.1f},{height:.1f}"]
        style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        lines += [f'<polyline points="{" ".join(points)}" {style}/>', f'<path d="M90 {y}h30" {style}/>']
        lines += [f'<text x="126" y="{y + 4}">{way}</text>']
    heights = [(most * part, low - (low - top) * part + 4) for part in (0, 0.5, 1)]
    marks = [f'<text x="64" y="{y:.0f}" text-anchor="end">{mib:.0f}</text>' for mib, y in heights]
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" width="700" height="350" font-family="sans-serif" font-size="13">',
            f'<rect width="100%" height="100%" fill="white"/><text x="70" y="24">{title}</text>',
            f'<path d="M70 {top}V{low}H670" fill="none" stroke="black"/>',
            *marks,
            '<text x="370" y="335" text-anchor="middle">client after client; in the middle a greedy one</text>',
            '<text x="-170" y="16" transform="rotate(-90)" text-anchor="middle">in use, MiB</text>',
            *lines,
            "</svg>",
        ]
    )


def kept_its_promise(found: dict[str, dict[str, Any]]) -> bool:
    return found["isolated"]["used"][-1] <= 16 and found["in place"]["used"][-1] > 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--out", type=Path, default=HERE, help="the folder for gpu_memory.md and gpu_memory.svg")
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return 0
    with forking() as fork_server:
        try:
            gpu = run_isolated(find_gpu)
        except (ChildDied, RuntimeError) as error:
            print(f"error: no GPU that PyTorch can use: {str(error).splitlines()[0]}", file=sys.stderr)
            return 2
        time.sleep(1)  # that child's memory must be back before the start is measured
        before = dict(list(visible().items())[:1])
        if in_use(before) is None:
            print("error: nvidia-smi does not say how much memory is free", file=sys.stderr)
            return 2
        found = {}
        for way in WAYS:
            try:
                found[way] = measure(way, arguments.clients, arguments.workers, before, fork_server)
            except RuntimeError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            settled(before, 16)
    set_up = f"{gpu}; {platform.system()}, Python {platform.python_version()}; {arguments.workers} workers"
    text = f"{set_up}\n\n{table(found)}\n"
    (arguments.out / "gpu_memory.md").write_text(text)
    (arguments.out / "gpu_memory.svg").write_text(picture(found, set_up))
    print(f"{text}\n{'as promised' if kept_its_promise(found) else 'NOT as promised'}")
    return 0 if kept_its_promise(found) else 1


if __name__ == "__main__":
    from gpu_memory import main as start  # under its own name, by which children find its functions

    sys.exit(start())
