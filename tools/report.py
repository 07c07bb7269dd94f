#!/usr/bin/env python3
"""Write report.html, a page on one run or several: one file that needs no network, and nothing else.

Usage:
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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "basic"))

from launcher.processes import tail  # noqa: E402
from launcher.results import STAND_IN, History, final, load_history, write_whole  # noqa: E402

PHASES = ("train", "evaluate")
# By Okabe and Ito, 2008, without those that are faint on white; lines and markers tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7")
LINES, MARKERS = ("-", "--", ":", "-."), "os^Dv"
WHERE = {
    "start-up": "until the first round begins: the data, the processes, what they import, the first test of the model",
    "training": "at least one client trains",
    "evaluation by clients": "at least one client evaluates, and none trains",
    "evaluation by the server": "the server tests the model",
    "waiting": "nobody does any of these: processes start, messages travel, the server averages",
    "ending": "after the last round: the model is written, everything is stopped",
}


# --- What a run's history says ---------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
    """All that the page says of a run. Raises OSError or ValueError where there is no history that can be read."""
    history = load_history(folder)
    if not isinstance(history, dict) or not isinstance(history.get("rounds"), list):
        raise ValueError("its history.json holds no rounds")
    log = Path(str(history["log"])).name if "log" in history else None
    return {
        "name": folder.name,
        "folder": folder.parents[1].name if folder.parent.name == "runs" else history.get("example"),
        "history": history,
        "stand_in": history.get("dataset") == "synthetic",
        "dataset": dataset(history),
        "outcome": outcome(history),
        "facts": facts(history),
        "times": times(history),
        "trained": trained(history),
        "accuracy": final(history, "accuracy"),
        "rounds": rounds_table(history),
        "clients": clients_table(history),
        "details": details_table(history),
        "failures": failures_table(history),
        "bytes": sum(entry.get("bytes", 0) for entry in history["rounds"]),
        "memory": memory(history),
        "log": log,
        "tail": plain(tail(folder / "logs" / f"{log}.log")) if log else "",
        "partitions": picture((folder / "partitions.png").read_bytes(), "png")
        if (folder / "partitions.png").is_file()
        else None,
    }


def dataset(history: History) -> str:
    return STAND_IN if history.get("dataset") == "synthetic" else str(history.get("dataset", "unknown"))


def trained(history: History) -> int:
    """The number of rounds in which the model was trained."""
    return sum(entry.get("train", {}).get("clients", 0) > 0 for entry in history["rounds"])


def outcome(history: History) -> str:
    """One sentence."""
    done, asked = trained(history), history.get("config", {}).get("num-server-rounds", "?")
    status = history.get("status")
    if status == "completed":
        key = "loss" if final(history, "accuracy") is None else "accuracy"  # not every task has one
        value = final(history, key)
        reached = "" if value is None else f" and reached {key} {value:.3f}"
        who = f"{done} rounds with {history.get('clients')} clients"
        return f"It completed {who} on {dataset(history)}{reached}, in {history['seconds']:.1f} s."
    reason = brief(history.get("reason", "the reason is not known"))
    if status == "running":
        return f"It has not ended: {done} of {asked} rounds are there, and it is still running or was killed."
    return f"It {'was stopped' if status == 'stopped' else 'failed'} after {done} of {asked} rounds: {reason}"


def facts(history: History) -> list[tuple[str, Any]]:
    started = history.get("started")
    return [
        ("example", history.get("example")),
        ("engine", history.get("engine")),
        ("data set", dataset(history)),
        ("source of the data", history.get("dataset_source")),
        ("clients", history.get("clients")),
        ("clients that a round waits for", history.get("min_clients")),
        ("clients in a round", history.get("sampled")),
        ("started", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(started)) if started else None),
        *((f"version of {name}", number) for name, number in history.get("versions", {}).items()),
    ]


def times(history: History) -> list[tuple[str, float, float]]:
    """Where the time went: (name, seconds, share of all), in the order of WHERE; empty where it was not measured."""
    if "startup_seconds" not in history:
        return []
    rounds = [entry for entry in history["rounds"] if entry["round"] > 0]  # round 0 is over before the first begins
    phases = {phase: sum(r.get("phase_seconds", {}).get(phase, 0.0) for r in rounds) for phase in (*PHASES, "server")}
    in_rounds = sum(entry["seconds"] for entry in rounds)
    ending = history.get("seconds", 0.0) - history["startup_seconds"] - in_rounds  # negative where it was resumed
    parts = (history["startup_seconds"], *phases.values(), in_rounds - sum(phases.values()), ending)
    named = [(name, max(0.0, seconds)) for name, seconds in zip(WHERE, parts, strict=True)]
    total = sum(seconds for _, seconds in named) or 1.0
    return [(name, seconds, seconds / total) for name, seconds in named]


def clients(history: History) -> list[dict[str, Any]]:
    """What each client said last, with its seconds and failures over all rounds, and the most memory it took."""
    found: dict[Any, dict[str, Any]] = {}

    def client(row: dict[str, Any]) -> dict[str, Any]:
        name = row.get("partition-id")
        return found.setdefault(name, {"client": name, "trained": 0, "seconds": 0.0, "failures": 0})

    for entry, phase in itertools.product(history["rounds"], PHASES):
        for row in entry.get(phase, {}).get("by_client", ()):
            one = client(row)
            one["seconds"] += row.get("seconds", 0.0)
            one["memory"] = max(row.get("memory", 0.0), one.get("memory") or 0.0) or None
            one["trained"] += phase == "train"
            one["examples" if phase == "train" else "held out"] = row.get("num-examples")
            one.update({key: row[key] for key in ("train_loss", "loss", "accuracy") if key in row})
        for failure in entry.get(phase, {}).get("failures", ()):
            client(failure)["failures"] += 1
    return sorted(found.values(), key=lambda one: (one["client"] is None, one["client"] or 0))


def memory(history: History) -> dict[str, float]:
    """The largest figure of each kind, in MiB: what an example measures itself, and each client's process."""
    found: dict[str, float] = {}
    for entry in history["rounds"]:
        rows = [row for phase in PHASES for row in entry.get(phase, {}).get("by_client", ()) if "memory" in row]
        figures = [*entry.get("memory", {}).items(), *(("a client's process, at most", row["memory"]) for row in rows)]
        for name, value in figures:
            found[name] = max(value, found.get(name, 0.0))
    return found


def differences(runs: list[dict[str, Any]]) -> list[list[Any]]:
    """The settings in which the runs differ: [setting, the first run's value, the second's, ...]."""
    flat = [
        {
            **{key: run["history"].get(key) for key in ("example", "engine", "dataset", "dataset_source", "clients")},
            **run["history"].get("config", {}),
            **{f"version of {name}": number for name, number in run["history"].get("versions", {}).items()},
        }
        for run in runs
    ]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [[key, *(one.get(key, "–") for one in flat)] for key in keys]
    return [row for row in rows if any(value != row[1] for value in row[1:])]


# --- Tables: a caption, the heads of the columns, and the rows, as text ----------------------------------------------


def number(value: Any, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}f}" if isinstance(value, int | float) else str(value)


def table(caption: str, note: str, columns: dict[str, Callable[[Any], str]], rows: Iterable[Any]) -> dict[str, Any]:
    heads, cells = list(columns), [[cell(row) for cell in columns.values()] for row in rows]
    return {"caption": caption, "note": note, "heads": heads, "rows": cells}


def rounds_table(history: History) -> dict[str, Any]:
    def of(phase: str, key: str, digits: int = 3) -> Callable[[dict[str, Any]], str]:
        return lambda entry: number(entry.get(phase, {}).get(key), digits)

    columns = {
        "round": lambda entry: str(entry["round"]),
        "trained": of("train", "clients", 0),
        "evaluated": of("evaluate", "clients", 0),
        "failed": lambda entry: str(sum(len(entry.get(phase, {}).get("failures", ())) for phase in PHASES)),
        "training loss": of("train", "loss"),
        "loss": of("evaluate", "loss"),
        "accuracy": of("evaluate", "accuracy"),
        "server's loss": of("server", "loss"),
        "server's accuracy": of("server", "accuracy"),
        "seconds": lambda entry: number(entry["seconds"], 1),
        "MB": lambda entry: number(entry.get("bytes", 0) / 1e6, 2),
    }
    note = """How many clients trained, evaluated and failed; loss and accuracy, the clients' as means over their
        examples, and the server's own; MB of weights, sent and received."""
    return table("Each round", note, columns, history["rounds"])


def clients_table(history: History) -> dict[str, Any]:
    columns = {
        "client": lambda one: number(one["client"], 0),
        "examples": lambda one: number(one.get("examples"), 0),
        "held out": lambda one: number(one.get("held out"), 0),
        "trained": lambda one: str(one["trained"]),
        "failed": lambda one: str(one["failures"]),
        "seconds": lambda one: number(one["seconds"], 1),
        "training loss": lambda one: number(one.get("train_loss")),
        "loss": lambda one: number(one.get("loss")),
        "accuracy": lambda one: number(one.get("accuracy")),
        "MiB": lambda one: number(one.get("memory"), 0),
    }
    note = """Over all rounds: how often each client trained and failed, its seconds of work, and the most memory that
        its process took. Its examples, loss and accuracy are the newest."""
    return table("Each client", note, columns, clients(history))


def details_table(history: History) -> dict[str, Any]:
    rows = [
        {**row, "round": entry["round"], "phase": phase}
        for entry, phase in itertools.product(history["rounds"], PHASES)
        for row in entry.get(phase, {}).get("by_client", ())
    ]
    columns = {
        "round": lambda row: str(row["round"]),
        "phase": lambda row: row["phase"],
        "client": lambda row: number(row.get("partition-id"), 0),
        "examples": lambda row: number(row.get("num-examples"), 0),
        "seconds": lambda row: number(row.get("seconds"), 2),
        "loss": lambda row: number(row.get("train_loss" if row["phase"] == "train" else "loss")),
        "accuracy": lambda row: number(row.get("accuracy")),
    }
    return table("Each client in each round", "", columns, rows)


def failures_table(history: History) -> dict[str, Any]:
    rows = [
        (entry["round"], phase, failure.get("partition-id"), brief(failure.get("reason")))
        for entry, phase in itertools.product(history["rounds"], PHASES)
        for failure in entry.get(phase, {}).get("failures", ())
    ]
    heads = ("round", "phase", "client", "reason")
    columns = {head: lambda row, i=i: number(row[i], 0) for i, head in enumerate(heads)}
    return table("Failures", "Of a long reason, the end; history.json has all of it.", columns, rows)


def plain(text: str) -> str:
    """Text without colour codes and other characters that can't be shown."""
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    return "".join(c for c in text if c.isprintable() or c == "\n")


def brief(reason: Any) -> str:
    """A reason in one line that can be read, or its end, where the cause stands."""
    line = plain(" ".join(str(reason).split()))
    end = line[-250:]
    return line if len(line) <= 300 else f"… {end[max(0, end.rfind('partition ')) :]}"


# --- Pictures --------------------------------------------------------------------------------------------------------


def curves(runs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Loss and accuracy by round, a picture each: of one run all its curves, of several runs one curve each."""
    if not any(run["history"]["rounds"] for run in runs):
        return []
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"text.parse_math": False, "font.size": 11})  # a name may hold a $
    stand_in = " (stand-in, NOT CIFAR-10)" if any(run["stand_in"] for run in runs) else ""
    names = plain(", ".join(dict.fromkeys(str(run["history"].get("dataset")) for run in runs)))
    pictures = []
    for key, unit in (("loss", " per example"), ("accuracy", "")):
        found = series(runs, key)
        if not any(points for _, points in found):
            continue
        figure, axes = plt.subplots(figsize=(5.2, 3.7 + 0.2 * len(runs)), layout="constrained")
        for i, (label, points) in enumerate(found):  # numbered alike in both pictures
            if points:
                look = {"color": COLOURS[i % 5], "linestyle": LINES[i % 4], "marker": MARKERS[i % 5]}
                axes.plot(*zip(*points, strict=True), **look, markersize=5, label=label)
        figure.legend(fontsize=9, loc="outside lower center", ncols=3 if len(runs) == 1 else 1)
        axes.set(xlabel="round", ylabel=f"{key}{unit}", title=f"{names}{stand_in}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
        ends = "; ".join(f"{label}: {p[0][1]:.3f} to {p[-1][1]:.3f}" for label, p in found if p)
        alt = f"{key.capitalize()} by round. {ends}. The tables have all numbers."
        pictures.append({"src": picture(file.getvalue(), "svg+xml"), "alt": alt})
    return pictures


def series(runs: list[dict[str, Any]], key: str) -> list[tuple[str, list[tuple[int, float]]]]:
    """Named curves of points (round, value); some may have none."""
    phases = {"train": "clients, training", "evaluate": "clients, held out", "server": "server, test set"}
    found = []
    for number, run in enumerate(runs, 1):
        rounds = run["history"]["rounds"]
        points = {
            phase: [(entry["round"], entry[phase][key]) for entry in rounds if key in entry.get(phase, {})]
            for phase in phases
        }
        if len(runs) > 1:  # one curve: the server's where it evaluates
            phase = "server" if points["server"] else "evaluate"
            found.append((plain(f"{number}: {run['history'].get('example')}, {phases[phase]}"), points[phase]))
        else:
            found += [(phases[phase], points[phase]) for phase in phases]
    return found


def picture(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# --- The page --------------------------------------------------------------------------------------------------------


def render(runs: list[dict[str, Any]]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    for run in runs:
        run["curves"] = curves([run])
    several = curves(runs) if len(runs) > 1 else []
    return environment.get_template("report.jinja").render(
        runs=runs, curves=several, differences=differences(runs), where=WHERE
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Write report.html, a page on one run or several.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that ./run.sh has left")
    parser.add_argument("--output", type=Path, help="RUN/report.html for one run, ./report.html for several")
    arguments = parser.parse_args()
    runs = []
    for folder in arguments.runs:
        try:
            runs.append(read(folder.resolve()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            print(f"error: {folder} is no run that can be read: {error}", file=sys.stderr)
            return 1
    output = arguments.output or (arguments.runs[0] if len(runs) == 1 else Path()) / "report.html"
    page = render(runs).encode(errors="replace")
    write_whole(output, lambda file: file.write(page))
    print(f"report: {output.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
