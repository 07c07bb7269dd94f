"""The plan before the start: what it takes into account, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import ROOT
from runs import environment

FOLDER = ROOT / "multiprocessing"
sys.path.append(str(FOLDER))  # behind basic, whose launcher is the same

import capacity  # noqa: E402
from launcher import arguments, engine  # noqa: E402
from launcher.values import UsageError  # noqa: E402

MACHINE = 24.0 * 1024, 20.0 * 1024  # MiB: all, free


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, 24 GiB, no GPU."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(capacity, "machine_memory", lambda: MACHINE)
    monkeypatch.setattr(capacity, "gpu_memory", lambda: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text((FOLDER / "pyproject.toml").read_text())
    return tmp_path


def settings(folder: Path, *words: object, **variables: str) -> arguments.Settings:
    parsed = arguments.parse([str(word) for word in words], folder, {"DATASET": "synthetic", **variables})
    assert isinstance(parsed, arguments.Settings)
    return parsed


def write_run(folder: Path, name: str, *words: object, memory: dict[str, float] | None = None, **other: Any) -> None:
    """A run with rounds of 4 s, and 20 s beside, of which 5 are in the first round, where a simulation starts Ray."""
    asked = settings(folder, *words)
    numbers = range(asked.config["num-server-rounds"] + 1)
    history = {
        **{"engine": asked.engine, "dataset": "synthetic", "status": "completed", "config": asked.config},
        **{"clients": asked.clients, "sampled": asked.sampled, "seconds": 20.0 + 4.0 * (len(numbers) - 1)},
        "rounds": [{"round": i, "seconds": 9.0 if i == 1 else 4.0, "memory": memory or {}} for i in numbers],
        **other,
    }
    (folder / "runs" / name).mkdir(parents=True)
    (folder / "runs" / name / "history.json").write_text(json.dumps(history))


def gib(line: str) -> float:
    return float(re.search(r"about ([\d.]+) of 24\.0 GiB", line)[1])


def plan(capsys: pytest.CaptureFixture[str], asked: arguments.Settings) -> str:
    capacity.plan(asked)
    (line,) = capsys.readouterr().out.splitlines()
    return line


# --- The line --------------------------------------------------------------------------------------------------------


def test_one_line_which_says_that_nothing_was_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = plan(capsys, settings(folder, 100, 100, 10, 5))
    assert line.startswith("Plan: 4 of 10 clients at once, about ")
    assert line.endswith("(roughly: no such run was measured here yet)")
    assert 1 < gib(line) < 4


def test_memory_grows_with_those_at_once_and_not_with_clients(folder: Path) -> None:
    def needed(*words: object, **variables: str) -> float:
        return capacity.memory(settings(folder, *words, **variables), None)

    assert needed(10, 10, 10, 5) == needed(1000, 1000, 20, 5)
    assert needed(10, 10, 1, 5) < needed(10, 10, 4, 5) == needed(10, 10, 5, 5)
    assert needed(10, 10, 10, 5, GPU_SLOTS="2") < needed(10, 10, 10, 5)
    assert needed(10, 10, 10, 5, "isolation=false") > needed(10, 10, 10, 5)  # PyTorch in each, shared with none
    nodes = [needed(clients, clients, 2, 5, ENGINE="deployment") for clients in (10, 20)]
    assert nodes[1] - nodes[0] >= 10 * capacity.SUPERNODE


def test_what_the_last_run_measured_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = settings(folder, 100, 100, 8, 10)
    rough = gib(plan(capsys, asked))
    write_run(folder, "20260101-000000-1", 100, 100, 8, 5, memory={"client": 169, "client's child": 2415})
    line = plan(capsys, asked)
    assert gib(line) == pytest.approx(rough + 4 * 2000 / 1024, abs=0.11)
    assert line.endswith("about 60 s (by run 20260101-000000-1)")  # 20 s, and ten rounds of 4 s


def test_time_grows_with_rounds_and_with_sampled(folder: Path) -> None:
    write_run(folder, "20260101-000000-1", 100, 100, 8, 5)
    before = capacity.last_run(settings(folder))

    def seconds(*words: object) -> float:
        return capacity.seconds(settings(folder, *words), before)

    assert seconds(100, 100, 8, 5) == pytest.approx(40)
    assert seconds(100, 100, 16, 5) == pytest.approx(60)
    assert seconds(200, 200, 16, 5) < 60  # half as many examples each
    assert seconds(1000, 1000, 8, 5) < 40
    assert capacity.duration(600) == "10 min"


@pytest.mark.parametrize(
    ("words", "other"),
    [
        (["learning-rate=0.5"], {}),
        (["isolation=false"], {}),
        ([], {"engine": "deployment"}),
        ([], {"dataset": "cifar10"}),
        ([], {"status": "failed"}),
        ([], {"rounds": []}),
        ([], {"config": None}),
    ],
)
def test_only_a_completed_run_of_the_same_work_counts(folder: Path, words: list[str], other: dict[str, Any]) -> None:
    write_run(folder, "20260101-000000-1", 10, 10, 2, 3)
    write_run(folder, "20260102-000000-1", 100, 100, 8, 5, *words, **other)
    (folder / "runs" / "20260103-000000-1").mkdir()  # one that has not begun
    (folder / "runs" / "20260104-000000-1").mkdir()
    (folder / "runs" / "20260104-000000-1" / "history.json").write_text("{")
    found = capacity.last_run(settings(folder, 100, 100, 10, 50))
    assert found is not None
    assert found["name"] == "20260101-000000-1"


def test_memory_that_others_have_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "machine_memory", lambda: (24 * 1024, 512))
    assert "(only 0.5 are free now!)" in plan(capsys, settings(folder, 100, 100, 10, 5))


# --- What is refused -------------------------------------------------------------------------------------------------


def test_what_can_not_fit_is_refused_with_the_numbers(folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        capacity.plan(settings(folder, 200, 200, 10, 5, ENGINE="deployment"))
    assert re.match(
        r"200 SuperNodes, .* take about \d\d\.\d GiB of memory, and this machine has 24\.0", str(caught.value)
    )
    assert "ENGINE=simulation" in str(caught.value)
    capacity.plan(settings(folder, 20, 20, 10, 5, ENGINE="deployment"))
    capacity.plan(settings(folder, 200, 200, 10, 5))


def test_children_that_are_too_large_are_refused(folder: Path) -> None:
    write_run(folder, "20260101-000000-1", 100, 100, 8, 5, memory={"client's child": 8000})
    with pytest.raises(UsageError, match=r"^4 clients at once take about .* sample fewer"):
        capacity.plan(settings(folder, 100, 100, 8, 5))
    capacity.plan(settings(folder, 100, 100, 2, 5))


def test_the_command_ends_with_2_before_anything_starts(tmp_path: Path) -> None:
    before = sorted(FOLDER.iterdir())
    variables = environment(tmp_path, ENGINE="deployment", PYTHONDONTWRITEBYTECODE="1")
    command = [FOLDER / "run.sh", "100000", "100000", "10", "5"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 100000 SuperNodes, two processes each, ")
    assert sorted(FOLDER.iterdir()) == before


def test_it_imports_nothing_that_takes_long() -> None:
    program = f"import sys; sys.path[0] = {str(FOLDER)!r}; import capacity; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.split()
    assert "capacity" in modules
    assert not {"torch", "numpy", "flwr"} & set(modules)


# --- The machine -----------------------------------------------------------------------------------------------------


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/", {"memory.max": 512}),
        ("0::/user/job", {"memory.max": "max", "user/memory.max": 512, "user/job/memory.max": 4096}),
        ("4:memory:/docker/abc", {"memory/memory.limit_in_bytes": 512}),
        ("5:cpu:/x\n4:memory:/job", {"memory/memory.limit_in_bytes": 2**43, "memory/job/memory.limit_in_bytes": 512}),
    ],
)
def test_a_limit_of_the_control_group_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, files: dict[str, int | str]
) -> None:
    monkeypatch.undo()  # the function itself
    write(tmp_path, "proc/meminfo", "MemTotal: 1 kB\nMemAvailable:     409600 kB\n")
    write(tmp_path, "proc/self/cgroup", f"{group}\n")
    for name, limit in files.items():
        write(tmp_path, f"sys/fs/cgroup/{name}", f"{limit * 2**20 if isinstance(limit, int) else limit}\n")
    assert capacity.machine_memory(tmp_path) == (512, 400)


def test_without_any_of_these_files_all_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    total, free = capacity.machine_memory(tmp_path)
    assert total == free > 256


# --- A GPU -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that says what nvidia-smi says where there is a GPU of which 6000 MiB are free."""
    monkeypatch.undo()
    write(tmp_path, "bin/nvidia-smi", "#!/bin/sh\necho 6000\n")
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")


def test_a_gpu_takes_as_many_clients_as_its_memory_has_room_for(folder: Path, gpu: None) -> None:
    assert capacity.plan(settings(folder, 100, 100, 10, 5)).gpu_slots == 6000 // capacity.DEVICE
    assert capacity.plan(settings(folder, 100, 100, 10, 5, GPU_SLOTS="2")).gpu_slots == 2
    write_run(folder, "20260101-000000-1", 100, 100, 1, 5, memory={"client's device": 3500})
    assert capacity.plan(settings(folder, 100, 100, 10, 5)).gpu_slots == 1


def test_the_plan_reaches_the_command(folder: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    command = engine.run(capacity.plan(settings(folder, 100, 100, 10, 5)), folder)
    assert command[-1].endswith("init-args-num-cpus=4 client-resources-num-gpus=0.2499")


def test_gpu_slots_limit_those_at_once_and_ask_for_no_gpu_where_there_is_none(folder: Path) -> None:
    command = engine.run(settings(folder, 100, 100, 10, 5, GPU_SLOTS="3"), folder)
    assert command[-1] == "num-supernodes=100 client-resources-num-cpus=1 init-args-num-cpus=3"


def test_a_share_of_the_gpu_has_room_for_that_many(folder: Path, gpu: None) -> None:
    """Flower divides 1 by the share, which it keeps in 32 bits, and rounds down."""
    for slots in range(1, 101):
        command = engine.run(settings(folder, 100, 100, 10, 5, GPU_SLOTS=str(slots)), folder)
        share = np.float32(command[-1].rpartition("=")[2])
        assert int(1 / float(share)) >= slots


@pytest.mark.parametrize("word", ["0", "-1", "two", "1.5"])
def test_gpu_slots_that_are_no_number(folder: Path, word: str) -> None:
    with pytest.raises(UsageError, match=rf"^GPU_SLOTS must be a whole number .*'{word}'"):
        settings(folder, GPU_SLOTS=word)
