"""The scripts that figures come from: on small data they run to the end, and what they say is true."""

import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from runs import ROOT, copy_example, environment, finished


def benchmark(name: str, *arguments: object, data_dir: Path, through: Sequence[str] = ()) -> str:
    command = [*through, sys.executable, ROOT / "benchmarks" / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, env=environment(data_dir), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_of_multiprocessing_is_what_a_plain_loop_computes(tmp_path: Path, data_dir: Path) -> None:
    """As one of basic, in test_runs.py: without Flower, it ends with the same model and accuracy."""
    said = benchmark("floor", "multiprocessing", 6, 2, 2, data_dir=data_dir)
    folder = copy_example("multiprocessing", tmp_path / "multiprocessing")
    run = finished(folder, 6, 6, 2, 2, data_dir=data_dir, ENGINE="simulation")
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert f"accuracy {run.history['accuracy']:.3f}, model_sha256 {run.history['model_sha256']}" in said


@pytest.mark.slow
def test_a_cluster_of_two_nodes_is_made_and_measured(tmp_path: Path, data_dir: Path) -> None:
    benchmark("cluster", "--rounds", 3, "--pictures", 10, "--out", tmp_path, data_dir=data_dir)
    said = (tmp_path / "cluster.md").read_text()
    assert re.search(r"(?m)^\| 1 \| [\d.]+ \| 1\.00 \|$\n^\| 2 \| [\d.]+ \| [\d.]+ \|$", said)
    costs = [float(cost) for cost in re.findall(r"(?m)^\| [\d.,]+(?: million)? \| ([\d.]+) \|$", said)]
    assert 0 < costs[0] < costs[1]
    assert "| 11.2 million | 1,000 | 89.4 | " in said  # GB: 4 bytes, there and back


# --- common.py -------------------------------------------------------------------------------------------------------

RECORD = """
mkdir -p runs/20261101-000000-$$
echo '{"status": "STATUS", "rounds": []}' > runs/20261101-000000-$$/history.json
"""


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("common")


@pytest.fixture
def played(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a few lines of shell in the place of ./run.sh."""
    monkeypatch.setattr(common, "ROOT", tmp_path)
    script = tmp_path / "example" / "run.sh"
    script.parent.mkdir()

    def play(lines: str, **options: Any) -> dict[str, Any]:
        script.write_text(f"#!/usr/bin/env bash\ncd {script.parent}\n{lines}\n")
        script.chmod(0o755)
        return common.run_example("example", **options)

    return play


def test_a_run_that_fails_is_said_to(played) -> None:
    record = played(RECORD.replace("STATUS", "completed"))
    assert (record["status"], record["rounds"], record["folder"].parent.name) == ("completed", [], "runs")
    failing = f"{RECORD.replace('STATUS', 'failed')}\necho no memory\nexit 1"
    assert played(failing, may_fail=True)["status"] == "failed"
    refused = played("echo first\necho 'error: too many clients' >&2\nexit 2", may_fail=True)
    assert (refused["status"], refused["reason"]) == ("failed", "error: too many clients")
    with pytest.raises(SystemExit, match="no memory"):
        played(failing)
    stopped = played(f"{RECORD.replace('STATUS', 'stopped')}\nexec sleep 30", may_fail=True, limit=0.1)
    assert (stopped["status"], stopped["reason"]) == ("stopped", "not done within 0 s")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_is_of_all_processes(common: ModuleType, played) -> None:
    """Of the launcher, the leader of another session, a process in that, and one in a third session."""
    memory = common.Memory()
    played(f"setsid bash -c 'setsid sleep 2 & sleep 2; wait' &\nwait\n{RECORD}", memory=memory)
    assert memory.processes == 4
    assert 0.1 < memory.peak < 50


# --- warm.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def warm(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delitem(sys.modules, "warm", raising=False)
    return importlib.import_module("warm")


def recorded(seconds: float, sha256: str = "a") -> dict[str, Any]:
    """A history of two rounds."""
    versions = {"python": "3.11.7", "flwr": "1.42.0"}
    data = {"dataset": "cifar10", "dataset_source": "torchvision", "model_sha256": sha256, "versions": versions}
    rounds = [{"seconds": 1.0}, {"seconds": 2.0}]
    return {"status": "completed", "seconds": seconds, "startup_seconds": 2.0, "rounds": rounds, **data}


def test_warm_compares_turn_by_turn_and_says_what_failed(
    warm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, int]] = []

    def run_example(name: str, clients: int, *counts: int, engine: str, memory: Any, **options: Any) -> dict[str, Any]:
        asked.append((engine, options["WARM"], clients))
        if memory:
            memory.peak, memory.processes = {"0": 4000.0, "1": 1000.0}[options["WARM"]], 7
        if (options["WARM"], clients) == ("0", 40):
            return {"status": "failed", "reason": "client-3 ended with status -9", "rounds": []}
        turn = asked.count(asked[-1])  # the machine becomes slower from turn to turn; memory is looked at in the first
        seconds = {("deployment", "0"): 60, ("deployment", "1"): 24, ("simulation", "1"): 20}[engine, options["WARM"]]
        return recorded(seconds * turn, sha256="b" if engine == "simulation" and clients == 40 else "a")

    monkeypatch.setattr(warm, "run_example", run_example)
    monkeypatch.setattr(sys, "argv", ["warm.py", "--clients", "3", "40", "--repeats", "2", "--out", str(tmp_path)])
    warm.main()
    said = (tmp_path / "warm.md").read_text()
    for line in (
        "| `basic 3 3 3 3` | cold | 150.0 | 2.0 | 1.5 | 4000 | 7 | yes |",  # the median of 120 and 180
        "| `basic 3 3 3 3` | warm | 60.0 | 2.0 | 1.5 | 1000 | 7 | yes |",
        "| `basic 3 3 3 3` | 0.40 | 1.20 | 0.25 | 1.00 |",
        "| `basic 40 40 5 2` | cold | failed |  |  | 4000 | 7 |  |",
        "| `basic 40 40 5 2` | simulation | 50.0 | 2.0 | 1.5 | 1000 | 7 | NO |",
        "| `basic 40 40 5 2` |  | 1.20 |  | 1.00 |",
        "- `basic 40 40 5 2`, cold: client-3 ended with status -9",
    ):
        assert f"{line}\n" in said, said
    assert asked[:3] == [("deployment", "0", 3), ("deployment", "1", 3), ("simulation", "1", 3)]
    assert asked.count(("deployment", "0", 40)) == 1  # what failed is not tried again
    assert (tmp_path / "warm.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_warm_measures_all_processes(tmp_path: Path, data_dir: Path) -> None:
    benchmark("warm", "--clients", 1, "--repeats", 1, "--out", tmp_path, data_dir=data_dir)
    page = (tmp_path / "warm.md").read_text()
    cold, warm, simulation = (
        next(line.split(" | ") for line in page.splitlines() if f"`basic 1 1 1 2` | {way} |" in line)
        for way in ("cold", "warm", "simulation")
    )
    assert [row[-1] for row in (cold, warm, simulation)] == ["yes |"] * 3, page
    assert int(cold[5]) > int(warm[5]) > 300, page  # MiB
    assert int(cold[6]) > 2 * 2, page  # the SuperLink and a SuperNode, each with a superexec
    assert int(warm[6]) > 2 * 2, page
    assert int(simulation[6]) > 6, page  # Ray


# --- privacy.py ------------------------------------------------------------------------------------------------------


def test_privacy_asks_for_each_epsilon_and_draws_what_came_out(
    common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_of_privacy", ROOT / "benchmarks/privacy.py")
    privacy = importlib.util.module_from_spec(spec)  # advanced_example has a module of the same name
    spec.loader.exec_module(privacy)

    def run_example(name: str, *words: Any) -> dict[str, Any]:
        counts, given = words[:4], dict(word.split("=") for word in words[4:])
        assert (name, counts) == ("advanced_example", (6, 6, 6, 2))
        target = float(given.get("dp-target-epsilon", 0))
        rounds = [{"server": {"accuracy": value}} for value in (0.1, 0.4 if target == 8 else 0.5, 0.3)]
        spent = {"privacy": {"epsilon": 7.996}} if target else {}
        config = {"num-server-rounds": 2, "dp-delta": 1e-5, "dp-noise": target / 4}
        return {**recorded(9.0), "rounds": rounds, "clients": 6, "accuracy": 0.3, "config": config, **spent}

    monkeypatch.setattr(privacy, "run_example", run_example)
    words = ["--clients", "6", "--rounds", "2", "--epsilons", "8", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["privacy.py", *words])
    privacy.main()
    said = (tmp_path / "privacy.md").read_text()
    assert "| no noise |  |  | 0.500 | 0.500 | 0.300 |\n| 8 | 2 | 8.00 | 0.400 | 0.400 | 0.300 |\n" in said
    assert said.startswith(
        "6 clients, all of them in each of 2 rounds; delta 1e-05, for adding or removing one client;"
    )
    assert (tmp_path / "privacy.png").read_bytes().startswith(b"\x89PNG")


# --- Others ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accuracy_goes_on_with_a_run_that_was_stopped(tmp_path: Path, data_dir: Path) -> None:
    """In a copy of the collection, so that it finds no run but its own."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    copy_example("basic", tmp_path / "basic")
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
def test_value_has_all_ways_in_all_settings(tmp_path: Path, data_dir: Path) -> None:
    said = benchmark("value", "--clients", 2, "--passes", 1, "--out", tmp_path, data_dir=data_dir)
    ways = "in one place | federated | personal head | fine-tuned | alone, mean | alone, worst | alone, best"
    assert f"| accuracy | {ways} |" in said
    rows = [line for line in said.splitlines() if re.match(r"\| .*, (test split|own held-out) \|", line)]
    assert len(rows) == 6
    assert all(0 <= float(cell) <= 1 for row in rows for cell in row.split(" | ")[1:-1])
    assert (tmp_path / "value.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_verify_finds_two_runs_the_same_in_both_engines(data_dir: Path) -> None:
    command = [sys.executable, ROOT / "tools/verify.py", "--both-engines", "basic", "3", "3", "2", "2"]
    done = subprocess.run(command, env=environment(data_dir), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, bit for bit, in all rounds" in done.stdout


@pytest.mark.slow
def test_verify_tells_two_runs_apart(tmp_path: Path, data_dir: Path) -> None:
    """A client that draws from the clock is found out; the task has no accuracy."""
    collection = tmp_path / "collection"
    (collection / "tools").mkdir(parents=True)
    for name in ("run.sh", "tools/verify.py"):
        shutil.copy(ROOT / name, collection / name)
    folder = copy_example("basic", collection / "basic")
    drift = "import time\n    net.fc3.bias.data += 1e-6 * (time.time() % 1)\n    train_loss = "
    for file, old, new in (
        ("client.py", "train_loss = ", drift),
        ("cifar_utils.py", ', "accuracy": correct / seen}', "}"),
    ):
        text = (folder / file).read_text()
        assert text.count(old) == 1
        (folder / file).write_text(text.replace(old, new))
    command = [sys.executable, collection / "tools/verify.py", "basic", "2", "2", "2", "1"]
    done = subprocess.run(command, env=environment(data_dir, ENGINE="simulation"), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NOT the same" in done.stdout
