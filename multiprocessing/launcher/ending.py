"""Says how a run ended: one line on what came out, or why it failed; then draws its picture."""

import contextlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from launcher.processes import Stopped, heed, ignore, stop
from launcher.screen import STAND_IN, say
from rounds import history

REPORT_TIMEOUT = 60.0  # seconds


def summary(record: history.History, folder: Path) -> str:
    """Return the one line that says what came out."""
    trained = sum(entry["round"] > 0 for entry in record["rounds"])
    dataset = STAND_IN if record["dataset"] == "synthetic" else record["dataset"]
    key = "loss" if history.final(record, "accuracy") is None else "accuracy"  # not every task has one
    value = history.final(record, key)
    return (
        f"{record['example']}: {trained} rounds, {record['clients']} clients, dataset {dataset}, "
        f"{key} {'unknown' if value is None else f'{value:.3f}'}, {record['seconds']:.1f} s -> {folder}"
    )


def close(run: Any, outcome: history.History) -> None:
    """Write down how the run ended."""
    drop_part_of_model(run.run_dir / "model.pt")
    with contextlib.suppress(OSError, ValueError):  # the server has written the rounds into it
        run.history = history.load(run.run_dir)
    run.history = {**run.history, **outcome}
    try:
        history.save(run.run_dir, run.history)
    except OSError as error:
        say(f"WARNING: history.json could not be written: {error}", error=True)


def close_after_kill(run: Any, reason: str) -> int:
    """Return the exit status of a run whose leader was killed: 0 if it had completed by then."""
    with contextlib.suppress(OSError, ValueError):
        if (status := history.load(run.run_dir)["status"]) != "running":
            return int(status != "completed")
    close(run, {"status": "failed", "reason": reason})
    say(f"error: {reason}", error=True)
    return 1


def drop_part_of_model(model: Path) -> None:
    """Remove a model.pt that was cut off, by a signal or a full disk. That makes room for the history, too."""
    with contextlib.suppress(OSError), model.open("rb") as file:
        if file.read(4) in (b"", b"PK\3\4") and not zipfile.is_zipfile(model):
            model.unlink()
            say("WARNING: model.pt was cut off, as by a full disk, and is removed", error=True)


def explain(run: Any, failure: BaseException) -> None:
    """Print why the run failed, and the part of the log that tells it."""
    say(f"error: {failure}", error=True)
    if log := getattr(failure, "log", None):
        path = run.processes.log(log)
        say(f"--- from {path}:\n{tail(path, f'{run.run_dir}/flwr-home/apps/')}", error=True)


def tail(log: Path, own: str, lines: int = 25) -> str:
    """Return the end of a log or, where it holds tracebacks, the one that tells the cause.

    That is the last one with `own` code in it; else, of the last exception, what it was raised from.
    """
    written = log.read_text(errors="replace").rstrip() if log.exists() else ""
    _, *blocks = re.split(r"(?=^Traceback \(most recent call last\):)", written, flags=re.MULTILINE)
    cause = max(0, len(blocks) - 1)
    while cause and blocks[cause - 1].endswith("was the direct cause of the following exception:\n\n"):
        cause -= 1
    tracebacks = [re.split(r"\n\n|\n\x1b", block)[0] for block in blocks]  # without what Flower has logged after it
    telling = [one for one in tracebacks if own in one] or tracebacks[cause : cause + 1] or [written]
    return "\n".join(telling[-1].splitlines()[-lines:])


def report(run: Any) -> None:
    """Let the example clean up, draw the picture, make the collection's page; none of it changes the outcome."""
    tools = run.settings.folder.parent / "tools"
    try:
        run.extension.cleanup(run)
        heed(stop)  # from here on, a signal ends what is only for show
        if run.history["rounds"]:
            from launcher.picture import draw  # last: matplotlib takes most of a second to import

            draw(run.history, run.run_dir / "history.png")
        if (tools / "report.jinja").is_file():  # not a user's own report.py
            command = [sys.executable, tools / "report.py", run.run_dir]
            subprocess.run(command, stdin=subprocess.DEVNULL, timeout=REPORT_TIMEOUT)
    except Stopped:
        say("stopped before the picture and the report were made", error=True)
    except Exception as error:
        say(f"WARNING: the picture or the report could not be made: {error}", error=True)
    finally:
        heed(ignore)
