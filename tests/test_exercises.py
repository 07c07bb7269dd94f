"""At least one exercise of each README is solved here, or where SOLVED says, so that it stays true."""

import re
from pathlib import Path

import pytest
from runs import ROOT, copy_example, finished

# By example, a word of the exercise in its README, and the test that solves it.
SOLVED = {
    "basic": ("FedAvgM", "test_exercises.py: test_server_momentum_changes_the_second_round"),
    "advanced_example": ("FedTrimmedAvg", "test_advanced.py: test_the_exercise_with_a_strategy_and_a_third_model"),
    "multiprocessing": ("isolation=false", "test_multiprocessing.py: test_all_ways_give_the_same_model"),
}


@pytest.mark.parametrize("example", [path.parent.name for path in ROOT.glob("*/server.py")])
def test_an_exercise_is_solved(example: str) -> None:
    section = (ROOT / example / "README.md").read_text().partition("\n## Try\n")[2].partition("\n## ")[0]
    exercises = re.findall(r"^\d\. (.+?)(?=^\d\. |\Z)", section, re.M | re.S)
    assert example in SOLVED, f"solve an exercise of {example} in the tests"
    word, solution = SOLVED[example]
    assert any(word in exercise for exercise in exercises)
    file, _, test = solution.partition(": ")
    assert f"def {test}(" in (ROOT / "tests" / file).read_text()


def losses(folder: Path, data_dir: Path) -> list[float]:
    """What the clients measure after each of two rounds."""
    run = finished(folder, 2, 2, 2, 2, "learning-rate=0.1", data_dir=data_dir, ENGINE="simulation")
    assert run.process.returncode == 0, run.stdout + run.stderr
    return [entry["evaluate"]["loss"] for entry in run.history["rounds"]]


@pytest.mark.slow
def test_server_momentum_changes_the_second_round(tmp_path: Path, data_dir: Path) -> None:
    """In round 1 there is nothing yet that could carry on."""
    folder = copy_example("basic", tmp_path / "basic")
    before = losses(folder, data_dir)
    server = (folder / "server.py").read_text()
    for old, new in (
        ("import FedAvg\n", "import FedAvgM\n"),
        ("    strategy = FedAvg(\n", "    strategy = FedAvgM(\n        server_momentum=0.5,\n"),
    ):
        assert server.count(old) == 1
        server = server.replace(old, new)
    (folder / "server.py").write_text(server)
    after = losses(folder, data_dir)
    assert after[0] == pytest.approx(before[0], rel=1e-5)
    assert after[1] != pytest.approx(before[1], rel=1e-5)
