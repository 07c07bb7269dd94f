"""What a run leaves: history.json, written whole after each round, its table and its picture."""

import fcntl
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:  # before there are packages, a dry run comes here
    import numpy as np

History = dict[str, Any]
STAND_IN = "synthetic (a stand-in of drawn shapes, NOT CIFAR-10)"


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file by `write(file)` so that a reader, or a crash, finds the old one or the new one, never a part."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_model(path: Path, arrays: "dict[str, np.ndarray]") -> None:
    """Write arrays as a plain PyTorch state dict."""
    import torch

    write_torch(path, {name: torch.from_numpy(array.copy()) for name, array in arrays.items()})


def write_torch(path: Path, value: Any) -> None:
    """Write what `torch.save` takes; only here and above is PyTorch imported, and a child process may do it."""
    import torch

    buffer = io.BytesIO()  # torch itself does not tell that a disk is full
    torch.save(value, buffer)
    write_whole(path, lambda file: file.write(buffer.getbuffer()))


def save_history(folder: Path, history: History) -> None:
    write_whole(folder / "history.json", lambda file: file.write(json.dumps(history, indent=1).encode() + b"\n"))


def load_history(folder: Path) -> History:
    return json.loads((folder / "history.json").read_text())


def make_run_folder(parent: Path) -> Path:
    """Make `parent`/<UTC time>-<pid>, and let `parent`/latest point to it."""
    folder = parent / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"
    (folder / "logs").mkdir(parents=True)
    claim(folder)
    link = parent / f".latest-{os.getpid()}"
    link.symlink_to(folder.name)
    link.replace(parent / "latest")
    return folder


def claim(folder: Path) -> bool:
    """Hold a run's folder for as long as this process lives; False where another process holds it."""
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)  # stays open: that is what holds it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    return True


def reopen(folder: Path) -> None:
    """Clear away what belonged to the processes of a run that goes on; keep their logs under another name."""
    for leftover in folder.glob(".*-*"):  # of a `write_whole` that was killed
        leftover.unlink()
    shutil.rmtree(folder / "flwr-home", ignore_errors=True)
    (folder / "lost-clients").unlink(missing_ok=True)
    (folder / "logs").rename(folder / f"logs-{len(list(folder.glob('logs-*'))) + 1}")
    (folder / "logs").mkdir()


def newest(history: History, *path: str) -> Any:
    """The newest value that a round has under `path`, such as "evaluate", "accuracy"; None where none has."""
    for entry in reversed(history["rounds"]):
        value: Any = entry
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def final(history: History, key: str) -> Any:
    """The newest loss or accuracy: the server's where it evaluates, else the clients'; None where there is none."""
    by_server = newest(history, "server", key)
    return newest(history, "evaluate", key) if by_server is None else by_server


COLUMNS = (
    ("round", 5, lambda r: f"{r['round']}"),
    ("trained", 7, lambda r: f"{r['train']['clients']}" if "train" in r else "-"),
    ("failed", 6, lambda r: f"{sum(len(r[phase]['failures']) for phase in ('train', 'evaluate') if phase in r)}"),
    ("train loss", 10, lambda r: number(r, "train")),
    ("loss", 8, lambda r: number(r, "server" if "server" in r else "evaluate")),
    ("accuracy", 8, lambda r: number(r, "server" if "server" in r else "evaluate", "accuracy")),
    ("seconds", 7, lambda r: f"{r['seconds']:.1f}"),
    ("left", 7, lambda r: clock(r["left"])),
)
HEADER = "  ".join(name.rjust(width) for name, width, _ in COLUMNS)


def number(entry: dict[str, Any], phase: str, key: str = "loss") -> str:
    value = entry.get(phase, {}).get(key)
    return "-" if value is None else f"{value:.3f}"


def row(rounds: list[dict[str, Any]], num_rounds: int) -> str:
    """The line for the newest of some rounds, with the time that the rest of `num_rounds` will take."""
    entry = {**rounds[-1], "left": seconds_left(rounds, num_rounds)}
    return "  ".join(cell(entry).rjust(width) for _, width, cell in COLUMNS)


def seconds_left(rounds: list[dict[str, Any]], num_rounds: int) -> float | None:
    """As many seconds for each round to come as the last three took in the mean; None before the first has ended."""
    taken = [entry["seconds"] for entry in rounds if entry["round"] > 0]
    recent = (taken[1:] or taken)[-3:]  # the first round waits for what clients import once
    return sum(recent) / len(recent) * (num_rounds - rounds[-1]["round"]) if recent else None


def clock(seconds: float | None) -> str:
    """Seconds as 1:05, or 2:01:05 from an hour on."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def summary(history: History, folder: Path) -> str:
    trained = sum(entry["round"] > 0 for entry in history["rounds"])
    dataset = STAND_IN if history["dataset"] == "synthetic" else history["dataset"]
    key = "loss" if final(history, "accuracy") is None else "accuracy"  # not every task has one
    value = final(history, key)
    return (
        f"{history['example']}: {trained} rounds, {history['clients']} clients, dataset {dataset}, "
        f"{key} {'unknown' if value is None else f'{value:.3f}'}, {history['seconds']:.1f} s -> {folder}"
    )
