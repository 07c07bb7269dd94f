"""The bar that a terminal shows for the round under way. The lines of finished rounds scroll by above it."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.results import clock, seconds_left

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
