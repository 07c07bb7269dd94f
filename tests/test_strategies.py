"""advanced_example's strategies, schedules and client code, called as Flower calls them, with Flower's own messages."""

import io
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from paths import ADVANCED, advanced
from reply_helpers import reply
from runs import copy_example, finished

import launch
from checkpoint import score
from launcher.arguments import parse
from launcher.project import UsageError
from schedules import Scheduled, evaluate_config, train_config
from state import get_state, set_state
from strategies import STRATEGIES, Private, make_strategy

PROJECT = tomllib.loads((ADVANCED / "pyproject.toml").read_text())
CONFIG = PROJECT["tool"]["flwr"]["app"]["config"]
CLASSES = {
    "fedavg": flower.FedAvg,
    "fedavgm": flower.FedAvgM,
    "fedprox": flower.FedProx,
    "fedadam": flower.FedAdam,
    "fedmedian": flower.FedMedian,
    "krum": flower.Krum,
}
# One weight of five clients, and how many examples they have.
WEIGHTS = [1.0, 2.0, 3.0, 4.0, 100.0]
EXAMPLES = [10, 10, 10, 10, 60]


def aggregate_metrics(replies: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    return MetricRecord({"replies": len(replies)})


def trained(weights: list[float], examples: list[int]) -> list[Message]:
    return [
        reply(
            {
                "arrays": ArrayRecord([np.array([weight], np.float32)]),
                "metrics": MetricRecord({"train_loss": 1.0, "num-examples": count}),
            }
        )
        for weight, count in zip(weights, examples, strict=True)
    ]


def aggregated(weights: list[float] = WEIGHTS, examples: list[int] = EXAMPLES, **changes) -> float | None:
    """What a strategy makes of these clients' weights, where the global weight was 0."""
    strategy = make_strategy({**CONFIG, "sampled-clients": len(weights), **changes}, aggregate_metrics)
    if isinstance(strategy, Private):
        strategy.strategy.current_arrays = ArrayRecord([np.zeros(1, np.float32)])  # as configure_train notes it
    arrays, _ = strategy.aggregate_train(1, trained(weights, examples))
    return None if arrays is None else float(next(iter(arrays.values())).numpy()[0])


# --- Strategies ------------------------------------------------------------------------------------------------------


def test_the_names_are_those_that_can_be_given() -> None:
    assert list(STRATEGIES) == PROJECT["tool"]["launcher"]["values"]["strategy"] == list(CLASSES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_name_makes_its_strategy_and_samples_exactly(name: str) -> None:
    strategy = make_strategy({**CONFIG, "strategy": name, "sampled-clients": 7, "min-clients": 9}, aggregate_metrics)
    assert type(strategy) is CLASSES[name]
    assert (strategy.min_train_nodes, strategy.min_evaluate_nodes, strategy.min_available_nodes) == (7, 7, 9)
    assert int(1000 * strategy.fraction_train) == int(1000 * strategy.fraction_evaluate) == 0


def test_fedavg_weighs_by_examples() -> None:
    assert aggregated() == pytest.approx(np.average(WEIGHTS, weights=EXAMPLES))


def test_median_and_krum_hold_against_one_client() -> None:
    assert aggregated(strategy="fedmedian") == 3.0
    assert aggregated(strategy="krum") in WEIGHTS[:4]


def test_the_arguments_reach_the_strategies() -> None:
    made = {name: make_strategy({**CONFIG, "strategy": name}, aggregate_metrics) for name in STRATEGIES}
    assert (made["fedavgm"].server_learning_rate, made["fedavgm"].server_momentum) == (1.0, 0.9)
    assert (made["fedadam"].eta, made["fedadam"].beta_1) == (0.01, 0.9)
    assert made["fedprox"].proximal_mu == CONFIG["proximal-mu"]
    assert made["krum"].num_malicious_nodes == CONFIG["malicious-clients"]
    assert make_strategy({**CONFIG, "strategy": "fedadam", "server-learning-rate": 0.5}, aggregate_metrics).eta == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, 4, 4, 1, "strategy=krum"), "among at least 5, and SAMPLED is 4"),
        ((9, 9, 6, 1, "strategy=krum", "malicious-clients=2"), "among at least 7, and SAMPLED is 6"),
        ((5, "dp-noise=1", "strategy=fedadam"), "dp-noise goes with strategy=fedavg alone"),
        ((5, "dp-noise=1", "learning-rate=0"), "a learning-rate above 0"),
        ((5, "strategy=fedsgd"), "strategy must be one of fedavg, fedavgm"),
        ((5, "flaky-client=5"), "the clients are 0 to 4"),
    ],
)
def test_what_can_not_work_is_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        launch.check(parse([*map(str, arguments)], ADVANCED, environment={}))


def test_it_is_refused_before_anything_starts(data_dir: Path, tmp_path: Path) -> None:
    folder = copy_example("advanced_example", tmp_path / "advanced_example")
    run = finished(folder, 4, 4, 4, 1, "strategy=krum", data_dir=data_dir)
    assert (run.process.returncode, run.stdout, len(run.stderr.splitlines())) == (2, "", 1)
    assert run.stderr.startswith("error: krum withstands 1 malicious clients only among at least 5")
    assert not (folder / "runs").exists()


# --- Differential privacy --------------------------------------------------------------------------------------------


def test_updates_are_clipped_and_weigh_the_same() -> None:
    """Noise of next to nothing leaves the plain mean of what was clipped to a norm of 2."""
    private = {"dp-noise": 1e-9, "dp-clip": 2.0}
    assert aggregated(**private) == pytest.approx(np.mean([1.0, 2.0, 2.0, 2.0, 2.0]), abs=1e-6)


def test_the_noise_is_as_large_as_it_says() -> None:
    """Of standard deviation dp-noise * dp-clip / sampled, and drawn anew unless repeatability is asked for."""
    values = [aggregated([1e-6] * 4, [1] * 4, **{"dp-noise": 2.0, "dp-clip": 3.0}) for _ in range(400)]
    assert np.std(values) == pytest.approx(2.0 * 3.0 / 4, rel=0.15)
    repeatable = {"dp-noise": 2.0, "dp-clip": 3.0, "dp-repeatable": True}
    assert len({aggregated([1e-6] * 4, [1] * 4, **repeatable) for _ in range(3)}) == 1


def test_a_round_with_a_reply_missing_changes_nothing() -> None:
    assert aggregated([1.0, 2.0], [1, 1], **{"dp-noise": 1.0, "sampled-clients": 3}) is None


# --- Schedules -------------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_then_falls() -> None:
    config = {**CONFIG, "learning-rate": 1.0, "warmup-rounds": 4, "decay-rounds": 10}
    rates = [train_config(n, config)["learning-rate"] for n in range(1, 15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[6] == pytest.approx(0.55)  # half way down from 1 to 0.1
    assert rates[9:] == pytest.approx([0.1] * 5)
    assert rates[3:10] == sorted(set(rates[3:10]), reverse=True)


def test_no_warm_up_and_no_decay_left() -> None:
    assert train_config(1, {**CONFIG, "warmup-rounds": 0, "decay-rounds": 1})["learning-rate"] == pytest.approx(0.002)
    assert train_config(9, {**CONFIG, "warmup-rounds": 8, "decay-rounds": 4})["learning-rate"] == pytest.approx(0.002)


def test_epochs_and_steps() -> None:
    assert [train_config(n, {**CONFIG, "local-epochs": 7})["local-epochs"] for n in (1, 2, 3)] == [1, 1, 7]
    assert [evaluate_config(n, {**CONFIG, "evaluate-steps": 1})["evaluate-steps"] for n in (1, 3, 4)] == [1, 1, 1]


# --- The clients' metrics --------------------------------------------------------------------------------------------


def said(partition_id: int | None, **metrics: float | list[float]) -> RecordDict:
    """A client's reply, with what the mod `named` adds."""
    card = {} if partition_id is None else {"client": ConfigRecord({"partition-id": partition_id, "seconds": 0.5})}
    return RecordDict({"metrics": MetricRecord({"num-examples": 1, **metrics}), **card})


def test_metrics_are_averaged_by_examples_and_ranked() -> None:
    replies = [said(4, accuracy=0.2, loss=3.0), said(2, accuracy=0.6, loss=5.0, **{"num-examples": 3})]
    found = advanced("server").aggregate_metrics(replies, "num-examples")
    ranked = {"worst-accuracy": 0.2, "worst-client": 4, "best-accuracy": 0.6, "best-client": 2}
    known = {"num-examples": 4, "slowest-seconds": 0.5}
    assert dict(found) == pytest.approx({"accuracy": 0.5, "loss": 4.5, **known, **ranked})


def test_a_task_without_accuracy_is_ranked_by_its_loss() -> None:
    found = advanced("server").aggregate_metrics([said(0, loss=3.0), said(1, loss=5.0)], "num-examples")
    assert {key: value for key, value in found.items() if key.startswith(("worst", "best"))} == {
        "worst-loss": 5.0,
        "worst-client": 1,
        "best-loss": 3.0,
        "best-client": 0,
    }


def test_lists_and_clients_that_say_nothing_of_themselves_do_no_harm() -> None:
    """A list is averaged, and ranks nobody; without a partition id, a client is ranked as number -1."""
    replies = [
        said(None, f1=[0.0, 1.0], accuracy=[0.1, 0.2], loss=1.0),
        said(3, f1=[1.0, 1.0], accuracy=[0, 0], loss=2),
    ]
    found = advanced("server").aggregate_metrics(replies, "num-examples")
    assert found["f1"] == [0.5, 1.0]
    assert (found["worst-loss"], found["worst-client"], found["best-client"]) == (2.0, 3, -1)
    assert advanced("server").aggregate_metrics([said(0)], "num-examples") == {
        "num-examples": 1,
        "slowest-seconds": 0.5,
    }


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"server": {"loss": 2.0, "accuracy": 0.3}, "evaluate": {"accuracy": 0.9}}, 0.3),
        ({"evaluate": {"loss": 2.0, "accuracy": 0.9}}, 0.9),
        ({"evaluate": {"loss": 2.0}}, -2.0),
        ({"server": {"loss": 2.0, "accuracy": [0.1, 0.2]}}, -2.0),
        ({"server": {}, "evaluate": {"loss": 0.5}}, -0.5),
        ({"train": {"loss": 0.5}}, -float("inf")),
    ],
)
def test_the_best_model_is_the_one_with_the_best_accuracy_or_else_loss(entry: dict, expected: float) -> None:
    assert score(entry) == expected


# --- What a checkpoint holds -----------------------------------------------------------------------------------------


def test_a_strategy_s_state_is_the_same_after_it_was_written_down() -> None:
    strategy = make_strategy({**CONFIG, "strategy": "fedadam"}, aggregate_metrics)
    strategy.m_t = {"weight": np.array([1.5, 2.5], np.float64)}
    strategy.current_arrays = ArrayRecord([np.array([1, 2], np.int32)])
    strategy.rows, strategy.tensor, strategy.words = [(1, None), "a"], torch.ones(2), {"a": {1: True}}
    wrapped = Scheduled(strategy, CONFIG)
    file = io.BytesIO()
    torch.save(get_state(wrapped), file)
    other = make_strategy({**CONFIG, "strategy": "fedadam"}, aggregate_metrics)
    set_state(Scheduled(other, CONFIG), torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert (other.rows, other.words) == (strategy.rows, strategy.words)
    assert torch.equal(other.tensor, strategy.tensor)
    assert other.m_t["weight"].dtype == np.float64
    assert np.array_equal(other.m_t["weight"], strategy.m_t["weight"])
    assert other.current_arrays == strategy.current_arrays
    assert other.train_metrics_aggr_fn is aggregate_metrics


def test_what_can_not_be_written_down_is_left_out_and_said_once(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A strategy that writes to a file of its own, for one."""
    strategy = make_strategy(CONFIG, aggregate_metrics)
    with (tmp_path / "log").open("w") as strategy.file, caplog.at_level("WARNING", logger="flwr"):
        states = [get_state(strategy) for _ in range(3)]
    assert all("file" not in state and "min_train_nodes" in state for state in states)
    assert [record.getMessage() for record in caplog.records] == [
        "checkpoint.pt is without FedAvg.file, a TextIOWrapper: a run that is resumed begins it anew"
    ]
