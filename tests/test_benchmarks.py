"""The scripts that figures come from: on small data they run to the end, and what they say is true."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, copy_example, environment, finished


def benchmark(name: str, *arguments: object, data_dir: Path) -> str:
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, env=environment(data_dir), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("example", "arguments"),
    [
        ("basic", (4, 2, 2)),
        pytest.param("multiprocessing", (6, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_a_run_is_what_a_plain_loop_computes(
    example: str, arguments: tuple[int, int, int], tmp_path: Path, data_dir: Path
) -> None:
    """FedAvg in forty lines, without Flower, ends with the same model and accuracy."""
    clients, sampled, rounds = arguments
    said = benchmark("floor", example, *arguments, data_dir=data_dir)
    folder = copy_example(example, tmp_path / example)
    run = finished(folder, clients, clients, sampled, rounds, data_dir=data_dir, ENGINE="simulation")
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert f"accuracy {run.history['accuracy']:.3f}, model_sha256 {run.history['model_sha256']}" in said


@pytest.mark.slow
def test_accuracy_goes_on_with_a_run_that_was_stopped(tmp_path: Path, data_dir: Path) -> None:
    """In a copy of the collection, so that it finds no run but its own."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    runs = copy_example("advanced_example", tmp_path / "advanced_example") / "runs"
    command = [sys.executable, tmp_path / "benchmarks/accuracy.py", "--rounds", "3", "dirichlet"]
    with subprocess.Popen(command, env=environment(data_dir), stdout=subprocess.PIPE, text=True) as first:
        deadline = time.monotonic() + 120
        while not list(runs.glob("2*/checkpoint.pt")):
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.05)
        (run,) = runs.glob("2*")
        os.kill(int(run.name.rpartition("-")[2]), signal.SIGTERM)
        assert first.wait(60) != 0
    for _ in range(2):  # goes on, and then finds all of it there
        done = subprocess.run(command, env=environment(data_dir), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        history = json.loads((run / "history.json").read_text())
        assert [entry["round"] for entry in history["rounds"]] == [0, 1, 2, 3]
        last = history["rounds"][3]["server"]["accuracy"]
        assert "| dirichlet | 0.625 +- 0.004 | 0.682 | " in done.stdout
        assert f"| {last:.3f} |" in done.stdout
        assert list(runs.glob("2*")) == [run]


@pytest.mark.slow
def test_verify_finds_two_runs_the_same_in_both_engines(data_dir: Path) -> None:
    command = [sys.executable, ROOT / "tools/verify.py", "--both-engines", "basic", "3", "3", "2", "2"]
    done = subprocess.run(command, env=environment(data_dir), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, bit for bit, in all rounds" in done.stdout


@pytest.mark.slow
def test_verify_tells_two_runs_apart(tmp_path: Path, data_dir: Path) -> None:
    """A client that draws from the clock is found out."""
    collection = tmp_path / "collection"
    (collection / "tools").mkdir(parents=True)
    for name in ("run.sh", "tools/verify.py"):
        shutil.copy(ROOT / name, collection / name)
    client = copy_example("basic", collection / "basic") / "client.py"
    line = "    net = load_model(message)\n    batches, _"
    text = client.read_text()
    assert line in text
    client.write_text(
        text.replace(line, f"    import time, torch\n{line}").replace(
            "    train_loss = ", "    net.fc3.bias.data += 1e-6 * (time.time() % 1)\n    train_loss = "
        )
    )
    command = [sys.executable, collection / "tools/verify.py", "basic", "2", "2", "2", "1"]
    done = subprocess.run(command, env=environment(data_dir, ENGINE="simulation"), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NOT the same" in done.stdout
