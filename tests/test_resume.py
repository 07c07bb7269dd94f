"""A run of advanced_example that was killed goes on, and ends with the same model, bit for bit."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from runs import Launch, copy_example, finished

# FedAdam has a state, two of three clients are sampled, and there are schedules: all of it must be carried over.
ARGUMENTS = (3, 2, 2, 4, "strategy=fedadam", "server-learning-rate=0.05", "warmup-rounds=3", "decay-rounds=4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Launch:
    """The run that nothing happens to."""
    folder = copy_example("advanced_example", tmp_path_factory.mktemp("whole") / "advanced_example")
    run = finished(folder, *ARGUMENTS, data_dir=data_dir, ENGINE="simulation")
    assert run.process.returncode == 0, run.stdout + run.stderr
    return run


@pytest.fixture
def advanced(tmp_path: Path) -> Path:
    return copy_example("advanced_example", tmp_path / "advanced_example")


def kill_superlink(run: Launch) -> None:
    run.kill(r"flower-superlink")


def kill_server(run: Launch) -> None:
    """The process that server.py runs in."""
    run.kill({"simulation": r"flwr-simulation", "deployment": r"flwr-serverapp"}[run.history["engine"]])


def kill_launcher(run: Launch) -> None:
    run.process.kill()


def kill_everything(run: Launch) -> None:
    """The launcher first, or it would tidy up."""
    os.killpg(run.process.pid, signal.SIGKILL)
    for pid in run.pids(""):
        with contextlib.suppress(ProcessLookupError):  # it has ended with those that were killed before it
            os.kill(pid, signal.SIGKILL)


def killed_in_round_3(folder: Path, data_dir: Path, kill, engine: str = "simulation") -> Launch:
    """Start a run, and kill something in the middle of round 3, where the clients of this copy wait for that."""
    hold, reached = folder / "hold", folder / "reached"
    client = folder / "client.py"
    text = client.read_text()
    line = '    config = message.content["config"]\n'
    assert text.count(line) == 1
    wait = f"""    while config["server-round"] == 3 and __import__("os").path.exists({str(hold)!r}):
        open({str(reached)!r}, "w").close()
        time.sleep(0.05)
"""
    client.write_text(text.replace(line, line + wait))
    hold.touch()
    with Launch(folder, *ARGUMENTS, data_dir=data_dir, ENGINE=engine) as run:
        run.wait_until(reached.exists, timeout=150)
        kill(run)
        run.wait()  # in the deployment engine, Flower takes a minute to see that the server's process is gone
    assert run.process.returncode != 0
    hold.unlink()
    return run


def without_times(history: dict) -> list[dict]:
    """The rounds, without what is not the same in two runs."""
    text = json.dumps(history["rounds"])
    return json.loads(
        text, object_hook=lambda d: {key: d[key] for key in d if "seconds" not in key and key != "memory"}
    )


@pytest.mark.parametrize(
    "kill",
    [
        kill_everything,
        pytest.param(kill_superlink, marks=pytest.mark.slow),
        pytest.param(kill_server, marks=pytest.mark.slow),
        pytest.param(kill_launcher, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_as_if_nothing_had_been(kill, whole: Launch, advanced: Path, data_dir: Path) -> None:
    killed = killed_in_round_3(advanced, data_dir, kill)
    assert [entry["round"] for entry in killed.history["rounds"]][:3] == [0, 1, 2]
    assert "model_sha256" not in killed.history
    # What clients, server and launcher had begun in round 3 is not there. ROUNDS is the total.
    resumed = finished(advanced, "resume=latest", data_dir=data_dir, DATASET="auto")
    assert resumed.process.returncode == 0, resumed.stdout + resumed.stderr
    assert killed.run_folders() == [killed.run_dir]  # the same folder
    assert killed.history["status"] == "completed"
    assert without_times(killed.history) == without_times(whole.history)
    assert killed.history["model_sha256"] == whole.history["model_sha256"]
    assert (killed.run_dir / "best.pt").read_bytes() == (whole.run_dir / "best.pt").read_bytes()
    assert killed.nothing_left()


@pytest.mark.slow
def test_it_goes_on_in_the_deployment_engine(whole: Launch, advanced: Path, data_dir: Path) -> None:
    killed = killed_in_round_3(advanced, data_dir, kill_server, "deployment")
    resumed = finished(advanced, "resume=latest", data_dir=data_dir)
    assert resumed.process.returncode == 0, resumed.stdout + resumed.stderr
    assert killed.history["engine"] == "deployment"
    assert killed.history["model_sha256"] == whole.history["model_sha256"]


def test_a_completed_run_goes_on_with_more_rounds(whole: Launch, tmp_path: Path, data_dir: Path) -> None:
    """By the folder's name, and from another place; what it has done stays as it was."""
    folder = shutil.copytree(whole.folder, tmp_path / "copy", symlinks=True)
    name = whole.run_dir.name
    run = finished(folder, 3, 2, 2, 5, f"resume={name}", data_dir=data_dir, cwd=tmp_path, ENGINE="simulation")
    assert run.process.returncode == 0, run.stdout + run.stderr
    history = json.loads((folder / "runs" / name / "history.json").read_text())
    assert [entry["round"] for entry in history["rounds"]] == [0, 1, 2, 3, 4, 5]
    assert history["rounds"][:5] == whole.history["rounds"]
    assert history["rounds"][5]["train"]["config"]["learning-rate"] == pytest.approx(0.002)  # decay-rounds was 4
    assert history["model_sha256"] != whole.history["model_sha256"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("seed=3",), "seed was 2026"),
        (("strategy=fedavg",), "strategy was fedadam"),
        ((4, 2, 2, 4), "clients was 3"),
        ((3, 2, 2, 3), "ROUNDS, the total, was 4"),
        ((), "has completed its 4 rounds"),
    ],
)
def test_changed_settings_are_refused(arguments: tuple, words: str, whole: Launch, data_dir: Path) -> None:
    before = whole.history
    run = finished(whole.folder, *arguments, "resume=latest", data_dir=data_dir, DATASET="auto")
    assert run.process.returncode == 2
    assert words in run.stderr
    assert whole.history == before


@pytest.mark.parametrize("name", ["20200101-000000-1", "../../..", "/", "\udcff", "a" * 5000, "latest\n"])
def test_a_run_that_is_not_there_is_refused(name: str, advanced: Path, data_dir: Path) -> None:
    run = finished(advanced, f"resume={name}", data_dir=data_dir)
    assert run.process.returncode == 2
    assert run.stderr.startswith("error: resume")
    assert "there is no such run" in run.stderr or "must be text in UTF-8" in run.stderr
    assert not (advanced / "runs").exists()


def test_a_run_that_is_alive_is_not_resumed(advanced: Path, data_dir: Path) -> None:
    with Launch(advanced, *ARGUMENTS, data_dir=data_dir, ENGINE="simulation") as run:
        run.wait_until(lambda: run.pids("flower-superlink"))
        second = finished(advanced, "resume=latest", data_dir=data_dir, DATASET="auto")
        assert second.process.returncode == 2
        assert "is still running" in second.stderr
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(30) == 143
