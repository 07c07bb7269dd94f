"""Prints what a run shows while it is under way: a line for each round and, on a terminal, how far the next one is."""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rounds import history

STAND_IN = "synthetic (a stand-in of drawn shapes, NOT CIFAR-10)"
PHASES = {"train": "training", "evaluate": "evaluating", "server": "server evaluates"}


def say(text: str, error: bool = False, end: str = "\n") -> None:
    """Print a line. Once the terminal or the pipe is gone, drop it: that must not end a run."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(f"\x1b[K{text}" if is_terminal(stream) else text, file=stream, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_terminal(stream: Any) -> bool:
    """Whether a line can be cleared there (by the code ESC [ K)."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


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

    def __init__(self, run_dir: Path, num_rounds: int) -> None:
        self.run_dir, self.num_rounds, self.began = run_dir, num_rounds, time.monotonic()
        self.device: str | None = None  # what was printed: the device, so many rounds, and reasons
        self.printed = 0
        self.reasons: set[str] = set()
        self.progress = ""
        self.written = 0, 0  # the history that was read: which file, and when it was written

    def show(self) -> None:
        """Print what is new."""
        file = (self.run_dir / "history.json").stat()
        written = file.st_ino, file.st_mtime_ns
        if written == self.written:  # reading a long history ten times a second would take time from the clients
            return
        self.written = written
        record = history.load(self.run_dir)
        rounds, printed = record["rounds"], self.printed
        self.printed = len(rounds)
        if not self.device and (found := record.get("device")):
            self.device = found
            say(f"{NOTE if printed else ''}Device: {found}")
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

    def show_progress(self) -> None:
        """On a terminal, say how far the round is, in a line that the next one overwrites."""
        if is_terminal(sys.stdout):
            text = "waiting for clients"
            if found := history.progress(self.run_dir):
                number, phase, replies, messages = found
                text = f"round {number} of {self.num_rounds}, {PHASES[phase]} {replies}/{messages}"
            text = f"{text}, {time.monotonic() - self.began:.0f} s"[: shutil.get_terminal_size().columns - 1]
            if text != self.progress:
                say(text, end="\r")
            self.progress = text
