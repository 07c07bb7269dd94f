"""A user's own project, whatever surrounds it: it runs in both engines, and what goes in comes out.

Arrays keep their dtype and value, and the same command gives the same model.
"""

import json
import math
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edits import edit
from runs import ON_ONE_CORE, Launch, copy_example, finished

CLOSED = "http://127.0.0.1:9"  # nothing listens there
ENGINES = ("deployment", "simulation")

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


OWN = """seed = 2026
clients = 5
dataset = "mine"
engine = 2.5
values = "v"
keys = true
description = "d"
bound = inf
opt.lr = 0.1
opt.decay.steps = 10
"a key" = 1
"""
SEEN = """    seen = {key: repr(value) for key, value in context.run_config.items()}
    (run.folder / "seen.json").write_text(__import__("json").dumps(seen))
"""
# The name of a data set may hold what matplotlib takes for a formula.
DATASET = "price_$^$"


EXTENSION = """from pathlib import Path


def prepare(run):
    (run.run_dir / "hooks").write_text("prepare\\n")


def after_superlink(run):
    with (run.run_dir / "hooks").open("a") as file:
        file.write(f"after {[log.stem for log in (run.run_dir / 'logs').iterdir()]}\\n")


def supernode_arguments(run, partition_id):
    return ["--insecure", "--max-retries", str(10 + partition_id)]


def cleanup(run):
    with (run.run_dir / "hooks").open("a") as file:
        file.write(f"cleanup {run.history['status']} {len(run.history['rounds'])}\\n")
"""


def users_own(folder: Path) -> None:
    """Turn a copy into somebody's project, with keys, a data set, an extension and modules of their own."""
    edit(
        folder / "pyproject.toml",
        ("seed = 2026", OWN),
        ('dataset = "auto"', f'dataset = "{DATASET}"\nextension = "hooks"'),
    )
    (folder / "hooks.py").write_text(EXTENSION)
    for name in ("launch", "partitions", "preflight", "capacity", "security", "machines", "fork_server"):
        (folder / f"{name}.py").write_text("raise SystemExit('nobody has asked for this')\n")
    edit(folder / "cifar_utils.py", ("cifar_data.load_split(split)", "cifar_data.load_split(split, 'synthetic')"))
    with (folder / "server.py").open("a") as file:
        file.write(SEEN)
    (folder / "runs" / "latest").mkdir(parents=True)  # copies that follow links make a folder of it
    (folder / "runs" / "latest" / "mine").touch()


def run_surrounded(engine: str, folder: Path, data_dir: Path) -> SimpleNamespace:
    """Run it with other programs' variables, and with signals that its parent has set to be ignored."""
    example = changed(folder / "my 'fine' project")
    users_own(example)
    (folder / "theirs").mkdir()
    (folder / "theirs" / "history.json").write_text("not yours")
    after = folder / "after.sh"
    after.write_text(f"#!/bin/sh\ntouch '{folder}/after'\n")
    after.chmod(0o755)
    long = folder / ("t" * 100)
    long.mkdir()
    short = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"), CLOSED)
    variables = {
        **{name.upper(): value for name, value in proxies.items()},
        **proxies,
        "NO_PROXY": "example.org",
        **{"RUN_DIR": str(folder / "theirs"), "AFTER_RUN": str(after), "FORK_SERVER": "/nonexistent"},
        **{"MPLBACKEND": "nonsense", "PYTHONSAFEPATH": "1", "RAY_ADDRESS": "ray://127.0.0.1:9", "RAY_NAMESPACE": "x"},
        **{"FLWR_HOME": str(folder / "flwr-home"), "XDG_CACHE_HOME": "relative", "CDPATH": "/"},
        "MPLCONFIGDIR": str(data_dir.parent / "matplotlib"),  # it would take the relative path
        **{"PYTHONIOENCODING": "ascii", "TMPDIR": str(long if engine == "simulation" else short)},
    }
    words = (3, 3, 3, 1, "clients=7", "opt.lr=0.2", "a key=3")
    ignoring = ("bash", "-c", "trap '' INT HUP CHLD USR1; exec \"$@\"", "-")
    through = (*ON_ONE_CORE, *ignoring) if engine == "simulation" else ignoring
    options = {"data_dir": data_dir, "through": through, "ENGINE": engine, "DATASET": "", **variables}
    with Launch(example, *words, **options) as run:
        run.wait_until(lambda: run.pids("flower-superlink"))
        for number in (signal.SIGHUP, signal.SIGINT):  # as where a terminal closes, and to a job in the background
            os.killpg(run.process.pid, number)
        run.wait()
    return SimpleNamespace(run=run, engine=engine, folder=folder, example=example, temporary=(long, short))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Iterator[dict[str, SimpleNamespace]]:
    """One round of three clients in both engines."""
    made = {engine: run_surrounded(engine, tmp_path_factory.mktemp("surrounded"), data_dir) for engine in ENGINES}
    yield made
    for one in made.values():
        shutil.rmtree(one.temporary[1])


@pytest.fixture(params=ENGINES)
def surrounded(request: pytest.FixtureRequest, runs: dict[str, SimpleNamespace]) -> SimpleNamespace:
    return runs[request.param]


@pytest.fixture(scope="module")
def model(runs: dict[str, SimpleNamespace]) -> dict[str, Any]:
    return torch.load(runs["simulation"].run.run_dir / "model.pt", weights_only=True)


# --- A user's own folder, variables and signals -----------------------------------------------------------------------


def test_variables_and_ignored_signals_change_nothing(surrounded: SimpleNamespace) -> None:
    run = surrounded.run
    assert run.process.returncode == 0, run.stdout + run.stderr
    assert "WARNING" not in run.stderr
    assert run.history["status"] == "completed"
    assert run.history["rounds"][-1]["evaluate"]["clients"] == 3
    assert run.nothing_left()


def test_it_stays_out_of_other_folders(surrounded: SimpleNamespace) -> None:
    assert sorted(
        path.name for path in surrounded.folder.iterdir() if not re.search(r"\.(out|err)\d+$", path.name)
    ) == [
        "after.sh",
        surrounded.example.name,
        "theirs",
        "t" * 100,
    ]
    assert (surrounded.folder / "theirs" / "history.json").read_text() == "not yours"
    left = [path.name for folder in surrounded.temporary for path in folder.iterdir()]
    assert [name for name in left if not name.startswith("torchinductor_")] == []  # PyTorch keeps that for next time


def test_a_folder_in_the_place_of_the_link_is_left_alone(surrounded: SimpleNamespace) -> None:
    latest = surrounded.example / "runs" / "latest"
    assert [path.name for path in latest.iterdir()] == ["mine"]
    assert sorted(path.name for path in latest.parent.iterdir()) == [surrounded.run.run_dir.name, "latest"]


def test_a_user_s_own_keys_reach_the_app(surrounded: SimpleNamespace) -> None:
    seen = json.loads((surrounded.run.run_dir / "seen.json").read_text())
    expected = {"clients": 7, "dataset": "mine", "engine": 2.5, "values": "v", "keys": True, "description": "d"}
    expected |= {"bound": math.inf, "opt.lr": 0.2, "opt.decay.steps": 10, "a key": 3, "min-clients": 3}
    assert {key: seen.get(key) for key in expected} == {key: repr(value) for key, value in expected.items()}
    assert surrounded.run.history["config"]["bound"] is None  # JSON has no word for infinity
    assert (surrounded.run.history["clients"], surrounded.run.history["engine"]) == (3, surrounded.engine)


def test_the_extension_is_called_in_its_turn(surrounded: SimpleNamespace) -> None:
    hooks = (surrounded.run.run_dir / "hooks").read_text().splitlines()
    assert hooks == ["prepare", "after ['superlink']", "cleanup completed 1"]
    started = [line for line in surrounded.run.stdout.splitlines() if line.startswith("+ flower-supernode")]
    assert ["--max-retries 10" in line for line in started] == [True] * (surrounded.engine == "deployment")


def test_a_name_that_looks_like_a_formula_is_drawn(surrounded: SimpleNamespace) -> None:
    assert surrounded.run.history["dataset"] == DATASET
    assert (surrounded.run.run_dir / "history.png").read_bytes().startswith(b"\x89PNG")


# --- What goes in comes out -------------------------------------------------------------------------------------------


def test_dropout_repeats(runs: dict[str, SimpleNamespace]) -> None:
    """Both engines and, so, two runs of one of them: nothing but the seed decides what is dropped."""
    assert len({one.run.history["model_sha256"] for one in runs.values()}) == 1


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
