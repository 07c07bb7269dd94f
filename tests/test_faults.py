"""Tests that what goes wrong in a run ends in a clear error and an honest exit status, or is survived."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from edits import edit
from runs import Launch, copy_example, finished

import cifar_data

both = pytest.mark.parametrize("engine", ["deployment", pytest.param("simulation", marks=pytest.mark.slow)])


@pytest.fixture
def basic(tmp_path: Path) -> Path:
    return copy_example("basic", tmp_path / "basic")


# --- Code that fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["simulation", pytest.param("deployment", marks=pytest.mark.slow)])
def test_server_py_raises(engine: str, basic: Path, data_dir: Path) -> None:
    """The traceback that is shown is the user's, though Flower wraps it in others."""
    raises = "    config = context.run_config\n    raise ValueError('a bad server')\n"
    edit(basic / "server.py", ("    config = context.run_config\n", raises))
    run = finished(basic, 1, 1, 1, 1, data_dir=data_dir, ENGINE=engine)
    assert run.process.returncode == 1
    shown = run.stderr.splitlines()
    assert "a bad server" in shown[0]
    assert shown[1] == f"--- from {run.run_dir}/logs/run.log:"
    assert shown[-2].strip() == "raise ValueError('a bad server')"
    assert shown[-1] == "ValueError: a bad server"
    assert "server.py" in shown[-3]
    assert run.history["status"] == "failed"
    assert "a bad server" in run.history["reason"]
    assert run.nothing_left()


@both
def test_every_client_raises(engine: str, basic: Path, data_dir: Path) -> None:
    raises = "    # 2. Plain PyTorch.\n    raise ValueError('a bad client')\n"
    edit(basic / "client.py", ("    # 2. Plain PyTorch.\n", raises))
    run = finished(basic, 2, 2, 2, 1, data_dir=data_dir, ENGINE=engine)
    assert run.process.returncode == 1
    assert "round 1: no client could train. The first: ValueError: a bad client" in run.stderr
    assert [failure["partition-id"] for failure in run.history["rounds"][0]["train"]["failures"]] == [0, 1]
    log = "run" if engine == "simulation" else "client-1"
    assert "raise ValueError('a bad client')" in run.log(log)
    assert not (run.run_dir / "model.pt").exists()
    assert run.nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deployment", "simulation"])
def test_a_client_fails_in_each_round(engine: str, basic: Path, data_dir: Path) -> None:
    """Its reason is said once, and counted in the table; the client can still evaluate."""
    raises = "    if context.node_config['partition-id'] == 1:\n        raise ValueError('a bad\\n client')\n"
    edit(basic / "client.py", ("    # 2. Plain PyTorch.\n", raises))
    run = finished(basic, 2, 2, 2, 2, data_dir=data_dir, ENGINE=engine)
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert [line.strip() for line in run.stdout.splitlines() if "a bad" in line] == [
        "client 1: ValueError: a bad client"
    ]
    rows = [line.split() for line in run.stdout.splitlines() if line.startswith("    ")]
    assert [row[2] for row in rows if row[0].isdecimal()] == ["1", "1"]
    for entry in run.history["rounds"]:
        assert entry["train"]["failures"] == [{"partition-id": 1, "reason": "ValueError: a bad client"}]
        assert entry["train"]["clients"] == 1
        assert entry["evaluate"]["clients"] == 2


def test_a_client_that_is_too_slow_is_named(basic: Path, data_dir: Path) -> None:
    """In a run that nobody hears, either: its input and both outputs are closed."""
    slow = "    # 2. Plain PyTorch.\n    __import__('time').sleep(60 * context.node_config['partition-id'])\n"
    edit(basic / "client.py", ("    # 2. Plain PyTorch.\n", slow))
    closed = ("bash", "-c", 'exec "$@" <&- >&- 2>&-', "-")
    run = finished(basic, 2, 2, 2, 1, "round-timeout=8", data_dir=data_dir, through=closed)
    assert (run.process.returncode, run.stdout + run.stderr) == (0, ""), run.history
    assert run.history["status"] == "completed"
    for phase in ("train", "evaluate"):  # it has not yet heard of the second
        assert run.history["rounds"][0][phase]["clients"] == 1
        assert run.history["rounds"][0][phase]["failures"] == [
            {"partition-id": 1, "reason": "no reply in time, or the client is gone"}
        ]
    assert run.nothing_left()


@pytest.mark.slow
def test_a_client_never_comes(basic: Path, data_dir: Path) -> None:
    """Killed before it connects, with MIN_CLIENTS below CLIENTS: round 1 goes on with those who are there."""
    with Launch(basic, 3, 2, 1, 1, data_dir=data_dir) as run:
        run.kill(r"flower-supernode.*partition-id=2 ")
        assert run.wait() == 0, run.stdout + run.stderr
    assert run.history["rounds"][0]["train"]["clients"] == 1
    assert run.history["startup_seconds"] < 40


# --- Data ------------------------------------------------------------------------------------------------------------


def broken(data_dir: Path, to: Path, kind: str) -> Path:
    """Copy the data, break the training pictures, and return the copy."""
    data = shutil.copytree(data_dir, to)
    images = data / "synthetic/train_images.npy"
    if kind == "truncated":
        images.write_bytes(images.read_bytes()[:-1000])
    else:
        images.write_text("no array")
    return data


@pytest.mark.parametrize("kind", ["truncated", "no array"])
def test_data_that_is_not_as_it_should_be(
    kind: str, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = broken(data_dir, tmp_path / "data", kind)
    monkeypatch.setenv("DATA_DIR", str(data))
    with pytest.raises(ValueError, match=f"^can't read train: .*{re.escape(str(data / 'synthetic'))}"):
        cifar_data.load_split("train", "synthetic")


def test_a_run_looks_at_its_data_before_anything_starts(basic: Path, tmp_path: Path, data_dir: Path) -> None:
    data = broken(data_dir, tmp_path / "data", "truncated")
    run = finished(basic, data_dir=data)
    assert run.process.returncode == 1
    assert run.stderr.startswith("error: can't read train: ")
    assert str(data / "synthetic") in run.stderr
    assert "flower-superlink" not in run.stdout
    assert run.history["status"] == "failed"
    assert run.nothing_left()


def test_a_run_says_once_that_cifar_10_could_not_be_had(basic: Path, tmp_path: Path, data_dir: Path) -> None:
    """And is ended as it starts: the SuperLink is there, and no client yet."""
    data = tmp_path / "data"
    shutil.copytree(data_dir / "synthetic", data / "synthetic")
    no_site = {"CIFAR10_URL": "http://127.0.0.1:1/", "NO_PROXY": "127.0.0.1"}
    with Launch(basic, data_dir=data, DATASET="auto", **no_site) as run:
        run.wait_until(lambda: "+ flower-superlink" in run.stdout)  # what is said of the data comes before
        os.killpg(run.process.pid, signal.SIGHUP)
        assert run.wait(15) == 128 + signal.SIGHUP
    assert run.nothing_left()
    assert (run.history["status"], run.history["reason"]) == ("stopped", "SIGHUP")
    said = run.stdout + run.stderr
    assert said.count("CIFAR-10 could not be downloaded") == 1
    assert said.count("WARNING: this is not CIFAR-10. CIFAR-10 could not be downloaded") == 1
    assert run.history["dataset"] == "synthetic"


@pytest.mark.slow
def test_a_full_disk(small_disk: Path, tmp_path: Path, data_dir: Path) -> None:
    """The rounds that were completed stay, the model is absent rather than a part of one, and the reason is said."""
    folder = tmp_path / "basic"  # what the run prints is kept beside it, where there is room
    folder.symlink_to(copy_example("basic", small_disk / "basic"))
    with Launch(folder, 2, 2, 2, 2, data_dir=data_dir, ENGINE="simulation") as run:
        run.found = run.wait_until(lambda: run.run_dir.resolve())
        run.wait_until(lambda: run.pids("flower-superlink"))
        free = shutil.disk_usage(small_disk).free
        (small_disk / "filler").write_bytes(bytes(free - 360 * 1024))  # enough for app and history, not for a model
        assert run.wait() == 1
    assert run.stderr.startswith("WARNING: model.pt was cut off, as by a full disk, and is removed\nerror: ")
    assert [entry["round"] for entry in run.history["rounds"]] == [1, 2]
    assert run.history["status"] == "failed"
    assert not (run.run_dir / "model.pt").exists()
    assert run.nothing_left()
