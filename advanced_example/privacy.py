"""Central differential privacy: the mean of clipped updates, with noise, and a count of the privacy that it spends.

**What the noise is worth.** Flower clips each of n = `sampled-clients` updates to an L2 norm of C = `dp-clip`, and adds
Gaussian noise of standard deviation z * C / n, with z = `dp-noise`, to their mean (McMahan et al., 2018,
arXiv:1710.06963). Times n, which is no secret, that is the sum of the updates with noise of z * C. One client's update,
added to the sum or removed from it, changes it by C at most: the mechanism's noise multiplier, which is its noise over
its sensitivity, is z. Two things must hold for that, and `Private` sees to them: each client weighs 1 / n, whatever it
says of its examples, and n is fixed, so a round in which a reply is missing changes nothing. If one client is replaced
by another, the sum changes by up to 2 * C: whoever counts like that has a multiplier of z / 2.

**Why sampling earns nothing.** Amplification needs a draw that nobody knows, in which each client's place depends on no
other's. Here the draw follows from the run's seed, history.json says who took part, and exactly n are drawn: who is
left out makes room for another. So each round counts in full, for each client.

**The count.** Flower's accountant adds up the rounds' Renyi divergences (Mironov, 2017, arXiv:1702.07476), and turns
the total into an epsilon for `dp-delta`. A bound to hold it against, from zero-concentrated privacy (Bun and Steinke,
2016, arXiv:1605.02065): rho = rounds / (2 * z^2), epsilon <= rho + 2 * sqrt(rho * ln(1 / delta)).

**What it leaves out.** The clients' metrics and numbers of examples go to the server, and into history.json, without
noise. The server sees each update. And a computer's Gaussian noise is not quite what theory adds: its lowest bits can
give a sum away (Mironov, 2012, "On significance of the least significant bits for differential privacy").
"""

import bisect
import math
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp import GaussianPrivacyEvent, NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, Strategy

from rounds.replies import metrics

Config = Mapping[str, Any]
STEPS, MOST = 1000, 1000  # of dp-noise: steps of a thousandth, up to a thousand


def accountant(config: Config) -> RdpAccountant:
    """Return a count that begins at nothing, and refuses rounds that would overspend. Raises ImportError."""
    return RdpAccountant(
        PrivacyConfig(
            target_delta=config["dp-delta"],
            population_size=config["min-clients"],  # counts for nothing without amplification
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
            max_epsilon=config["dp-target-epsilon"] or None,
        )
    )


def epsilon(config: Config, noise: float) -> float:
    """Return what all rounds of a run spend with this noise multiplier."""
    count = accountant(config)
    event = GaussianPrivacyEvent(noise, config["sampled-clients"], config["min-clients"])
    count.compose(event, config["num-server-rounds"])
    return count.get_epsilon(config["dp-delta"])


def with_noise(config: Config) -> Config:
    """Return the run config with the least dp-noise with which its rounds keep to dp-target-epsilon.

    Raises ValueError where none does, or the noise that was asked for does not.
    """
    if not (target := config["dp-target-epsilon"]):
        return config
    rounds, asked = config["num-server-rounds"], config["dp-noise"]
    if asked and (spent := epsilon(config, asked)) > target:
        raise ValueError(
            f"{rounds} rounds with dp-noise={asked} spend epsilon {spent:.2f}, and dp-target-epsilon is {target}: "
            "ask for fewer rounds, or for more noise"
        )
    if asked:
        return config
    steps = range(1, MOST * STEPS + 1)
    place = bisect.bisect_left(steps, True, key=lambda step: epsilon(config, step / STEPS) <= target)
    if place == len(steps):
        raise ValueError(f"no dp-noise up to {MOST} keeps {rounds} rounds to dp-target-epsilon={target}")
    return {**config, "dp-noise": steps[place] / STEPS}


class Private(DifferentialPrivacyServerSideFixedClipping):
    """Flower's wrapper around FedAvg, with what its count takes for granted: equal weights, and noise hard to guess."""

    WEIGHT = "equal-weight"

    def __init__(self, strategy: Strategy, config: Config) -> None:
        noise, clip, sampled = config["dp-noise"], config["dp-clip"], config["sampled-clients"]
        super().__init__(strategy, noise, clip, sampled, accountant=accountant(config))
        self.repeatable = config["dp-repeatable"]
        if self.repeatable:
            np.random.seed(config["seed"])  # Flower draws from NumPy's global generator

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round, self.weigh_equally(replies))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return super().aggregate_evaluate(server_round, self.weigh_equally(replies))

    def weigh_equally(self, replies: Iterable[Message]) -> list[Message]:
        replies = list(replies)
        for reply in replies:
            metrics(reply)[self.WEIGHT] = 1.0
        return replies

    def _add_noise_to_aggregated_arrays(self, aggregated_arrays: ArrayRecord) -> ArrayRecord:
        """Add noise as Flower does, but not from NumPy's generator: its earlier numbers give the next ones away."""
        if self.repeatable:
            return super()._add_noise_to_aggregated_arrays(aggregated_arrays)
        stdv = self.noise_multiplier * self.clipping_norm / self.num_sampled_clients
        noisy = {}
        for name, array in aggregated_arrays.items():
            value = array.numpy()
            noisy[name] = Array(np.asarray(value + stdv * gaussian(value.shape), value.dtype))
        return ArrayRecord(noisy)

    def spent(self) -> dict[str, Any]:
        """Return what the rounds have spent, for history.json."""
        found = self.privacy_spent()
        spent = math.ceil(1000 * found.epsilon) / 1000  # never less than it is
        if self.repeatable:  # noise that anybody can draw again hides nothing
            spent = math.inf
        who = {"unit": "client", "neighbours": "add or remove one"}
        return {"epsilon": spent, "delta": found.delta, **who, "rounds": found.num_releases}


def gaussian(shape: tuple[int, ...]) -> np.ndarray:
    """Draw standard normal numbers from the operating system's cryptographic generator (Box and Muller, 1958)."""
    bits = np.frombuffer(secrets.token_bytes(16 * math.prod(shape)), np.uint64).reshape(2, *shape)
    one, two = ((bits >> 11) + 0.5) / 2**53  # 53 random bits each, in (0, 1)
    return np.sqrt(-2 * np.log(one)) * np.cos(2 * np.pi * two)


def private_part(strategy: Strategy | None) -> Private | None:
    """Return the Private among a strategy and those that it wraps."""
    while strategy is not None and not isinstance(strategy, Private):
        strategy = getattr(strategy, "strategy", None)
    return strategy


def said(privacy: Mapping[str, Any]) -> str:
    """Say in a line what history.json has under "privacy"."""
    spent = privacy["epsilon"]
    much = "without end, since anybody can draw this noise again" if spent == math.inf else f"epsilon {spent:g}"
    return f"privacy spent: {much}, delta {privacy['delta']:g}, to add or remove one {privacy['unit']}"
