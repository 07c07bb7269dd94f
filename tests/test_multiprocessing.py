"""multiprocessing, end to end: work in child processes, what goes wrong in them, and what the parents keep."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import Launch, copy_example, finished
from test_faults import edit

FAULTS = """
    if server_round == 1 and partition_id == 0:
        raise ValueError("bad work")
    if server_round == 1 and partition_id == 1:
        signal.raise_signal(signal.SIGKILL)
    if server_round == 1 and partition_id == 2:
        bytearray(2**30)
    if server_round == 1 and partition_id == 3:
        Event().wait()
"""
REASONS = {
    0: "ValueError: bad work",
    1: "ChildDied: train: the child process was killed by SIGKILL",
    2: "MemoryError",
    3: "TimeoutError: train was ended: it took longer than 8 s",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_example("multiprocessing", tmp_path / "multiprocessing")


def break_children(folder: Path) -> None:
    """Let each of four clients fail in its own way in the first round, after it has trained."""
    line = '    return _arrays(net), {"train_loss"'
    unpack = '    partition_id, server_round = data["partition_id"], data["server_round"]'
    edit(folder / "work.py", line, unpack + FAULTS + line)
    edit(folder / "work.py", "import os\n", "import os\nimport signal\nfrom threading import Event\n")


@pytest.mark.parametrize("engine", ["simulation", pytest.param("deployment", marks=pytest.mark.slow)])
def test_children_that_fail_cost_a_round_no_more_than_their_replies(engine: str, folder: Path, data_dir: Path) -> None:
    break_children(folder)
    limits = ("child-memory=800", "child-timeout=8")
    run = finished(folder, 6, 6, 6, 2, *limits, data_dir=data_dir, ENGINE=engine)
    assert run.process.returncode == 0, run.stdout + run.stderr
    first, second = run.history["rounds"][1:]
    reasons = {failure["partition-id"]: failure["reason"] for failure in first["train"]["failures"]}
    assert first["train"]["clients"] == 2
    assert sorted(reasons) == sorted(REASONS)
    for partition, words in REASONS.items():
        assert f"partition {partition}: {words}" in reasons[partition]
        assert words in run.log("run")
    assert second["train"]["clients"] == 6  # each is back: what failed was a child
    assert second["train"]["failures"] == []
    assert run.nothing_left()


@pytest.fixture
def hanging(folder: Path, data_dir: Path) -> Iterator[Launch]:
    """A run whose clients' children are all in the middle of their work, and stay there."""
    line = '    return _arrays(net), {"train_loss"'
    edit(folder / "work.py", line, f'    os.system("sleep 600")\n{line}')
    with Launch(folder, 2, 2, 2, 2, data_dir=data_dir) as run:
        run.wait_until(lambda: len(run.pids("^sleep 600")) == min(2, os.cpu_count() or 1))
        yield run


def test_the_fork_server_is_killed(hanging: Launch) -> None:
    """No client could do anything any more: the run says so, rather than fail client by client."""
    launcher = hanging.process.pid
    own = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (server,) = {int(pid) for pid in own} & set(hanging.pids("fork_server.py"))  # the other ones are its children
    os.kill(server, signal.SIGKILL)
    assert hanging.wait(30) == 1
    assert "the fork server ended with status -9" in hanging.stderr
    assert hanging.history["status"] == "failed"
    assert hanging.nothing_left()


def test_ctrl_c_ends_the_children(hanging: Launch) -> None:
    os.killpg(hanging.process.pid, signal.SIGINT)
    assert hanging.wait(30) == 130
    assert hanging.nothing_left()


@pytest.mark.slow
def test_the_launcher_is_killed(hanging: Launch) -> None:
    hanging.process.kill()
    hanging.process.wait()
    assert hanging.nothing_left(within=15)


# --- With and without isolation --------------------------------------------------------------------------------------

VARIANTS = {
    "isolated": ("simulation", "isolation=true"),
    "in place": ("simulation", "isolation=false"),
    "deployment": ("deployment", "isolation=true"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> dict[str, Launch]:
    """The same work in three ways; each parent says with its memory whether it has imported PyTorch."""
    made = {}
    for name, (engine, isolation) in VARIANTS.items():
        folder = copy_example("multiprocessing", tmp_path_factory.mktemp("runs") / "multiprocessing")
        for file, who in (("client.py", "client"), ("server.py", "server")):
            said = f'"{who} has torch": float("torch" in __import__("sys").modules)'
            edit(folder / file, f'"{who}": work.resident()', f'"{who}": work.resident(), {said}')
        evaluation = f"client-evaluation={'true' if name == 'isolated' else 'false'}"
        made[name] = finished(folder, 3, 3, 3, 2, isolation, evaluation, data_dir=data_dir, ENGINE=engine)
        assert made[name].process.returncode == 0, made[name].stdout + made[name].stderr
    return made


def test_all_ways_give_the_same_model(runs: dict[str, Launch]) -> None:
    assert len({run.history["model_sha256"] for run in runs.values()}) == 1


@pytest.mark.parametrize(("name", "has_torch"), [("isolated", 0), ("in place", 1), ("deployment", 0)])
def test_only_without_isolation_parents_import_torch(name: str, has_torch: float, runs: dict[str, Launch]) -> None:
    for entry in runs[name].history["rounds"]:
        assert entry["memory"]["server has torch"] == has_torch
        assert entry["memory"].get("client has torch", has_torch) == has_torch
    assert "client has torch" in entry["memory"]


@pytest.mark.parametrize("name", VARIANTS)
def test_each_round_has_its_memory(name: str, runs: dict[str, Launch]) -> None:
    first, *rounds = runs[name].history["rounds"]
    assert first["memory"].keys() == {"server", "server's child", "server has torch"}  # nobody has trained yet
    for entry in rounds:
        memory = entry["memory"]
        assert set(memory) >= {"client", "client's child", "server", "server's child"}
        assert all(0 < memory[who] < 10_000 for who in ("client", "client's child", "server", "server's child"))
        if name != "in place":  # a child has PyTorch, and its parent has not
            assert memory["client's child"] > memory["client"]


def test_the_picture_has_a_third_panel_for_the_memory(runs: dict[str, Launch]) -> None:
    for run in runs.values():
        head = (run.run_dir / "history.png").read_bytes()[:24]
        assert int.from_bytes(head[16:20]) == 3 * 540  # pixels from left to right


def test_clients_evaluate_only_where_they_are_asked_to(runs: dict[str, Launch]) -> None:
    for name, run in runs.items():
        for entry in run.history["rounds"][1:]:
            assert ("evaluate" in entry) == (name == "isolated")
    assert entry["server"]["accuracy"] == run.history["accuracy"]
    for entry in runs["isolated"].history["rounds"][1:]:
        assert entry["evaluate"]["clients"] == 3
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
