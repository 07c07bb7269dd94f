"""Tests that, whatever is killed whenever, and on a full disk, files are whole and as new as was said."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from edits import edit
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from forked import processes
from runs import Launch, copy_example, finished

from checkpoint import Resumable
from resume import reopen
from rounds import history

KILLS = 25
SEED = 2026


# --- The writers -----------------------------------------------------------------------------------------------------


def write_history(folder: Path, number: int) -> None:
    history.save(folder, {"rounds": [{"round": i, "loss": 1.0} for i in range(1000 + number)]})


def read_history(folder: Path) -> int:
    rounds = [entry["round"] for entry in history.load(folder)["rounds"]]
    assert rounds == list(range(len(rounds)))
    return len(rounds) - 1000


def write_checkpoint(folder: Path, number: int) -> None:
    """As large as the CNN's, and all its numbers are the round's."""
    record = SimpleNamespace(entry={"round": number}, history={"rounds": []})
    run = SimpleNamespace(folder=folder, record=record, strategy=FedAvg(), best={})
    Resumable.save(run, ArrayRecord({"weight": torch.full((62_006,), float(number))}))


def read_checkpoint(folder: Path) -> int:
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (saved["arrays"]["ArrayRecord"]["weight"] == saved["round"]).all()
    return saved["round"]


both = pytest.mark.parametrize(
    ("write", "read"),
    [(write_history, read_history), (write_checkpoint, read_checkpoint)],
    ids=["history", "checkpoint"],
)


def write_for_ever(write, folder: Path, first: int, says: Connection) -> None:
    """Write number after number, and say of each that it is on disk."""
    for number in itertools.count(first):
        write(folder, number)
        says.send(number)


@both
def test_a_writer_is_killed_at_random_points(write, read, tmp_path: Path) -> None:
    """After each kill the file is whole, and the last that the writer said was on disk, or the one after it."""
    chance = random.Random(SEED)
    (tmp_path / "logs").mkdir()
    newest = 0
    for _ in range(KILLS):
        hears, says = processes.Pipe(duplex=False)
        writer = processes.Process(target=write_for_ever, args=(write, tmp_path, newest + 1, says))
        writer.start()
        says.close()  # the writer's end is now the only one
        assert hears.poll(60)  # it has begun
        writer.join(chance.uniform(0, 0.03))
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        with contextlib.suppress(EOFError):
            while True:
                said = hears.recv()
        newest = read(tmp_path)
        assert said <= newest <= said + 1
    reopen(tmp_path)  # as a resume does: what the killed writers had begun does not pile up
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 1


@both
def test_a_writer_finds_the_disk_full(write, read, small_disk: Path) -> None:
    """It says so, and the old file stays; with some space again it goes on."""
    write(small_disk, 1)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 16 * 1024))
    with pytest.raises(OSError, match="No space left on device"):
        write(small_disk, 2)
    assert read(small_disk) == 1
    assert len(list(small_disk.iterdir())) == 2  # the half-written one has been removed
    filler.unlink()
    write(small_disk, 3)
    assert read(small_disk) == 3


# --- A whole run -----------------------------------------------------------------------------------------------------

ROUNDS = 24
ARGUMENTS = (2, 2, 2, ROUNDS, "strategy=fedadam", "server-learning-rate=0.05", "toy=true")


def kill_everything(run: Launch) -> None:
    """The launcher first, or it would tidy up."""
    os.killpg(run.process.pid, signal.SIGKILL)
    for pid in run.pids(""):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.process.wait()


def rounds_on_disk(folder: Path) -> int:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["round"]


@pytest.mark.slow
def test_a_whole_run_is_killed_three_times(tmp_path: Path, data_dir: Path) -> None:
    """Twice at a random moment, and once while checkpoint.pt is being written; it ends as if nothing had been."""
    whole = finished(
        copy_example("advanced_example", tmp_path / "whole"), *ARGUMENTS, data_dir=data_dir, ENGINE="simulation"
    )
    assert whole.process.returncode == 0, whole.stdout + whole.stderr

    folder = copy_example("advanced_example", tmp_path / "killed")
    hold, reached = folder / "hold", folder / "reached"
    line = "        os.replace(file.name, path)\n"
    wait = f"""        while path.name == "checkpoint.pt" and os.path.exists({str(hold)!r}):
            open({str(reached)!r}, "w").close()
            time.sleep(0.02)
"""
    edit(folder / "rounds/history.py", (line, wait + line))
    chance = random.Random(SEED)
    words: tuple = ARGUMENTS
    for first, last, in_the_writer in [(1, 6, False), (8, 13, True), (15, 20, False)]:
        at = chance.randint(first, last)
        with Launch(folder, *words, data_dir=data_dir, ENGINE="simulation") as run:
            run.found = next(iter(run.before), None)  # of a resume, the same folder
            run.wait_until(lambda n=at, r=run: r.history["rounds"][-1]["round"] >= n, timeout=150)
            if in_the_writer:
                hold.touch()
                run.wait_until(reached.exists)
            else:
                time.sleep(chance.uniform(0, 0.3))
            kill_everything(run)
        hold.unlink(missing_ok=True)
        shown = [int(row.split()[0]) for row in run.stdout.splitlines() if row.strip()[:1].isdigit()]
        on_disk = [entry["round"] for entry in run.history["rounds"]]
        assert on_disk == list(range(len(on_disk)))
        assert set(shown) <= set(on_disk)
        assert at - 1 <= rounds_on_disk(run.run_dir) <= on_disk[-1] < ROUNDS
        words = ("resume=latest",)
    resumed = finished(folder, *words, data_dir=data_dir, ENGINE="simulation")
    assert resumed.process.returncode == 0, resumed.stdout + resumed.stderr
    record = json.loads((folder / "runs/latest/history.json").read_text())
    assert [entry["round"] for entry in record["rounds"]] == list(range(ROUNDS + 1))
    assert record["model_sha256"] == whole.history["model_sha256"]
    assert not list((folder / "runs/latest").glob(".*-*"))
