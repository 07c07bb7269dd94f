#!/usr/bin/env python3
"""Takes a still of a real run in a terminal: `python tools/draw_terminal.py basic` writes pictures/terminal.svg.

The words are those of ./run.sh. The still is taken in the last round, while the last line shows how far it is.
"""

import io
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "pictures" / "terminal.svg"
COLUMNS = 100


def record(words: list[str]) -> str:
    """Run ./run.sh in a terminal of its own; return what it has printed when the last round trains."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": "40"}
    process = subprocess.Popen([ROOT / "run.sh", *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    printed = b""
    try:
        while received := os.read(ours, 4096):
            printed += received
            if re.search(rb"round (\d+) of \1, training [1-9]", printed):
                break
    finally:
        process.send_signal(signal.SIGINT)
        while True:  # until it has ended: it must not block on a full terminal
            try:
                if not os.read(ours, 4096):
                    break
            except OSError:
                break
        process.wait()
    return printed.decode(errors="replace")


def shown(printed: str) -> str:
    """Return what a terminal shows of it: the lines, and the newest of the last one, which is written over itself."""
    lines = printed.replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2].replace("\x1b[K", "") for line in lines).rstrip()


def draw(words: list[str], text: str) -> None:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ ./run.sh {' '.join(words)}".rstrip()))
    console.print(Text.from_ansi(text))
    FILE.parent.mkdir(exist_ok=True)
    console.save_svg(str(FILE), title="./run.sh")


if __name__ == "__main__":
    draw(sys.argv[1:], shown(record(sys.argv[1:])))
