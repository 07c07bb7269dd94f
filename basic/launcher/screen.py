"""Prints what a run shows while it is under way: a line for each round and, on a terminal, a bar below them."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.device import idle_gpu
from rounds import history

STAND_IN = "synthetic (a stand-in of drawn shapes, NOT CIFAR-10)"
# What the bar calls a phase, and the part of the round that is over when it begins.
PHASES = {"train": ("training", 0.0), "evaluate": ("evaluating", 0.5), "server": ("server evaluates", 1.0)}


def say(text: str, error: bool = False) -> None:
    """Print a line. A terminal or a pipe that has gone must not end a run, so nobody hears of it."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- The table -------------------------------------------------------------------------------------------------------

COLUMNS = (
    ("round", 5, lambda r: f"{r['round']}"),
    ("trained", 7, lambda r: f"{r['train']['clients']}" if "train" in r else "-"),
    ("failed", 6, lambda r: f"{len(failures(r))}"),
    ("train loss", 10, lambda r: number(r, "train")),
    ("loss", 8, lambda r: number(r, "server" if "server" in r else "evaluate")),
    ("accuracy", 8, lambda r: number(r, "server" if "server" in r else "evaluate", "accuracy")),
    ("seconds", 7, lambda r: f"{r['seconds']:.1f}"),
)
NOTE = " " * 7  # in front of what is said below a line of the table
HEADER = "  ".join(name.rjust(width) for name, width, _ in COLUMNS)


def failures(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [failure for phase in ("train", "evaluate") for failure in entry.get(phase, {}).get("failures", [])]


def number(entry: dict[str, Any], phase: str, key: str = "loss") -> str:
    value = entry.get(phase, {}).get(key, "-")  # null: JSON has no word for NaN
    return "nan" if value is None else f"{value:.3f}" if isinstance(value, int | float) else "-"


def row(entry: dict[str, Any]) -> str:
    """Return the line for a round."""
    return "  ".join(cell(entry).rjust(width) for _, width, cell in COLUMNS)


# --- While it runs ---------------------------------------------------------------------------------------------------


class Printer:
    """Prints a line for each round that comes into the history, and, once each, why a client failed."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.device: str | None = None  # what was printed: the device, so many rounds, and reasons
        self.printed = 0
        self.reasons: set[str] = set()
        self.written = 0, 0  # the history that was read: which file, and when it was written

    def show(self) -> None:
        """Print what is new."""
        file = (self.run_dir / "history.json").stat()
        written = file.st_ino, file.st_mtime_ns
        if written == self.written:  # to read a long history ten times a second would take time from the clients
            return
        self.written = written
        record = history.load(self.run_dir)
        rounds, printed = record["rounds"], self.printed
        self.printed = len(rounds)
        if not self.device and (found := record.get("device")):
            self.device = found
            say(f"{NOTE if printed else ''}Device: {found}")
            if warning := idle_gpu(found, record.get("config", {})):
                say(f"WARNING: {warning}", error=True)
        if rounds and not printed:
            say(HEADER)
        for entry in rounds[printed:]:
            say(row(entry))
            if note := entry.get("note"):  # what an example has to say of a round
                say(f"{NOTE}{note}")
            for failure in failures(entry):
                if failure["reason"] not in self.reasons:
                    say(f"{NOTE}client {failure['partition-id']}: {failure['reason']}")
                self.reasons.add(failure["reason"])


@contextlib.contextmanager
def bar(run_dir: Path, num_rounds: int, wanted: bool = True) -> Iterator[Callable[[], None]]:
    """Yield a function that shows where the run is; it does nothing but on a terminal.

    What is printed in the meantime comes above the bar, which is gone in the end. NO_COLOR is honoured.
    """
    if not (wanted and sys.stdout and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") == "dumb":
        yield lambda: None
        return
    from rich import progress  # not before the clients are starting: it takes a moment

    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(20), progress.TimeElapsedColumn())
    left = (progress.TextColumn("left:"), progress.TimeRemainingColumn())
    often = {"refresh_per_second": 4, "speed_estimate_period": 3600}  # a round may take minutes
    with progress.Progress(*columns, *left, transient=True, redirect_stderr=sys.stderr.isatty(), **often) as shown:
        task = shown.add_task("waiting for clients", total=None)

        def show() -> None:
            if found := history.progress(run_dir):
                number, phase, replies, messages = found
                doing, over = PHASES[phase]
                over += replies / max(messages, 1) / 2  # a strategy may ask nobody
                said = f"round {number} of {num_rounds}, {doing} {replies}/{messages}"
                shown.update(task, description=said, total=num_rounds, completed=number - 1 + over)

        yield show
