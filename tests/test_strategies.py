"""advanced_example's strategies, schedules and client code, called as Flower calls them, with Flower's own messages."""

import importlib.util
import itertools
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from paths import ADVANCED
from runs import copy_example, finished
from test_replies import reply, request

import cifar_utils
from augmentation import shift_and_mirror
from models import MODELS, make_model
from schedules import evaluate_config, train_config
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
def test_what_can_not_work_is_refused(arguments: tuple, words: str, data_dir: Path, tmp_path: Path) -> None:
    run = finished(
        copy_example("advanced_example", tmp_path / "advanced_example"), *arguments, "--dry-run", data_dir=data_dir
    )
    assert run.process.returncode == 2
    assert words in run.stderr
    assert run.stdout == ""


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


# --- The client ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> ModuleType:
    spec = importlib.util.spec_from_file_location("advanced_client", ADVANCED / "client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch, data_dir) -> None:
    monkeypatch.setenv("DATA_DIR", str(data_dir))
    monkeypatch.setenv("DATASET", "synthetic")


def ask(client: ModuleType, kind: str, run_config: dict | None = None, **config) -> RecordDict:
    """What client 1 of 3 replies to a message of the server."""
    torch.manual_seed(0)
    message = request(kind)
    message.content["arrays"] = ArrayRecord(make_model("cnn").state_dict())
    message.content["config"] = ConfigRecord({"server-round": 1, **config})
    context = Context(
        run_id=1,
        node_id=2,
        node_config={"partition-id": 1, "num-partitions": 3},
        state=RecordDict(),
        run_config={**CONFIG, "partitioner": "iid", **(run_config or {})},
    )
    return client.app(message, context).content


def distance(content: RecordDict) -> float:
    """How far the client's weights are from those that it was sent."""
    torch.manual_seed(0)
    start = make_model("cnn").state_dict()
    return float(sum((value - start[name]).square().sum() for name, value in weights(content).items()) ** 0.5)


def weights(content: RecordDict) -> dict[str, torch.Tensor]:
    return content["arrays"].to_torch_state_dict()


def test_it_trains_as_long_and_as_fast_as_it_is_told(client: ModuleType) -> None:
    once, twice, fast = (
        ask(client, MessageType.TRAIN, **{"local-epochs": epochs, "learning-rate": rate})
        for epochs, rate in ((1, 0.001), (2, 0.001), (1, 0.002))
    )
    assert 0 < distance(once) < distance(twice)
    assert distance(once) < distance(fast)
    assert once["client"]["partition-id"] == 1
    assert once["metrics"]["num-examples"] == 180  # of 200, a tenth kept
    assert set(once["metrics"]) == {"train_loss", "own_loss", "own_accuracy", "seconds", "num-examples"}


def test_its_own_held_out_tenth_is_what_it_reports_on(client: ModuleType) -> None:
    content = ask(client, MessageType.TRAIN, **{"local-epochs": 1, "learning-rate": 0.01})
    net = make_model("cnn")
    net.load_state_dict(weights(content))
    _, held_out = cifar_utils.load_partition(1, 3, CONFIG["batch-size"], CONFIG["seed"])
    found = {name: content["metrics"][f"own_{name}"] for name in ("loss", "accuracy")}
    assert found == cifar_utils.test(net, held_out)


def test_the_proximal_term_holds_it_back(client: ModuleType) -> None:
    config = {"local-epochs": 3, "learning-rate": 0.01}
    free, loose, firm = (
        distance(ask(client, MessageType.TRAIN, **config, **{"proximal-mu": mu})) for mu in (0.0, 0.01, 10.0)
    )
    assert firm < 0.9 * free
    assert firm < loose != free
    assert distance(ask(client, MessageType.TRAIN, **config)) == free  # other strategies send no mu


def test_the_proximal_term_is_the_paper_s(client: ModuleType) -> None:
    net = make_model("cnn")
    term = client.proximal_term(net, mu=3.0)
    assert term() == 0
    with torch.no_grad():
        net.fc3.bias += 2.0
    assert float(term().detach()) == pytest.approx(3.0 / 2 * 10 * 2.0**2, rel=1e-5)


@pytest.mark.parametrize(("steps", "examples"), [(1, 4), (3, 12), (5, 20), (99, 20)])
def test_it_evaluates_on_exactly_that_many_batches(client: ModuleType, steps: int, examples: int) -> None:
    """Or on the 20 examples that it has."""
    metrics = ask(client, MessageType.EVALUATE, {"batch-size": 4}, **{"evaluate-steps": steps})["metrics"]
    assert metrics["num-examples"] == examples
    _, held_out = cifar_utils.load_partition(1, 3, 4, CONFIG["seed"])
    client.shorten(held_out, examples)
    torch.manual_seed(0)
    expected = cifar_utils.test(make_model("cnn"), held_out)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_a_poisoning_client_sends_100_times_its_update(client: ModuleType) -> None:
    config = {"local-epochs": 1, "learning-rate": 0.01}
    honest = distance(ask(client, MessageType.TRAIN, **config))
    assert distance(ask(client, MessageType.TRAIN, {"poisoning-client": 0}, **config)) == honest  # another one
    poisoned = distance(ask(client, MessageType.TRAIN, {"poisoning-client": 1}, **config))
    assert poisoned == pytest.approx(100 * honest, rel=1e-4)


def test_toy_data_is_ten_examples(client: ModuleType) -> None:
    content = ask(client, MessageType.TRAIN, {"toy": True}, **{"local-epochs": 1, "learning-rate": 0.01})
    assert content["metrics"]["num-examples"] == 10


# --- Augmentation ----------------------------------------------------------------------------------------------------


def cut(frame: torch.Tensor, top: int, left: int, mirrored: bool) -> torch.Tensor:
    part = frame[:, top : top + 32, left : left + 20]
    return part.flip(2) if mirrored else part


def test_each_picture_is_shifted_and_mirrored_by_itself() -> None:
    images = torch.rand(64, 3, 32, 20)
    moved = shift_and_mirror(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    padded = F.pad(images, [4] * 4, mode="reflect")
    ways = [
        [
            (top, left, mirrored)
            for top, left, mirrored in itertools.product(range(9), range(9), (False, True))
            if torch.equal(move, cut(frame, top, left, mirrored))
        ]
        for move, frame in zip(moved, padded, strict=True)
    ]
    assert all(len(way) == 1 for way in ways)
    tops, lefts, mirrors = zip(*(way[0] for way in ways), strict=True)
    assert set(tops) == set(lefts) == set(range(9))
    assert 16 < sum(mirrors) < 48


def test_augment_changes_what_a_client_trains_on(client: ModuleType) -> None:
    def weights(augment: bool) -> ArrayRecord:
        content = ask(client, MessageType.TRAIN, {"augment": augment}, **{"local-epochs": 2, "learning-rate": 0.01})
        assert content["metrics"]["num-examples"] == 180
        return content["arrays"]

    assert weights(True) == weights(True)
    assert weights(True) != weights(False)


# --- Models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters"), [("cnn", 62_006), ("resnet18", 11_173_962)])
def test_models(name: str, parameters: int) -> None:
    net = make_model(name)
    assert sum(weights.numel() for weights in net.parameters()) == parameters
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert not any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in net.modules())
    assert list(net.buffers()) == []  # nothing but parameters is averaged


def test_all_models_are_tested() -> None:
    assert list(MODELS) == ["cnn", "resnet18"]
