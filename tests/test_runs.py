"""Tests basic, end to end, in both engines: what a run prints, does and leaves."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from runs import ON_ONE_CORE, Launch, copy_example, finished
from test_benchmarks import benchmark
from test_report import Page, assert_self_contained, copy_collection

from rounds.averages import model_sha256

ENGINES = ("deployment", "simulation")


# SAMPLED below CLIENTS: exactly that many train, the same ones, whatever the engine and whoever is first.
CLIENTS, SAMPLED, ROUNDS = 4, 2, 2


def together(*runs: Launch) -> None:
    """Wait for runs that were started side by side."""
    for run in runs:
        with run:
            run.wait()


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for CUDA's library: the one there, built where there is a C compiler, notes in `users` who uses it."""
    folder = tmp_path_factory.mktemp("cuda")
    if compiler := shutil.which("cc"):
        command = [compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", Path(__file__).with_name("libcuda.c")]
        subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, cuda: Path) -> dict[str, Launch]:
    """`./run.sh 4 3 2 2` at a path with a space, from another working directory, twice at once: once an engine.

    The simulation is a user's who has no HOME.
    """
    folder = copy_example("basic", tmp_path_factory.mktemp("runs") / "my project")
    made = {}
    no_gpu = {"LD_LIBRARY_PATH": str(cuda), "CUDA_USERS": str(cuda / "users"), "CUDA_VISIBLE_DEVICES": "-1"}
    for engine in ENGINES:
        arguments = (CLIENTS, 3, SAMPLED, ROUNDS, "round-timeout=500")
        variables = {"ENGINE": engine, **(no_gpu if engine == "deployment" else {})}
        with pytest.MonkeyPatch.context() as patch:
            if engine == "simulation":
                patch.delenv("HOME", raising=False)
            made[engine] = run = Launch(folder, *arguments, data_dir=data_dir, cwd=Path("/"), **variables)
        run.wait_until(lambda run=run: run.run_dir)
    together(*made.values())
    return made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> dict[str, Launch]:
    """A single client for a round: without a warm Python; and with one, by the collection's run.sh, with -v."""
    root = tmp_path_factory.mktemp("alone")
    made = {"verbose": Launch(copy_collection(root / "collection"), "basic", 1, 1, 1, 1, "-v", data_dir=data_dir)}
    made["cold"] = Launch(copy_example("basic", root / "cold"), 1, 1, 1, 1, data_dir=data_dir, WARM="0")
    together(*made.values())
    made["verbose"].found = (root / "collection" / "basic" / "runs" / "latest").resolve()
    return made


@pytest.fixture(params=ENGINES)
def run(request: pytest.FixtureRequest, runs: dict[str, Launch]) -> Launch:
    return runs[request.param]


def commands(run: Launch) -> list[str]:
    return [shlex.split(line[2:])[0] for line in run.stdout.splitlines() if line.startswith("+ ")]


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
    """Those of the first client stand for all."""
    nodes = ["flower-supernode"] if run.history["engine"] == "deployment" else []
    assert commands(run) == ["flower-superlink", *nodes, "flwr"]


def test_the_history_keeps_the_contract(run: Launch) -> None:
    history = run.history
    assert history["schema"] == 1
    assert (history["example"], history["status"], history["dataset"]) == ("basic", "completed", "synthetic")
    assert (history["clients"], history["min_clients"], history["sampled"]) == (CLIENTS, 3, SAMPLED)
    assert history["config"]["round-timeout"] == 500
    assert history["config"]["num-server-rounds"] == 2
    assert 0 < history["startup_seconds"] < history["seconds"]
    assert set(history["versions"]) >= {"python", "flwr", "torch"}
    assert history["device"] == "cpu"
    assert [entry["round"] for entry in history["rounds"]] == [1, 2]
    for entry in history["rounds"]:
        assert entry["train"]["clients"] == entry["evaluate"]["clients"] == SAMPLED
        assert entry["train"]["failures"] == entry["evaluate"]["failures"] == []
        assert entry["bytes"] == SAMPLED * 3 * 62_006 * 4  # the weights to each client twice, and back once
        assert entry["seconds"] > 0
        assert 0 <= entry["evaluate"]["accuracy"] <= 1
        assert entry["train"]["loss"] > 0
        for row in entry["train"]["by_client"]:
            assert set(row) == {"partition-id", "seconds", "train_loss", "num-examples"}
            assert row["num-examples"] == 135
    assert history["accuracy"] == history["rounds"][-1]["evaluate"]["accuracy"]


def test_other_clients_are_drawn_in_each_phase(run: Launch) -> None:
    drawn = [
        tuple(row["partition-id"] for row in entry[phase]["by_client"])
        for entry in run.history["rounds"]
        for phase in ("train", "evaluate")
    ]
    assert len(set(drawn)) > 1
    assert all(who == tuple(sorted(who)) for who in drawn)


def test_the_model_is_a_plain_state_dict(run: Launch) -> None:
    from cifar_utils import Net

    state = torch.load(run.run_dir / "model.pt", weights_only=True)
    Net().load_state_dict(state)
    assert model_sha256(state) == run.history["model_sha256"]


def test_the_folder_holds_what_it_should(run: Launch) -> None:
    names = {path.name for path in run.run_dir.iterdir()} - {".lock", "clients.json"}
    assert names == {"history.json", "history.png", "model.pt", "run-config.toml", "logs", "flwr-home"}
    assert (run.run_dir / "history.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_app_is_sent_to_clients(run: Launch) -> None:
    (app,) = (run.run_dir / "flwr-home" / "apps").iterdir()
    assert {path.name for path in app.iterdir()} <= {
        *(
            "server.py",
            "client.py",
            "cifar_utils.py",
            "cifar_data",
            "rounds",
            "launcher",
            "pyproject.toml",
            "README.md",
        ),
        *("__pycache__", ".gitignore"),
    }


def test_no_process_that_stays_uses_cuda(runs: dict[str, Launch], cuda: Path) -> None:
    """Each client's own process does, which ends with its message; what forks them must not, or they couldn't."""
    if not (cuda / "libcuda.so.1").exists():
        pytest.skip("there is no C compiler (cc) here to build what stands in for CUDA's library")
    if torch.version.cuda is None:
        pytest.skip("this PyTorch is built without CUDA")
    assert runs["deployment"].process.returncode == 0
    assert set((cuda / "users").read_text().split()) == {"flwr-clientapp"}


def test_two_runs_at_once_do_not_meet(runs: dict[str, Launch]) -> None:
    deployment, simulation = runs.values()
    assert deployment.run_dir != simulation.run_dir
    assert (simulation.folder / "runs" / "latest").resolve() == simulation.run_dir.resolve()


def test_both_engines_give_the_same_model(runs: dict[str, Launch], alone: dict[str, Launch]) -> None:
    """The deployment engine with a warm Python and without, and the simulation."""
    assert len({run.history["model_sha256"] for run in runs.values()}) == 1
    assert len({run.history["model_sha256"] for run in alone.values()}) == 1


def test_a_run_is_what_a_plain_loop_computes(runs: dict[str, Launch], data_dir: Path) -> None:
    """FedAvg in forty lines, without Flower, ends with the same model and accuracy."""
    said = benchmark("floor", "basic", CLIENTS, SAMPLED, ROUNDS, data_dir=data_dir, through=ON_ONE_CORE)
    history = runs["deployment"].history
    assert f"accuracy {history['accuracy']:.3f}, model_sha256 {history['model_sha256']}" in said


def test_without_a_warm_python_it_is_stock_flower(alone: dict[str, Launch]) -> None:
    run = alone["cold"]
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert commands(run) == ["flower-superlink", "flower-supernode", "flwr"]
    assert "--isolation" not in run.stdout
    assert run.history["status"] == "completed"
    assert run.nothing_left()


def test_verbose_prints_all_that_the_server_says(alone: dict[str, Launch]) -> None:
    run = alone["verbose"]
    assert run.process.returncode == 0, run.stdout + run.stderr
    said = run.log("run").splitlines()
    assert any("Final results" in line for line in said)
    assert set(said) <= set(run.stdout.splitlines())


def test_the_collection_makes_a_page_on_a_run(alone: dict[str, Launch]) -> None:
    run = alone["verbose"]
    assert run.stdout.splitlines()[-1] == f"report: {run.run_dir / 'report.html'}"
    found = Page((run.run_dir / "report.html").read_text())
    assert_self_contained(found)
    assert "It completed 1 rounds with 1 clients" in found.text
    assert "DATASET=synthetic ./run.sh 1 1 1 1" in found.text
    assert "device of the clients cpu" in found.text


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"ENGINE": "simulation"}, {}, {"WARM": "0"}], ids=["simulation", "warm", "cold"])
def test_ten_clients_five_sampled(options: dict[str, str], tmp_path: Path, data_dir: Path, hashes: set[str]) -> None:
    run = finished(copy_example("basic", tmp_path / "basic"), 10, 8, 5, 2, data_dir=data_dir, **options)
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert [entry["train"]["clients"] for entry in run.history["rounds"]] == [5, 5]
    hashes.add(run.history["model_sha256"])
    assert len(hashes) == 1


@pytest.fixture(scope="module")
def hashes() -> set[str]:
    """The hashes of the models of those that have run before."""
    return set()


@pytest.mark.slow
def test_the_stand_in_is_worth_training_on(tmp_path: Path) -> None:
    """The whole stand-in, three rounds: better in each, and between 0.60 and 0.95 at the end."""
    run = finished(copy_example("basic", tmp_path / "basic"), data_dir=tmp_path / "data", ENGINE="simulation")
    accuracies = [entry["evaluate"]["accuracy"] for entry in run.history["rounds"]]
    assert accuracies == sorted(accuracies)
    assert 0.60 < accuracies[-1] < 0.95
