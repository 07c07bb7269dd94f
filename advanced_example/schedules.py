"""Schedules for what the clients are told in each round, and the wrapper that sends it with any strategy."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from strategies import Wrapper

LEAST = 0.1  # of the learning rate is left at the end of the cosine


def train_config(server_round: int, config: Mapping[str, Any]) -> ConfigRecord:
    """Return the learning rate, which rises in even steps over the warm-up rounds, then falls along half a cosine.

    (Goyal et al., 2017, arXiv:1706.02677, and Loshchilov and Hutter, 2017, arXiv:1608.03983.) From round
    `decay-rounds` on it stays at a tenth. That it does not depend on the number of rounds lets a run be resumed with
    more of them. One local epoch in rounds 1 and 2, when the clients' models still go far apart, then `local-epochs`.
    """
    warmup, decay = config["warmup-rounds"], config["decay-rounds"]
    if server_round <= warmup:
        factor = server_round / warmup
    else:
        progress = min(1.0, (server_round - warmup) / max(1, decay - warmup))
        factor = LEAST + (1 - LEAST) * (1 + math.cos(math.pi * progress)) / 2
    return ConfigRecord(
        {
            "learning-rate": config["learning-rate"] * factor,
            "local-epochs": 1 if server_round <= 2 else config["local-epochs"],
        }
    )


def evaluate_config(server_round: int, config: Mapping[str, Any]) -> ConfigRecord:
    """Return how many batches each client evaluates on: half of `evaluate-steps` in rounds 1 to 3, then all of them."""
    steps = config["evaluate-steps"]
    return ConfigRecord({"evaluate-steps": max(1, steps // 2) if server_round <= 3 else steps})


class Scheduled(Wrapper):
    """Wraps one of Flower's strategies: each round is sent a config of its own."""

    def __init__(self, strategy: Strategy, config: Mapping[str, Any]) -> None:
        super().__init__(strategy)
        self.config = dict(config)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return super().configure_train(server_round, arrays, train_config(server_round, self.config), grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return super().configure_evaluate(server_round, arrays, evaluate_config(server_round, self.config), grid)
