"""The best model of a run, and what it takes to go on with a run that was broken off, as if it never had been.

After each round, checkpoint.pt holds all that the next round depends on: the arrays in their own dtype, the strategy's
state, the random generators, and the rounds of history.json. It is written whole, by rename, before the next round
starts; a crash at any moment costs the round that was under way, and no more. What clients draw follows from the seed,
the round and the partition id, so they need nothing. Only tensors, numbers, strings and containers of them are in it,
so that it is loaded with `weights_only=True`: no code in a file can run.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Strategy

from launcher.grid import RunGrid
from launcher.results import write_whole

FILE = "checkpoint.pt"
EvaluateFunction = Callable[[int, ArrayRecord], MetricRecord | None]


class Checkpoint:
    """Keeps best.pt and checkpoint.pt in a run's folder; `strategy` must not be started with before `restore`."""

    def __init__(self, run: RunGrid, strategy: Strategy) -> None:
        self.run = run
        self.strategy = strategy
        self.rounds_done = 0
        self.best: dict[str, Any] = {"round": None, "accuracy": -1.0}

    def restore(self) -> tuple[int, ArrayRecord] | None:
        """Return (rounds done, arrays), with everything else put back in place; None where there is no checkpoint."""
        path = self.run.folder / FILE
        if not path.exists():
            return None
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.rounds_done, self.best = saved["round"], saved["best"]
        self.run.rounds[:] = saved["rounds"]
        set_state(self.strategy, saved["strategy"])
        set_random_state(saved["random"])
        return self.rounds_done, unpack(saved["arrays"])

    def after_each_round(self, evaluate_fn: EvaluateFunction) -> EvaluateFunction:
        """Wrap the evaluation by the server, which `Strategy.start` calls last in each round, and once before them."""

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round == 0 and self.rounds_done > 0:
                return None  # the start of a resumed run: these arrays were tested when their round ended
            number = server_round + self.rounds_done
            metrics = evaluate_fn(number, arrays)
            # YOUR TRAINING STEP: where the task has no accuracy, the lowest loss is the best.
            if metrics is not None and metrics["accuracy"] > self.best["accuracy"]:
                self.best = {"round": number, "accuracy": metrics["accuracy"]}
                state = arrays.to_torch_state_dict()
                write_whole(self.run.folder / "best.pt", lambda file: torch.save(state, file))
            self.save(number, arrays)
            return metrics

        return evaluate

    def save(self, number: int, arrays: ArrayRecord) -> None:
        """Write everything that the round after round `number` depends on."""
        saved = {
            "round": number,
            "arrays": pack(arrays),
            "strategy": get_state(self.strategy),
            "random": get_random_state(),
            "rounds": self.run.rounds,
            "best": self.best,
        }
        write_whole(self.run.folder / FILE, lambda file: torch.save(saved, file))


# --- What is saved, as plain values ----------------------------------------------------------------------------------


def get_state(strategy: Strategy) -> dict[str, Any]:
    """What a strategy has learned, such as FedAvgM's momentum and FedAdam's m_t and v_t, and those that it wraps.

    It is all that it holds apart from functions, so that a strategy that is added later needs nothing here.
    """
    return {
        name: get_state(value) if isinstance(value, Strategy) else pack(value)
        for name, value in vars(strategy).items()
        if not callable(value)
    }


def set_state(strategy: Strategy, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if isinstance(getattr(strategy, name), Strategy):
            set_state(getattr(strategy, name), value)
        else:
            setattr(strategy, name, unpack(value))


def get_random_state() -> dict[str, Any]:
    """Of Python's generator (Flower samples clients with it), NumPy's (noise for privacy) and PyTorch's."""
    return {"python": random.getstate(), "numpy": pack(np.random.get_state()), "torch": torch.get_rng_state()}


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(unpack(state["numpy"]))
    torch.set_rng_state(state["torch"])


def pack(value: Any) -> Any:
    """Turn ArrayRecords and NumPy arrays, however deep, into tensors; the dtype stays."""
    if isinstance(value, ArrayRecord):
        return {"ArrayRecord": value.to_torch_state_dict()}
    if isinstance(value, np.ndarray | np.generic):
        return {"ndarray": torch.from_numpy(np.array(value))}
    if isinstance(value, dict):
        return {"dict": {key: pack(item) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return type(value)(pack(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint can't hold a {type(value).__name__}")


def unpack(value: Any) -> Any:
    """Undo `pack`."""
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "ArrayRecord":
            return ArrayRecord(content)
        return content.numpy() if kind == "ndarray" else {key: unpack(item) for key, item in content.items()}
    if isinstance(value, list | tuple):
        return type(value)(unpack(item) for item in value)
    return value
