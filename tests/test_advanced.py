"""advanced_example, point by point, in real runs: each test fails where its point is switched off."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_grid import play
from paths import ADVANCED
from runs import ON_ONE_CORE, Launch, copy_example, finished

import cifar_utils
import launch
from launcher.arguments import parse
from launcher.project import UsageError
from models import make_model
from rounds import history
from rounds.averages import model_sha256

ARGUMENTS = (5, 3, 3, 6)
COUNTED = ("own_loss", "own_accuracy", "train_loss")


def in_engine(engine: str) -> dict[str, Any]:
    return {"ENGINE": engine, "through": ON_ONE_CORE if engine == "simulation" else ()}


@pytest.fixture(scope="module", params=["simulation", pytest.param("deployment", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Launch:
    """`./run.sh 5 3 3 6`, as the README says it."""
    folder = copy_example("advanced_example", tmp_path_factory.mktemp("run") / "advanced_example")
    run = finished(folder, *ARGUMENTS, data_dir=data_dir, **in_engine(request.param))
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert run.nothing_left()
    return run


@pytest.fixture
def advanced(tmp_path: Path) -> Path:
    return copy_example("advanced_example", tmp_path / "advanced_example")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Test a model as the server does, on pictures that no client holds."""
    monkeypatch.setenv("DATA_DIR", str(data_dir))
    monkeypatch.setenv("DATASET", "synthetic")
    images, labels = cifar_utils.load_split("test")
    loader = cifar_utils.Pictures(np.array(images), labels).loader(512)
    return lambda net: cifar_utils.test(net, loader)


def rounds(run: Launch) -> list[dict]:
    return run.history["rounds"]


# --- 1. Configuration ------------------------------------------------------------------------------------------------


def test_each_key_of_the_configuration_has_a_comment(advanced: Path) -> None:
    text = (advanced / "pyproject.toml").read_text()
    section = text.partition("[tool.flwr.app.config]")[2].partition("\n[")[0]
    keys = [line for line in section.splitlines() if re.match(r"[a-z]", line)]
    assert len(keys) > 20
    assert [line for line in keys if not re.search(r"  # \S", line)] == []


def test_the_run_says_what_it_was_given(run: Launch) -> None:
    config = run.history["config"]
    assert (run.history["clients"], config["min-clients"], config["sampled-clients"]) == ARGUMENTS[:3]
    assert config["num-server-rounds"] == 6
    assert (config["partitioner"], config["alpha"], config["strategy"], config["model"]) == (
        "dirichlet",
        0.3,
        "fedavg",
        "cnn",
    )
    assert [entry["round"] for entry in rounds(run)] == [0, 1, 2, 3, 4, 5, 6]
    for entry in rounds(run)[1:]:
        assert [entry[phase]["clients"] for phase in ("train", "evaluate")] == [3, 3]
        assert [entry[phase]["failures"] for phase in ("train", "evaluate")] == [[], []]


# --- 2. Evaluation by the server -------------------------------------------------------------------------------------


def test_the_server_tests_the_weights_that_were_just_averaged(run: Launch, tested: Callable) -> None:
    """The first and the last round's figures are the ones of the model from the seed, and of model.pt."""
    torch.manual_seed(run.history["config"]["seed"])
    first, last = make_model("cnn"), make_model("cnn")
    last.load_state_dict(weights(run.run_dir / "model.pt"))
    for net, entry in ((first, rounds(run)[0]), (last, rounds(run)[-1])):
        assert entry["server"] == pytest.approx(tested(net), rel=1e-5)
    assert len({entry["server"]["loss"] for entry in rounds(run)}) == 7
    assert run.history["accuracy"] == rounds(run)[-1]["server"]["accuracy"]


# --- 3. Schedules ----------------------------------------------------------------------------------------------------


def test_each_round_was_sent_the_config_of_its_own(run: Launch) -> None:
    cosine = [0.02 * (0.1 + 0.9 * (1 + math.cos(math.pi * (n - 2) / 18)) / 2) for n in (3, 4, 5, 6)]
    sent = [entry["train"]["config"] for entry in rounds(run)[1:]]
    assert [config["learning-rate"] for config in sent] == pytest.approx([0.01, 0.02, *cosine])
    assert [config["local-epochs"] for config in sent] == [1, 1, 2, 2, 2, 2]
    steps = [entry["evaluate"]["config"]["evaluate-steps"] for entry in rounds(run)[1:]]
    assert steps == [5, 5, 5, 10, 10, 10]


# --- 4. Custom return values -----------------------------------------------------------------------------------------


def test_there_is_a_row_for_each_client_and_the_means_are_weighted(run: Launch) -> None:
    for entry in rounds(run)[1:]:
        train, evaluate = entry["train"], entry["evaluate"]
        for phase, accuracy in ((train, "own_accuracy"), (evaluate, "accuracy")):
            rows = phase["by_client"]
            assert len({row["partition-id"] for row in rows}) == 3
            counts = [row["num-examples"] for row in rows]
            assert len(set(counts)) > 1 or phase is evaluate  # else a mean without weights would be the same
            means = {key for key in (*COUNTED, "loss", "accuracy") if key in rows[0]}
            for key in means:
                mean = np.average([row[key] for row in rows], weights=counts)
                assert phase[key.removeprefix("train_")] == pytest.approx(mean)
            ranked = sorted(rows, key=lambda row: (row[accuracy], row["partition-id"]))
            assert (phase["worst-client"], phase["worst-accuracy"]) == (
                ranked[0]["partition-id"],
                ranked[0][accuracy],
            )
            assert (phase["best-client"], phase["best-accuracy"]) == (
                ranked[-1]["partition-id"],
                ranked[-1][accuracy],
            )
            assert phase["num-examples"] == sum(counts)
            assert phase["slowest-seconds"] == pytest.approx(max(row["seconds"] for row in rows), abs=0.001)
        assert all(key in row for key in COUNTED for row in train["by_client"])


# --- 5. The first weights --------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "shape", "keys", "bomb", "NaN", "too large", "nobody"])
def test_a_file_that_holds_no_such_weights_is_refused(kind: str, tmp_path: Path) -> None:
    path, boom = tmp_path / "weights.pt", tmp_path / "boom"
    state = make_model("cnn").state_dict()
    expected = "does not hold the weights of model=cnn"
    if kind == "missing":
        expected = "there is no file"
    elif kind == "folder":
        path.mkdir()
        expected = "there is no file"
    elif kind == "text":
        path.write_text("no weights")
    elif kind == "shape":
        torch.save({**state, "fc3.bias": torch.zeros(1)}, path)
        expected = "fc3.bias"
    elif kind == "keys":
        del state["fc3.bias"]
        torch.save(state, path)
        expected = "fc3.bias"
    elif kind == "nobody":
        path = Path("~nosuch/model.pt")
        expected = "home"
    elif kind == "bomb":
        torch.save({"fc3.bias": Bomb(boom)}, path)
    else:  # finite as float64, and infinite as the model's float32
        value = torch.tensor(float("nan") if kind == "NaN" else 1e300, dtype=torch.float64)
        torch.save({**state, "fc3.bias": value.repeat(10)}, path)
        expected = "holds NaN or infinite numbers in fc3.bias"
    with pytest.raises(UsageError) as refusal:
        launch.check(parse([f"init-from={path}"], ADVANCED, environment={}))
    assert str(refusal.value).startswith("init-from: ")
    assert len(str(refusal.value).splitlines()) == 1
    assert expected in str(refusal.value)
    assert not boom.exists()


# --- 7. The best model; resuming is in test_resume.py ----------------------------------------------------------------


def test_the_best_model_is_kept(run: Launch, tested: Callable) -> None:
    net = make_model("cnn")
    net.load_state_dict(weights(run.run_dir / "best.pt"))
    assert tested(net)["accuracy"] == max(entry["server"]["accuracy"] for entry in rounds(run))


# --- 8. and 9. Models by name, and toy data --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_resnet_trains_on_ten_examples_a_client(advanced: Path, data_dir: Path) -> None:
    run = finished(advanced, 3, 2, 2, 1, "model=resnet18", "toy=true", data_dir=data_dir, ENGINE="simulation")
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert [row["num-examples"] for row in rounds(run)[1]["train"]["by_client"]] == [10, 10]
    make_model("resnet18").load_state_dict(weights(run.run_dir / "model.pt"))
    assert len({entry["server"]["loss"] for entry in rounds(run)}) == 2


def test_an_unknown_model_is_refused(advanced: Path, data_dir: Path) -> None:
    run = finished(advanced, "model=vgg", data_dir=data_dir)
    assert run.process.returncode == 2
    assert run.stderr == "error: model must be one of cnn, resnet18, not 'vgg'\n"
    assert not (advanced / "runs").exists()


# --- 5., 9. and 10. Weights from a file, toy data, and a client that fails -------------------------------------------


@pytest.fixture(scope="module", params=["in this process", pytest.param("in an engine", marks=pytest.mark.slow)])
def flaky(
    request: pytest.FixtureRequest, run: Launch, tmp_path_factory: pytest.TempPathFactory, data_dir: Path
) -> list[dict]:
    """One flaky client in three, all with toy data; a run that starts where another has ended, and learns nothing."""
    folder = tmp_path_factory.mktemp("flaky") / "advanced_example"
    settings = {"flaky-client": 1, "toy": True, "partitioner": "iid", "learning-rate": 0.0}
    settings["init-from"] = str(run.run_dir / "model.pt")
    if request.param == "in this process":
        counts = {"min-clients": 2, "sampled-clients": 2, "num-server-rounds": 4}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DATA_DIR", str(data_dir))
            patch.setenv("DATASET", "synthetic")
            play(folder, 3, {**run.history["config"], **settings, **counts})
        return history.load(folder)["rounds"]
    copy_example("advanced_example", folder)
    words = [f"{key}={'true' if value is True else value}" for key, value in settings.items()]
    again = finished(folder, 3, 2, 2, 4, *words, data_dir=data_dir, **in_engine(run.history["engine"]))
    assert again.process.returncode == 0, again.stdout + again.stderr
    assert "RuntimeError: this client fails in even rounds" in again.stdout
    assert again.nothing_left()
    return rounds(again)


def test_it_starts_from_a_file(run: Launch, flaky: list[dict]) -> None:
    """Each round tests as the last round of the run whose model.pt it is, since a rate of 0 changes nothing."""
    assert all(entry["server"] == rounds(run)[-1]["server"] for entry in flaky)


def test_one_flaky_client_in_three(flaky: list[dict]) -> None:
    assert len(flaky) == 5
    failed = 0
    for entry in flaky[1:]:
        failures = entry["train"]["failures"]
        assert len(failures) + entry["train"]["clients"] == 2
        assert [row["num-examples"] for row in entry["train"]["by_client"]] == [10] * entry["train"]["clients"]
        for failure in failures:
            failed += 1
            assert failure["partition-id"] == 1
            assert entry["round"] % 2 == 0
            assert "this client fails in even rounds" in failure["reason"]
    assert failed > 0


@pytest.mark.slow
def test_a_client_that_does_not_answer_is_left_behind(advanced: Path, data_dir: Path) -> None:
    """The round timeout, with a client that hangs where it would fail."""
    flaky = advanced / "flaky.py"
    text = flaky.read_text()
    line = '        raise RuntimeError("this client fails in even rounds, because flaky-client says so")\n'
    assert line in text
    flaky.write_text(text.replace(line, "        __import__('time').sleep(600)\n"))
    run = finished(advanced, 3, 2, 2, 3, "flaky-client=1", "toy=true", "round-timeout=15", "seed=1", data_dir=data_dir)
    assert run.process.returncode == 0, run.stdout + run.stderr
    failures = [failure for entry in rounds(run)[1:] for failure in entry["train"]["failures"]]
    assert {failure["partition-id"] for failure in failures} == {1}  # again and again: it is busy with its first round
    assert all("no reply in time" in failure["reason"] for failure in failures)
    assert len(rounds(run)) == 4
    assert run.nothing_left()


# --- Who holds what --------------------------------------------------------------------------------------------------


def test_the_partitions_are_shown(run: Launch, data_dir: Path) -> None:
    """As a table with every example in it, and as a picture."""
    lines = run.stdout.splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.split()[:2] == ["client", "0"]]
    table = [[int(word) for word in line.split()] for line in lines[head + 1 :] if re.fullmatch(r"[ \d]+", line)]
    assert [row[0] for row in table] == [0, 1, 2, 3, 4]
    assert all(sum(row[1:-1]) == row[-1] for row in table)
    labels = np.load(data_dir / "synthetic/train_labels.npy")
    assert [sum(row[1 + label] for row in table) for label in range(10)] == np.bincount(labels).tolist()
    assert max(max(row[1:-1]) / row[-1] for row in table) > 0.3  # alpha 0.3 is far from a tenth each
    trained = {
        row["partition-id"]: row["num-examples"] for entry in rounds(run)[1:] for row in entry["train"]["by_client"]
    }
    for client, count in trained.items():
        assert count == table[client][-1] - table[client][-1] // 10
    assert (run.run_dir / "partitions.png").read_bytes().startswith(b"\x89PNG")


def test_the_hash_is_the_model_s(run: Launch) -> None:
    state = {name: tensor.numpy() for name, tensor in weights(run.run_dir / "model.pt").items()}
    assert json.loads((run.run_dir / "history.json").read_text())["model_sha256"] == model_sha256(state)


# --- What the README lets readers do ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_exercise_with_a_strategy_and_a_third_model(advanced: Path, data_dir: Path) -> None:
    """One line each, and a name where names are listed."""
    for name, old, new in (
        ("strategies.py", "    FedAvgM,\n", "    FedAvgM,\n    FedTrimmedAvg,\n"),
        (
            "strategies.py",
            '    "krum": ',
            '    "fedtrimmedavg": lambda c, **common: FedTrimmedAvg(beta=0.2, **common),\n    "krum": ',
        ),
        ("pyproject.toml", 'strategy = ["fedavg", ', 'strategy = ["fedtrimmedavg", "fedavg", '),
        (
            "models.py",
            '    "cnn": cifar_utils.Net,\n',
            '    "cnn": cifar_utils.Net,\n    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)),\n',
        ),
    ):
        text = (advanced / name).read_text()
        assert text.count(old) == 1
        (advanced / name).write_text(text.replace(old, new))
    settings = ("strategy=fedtrimmedavg", "model=linear", "toy=true")
    run = finished(advanced, 5, 5, 5, 2, *settings, data_dir=data_dir, ENGINE="simulation")
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert run.history["config"]["strategy"] == "fedtrimmedavg"
    assert set(weights(run.run_dir / "model.pt")) == {"1.weight", "1.bias"}
