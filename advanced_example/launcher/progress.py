"""What a run shows while it is under way: a line for each finished round, and below them, on a terminal, a bar."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.results import HEADER, clock, load_history, row, seconds_left

Show = Callable[[list[dict[str, Any]]], None]
DOING = {"train": "training", "evaluate": "evaluating", "server": "server evaluates"}


def newest(log: Path) -> tuple[int, str, int, int] | None:
    """The newest line of logs/progress.log: (round, phase, replies so far, replies to come in all)."""
    try:
        *_, line = log.read_text().splitlines()
        number, phase, done, of = line.split()
        return int(number), phase, int(done), int(of)
    except (OSError, ValueError):  # nothing there yet, or a line that is being written
        return None


@contextlib.contextmanager
def bar(num_rounds: int, log: Path) -> Iterator[Show]:
    """Yield a function that shows where the run is, given the rounds that are over; it does nothing but on a terminal.

    What is printed in the meantime comes above the bar, which is gone in the end. NO_COLOR is honoured.
    """
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield lambda rounds: None
        return
    from rich.progress import BarColumn, Progress, TextColumn  # not before the clients are starting: it takes a moment

    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.fields[replies]}", style="progress.download"),
        TextColumn("{task.fields[times]}", style="progress.remaining"),
    )
    began = {0: time.monotonic()}  # rounds that are over -> when the next one began

    with Progress(*columns, transient=True, refresh_per_second=4, redirect_stderr=sys.stderr.isatty()) as progress:
        task = progress.add_task("waiting for clients", total=None, replies="", times="")

        def show(rounds: list[dict[str, Any]]) -> None:
            seconds = time.monotonic() - began.setdefault(len(rounds), time.monotonic())
            left, times = seconds_left(rounds, num_rounds), clock(seconds)
            if left is not None:
                times += f", about {clock(max(0, left - seconds))} left"
            over = rounds[-1]["round"] if rounds else -1
            number, phase, done, of = newest(log) or (over, "", 0, 0)
            if over == num_rounds:
                progress.update(task, description="ending", total=None, replies="", times=clock(seconds))
            elif number <= over:
                progress.update(task, description="waiting for clients", total=None, replies="", times=times)
            else:
                what = f"round {number} of {num_rounds}, {DOING.get(phase, phase)}"
                replies = "" if phase == "server" else f"{done}/{of} clients"
                progress.update(task, description=what, total=of, completed=done, replies=replies, times=times)

        yield show


class Rounds:
    """Prints a line for each round that comes into the history."""

    def __init__(self, run_dir: Path, num_rounds: int) -> None:
        self.run_dir = run_dir
        self.num_rounds = num_rounds
        self.rounds: list[dict[str, Any]] = []  # that were printed
        self.written = 0  # when the history that they are from was, in ns

    def show(self) -> list[dict[str, Any]]:
        """Print the new ones, and return all."""
        written = (self.run_dir / "history.json").stat().st_mtime_ns
        if written == self.written:  # to read a long history ten times a second would take time from the clients
            return self.rounds
        self.written = written
        printed, self.rounds = len(self.rounds), load_history(self.run_dir)["rounds"]
        if self.rounds and not printed:
            print(HEADER)
        for number in range(printed + 1, len(self.rounds) + 1):
            print(row(self.rounds[:number], self.num_rounds), flush=True)
        return self.rounds


class Follower:
    """Prints what is added to a log."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.position = 0

    def show(self) -> None:
        with self.log.open(errors="replace") as file:
            file.seek(self.position)
            print(file.read(), end="", flush=True)
            self.position = file.tell()
