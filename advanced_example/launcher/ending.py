"""Says how a run ended: one line on what came out, or why it failed; then draws its picture."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from launcher.processes import Stopped, heed, ignore, stop, tail
from launcher.screen import STAND_IN, Rounds, phases, say
from rounds import history

REPORT_TIMEOUT = 60.0  # seconds
SLEPT = 20.0  # seconds between two looks at a run from which on the machine must have slept


def summary(record: history.History, folder: Path) -> str:
    """Return the one line that says what came out."""
    trained = sum(entry["round"] > 0 for entry in record["rounds"])
    dataset = STAND_IN if record["dataset"] == "synthetic" else record["dataset"]
    key = "loss" if history.final(record, "accuracy") is None else "accuracy"  # not every task has one
    value = history.final(record, key)
    line = (
        f"{record['example']}: {trained} rounds, {record['clients']} clients, dataset {dataset}, "
        f"{key} {'unknown' if value is None else f'{value:.3f}'}, {record['seconds']:.1f} s -> {folder}"
    )
    return line + failed_rounds(record["rounds"])


def failed_rounds(rounds: Rounds) -> str:
    """Return who failed how often, as a second line; nothing where nobody did."""
    failed = [{f["partition-id"] for _, phase in phases(entry) for f in phase["failures"]} for entry in rounds]
    everybody = sorted(set().union(*failed), key=lambda who: (who is None, who))
    times = {who: sum(who in one for one in failed) for who in everybody}
    if not times:
        return ""
    who = ", ".join(f"client {client} ({count}x)" for client, count in times.items())
    return f"\n{sum(map(bool, failed))} of {sum(e['round'] > 0 for e in rounds)} rounds with failures: {who}"


def explain(run: Any, failure: BaseException) -> None:
    """Print why the run failed, and the part of the log that tells it."""
    say(f"error: {failure}", error=True)
    if run.slept > SLEPT:
        say(f"The machine was asleep for {run.slept:.0f} s; Flower gives a run up after a minute.", error=True)
    if log := getattr(failure, "log", None):
        path = run.processes.log(log)
        say(f"--- from {path}:\n{tail(path, f'{run.run_dir}/flwr-home/apps/')}", error=True)


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
