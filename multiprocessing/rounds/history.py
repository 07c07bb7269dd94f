"""Reads and writes what a run's server and its launcher exchange, as files in the run's folder.

The server writes history.json and the progress of a round; the launcher writes which client is which, and who has died.
"""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RUN_FOLDER = "FLOWER_EXAMPLE_RUN"  # the environment variable by which the launcher tells the server the folder

History = dict[str, Any]


def load(folder: Path) -> History:
    """Read history.json. Raises OSError, or ValueError where it is not whole."""
    history = json.loads((folder / "history.json").read_text())
    if not isinstance(history, dict) or not isinstance(history.get("rounds"), list):
        raise ValueError(f"{folder / 'history.json'} is not the history of a run")
    return history


def save(folder: Path, history: History) -> None:
    """Write history.json whole, as strict JSON: a number that is NaN or infinite becomes null."""
    strict = json.loads(json.dumps(history), parse_constant=lambda word: None)
    write_whole(folder / "history.json", json.dumps(strict, indent=1).encode() + b"\n")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never a part."""
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        with open(Path(folder, path.name), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)


def final(history: History, key: str) -> float | None:
    """Return the newest "loss" or "accuracy": of the last round that has one, the server's, else the clients'."""
    parts = [entry.get(phase, {}) for entry in reversed(history["rounds"]) for phase in ("server", "evaluate")]
    return next((part[key] for part in parts if isinstance(part.get(key), int | float)), None)


def make_run_folder(runs: Path) -> Path:
    """Make `runs`/<UTC time>-<pid>, and let `runs`/latest point to it."""
    folder = runs / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"
    (folder / "logs").mkdir(parents=True)
    link, latest = runs / f".latest-{os.getpid()}", runs / "latest"
    if latest.is_symlink() or not latest.exists():  # a copy that followed the link has made a folder of it
        with contextlib.suppress(OSError):  # a file system without links
            link.symlink_to(folder.name)
            link.replace(latest)
    return folder


def claim(folder: Path) -> int | None:
    """Lock a run's folder for as long as the returned descriptor is open anywhere; None where somebody holds it."""
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        pass
    return descriptor


def tell_progress(folder: Path, server_round: int, phase: str, replies: int, messages: int) -> None:
    """Say how many of a phase's messages have been answered. A full disk is reported by what matters more."""
    with contextlib.suppress(OSError):
        (folder / "logs" / "progress.log").write_text(f"{server_round} {phase} {replies} {messages}\n")


def progress(folder: Path) -> tuple[int, str, int, int] | None:
    """Return the newest (round, phase, replies, messages); None before the first."""
    try:
        server_round, phase, replies, messages = (folder / "logs" / "progress.log").read_text().split()
        return int(server_round), phase, int(replies), int(messages)
    except (OSError, ValueError):  # nothing yet, or it is being written
        return None


def tell_clients(folder: Path, partition_of: dict[int, int], lost: set[int]) -> None:
    """Write down the partition id of each node id, and the partition ids of the clients that have died."""
    told = {"partition-of": partition_of, "lost": sorted(lost)}
    write_whole(folder / "clients.json", json.dumps(told).encode())


def clients(folder: Path) -> tuple[dict[int, int], set[int]]:
    """Return what `tell_clients` wrote: nothing, where nobody tells, as in a simulation."""
    try:
        told = json.loads((folder / "clients.json").read_text())
    except (OSError, ValueError):
        return {}, set()
    return {int(node): partition for node, partition in told["partition-of"].items()}, set(told["lost"])
