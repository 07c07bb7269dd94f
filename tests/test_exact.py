"""Tests that what goes in comes out: arrays keep their dtype and value, and the same command gives the same model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edits import edit
from runs import Launch, copy_example, finished

# A model with dropout, and buffers of all kinds: an index, a mask, a count, and numbers of half precision.
BUFFERS = """        self.fc3 = nn.Linear(84, NUM_CLASSES)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("index", torch.arange(-256, 256))
        self.register_buffer("mask", torch.arange(64) % 3 == 0)
        self.register_buffer("count", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("halves", torch.arange(500, dtype=torch.float16) / 7)
"""
FORWARD = """        x = self.dropout(F.relu(self.fc2(x[:, self.index[-120:] - 136])))  # columns 0 to 119
"""
# Each client counts by its partition id, 0 to 2, and adds it to the halves.
COUNT = """    net.count += 7 + (context.node_config["partition-id"] > 1)
    net.halves += context.node_config["partition-id"] ** 2
"""


def changed(folder: Path) -> Path:
    copy_example("basic", folder)
    edit(
        folder / "cifar_utils.py",
        ("        self.fc3 = nn.Linear(84, NUM_CLASSES)\n", BUFFERS),
        ("        x = F.relu(self.fc2(x))  # (B, 84)\n", FORWARD),
    )
    edit(folder / "client.py", ("    # 3. The reply.", f"{COUNT}    # 3. The reply."))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> dict[str, Launch]:
    """One round of three clients in both engines, side by side."""
    root = tmp_path_factory.mktemp("exact")
    made = {
        engine: Launch(changed(root / engine), 3, 3, 3, 1, data_dir=data_dir, ENGINE=engine)
        for engine in ("deployment", "simulation")
    }
    for run in made.values():
        with run:
            run.wait()
    return made


@pytest.fixture(scope="module")
def model(runs: dict[str, Launch]) -> dict[str, Any]:
    return torch.load(runs["simulation"].run_dir / "model.pt", weights_only=True)


def test_dropout_repeats(runs: dict[str, Launch]) -> None:
    """Both engines and, so, two runs of one of them: nothing but the seed decides what is dropped."""
    for run in runs.values():
        assert run.process.returncode == 0, run.stdout + run.stderr
    assert len({run.history["model_sha256"] for run in runs.values()}) == 1


def test_integers_and_booleans_come_back_as_they_were_sent(model: dict[str, Any]) -> None:
    assert torch.equal(model["index"], torch.arange(-256, 256))
    assert torch.equal(model["mask"], torch.arange(64) % 3 == 0)


def test_a_mean_of_integers_is_rounded(model: dict[str, Any]) -> None:
    """7, 7 and 8 are 7.33."""
    assert model["count"].dtype == torch.int32
    assert model["count"] == 7


def test_half_precision_is_averaged_in_single(model: dict[str, Any]) -> None:
    """The clients have as many examples each, and add 0, 1 and 4."""
    sent = np.arange(500, dtype=np.float16) / np.float16(7)
    clients = [(sent + np.float16(added)).astype(np.float64) for added in (0, 1, 4)]
    assert model["halves"].dtype == torch.float16
    assert model["halves"].tolist() == np.mean(clients, axis=0).astype(np.float16).tolist()


@pytest.mark.slow
def test_another_strategy_keeps_the_types(tmp_path: Path, data_dir: Path) -> None:
    """FedAdam makes float64 of everything, also of what all clients send back as it was."""
    folder = changed(tmp_path / "basic")
    edit(
        folder / "server.py",
        ("from flwr.serverapp.strategy import FedAvg\n", "from flwr.serverapp.strategy import FedAdam\n"),
        ("    strategy = FedAvg(\n", "    strategy = FedAdam(\n"),
    )
    run = finished(folder, 3, 3, 3, 1, data_dir=data_dir, ENGINE="simulation")
    assert run.process.returncode == 0, run.stdout + run.stderr
    model = torch.load(run.run_dir / "model.pt", weights_only=True)
    assert torch.equal(model["index"], torch.arange(-256, 256))
    assert torch.equal(model["mask"], torch.arange(64) % 3 == 0)
    assert {str(tensor.dtype) for tensor in model.values()} == {
        *("torch.float32", "torch.float16", "torch.int64", "torch.int32", "torch.bool")
    }
    assert run.history["rounds"][-1]["train"]["failures"] == []
