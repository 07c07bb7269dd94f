"""The plan before the start: what it takes into account, and what it refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plans import FOLDER, capacity, launch, machine, plan, project_folder, settings, write_run  # noqa: F401
from runs import environment

from launcher.project import UsageError


def gib(line: str) -> float:
    return float(re.search(r"about ([\d.]+) of 24\.0 GiB", line)[1])


# --- The line --------------------------------------------------------------------------------------------------------


def test_one_line_which_says_that_nothing_was_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = settings(folder, 100, 100, 10, 5)
    assert launch.check(asked) == asked
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Plan: 4 of 10 clients at once, about ")
    assert line.endswith("(roughly: no such run was measured here yet)")
    assert 1 < gib(line) < 4


def test_memory_grows_with_those_at_once_and_not_with_clients(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needed(*words: object, **variables: str) -> float:
        asked = settings(folder, *words, **variables)
        return capacity.memory(asked, None, capacity.make_plan(asked).at_once)

    assert needed(10, 10, 10, 5) == needed(1000, 1000, 20, 5)
    assert needed(10, 10, 1, 5) < needed(10, 10, 4, 5) == needed(10, 10, 5, 5)
    assert needed(10, 10, 10, 5, "isolation=false") > needed(10, 10, 10, 5)  # PyTorch in each, shared with none
    nodes = [needed(clients, clients, 2, 5, ENGINE="deployment") for clients in (10, 20)]
    assert nodes[1] - nodes[0] == 10 * capacity.CLIENT[True]
    assert needed(10, 10, 2, 5, ENGINE="deployment", WARM="0") > nodes[0]
    in_all = needed(10, 10, 10, 5)
    monkeypatch.setenv("GPU_SLOTS", "2")
    assert needed(10, 10, 10, 5) < in_all


def test_what_the_last_run_measured_counts(folder: Path) -> None:
    asked = settings(folder, 100, 100, 8, 10)
    rough = gib(plan(asked))
    write_run(
        folder,
        "20260101-000000-1",
        100,
        100,
        8,
        5,
        memory={"client": 169, "client's child": capacity.RESIDENT["client's child"] + 2000},
    )
    line = plan(asked)
    assert gib(line) == pytest.approx(rough + 4 * 2000 / 1024, abs=0.11)
    assert line.endswith("about 60 s (by run 20260101-000000-1)")  # 20 s, and ten rounds of 4 s


def test_time_grows_with_rounds_and_with_sampled(folder: Path) -> None:
    write_run(folder, "20260101-000000-1", 100, 100, 8, 5)
    before = capacity.last_run(settings(folder))

    def seconds(*words: object) -> float:
        asked = settings(folder, *words)
        return capacity.seconds(asked, before, capacity.make_plan(asked).at_once)

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


def test_memory_that_others_have_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "machine_memory", lambda: (24 * 1024, 512))
    assert "(only 0.5 are free now!)" in plan(settings(folder, 100, 100, 10, 5))


# --- What is refused -------------------------------------------------------------------------------------------------


def test_what_can_not_fit_is_refused_with_the_numbers(folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        capacity.make_plan(settings(folder, 600, 600, 10, 5, ENGINE="deployment"))
    assert re.match(
        r"600 SuperNodes, .* take about \d+\.\d GiB of memory, and this machine has 24\.0", str(caught.value)
    )
    assert "ENGINE=simulation" in str(caught.value)
    capacity.make_plan(settings(folder, 20, 20, 10, 5, ENGINE="deployment"))
    capacity.make_plan(settings(folder, 200, 200, 10, 5))


def test_children_that_are_too_large_are_refused(folder: Path) -> None:
    write_run(folder, "20260101-000000-1", 100, 100, 8, 5, memory={"client's child": 8000})
    with pytest.raises(UsageError, match=r"^4 clients at once take about .* sample fewer"):
        capacity.make_plan(settings(folder, 100, 100, 8, 5))
    capacity.make_plan(settings(folder, 100, 100, 2, 5))


def test_the_command_ends_with_2_before_anything_starts(tmp_path: Path) -> None:
    before = sorted(FOLDER.iterdir())
    variables = environment(tmp_path, ENGINE="deployment", PYTHONDONTWRITEBYTECODE="1", PATH=os.defpath)
    command = [FOLDER / "run.sh", "100000", "100000", "10", "5"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 100000 SuperNodes, two processes each, ")
    assert sorted(FOLDER.iterdir()) == before


def test_it_imports_nothing_that_takes_long() -> None:
    program = f"import sys; sys.path[0] = {str(FOLDER)!r}; import launch; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.split()
    assert "sharing" in modules
    assert not {"torch", "numpy", "flwr"} & set(modules)
