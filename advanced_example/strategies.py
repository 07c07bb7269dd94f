"""Strategies by name: one table over Flower's library, and central differential privacy around FedAvg.

A new one is a line in STRATEGIES, and its name in pyproject.toml, under [tool.launcher.values].
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    Krum,
    Strategy,
)

from privacy import Private, with_noise

Config = Mapping[str, Any]
MetricsFunction = Callable[[list[RecordDict], str], MetricRecord]

# By name, a function of the run config `c` and of the arguments that all of them share.
STRATEGIES: dict[str, Callable[..., Strategy]] = {
    # the mean of the weights, by examples: McMahan et al., 2017, arXiv:1602.05629
    "fedavg": lambda c, **common: FedAvg(**common),
    # that mean's change taken as a gradient, with momentum: Hsu et al., 2019, arXiv:1909.06335
    "fedavgm": lambda c, **common: FedAvgM(
        server_learning_rate=c["server-learning-rate"] or 1.0, server_momentum=c["server-momentum"], **common
    ),
    # FedAvg with clients held near the global model, by client.py: Li et al., 2020, arXiv:1812.06127
    "fedprox": lambda c, **common: FedProx(proximal_mu=c["proximal-mu"], **common),
    # the mean's change taken as a gradient for Adam: Reddi et al., 2021, arXiv:2003.00295
    "fedadam": lambda c, **common: FedAdam(
        eta=c["server-learning-rate"] or 0.01, beta_1=c["server-momentum"], **common
    ),
    # the median of each weight, whatever the numbers of examples: Yin et al., 2018, arXiv:1803.01498
    "fedmedian": lambda c, **common: FedMedian(**common),
    # the one client whose weights are nearest to the others': Blanchard et al., 2017, arXiv:1703.02757
    "krum": lambda c, **common: Krum(num_malicious_nodes=c["malicious-clients"], **common),
}


def make_strategy(config: Config, aggregate_metrics: MetricsFunction) -> Strategy:
    """Return the strategy that `config` names, in differential privacy where there is noise to add.

    `aggregate_metrics` puts the clients' metrics together. What can't work was refused before the start, in launch.py.
    """
    config = with_noise(config)
    private = config["dp-noise"] > 0
    strategy = STRATEGIES[config["strategy"]](
        config,
        # Flower samples max(fraction * clients, minimum) of them: with next to no fraction, the minimum is the number.
        fraction_train=1e-9,
        fraction_evaluate=1e-9,
        min_train_nodes=config["sampled-clients"],
        min_evaluate_nodes=config["sampled-clients"],
        min_available_nodes=config["min-clients"],
        weighted_by_key=Private.WEIGHT if private else "num-examples",
        train_metrics_aggr_fn=aggregate_metrics,
        evaluate_metrics_aggr_fn=aggregate_metrics,
    )
    return Private(strategy, config) if private else strategy


class Wrapper(Strategy):
    """Passes everything on to another strategy, as Flower's own wrappers do; to be changed in part."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.strategy.summary()
