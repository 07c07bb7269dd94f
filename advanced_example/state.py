"""Turns what a strategy has learned, and the random generators, into plain values for a checkpoint, and back."""

import functools
import random
from logging import WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.common import log
from flwr.serverapp.strategy import Strategy


def get_state(strategy: Strategy) -> dict[str, Any]:
    """Return what a strategy, and those that it wraps, have learned, such as FedAdam's m_t and v_t.

    It is all that it holds apart from functions, so that a strategy that is added later needs nothing here. What can't
    be written down, such as an open file, is left out, and a resumed run makes it anew.
    """
    state = {}
    for name, value in vars(strategy).items():
        try:
            if hasattr(value, "load_state_dict"):  # it knows how to write itself down, as an accountant of privacy does
                state[name] = pack(value.state_dict())
            elif not callable(value):
                state[name] = get_state(value) if isinstance(value, Strategy) else pack(value)
        except TypeError:
            leave_out(type(strategy).__name__, name, type(value).__name__)
    return state


@functools.cache  # once each
def leave_out(strategy: str, name: str, kind: str) -> None:
    log(WARNING, "checkpoint.pt is without %s.%s, a %s: a run that is resumed begins it anew", strategy, name, kind)


def set_state(strategy: Strategy, state: dict[str, Any]) -> None:
    """Undo `get_state`."""
    for name, value in state.items():
        if isinstance(inner := getattr(strategy, name, None), Strategy):
            set_state(inner, value)
        elif hasattr(inner, "load_state_dict"):
            inner.load_state_dict(unpack(value))
        else:
            setattr(strategy, name, unpack(value))


def get_random_state() -> dict[str, Any]:
    """Return the state of Python's generator (Flower samples clients with it), NumPy's (noise) and PyTorch's."""
    return {"python": random.getstate(), "numpy": pack(np.random.get_state()), "torch": torch.get_rng_state()}


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(unpack(state["numpy"]))
    torch.set_rng_state(state["torch"])


def pack(value: Any) -> Any:
    """Turn ArrayRecords and NumPy arrays, however deep, into tensors; the dtype stays. Raises TypeError."""
    if isinstance(value, ArrayRecord):
        return {"ArrayRecord": value.to_torch_state_dict()}
    if isinstance(value, np.ndarray | np.generic):
        return {"ndarray": torch.from_numpy(np.array(value))}
    if isinstance(value, dict):
        return {"dict": {key: pack(item) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return type(value)(pack(item) for item in value)
    if value is None or type(value) in (bool, int, float, str, torch.Tensor):  # no subclass: it would be code
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
