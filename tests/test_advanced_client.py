"""The client of advanced_example, called as Flower calls it, with Flower's messages; its augmentation and models."""

import itertools
import tomllib
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, MessageType, RecordDict
from paths import ADVANCED, advanced
from reply_helpers import request

import cifar_utils
from augmentation import shift_and_mirror
from models import MODELS, make_model

CONFIG = tomllib.loads((ADVANCED / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


# --- The client ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> ModuleType:
    return advanced("client")


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch, data_dir) -> None:
    monkeypatch.setenv("DATA_DIR", str(data_dir))
    monkeypatch.setenv("DATASET", "synthetic")
    torch.set_num_threads(1)  # more slow one another down on a busy machine


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
    assert set(once["metrics"]) == {"train_loss", "own_loss", "own_accuracy", "num-examples"}


def test_its_own_held_out_tenth_is_what_it_reports_on(client: ModuleType) -> None:
    content = ask(client, MessageType.TRAIN, **{"local-epochs": 1, "learning-rate": 0.01})
    net = make_model("cnn")
    net.load_state_dict(weights(content))
    _, held_out = cifar_utils.load_client_data(1, 3, CONFIG["batch-size"], CONFIG["seed"])
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
    _, held_out = cifar_utils.load_client_data(1, 3, 4, CONFIG["seed"])
    torch.manual_seed(0)
    expected = cifar_utils.test(make_model("cnn"), client.shortened(held_out, examples))
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
    torch.manual_seed(0)
    moved = shift_and_mirror(images)
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
