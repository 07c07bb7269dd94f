"""multiprocessing, end to end: work in child processes, what goes wrong in them, and what the parents keep."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from edits import edit
from runs import Launch, copy_example, finished

from launcher.checks import cores

LINE = '    return _arrays(net), {"train_loss"'  # in work.py: what a child has after it has trained
FAULTS = """
    import signal
    import time

    import torch

    marks = Path(os.environ["FLOWER_EXAMPLE_RUN"], f"marks-{data['partition_id']}")
    with marks.open("a") as file:
        file.write("x")
    number = data["partition_id"] if marks.stat().st_size == 1 else None
    if marks.stat().st_size == 3:
        os.system("sleep 600")
    if number == 0:
        raise ValueError("bad work")
    if number == 1:
        signal.raise_signal(signal.SIGKILL)
    if number == 2:
        bytearray(2**30)
    if number == 3:
        time.sleep(600)
    if number == 4:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
"""
REASONS = {
    0: "ValueError: bad work",
    1: "ChildDied: train: the child process was killed by SIGKILL",
    2: "MemoryError",
    3: "TimeoutError: train was ended: it took longer than 8 s",
    4: "RuntimeError: the GPU's memory is full: GPU_SLOTS=1 lets fewer share it (OutOfMemoryError: CUDA out of memory.",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_example("multiprocessing", tmp_path / "multiprocessing")


def say_who_has_torch(folder: Path) -> None:
    """Let parents say with their memory whether they have imported PyTorch: 1 or 0."""
    for file, who in (("client.py", "client"), ("server.py", "server")):
        said = '"memory of torch": float("torch" in __import__("sys").modules)'
        edit(folder / file, (f'"memory of {who}": work.resident()', f'"memory of {who}": work.resident(), {said}'))


def add_nvidia_smi(folder: Path) -> str:
    """Put a program beside a folder that lists a GPU, as nvidia-smi does; return a PATH with it."""
    program = folder.parent / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ncase "$1" in *name) echo NVIDIA Pretence;; *) echo 6000;; esac\n')
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("engine", ["simulation", pytest.param("deployment", marks=pytest.mark.slow)])
def test_children_that_fail_cost_a_round_no_more_than_their_replies(engine: str, folder: Path, data_dir: Path) -> None:
    """Each of five clients fails in its own way in the first round, after it has trained.

    In the third round all children stay at their work, until Ctrl-C ends them and the run.
    In the deployment engine there are children only where a GPU is shared; and the one here nobody can compute on.
    """
    edit(folder / "work.py", (LINE, FAULTS + LINE))
    say_who_has_torch(folder)
    given = {"PATH": add_nvidia_smi(folder)} if engine == "deployment" else {}
    limits = ("child-memory=800", "child-timeout=8")
    with Launch(folder, 7, 7, 7, 3, *limits, data_dir=data_dir, ENGINE=engine, GPU_SLOTS="2", **given) as run:
        run.wait_until(lambda: len(run.pids("^sleep 600")) == 2)
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.wait(30) == 130
    assert run.nothing_left()
    first, second = run.history["rounds"][1:]
    reasons = {failure["partition-id"]: failure["reason"] for failure in first["train"]["failures"]}
    assert first["train"]["clients"] == 2
    assert sorted(reasons) == sorted(REASONS)
    for partition, words in REASONS.items():
        assert words in reasons[partition]
        assert f"client {partition}: {words}" in run.stdout
    assert all("\n" not in reason and len(reason) <= 300 for reason in reasons.values())
    assert second["train"]["clients"] == 7  # each is back: what failed was a child
    assert second["train"]["failures"] == []
    assert run.history["at_once"] == 2
    assert "Device: cpu" in run.stdout
    if engine == "simulation":  # an actor that was handed an error of PyTorch's has none of it
        assert second["memory"]["client's torch"] == 0
    else:
        assert ", room for 2 on the GPU (5.9 GiB free), about" in run.stdout
        assert run.history["gpus"] == {"0": 6000.0}
        assert second["memory"]["GPU between rounds"] == 0


@pytest.fixture
def hanging(folder: Path, data_dir: Path) -> Iterator[Launch]:
    """A run whose clients' children are all in the middle of their work, and stay there."""
    edit(folder / "work.py", (LINE, f'    os.system("sleep 600")\n{LINE}'))
    with Launch(folder, 2, 2, 2, 2, data_dir=data_dir) as run:
        run.wait_until(lambda: len(run.pids("^sleep 600")) == min(2, os.cpu_count() or 1))
        yield run


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_the_fork_server_is_killed(hanging: Launch) -> None:
    """No client could do anything any more: the run says so, rather than fail client by client."""
    found = hanging.pids("fork_server.py")
    (server,) = [pid for pid in found if parent_of(pid) not in found]  # the other ones are its children
    os.kill(server, signal.SIGKILL)
    assert hanging.wait(30) == 1
    assert "fork-server ended with status -9" in hanging.stderr
    assert hanging.history["status"] == "failed"
    assert hanging.nothing_left()


@pytest.mark.slow
def test_the_launcher_is_killed(hanging: Launch) -> None:
    hanging.process.kill()
    hanging.process.wait()
    assert hanging.nothing_left(within=15)


# --- With and without isolation --------------------------------------------------------------------------------------

VARIANTS = {
    "isolated": {"ENGINE": "simulation"},
    "in place": {"ENGINE": "simulation", "GPU_SLOTS": "1"},  # one at once: each Ray actor imports PyTorch here
    "deployment": {"ENGINE": "deployment"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> dict[str, Launch]:
    """The same work in three ways."""
    made = {}
    for name, variables in VARIANTS.items():
        folder = copy_example("multiprocessing", tmp_path_factory.mktemp("runs") / "multiprocessing")
        say_who_has_torch(folder)
        words = (f"isolation={str(name != 'in place').lower()}", f"client-evaluation={str(name == 'isolated').lower()}")
        made[name] = finished(folder, 2, 2, 2, 2, *words, data_dir=data_dir, **variables)
        assert made[name].process.returncode == 0, made[name].stdout + made[name].stderr
    return made


def test_all_ways_give_the_same_model(runs: dict[str, Launch]) -> None:
    assert len({run.history["model_sha256"] for run in runs.values()}) == 1


@pytest.mark.parametrize(("name", "has_torch"), [("isolated", 0), ("in place", 1)])
def test_only_without_isolation_parents_import_torch(name: str, has_torch: float, runs: dict[str, Launch]) -> None:
    for entry in runs[name].history["rounds"]:
        assert entry["memory"]["server's torch"] == has_torch
        assert entry["memory"].get("client's torch", has_torch) == has_torch
    assert "client's torch" in entry["memory"]


@pytest.mark.parametrize("name", VARIANTS)
def test_each_round_has_its_memory(name: str, runs: dict[str, Launch]) -> None:
    first, *rounds = runs[name].history["rounds"]
    assert first["memory"].keys() == {"server", "server's child", "server's torch"}  # nobody has trained yet
    for entry in rounds:
        memory = entry["memory"]
        assert memory.keys() == {*first["memory"], "client", "client's child", "client's torch"}
        assert all(0 < memory[who] < 10_000 for who in ("client", "client's child", "server", "server's child"))
        if name == "isolated":  # a child has PyTorch, and its parent has not
            assert memory["client's child"] > memory["client"]


def test_in_the_deployment_engine_a_clients_own_process_does_the_work(runs: dict[str, Launch]) -> None:
    """Flower makes one for each message, which gives all back as a child would: a second would only take time."""
    for entry in runs["deployment"].history["rounds"][1:]:
        assert entry["memory"]["client's child"] == pytest.approx(entry["memory"]["client"], rel=0.2)
    assert [run.history["at_once"] for run in runs.values()] == [min(2, cores()), 1, 2]


def test_the_memory_is_drawn(runs: dict[str, Launch]) -> None:
    for run in runs.values():
        head = (run.run_dir / "memory.png").read_bytes()[:24]
        assert int.from_bytes(head[16:20]) == 6 * 120  # pixels from left to right: no GPU, one panel


def test_the_device_is_said(runs: dict[str, Launch]) -> None:
    for run in runs.values():
        assert run.history["device"] == "cpu"
        assert run.stdout.count("Device: cpu") == 1
        assert "WARNING" not in run.stderr


def test_clients_evaluate_only_where_they_are_asked_to(runs: dict[str, Launch]) -> None:
    for name, run in runs.items():
        for entry in run.history["rounds"][1:]:
            assert ("evaluate" in entry) == (name == "isolated")
    assert entry["server"]["accuracy"] == run.history["accuracy"]
    for entry in runs["isolated"].history["rounds"][1:]:
        assert entry["evaluate"]["clients"] == 2
        assert 0 <= entry["evaluate"]["accuracy"] <= 1


def test_nothing_is_left(runs: dict[str, Launch]) -> None:
    assert all(run.nothing_left() for run in runs.values())


# --- Memory over many rounds -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parents_do_not_grow(folder: Path, data_dir: Path) -> None:
    run = finished(folder, 4, 4, 2, 50, data_dir=data_dir)
    assert run.process.returncode == 0, run.stdout + run.stderr
    memory = {entry["round"]: entry["memory"] for entry in run.history["rounds"]}
    for parent in ("server", "client"):
        assert memory[50][parent] <= 1.05 * memory[2][parent], f"{parent}: {[m.get(parent) for m in memory.values()]}"
