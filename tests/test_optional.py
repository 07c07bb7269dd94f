"""Tests that nothing of ours is needed to train: without the lines that name `rounds`, Flower does it alone."""

from pathlib import Path

import pytest
import torch
from edits import edit
from runs import ON_ONE_CORE, Launch, copy_example, finished

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
HOW = 'print("started as", *sys.orig_argv)\natexit.register(print, "ended as Python ends")\n'


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Launch:
    """A run without guard and mods, and whose SuperNodes sleep in another way than `launcher/warm.py` knows."""
    folder = copy_example("basic", tmp_path_factory.mktemp("bare") / "basic")
    edit(
        folder / "client.py",
        *MODS,
        ("\nimport cifar_utils\n", f"\nimport atexit\nimport sys\n\nimport cifar_utils\n\n{HOW}"),
    )
    edit(folder / "server.py", *GUARD)
    edit(folder / "launcher" / "warm.py", ('"time.sleep(3)"', '"sleep(9)"'))
    run = finished(folder, 2, 2, 2, 1, data_dir=data_dir)
    assert run.process.returncode == 0, run.stdout + run.stderr
    return run


def test_without_guard_and_mods(bare: Launch) -> None:
    """No history of the rounds is written then, but a model is."""
    run = bare
    assert run.history["status"] == "completed"
    assert "aggregate_train: Received 2 results and 0 failures" in run.log("run")
    assert "aggregate_evaluate: Received 2 results and 0 failures" in run.log("run")
    assert "fc3.bias" in torch.load(run.folder / "model.pt", weights_only=True)
    assert run.nothing_left()


def test_apps_are_forked_though_supernodes_sleep_in_another_way(bare: Launch) -> None:
    """Which the run says once; what `warm.py` knows of Flower is in test_seams.py."""
    assert bare.stderr.count("WARNING: this version of Flower waits for messages in another way") == 1
    for client in (0, 1):
        log = bare.log(f"client-{client}").splitlines()
        started = [line for line in log if line.startswith("started as")]
        assert len(started) >= 2  # once to train, once to evaluate
        assert all("launcher/__main__.py" in line for line in started)
        assert log.count("ended as Python ends") == len(started)


def test_with_the_guard_and_without_mods(tmp_path: Path, data_dir: Path) -> None:
    """Who is who then stays unknown; one client fails in each round, by an error that no mod has shortened."""
    folder = copy_example("basic", tmp_path / "basic")
    lines = "    if context.node_config['partition-id'] == 1:\n        raise ValueError('a bad\\nclient')\n"
    edit(folder / "client.py", *MODS, ("    # 2. Plain PyTorch.\n", lines))
    run = finished(folder, 3, 3, 3, 2, data_dir=data_dir, through=ON_ONE_CORE, ENGINE="simulation")
    assert run.process.returncode == 0, run.stdout + run.stderr
    for entry in run.history["rounds"]:
        assert entry["train"]["clients"] == 2
        assert entry["train"]["failures"] == [{"partition-id": None, "reason": "a bad client"}]
        assert entry["evaluate"]["clients"] == 3
    lines = [line.strip() for line in run.stdout.splitlines()]
    assert lines.count("client None: a bad client") == 1
    assert lines[-1].startswith("basic: 2 rounds, 3 clients, ")
