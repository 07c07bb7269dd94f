"""Tests that nothing of ours is needed to train: without the lines that name `rounds`, Flower does it alone."""

from pathlib import Path

import torch
from edits import edit
from runs import copy_example, finished

MODS = (
    ("from rounds.mods import named, seeded\n", ""),
    ("ClientApp(mods=[named, seeded])", "ClientApp()"),
)
GUARD = (
    ("from rounds.guarded import Guarded\n", ""),
    ("    run = Guarded(strategy, context)\n", ""),
    ("result = run.start(", "result = strategy.start("),
    ('run.folder / "model.pt"', '"model.pt"'),
)


def test_without_guard_and_mods(tmp_path: Path, data_dir: Path) -> None:
    """No history of the rounds is written then, but a model is."""
    folder = copy_example("basic", tmp_path / "basic")
    edit(folder / "client.py", *MODS)
    edit(folder / "server.py", *GUARD)
    run = finished(folder, 2, 2, 2, 1, data_dir=data_dir)
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert run.history["status"] == "completed"
    assert "aggregate_train: Received 2 results and 0 failures" in run.log("run")
    assert "aggregate_evaluate: Received 2 results and 0 failures" in run.log("run")
    assert "fc3.bias" in torch.load(folder / "model.pt", weights_only=True)
    assert run.nothing_left()


def test_with_the_guard_and_without_mods(tmp_path: Path, data_dir: Path) -> None:
    """Who is who then stays unknown; one client fails in each round, by an error that no mod has shortened."""
    folder = copy_example("basic", tmp_path / "basic")
    lines = "    if context.node_config['partition-id'] == 1:\n        raise ValueError('a bad\\nclient')\n"
    edit(folder / "client.py", *MODS, ("    # 2. Plain PyTorch.\n", lines))
    run = finished(folder, 3, 3, 3, 2, data_dir=data_dir, ENGINE="simulation")
    assert run.process.returncode == 0, run.stdout + run.stderr
    for entry in run.history["rounds"]:
        assert entry["train"]["clients"] == 2
        assert entry["train"]["failures"] == [{"partition-id": None, "reason": "a bad client"}]
        assert entry["evaluate"]["clients"] == 3
    lines = [line.strip() for line in run.stdout.splitlines()]
    assert lines.count("client None: a bad client") == 1
    assert lines[-1].startswith("basic: 2 rounds, 3 clients, ")
