"""basic, end to end, in both engines: what a run prints, does and leaves."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import Launch, copy_example, finished

from launcher.replies import model_sha256

ENGINES = ("deployment", "simulation")


# SAMPLED below CLIENTS: exactly that many train, the same ones, whatever the engine and whoever is first.
CLIENTS, SAMPLED = 4, 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> dict[str, Launch]:
    """`./run.sh 4 3 2 2` in a folder copied to a path with a space, started from another working directory."""
    made = {}
    for engine in ENGINES:
        folder = copy_example("basic", tmp_path_factory.mktemp(engine) / "my project")
        arguments = (CLIENTS, 3, SAMPLED, 2, "learning-rate=0.02")
        made[engine] = finished(folder, *arguments, data_dir=data_dir, cwd=Path("/"), ENGINE=engine)
    return made


@pytest.fixture(params=ENGINES)
def run(request: pytest.FixtureRequest, runs: dict[str, Launch]) -> Launch:
    return runs[request.param]


def test_it_completes_and_leaves_no_process(run: Launch) -> None:
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert run.nothing_left()


def test_it_prints_rounds_and_a_summary(run: Launch) -> None:
    lines = run.stdout.splitlines()
    rounds = [line.split() for line in lines if re.match(rf" +\d+ +{SAMPLED} +0 ", line)]
    assert [words[0] for words in rounds] == ["1", "2"]
    assert re.fullmatch(
        r"basic: 2 rounds, 4 clients, dataset synthetic \(a stand-in .*NOT CIFAR-10\), "
        rf"accuracy 0\.\d{{3}}, \d+\.\d s -> {re.escape(str(run.run_dir))}",
        lines[-1],
    )


def test_it_prints_the_commands_as_one_could_type_them(run: Launch) -> None:
    commands = [shlex.split(line[2:]) for line in run.stdout.splitlines() if line.startswith("+ ")]
    nodes = CLIENTS if run.history["engine"] == "deployment" else 0
    assert [command[0] for command in commands] == ["flower-superlink", *["flower-supernode"] * nodes, "flwr"]


def test_the_history_keeps_the_contract(run: Launch) -> None:
    history = run.history
    assert history["schema"] == 1
    assert (history["example"], history["status"], history["dataset"]) == ("basic", "completed", "synthetic")
    assert (history["clients"], history["min_clients"], history["sampled"]) == (CLIENTS, 3, SAMPLED)
    assert history["config"]["learning-rate"] == 0.02
    assert history["config"]["num-server-rounds"] == 2
    assert history["seconds"] > 0
    assert set(history["versions"]) >= {"python", "flwr", "torch"}
    assert [entry["round"] for entry in history["rounds"]] == [1, 2]
    for entry in history["rounds"]:
        assert entry["train"]["clients"] == entry["evaluate"]["clients"] == SAMPLED
        assert entry["train"]["failures"] == entry["evaluate"]["failures"] == []
        assert entry["bytes"] == SAMPLED * 3 * 62_006 * 4  # the weights to each client twice, and back once
        assert 0 <= entry["evaluate"]["accuracy"] <= 1
        assert entry["train"]["loss"] > 0
    assert history["accuracy"] == history["rounds"][-1]["evaluate"]["accuracy"]


def test_the_model_is_a_plain_state_dict(run: Launch) -> None:
    from cifar_utils import Net

    state = torch.load(run.run_dir / "model.pt", weights_only=True)
    Net().load_state_dict(state)
    assert model_sha256(state) == run.history["model_sha256"]


def test_the_folder_holds_what_it_should(run: Launch) -> None:
    names = {path.name for path in run.run_dir.iterdir() if path.name != ".lock"}
    assert names == {"history.json", "history.png", "model.pt", "run-config.toml", "logs", "flwr-home"}
    assert (run.run_dir / "history.png").read_bytes().startswith(b"\x89PNG")
    assert (run.folder / "runs" / "latest").resolve() == run.run_dir.resolve()


def test_only_the_app_is_sent_to_clients(run: Launch) -> None:
    (app,) = (run.run_dir / "flwr-home" / "apps").iterdir()
    assert {path.name for path in app.iterdir()} <= {
        *("server.py", "client.py", "cifar_utils.py", "launcher", "pyproject.toml", "README.md", "__pycache__"),
        ".gitignore",
    }


def test_both_engines_give_the_same_model(runs: dict[str, Launch]) -> None:
    assert len({run.history["model_sha256"] for run in runs.values()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_ten_clients_five_sampled(engine: str, tmp_path: Path, data_dir: Path) -> None:
    run = finished(copy_example("basic", tmp_path / "basic"), 10, 8, 5, 2, data_dir=data_dir, ENGINE=engine)
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert [entry["train"]["clients"] for entry in run.history["rounds"]] == [5, 5]


@pytest.mark.slow
def test_the_stand_in_is_worth_training_on(tmp_path: Path) -> None:
    """The whole stand-in, three rounds: better in each, and between 0.60 and 0.95 at the end."""
    run = finished(copy_example("basic", tmp_path / "basic"), data_dir=tmp_path / "data", ENGINE="simulation")
    accuracies = [entry["evaluate"]["accuracy"] for entry in run.history["rounds"]]
    assert accuracies == sorted(accuracies)
    assert 0.60 < accuracies[-1] < 0.95


def test_two_runs_at_once_do_not_meet(tmp_path: Path, data_dir: Path) -> None:
    folder = copy_example("basic", tmp_path / "basic")
    with Launch(folder, 2, 2, 2, 1, data_dir=data_dir, ENGINE="simulation") as one:
        one.wait_until(lambda: one.run_dir)
        with Launch(folder, 2, 2, 2, 1, data_dir=data_dir, ENGINE="deployment") as two:
            assert (one.wait(), two.wait()) == (0, 0), one.stderr + two.stderr
    assert one.run_dir != two.run_dir
    assert one.history["model_sha256"] == two.history["model_sha256"]


def test_verbose_prints_all_that_the_server_says_and_no_home_is_needed(tmp_path: Path, data_dir: Path) -> None:
    folder = copy_example("basic", tmp_path / "basic")
    command = ["env", "-u", "HOME", f"PYTHON={sys.executable}", f"DATA_DIR={data_dir}", "DATASET=synthetic"]
    arguments = [str(folder / "run.sh"), "1", "1", "1", "1", "-v"]
    done = subprocess.run([*command, "ENGINE=simulation", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    latest = folder / "runs/latest"
    assert json.loads((latest / "history.json").read_text())["status"] == "completed"
    said = (latest / "logs/run.log").read_text().splitlines()
    assert any("Final results" in line for line in said)
    assert set(said) <= set(done.stdout.splitlines())
