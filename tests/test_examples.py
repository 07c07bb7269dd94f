"""advanced_example and multiprocessing, end to end, each once: it completes, learns something, and leaves nothing."""

from pathlib import Path

import pytest
from runs import copy_example, finished


@pytest.mark.parametrize(
    ("example", "arguments"), [("advanced_example", (3, 3, 2, 2)), ("multiprocessing", (6, 6, 2, 2))]
)
def test_it_completes(example: str, arguments: tuple[int, ...], tmp_path: Path, data_dir: Path) -> None:
    run = finished(copy_example(example, tmp_path / example), *arguments, data_dir=data_dir, ENGINE="simulation")
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert [entry["round"] for entry in run.history["rounds"]] == [0, 1, 2]  # both evaluate on the server, first of all
    losses = [entry["server"]["loss"] for entry in run.history["rounds"]]
    assert len(set(losses)) == 3  # the weights that were just aggregated, not the first ones again
    assert [entry["train"]["clients"] for entry in run.history["rounds"][1:]] == [2, 2]
    assert run.history["accuracy"] == run.history["rounds"][-1]["server"]["accuracy"]
    assert (run.run_dir / "model.pt").exists()
    assert run.nothing_left()
