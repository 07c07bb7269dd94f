"""Personal layers of advanced_example: they stay with the clients, and survive a crash."""

import tomllib
from pathlib import Path

import pytest
import torch
from edits import edit
from flwr.app import ConfigRecord, Message, MessageType
from local_grid import LocalGrid, play
from paths import ADVANCED, advanced
from runs import copy_example, finished
from test_resume import ARGUMENTS, kill_everything, killed_in_round_2

import launch
from launcher.arguments import parse
from launcher.project import UsageError
from models import make_model
from personal import personal_names, shared
from rounds import history

CONFIG = tomllib.loads((ADVANCED / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
CLIENTS, ROUNDS = 3, 4
SETTINGS = {
    **CONFIG,
    **{"personal-layers": "fc3", "partitioner": "iid", "num-server-rounds": ROUNDS, "device": "cpu"},
    **{"min-clients": CLIENTS, "sampled-clients": 2, "learning-rate": 0.05},
}
HEAD = {"fc3.weight", "fc3.bias"}
BODY = set(make_model("cnn").state_dict()) - HEAD


@pytest.fixture(scope="module", autouse=True)
def small_data(data_dir: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", str(data_dir))
        patch.setenv("DATASET", "synthetic")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LocalGrid]:
    """A run that nothing happens to: two of three clients train in each round, two evaluate."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, play(folder, CLIENTS, SETTINGS)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ("", []),
        ("fc3", ["fc3.weight", "fc3.bias"]),
        ("fc3.bias", ["fc3.bias"]),
        (" fc3, fc1.bias,", ["fc1.bias", "fc3.weight", "fc3.bias"]),
    ],
)
def test_layers_are_named_by_what_stands_before_a_dot(layers: str, found: list[str]) -> None:
    state = make_model("cnn").state_dict()
    assert personal_names(state, layers) == found
    assert list(shared(state, layers)) == [name for name in state if name not in found]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("personal-layers=fc",), "personal-layers=fc: the model has no 'fc'; it has conv1, conv2, fc1, fc2, fc3"),
        (("personal-layers=fc3,fc9",), "the model has no 'fc9'"),
        (("personal-layers=conv1,conv2,fc1,fc2,fc3",), "that is the whole model, and nothing is left to share"),
        (("personal-layers=fc3", "model=resnet18"), "the model has no 'fc3'; it has conv1, bn1, layer1"),
        (("personal-layers=fc3", "strategy=krum"), "personal-layers don't go with krum"),
    ],
)
def test_what_can_not_be_personal_is_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        launch.check(parse(["5", "5", "5", "1", *settings], ADVANCED, environment={}))
    assert words in str(refusal.value)


def test_a_model_that_is_shared_can_be_gone_on_with(whole: tuple[Path, LocalGrid], tmp_path: Path) -> None:
    """It lacks the personal layers, and nothing else."""
    start = f"init-from={whole[0] / 'model.pt'}"
    launch.check(parse([start, "personal-layers=fc3"], ADVANCED, environment={}))
    for layers in ("personal-layers=", "personal-layers=fc3.bias"):
        with pytest.raises(UsageError, match=r'does not hold the weights of model=cnn: .*"fc3.weight"'):
            launch.check(parse([start, layers], ADVANCED, environment={}))
    again = play(tmp_path / "again", CLIENTS, {**SETTINGS, "num-server-rounds": 1, "init-from": start[10:]})
    assert same(again.sent[-1].content["arrays"].to_torch_state_dict(), weights(tmp_path / "again/model.pt"))


# --- A run -----------------------------------------------------------------------------------------------------------


def test_personal_layers_are_in_no_message(whole: tuple[Path, LocalGrid]) -> None:
    folder, grid = whole
    carried = [
        set(record) for message in (*grid.sent, *grid.replies) for record in message.content.array_records.values()
    ]
    assert len(carried) == ROUNDS * 6  # two are sent weights and two send them back; two more are sent weights
    assert all(names == BODY for names in carried)
    for name in ("model.pt", "best.pt"):
        assert set(weights(folder / name)) == BODY
    assert set(torch.load(folder / "checkpoint.pt", weights_only=True)["arrays"]["ArrayRecord"]) == BODY


def test_the_server_does_not_test_half_a_model(whole: tuple[Path, LocalGrid]) -> None:
    record = history.load(whole[0])
    assert [entry["round"] for entry in record["rounds"]] == [1, 2, 3, 4]
    assert not any("server" in entry for entry in record["rounds"])
    assert record["accuracy"] == record["rounds"][-1]["evaluate"]["accuracy"]


def test_each_client_has_layers_of_its_own_and_tests_with_them(whole: tuple[Path, LocalGrid]) -> None:
    folder, grid = whole
    heads = {}
    for context in grid.contexts.values():
        client = context.node_config["partition-id"]
        heads[client] = context.state["personal-layers"].to_torch_state_dict()
        files = sorted(folder.glob(f"personal/client-{client}-round-*.pt"))
        assert 1 <= len(files) <= 2
        assert same(weights(files[-1]), heads[client])
        assert set(heads[client]) == HEAD
    assert not same(heads[0], heads[1])
    last = history.load(folder)["rounds"][-1]["evaluate"]
    for row in last["by_client"]:
        net = make_model("cnn")
        net.load_state_dict({**weights(folder / "model.pt"), **heads[row["partition-id"]]})
        _, held_out = advanced("client").load_data(grid.contexts[100 + row["partition-id"]])
        found = advanced("client").cifar_utils.test(net, held_out, "cpu")
        assert {key: row[key] for key in found} == pytest.approx(found)


def test_the_first_round_is_as_without_personal_layers(whole: tuple[Path, LocalGrid], tmp_path: Path) -> None:
    """All begin with the run's first model, and draw the same order of examples."""
    plain = play(tmp_path / "plain", CLIENTS, {**SETTINGS, "personal-layers": "", "num-server-rounds": 1})
    for with_head, without in zip(whole[1].replies[3:5], plain.replies[3:5], strict=True):
        found = without.content["arrays"].to_torch_state_dict()
        assert same(with_head.content["arrays"].to_torch_state_dict(), shared(found, "fc3"))
    assert not list((tmp_path / "plain").glob("personal*"))


def test_only_what_is_shared_is_held_near_the_global_model() -> None:
    net = make_model("cnn")
    term = advanced("client").proximal_term(net, 1.0, "fc3")
    with torch.no_grad():
        net.fc3.bias += 2.0
    assert float(term().detach()) == 0
    with torch.no_grad():
        net.fc2.bias[0] += 2.0
    assert float(term().detach()) == pytest.approx(2.0)


# --- A crash ---------------------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


@pytest.mark.parametrize("phase", [MessageType.TRAIN, MessageType.EVALUATE])
@pytest.mark.parametrize("crash", [1, 3, 4])
def test_a_run_that_crashed_ends_as_if_nothing_had_been(
    crash: int, phase: str, whole: tuple[Path, LocalGrid], tmp_path: Path
) -> None:
    """The server ends where the second client is asked, and with it all that Flower kept for the clients."""
    asked = []

    def watch(message: Message) -> None:
        config: ConfigRecord | dict = message.content.config_records.get("config", {})
        if (config.get("server-round"), message.metadata.message_type) == (crash, phase):
            asked.append(message)
        if len(asked) == 2:
            raise Crash

    with pytest.raises(Crash):
        play(tmp_path / "run", CLIENTS, SETTINGS, watch)
    record = history.load(tmp_path / "run")
    assert "model_sha256" not in record
    play(tmp_path / "run", CLIENTS, SETTINGS)
    folder, _ = whole
    for name in ("model.pt", "best.pt"):
        assert same(weights(tmp_path / "run" / name), weights(folder / name))
    kept = sorted(path.name for path in folder.glob("personal/*"))
    assert sorted(path.name for path in (tmp_path / "run").glob("personal/*")) == kept
    assert all(same(weights(tmp_path / "run/personal" / name), weights(folder / "personal" / name)) for name in kept)
    rounds, again = (history.load(one)["rounds"] for one in (folder, tmp_path / "run"))
    assert [entry["evaluate"]["accuracy"] for entry in again] == [entry["evaluate"]["accuracy"] for entry in rounds]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["simulation", "deployment"])
def test_a_killed_run_ends_as_one_that_was_never_stopped(engine: str, tmp_path: Path, data_dir: Path) -> None:
    """One run goes on from the files; the other writes none, so that it has what the engine keeps for its clients."""
    whole, killed = (copy_example("advanced_example", tmp_path / name / "advanced_example") for name in ("a", "b"))
    edit(whole / "personal.py", ("        history.write_whole(path, content.getvalue())\n", ""))
    layers = ("personal-layers=fc3",)
    one = finished(whole, *ARGUMENTS, *layers, data_dir=data_dir, ENGINE=engine)
    other = killed_in_round_2(killed, data_dir, kill_everything, engine, more=layers)
    resumed = finished(killed, "resume=latest", data_dir=data_dir)
    assert resumed.process.returncode == 0, resumed.stdout + resumed.stderr
    assert not list(one.run_dir.glob("personal/*"))
    assert list(other.run_dir.glob("personal/*"))
    assert one.history["model_sha256"] == other.history["model_sha256"]
    tested = [[entry["evaluate"]["accuracy"] for entry in run.history["rounds"]] for run in (one, other)]
    assert tested[0] == tested[1]
    assert len(tested[0]) == 3
