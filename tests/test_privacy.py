"""What dp-noise adds, and the privacy that it spends: counted, held against theory, said, and kept over a crash."""

import importlib.util
import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.exception import PrivacyBudgetExhausted
from local_grid import play
from paths import ADVANCED
from runs import Launch, copy_example, finished
from test_replies import reply, request

import launch
import refusals
from launcher.arguments import parse
from launcher.project import UsageError
from privacy import Private, epsilon, gaussian, private_part, with_noise
from rounds import history
from schedules import Scheduled
from state import get_state, set_state
from strategies import make_strategy

counted = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason="needs dp-accounting, of requirements-dev.txt"
)
CONFIG = tomllib.loads((ADVANCED / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
DELTA = 1e-5
PRIVATE = {
    **CONFIG,
    **{"dp-noise": 2.0, "dp-clip": 0.01, "min-clients": 4, "sampled-clients": 4, "num-server-rounds": 3},
    **{"partitioner": "iid", "device": "cpu"},
}


def closed_form(noise: float, rounds: int, delta: float = DELTA) -> float:
    """The bound of zero-concentrated privacy: Bun and Steinke, 2016, arXiv:1605.02065."""
    rho = rounds / (2 * noise**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def exact_delta(noise: float, rounds: int, spent: float) -> float:
    """The delta that an epsilon really has: the rounds are one Gaussian mechanism with noise / sqrt(rounds).

    Balle and Wang, 2018, arXiv:1805.06530, theorem 8.
    """
    one = noise / math.sqrt(rounds)

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return below(1 / (2 * one) - spent * one) - math.exp(spent) * below(-1 / (2 * one) - spent * one)


# --- The count -------------------------------------------------------------------------------------------------------


@counted
def test_the_figures_of_the_issue() -> None:
    assert epsilon(PRIVATE, 2.0) == pytest.approx(4.01, abs=0.005)
    assert closed_form(2.0, 3) == pytest.approx(4.53, abs=0.005)


@counted
@pytest.mark.parametrize("rounds", [1, 10, 100])
@pytest.mark.parametrize("noise", [0.7, 1.0, 2.0, 5.0, 50.0])
def test_the_count_lies_between_the_truth_and_the_closed_form(noise: float, rounds: int) -> None:
    found = epsilon({**PRIVATE, "num-server-rounds": rounds}, noise)
    assert found <= closed_form(noise, rounds)
    assert exact_delta(noise, rounds, found) <= DELTA


@counted
def test_sampling_earns_nothing() -> None:
    assert epsilon({**PRIVATE, "sampled-clients": 1, "min-clients": 100}, 2.0) == epsilon(PRIVATE, 2.0)


@counted
@pytest.mark.parametrize("target", [0.1, 1.0, 8.0, 100.0])
def test_the_least_noise_that_keeps_to_a_budget_is_chosen(target: float) -> None:
    noise = with_noise({**PRIVATE, "dp-noise": 0.0, "dp-target-epsilon": target})["dp-noise"]
    assert epsilon(PRIVATE, noise) <= target < epsilon(PRIVATE, noise - 0.001)


@counted
def test_an_accountant_refuses_the_round_that_would_overspend() -> None:
    """As where a round was counted and then broken off, which nobody could know beforehand."""
    config = with_noise({**PRIVATE, "dp-noise": 0.0, "dp-target-epsilon": 8.0})
    strategy = private_part(Scheduled(make_strategy(config, aggregate_metrics), config))
    event = [request() for _ in range(4)]
    strategy.strategy.configure_train = lambda *_: event
    for server_round in (1, 2, 3):
        assert strategy.configure_train(server_round, zero(), None, None) == event
        assert strategy.aggregate_train(server_round, trained([1.0, 2.0, 3.0, 4.0]))[0]
    assert 7.9 < strategy.spent()["epsilon"] <= 8.0
    with pytest.raises(PrivacyBudgetExhausted):
        strategy.configure_train(4, zero(), None, None)


@counted
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dp-noise=2", "dp-target-epsilon=4"), "3 rounds with dp-noise=2.0 spend epsilon 4.01, and dp-target-epsilon"),
        (("dp-target-epsilon=0.000001",), "no dp-noise up to 1000 keeps 3 rounds to dp-target-epsilon=1e-06"),
        (("dp-noise=2", "dp-delta=0.25"), "dp-delta=0.25 must be below 1 / CLIENTS, which is 0.25"),
        (("dp-target-epsilon=8", "dp-repeatable=true"), "noise that anybody can draw again hides nothing"),
        (("dp-target-epsilon=8", "learning-rate=0"), "a learning-rate above 0"),
        (("dp-noise=1", "learning-rate=0"), "a learning-rate above 0"),
        (("dp-target-epsilon=8", "strategy=fedprox"), "dp-noise goes with strategy=fedavg alone, not with fedprox"),
        (("dp-noise=1", "strategy=fedadam"), "dp-noise goes with strategy=fedavg alone, not with fedadam"),
    ],
)
def test_what_would_not_be_private_is_refused(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        launch.check(parse(["4", "4", "4", "3", *arguments], ADVANCED, environment={}))


@counted
def test_the_noise_for_a_budget_becomes_a_setting() -> None:
    settings = launch.check(parse(["4", "4", "4", "3", "dp-target-epsilon=8"], ADVANCED, environment={}))
    assert epsilon(PRIVATE, settings.config["dp-noise"]) == pytest.approx(8.0, rel=0.01)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"dp-accounting, .*: pip --python \S+ install dp-accounting$"):
        launch.check(parse(["dp-noise=1"], ADVANCED, environment={}))


# --- What is added ---------------------------------------------------------------------------------------------------


def aggregate_metrics(replies: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    return MetricRecord({"replies": len(replies)})


def zero() -> ArrayRecord:
    return ArrayRecord([np.zeros(1, np.float32)])


def trained(weights: list[float], examples: int = 10) -> list[Message]:
    """Replies of one weight each; the later a client, the more examples it claims."""
    return [
        reply(
            {
                "arrays": ArrayRecord([np.array([weight], np.float32)]),
                "metrics": MetricRecord({"train_loss": 1.0, "num-examples": examples * (i + 1)}),
            }
        )
        for i, weight in enumerate(weights)
    ]


def private(sampled: int = 4, **changes) -> Private:
    config = {**PRIVATE, "sampled-clients": sampled, "min-clients": sampled, **changes}
    return make_strategy(config, aggregate_metrics)


def aggregated(weights: list[float], **changes) -> float | None:
    """The mean that comes out, where the global weight was 0 and all were asked."""
    strategy = private(changes.pop("sampled", len(weights)), **changes)
    strategy.strategy.configure_train = lambda *_: [request() for _ in range(strategy.num_sampled_clients)]
    strategy.configure_train(1, zero(), None, None)
    arrays, _ = strategy.aggregate_train(1, trained(weights))
    assert strategy.spent()["rounds"] == (arrays is not None)
    return None if arrays is None else float(next(iter(arrays.values())).numpy()[0])


@counted
def test_updates_are_clipped_and_weigh_the_same() -> None:
    """Noise of next to nothing leaves the plain mean of what was clipped to a norm of 2."""
    found = aggregated([1.0, 2.0, 3.0, 4.0, 100.0], **{"dp-noise": 1e-9, "dp-clip": 2.0})
    assert found == pytest.approx(np.mean([1.0, 2.0, 2.0, 2.0, 2.0]), abs=1e-6)


@counted
def test_one_client_changes_the_sum_by_the_clip_and_in_place_of_another_by_twice_that() -> None:
    """What the docstring of privacy.py derives the noise multiplier from."""
    still = {"dp-noise": 1e-9, "dp-clip": 3.0}
    with_it, without, replaced = (4 * aggregated([1.0, -2.0, 0.5, last], **still) for last in (99.0, 1e-6, -99.0))
    assert with_it - without == pytest.approx(3.0, abs=1e-5)
    assert with_it - replaced == pytest.approx(6.0, abs=1e-5)


@counted
def test_the_noise_is_as_large_as_it_says() -> None:
    """Of standard deviation dp-noise * dp-clip / sampled; a seed does not tell which, unless that is asked for."""
    noise = {"dp-noise": 2.0, "dp-clip": 3.0}
    values = []
    for _ in range(200):
        np.random.seed(0)
        values.append(aggregated([1e-6] * 4, **noise))
    assert np.std(values) == pytest.approx(2.0 * 3.0 / 4, rel=0.25)
    assert len({aggregated([1e-6] * 4, **noise, **{"dp-repeatable": True}) for _ in range(3)}) == 1


def test_the_noise_is_normal() -> None:
    drawn = np.sort(gaussian((100, 1000)).ravel())
    for quantile, expected in ((0.001, -3.090), (0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0), (0.999, 3.090)):
        assert drawn[int(quantile * 100_000)] == pytest.approx(expected, abs=0.15)
    assert np.isfinite(gaussian(()))


@counted
def test_a_round_with_a_reply_missing_changes_nothing_and_spends_nothing() -> None:
    assert aggregated([1.0, 2.0], sampled=3) is None


# --- What is said, and kept ------------------------------------------------------------------------------------------


@counted
def test_a_checkpoint_keeps_the_count() -> None:
    strategy, other = private(), private()
    strategy.strategy.configure_train = lambda *_: [request() for _ in range(4)]
    strategy.configure_train(1, zero(), None, None)
    strategy.aggregate_train(1, trained([1.0] * 4))
    set_state(Scheduled(other, CONFIG), get_state(Scheduled(strategy, CONFIG)))
    assert other.accountant.state_dict() == strategy.accountant.state_dict()
    assert (other.spent(), other.spent()["rounds"]) == (strategy.spent(), 1)


@counted
def test_noise_that_anybody_can_draw_again_is_worth_nothing() -> None:
    assert private(**{"dp-repeatable": True}).spent()["epsilon"] == math.inf


class Crash(Exception):
    pass


@counted
@pytest.mark.parametrize("phase", [MessageType.TRAIN, MessageType.EVALUATE])
def test_a_round_whose_model_has_left_counts_even_if_it_is_run_again(
    phase: str, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise is another one the second time, so that two models of these updates are out."""
    monkeypatch.setenv("DATA_DIR", str(data_dir))
    monkeypatch.setenv("DATASET", "synthetic")

    def watch(sent: Message) -> None:
        if sent.content and (sent.content["config"]["server-round"], sent.metadata.message_type) == (2, phase):
            raise Crash

    with pytest.raises(Crash):
        play(tmp_path / "run", 4, PRIVATE, watch)
    play(tmp_path / "run", 4, PRIVATE)
    rounds = 4 if phase == MessageType.EVALUATE else 3
    record = history.load(tmp_path / "run")
    assert [entry["round"] for entry in record["rounds"]] == [0, 1, 2, 3]
    assert record["privacy"]["rounds"] == rounds
    expected = epsilon({**PRIVATE, "num-server-rounds": rounds}, 2.0)
    assert record["privacy"]["epsilon"] == pytest.approx(expected, abs=0.001)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Launch:
    """With personal layers, too, so that one run of the engine shows both."""
    folder = copy_example("advanced_example", tmp_path_factory.mktemp("private") / "advanced_example")
    words = ("dp-noise=2.0", "dp-clip=0.01", "personal-layers=fc3")
    run = finished(folder, 2, 2, 2, 3, *words, data_dir=data_dir)
    assert run.process.returncode == 0, run.stdout + run.stderr
    return run


@counted
def test_a_run_says_what_it_has_spent(run: Launch) -> None:
    privacy = run.history["privacy"]
    assert privacy["epsilon"] == pytest.approx(4.01, abs=0.005)
    rest = {"delta": DELTA, "unit": "client", "neighbours": "add or remove one", "rounds": 3}
    assert privacy == {"epsilon": privacy["epsilon"], **rest}
    lines = [line.strip() for line in run.stdout.splitlines() if "privacy spent" in line]
    spent = [math.ceil(1000 * epsilon({**PRIVATE, "num-server-rounds": n}, 2.0)) / 1000 for n in (1, 2, 3, 3)]
    assert lines == [f"privacy spent: epsilon {e:g}, delta 1e-05, to add or remove one client" for e in spent]
    assert run.stdout.splitlines()[-1].strip() == lines[-1]  # below the summary


@counted
def test_each_client_of_a_run_keeps_its_layers(run: Launch) -> None:
    """The engine keeps the states of the clients: what they have learned goes on from round to round."""
    assert set(torch.load(run.run_dir / "model.pt", weights_only=True)).isdisjoint({"fc3.weight", "fc3.bias"})
    kept = sorted(path.name for path in run.run_dir.glob("personal/*"))
    assert kept == [f"client-{client}-round-{n}.pt" for client in range(2) for n in (2, 3)]
    assert not any("server" in entry for entry in run.history["rounds"])
