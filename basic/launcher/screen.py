"""Prints what a run shows while it is under way: a line for each round and, on a terminal, a bar below them."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.device import idle_gpu
from rounds import history

STAND_IN = "synthetic (a stand-in of drawn shapes, NOT CIFAR-10)"
DOING = {"train": "training", "evaluate": "evaluating", "server": "server evaluates"}
Rounds = list[dict[str, Any]]


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
    ("failed", 6, lambda r: f"{sum(len(phase['failures']) for _, phase in phases(r))}"),
    ("train loss", 10, lambda r: number(r, "train")),
    ("loss", 8, lambda r: number(r, "server" if "server" in r else "evaluate")),
    ("accuracy", 8, lambda r: number(r, "server" if "server" in r else "evaluate", "accuracy")),
    ("seconds", 7, lambda r: f"{r['seconds']:.1f}"),
    ("left", 7, lambda r: clock(r["left"])),
)
HEADER = "  ".join(name.rjust(width) for name, width, _ in COLUMNS)


def phases(entry: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, entry[name]) for name in ("train", "evaluate") if "failures" in entry.get(name, {})]


def number(entry: dict[str, Any], phase: str, key: str = "loss") -> str:
    values = entry.get(phase, {})
    if key in values and values[key] is None:
        return "nan"  # JSON has no word for it
    return f"{values[key]:.3f}" if isinstance(values.get(key), int | float) else "-"


def row(rounds: Rounds, num_rounds: int) -> str:
    """Return the line for the newest round, with the time that the rest of `num_rounds` will take."""
    entry = {**rounds[-1], "left": seconds_left(rounds, num_rounds)}
    return "  ".join(cell(entry).rjust(width) for _, width, cell in COLUMNS)


def seconds_left(rounds: Rounds, num_rounds: int) -> float | None:
    """Take as many seconds for each round to come as the last three took in the mean; None before the first."""
    taken = [entry["seconds"] for entry in rounds if entry["round"] > 0]
    recent = (taken[1:] or taken)[-3:]  # the first round waits for what clients import once
    return sum(recent) / len(recent) * (num_rounds - rounds[-1]["round"]) if recent else None


def clock(seconds: float | None) -> str:
    """Write seconds as 1:05, or 2:01:05 from an hour on."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# --- While it runs ---------------------------------------------------------------------------------------------------


class Printer:
    """Prints a line for each round that comes into the history, and, once each, why a client failed."""

    def __init__(self, run_dir: Path, num_rounds: int) -> None:
        self.run_dir, self.num_rounds = run_dir, num_rounds
        self.device: str | None = None  # that was printed, and rounds
        self.rounds: Rounds = []
        self.reasons: set[str] = set()
        self.written = 0  # when the history that they are from was, in ns

    def show(self) -> Rounds:
        """Print the new ones, and return all."""
        written = (self.run_dir / "history.json").stat().st_mtime_ns
        if written == self.written:  # to read a long history ten times a second would take time from the clients
            return self.rounds
        self.written = written
        record = history.load(self.run_dir)
        printed, self.rounds = len(self.rounds), record["rounds"]
        if not self.device and (found := record.get("device")):
            self.device = found
            say(f"Device: {found}")
            if warning := idle_gpu(found, record.get("config", {})):
                say(f"WARNING: {warning}", error=True)
        if self.rounds and not printed:
            say(HEADER)
        for count in range(printed + 1, len(self.rounds) + 1):
            say(row(self.rounds[:count], self.num_rounds))
            if note := self.rounds[count - 1].get("note"):  # what an example has to say of a round
                say(f"       {note}")
            for _, phase in phases(self.rounds[count - 1]):
                for failure in phase["failures"]:
                    if failure["reason"] not in self.reasons:
                        say(f"       client {failure['partition-id']}: {failure['reason']}")
                    self.reasons.add(failure["reason"])
        return self.rounds


@contextlib.contextmanager
def bar(run_dir: Path, num_rounds: int) -> Iterator[Callable[[Rounds], None]]:
    """Yield a function that shows where the run is, given the rounds that are over; it does nothing but on a terminal.

    What is printed in the meantime comes above the bar, which is gone in the end. NO_COLOR is honoured.
    """
    if not (sys.stdout and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") == "dumb":
        yield lambda rounds: None
        return
    from rich.progress import BarColumn, Progress, TextColumn  # not before the clients are starting: it takes a moment

    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[times]}"))
    began = {0: time.monotonic()}  # rounds that are over -> when the next one began
    with Progress(*columns, transient=True, refresh_per_second=4, redirect_stderr=sys.stderr.isatty()) as progress:
        task = progress.add_task("waiting for clients", total=None, times="")

        def show(rounds: Rounds) -> None:
            seconds = time.monotonic() - began.setdefault(len(rounds), time.monotonic())
            left, times = seconds_left(rounds, num_rounds), clock(seconds)
            if left is not None:
                times += f", about {clock(max(0, left - seconds))} left"
            over = rounds[-1]["round"] if rounds else -1
            number, phase, done, of = history.progress(run_dir) or (over, "", 0, 0)
            if over == num_rounds:
                progress.update(task, description="ending", total=None, times=clock(seconds))
            elif number <= over:
                progress.update(task, description="waiting for clients", total=None, times=times)
            else:
                what = f"round {number} of {num_rounds}, {DOING.get(phase, phase)}"
                replies = "" if phase == "server" else f"{done}/{of} clients  "
                progress.update(task, description=what, total=of, completed=done, times=replies + times)

        yield show
