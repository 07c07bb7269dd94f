"""What tests of the plan share: a machine with four cores and no GPU, settings, and a run that was measured."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

FOLDER = ROOT / "multiprocessing"
sys.path.append(str(FOLDER))  # behind basic, whose rooms are the same

import capacity  # noqa: E402
from launcher import arguments  # noqa: E402

found = importlib.util.spec_from_file_location("launch_multiprocessing", FOLDER / "launch.py")
launch = importlib.util.module_from_spec(found)  # under a name of its own: another example has a launch.py, too
found.loader.exec_module(launch)

MACHINE = 24.0 * 1024, 20.0 * 1024  # MiB: all, free


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, 24 GiB, no GPU."""
    monkeypatch.setattr("launcher.commands.cores", lambda: 4)
    monkeypatch.setattr(capacity, "cores", lambda: 4)
    monkeypatch.setattr(capacity, "machine_memory", lambda: MACHINE)
    monkeypatch.setenv("PATH", "")
    for name in ("CUDA_VISIBLE_DEVICES", "GPU_SLOTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(name="folder")
def project_folder(tmp_path: Path) -> Path:
    """As much of the example's folder as a plan looks at; what has been run there is yet to be written."""
    (tmp_path / "launcher").mkdir()
    (tmp_path / "pyproject.toml").write_text((FOLDER / "pyproject.toml").read_text())
    return tmp_path


def settings(folder: Path, *words: object, **variables: str) -> arguments.Settings:
    return arguments.parse([str(word) for word in words], folder, {"DATASET": "synthetic", **variables})


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


def plan(asked: arguments.Settings) -> str:
    return str(capacity.make_plan(asked))
