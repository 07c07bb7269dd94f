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

    def __init__(self, context: Context) -> None:
        launched = os.environ.get(history.RUN_FOLDER)
        self.launched = bool(launched)
        self.folder = Path(launched) if launched else history.make_run_folder(Path("runs").absolute())
        self.history = history.load(self.folder) if launched else begun_by_hand(context.run_config)
        versions = {"python": platform.python_version(), **{name: version(name) for name in ("flwr", "torch", "numpy")}}
        self.history.update(config=dict(context.run_config), rounds=[], versions=versions)
        self.entry: dict[str, Any] = {}  # of the round under way

    def begin_round(self, server_round: int, clients: int | None = None) -> None:
        """Begin a round for which so many clients are connected; round 0 doesn't need any."""
        self.entry, self.began = {"round": server_round, "seconds": 0.0, "bytes": 0}, time.monotonic()
        self.history["rounds"].append(self.entry)
        if clients is not None:
            self.history.setdefault("startup_seconds", round(time.time() - self.history["started"], 2))
            self.history.setdefault("clients", clients)

    def end_round(self) -> None:
        """Close the round. One in which nobody was asked, since the strategy has stopped, leaves no entry."""
        if self.entry.keys() <= {"round", "seconds", "bytes"}:
            self.history["rounds"].remove(self.entry)
            return
        self.entry["seconds"] = round(time.monotonic() - self.began, 2)
        self.save()

    def end(self, **outcome: Any) -> None:
        """Write how the run ended; where there is a launcher, that is for the launcher to say."""
        if not self.launched:
            self.history.update(outcome, seconds=round(time.time() - self.history["started"], 1))
            print(f"The rounds are in {self.folder}", flush=True)
        self.save()

    def save(self) -> None:
        history.save(self.folder, self.history)

    def note(self, phase: str, averaged: Mapping[str, Any] | None) -> None:
        """Put averaged metrics into a phase's entry; `train_loss` is called `loss` unless there is one already."""
        for key, value in (averaged or {}).items():
            entry = self.entry.setdefault(phase, {})
            short = key.removeprefix("train_")
            name = key if short in entry or short in averaged else short
            if name in entry:
                self.warn(phase, f"the metric {key} is left out of history.json, which has another value of that name")
            else:
                entry[name] = value

    def warn(self, phase: str, said: str) -> None:
        log(WARNING, "round %s, %s: %s", self.entry["round"], phase, said)


def row(reply: Message) -> dict[str, Any]:
    """Return what one client said, for the history. No metric takes the place of who said it, and how long it took."""
    known, seconds = {"partition-id": partition_id(reply)}, card(reply).get("seconds")
    if isinstance(seconds, float) and math.isfinite(seconds):
        known["seconds"] = round(seconds, 3)
    return {**known, **metrics(reply), **known}


def begun_by_hand(config: Mapping[str, Any]) -> history.History:
    """Return the history of a run that no launcher has begun: `flwr run` by hand, or several machines."""
    name = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["name"]
    data = {"dataset": os.environ["DATASET"]} if os.environ.get("DATASET", "auto") not in ("", "auto") else {}
    counts = {"min_clients": config["min-clients"], "sampled": config["sampled-clients"]}
    return {"schema": 1, "example": name, **data, "status": "running", "started": time.time(), **counts}
