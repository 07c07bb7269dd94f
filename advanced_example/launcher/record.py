"""The record that a run keeps of itself: history.json, written after each round, and model.pt at the end."""

import contextlib
import math
import os
import platform
import time
import tomllib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, MessageType, MetricRecord, RecordDict

from launcher.replies import model_sha256
from launcher.results import final, load_history, make_run_folder, save_history, write_model


class Record:
    """What RunGrid keeps. The run's folder is RUN_DIR, which the launcher sets, else a new one in ./runs."""

    def __init__(self, context: Context) -> None:
        config = context.run_config
        self._since = time.monotonic()  # when the round under way began
        self._server_evaluates = False
        self.folder = Path(os.environ.get("RUN_DIR") or make_run_folder(Path("runs").absolute()))
        try:
            self._history = load_history(self.folder)  # the launcher wrote down what was asked for
        except FileNotFoundError:  # no launcher: `flwr run` by hand, or several machines
            project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
            counts = {"min_clients": config["min-clients"], "sampled": config["sampled-clients"]}
            said = {"example": project["name"], "engine": "deployment", "dataset": os.environ.get("DATASET", "auto")}
            began = {"started": round(time.time(), 2), "clients": config["min-clients"]}
            self._history = {"schema": 1, "status": "running", **said, **began, **counts}
        versions = {"python": platform.python_version(), **{name: version(name) for name in ("flwr", "torch", "numpy")}}
        self._history.update(config=dict(config), rounds=[], versions=versions)

    def recorded(self, evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None]) -> Callable[..., Any]:
        """Wrap a strategy's `evaluate_fn`, so that what it returns stands in the history under "server"."""

        self._server_evaluates = True

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            entry = self.round(server_round)
            self.progress(server_round, "server", 0, 1)
            began = time.monotonic()
            metrics = evaluate_fn(server_round, arrays)
            entry["server"] = dict(metrics or {})
            entry["phase_seconds"]["server"] = round(time.monotonic() - began, 2)
            self.end_round(last=True)
            return metrics

        return evaluate

    def note_memory(self, mib: Mapping[str, float]) -> None:
        """Put memory figures, in MiB, into the round under way; of each, the largest is kept."""
        if mib:
            noted = self.rounds[-1].setdefault("memory", {})
            noted.update({name: max(round(value, 1), noted.get(name, 0.0)) for name, value in mib.items()})

    def aggregated(self, aggregate_fn: Callable[[list[RecordDict], str], MetricRecord]) -> Callable[..., Any]:
        """Wrap a strategy's `train_metrics_aggr_fn` or `evaluate_metrics_aggr_fn`: what it returns goes into the
        history, over the mean of the clients' metrics, under the phase that was last."""

        def aggregate(replies: list[RecordDict], weighted_by_key: str) -> MetricRecord:
            found = aggregate_fn(replies, weighted_by_key)
            entry = self.rounds[-1]
            phase = MessageType.EVALUATE if MessageType.EVALUATE in entry else MessageType.TRAIN
            entry[phase].update({key.removeprefix("train_"): value for key, value in found.items()})
            return found

        return aggregate

    @property
    def examples(self) -> float:
        """How many training examples there are in all, where the launcher knows; else infinitely many."""
        return self._history.get("examples", math.inf)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The rounds of the history so far."""
        return self._history["rounds"]

    def note(self, **facts: Any) -> None:
        """Put facts about the run as a whole into the history; they are written with the next round."""
        self._history.update(facts)

    def save(self, arrays: ArrayRecord, write: Callable[[Path, dict[str, np.ndarray]], None] | None = None) -> None:
        """Write the trained model to model.pt, by `write_model` or `write`; its hash and accuracy to the history."""
        state = {name: array.numpy() for name, array in arrays.items()}
        (write or write_model)(self.folder / "model.pt", state)
        if (accuracy := final(self._history, "accuracy")) is not None:  # not every task has one
            self._history.update(accuracy=accuracy)
        self._history.update(model_sha256=model_sha256(state))
        if "RUN_DIR" not in os.environ:  # else the launcher says how the run ended, and how long it took
            self._history.update(status="completed", seconds=round(time.time() - self._history["started"], 1))
        save_history(self.folder, self._history)

    def begin(self) -> None:
        """The clients are there: the first round begins now."""
        self._since = time.monotonic()
        if started := self._history.get("started"):  # the launcher's time
            self.note(startup_seconds=round(time.time() - started, 2))

    def progress(self, server_round: int, phase: str, done: int, of: int) -> None:
        """Say how far the round under way is: the launcher shows the newest line."""
        with contextlib.suppress(OSError), (self.folder / "logs" / "progress.log").open("a") as log:
            print(server_round, phase, done, of, file=log)

    def round(self, number: int) -> dict[str, Any]:
        """The entry of a round; it is begun where it is not the newest."""
        if not self.rounds or self.rounds[-1]["round"] != number:
            self.rounds.append({"round": number, "seconds": 0.0, "phase_seconds": {}, "bytes": 0})
        return self.rounds[-1]

    def end_round(self, last: bool = False) -> None:
        """Close the newest round and write it down; where the server evaluates, only after that, its `last` step."""
        if self._server_evaluates and not last:
            return
        now = time.monotonic()
        self.rounds[-1]["seconds"] = round(now - self._since, 2)
        self._since = now
        save_history(self.folder, self._history)
