"""The processes of a run: each is started, watched and ended, and neither side waits for the other for ever."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import BASIC

from launcher.processes import Failed, Processes


@pytest.fixture
def started(tmp_path: Path):
    """Processes of a run whose folder is runs/x of an example."""
    run_dir = tmp_path / "runs" / "x"
    (run_dir / "logs").mkdir(parents=True)
    (tmp_path / "temporary").mkdir()
    found = Processes(run_dir, tmp_path / "temporary", "", None, dict(os.environ))
    yield found
    found.stop()


def test_each_has_a_log_a_status_and_the_example_s_folder(started: Processes) -> None:
    started.start("good", ["sh", "-c", "pwd; echo error >&2"])
    started.start("bad", ["sh", "-c", "exit 3"])
    started.start("killed", ["sh", "-c", "kill -9 $$"])
    started.start("none", ["no-such-command"])
    assert [started.wait(name, 20) for name in ("good", "bad", "killed", "none")] == [0, 3, -9, 127]
    assert started.log("good").read_text() == f"{BASIC}\nerror\n"
    assert started.log("none").read_text() == "no-such-command: No such file or directory\n"


def test_waiting_has_an_end(started: Processes) -> None:
    started.start("long", ["sleep", "60"])
    assert started.status("long") is None
    with pytest.raises(Failed, match="long has not ended within 0 s"):
        started.wait("long", 0.3)


def test_who_ignores_a_request_is_killed_with_those_it_has_started(started: Processes, tmp_path: Path) -> None:
    started.start("stubborn", ["sh", "-c", "trap '' TERM; sleep 60 & echo $! $$; while :; do sleep 1; done"])
    started.start("orphan", ["sh", "-c", "sleep 60 & echo $!"])
    assert started.wait("orphan", 20) == 0
    while not started.log("stubborn").read_text():
        time.sleep(0.05)
    pids = [int(pid) for name in ("stubborn", "orphan") for pid in started.log(name).read_text().split()]
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    began = time.monotonic()
    started.stop()
    assert time.monotonic() - began < 15
    living = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert [pid for pid in living if ") Z " not in Path(f"/proc/{pid}/stat").read_text()] == []
    assert not (tmp_path / "temporary").exists()


MANY = """
import os, sys
from pathlib import Path
from launcher.processes import Processes
run_dir = Path(sys.argv[1], "runs", "x")
(run_dir / "logs").mkdir(parents=True)
started = Processes(run_dir, run_dir / "temporary", "", None, dict(os.environ))
names = [f"{i}{'x' * 100}" for i in range(500)]
for name in names:
    started.start(name, ["true"], quiet=False)
assert [started.wait(name, 60) for name in names] == [0] * 500
started.stop()
"""


def test_many_are_started_though_their_answers_fill_a_pipe(tmp_path: Path) -> None:
    """As those of some 700 clients do, whose names are shorter."""
    command = [sys.executable, "-c", MANY, tmp_path]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(BASIC)}, check=True, timeout=100)
