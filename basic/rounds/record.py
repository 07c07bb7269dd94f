"""Keeps the record of a run's rounds, and writes it to history.json after each."""

import math
import os
import platform
import time
import tomllib
from collections.abc import Mapping
from importlib.metadata import version
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.common import log

from rounds import history
from rounds.replies import card, metrics, partition_id


class Record:
    """The history of a run, in its folder: the launcher's, or, without a launcher, a new one in ./runs."""

    def __init__(self, context: Context, rounds_done: int) -> None:
        launched = os.environ.get(history.RUN_FOLDER)
        self.launched = launched is not None
        self.folder = Path(launched) if launched else history.make_run_folder(Path("runs").absolute())
        self.history = history.load(self.folder) if launched else described(context.run_config)
        versions = {"python": platform.python_version(), **{name: version(name) for name in ("flwr", "torch", "numpy")}}
        done = [entry for entry in self.history["rounds"] if rounds_done and entry["round"] <= rounds_done]
        self.history.update(config=dict(context.run_config), rounds=done, versions=versions)
        self.entry: dict[str, Any] = {}  # of the round under way
        self.since = time.monotonic()  # when it began

    def clients_are_there(self, count: int) -> None:
        """Let the first round begin now."""
        self.since = time.monotonic()
        self.history.setdefault("startup_seconds", round(time.time() - self.history["started"], 2))
        self.history.setdefault("clients", count)

    def begin_round(self, server_round: int) -> None:
        self.entry = {"round": server_round, "seconds": 0.0, "bytes": 0}
        self.history["rounds"].append(self.entry)

    def end_round(self) -> None:
        """Close the round. One in which nobody was asked, since the strategy has stopped, leaves no entry."""
        if self.entry.keys() <= {"round", "seconds", "bytes"}:
            self.history["rounds"].remove(self.entry)
            return
        now = time.monotonic()
        self.entry["seconds"], self.since = round(now - self.since, 2), now
        self.save()

    def end(self, outcome: Mapping[str, Any]) -> None:
        """Write how the run ended; where there is a launcher, that is for the launcher to say."""
        if not self.launched:
            self.history.update(outcome, seconds=round(time.time() - self.history["started"], 1))
        self.save()

    def save(self) -> None:
        history.save(self.folder, self.history)

    def note(self, phase: str, averaged: Mapping[str, Any] | None) -> None:
        """Put averaged metrics into a phase's entry; `train_loss` is called `loss` unless there is one already."""
        if not averaged:
            return
        entry = self.entry.setdefault(phase, {})
        for key, value in averaged.items():
            short = key.removeprefix("train_")
            name = key if short in entry or (short != key and short in averaged) else short
            if name in entry:
                log(WARNING, "the metric %s is left out of history.json, which has another value of that name", key)
            else:
                entry[name] = value

    def warn(self, phase: str, said: str) -> None:
        log(WARNING, "round %s, %s: %s", self.entry["round"], phase, said)


def row(reply: Message) -> dict[str, Any]:
    """Return what one client said, for the history. No metric takes the place of who said it, and how long it took."""
    known, seconds = {"partition-id": partition_id(reply)}, card(reply).get("seconds")
    if isinstance(seconds, float) and math.isfinite(seconds):
        known["seconds"] = round(seconds, 3)
    return {**known, **{key: value for key, value in metrics(reply).items() if key not in known}}


def described(config: Mapping[str, Any]) -> history.History:
    """Return the history of a run that no launcher has begun: `flwr run` by hand, or several machines."""
    name = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["name"]
    data = {"dataset": os.environ["DATASET"]} if "DATASET" in os.environ else {}
    counts = {"min_clients": config["min-clients"], "sampled": config["sampled-clients"]}
    return {"schema": 1, "example": name, **data, "status": "running", "started": time.time(), **counts, "rounds": []}
