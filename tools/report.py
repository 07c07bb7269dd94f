#!/usr/bin/env python3
"""Writes report.html, a page on one run or several: one file that needs no network, and nothing else.

    python tools/report.py RUN                            # writes RUN/report.html
    python tools/report.py RUN RUN ... [--output FILE]    # one page on all; report.html here where no FILE is given

A RUN is a folder that ./run.sh has left, such as basic/runs/latest. A run that failed has a page too.
"""

import argparse
import base64
import io
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "basic"))

from launcher import environment  # noqa: E402
from launcher.ending import tail  # noqa: E402
from launcher.screen import STAND_IN  # noqa: E402
from rounds.history import History, final, load, write_whole  # noqa: E402

PHASES = {"train": "clients, training", "evaluate": "clients, held out", "server": "server, test set"}
ASKED = ("train", "evaluate")  # the phases in which clients are asked
NOTHING = "–"
# By Okabe and Ito, 2008, without those that are faint on white; lines and markers tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7")
LINES, MARKERS = ("-", "--", ":", "-."), "os^Dv"


# --- What a run's history says ---------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
    """Return all that the page says of a run. Raises OSError or ValueError where there is no history to read."""
    history = load(folder)
    log = Path(str(history["log"])).name if "log" in history else None
    picture = folder / "partitions.png"
    return {
        "name": folder.name,
        "folder": folder.parents[1].name if folder.parent.name == "runs" else history.get("example"),
        "history": history,
        "stand_in": history.get("dataset") == "synthetic",
        "dataset": dataset(history),
        "outcome": outcome(history),
        "facts": facts(history),
        "trained": trained(history),
        "reached": {key: NOTHING if (end := final(history, key)) is None else end for key in ("loss", "accuracy")},
        "rounds": rounds_table(history),
        "clients": clients_table(history),
        "details": details_table(history),
        "failures": failures_table(history),
        "bytes": sum(entry.get("bytes", 0) for entry in history["rounds"]),
        "memory": memory(history),
        "log": log,
        "tail": plain(tail(folder / "logs" / f"{log}.log", f"{folder}/flwr-home/apps/")) if log else "",
        "partitions": embedded(picture.read_bytes(), "png") if picture.is_file() else None,
    }


def dataset(history: History) -> str:
    return STAND_IN if history.get("dataset") == "synthetic" else str(history.get("dataset", "unknown"))


def trained(history: History) -> int:
    """Count the rounds in which the model was trained."""
    return sum(entry.get("train", {}).get("clients", 0) > 0 for entry in history["rounds"])


def outcome(history: History) -> str:
    """Say in a sentence how the run ended."""
    done, asked, status = trained(history), history.get("config", {}).get("num-server-rounds", "?"), history["status"]
    if status == "completed":
        key = "loss" if final(history, "accuracy") is None else "accuracy"  # not every task has one
        reached = "" if final(history, key) is None else f" and reached {key} {final(history, key):.3f}"
        who = f"{done} rounds with {history.get('clients')} clients"
        return f"It completed {who} on {dataset(history)}{reached}, in {history['seconds']:.1f} s."
    if status == "running":
        return f"It has not ended: {done} of {asked} rounds are there, and it is still running or was killed."
    reason = brief(history.get("reason", "the reason is not known"))
    return f"It {'was stopped' if status == 'stopped' else 'failed'} after {done} of {asked} rounds: {reason}"


def facts(history: History) -> list[tuple[str, Any]]:
    started = history.get("started")
    known = {
        "example": history.get("example"),
        "engine": history.get("engine"),
        "data set": dataset(history),
        "source of the data": history.get("dataset_source"),
        "clients": history.get("clients"),
        "clients that a round waits for": history.get("min_clients"),
        "clients in a round": history.get("sampled"),
        "device of the clients": history.get("device"),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(started)) if started else None,
        "seconds until the first round": history.get("startup_seconds"),
    }
    for group in ("privacy", "ray", "versions"):
        named = "version of" if group == "versions" else f"{group}:"
        known |= {f"{named} {key}": value for key, value in history.get(group, {}).items()}
    if "privacy: epsilon" in known and known["privacy: epsilon"] is None:  # JSON has no word for it
        known["privacy: epsilon"] = "infinite"
    return [(name, value) for name, value in known.items() if value is not None]


def replies(history: History) -> Iterator[dict[str, Any]]:
    """Yield what each client said, with its round and its phase."""
    for entry, phase in itertools.product(history["rounds"], ASKED):
        for row in entry.get(phase, {}).get("by_client", ()):
            yield {**row, "round": entry["round"], "phase": phase}


def failures(history: History) -> Iterator[dict[str, Any]]:
    """Yield the replies that could not be used, and the metrics."""
    for entry, phase in itertools.product(history["rounds"], ASKED):
        where, found = {"round": entry["round"], "phase": phase}, entry.get(phase, {})
        for failure in found.get("failures", ()):
            yield {**where, **failure}
        for metric, partitions in found.get("left_out", {}).items():
            for partition in partitions:
                yield {**where, "partition-id": partition, "left_out": metric}


def clients(history: History) -> list[dict[str, Any]]:
    """Return what each client has said last, with its seconds and failures over all rounds."""
    found: dict[Any, dict[str, Any]] = {}
    for row in (*replies(history), *failures(history)):
        fresh = {"partition-id": row.get("partition-id"), "trained": 0, "failed": 0, "seconds": 0.0, "said": {}}
        one = found.setdefault(row.get("partition-id"), fresh)
        one["failed"] += "reason" in row
        if "num-examples" in row:
            one["seconds"] += row.get("seconds", 0.0)
            one["trained"] += row["phase"] == "train"
            one["examples" if row["phase"] == "train" else "held out"] = row["num-examples"]
            one["said"] |= {key: row[key] for key in metrics([row])}
    return sorted(found.values(), key=lambda one: (one["partition-id"] is None, one["partition-id"] or 0))


def metrics(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return the names of the metrics in some rows or means, loss and accuracy first."""
    ours = {"partition-id", "seconds", "num-examples", "round", "phase", "clients"}
    found = {key: 0 for row in rows for key, value in row.items() if not isinstance(value, list | dict | str)}
    return sorted(found.keys() - ours, key=lambda key: (key != "loss", key != "accuracy", list(found).index(key)))


def memory(history: History) -> dict[str, float]:
    """Return the largest figure of each kind of process, in MiB, where an example measures it."""
    found: dict[str, float] = {}
    for entry in history["rounds"]:
        for name, value in entry.get("memory", {}).items():
            found[name] = max(value, found.get(name, 0.0))
    return found


def differences(runs: list[dict[str, Any]]) -> list[list[Any]]:
    """Return the settings in which the runs differ: [setting, the first run's value, the second's, ...]."""
    flat = [dict(run["facts"]) | run["history"].get("config", {}) for run in runs]
    flat = [{key: value for key, value in one.items() if not key.startswith(("started", "seconds"))} for one in flat]
    rows = [[key, *(one.get(key, NOTHING) for one in flat)] for key in dict.fromkeys(itertools.chain(*flat))]
    return [row for row in rows if any(value != row[1] for value in row[1:])]


# --- Tables: a caption, the heads of the columns, and the rows, as text ----------------------------------------------

Columns = dict[str, Callable[[dict[str, Any]], str]]


def number(value: Any, digits: int = 3) -> str:
    """Write a number; JSON has no NaN, so that null stands for it in a history."""
    return "not a number" if value is None else f"{value:,.{digits}f}" if isinstance(value, int | float) else str(value)


def column(key: str, digits: int = 3, part: str | None = None) -> Callable[[dict[str, Any]], str]:
    """Return a function that writes what a row, or one part of it, has under a key."""
    return lambda row: number((row.get(part, {}) if part else row).get(key, NOTHING), digits)


def client(row: dict[str, Any]) -> str:
    return "unknown" if row.get("partition-id") is None else str(row["partition-id"])


def table(caption: str, note: str, columns: Columns, rows: Iterable[Any]) -> dict[str, Any]:
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    return {"caption": caption, "note": note, "heads": list(columns), "rows": cells}


def rounds_table(history: History) -> dict[str, Any]:
    columns: Columns = {
        "round": column("round", 0),
        "trained": column("clients", 0, "train"),
        "evaluated": column("clients", 0, "evaluate"),
        "failed": lambda entry: str(sum("reason" in row for row in failures({"rounds": [entry]}))),
        "training loss": column("loss", part="train"),
    }
    for phase, named in (("evaluate", ""), ("server", "server's ")):
        said = [entry[phase] for entry in history["rounds"] if phase in entry]
        columns |= {f"{named}{key}": column(key, part=phase) for key in metrics(said)}
    columns |= {"seconds": column("seconds", 1), "MB": lambda entry: number(entry.get("bytes", 0) / 1e6, 2)}
    note = """How many clients trained, evaluated and failed; what they measured, as means over their examples, and
        what the server did; MB of weights, sent and received."""
    return table("Each round", note, columns, history["rounds"])


def clients_table(history: History) -> dict[str, Any]:
    rows = clients(history)
    columns: Columns = {
        "client": client,
        "examples": column("examples", 0),
        "held out": column("held out", 0),
        "trained": column("trained", 0),
        "failed": column("failed", 0),
        "seconds": column("seconds", 1),
    }
    said = metrics(one["said"] for one in rows)
    columns |= {key.replace("train_", "training "): column(key, part="said") for key in said}
    note = """Over all rounds: how often each client trained and failed, and its seconds of work. Its examples and
        what it measured are the newest."""
    return table("Each client", note, columns, rows)


def details_table(history: History) -> dict[str, Any]:
    rows = list(replies(history))
    columns: Columns = {"round": column("round", 0), "phase": column("phase"), "client": client}
    columns |= {"examples": column("num-examples", 0), "seconds": column("seconds", 2)}
    columns |= {key.replace("train_", "training "): column(key) for key in metrics(rows)}
    return table("Each client in each round", "", columns, rows)


def failures_table(history: History) -> dict[str, Any]:
    def reason(row: dict[str, Any]) -> str:
        return brief(row.get("reason") or f"no usable {row.get('left_out')}; the rest of its reply counts")

    columns: Columns = {"round": column("round", 0), "phase": column("phase"), "client": client, "reason": reason}
    return table("Failures", "The tracebacks are in logs/.", columns, failures(history))


def plain(text: str) -> str:
    """Return text without colour codes and other characters that can't be shown."""
    return "".join(c for c in re.sub(r"\x1b\[[\d;]*m", "", text) if c.isprintable() or c == "\n")


def brief(reason: Any) -> str:
    line = plain(" ".join(str(reason).split()))
    return line if len(line) <= 300 else f"… {line[-250:]}"


# --- Pictures --------------------------------------------------------------------------------------------------------


def curves(runs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Draw loss and accuracy by round, a picture each: of one run all its curves, of several runs one curve each.

    Where there is no accuracy, what else the clients have measured takes its place.
    """
    if not any(run["history"]["rounds"] for run in runs):
        return []
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"text.parse_math": False, "font.size": 11})  # a name may hold a $
    stand_in = " (stand-in, NOT CIFAR-10)" if any(run["stand_in"] for run in runs) else ""
    names = plain(", ".join(dict.fromkeys(str(run["history"].get("dataset")) for run in runs)))
    measured = metrics(e[p] for run in runs for e in run["history"]["rounds"] for p in ("evaluate", "server") if p in e)
    pictures = []
    for key in ("loss", "accuracy") if "accuracy" in measured else dict.fromkeys(("loss", *measured)):
        found = series(runs, key)
        if not any(points for _, points in found):
            continue
        figure, axes = plt.subplots(figsize=(5.2, 3.7 + 0.2 * len(runs)), layout="constrained")
        for i, (label, points) in enumerate(found):  # numbered alike in all pictures
            if points:
                look = {"color": COLOURS[i % 5], "linestyle": LINES[i % 4], "marker": MARKERS[i % 5]}
                axes.plot(*zip(*points, strict=True), **look, markersize=5, label=label)
        figure.legend(fontsize=9, loc="outside lower center", ncols=3 if len(runs) == 1 else 1)
        axes.set(xlabel="round", ylabel=plain(key), title=f"{names}{stand_in}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
        ends = "; ".join(f"{label}: {p[0][1]:.3f} to {p[-1][1]:.3f}" for label, p in found if p)
        alt = f"{plain(key).capitalize()} by round. {ends}. The tables have all numbers."
        pictures.append({"src": embedded(file.getvalue(), "svg+xml"), "alt": alt})
    return pictures


def series(runs: list[dict[str, Any]], key: str) -> list[tuple[str, list[tuple[int, float]]]]:
    """Return named curves of points (round, value); some may have none."""
    found = []
    for count, run in enumerate(runs, 1):
        points: dict[str, list[tuple[int, float]]] = {phase: [] for phase in PHASES}
        for entry, phase in itertools.product(run["history"]["rounds"], PHASES):
            if isinstance(value := entry.get(phase, {}).get(key), int | float):
                points[phase].append((entry["round"], value))
        if len(runs) > 1:  # one curve: the server's where it evaluates
            phase = "server" if points["server"] else "evaluate"
            found.append((plain(f"{count}: {run['history'].get('example')}, {PHASES[phase]}"), points[phase]))
        else:
            found += [(PHASES[phase], points[phase]) for phase in PHASES]
    return found


def embedded(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# --- The page --------------------------------------------------------------------------------------------------------


def render(runs: list[dict[str, Any]]) -> str:
    import jinja2

    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template.filters["number"] = number
    for run in runs:
        run["curves"] = curves([run])
    several = curves(runs) if len(runs) > 1 else []
    return template.get_template("report.jinja").render(runs=runs, curves=several, differences=differences(runs))


def main() -> str | None:
    """Write the page and print where it is; return the error, if there is one."""
    parser = argparse.ArgumentParser(description="Writes report.html, a page on one run or several.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that ./run.sh has left")
    parser.add_argument("--output", type=Path, help="RUN/report.html for one run, ./report.html for several")
    arguments = parser.parse_args()
    try:
        environment.ensure(ROOT / "basic")  # may start this command again, with a Python that has the packages
    except (OSError, environment.SetupError) as error:
        return f"error: {error}"
    runs = []
    for folder in arguments.runs:
        try:
            runs.append(read(folder.resolve()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            return f"error: {folder} is no run that can be read: {error}"
    output = arguments.output or (arguments.runs[0] if len(runs) == 1 else Path()) / "report.html"
    write_whole(output, render(runs).encode(errors="replace"))
    print(f"report: {output.resolve()}")
    return None


if __name__ == "__main__":
    sys.exit(main())
