"""Keeps the best model of a run, and what it takes to go on with one that was broken off, as if it never had been.

After each round, checkpoint.pt holds all that the next round depends on: the arrays in their own dtype, the strategy's
state, the random generators, and the rounds of history.json. It is written whole, by rename, before the next round
starts; a crash at any moment costs the round that was under way, and no more. What clients draw follows from the seed,
the round and the partition id, so they need nothing. Only tensors, numbers, strings and containers of them are in it,
so that it is loaded with `weights_only=True`: no code in a file can run.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from privacy import private_part, said
from rounds import history
from rounds.guarded import EvaluateFn, Guarded
from state import get_random_state, get_state, pack, set_random_state, set_state, unpack

FILE = "checkpoint.pt"


class Resumable(Guarded):
    """Guarded, which also keeps best.pt and checkpoint.pt in the run's folder, and goes on from a checkpoint there."""

    def __init__(self, strategy: Strategy, context: Context) -> None:
        super().__init__(strategy, context)
        self.arrays: ArrayRecord | None = None  # to go on from
        self.random: dict[str, Any] | None = None
        self.best: dict[str, Any] = {"round": None, "score": float("-inf")}
        self.private = private_part(strategy)
        self.saved: dict[str, Any] | None = None  # what checkpoint.pt holds
        if (path := self.folder / FILE).exists():
            self.saved = saved = torch.load(path, map_location="cpu", weights_only=True)
            self.rounds_done, self.best, self.arrays = saved["round"], saved["best"], unpack(saved["arrays"])
            self.record.history["rounds"] = saved["rounds"]
            self.random = saved["random"]
            set_state(strategy, saved["strategy"])

    def start(self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int, *args: Any, **kwargs: Any) -> Result:
        """Run the rounds that are left of `num_rounds`."""
        arrays = self.arrays or initial_arrays
        if self.random:
            set_random_state(self.random)  # last: what server.py has drawn by now was drawn before round 1, too
        if self.private and not self.saved:
            self.save(arrays)
        result = super().start(grid, arrays, num_rounds - self.rounds_done, *args, **kwargs)
        result.arrays = result.arrays or arrays  # no new ones where all rounds were done before
        return result

    def closing(self, evaluate_fn: EvaluateFn | None) -> EvaluateFn:
        """Add to a round's last step: write the best model, and all that the next round depends on."""
        close_round = super().closing(evaluate_fn)

        def close_and_save(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            found = close_round(server_round, arrays)
            if server_round > 0 or found:
                if (reached := score(self.record.entry)) > self.best["score"]:
                    self.best = {"round": self.record.entry["round"], "score": reached}
                    write_torch(self.folder / "best.pt", arrays.to_torch_state_dict())
                self.save(arrays)
            return found

        return close_and_save

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Write down what a private round spends before its model leaves: a crash does not take that back."""
        found = super().aggregate_train(server_round, replies)
        if self.private:
            self.record.history["privacy"] = spent = self.private.spent()
            self.record.entry["note"] = said(spent)
            self.saved["strategy"] = get_state(self.strategy)
            write_torch(self.folder / FILE, self.saved)
        return found

    def judge(self, replies: Iterable[Message]) -> list[Message]:
        """Note what the clients were told, too: it differs from round to round."""
        good = super().judge(replies)
        if self.sent:
            configs = next(iter(self.sent.values())).content.config_records.values()  # the same for all clients
            told = {key: value for config in configs for key, value in config.items() if not isinstance(value, bytes)}
            self.record.entry[self.phase]["config"] = told
        return good

    def save(self, arrays: ArrayRecord) -> None:
        self.saved = {
            "round": self.record.entry.get("round", 0),
            "arrays": pack(arrays),
            "strategy": get_state(self.strategy),
            "random": get_random_state(),
            "rounds": list(self.record.history["rounds"]),
            "best": self.best,
        }
        write_torch(self.folder / FILE, self.saved)


def score(entry: dict[str, Any]) -> float:
    """Return how good the model is: by accuracy where there is one, else by loss; the server's, else the clients'."""
    found = entry.get("server") or entry.get("evaluate", {})
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    return numbers.get("accuracy", -numbers.get("loss", float("inf")))


def write_torch(path: Path, value: Any) -> None:
    """Write what `torch.save` takes, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    history.write_whole(path, buffer.getvalue())
